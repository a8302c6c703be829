"""What predictions are compared with, made from a data set's own samples: by evaluation, and by `score --data`."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ..datasets.scene import Sample
from ..datasets.scene_store import SceneInfo, SceneStore
from ..utils.json_rows import Problem, refuse
from ..utils.metrics.answer_rows import read_answers
from ..utils.metrics.files import join, of_data_sets
from ..utils.metrics.rows import caption_box
from ..utils.metrics.score import score_predictions, scorer_name
from ..utils.predictions import Prediction
from .config import DataConfig
from .data import load_dataset, open_store

# scorers of dense captioning that take one caption for each annotated object, not for each proposal
GIVEN_OBJECTS = "oracle_"
# and whose references are whole descriptions, not Scan2Cap's tokens: where a data set has them
_DESCRIPTIONS = {"scan2cap": "object_caption"}


def reference_of(sample: Sample) -> Prediction:
    """A sample as a prediction without an answer: references, target boxes (world frame), and the reader's `meta`.

    `meta["query_box"]` is the box that the sample asks about, `meta["dataset"]` its data set.
    """
    meta = {**sample.meta, "dataset": sample.dataset}
    if sample.query_box_7 is not None:
        meta["query_box"] = sample.query_box_7.tolist()
    if sample.situation:
        meta["situation"] = sample.situation
    return Prediction(
        sample_id=sample.sample_id,
        task=sample.task,
        scene_id=sample.scene_id,
        question=sample.question,
        text="",
        references=sample.references,
        target_boxes=sample.target_boxes_K7.tolist(),
        question_type=sample.question_type,
        meta=meta,
    )


def object_rows(samples: Sequence[Sample], index: Mapping[str, SceneInfo]) -> list[Prediction]:
    """One row without a caption for each object of the samples' scenes, which captions of proposals are matched with.

    An object's references are those of its sample; one without a sample is an object that nobody annotated.
    """
    references = {(sample.scene_id, sample.target_object_ids[0]): sample.references for sample in samples}
    rows = []
    for scene_id in dict.fromkeys(sample.scene_id for sample in samples):
        info = index[scene_id]
        for object_id, box_7 in zip(info.object_ids_K.tolist(), info.boxes_K7.tolist(), strict=True):
            rows.append(
                Prediction(
                    sample_id=f"{scene_id}-object-{object_id}",
                    task="dense_caption",
                    scene_id=scene_id,
                    question="",
                    text="",
                    target_boxes=[box_7],
                    references=references.get((scene_id, object_id), []),
                    meta={"object_id": object_id, "dataset": samples[0].dataset},
                )
            )
    return rows


def score_dataset(
    task: str,
    scorer: str | None,
    predictions_path: str | Path,
    *,
    root: str | Path,
    dataset: str,
    split: str,
) -> dict:
    """Score a prediction file against a data set's own references; the result also names the data set and the split.

    Every record of the split must be usable: a score over the records that happen to be there is not the benchmark's.

    Raises:
        ValueError: unknown data set or scorer, a data set of another task, records that cannot be used, or a file
            that does not fit.
    """
    scorer = scorer_name(task, scorer)
    samples, store = _load(task, root, dataset, split)
    if scorer.startswith(GIVEN_OBJECTS) and dataset in _DESCRIPTIONS:
        described, _ = _load("object_caption", root, _DESCRIPTIONS[dataset], split)
        texts = {(sample.scene_id, sample.target_object_ids[0]): sample.references for sample in described}
        for sample in samples:
            sample.references = texts[sample.scene_id, sample.target_object_ids[0]]
    if task == "dense_caption":
        predictions, notes = _captions(samples, store, scorer, predictions_path)
    else:
        references = [reference_of(sample) for sample in samples]
        predictions, notes = join(references, predictions_path, source=f"{dataset}, {split}"), []
    result = score_predictions(task, predictions, scorer)
    result["notes"] = notes + result["notes"]
    return {"dataset": dataset, "split": split} | result


def load_references(task: str, root: str | Path, dataset: str, split: str) -> list[Prediction]:
    """References of a data set; ValueError where it is of another task."""
    return [reference_of(sample) for sample in _load(task, root, dataset, split)[0]]


def _load(task: str, root: str | Path, dataset: str, split: str) -> tuple[list[Sample], SceneStore]:
    config = DataConfig(root=str(root), datasets=(dataset,))
    store = open_store(config)
    loaded = load_dataset(config, dataset, split, store, seed=0)
    if not loaded.samples:
        raise ValueError(f"{dataset} has no samples in split {split} under {root}; nothing can be scored.")
    if loaded.task != task:
        raise ValueError(f"Data set {dataset} is of task {loaded.task}, not {task}; give --task {loaded.task}.")
    return loaded.samples, store


def _captions(
    samples: Sequence[Sample], store: SceneStore, scorer: str, path: str | Path
) -> tuple[list[Prediction], list[str]]:
    """Rows of dense captioning, and notes.

    Captions of given objects go by the objects' ids; a caption that names no box counts as one of the object's own
    box. Captions of proposals, which have ids of their own, each name their scene and box.
    """
    references = [reference_of(sample) for sample in samples]
    given, objects = {entry.sample_id for entry in references}, object_rows(samples, store.index)
    problems: list[Problem] = []
    answers = read_answers("dense_caption", path, problems)
    # files that `eval` wrote hold rows of the objects too
    rows = of_data_sets(answers.entries, references)
    rows = [entry for entry in rows if entry.sample_id in given or entry.text or caption_box(entry)]
    oracle = scorer.startswith(GIVEN_OBJECTS)
    if oracle or answers.mapping or all(entry.sample_id in given for entry in rows):
        refuse(problems)
        predictions, notes = _of_given_objects(references, path)
        return predictions + ([] if oracle else [entry for entry in objects if not entry.references]), notes
    for entry in rows:
        if not entry.scene_id or caption_box(entry) is None:
            fault = "a caption of a proposal needs scene_id and a box"
            problems.append(Problem(str(path), fault, entry.sample_id))
    refuse(problems)
    scenes = {sample.scene_id for sample in samples}
    # an id that the objects' rows have would be taken for a repeated one
    counted = [
        replace(entry, sample_id=f"proposal {number}", target_boxes=[], references=[])
        for number, entry in enumerate(rows)
        if entry.scene_id in scenes
    ]
    outside = len(rows) - len(counted)
    note = f"{outside} captions are about scenes that the split does not describe, and do not count."
    return counted + objects, [note] if outside else []


def _of_given_objects(references: Sequence[Prediction], path: str | Path) -> tuple[list[Prediction], list[str]]:
    """Captions joined with the objects that they were asked about, by id."""
    # an answer's own box goes before the object's
    boxless = [replace(entry, meta={**entry.meta, "query_box": None}) for entry in references]
    joined = join(boxless, path, source="the data set's objects")
    unnamed = [entry for entry in joined if caption_box(entry) is None]
    for entry in unnamed:
        entry.meta["query_box"] = entry.target_boxes[0]
    note = f"{len(unnamed)} of {len(joined)} captions name no box: they count as captions of the objects' own boxes."
    return joined, [note] if unnamed else []
