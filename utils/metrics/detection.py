"""3D object detection: mAP and AR as 3DETR computes them (utils/ap_calculator.py, utils/eval_det.py).

VOC area AP over all points; a detection goes to the ground-truth box of its class with the largest IoU, a hit needs
IoU > threshold (strict), a second detection of the same box is a false positive. Shapes: K detections, C classes,
G ground-truth boxes, P points of one scene.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from ..boxes import ArrayLike, as_boxes, box3d_iou, nms_3d, points_in_boxes
from ..labels import DETECTION_CLASSES
from .detection_resamples import RankedClass, mean_over_seen
from .result import Aggregate, Scores

THRESHOLDS = (0.25, 0.5)
# 3DETR's settings
NMS_IOU, MIN_POINTS, MIN_OBJECTNESS = 0.25, 5, 0.05


@dataclass
class SceneDetections:
    """What a detector says about one scene: boxes, class probabilities (without background) and objectness."""

    boxes_K7: ArrayLike
    class_probs_KC: np.ndarray
    objectness_K: np.ndarray
    points_P3: np.ndarray | None = None  # needed for the removal of empty boxes only


@dataclass
class SceneObjects:
    """Ground truth of one scene: boxes and class indices."""

    boxes_G7: ArrayLike
    classes_G: np.ndarray


@dataclass
class _Flat:
    """Detections of one class over all scenes, as arrays: score, scene, best ground-truth box and its IoU."""

    score: np.ndarray
    scene: np.ndarray
    target: np.ndarray  # running number of the ground-truth box over all scenes, -1 where the scene has none
    iou: np.ndarray


def split_logits(logits_KC1: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Class probabilities [K, C] and objectness [K] from logits over C classes and background, which comes last."""
    logits = np.asarray(logits_KC1)
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities = shifted / shifted.sum(-1, keepdims=True)
    return probabilities[:, :-1], 1 - probabilities[:, -1]


def nonempty_boxes(points_P3: ArrayLike, boxes_K7: ArrayLike, min_points: int = MIN_POINTS) -> torch.Tensor:
    """Which boxes hold at least `min_points` points, bool [K]; 3DETR leaves out the others. On the boxes' device."""
    return points_in_boxes(points_P3, boxes_K7).sum(0) >= min_points


def keep_detections(
    scene: SceneDetections, *, nms_iou: float | None, min_points: int, min_objectness: float
) -> np.ndarray:
    """Indices of the detections that survive: not empty, not suppressed, confident enough.

    In 3DETR's order: boxes with fewer than `min_points` points go first, non-maximum suppression within the most
    probable class runs on all the rest, and the confidence threshold comes last.
    """
    objectness = np.asarray(scene.objectness_K)
    boxes = as_boxes(scene.boxes_K7)
    kept = np.arange(len(boxes))
    if min_points > 0 and len(boxes):
        if scene.points_P3 is None:
            raise ValueError("Removing empty boxes needs the scene's points; give points_P3 or set min_points=0.")
        kept = kept[nonempty_boxes(scene.points_P3, boxes, min_points).cpu().numpy()]
    if nms_iou is not None and len(kept):
        classes = np.asarray(scene.class_probs_KC)[kept].argmax(-1)
        kept = kept[nms_3d(boxes[kept], objectness[kept], nms_iou, classes).cpu().numpy()]
    return kept[objectness[kept] > min_objectness]


def evaluate_detections(
    predictions: Sequence[SceneDetections],
    ground_truth: Sequence[SceneObjects],
    iou_thresholds: Sequence[float] = THRESHOLDS,
    *,
    class_names: Sequence[str] = DETECTION_CLASSES,
    nms_iou: float | None = NMS_IOU,
    min_points: int = MIN_POINTS,
    min_objectness: float = MIN_OBJECTNESS,
    per_class_proposals: bool = True,
    average_over: str = "seen",
) -> dict:
    """mAP, AR and per-class values as fractions, for each threshold.

    nms_iou: threshold of the suppression within the most probable class; None switches it off.
    min_points: boxes with fewer points inside are dropped; 0 switches it off (and points are not needed).
    min_objectness: only detections above it count.
    per_class_proposals: every kept box is a detection of every class with score class probability x objectness
        (3DETR's default); False takes the most probable class alone, with score objectness.
    average_over: "seen" averages over classes that occur in the ground truth or among the detections, so that a class
        without ground truth counts as AP 0 (3DETR); "present" over classes of the ground truth only (VoteNet skips
        the others as NaN).

    Returns {"scorer", "unit", "items", "num_detections", "average_over", "0.25": {"mAP", "AR", "AP": {class: value},
    "recall": {class: value}}, ...}. The defaults are the settings of 3DETR's published numbers.
    """
    if average_over not in ("seen", "present"):
        raise ValueError(f'average_over must be "seen" or "present", not {average_over!r}.')
    thresholds = (nms_iou, min_points, min_objectness)
    flat, totals_SC = _flatten(predictions, ground_truth, len(class_names), per_class_proposals, thresholds)
    result: dict = {
        "scorer": "3detr",
        "unit": "fraction",
        "items": len(predictions),
        "num_detections": sum(len(entry.score) for entry in flat),
        "average_over": average_over,
    }
    return result | _at_thresholds(flat, totals_SC.sum(0), iou_thresholds, class_names, average_over)


