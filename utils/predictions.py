"""`predictions.jsonl`: the one file between a model and its scores, reports and viewers. Documented in docs/."""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path


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
_REQUIRED = ("sample_id", "task", "scene_id", "question", "text")


def read_predictions(path: str | Path) -> list[Prediction]:
    """Read a prediction file; a broken line is an error that names the line."""
    predictions = []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise ValueError(f"There is no prediction file at {path}.") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error.msg}).") from None
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
        predictions.append(Prediction(**row))
    return predictions


def write_predictions(path: str | Path, predictions: Iterable[Prediction]) -> None:
    """Write a prediction file atomically."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as stream:
        for prediction in predictions:
            stream.write(json.dumps(asdict(prediction), ensure_ascii=False) + "\n")
    os.replace(partial, path)
