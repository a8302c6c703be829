"""`predictions.jsonl`: the one file between a model and its scores, reports and viewers. Documented in docs/."""

import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from .files import read_text


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


_FIELDS = {entry.name for entry in fields(Prediction)}
_LIST, _FLAG = (list, "a list"), (bool, "true or false")
_KINDS: dict[str, tuple[type, str]] = {  # every other field is a text
    "well_formed": _FLAG,
    "truncated": _FLAG,
    "boxes": _LIST,
    "references": _LIST,
    "target_boxes": _LIST,
    "views": _LIST,
    "scores": (dict, "an object"),
    "meta": (dict, "an object"),
}
_REQUIRED = ("sample_id", "task", "scene_id", "question", "text")


def read_predictions(path: str | Path) -> list[Prediction]:
    """Read a prediction file; a broken line is an error that names the line."""
    predictions = []
    text = read_text(path, f"There is no prediction file at {path}; run eval or infer first, or check the path.")
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, line {number}: not JSON ({error.msg}); write the file again, or take the line out."
            ) from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: not a JSON object; write one prediction a line.")
        missing = [name for name in _REQUIRED if name not in row]
        unknown = sorted(set(row) - _FIELDS)
        if missing or unknown:
            raise ValueError(
                f"{path}, line {number}: "
                + "; ".join(
                    part
                    for part in (
                        f"missing {', '.join(missing)}" if missing else "",
                        f"unknown {', '.join(unknown)} (put extras under meta)" if unknown else "",
                    )
                    if part
                )
                + "."
            )
        predictions.append(from_row(row, f"{path}, line {number}"))
    return predictions


def from_row(row: dict, where: str) -> Prediction:
    """A prediction from its fields; ValueError where one is of the wrong kind.

    Args:
        where: file and line, for the message.
    """
    for name, value in row.items():
        kind, described = _KINDS.get(name, (str, "a text"))
        if not isinstance(value, kind):
            raise ValueError(f"{where}: {name!r} must be {described}, not {value!r}.")
    for name in ("references", "views"):
        if not all(isinstance(text, str) for text in row.get(name, [])):
            raise ValueError(f"{where}: {name!r} must be a list of texts.")
    for name in ("boxes", "target_boxes"):
        for box in row.get(name, []):
            if not isinstance(box, list) or len(box) not in (6, 7) or not all(map(_is_number, box)):
                raise ValueError(f"{where}: {name!r} must hold boxes of 6 or 7 finite numbers, not {box!r}.")
    return Prediction(**row)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def write_predictions(path: str | Path, predictions: Iterable[Prediction]) -> None:
    """Write a prediction file atomically."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as stream:
        for prediction in predictions:
            stream.write(json.dumps(asdict(prediction), ensure_ascii=False) + "\n")
    os.replace(partial, path)