def _at_thresholds(
    flat: Sequence[_Flat],
    totals_C: np.ndarray,
    iou_thresholds: Sequence[float],
    class_names: Sequence[str],
    average_over: str,
) -> dict[str, dict]:
    """The part of `evaluate_detections`' result that belongs to the thresholds."""
    result = {}
    for threshold in iou_thresholds:
        values = [
            _average_precision(entry, int(total), threshold) for entry, total in zip(flat, totals_C, strict=True)
        ]
        chosen = [
            c for c, total in enumerate(totals_C) if total > 0 or (average_over == "seen" and len(flat[c].score) > 0)
        ]
        result[str(threshold)] = {
            "mAP": float(np.mean([values[c][0] for c in chosen])) if chosen else 0.0,
            "AR": float(np.mean([values[c][1] for c in chosen])) if chosen else 0.0,
            "AP": {class_names[c]: values[c][0] for c in chosen},
            "recall": {class_names[c]: values[c][1] for c in chosen},
        }
    return result


def detection_scores(predictions: Sequence[SceneDetections], ground_truth: Sequence[SceneObjects]) -> Scores:
    """`evaluate_detections` as the scorers have it: fractions, `mAP@k` and `AR@k`, and `AP@k/class` of each class.

    Where a scene comes without its points, empty boxes are not removed, which a note says.
    """
    without_points = any(scene.points_P3 is None for scene in predictions)
    settings = (NMS_IOU, 0 if without_points else MIN_POINTS, MIN_OBJECTNESS)
    flat, totals_SC = _flatten(predictions, ground_truth, len(DETECTION_CLASSES), True, settings)
    result = _at_thresholds(flat, totals_SC.sum(0), THRESHOLDS, DETECTION_CLASSES, "seen")
    metrics: dict[str, float | None] = {}
    for threshold in THRESHOLDS:
        values = result[str(threshold)]
        metrics |= {f"mAP@{threshold}": values["mAP"], f"AR@{threshold}": values["AR"]}
        metrics |= {f"AP@{threshold}/{name}": value for name, value in values["AP"].items()}
    counts = {
        "scenes": len(predictions),
        "detections": sum(len(entry.score) for entry in flat),
        "objects": sum(len(truth.classes_G) for truth in ground_truth),
    }
    note = "Boxes without points inside are kept: no points were given. 3DETR's numbers drop them first."
    notes = [note] if without_points else []
    aggregates = _aggregates(flat, totals_SC)
    return Scores("fraction", len(predictions), metrics, counts=counts, notes=notes, aggregates=aggregates)


def _aggregates(flat: Sequence[_Flat], totals_SC: np.ndarray) -> dict[str, Aggregate]:
    """Each metric of `detection_scores` as a function of how often every scene was drawn."""
    scenes_SS = np.eye(len(totals_SC))
    aggregates = {}
    for threshold in THRESHOLDS:
        classes = []
        for entry, totals_S in zip(flat, totals_SC.T, strict=True):
            order, hits = _ranked(entry, threshold)
            classes.append(RankedClass(entry.scene[order], hits, totals_S))
        aggregates[f"mAP@{threshold}"] = Aggregate(scenes_SS, partial(_mean_resampled, classes, 0))
        aggregates[f"AR@{threshold}"] = Aggregate(scenes_SS, partial(_mean_resampled, classes, 1))
        for name, ranked in zip(DETECTION_CLASSES, classes, strict=True):
            aggregates[f"AP@{threshold}/{name}"] = Aggregate(scenes_SS, partial(_resampled, ranked))
    return aggregates


def _mean_resampled(classes: Sequence[RankedClass], which: int, weights_RS: np.ndarray) -> np.ndarray:
    """mAP (`which` 0) or AR (1) of each resample, over the classes that it has."""
    parts = [ranked.resample(weights_RS) for ranked in classes]
    return mean_over_seen(np.stack([part[which] for part in parts]), np.stack([part[2] for part in parts]))


