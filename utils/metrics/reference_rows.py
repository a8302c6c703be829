"""Reference files as predictions without answers: our own rows, or official annotations; files.py documents them."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..json_rows import Problem, Row, id_fault, read_document, seven, shown, text_fault, texts_fault
from ..predictions import Prediction, from_row
from .answer_rows import id_faults, is_own, object_rows, report, row_id, scene_row
from .detection_rows import truth_faults

_ABSENT = "There is no file {}; check the path."


def read_references(task: str, path: str | Path, problems: list[Problem]) -> list[Prediction]:
    """Read a reference file; broken rows go to `problems`. ValueError where it is none of the forms."""
    document = read_document(path, problems, _ABSENT.format(path))
    single = document.single()
    if single is not None and "annotations" in single:
        return _sqa3d_references(task, single["annotations"], Path(path), problems)
    rows = object_rows(document, problems)
    if is_own(rows):
        entries = [entry for place, row in rows if (entry := from_row(row, place, problems)) is not None]
        return [entry for entry in entries if entry.task == task]
    if task == "grounding":
        raise ValueError(
            f"{path}: ScanRefer's and Nr3D's annotation files hold no boxes; give a prediction-format file whose rows "
            "carry target_boxes as the references (any earlier predictions.jsonl of the same questions will do)."
        )
    read = _detection_truth if task == "detection" else _annotated
    return [entry for place, row in rows if (entry := read(task, row, place, problems)) is not None]


def _annotated(task: str, row: Row, place: str, problems: list[Problem]) -> Prediction | None:
    """A row of ScanQA's or 3D-LLM's annotation files."""
    answers: Any = row.get("answers")
    if answers is None and "answer" in row:
        answers = [row["answer"]]
    if answers is None:
        fault = "there is none (a list of strings); test files without answers cannot be scored"
    else:
        fault = texts_fault(answers, empty=False)
    kind = row.get("question_type", "")
    if not report(row, place, [*id_faults(row), ("answers", fault), ("question_type", text_fault(kind))], problems):
        return None
    assert isinstance(answers, list)
    return Prediction(
        sample_id=row_id(row),
        task=task,
        scene_id=row.get("scene_id", ""),
        question=row.get("question", ""),
        text="",
        references=answers,
        question_type=kind,
    )


def _detection_truth(task: str, row: Row, place: str, problems: list[Problem]) -> Prediction | None:
    scene = scene_row(task, row, place, truth_faults(row), problems)
    if scene is None:
        return None
    return replace(scene, target_boxes=[seven(box) for box in row["boxes"]], meta={"classes": row["classes"]})


def _sqa3d_references(task: str, annotations: Any, path: Path, problems: list[Problem]) -> list[Prediction]:
    """SQA3D's annotations; questions come from the official file beside them where it is."""
    if not isinstance(annotations, list):
        raise ValueError(f"{path}: 'annotations' must be a list of objects, not {shown(annotations)}.")
    questions = dict(_sqa3d_questions(path, problems))
    found = []
    for number, row in enumerate(annotations, 1):
        place = f"{path}, annotation {number}"
        if not isinstance(row, dict):
            problems.append(Problem(place, f"must be an object, not {shown(row)}"))
            continue
        texts = _sqa3d_answers(row.get("answers"))
        faults = [
            ("question_id", id_fault(row.get("question_id"))),
            ("scene_id", text_fault(row.get("scene_id"), empty=False)),
            ("answers", texts_fault(texts, empty=False)),
        ]
        if report(row, place, faults, problems):
            assert isinstance(texts, list)
            key = str(row["question_id"])
            found.append(Prediction(key, task, row["scene_id"], questions.get(key, ""), "", references=texts))
    return found


def _sqa3d_answers(answers: Any) -> Any:
    """The texts of [{"answer": text, …}]; anything else as it is, for the message."""
    if not isinstance(answers, list) or not all(isinstance(entry, dict) for entry in answers):
        return {"answers": answers}
    return [entry.get("answer") for entry in answers]


def _sqa3d_questions(path: Path, problems: list[Problem]) -> Iterator[tuple[str, str]]:
    """(question_id, question) of the official question file beside an annotation file, where it is."""
    beside = path.with_name(path.name.replace("_sqa_annotations_", "_questions_"))
    if beside == path or not beside.exists():
        return
    document = read_document(beside, problems, _ABSENT.format(beside)).single() or {}
    rows = document.get("questions")
    if not isinstance(rows, list):
        raise ValueError(f"{beside} must hold an object with a list of questions; use the official file.")
    for number, row in enumerate(rows, 1):
        place = f"{beside}, question {number}"
        if not isinstance(row, dict):
            problems.append(Problem(place, f"must be an object, not {shown(row)}"))
            continue
        faults = [("question_id", id_fault(row.get("question_id"))), ("question", text_fault(row.get("question")))]
        if report(row, place, faults, problems):
            yield str(row["question_id"]), row["question"]
