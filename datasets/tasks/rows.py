"""Annotation files taken apart into rows: JSON, JSON lines and CSV, with errors that name file, row and field.

A file that cannot be read as a whole raises; a single bad record becomes a problem and hides no other.
"""

import csv
import io
import json
import re
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import orjson

from .problems import Kind, Report, RowError

T = TypeVar("T")
_BOM = b"\xef\xbb\xbf"
_WHOLE = re.compile(r"\s*[-+]?[0-9]{1,18}\s*")  # fits 64 bits
_ID_FIELDS = (
    ("question_id",),
    ("assignmentid",),
    ("uid",),
    ("scene_id", "object_id", "ann_id"),
    ("scan_id", "target_id"),
)
_MEND = "put that right, or take the official file."
_SHOWN = 60  # characters of a value in a message


@dataclass(frozen=True)
class Row:
    """One record of an annotation file, with its place for error messages. Rows count from 1."""

    path: Path
    number: int
    record: dict[str, Any]

    @property
    def place(self) -> str:
        return f"{self.path}, row {self.number}"

    @property
    def record_id(self) -> str:
        """What the file calls the record; "" where it has no name."""
        for names in _ID_FIELDS:
            if all(name in self.record for name in names):
                return shown("-".join(str(self.record[name]) for name in names))
        return shown(str(self.record.get("scene_id", "")))

    def error(
        self, kind: Kind, field: str, words: str, *, scene_id: str = "", object_id: int | None = None
    ) -> RowError:
        """An error about this row; `words` go on after the place."""
        return RowError(
            kind,
            self.path,
            self.number,
            f"{self.place}{words}",
            record_id=self.record_id,
            field=field,
            scene_id=scene_id,
            object_id=object_id,
        )

    def bad(self, field: str, words: str) -> RowError:
        """An error about one field of this row."""
        return self.error("bad_field", field, f": {words}")

    def no_answer(self, key: str) -> RowError:
        """An error about a row that asks, and does not answer."""
        return self.error("bad_field", key, " has no answer; take the row out.")

    def get(self, key: str, kind: type[T], default: T | None = None) -> T:
        """A field of the record; RowError where it is missing without a default, or of another type."""
        value = self.record.get(key, default)
        if value is None:
            raise self.bad(key, f"the field {key!r} is missing; {_MEND}")
        if not isinstance(value, kind):
            raise self.bad(key, f"{key!r} is {type(value).__name__}, not {kind.__name__}; {_MEND}")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """A text field, outer white space removed."""
        return self.get(key, str, default).strip()

    def filled(self, key: str) -> str:
        """A text field that must say something, such as a question."""
        text = self.text(key)
        if not text:
            raise self.bad(key, f"{key!r} is empty; fill it in, or take the row out.")
        return text

    def name(self, key: str) -> str:
        """An id that benchmarks write as text or as a whole number, as text."""
        value = self.record.get(key)
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        return self.filled(key)

    def integer(self, key: str) -> int:
        """A whole number, which some benchmarks write as text."""
        value = self.record.get(key)
        if isinstance(value, (str, int)) and not isinstance(value, bool) and _WHOLE.fullmatch(str(value)):
            return int(value)
        raise self.bad(key, f"{key!r} is {shown(repr(value))}, not a whole number; {_MEND}")

    def integers(self, key: str) -> list[int]:
        """A list of whole numbers; absent reads as empty."""
        values = self.get(key, list, [])
        if not all(type(value) is int and abs(value) < 2**63 for value in values):
            raise self.bad(key, f"{key!r} is not a list of whole numbers; {_MEND}")
        return values

    def strings(self, key: str, default: list[str] | None = None) -> list[str]:
        """A list of texts as they stand."""
        values = self.get(key, list, default)
        for value in values:
            if not isinstance(value, str):
                raise self.bad(
                    key, f"{key!r} holds {shown(repr(value))}, which is not a text; put texts there, or take it out."
                )
        return values

    def texts(self, key: str) -> list[str]:
        """A list of texts, outer white space removed, repeats and empty ones left out; absent reads as empty."""
        return list(dict.fromkeys(value.strip() for value in self.strings(key, []) if value.strip()))


def shown(text: str) -> str:
    """A value cut to a length that fits a message."""
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


