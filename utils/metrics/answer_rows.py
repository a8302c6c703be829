"""Prediction files of any accepted form as predictions without references; files.py documents the forms."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..json_rows import (
    Document,
    Problem,
    Row,
    box_fault,
    boxes_fault,
    id_fault,
    read_document,
    seven,
    text_fault,
    texts_fault,
)
from ..predictions import REQUIRED, Prediction, from_row
from .detection_rows import detection_faults

QA_TASKS = ("qa", "situated_qa")
ID_KEYS = ("sample_id", "question_id")
_TEXT_KEYS = ("prediction", "pred", "answer", "text")
_BOX_KEYS = ("pred_box", "box")
_ROW_KEYS = {*REQUIRED, *ID_KEYS, *_TEXT_KEYS, *_BOX_KEYS, "boxes", "answer_top10"}


@dataclass
class Answers:
    """A prediction file's entries. `mapping`: it is one object of {id: answer}."""

    entries: list[Prediction]
    mapping: bool = False


def read_answers(task: str, path: str | Path, problems: list[Problem]) -> Answers:
    """Read a prediction file; of our own rows only those of the task. Broken rows go to `problems`."""
    document = read_document(path, problems, f"There is no file {path}; check the path.")
    single = document.single()
    if single is not None and not single.keys() & _ROW_KEYS and task != "detection":
        return _read_mapping(task, single, str(path), problems)
    rows = object_rows(document, problems, ", or one object of {id: answer}")
    if is_own(rows):
        entries = [entry for place, row in rows if (entry := from_row(row, place, problems)) is not None]
        return Answers([entry for entry in entries if entry.task == task])
    read = _detections if task == "detection" else _foreign_answer
    return Answers([entry for place, row in rows if (entry := read(task, row, place, problems)) is not None])


def object_rows(document: Document, problems: list[Problem], more: str = "") -> list[tuple[str, Row]]:
    """The rows of a document that are JSON objects, with their places; ValueError where it has no rows."""
    single = document.single()
    rows = document.rows()
    if rows is None and single is not None and single.keys() & _ROW_KEYS:  # JSON lines of one line
        rows = [(f"{document.path}, line 1", single)]
    if rows is None:
        raise ValueError(f"{document.path} must hold a list of JSON objects, or one JSON object a line{more}.")
    objects = []
    for place, row in rows:
        if isinstance(row, dict):
            objects.append((place, row))
        else:
            problems.append(Problem(place, f"must be a JSON object; {document.path} must hold a list of JSON objects"))
    return objects


def is_own(rows: Sequence[tuple[str, Row]]) -> bool:
    """Whether rows are ours: some row has every field that ours must have."""
    return any(row.keys() >= set(REQUIRED) for _, row in rows)


def report(
    row: Row, place: str, faults: Iterable[tuple[str, str | None]], problems: list[Problem], *, record: Any = ""
) -> bool:
    """Add those (field, message) pairs that have a message to `problems`; whether there was none.

    Args:
        record: the row's name, where `row_id` is not it.
    """
    name = record if isinstance(record, str) and record else row_id(row)
    found = [Problem(place, message, name, field) for field, message in faults if message]
    problems += found
    return not found


def row_id(row: Row) -> str:
    """The id of a row as text; "" where it has none, or none that is one."""
    value = next((row[key] for key in ID_KEYS if key in row), "")
    return "" if id_fault(value) else str(value)


def id_faults(row: Row) -> list[tuple[str, str | None]]:
    """Faults of what joins a row with its partner: an id, or scene and question."""
    faults = [(key, id_fault(row[key])) for key in ID_KEYS if key in row][:1]
    if not faults and not row.get("question"):
        faults = [("", f"has no id; give {' or '.join(ID_KEYS)}, or else scene_id and question")]
    return faults + [(key, text_fault(row[key])) for key in ("scene_id", "question") if key in row]


