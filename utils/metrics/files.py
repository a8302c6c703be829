"""Reading what `score` compares: prediction files and reference files, ours or others', joined into predictions.

Predictions, as a JSON list or as JSON lines:
- our own rows (docs/predictions.md), or
- any rows with an id (`sample_id` or `question_id`) and an answer: `answer_top10` (ScanQA's submission format),
  `prediction`, `pred`, `answer` or `text`, and for grounding `boxes` (a list) or `pred_box` / `box` (one), in metres.
  Rows without an id are joined by `scene_id` and `question`, equal ones in their order.

References: our own rows, or an official annotation file: ScanQA (`answers`), SQA3D (`v1_balanced_sqa_annotations_…`;
the questions are read from the `v1_balanced_questions_…` file beside it, or taken from the predictions), 3D-LLM
dialogue, planning and scene description (`question`, `answers`, `scene_id`).
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ..files import read_text
from ..predictions import Prediction, from_row, read_predictions

_ID_KEYS = ("sample_id", "question_id")
_TEXT_KEYS = ("prediction", "pred", "answer", "text")
_BOX_KEYS = ("pred_box", "box")
_SQA3D_PREFIX = "sqa3d-"
_OWN_KEYS = {"sample_id", "task", "scene_id", "question", "text"}

Row = dict[str, Any]


def load_scored_pairs(task: str, references_path: str | Path | None, predictions_path: str | Path) -> list[Prediction]:
    """Predictions of one task with their references, in the order of the references.

    Every reference needs a prediction and the other way round; ValueError says how many do not match.
    """
    if references_path is None:
        return [entry for entry in _read_own(predictions_path) if entry.task == task]
    references = _read_references(task, references_path)
    predictions = _read_answers(task, predictions_path)
    with_ids = all(entry.sample_id for entry in (*references, *predictions))
    reference_keys, prediction_keys = _keys(references, with_ids), _keys(predictions, with_ids)
    by_key = dict(zip(prediction_keys, predictions, strict=True))
    _check_keys(reference_keys, prediction_keys, references_path, predictions_path)
    return [
        _merge(reference, by_key[key], "|".join(key))
        for key, reference in zip(reference_keys, references, strict=True)
    ]


def _merge(reference: Prediction, prediction: Prediction, key: str) -> Prediction:
    return replace(
        reference,
        sample_id=reference.sample_id or key,
        scene_id=reference.scene_id or prediction.scene_id,
        question=reference.question or prediction.question,
        text=prediction.text,
        think=prediction.think,
        answer=prediction.answer,
        well_formed=prediction.well_formed,
        boxes=prediction.boxes,
        views=prediction.views,
        model=prediction.model,
        meta=reference.meta | prediction.meta,
    )


def _keys(entries: Sequence[Prediction], with_ids: bool) -> list[tuple[str, ...]]:
    """Join keys: ids where both sides have them, else scene, question and running number of equal ones."""
    if with_ids:
        # our SQA3D samples carry the data set's name before the official question id
        return [(entry.sample_id.removeprefix(_SQA3D_PREFIX),) for entry in entries]
    seen: Counter[tuple[str, str]] = Counter()
    keys = []
    for entry in entries:
        pair = (entry.scene_id, entry.question)
        keys.append((*pair, str(seen[pair])))
        seen[pair] += 1
    return keys


def _check_keys(
    references: list[tuple[str, ...]],
    predictions: list[tuple[str, ...]],
    references_path: str | Path,
    predictions_path: str | Path,
) -> None:
    for name, keys, path in (
        ("references", references, references_path),
        ("predictions", predictions, predictions_path),
    ):
        key, count = Counter(keys).most_common(1)[0] if keys else ((), 0)
        if count == 0:
            raise ValueError(f"{path} holds no {name} of this task.")
        if count > 1:
            raise ValueError(f"{path}: {'|'.join(key)} occurs {count} times among the {name}; keep one.")
    missing, unknown = set(references) - set(predictions), set(predictions) - set(references)
    if missing:
        raise ValueError(
            f"{predictions_path} lacks {len(missing)} of {len(references)} answers, for instance "
            f"{'|'.join(min(missing))}; every reference needs a prediction (an empty string counts)."
        )
    if unknown:
        raise ValueError(
            f"{predictions_path} holds {len(unknown)} answers that {references_path} does not ask for, for instance "
            f"{'|'.join(min(unknown))}; check that both belong to the same split."
        )


def read_rows(path: str | Path) -> list[Row] | Row:
    """A JSON document, or a JSON-lines file as a list of rows."""
    path = Path(path)
    text = read_text(path, f"There is no file {path}; check the path.")
    try:
        document = json.loads(text)
    except json.JSONDecodeError:
        return _read_lines(path, text)
    # a JSON-lines file of one line is a document too
    return [document] if isinstance(document, dict) and path.suffix == ".jsonl" else document


def _read_lines(path: Path, text: str) -> list[Row]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: neither a JSON document nor JSON lines ({error.msg}).") from None
        rows.append(row)
    return rows


def _row_list(path: str | Path) -> list[Row]:
    rows = read_rows(path)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} must hold a list of JSON objects, or one JSON object a line.")
    return rows


def _read_own(path: str | Path) -> list[Prediction]:
    """Our own rows, from JSON lines (any error names the line) or from a JSON list."""
    if Path(path).suffix == ".jsonl":
        return read_predictions(path)
    known = {entry.name for entry in fields(Prediction)}
    predictions = []
    for number, row in enumerate(_row_list(path), 1):
        wrong = sorted(_OWN_KEYS - row.keys()) or sorted(row.keys() - known)
        if wrong:
            raise ValueError(f"{path}, row {number}: missing or unknown {', '.join(wrong)} (put extras under meta).")
        predictions.append(from_row(row, f"{path}, row {number}"))
    return predictions


def _is_own(rows: Sequence[Row]) -> bool:
    return bool(rows) and rows[0].keys() >= _OWN_KEYS


def _read_answers(task: str, path: str | Path) -> list[Prediction]:
    """A prediction file in any of the accepted forms; of our own files only the rows of the task."""
    rows = _row_list(path)
    if _is_own(rows):
        return [entry for entry in _read_own(path) if entry.task == task]
    return [_foreign_answer(task, row, f"{path}, row {number}") for number, row in enumerate(rows, 1)]


def _foreign_answer(task: str, row: Row, where: str) -> Prediction:
    boxes = row.get("boxes") or [row[key] for key in _BOX_KEYS if key in row]
    top10 = row.get("answer_top10")
    text = top10[0] if top10 else next((row[key] for key in _TEXT_KEYS if key in row), None)
    if text is None and not (task == "grounding" and boxes):
        raise ValueError(f"{where} has no answer; give one of answer_top10, {', '.join(_TEXT_KEYS)}.")
    if text is not None and not isinstance(text, str):
        raise ValueError(f"{where}: the answer must be a string, not {type(text).__name__}.")
    return Prediction(
        sample_id=_row_id(row),
        task=task,
        scene_id=str(row.get("scene_id", "")),
        question=str(row.get("question", "")),
        text=text or "",
        answer="",
        boxes=[_box(box, where) for box in boxes],
        meta={"answer_top10": list(top10)} if top10 else {},
    )


def _row_id(row: Row) -> str:
    return str(next((row[key] for key in _ID_KEYS if key in row), ""))


def _box(box: Any, where: str) -> list[float]:
    if not isinstance(box, list) or len(box) not in (6, 7) or not all(isinstance(x, (int, float)) for x in box):
        raise ValueError(f"{where}: a box must be a list of 6 or 7 numbers (centre, size, heading), not {box!r}.")
    return [*map(float, box), 0.0][:7]


def _read_references(task: str, path: str | Path) -> list[Prediction]:
    document = read_rows(path)
    if isinstance(document, dict) and "annotations" in document:
        return list(_sqa3d_references(task, document["annotations"], Path(path)))
    rows = _row_list(path)
    if _is_own(rows):
        return [entry for entry in _read_own(path) if entry.task == task]
    if task == "grounding":
        raise ValueError(
            f"{path}: ScanRefer's and Nr3D's annotation files hold no boxes; give a prediction-format file whose rows "
            "carry target_boxes as the references (any earlier predictions.jsonl of the same questions will do)."
        )
    return [_annotated(task, row, f"{path}, row {number}") for number, row in enumerate(rows, 1)]


def _annotated(task: str, row: Row, where: str) -> Prediction:
    """A row of ScanQA's or 3D-LLM's annotation files."""
    answers = row.get("answers")
    if answers is None and isinstance(row.get("answer"), str):
        answers = [row["answer"]]
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise ValueError(f"{where} has no `answers` (a list of strings); test files without answers cannot be scored.")
    return Prediction(
        sample_id=_row_id(row),
        task=task,
        scene_id=str(row.get("scene_id", "")),
        question=str(row.get("question", "")),
        text="",
        references=answers,
        question_type=str(row.get("question_type", "")),
    )


def _sqa3d_references(task: str, annotations: Iterable[Row], path: Path) -> Iterable[Prediction]:
    """SQA3D's annotations; questions come from the official file beside them where it is."""
    beside = path.with_name(path.name.replace("_sqa_annotations_", "_questions_"))
    questions: dict[str, str] = {}
    if beside != path and beside.exists():
        document = read_rows(beside)
        if isinstance(document, dict):
            questions = {str(row["question_id"]): row["question"] for row in document.get("questions", [])}
    for number, row in enumerate(annotations, 1):
        if not row.keys() >= {"question_id", "scene_id", "answers"}:
            raise ValueError(f"{path}, annotation {number}: question_id, scene_id or answers is missing.")
        yield Prediction(
            sample_id=str(row["question_id"]),
            task=task,
            scene_id=row["scene_id"],
            question=questions.get(str(row["question_id"]), ""),
            text="",
            references=[entry["answer"] for entry in row["answers"]],
        )