def first_time(seen: dict[Hashable, int], key: Hashable, row: Row, field: str) -> None:
    """Remember a record's id in `seen` (id -> row number); RowError where an earlier record has it."""
    if key in seen:
        raise row.error(
            "duplicate", field, f" repeats the {field} of row {seen[key]}, {shown(str(key))}; take one of them out."
        )
    seen[key] = row.number


def annotation_file(root: str | Path, name: str) -> Path:
    """`root/annotations/<name>`; ValueError says where the file goes."""
    path = Path(root) / "annotations" / name
    if not path.is_file():
        raise ValueError(f"There is no annotation file {path}; data/README.md says where to get it.")
    return path


def read_utf8(path: Path) -> str:
    """Content of a text file, a byte order mark removed; ValueError names the first byte that is not UTF-8."""
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 at byte {error.start}; save it as UTF-8, or copy it again from its source."
        ) from None


def read_json(path: Path) -> Any:
    """Content of a JSON file; ValueError where it is broken."""
    try:
        return orjson.loads(read_utf8(path))
    except orjson.JSONDecodeError as error:
        raise ValueError(f"{path} is not whole JSON ({error}); copy it again from its source.") from None


def read_json_table(path: Path) -> dict[str, Any]:
    """A JSON file with one named entry a record; ValueError where a name comes twice, which would hide an entry."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} does not hold named records; use the official file.")
    # read_json has refused whatever nests too deep for the second pass
    pairs = json.loads(read_utf8(path), object_pairs_hook=lambda pairs: pairs)
    seen: set[str] = set()
    for name, _ in pairs:
        if name in seen:
            raise ValueError(f"{path} has two records named {shown(name)!r}; take one of them out.")
        seen.add(name)
    return content


def rows_of(path: Path, records: Any, report: Report) -> Iterator[Row]:
    """Records of a list with their places."""
    if not isinstance(records, list):
        raise ValueError(f"{path} does not hold a list of records; use the official file.")
    for number, record in enumerate(records, 1):
        if isinstance(record, dict):
            yield Row(path, number, record)
        else:
            report.add(_bad_record(path, number, "not a record with named fields; use the official file."))


def read_rows(path: Path, report: Report) -> Iterator[Row]:
    """Rows of a JSON list, or of a `.jsonl` file."""
    if path.suffix != ".jsonl":
        yield from rows_of(path, read_json(path), report)
        return
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            content = line.removeprefix(_BOM).strip() if number == 1 else line.strip()
            if not content:
                continue
            try:
                record = orjson.loads(content.decode())
            except UnicodeDecodeError as error:
                report.add(_bad_record(path, number, f"not UTF-8 at byte {error.start}; copy the file again."))
                continue
            except orjson.JSONDecodeError as error:
                report.add(_bad_record(path, number, f"not JSON ({error}); copy the file again."))
                continue
            if isinstance(record, dict):
                yield Row(path, number, record)
            else:
                report.add(_bad_record(path, number, "not a record with named fields; use the official file."))


def read_csv(path: Path, columns: Sequence[str], report: Report, *, header: bool = True) -> Iterator[Row]:
    """Rows of a CSV file, empty lines left out.

    Args:
        columns: names that the header must hold; without a header, the names of the cells in order.

    Raises:
        ValueError: a column is missing, or the file is not UTF-8.
    """
    reader = csv.reader(io.StringIO(read_utf8(path), newline=""))
    names = list(columns)
    if header:
        try:
            names = next(reader, [])
        except csv.Error as error:
            raise ValueError(f"{path} is not a whole CSV file ({error}); copy it again from its source.") from None
        missing = [name for name in columns if name not in names]
        if missing:
            raise ValueError(f"{path} lacks the column {missing[0]!r}; use the official {path.name}.")
    number = 0
    while True:
        number += 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            report.add(_bad_record(path, number, f"not a row of CSV ({error}); copy the file again."))
            continue
        if not cells:
            number -= 1
        elif len(cells) != len(names):
            words = f"{len(cells)} cells where there are {len(names)} columns; copy the file again."
            report.add(_bad_record(path, number, words))
        else:
            yield Row(path, number, dict(zip(names, cells, strict=True)))


def _bad_record(path: Path, number: int, words: str) -> RowError:
    return RowError("bad_record", path, number, f"{path}, row {number}: {words}")
