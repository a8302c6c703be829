"""One scorer per task, used by rewards and evaluation: from `Prediction` objects alone to named numbers.

`SCORERS[task][name]` computes a benchmark's numbers from a list of predictions; `DEFAULT_SCORERS` names the one that
evaluation runs, which never needs Java. `sample_score` is the cheap score in [0, 1] of a single sample.

What a prediction must carry: `references` for text tasks; `target_boxes` and `boxes` for grounding. Further, where
known: `meta["multiple"]`, `meta["others"]` (bool) for ScanRefer's groups (or `question_type` unique / multiple),
`question_type` easy / hard and `meta["view_dependent"]` for Nr3D's, `meta["chosen_object_id"]` and
`meta["target_object_id"]` where a system picks among given objects, `meta["distractor_boxes"]` for `nr3d_nearest`;
`meta["object_id"]` and `meta["query_box"]` (the box whose object was captioned) for dense captioning, where a row
with a target box but without references is an object that nobody annotated. Detection has one row a scene: `boxes`,
`meta["class_probs"]`, `meta["objectness"]`, `target_boxes` and `meta["classes"]` (detection_rows.py).
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ..labels import NUM_CLASSES
from ..predictions import Prediction
from . import dense_caption, dense_oracle, detection, grounding, qa, qa_variants
from .answer_rows import QA_TASKS
from .caption import MeteorChoice, ngram_scores, rouge_l
from .detection_rows import detection_faults, truth_faults
from .files import load_scored_pairs
from .result import Scores, bootstrap_interval, mean, metric_intervals
from .rows import answer_text, caption_box, captioned_scenes, grounding_item, nr3d_groups, oracle_captions

Scorer = Callable[[Sequence[Prediction], MeteorChoice], Scores]

_BOOTSTRAP_SEED = 0


def sample_score(task: str, prediction: Prediction) -> float:
    """The score in [0, 1] of one sample: QA exact match, IoU of matched boxes, or ROUGE-L of texts."""
    scorers_of(task)
    if task == "detection":
        raise ValueError("Detection is scored over all scenes; a single scene has no score of its own.")
    if task == "grounding":
        if not prediction.target_boxes:
            raise ValueError(f"Sample {prediction.sample_id} has no target box; it cannot be scored as grounding.")
        return grounding.matched_iou(prediction.boxes, prediction.target_boxes)
    if not prediction.references:
        raise ValueError(
            f"Sample {prediction.sample_id} has no reference text; give one in the file, or by --references or "
            "--data of `main.py score`."
        )
    if task in QA_TASKS:
        return qa.qa_exact(answer_text(prediction), prediction.references)
    return rouge_l(answer_text(prediction), prediction.references)


def score_predictions(
    task: str,
    predictions: Sequence[Prediction],
    scorer: str | None = None,
    *,
    meteor: MeteorChoice = "auto",
    per_item: bool = False,
) -> dict:
    """Score predictions of one task.

    Returns {"task", "scorer", "items", "unit" ("percent" or "fraction", of `metrics`), "metrics", "intervals" (95 %,
    same unit), "sample_score" {"mean", "low", "high"} (fraction), "counts", "notes"}; with `per_item` also "per_item",
    fractions in the order of the items.
    """
    name = scorer_name(task, scorer)
    if not predictions:
        raise ValueError(f"There is nothing to score: no predictions of task {task}.")
    _check(task, predictions)
    scores = SCORERS[task][name](predictions, meteor)
    result = result_of(task, name, scores, predictions)
    if per_item:
        result["per_item"] = scores.per_item
    return result


def result_of(task: str, name: str, scores: Scores, predictions: Sequence[Prediction]) -> dict:
    """What a scorer found about predictions, with intervals, as `score_predictions` returns it."""
    intervals, interval_notes = metric_intervals(scores, _BOOTSTRAP_SEED)
    return {
        "task": task,
        "scorer": name,
        "items": scores.items,
        "unit": scores.unit,
        "metrics": scores.metrics,
        "intervals": intervals,
        "sample_score": _sample_summary(task, predictions),
        "counts": scores.counts,
        "notes": scores.notes + interval_notes,
    }


def scorers_of(task: str) -> dict[str, Scorer]:
    """The scorers of a task; ValueError names the tasks there are."""
    if task not in SCORERS:
        raise ValueError(f"Unknown task {task!r}; tasks with scorers are {', '.join(SCORERS)}.")
    return SCORERS[task]


def scorer_name(task: str, scorer: str | None) -> str:
    """The canonical name of a scorer: short names resolved, the task's default for none; ValueError lists them."""
    table, aliases = scorers_of(task), ALIASES.get(task, {})
    name = aliases.get(scorer, scorer) if scorer else DEFAULT_SCORERS[task]
    if name not in table:
        names = ", ".join([*table, *(f"{alias} (= {target})" for alias, target in aliases.items())])
        raise ValueError(f"Task {task} has no scorer {name!r}; its scorers are {names}.")
    return name


