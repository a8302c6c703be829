"""What the benchmarks' readers share: finding files, reading rows, and errors that name file, row and remedy."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import orjson

from ..scene import Sample, Scene
from ..scene_store import SceneInfo, as_index

Scenes = Mapping[str, Scene] | Mapping[str, SceneInfo]
T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """One record of an annotation file, with its place for error messages. Rows count from 1."""

    path: Path
    number: int
    record: dict[str, Any]

    @property
    def place(self) -> str:
        return f"{self.path}, row {self.number}"

    def get(self, key: str, kind: type[T], default: T | None = None) -> T:
        """A field of the record; ValueError where it is missing without a default, or of another type."""
        value = self.record.get(key, default)
        if value is None:
            raise ValueError(f"{self.place}: the field {key!r} is missing; use the official file.")
        if not isinstance(value, kind):
            raise ValueError(f"{self.place}: {key!r} is {type(value).__name__}, not {kind.__name__}.")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """A text field, outer white space removed."""
        return self.get(key, str, default).strip()

    def filled(self, key: str) -> str:
        """A text field that must say something, such as a question."""
        text = self.text(key)
        if not text:
            raise ValueError(f"{self.place}: {key!r} is empty; fill it in, or take the row out.")
        return text

    def integer(self, key: str) -> int:
        """A whole number, which some benchmarks write as text."""
        value = self.record.get(key)
        try:
            if isinstance(value, (str, int)) and not isinstance(value, bool):
                return int(value)
        except ValueError:
            pass  # fall through to the one error message
        raise ValueError(f"{self.place}: {key!r} is {value!r}, not a whole number; use the official file.")

    def integers(self, key: str) -> list[int]:
        """A list of whole numbers; absent reads as empty."""
        values = self.get(key, list, [])
        if not all(isinstance(value, int) and not isinstance(value, bool) for value in values):
            raise ValueError(f"{self.place}: {key!r} is not a list of whole numbers.")
        return values

    def texts(self, key: str) -> list[str]:
        """A list of texts, outer white space removed, repeats and empty ones left out; absent reads as empty."""
        values = self.get(key, list, [])
        if not all(isinstance(value, str) for value in values):
            raise ValueError(f"{self.place}: {key!r} is not a list of texts.")
        return list(dict.fromkeys(value.strip() for value in values if value.strip()))


def annotation_file(root: str | Path, name: str) -> Path:
    """`root/annotations/<name>`; ValueError says where the file goes."""
    path = Path(root) / "annotations" / name
    if not path.exists():
        raise ValueError(f"There is no annotation file {path}; data/README.md says where to get it.")
    return path


def read_json(path: Path) -> Any:
    """Content of a JSON file; ValueError where it is broken."""
    try:
        return orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        raise ValueError(f"{path} is not whole JSON ({error}); copy it again from its source.") from None


def rows_of(path: Path, records: Any) -> Iterator[Row]:
    """Records of a list with their places."""
    if not isinstance(records, list):
        raise ValueError(f"{path} does not hold a list of records; use the official file.")
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict):
            raise ValueError(f"{path}, row {number}: not a record with named fields; use the official file.")
        yield Row(path, number, record)


def read_rows(path: Path) -> Iterator[Row]:
    """Rows of a JSON list, or of a `.jsonl` file."""
    if path.suffix != ".jsonl":
        yield from rows_of(path, read_json(path))
        return
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                record = orjson.loads(line)
            except orjson.JSONDecodeError as error:
                raise ValueError(f"{path}, row {number}: not JSON ({error}); copy the file again.") from None
            if not isinstance(record, dict):
                raise ValueError(f"{path}, row {number}: not a record with named fields; use the official file.")
            yield Row(path, number, record)


def scene_of(index: Mapping[str, SceneInfo], scene_id: str, row: Row) -> SceneInfo:
    """Index entry of a row's scene; ValueError names the row."""
    info = index.get(scene_id)
    if info is None:
        raise ValueError(
            f"{row.place} names scene {scene_id}, which is not prepared; "
            "run `python main.py prepare` on its scan, or take the row out."
        )
    return info


def boxes_of(info: SceneInfo, object_ids: Sequence[int], row: Row) -> np.ndarray:
    """World boxes [n, 7] of objects; those of structure (walls, floors, ceilings) have none and are left out.

    Raises:
        ValueError: an object that the scan does not have.
    """
    found: list[np.ndarray] = []
    for object_id in object_ids:
        number = info.row_of(object_id)
        if number is not None:
            found.append(info.boxes_K7[number])
        elif object_id not in info.structure_ids:
            raise ValueError(
                f"{row.place} names object {object_id}, which scene {info.scene_id} does not have; "
                "check that annotations and scans belong together, or take the row out."
            )
    return np.stack(found) if found else np.zeros((0, 7), np.float32)


def load_3d_llm(root: str | Path, split: str, scenes: Scenes, *, name: str, task: str) -> list[Sample]:
    """One of LL3DA's 3D-LLM files: [{question, answers: [text], scene_id}]."""
    index = as_index(scenes)
    samples = []
    for row in read_rows(annotation_file(root, f"3d_llm_{name}_{split}.json")):
        scene_id = row.filled("scene_id")
        scene_of(index, scene_id, row)
        references = row.texts("answers")
        if not references:
            raise ValueError(f"{row.place} has no answer; take the row out.")
        samples.append(
            Sample(
                sample_id=f"{task}-{split}-{row.number}",
                task=task,
                dataset=task,
                scene_id=scene_id,
                question=row.filled("question"),
                answer=references[0],
                references=references,
            )
        )
    return samples
