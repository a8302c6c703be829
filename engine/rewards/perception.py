"""The perception reward: how well the boxes of an answer cover the boxes that it should point at.

Shapes: K predicted boxes, M target boxes. Boxes are centre, size, heading: metres, radians, model frame.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from ...utils.boxes import match_boxes, paired_iou, volumes
from ...utils.metrics.grounding import matched_iou
from ...utils.text import parse_response, resolve_boxes

BoxShape = Literal["iou", "giou"]

# Nothing indoors is this far away. Clipped there, numbers like 1e200 cannot overflow, and still overlap nothing.
_FAR = 1e4


def box_set_score(predicted_K7: np.ndarray, target_M7: np.ndarray, shape: BoxShape = "iou") -> float:
    """Overlap of two sets of oriented boxes in [0, 1]: 1 only where each target is met by one box and none is left.

    The sum over a one-to-one (Hungarian) matching divided by max(K, M), so a missing and a surplus box cost the same.
    "iou" is the paper's measure. "giou" takes (GIoU + 1) / 2, which also tells near from far where nothing overlaps,
    times the ratio of the smaller volume to the larger: alone it would pay 1/2 for any box around the whole room.
    """
    predicted_K7 = np.asarray(predicted_K7, dtype=np.float64).reshape(-1, 7)
    target_M7 = np.asarray(target_M7, dtype=np.float64).reshape(-1, 7)
    if not len(predicted_K7) or not len(target_M7):
        return 0.0
    predicted_K7 = predicted_K7.clip(-_FAR, _FAR)
    if shape == "iou":
        return matched_iou(predicted_K7, target_M7)  # the evaluation's own
    matches = match_boxes(predicted_K7, target_M7, metric="giou")
    predicted_R, target_R = (volumes(boxes_K7).numpy() for boxes_K7 in (predicted_K7, target_M7))
    predicted_R, target_R = predicted_R[matches.predicted.numpy()], target_R[matches.target.numpy()]
    ratio_R = np.minimum(predicted_R, target_R) / np.maximum(predicted_R, target_R)
    values_R = (matches.values.numpy() + 1) / 2 * ratio_R
    return float(values_R.sum() / max(len(predicted_K7), len(target_M7)))


class PerceptionReward:
    """Reward of the boxes in the answer (not in the thought), by name `<obj12>` or as numbers `<box>…</box>`.

    None for samples without target boxes; 0 for an answer without boxes.
    """

    def __init__(self, shape: BoxShape = "iou"):
        if shape not in ("iou", "giou"):
            raise ValueError(f"Unknown perception reward {shape!r}; choose iou or giou.")
        self.shape: BoxShape = shape

    def __call__(
        self,
        completions: list[str],
        *,
        target_boxes: Sequence[np.ndarray | None],
        proposals: Sequence[np.ndarray],
        **columns: Any,  # noqa: ARG002
    ) -> list[float | None]:
        # completions of one prompt share its arrays, and many of them their answer: each is scored once
        wanted: dict[tuple[str, int, int], tuple[np.ndarray, np.ndarray]] = {}
        keys: list[tuple[str, int, int] | None] = []
        for completion, target_M7, proposals_K7 in zip(completions, target_boxes, proposals, strict=True):
            if target_M7 is None or not len(target_M7):
                keys.append(None)
                continue
            answer = parse_response(completion).answer
            key = (answer, id(target_M7), id(proposals_K7))
            keys.append(key)
            if key not in wanted:
                boxes = resolve_boxes(answer, np.asarray(proposals_K7).tolist())
                wanted[key] = np.array(boxes, dtype=np.float64).reshape(-1, 7), target_M7
        known = dict(zip(wanted, self._scores(list(wanted.values())), strict=True))
        return [None if key is None else known[key] for key in keys]

    def _scores(self, pairs: list[tuple[np.ndarray, np.ndarray]]) -> list[float]:
        """`box_set_score` of each pair of sets; IoUs of one box with one, as most are, are worked out together."""
        iou = self.shape == "iou"
        alone = [row for row, (ours_K7, theirs_M7) in enumerate(pairs) if iou and len(ours_K7) == len(theirs_M7) == 1]
        single: dict[int, float] = {}
        if alone:
            sides = (np.concatenate([pairs[row][side] for row in alone]).clip(-_FAR, _FAR) for side in (0, 1))
            single = dict(zip(alone, paired_iou(*sides).tolist(), strict=True))
        return [single[row] if row in single else box_set_score(*sets, self.shape) for row, sets in enumerate(pairs)]