def _read_mapping(task: str, mapping: Row, path: str, problems: list[Problem]) -> Answers:
    entries = []
    for key, value in mapping.items():
        fault = text_fault(key, empty=False)
        fault = f"an id {fault}" if fault else _mapped_fault(task, value)
        if fault:
            problems.append(Problem(path, fault, key))
            continue
        entry = Prediction(sample_id=key, task=task, scene_id="", question="", text="")
        if isinstance(value, str):
            entry.text = value
        elif task == "grounding":
            entry.boxes = [seven(value)] if value else []
        else:
            entry.text, entry.meta = value[0], {"answer_top10": value}
        entries.append(entry)
    return Answers(entries, mapping=True)


def _mapped_fault(task: str, value: Any) -> str | None:
    """Why a value is no answer of {id: answer}, or None."""
    if task == "grounding":
        return None if value == [] else box_fault(value)
    if task in QA_TASKS and isinstance(value, list):
        return texts_fault(value, empty=False)
    return text_fault(value)


def _foreign_answer(task: str, row: Row, place: str, problems: list[Problem]) -> Prediction | None:
    boxes = _boxes(row)
    top10 = row.get("answer_top10")
    key = next((key for key in _TEXT_KEYS if key in row), "")
    faults = id_faults(row)
    if boxes is not None:
        faults.append(("boxes" if "boxes" in row else "box", boxes_fault(boxes)))
    if top10 is not None:
        faults.append(("answer_top10", texts_fault(top10, empty=False)))
    elif key:
        faults.append((key, text_fault(row[key])))
        others = [name for name in _TEXT_KEYS if name in row and row[name] != row[key]]
        if others:
            faults.append((key, f"differs from {others[0]}, and it is not clear which one is predicted; keep one"))
    elif task != "grounding":
        faults.append(("answer", f"there is no answer; give one of answer_top10, {', '.join(_TEXT_KEYS)}"))
    chosen = row.get("chosen_object_id")
    if chosen is not None:
        faults.append(("chosen_object_id", id_fault(chosen)))
    elif task == "grounding" and boxes is None:
        keys = f"{' or '.join(_BOX_KEYS)}; or chosen_object_id, where one of the scene's objects is picked"
        faults.append(("boxes", f"there is no box; give boxes (a list, [] for none), {keys}"))
    if not report(row, place, faults, problems):
        return None
    return Prediction(
        sample_id=row_id(row),
        task=task,
        scene_id=row.get("scene_id", ""),
        question=row.get("question", ""),
        text=top10[0] if top10 else row.get(key, ""),
        boxes=[seven(box) for box in boxes or ()],
        meta={
            name: value for name, value in (("answer_top10", top10), ("chosen_object_id", chosen)) if value is not None
        },
    )


def _boxes(row: Row) -> Any:
    """The boxes of a row, unchecked: `boxes`, or one of the keys for a single box in a list; None without."""
    if row.get("boxes") is not None:
        return row["boxes"]
    return next(([row[key]] for key in _BOX_KEYS if row.get(key) is not None), None)


def _detections(task: str, row: Row, place: str, problems: list[Problem]) -> Prediction | None:
    scene = scene_row(task, row, place, detection_faults(row), problems)
    if scene is None:
        return None
    meta = {name: row[name] for name in ("class_probs", "objectness")}
    return replace(scene, boxes=[seven(box) for box in row["boxes"]], meta=meta)


def scene_row(
    task: str, row: Row, place: str, faults: Iterable[tuple[str, str | None]], problems: list[Problem]
) -> Prediction | None:
    """A scene of a detection file, still without boxes; None, and a problem, where its id or a field is broken."""
    scene_id = row.get("scene_id")
    if not report(row, place, [("scene_id", text_fault(scene_id, empty=False)), *faults], problems, record=scene_id):
        return None
    assert isinstance(scene_id, str)
    return Prediction(sample_id=scene_id, task=task, scene_id=scene_id, question="", text="")
