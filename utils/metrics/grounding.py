"""Visual grounding: does the predicted box cover the object that a sentence describes?

- `scanrefer`: daveredrum/ScanRefer lib/eval_helper.py and scripts/eval.py. Accuracy at IoU >= 0.25 and 0.5 with the
  official epsilon in the denominator, by unique / multiple and by class (`others` is the class outside the 18).
- `nr3d`: referit3d. Accuracy of picking the target among given objects (by id); for systems that predict boxes, the
  shares with IoU >= 0.25 (the "det" setting of BUTD-DETR and EDA) and 0.5, reported under their own names.
- `nr3d_nearest`: the predicted box picks, among the target and its distractors, the object that it overlaps most.
  Not an official number: easier than IoU accuracy, and not the selection by id that papers report.
- `matched_iou`: the per-sample score that rewards and evaluation share; several boxes allowed.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..boxes import ArrayLike, as_boxes, extents, match_boxes, paired_iou
from ..labels import OTHERS
from .result import Scores, group_means, mean

THRESHOLDS = (0.25, 0.5)
_OFFICIAL_EPSILON = 1e-8


@dataclass(frozen=True)
class GroundingItem:
    """One described object. A missing box counts as IoU 0.

    `multiple`: the scene holds other objects of the target's class; `others`: the target is outside the 18 classes.
    None where that is not known.
    """

    predicted_box: Sequence[float] | None
    target_box: Sequence[float]
    multiple: bool | None = None
    others: bool | None = None


def official_iou(predicted_N7: ArrayLike, target_N7: ArrayLike) -> np.ndarray:
    """ScanRefer's IoU [N] of row i with row i: axis-aligned, in float64, with 1e-8 in the denominator.

    An exact half overlap of a 2 cubic metre box therefore misses 0.5, as it does officially. Rotated boxes, which
    ScanRefer does not have, enter with their exact oriented overlap and the same epsilon.
    """
    predicted, target = as_boxes(predicted_N7).double(), as_boxes(target_N7).double()
    if bool((predicted[:, 6] != 0).any()) or bool((target[:, 6] != 0).any()):
        volume = predicted[:, 3:6].prod(-1) + target[:, 3:6].prod(-1)
        iou = paired_iou(predicted, target)
        union = volume / (1 + iou)
        return (iou * union / (union + _OFFICIAL_EPSILON)).numpy()
    (lower, upper), (target_lower, target_upper) = extents(predicted), extents(target)
    sides = (torch.minimum(upper, target_upper) - torch.maximum(lower, target_lower)).clamp(min=0)
    intersection = sides.prod(-1)
    union = (upper - lower).prod(-1) + (target_upper - target_lower).prod(-1) - intersection
    return (intersection / (union + _OFFICIAL_EPSILON)).numpy()


def scanrefer(items: Sequence[GroundingItem]) -> Scores:
    """Acc@0.25 and Acc@0.5 in percent, overall and by unique/multiple and class where every item knows them."""
    if not items:
        raise ValueError("There is nothing to score: the list of grounding items is empty.")
    ious = _item_ious(items)
    per_item = {f"Acc@{threshold}": (ious >= threshold).astype(float).tolist() for threshold in THRESHOLDS}
    masks = {"": np.ones(len(items), dtype=bool)} | _masks(items)
    metrics: dict[str, float | None] = {"mIoU": 100 * float(ious.mean())}
    counts: dict[str, int] = {}
    for name, mask in masks.items():
        counts[name or "overall"] = int(mask.sum())
        for threshold in THRESHOLDS:
            values = ious[mask] >= threshold
            suffix = f"/{name}" if name else ""
            # the official script prints 0 for a group without items
            metrics[f"Acc@{threshold}{suffix}"] = 100 * float(values.mean()) if len(values) else 0.0
    notes = []
    if len(masks) == 1:
        notes.append("unique/multiple is not given: the items do not say whether other objects share the class.")
    aggregates = group_means(per_item, {name: mask for name, mask in masks.items() if name})
    per_item["mIoU"] = ious.tolist()
    return Scores("percent", len(items), metrics, per_item, counts, notes, aggregates=aggregates)


def _item_ious(items: Sequence[GroundingItem]) -> np.ndarray:
    """Official IoU of every item; 0 where no box was predicted."""
    ious = np.zeros(len(items))
    present = [index for index, item in enumerate(items) if item.predicted_box is not None]
    if present:
        predicted = np.array([_seven(items[index].predicted_box) for index in present], dtype=np.float64)
        target = np.array([_seven(items[index].target_box) for index in present], dtype=np.float64)
        ious[present] = official_iou(predicted, target)
    return ious


def _seven(box: Sequence[float] | None) -> list[float]:
    assert box is not None
    if len(box) not in (6, 7):
        raise ValueError(f"A box has 6 or 7 numbers (centre, size, heading), not {len(box)}.")
    return [*map(float, box), 0.0][:7]


def _masks(items: Sequence[GroundingItem]) -> dict[str, np.ndarray]:
    """Boolean masks of the official groups that the items' knowledge allows."""
    if any(item.multiple is None for item in items):
        return {}
    multiple = np.array([bool(item.multiple) for item in items])
    masks = {"unique": ~multiple, "multiple": multiple}
    if all(item.others is not None for item in items):
        others = np.array([bool(item.others) for item in items])
        everything = {"overall": np.ones(len(items), dtype=bool), **masks}
        masks |= {f"{name}/not_in_others": mask & ~others for name, mask in everything.items()}
        masks |= {f"{name}/in_others": mask & others for name, mask in everything.items()}
    return masks