def _check(task: str, predictions: Sequence[Prediction]) -> None:
    seen: set[str] = set()
    for prediction in predictions:
        if prediction.task != task:
            raise ValueError(
                f"Sample {prediction.sample_id} belongs to task {prediction.task}, not {task}; score each task alone."
            )
        if prediction.sample_id in seen:
            raise ValueError(f"Sample {prediction.sample_id} occurs twice; keep one prediction a sample.")
        seen.add(prediction.sample_id)


def _is_scorable(task: str, prediction: Prediction) -> bool:
    if task == "detection":
        return False
    if task == "grounding":  # who picks among given objects says no box
        picked = not prediction.boxes and prediction.meta.get("chosen_object_id") is not None
        return bool(prediction.target_boxes) and not picked
    # of dense captioning's rows some are objects without a caption, others captions of unannotated proposals
    captioned = task != "dense_caption" or caption_box(prediction) is not None
    return captioned and bool(prediction.references)


def _sample_summary(task: str, predictions: Sequence[Prediction]) -> dict[str, float] | None:
    """Mean of `sample_score` with its interval, over the samples that have something to be compared with."""
    scorable = [entry for entry in predictions if _is_scorable(task, entry)]
    if not scorable:
        return None
    values = [sample_score(task, prediction) for prediction in scorable]
    low, high = bootstrap_interval(values, _BOOTSTRAP_SEED)
    return {"mean": mean(values), "low": low, "high": high}


# Adapters from predictions to the scorers' own arguments.


def _qa_items(predictions: Sequence[Prediction]) -> list[qa.QaItem]:
    return [
        qa.QaItem(
            key=prediction.sample_id,
            question=prediction.question,
            answers=tuple(prediction.meta.get("answer_top10") or [answer_text(prediction)]),
            references=tuple(prediction.references),
            question_type=prediction.question_type,
        )
        for prediction in predictions
    ]


def _exact(predictions: Sequence[Prediction], meteor: MeteorChoice) -> Scores:
    del meteor
    return qa.exact(_qa_items(predictions))


def _of_items(score: Callable[..., Scores]) -> Scorer:
    """A scorer of predictions from one of question-and-answer items."""
    return lambda predictions, meteor: score(_qa_items(predictions), meteor=meteor)


def _sqa3d(predictions: Sequence[Prediction], meteor: MeteorChoice) -> Scores:
    del meteor
    return qa.sqa3d(_qa_items(predictions))


def _scanrefer(predictions: Sequence[Prediction], meteor: MeteorChoice) -> Scores:
    del meteor
    return grounding.scanrefer([grounding_item(prediction) for prediction in predictions])


def _nr3d(predictions: Sequence[Prediction], meteor: MeteorChoice) -> Scores:
    del meteor
    items = [grounding_item(prediction) for prediction in predictions]
    known = [
        "chosen_object_id" in entry.meta and entry.meta.get("target_object_id") is not None for entry in predictions
    ]
    chosen = [entry.meta["chosen_object_id"] for entry in predictions] if all(known) else None
    target = [entry.meta["target_object_id"] for entry in predictions] if all(known) else None
    # a system that only picks objects has no boxes to compare: IoU accuracy of 0 would be a lie
    has_boxes = chosen is None or any(item.predicted_box is not None for item in items)
    ious = grounding.scanrefer(items).per_item["mIoU"] if has_boxes else None
    scores = grounding.nr3d(chosen, target, ious=ious, groups=nr3d_groups(predictions))
    if chosen is None:
        scores.notes.append(
            f"Acc by object id is not given: {sum(known)} of {len(known)} predictions carry chosen_object_id and "
            "target_object_id in meta."
        )
    if ious is None:
        scores.notes.append("Acc@0.25 and Acc@0.5 are not given: predictions carry chosen object ids, not boxes.")
    return scores


