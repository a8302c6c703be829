"""JSON that people hand in, read strictly: every fault is named with file, row, id and field, and none hides another.

Beyond what Python's reader refuses: keys that occur twice in one object (it lets the last win in silence), nesting
that no data file has, texts with half a surrogate pair (which no file and no pipe can take), and numbers that are no
lengths in metres.
"""

import json
import re
import reprlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .files import read_text

Row = dict[str, Any]

SHOWN_PROBLEMS = 5
MAX_METRES = 1e6  # keeps volumes finite; no scene is a thousand kilometres wide
_LINE_SUFFIXES = (".jsonl", ".ndjson")
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")

_short = reprlib.Repr()
_short.maxlist, _short.maxdict, _short.maxstring, _short.maxother, _short.maxlevel = 8, 4, 60, 60, 3


@dataclass(frozen=True)
class Problem:
    """One fault of a file: `place` names file and row or line, `record` the row's id, where they are known."""

    place: str
    message: str
    record: str = ""
    field: str = ""

    def __str__(self) -> str:
        record = f" ({_short.repr(self.record)[1:-1]})" if self.record else ""
        return f"{self.place}{record}{', ' if self.field else ''}{self.field}: {self.message}"


def refuse(problems: Sequence[Problem]) -> None:
    """ValueError with the number of problems and the first five; nothing where there are none."""
    if not problems:
        return
    if len(problems) == 1:
        raise ValueError(f"{problems[0]}.")
    shown = "; ".join(map(str, problems[:SHOWN_PROBLEMS]))
    head = f"{len(problems)} problems"
    if len(problems) > SHOWN_PROBLEMS:
        head += f", the first {SHOWN_PROBLEMS}"
    raise ValueError(f"{head}: {shown}.")


def shown(value: Any) -> str:
    """A value as it stands in a message: short, however long or deep it is."""
    return _short.repr(value)


class _Repeated(dict):
    """A JSON object in which some keys occurred more than once."""

    keys_repeated: list[str]