def unique_multiple_lookup(
    annotations: Iterable[tuple[str, str, str]], class_of_name: Mapping[str, int]
) -> dict[tuple[str, str], bool]:
    """Whether each annotated object, by (scene_id, object_id), shares its class with another one.

    `annotations` are (scene_id, object_id, object_name) of ALL descriptions of the split: officially only objects
    that some description mentions count. `class_of_name` maps raw labels (spaces, not underscores) to the 18
    classes; a name it lacks is `others`.
    """
    classes: dict[str, dict[str, int]] = {}
    for scene_id, object_id, object_name in annotations:
        name = object_name.replace("_", " ")
        classes.setdefault(scene_id, {})[str(object_id)] = class_of_name.get(name, OTHERS)
    return {
        (scene_id, object_id): list(objects.values()).count(class_id) > 1
        for scene_id, objects in classes.items()
        for object_id, class_id in objects.items()
    }


def nr3d(
    predicted_ids: Sequence[int | str | None] | None,
    target_ids: Sequence[int | str] | None,
    *,
    ious: Sequence[float] | None = None,
    groups: Mapping[str, Sequence[bool]] | None = None,
) -> Scores:
    """Nr3D accuracy in percent: `Acc` by object id where ids are given, `Acc@0.25` and `Acc@0.5` where IoUs are.

    `groups` names boolean masks over the items, for instance easy/hard and view-dependent/-independent.
    """
    per_item: dict[str, list[float]] = {}
    if predicted_ids is not None and target_ids is not None:
        pairs = zip(predicted_ids, target_ids, strict=True)
        per_item["Acc"] = [
            float(predicted is not None and str(predicted) == str(target)) for predicted, target in pairs
        ]
    for threshold in THRESHOLDS if ious is not None else ():
        per_item[f"Acc@{threshold}"] = [float(iou >= threshold) for iou in ious or ()]
    if not per_item or not next(iter(per_item.values())):
        raise ValueError("Nr3D needs chosen and target object ids, or IoUs of predicted boxes, of at least one item.")
    return _by_groups(per_item, groups or {})


def nr3d_nearest(
    predicted_boxes: Sequence[Sequence[float] | None],
    target_boxes: Sequence[Sequence[float]],
    distractor_boxes: Sequence[Sequence[Sequence[float]]],
    *,
    groups: Mapping[str, Sequence[bool]] | None = None,
) -> Scores:
    """`Acc-nearest` in percent: the box overlaps the target, and no distractor as much. A missing box is wrong."""
    hits = []
    for predicted, target, distractors in zip(predicted_boxes, target_boxes, distractor_boxes, strict=True):
        if predicted is None:
            hits.append(0.0)
            continue
        candidates = np.array([_seven(box) for box in (target, *distractors)], dtype=np.float64)
        repeated = np.broadcast_to(np.array(_seven(predicted), dtype=np.float64), candidates.shape)
        iou, *others = official_iou(repeated.copy(), candidates)
        hits.append(float(iou > max(others, default=0.0) and iou > 0))
    if not hits:
        raise ValueError("There is nothing to score: the list of grounding items is empty.")
    return _by_groups({"Acc-nearest": hits}, groups or {})


def _by_groups(per_item: dict[str, list[float]], groups: Mapping[str, Sequence[bool]]) -> Scores:
    """Percent of each measure over all items, and over each group; null for a group without items."""
    metrics: dict[str, float | None] = {name: 100 * mean(values) for name, values in per_item.items()}
    items = len(next(iter(per_item.values())))
    counts = {"overall": items}
    for group, mask in groups.items():
        counts[group] = sum(map(bool, mask))
        for name, values in per_item.items():
            chosen = [value for value, inside in zip(values, mask, strict=True) if inside]
            metrics[f"{name}/{group}"] = 100 * mean(chosen) if chosen else None
    return Scores("percent", items, metrics, per_item, counts, aggregates=group_means(per_item, groups or {}))


def matched_iou(predicted_K7: ArrayLike, target_T7: ArrayLike) -> float:
    """Sum of the IoUs of the best one-to-one pairs over max(K, T): in [0, 1], and 1 only for the targets themselves.

    Surplus boxes cost as much as missing ones, so that naming every box in the room earns nothing.
    """
    predicted, target = as_boxes(predicted_K7), as_boxes(target_T7)
    if not len(target):
        raise ValueError("matched_iou needs at least one target box.")
    if not len(predicted):
        return 0.0
    total = match_boxes(predicted.double(), target.double()).values.sum()
    return float(total) / max(len(predicted), len(target))