def _nr3d_nearest(predictions: Sequence[Prediction], meteor: MeteorChoice) -> Scores:
    del meteor
    for entry in predictions:
        if entry.meta.get("distractor_boxes") is None:
            raise ValueError(
                f"Sample {entry.sample_id} has no meta['distractor_boxes'] (a list, [] for none), which nr3d_nearest "
                "chooses among."
            )
    items = [grounding_item(prediction) for prediction in predictions]
    return grounding.nr3d_nearest(
        [item.predicted_box for item in items],
        [item.target_box for item in items],
        [entry.meta["distractor_boxes"] for entry in predictions],
        groups=nr3d_groups(predictions),
    )


def _matched(predictions: Sequence[Prediction], meteor: MeteorChoice) -> Scores:
    """Any number of targets: sum of matched IoU over max(predicted, targets), and its share above thresholds."""
    del meteor
    ious = [sample_score("grounding", prediction) for prediction in predictions]
    per_item = {"mIoU": ious}
    for threshold in grounding.THRESHOLDS:
        per_item[f"Acc@{threshold}"] = [float(iou >= threshold) for iou in ious]
    metrics: dict[str, float | None] = {name: 100 * mean(values) for name, values in per_item.items()}
    return Scores("percent", len(ious), metrics, per_item)


def _at_thresholds(score_at: Callable[[float], Scores]) -> Scores:
    """Scores at IoU 0.25 and 0.5 as one."""
    merged: Scores | None = None
    for threshold in grounding.THRESHOLDS:
        scores = score_at(threshold)
        scores.per_item = {f"{name}@{threshold}": values for name, values in scores.per_item.items()}
        scores.counts = {f"{name}@{threshold}": count for name, count in scores.counts.items()}
        if merged is None:
            merged = scores
        else:
            merged.metrics |= scores.metrics
            merged.per_item |= scores.per_item
            merged.counts |= scores.counts
            merged.aggregates |= scores.aggregates
            # what holds at both thresholds is said once
            merged.notes += [note for note in scores.notes if note not in merged.notes]
    assert merged is not None
    return merged


def _scan2cap(assignment: dense_caption.Assignment) -> Scorer:
    def score(predictions: Sequence[Prediction], meteor: MeteorChoice) -> Scores:
        scenes, references = captioned_scenes(predictions)

        def score_at(threshold: float) -> Scores:
            return dense_caption.scan2cap(scenes, references, min_iou=threshold, assignment=assignment, meteor=meteor)

        return _at_thresholds(score_at)

    return score


def _oracle(form: dense_oracle.Form) -> Scorer:
    def score(predictions: Sequence[Prediction], meteor: MeteorChoice) -> Scores:
        items = oracle_captions(predictions)
        return _at_thresholds(
            lambda threshold: dense_oracle.oracle(items, form=form, min_iou=threshold, meteor=meteor)
        )

    return score


def _detection(predictions: Sequence[Prediction], meteor: MeteorChoice) -> Scores:
    del meteor
    found, truth = [], []
    for entry in predictions:
        faults = detection_faults({"boxes": entry.boxes, **entry.meta})
        wanted = truth_faults({"boxes": entry.target_boxes, "classes": entry.meta.get("classes")})
        fault = next(((name, fault) for name, fault in (*faults, *wanted) if fault), None)
        if fault:
            raise ValueError(f"Scene {entry.scene_id}, {fault[0]}: {fault[1]}.")
        probabilities_KC = np.asarray(entry.meta["class_probs"], dtype=np.float64).reshape(-1, NUM_CLASSES)
        objectness_K = np.asarray(entry.meta["objectness"], dtype=np.float64)
        found.append(detection.SceneDetections(entry.boxes, probabilities_KC, objectness_K))
        truth.append(detection.SceneObjects(entry.target_boxes, np.asarray(entry.meta["classes"], dtype=np.int64)))
    return detection.detection_scores(found, truth)


