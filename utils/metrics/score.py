"""One scorer per task, used by rewards and evaluation: from `Prediction` objects alone to named numbers.

`SCORERS[task][name]` computes a benchmark's numbers from a list of predictions; `DEFAULT_SCORERS` names the one that
evaluation runs, which never needs Java. `sample_score` is the cheap score in [0, 1] of a single sample.

What a prediction must carry: `references` for text tasks; `target_boxes` and `boxes` for grounding. Further, where
known: `meta["multiple"]`, `meta["others"]` (bool) for ScanRefer's groups (or `question_type` unique / multiple),
`question_type` easy / hard and `meta["view_dependent"]` for Nr3D's, `meta["chosen_object_id"]` and
`meta["target_object_id"]` where a system picks among given objects;
`meta["object_id"]` and `meta["query_box"]` (the box whose object was captioned) for dense captioning, where a row
with a target box but without references is an object that nobody annotated.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..predictions import Prediction
from ..text import find_pointers, parse_response, strip_pointers
from . import dense_caption, grounding, qa, qa_variants
from .caption import MeteorChoice, ngram_scores, rouge_l
from .files import load_scored_pairs
from .result import Scores, bootstrap_interval, mean, metric_intervals

Scorer = Callable[[Sequence[Prediction], MeteorChoice], Scores]

QA_TASKS = ("qa", "situated_qa")
TEXT_TASKS = ("dense_caption", "object_caption", "dialogue", "planning", "scene_description")
_TAGS = re.compile(r"</?(?:think|answer)>")
_BOOTSTRAP_SEED = 0


def answer_text(prediction: Prediction) -> str:
    """The words of an answer that scorers compare: pointers removed.

    A text without pointers is left as it is, to the last blank: official scorers see what the model wrote.
    """
    text = prediction.answer
    if not text:
        text = parse_response(prediction.text).answer if _TAGS.search(prediction.text) else prediction.text
    return strip_pointers(text) if find_pointers(text) else text


def sample_score(task: str, prediction: Prediction) -> float:
    """The score in [0, 1] of one sample: QA exact match, IoU of matched boxes, or ROUGE-L of texts."""
    scorers_of(task)
    if task == "grounding":
        if not prediction.target_boxes:
            raise ValueError(f"Sample {prediction.sample_id} has no target box; it cannot be scored as grounding.")
        return grounding.matched_iou(prediction.boxes, prediction.target_boxes)
    if not prediction.references:
        raise ValueError(f"Sample {prediction.sample_id} has no reference text; it cannot be scored.")
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
    table = scorers_of(task)
    name = scorer or DEFAULT_SCORERS[task]
    if name not in table:
        raise ValueError(f"Task {task} has no scorer {name!r}; its scorers are {', '.join(table)}.")
    if not predictions:
        raise ValueError(f"There is nothing to score: no predictions of task {task}.")
    _check(task, predictions)
    scores = table[name](predictions, meteor)
    intervals, interval_notes = metric_intervals(scores, _BOOTSTRAP_SEED)
    result = {
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
    if per_item:
        result["per_item"] = scores.per_item
    return result


def scorers_of(task: str) -> dict[str, Scorer]:
    """The scorers of a task; ValueError names the tasks there are."""
    if task not in SCORERS:
        raise ValueError(f"Unknown task {task!r}; tasks with scorers are {', '.join(SCORERS)}.")
    return SCORERS[task]


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
    if task == "grounding":
        return bool(prediction.target_boxes)
    # of dense captioning's rows some are objects without a caption, others captions of unannotated proposals
    captioned = task != "dense_caption" or _caption_box(prediction) is not None
    return captioned and bool(prediction.references)


def _caption_box(prediction: Prediction) -> list[float] | None:
    """The box whose object a dense caption describes."""
    return prediction.meta.get("query_box") or (prediction.boxes[0] if prediction.boxes else None)


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
    return grounding.scanrefer([_grounding_item(prediction) for prediction in predictions])


def _grounding_item(prediction: Prediction) -> grounding.GroundingItem:
    if len(prediction.target_boxes) != 1:
        raise ValueError(
            f"Sample {prediction.sample_id} has {len(prediction.target_boxes)} target boxes; ScanRefer and Nr3D "
            "score exactly one. Use the scorer `matched` for several."
        )
    multiple = prediction.meta.get("multiple")
    if multiple is None and prediction.question_type in ("unique", "multiple"):
        multiple = prediction.question_type == "multiple"
    first = prediction.boxes[0] if prediction.boxes else None
    return grounding.GroundingItem(first, prediction.target_boxes[0], multiple, prediction.meta.get("others"))


def _nr3d(predictions: Sequence[Prediction], meteor: MeteorChoice) -> Scores:
    del meteor
    ious = grounding.scanrefer([_grounding_item(prediction) for prediction in predictions]).per_item["mIoU"]
    chosen, target = None, None
    if all("chosen_object_id" in entry.meta and "target_object_id" in entry.meta for entry in predictions):
        chosen = [entry.meta["chosen_object_id"] for entry in predictions]
        target = [entry.meta["target_object_id"] for entry in predictions]
    groups: dict[str, list[bool]] = {}
    if all(entry.question_type in ("easy", "hard") for entry in predictions):
        for name in ("easy", "hard"):
            groups[name] = [entry.question_type == name for entry in predictions]
    if all("view_dependent" in entry.meta for entry in predictions):
        groups["view_dependent"] = [bool(entry.meta["view_dependent"]) for entry in predictions]
        groups["view_independent"] = [not inside for inside in groups["view_dependent"]]
    scores = grounding.nr3d(chosen, target, ious=ious, groups=groups)
    if chosen is None:
        scores.notes.append("Acc by object id is not given: predictions carry boxes, not chosen object ids.")
    return scores


def _matched(predictions: Sequence[Prediction], meteor: MeteorChoice) -> Scores:
    """Any number of targets: sum of matched IoU over max(predicted, targets), and its share above thresholds."""
    del meteor
    ious = [sample_score("grounding", prediction) for prediction in predictions]
    per_item = {"mIoU": ious}
    for threshold in grounding.THRESHOLDS:
        per_item[f"Acc@{threshold}"] = [float(iou >= threshold) for iou in ious]
    metrics: dict[str, float | None] = {name: 100 * mean(values) for name, values in per_item.items()}
    return Scores("percent", len(ious), metrics, per_item)


def _scan2cap(assignment: dense_caption.Assignment) -> Scorer:
    def score(predictions: Sequence[Prediction], meteor: MeteorChoice) -> Scores:
        scenes, references = _captioned_scenes(predictions)
        merged: Scores | None = None
        for threshold in grounding.THRESHOLDS:
            scores = dense_caption.scan2cap(
                scenes, references, min_iou=threshold, assignment=assignment, meteor=meteor
            )
            scores.per_item = {f"{name}@{threshold}": values for name, values in scores.per_item.items()}
            scores.counts = {f"{name}@{threshold}": count for name, count in scores.counts.items()}
            if merged is None:
                merged = scores
            else:
                merged.metrics |= scores.metrics
                merged.per_item |= scores.per_item
                merged.counts |= scores.counts
                merged.aggregates |= scores.aggregates
        assert merged is not None
        return merged

    return score


@dataclass
class _SceneRows:
    """One scene's part of a prediction file: captioned boxes, and objects."""

    boxes: list[list[float]] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    object_boxes: list[list[float]] = field(default_factory=list)
    object_ids: list[str] = field(default_factory=list)