class _Reader:
    """Parses JSON, and remembers whether a key occurred twice in one object, which is rare and dear to look for."""

    def __init__(self) -> None:
        self.repeated = False
        self.decoder = json.JSONDecoder(object_pairs_hook=self._object)

    def _object(self, pairs: list[tuple[str, Any]]) -> Row:
        row = dict(pairs)
        if len(row) == len(pairs):
            return row
        self.repeated = True
        repeated, seen = _Repeated(row), set()
        repeated.keys_repeated = list(dict.fromkeys(key for key, _ in pairs if key in seen or seen.add(key)))
        return repeated

    def parse(self, text: str) -> Any:
        """A JSON document; ValueError, without the file's name, where it is not one."""
        try:
            return self.decoder.decode(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{error.msg}, line {error.lineno} column {error.colno}") from None
        except RecursionError:
            raise ValueError("nested too deeply") from None
        except ValueError:  # Python's limit on the digits of a whole number
            raise ValueError("a number has too many digits") from None


def _repeated_keys(value: Any) -> list[str]:
    """Keys that occur twice in one object, anywhere in a value that a reader returned."""
    found, waiting = [], [value]
    while waiting:
        current = waiting.pop()
        if isinstance(current, dict):
            found += current.keys_repeated if isinstance(current, _Repeated) else []
            waiting += current.values()
        elif isinstance(current, list):
            waiting += current
    return found


@dataclass(frozen=True)
class Document:
    """A file's content: one JSON value, or JSON lines as (line number, value)."""

    path: Path
    value: Any = None
    lines: list[tuple[int, Any]] | None = None

    def rows(self) -> list[tuple[str, Any]] | None:
        """(file and row or line, value) of a list or of lines; None for any other document."""
        if self.lines is not None:
            return [(f"{self.path}, line {number}", value) for number, value in self.lines]
        if isinstance(self.value, list):
            return [(f"{self.path}, row {number}", value) for number, value in enumerate(self.value, 1)]
        return None

    def single(self) -> Row | None:
        """The object that is all there is in the file; None where there is something else."""
        value = self.lines[0][1] if self.lines is not None and len(self.lines) == 1 else self.value
        return value if isinstance(value, dict) else None


def read_document(path: str | Path, problems: list[Problem], missing: str) -> Document:
    """Read a JSON document or JSON lines.

    Lines that are not JSON are added to `problems` and left out; keys that occur twice in one object are added too.

    Args:
        missing: the sentence for a file that is not there.

    Raises:
        ValueError: no file, a folder, not UTF-8, or neither a JSON document nor JSON lines.
    """
    path, reader = Path(path), _Reader()
    document = _parse(path, read_text(path, missing), reader, problems)
    if reader.repeated:
        for place, value in document.rows() or [(str(path), document.value)]:
            message = "occurs twice in one object; keep one"
            problems += [Problem(place, message, field=shown(key)[1:-1]) for key in _repeated_keys(value)]
    return document


def _parse(path: Path, text: str, reader: _Reader, problems: list[Problem]) -> Document:
    in_lines = path.suffix in _LINE_SUFFIXES
    try:
        value = reader.parse(text)
    except ValueError as error:
        if not in_lines and not _is_object(next(filter(str.strip, text.split("\n")), "")):
            raise ValueError(f"{path} is not whole JSON ({error}); copy it again, or write it again.") from None
        reader.repeated = False
        return Document(path, lines=list(_lines(path, text, reader, problems)))
    return Document(path, value) if isinstance(value, list) or not in_lines else Document(path, lines=[(1, value)])


def _is_object(line: str) -> bool:
    try:
        return isinstance(_Reader().parse(line), dict)
    except ValueError:
        return False


def _lines(path: Path, text: str, reader: _Reader, problems: list[Problem]) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield number, reader.parse(line)
        except ValueError as error:
            message = str(error).replace(", line 1 column", ", column")
            problems.append(
                Problem(f"{path}, line {number}", f"not JSON ({message}); write the file again, or take the line out")
            )


def text_fault(value: Any, *, empty: bool = True) -> str | None:
    """Why a value is not a text that can be scored, or None."""
    if not isinstance(value, str):
        return f"must be a text, not {shown(value)}"
    if not empty and not value.strip():
        return "must not be empty"
    if not value.isascii() and _HALF_CHARACTER.search(value):
        return "holds half a character (a lone surrogate); write the file again as UTF-8"
    return None


def texts_fault(value: Any, *, empty: bool = True) -> str | None:
    """Why a value is not a list of texts, or None."""
    if not isinstance(value, list):
        return f"must be a list of texts, not {shown(value)}"
    if not value and not empty:
        return "must hold at least one text"
    fault = next(filter(None, map(text_fault, value)), None)
    return f"must be a list of texts; one {fault}" if fault else None


def id_fault(value: Any) -> str | None:
    """Why a value is not an id (a text or a whole number), or None."""
    if isinstance(value, int) and not isinstance(value, bool):
        return None
    if not isinstance(value, str):
        return f"must be a text or a whole number, not {shown(value)}"
    return text_fault(value, empty=False)


def box_fault(box: Any, *, flat: bool = False) -> str | None:
    """Why a value is not a box of 6 or 7 numbers (centre, size, heading) in metres, or None.

    Args:
        flat: sizes of zero are allowed, which objects of a scan may have.
    """
    if not isinstance(box, list) or len(box) not in (6, 7) or not all(map(is_length, box)):
        return f"a box must be 6 or 7 finite numbers (centre, size, heading), not {shown(box)}"
    if min(box[3:6]) < 0 or (not flat and min(box[3:6]) == 0):
        return f"the sizes of a box must be positive, not {shown(box[3:6])}"
    return None


def boxes_fault(value: Any, *, flat: bool = False) -> str | None:
    """Why a value is not a list of boxes, or None."""
    if not isinstance(value, list):
        return f"must be a list of boxes, not {shown(value)}"
    return next((fault for box in value if (fault := box_fault(box, flat=flat))), None)


def is_length(value: Any) -> bool:
    """Whether a value is a number, not a truth value, and of a size that metres can have."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -MAX_METRES <= value <= MAX_METRES


def seven(box: Sequence[float]) -> list[float]:
    """A box of 6 or 7 numbers as 7 floats."""
    return [*map(float, box), 0.0][:7]
