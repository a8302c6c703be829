"""`predictions.jsonl`: the one file between a model and its scores, reports and viewers. Documented in docs/."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from .files import replacing
from .json_rows import (
    Problem,
    Row,
    box_fault,
    boxes_fault,
    id_fault,
    read_document,
    refuse,
    shown,
    text_fault,
    texts_fault,
)


@dataclass
class Prediction:
    """One answered sample. Boxes are [x, y, z, dx, dy, dz, heading], metres, in the scene's aligned world frame."""

    sample_id: str
    task: str
    scene_id: str
    question: str
    text: str
    think: str = ""
    answer: str = ""
    well_formed: bool = False
    boxes: list[list[float]] = field(default_factory=list)
    references: list[str] = field(default_factory=list)
    target_boxes: list[list[float]] = field(default_factory=list)
    views: list[str] = field(default_factory=list)
    question_type: str = ""
    model: str = ""
    truncated: bool = False
    scores: dict[str, float] = field(default_factory=dict)
    meta: dict = field(default_factory=dict)


Fault = Callable[[Any], str | None]

REQUIRED = ("sample_id", "task", "scene_id", "question", "text")
_FIELDS = {entry.name for entry in fields(Prediction)}


def _flag_fault(value: Any) -> str | None:
    return None if isinstance(value, bool) else f"must be true or false, not {shown(value)}"


def _object_fault(value: Any) -> str | None:
    return None if isinstance(value, dict) else f"must be an object, not {shown(value)}"


def _flat_boxes_fault(value: Any) -> str | None:
    return boxes_fault(value, flat=True)


def _flat_box_fault(value: Any) -> str | None:
    return box_fault(value, flat=True)


def _ten_fault(value: Any) -> str | None:
    return texts_fault(value, empty=False)


def _id_text_fault(value: Any) -> str | None:
    return text_fault(value, empty=False)


def _is_entry(value: Any) -> bool:
    """Whether a value may stand in a matrix that moves a scan, which may lie far away (in millimetres of a map)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e15


def _matrix_fault(value: Any) -> str | None:
    whole = isinstance(value, list) and len(value) == 4
    if whole and all(isinstance(row, list) and len(row) == 4 and all(map(_is_entry, row)) for row in value):
        return None
    return f"must be four rows of four finite numbers, not {shown(value)}"


_FAULTS: dict[str, Fault] = {  # every other field is a text
    "sample_id": _id_text_fault,
    "well_formed": _flag_fault,
    "truncated": _flag_fault,
    "boxes": boxes_fault,
    "target_boxes": _flat_boxes_fault,
    "references": texts_fault,
    "views": texts_fault,
    "scores": _object_fault,
    "meta": _object_fault,
}
# what scorers and viewers read of `meta`; null says that it is not known
_META_FAULTS: dict[str, Fault] = {
    "answer_top10": _ten_fault,
    "axis_align": _matrix_fault,
    "query_box": _flat_box_fault,
    "distractor_boxes": _flat_boxes_fault,
    "multiple": _flag_fault,
    "others": _flag_fault,
    "view_dependent": _flag_fault,
    "object_id": id_fault,
    "chosen_object_id": id_fault,
    "target_object_id": id_fault,
}


def read_predictions(path: str | Path) -> list[Prediction]:
    """Read a prediction file; ValueError with the number of broken lines and the first five, each by its number."""
    problems: list[Problem] = []
    missing = f"There is no prediction file at {path}; run eval or infer first, or check the path."
    document = read_document(path, problems, missing)
    rows = document.rows()
    if rows is None:
        rows = [(f"{path}, line 1", document.value)]
    predictions = [entry for place, row in rows if (entry := from_row(row, place, problems)) is not None]
    refuse(problems)
    return predictions


def from_row(row: Any, place: str, problems: list[Problem]) -> Prediction | None:
    """A prediction from its fields; None, with what is wrong added to `problems`, where it is not one.

    Args:
        place: file and row, for the messages.
    """
    if not isinstance(row, dict):
        problems.append(Problem(place, "not a JSON object; write one prediction a line"))
        return None
    record = row["sample_id"] if isinstance(row.get("sample_id"), str) else ""
    found = [Problem(place, message, record, name) for name, message in _faults(row)]
    problems += found
    return None if found else Prediction(**row)


def _faults(row: Row) -> Iterator[tuple[str, str]]:
    """(field, message) of everything that is wrong with a row."""
    missing = [name for name in REQUIRED if name not in row]
    unknown = sorted(set(row) - _FIELDS)
    if missing:
        yield "", f"missing {', '.join(missing)}"
    if unknown:
        yield "", f"unknown {', '.join(shown(name)[1:-1] for name in unknown[:8])} (put extras under meta)"
    for name in row:
        fault = _FAULTS.get(name, text_fault)(row[name]) if name in _FIELDS else None
        if fault:
            yield name, fault
    meta = row.get("meta")
    if not isinstance(meta, dict):
        return
    for name, check in _META_FAULTS.items():
        fault = check(meta[name]) if meta.get(name) is not None else None
        if fault:
            yield f"meta.{name}", fault


def write_predictions(path: str | Path, predictions: Iterable[Prediction]) -> None:
    """Write a prediction file atomically."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, partial.open("w", encoding="utf-8") as stream:
        for prediction in predictions:
            stream.write(json.dumps(asdict(prediction), ensure_ascii=False) + "\n")