def _ngrams(tokenizer: str, *, collapse: bool = False) -> Scorer:
    """N-gram scores; fractions. `collapse`: LL3DA's key is scene and question, and of equal keys the last wins."""

    def score(predictions: Sequence[Prediction], meteor: MeteorChoice) -> Scores:
        references, candidates = {}, {}
        for prediction in predictions:
            key = f"{prediction.scene_id}-{prediction.question}" if collapse else prediction.sample_id
            references[key] = list(prediction.references)
            candidates[key] = [qa.collapse_spaces(answer_text(prediction))]
        ngrams = ngram_scores(references, candidates, tokenizer="ptb" if tokenizer == "ptb" else "none", meteor=meteor)
        counts = {"samples": len(predictions), "keys": len(references)}
        scores = Scores("fraction", len(references), dict(ngrams.corpus), ngrams.per_item, counts, ngrams.notes)
        scores.aggregates = ngrams.aggregates
        return scores

    return score


_GENERATION: dict[str, Scorer] = {"ll3da": _ngrams("none", collapse=True), "ll3da_per_sample": _ngrams("none")}
_SCANQA: dict[str, Scorer] = {
    "scanqa": _of_items(qa.scanqa),
    "scanqa_ll3da": _of_items(qa.scanqa_ll3da),
    "scanqa_leo": _of_items(qa_variants.scanqa_leo),
    "scanqa_video3dllm": _of_items(qa_variants.scanqa_video3dllm),
    "scanqa_chat_scene": _of_items(qa_variants.scanqa_chat_scene),
}

SCORERS: dict[str, dict[str, Scorer]] = {
    "dense_caption": {
        "scan2cap_ll3da": _scan2cap("ll3da"),
        "scan2cap": _scan2cap("scan2cap"),
        "oracle_leo": _oracle("leo"),
        "oracle_chat_scene": _oracle("chat_scene"),
        "oracle_video3dllm": _oracle("video3dllm"),
    },
    "object_caption": {"ngram": _ngrams("none"), "ngram_ptb": _ngrams("ptb")},
    "grounding": {"scanrefer": _scanrefer, "nr3d": _nr3d, "nr3d_nearest": _nr3d_nearest, "matched": _matched},
    "qa": {"exact": _exact, **_SCANQA},
    "situated_qa": {"sqa3d": _sqa3d, "sqa3d_text": _of_items(qa_variants.sqa3d_text), "exact": _exact, **_SCANQA},
    "dialogue": _GENERATION,
    "planning": _GENERATION,
    "scene_description": _GENERATION,
    "detection": {"3detr": _detection},  # a task of the scorers alone: no sample asks for it
}

# Short names; results carry the name on the right.
ALIASES: dict[str, dict[str, str]] = {
    "qa": {
        "official": "scanqa",
        "ll3da": "scanqa_ll3da",
        "leo": "scanqa_leo",
        "video3dllm": "scanqa_video3dllm",
    },
    "dense_caption": {"detect": "scan2cap_ll3da"},
}

# Evaluation's choice; none of these needs Java.
DEFAULT_SCORERS = {task: next(iter(table)) for task, table in SCORERS.items()}


def score_file(
    task: str,
    scorer: str | None,
    references_path: str | Path | None,
    predictions_path: str | Path,
    *,
    meteor: MeteorChoice = "auto",
    per_item: bool = False,
) -> dict:
    """Score a prediction file, ours or another model's, as `score_predictions` does; see `files.load_scored_pairs`.

    Without `references_path` the prediction file itself must hold the references.
    """
    scorer = scorer_name(task, scorer)  # a wrong name shows before long files are read
    predictions = load_scored_pairs(task, references_path, predictions_path)
    return score_predictions(task, predictions, scorer, meteor=meteor, per_item=per_item)