def _resampled(ranked: RankedClass, weights_RS: np.ndarray) -> np.ndarray:
    """AP of one class in each resample; NaN where the class does not occur."""
    ap_R, _, seen_R = ranked.resample(weights_RS)
    return np.where(seen_R, ap_R, np.nan)


def _flatten(
    predictions: Sequence[SceneDetections],
    ground_truth: Sequence[SceneObjects],
    num_classes: int,
    per_class_proposals: bool,
    thresholds: tuple[float | None, int, float],
) -> tuple[list[_Flat], np.ndarray]:
    """Every class's detections over all scenes with their best ground-truth box, and boxes by scene and class."""
    if len(predictions) != len(ground_truth) or not predictions:
        raise ValueError(
            f"evaluate_detections needs one entry a scene on both sides, got {len(predictions)} and "
            f"{len(ground_truth)} (at least one)."
        )
    nms_iou, min_points, min_objectness = thresholds
    parts: list[list[tuple[np.ndarray, ...]]] = [[] for _ in range(num_classes)]
    totals_SC = np.zeros((len(predictions), num_classes), dtype=np.int64)
    offset = 0
    for number, (scene, truth) in enumerate(zip(predictions, ground_truth, strict=True)):
        truth_boxes, classes = as_boxes(truth.boxes_G7), np.asarray(truth.classes_G, dtype=np.int64)
        _check_scene(scene, truth_boxes, classes, num_classes)
        totals_SC[number] = np.bincount(classes, minlength=num_classes)
        kept = keep_detections(scene, nms_iou=nms_iou, min_points=min_points, min_objectness=min_objectness)
        probabilities = np.asarray(scene.class_probs_KC)[kept]
        objectness = np.asarray(scene.objectness_K)[kept]
        iou_KG = box3d_iou(as_boxes(scene.boxes_K7)[torch.as_tensor(kept)], truth_boxes).cpu().numpy()
        best_class = probabilities.argmax(-1) if len(kept) else np.zeros(0, dtype=np.int64)
        for c in range(num_classes):
            rows = np.arange(len(kept)) if per_class_proposals else np.flatnonzero(best_class == c)
            score = probabilities[rows, c] * objectness[rows] if per_class_proposals else objectness[rows]
            columns = np.flatnonzero(classes == c)
            if len(columns) and len(rows):
                iou_RG = iou_KG[np.ix_(rows, columns)]
                best = iou_RG.argmax(1)
                found = (offset + columns[best], iou_RG[np.arange(len(rows)), best])
            else:
                found = (np.full(len(rows), -1), np.full(len(rows), -1.0))
            parts[c].append((score, np.full(len(rows), number), *found))
        offset += len(truth_boxes)
    return [_Flat(*(np.concatenate(column) for column in zip(*part, strict=True))) for part in parts], totals_SC


def _check_scene(scene: SceneDetections, truth_boxes: torch.Tensor, classes: np.ndarray, num_classes: int) -> None:
    shape = np.asarray(scene.class_probs_KC).shape
    num_boxes = len(as_boxes(scene.boxes_K7))
    if shape != (num_boxes, num_classes) or np.asarray(scene.objectness_K).shape != (num_boxes,):
        raise ValueError(
            f"A scene has {num_boxes} boxes but class probabilities of shape {list(shape)} and objectness of shape "
            f"{list(np.asarray(scene.objectness_K).shape)}; they must be [K, {num_classes}] and [K]."
        )
    if len(classes) != len(truth_boxes) or (len(classes) and not 0 <= classes.min() <= classes.max() < num_classes):
        raise ValueError(
            f"Ground truth needs one class in 0..{num_classes - 1} for each of its {len(truth_boxes)} boxes."
        )


def _ranked(flat: _Flat, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Order of the detections, best first, and which of them, in that order, are hits."""
    order = np.argsort(-flat.score, kind="stable")
    target = flat.target[order]
    above = np.flatnonzero(flat.iou[order] > threshold)
    # of the detections that reach one box the best scored is the hit
    _, first = np.unique(target[above], return_index=True)
    hits = np.zeros(len(order), dtype=bool)
    hits[above[first]] = True
    return order, hits


def _average_precision(flat: _Flat, num_truth: int, threshold: float) -> tuple[float, float]:
    """AP (area under the precision envelope) and final recall of one class."""
    if not len(flat.score) or num_truth == 0:
        return 0.0, 0.0
    hits = _ranked(flat, threshold)[1].astype(np.float64)
    true_positives = np.cumsum(hits)
    recall = true_positives / num_truth
    precision = true_positives / np.arange(1, len(hits) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall, prepend=0.0) * envelope)), float(recall[-1])