def _captioned_scenes(
    predictions: Sequence[Prediction],
) -> tuple[list[dense_caption.CaptionedScene], dict[tuple[str, str], list[str]]]:
    scenes: dict[str, _SceneRows] = {}
    references: dict[tuple[str, str], list[str]] = {}
    for prediction in predictions:
        scene = scenes.setdefault(prediction.scene_id, _SceneRows())
        box = _caption_box(prediction)
        if box is not None:
            scene.boxes.append(box)
            scene.captions.append(_spaced_caption(prediction))
        if prediction.references and not prediction.target_boxes:
            raise ValueError(
                f"Sample {prediction.sample_id} has reference captions but no target box; dense captioning needs both."
            )
        for target in prediction.target_boxes[:1]:
            object_id = str(prediction.meta.get("object_id", target))
            if object_id not in scene.object_ids:
                scene.object_ids.append(object_id)
                scene.object_boxes.append(target)
            if prediction.references:
                references[(prediction.scene_id, object_id)] = [
                    text if text.startswith("sos ") else dense_caption.wrap_reference(text)
                    for text in prediction.references
                ]
    if not any(scene.captions for scene in scenes.values()):
        raise ValueError(
            "No prediction says which box its caption describes; record the box in `boxes` or in meta['query_box']."
        )
    captioned = [
        dense_caption.CaptionedScene(scene_id, rows.boxes, rows.captions, rows.object_boxes, rows.object_ids)
        for scene_id, rows in scenes.items()
    ]
    return captioned, references


def _spaced_caption(prediction: Prediction) -> str:
    """The caption; where pointers were cut out of it, punctuation is set apart again as Scan2Cap's tokens are."""
    text = answer_text(prediction)
    return re.sub(r" *([.,]) *", r" \1 ", text).strip() if find_pointers(prediction.answer) else text


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
    "dense_caption": {"scan2cap_ll3da": _scan2cap("ll3da"), "scan2cap": _scan2cap("scan2cap")},
    "object_caption": {"ngram": _ngrams("none"), "ngram_ptb": _ngrams("ptb")},
    "grounding": {"scanrefer": _scanrefer, "nr3d": _nr3d, "matched": _matched},
    "qa": {"exact": _exact, **_SCANQA},
    "situated_qa": {"sqa3d": _sqa3d, "sqa3d_text": _of_items(qa_variants.sqa3d_text), "exact": _exact, **_SCANQA},
    "dialogue": _GENERATION,
    "planning": _GENERATION,
    "scene_description": _GENERATION,
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
    scorers_of(task)
    predictions = load_scored_pairs(task, references_path, predictions_path)
    return score_predictions(task, predictions, scorer, meteor=meteor, per_item=per_item)
