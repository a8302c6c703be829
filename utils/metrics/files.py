"""Reading what `score` compares: prediction files and reference files, ours or others', joined into predictions.

Predictions (answer_rows.py):
- our own rows (docs/predictions.md), as a JSON list or JSON lines;
- one JSON object of {id: answer}: a text, for questions also a list of texts, best first (EM@10 needs ten), for
  grounding one box of 6 or 7 numbers, or [] for none;
- any rows with an id (`sample_id` or `question_id`) and an answer: `answer_top10` (ScanQA's submission format),
  `prediction`, `pred`, `answer` or `text`, and for grounding `boxes` (a list) or `pred_box` / `box` (one), in metres.
  Rows without an id are joined by `scene_id` and `question`, equal ones in their order;
- detection: one row a scene, {"scene_id", "boxes": [box, …], "class_probs": [[18 in 0..1], …], "objectness": [0..1]}.

References (reference_rows.py): our own rows, or an official annotation file: ScanQA (`answers`), SQA3D
(`v1_balanced_sqa_annotations_…`; the questions are read from the `v1_balanced_questions_…` file beside it, or taken
from the predictions), 3D-LLM dialogue, planning and scene description (`question`, `answers`, `scene_id`; in an object
of {id: answer} their ids are row numbers, from 1); for detection {"scene_id", "boxes", "classes": [0..17, …]}.
`join` takes references that were made elsewhere, for instance from samples with their boxes.

Every fault of both files is reported together, by file, row, id and field.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..json_rows import Problem, read_document, refuse
from ..predictions import Prediction, read_predictions
from .answer_rows import Answers, read_answers
from .reference_rows import read_references

# our samples carry the data set's name before the official id
_PREFIX = re.compile(r"^(?:sqa3d|nr3d|scanrefer)-")
# ids that our readers give to rows of files without ids: task, split, row number
_ROW_ID = re.compile(r"^[a-z0-9_]+-[a-z_]+-(\d+)$")
# parts of `meta` that are an answer, and parts that are the truth
_ANSWER_META = ("answer_top10", "chosen_object_id", "class_probs", "objectness")
_TRUTH_META = ("multiple", "others", "view_dependent", "object_id", "target_object_id", "distractor_boxes", "classes")

Key = tuple[str, ...]


@dataclass(frozen=True)
class _Side:
    """References or predictions: keys in the order of the entries, and how messages call them."""

    keys: list[Key]
    name: str
    source: str


def load_scored_pairs(task: str, references_path: str | Path | None, predictions_path: str | Path) -> list[Prediction]:
    """Predictions of one task with their references, in the order of the references.

    Every reference needs a prediction and the other way round; ValueError says how many do not match, and names the
    rows of either file that cannot be read. Without `references_path` the predictions hold their references.
    """
    if references_path is None:
        return _of_one_data_set(task, predictions_path)
    problems: list[Problem] = []
    references = read_references(task, references_path, problems)
    answers = read_answers(task, predictions_path, problems)
    refuse(problems)
    return _join(references, answers, str(references_path), str(predictions_path))


def _of_one_data_set(task: str, path: str | Path) -> list[Prediction]:
    """Rows that hold their references; ValueError where they are of several data sets, whose mean means nothing."""
    try:
        entries = [entry for entry in read_predictions(path) if entry.task == task]
    except ValueError:
        if _holds_answers_by_id(path):
            raise ValueError(
                f"{path} holds answers by id and no references; give --references, or --data, --dataset and --split."
            ) from None
        raise
    names = sorted({str(entry.meta["dataset"]) for entry in entries if entry.meta.get("dataset")})
    if len(names) > 1:
        raise ValueError(
            f"{path} holds answers of task {task} to {len(names)} data sets ({', '.join(names)}), which are scored "
            "one by one: give --data, --dataset and --split."
        )
    return entries


def _holds_answers_by_id(path: str | Path) -> bool:
    single = read_document(path, [], "").single() if Path(path).is_file() else None
    return single is not None and not single.keys() & {"sample_id", "task"}


def join(
    references: Sequence[Prediction], predictions_path: str | Path, *, source: str = "the reference data"
) -> list[Prediction]:
    """Predictions of a file with references made elsewhere, in the order of the references, which are of one task.

    Args:
        references: rows without answers: sample_id, task, scene_id, question, and what the scorer compares with. Where
            they and rows of the file name their data sets (`meta["dataset"]`), rows of other ones are left out.
        source: what messages call the references.

    Raises:
        ValueError: as `load_scored_pairs`, and where references are of several tasks or there are none.
    """
    tasks = {entry.task for entry in references}
    if len(tasks) != 1:
        raise ValueError(f"{source} must hold references of exactly one task, not of {len(tasks)}.")
    problems: list[Problem] = []
    answers = read_answers(tasks.pop(), predictions_path, problems)
    refuse(problems)
    answers.entries = of_data_sets(answers.entries, references)
    return _join(references, answers, source, str(predictions_path))


def of_data_sets(entries: Sequence[Prediction], references: Sequence[Prediction]) -> list[Prediction]:
    """Entries without those that name a data set which no reference names; one file may hold several of a task."""
    known = {None, *(entry.meta.get("dataset") for entry in references)}
    return [entry for entry in entries if len(known) == 1 or entry.meta.get("dataset") in known]


def _join(references: Sequence[Prediction], answers: Answers, source: str, path: str) -> list[Prediction]:
    keys, answer_keys = _keys(references, answers)
    _check_keys(_Side(keys, "references", source), _Side(answer_keys, "predictions", path))
    by_key = dict(zip(answer_keys, answers.entries, strict=True))
    return [_merge(entry, by_key[key], "|".join(key)) for key, entry in zip(keys, references, strict=True)]


def _merge(reference: Prediction, prediction: Prediction, key: str) -> Prediction:
    given = {name: value for name, value in reference.meta.items() if name not in _ANSWER_META}
    truth = {name: value for name, value in given.items() if name in _TRUTH_META}
    return replace(
        reference,
        sample_id=reference.sample_id or key,
        scene_id=reference.scene_id or prediction.scene_id,
        question=reference.question or prediction.question,
        text=prediction.text,
        think=prediction.think,
        answer=prediction.answer,
        well_formed=prediction.well_formed,
        truncated=prediction.truncated,
        boxes=prediction.boxes,
        views=prediction.views,
        model=prediction.model,
        scores=prediction.scores,
        meta=given | prediction.meta | truth,
    )


def _keys(references: Sequence[Prediction], answers: Answers) -> tuple[list[Key], list[Key]]:
    """Join keys of both sides: ids where both have them; row numbers where answers without questions have them and
    the references have no ids, or ids that hold row numbers; else scene, question and running number of equal ones."""
    ids = [entry.sample_id for entry in answers.entries]
    numbered = all(sample_id.isdecimal() or _ROW_ID.match(sample_id) for sample_id in ids)
    # rows that say what was asked are found by that: their numbers may be those of another file
    by_number = answers.mapping or (numbered and not any(entry.question for entry in answers.entries))
    if all(entry.sample_id for entry in (*references, *answers.entries)):
        numbers = [_ROW_ID.match(entry.sample_id) for entry in references]
        if by_number and all(numbers) and all(sample_id.isdecimal() for sample_id in ids):
            return [(match[1],) for match in numbers if match], [(entry.sample_id,) for entry in answers.entries]
        return _id_keys(references), _id_keys(answers.entries)
    if by_number:
        matches = ((_ROW_ID.match(entry.sample_id), entry.sample_id) for entry in answers.entries)
        return (
            [(str(number),) for number in range(1, len(references) + 1)],
            [(match[1] if match else sample_id,) for match, sample_id in matches],
        )
    return _question_keys(references), _question_keys(answers.entries)


def _id_keys(entries: Sequence[Prediction]) -> list[Key]:
    return [(_PREFIX.sub("", entry.sample_id),) for entry in entries]


def _question_keys(entries: Sequence[Prediction]) -> list[Key]:
    seen: Counter[tuple[str, str]] = Counter()
    keys = []
    for entry in entries:
        pair = (entry.scene_id, entry.question)
        keys.append((*pair, str(seen[pair])))
        seen[pair] += 1
    return keys


def _check_keys(references: _Side, predictions: _Side) -> None:
    """ValueError that names every way in which the two sides do not fit."""
    faults = []
    for side in (references, predictions):
        if not side.keys:
            raise ValueError(f"{side.source} holds no {side.name} of this task.")
        repeated = [(key, count) for key, count in Counter(side.keys).items() if count > 1]
        if repeated:
            key, count = repeated[0]
            more = f", and {len(repeated) - 1} more are repeated" if len(repeated) > 1 else ""
            faults.append(
                f"{side.source}: {'|'.join(key)} occurs {count} times among the {side.name}{more}; keep one."
            )
    asked, answered = set(references.keys), set(predictions.keys)
    missing, unknown = asked - answered, answered - asked
    if missing:
        faults.append(
            f"{predictions.source} lacks {len(missing)} of {len(asked)} answers, for instance "
            f"{'|'.join(min(missing))}; every reference needs a prediction (an empty string counts)."
        )
    if unknown:
        faults.append(
            f"{predictions.source} holds {len(unknown)} answers that {references.source} does not ask for, for "
            f"instance {'|'.join(min(unknown))}; check that both belong to the same split."
        )
    if faults:
        raise ValueError(" ".join(faults))
