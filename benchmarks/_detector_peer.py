"""Matching as 3DETR does it: layer by layer, with one transfer of costs for each.

The cost of a layer is computed for all scenes at once, padded to the fullest one; it crosses to the host, scipy solves
scene by scene, and each scene's pairs go back to the device. The costs are those of models/scene_encoder/matcher.py.

Shapes: L layers, B scenes, Q queries, K objects of the fullest scene, T of all, C1 classes and no object.
"""

from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ..models.scene_encoder import DetectionTargets
from ..models.scene_encoder.matcher import Matches
from ..utils.boxes import giou_axis_aligned

PEER = "3DETR's way: a transfer of padded costs for each layer, scipy and a transfer back for each scene"


class PaddedTargets(NamedTuple):
    """Ground truth as 3DETR's data sets hand it over."""

    boxes_BK7: Tensor
    classes_BK: Tensor
    counts: tuple[int, ...]

    @classmethod
    def of(cls, targets: DetectionTargets) -> "PaddedTargets":
        """Zeros where a scene has no more objects."""
        boxes_U7 = torch.cat([targets.boxes_T7, targets.boxes_T7.new_zeros(1, 7)])
        classes_U = torch.cat([targets.classes_T, targets.classes_T.new_zeros(1)])
        return cls(boxes_U7[targets.slot_BK], classes_U[targets.slot_BK], targets.counts)


def layer_cost(logits_BQC1: Tensor, boxes_BQ7: Tensor, targets: PaddedTargets) -> Tensor:
    """Cost [B, Q, K] of one layer, on the device of the predictions."""
    classes_BQK = targets.classes_BK[:, None].expand(-1, boxes_BQ7.shape[1], -1)
    probability_BQK = logits_BQC1.float().softmax(-1).gather(2, classes_BQK)
    predicted_BQ17, wanted_B1K7 = boxes_BQ7.float()[:, :, None], targets.boxes_BK7[:, None]
    distance_BQK = (predicted_BQ17[..., :3] - wanted_B1K7[..., :3]).abs().sum(-1)
    return distance_BQK - probability_BQK - 2 * giou_axis_aligned(predicted_BQ17, wanted_B1K7)


@torch.no_grad()
def match_by_layer(logits_LBQC1: Tensor, boxes_LBQ7: Tensor, targets: PaddedTargets) -> list[tuple[Tensor, Tensor]]:
    """For each layer the object of each query within its scene [B, Q], and whether it has one [B, Q]."""
    device = boxes_LBQ7.device
    found = []
    for logits_BQC1, boxes_BQ7 in zip(logits_LBQC1, boxes_LBQ7, strict=True):
        cost_BQK = layer_cost(logits_BQC1, boxes_BQ7, targets).cpu().numpy()
        object_BQ = torch.zeros(boxes_BQ7.shape[:2], dtype=torch.int64, device=device)
        matched_BQ = torch.zeros(boxes_BQ7.shape[:2], device=device)
        for scene, count in enumerate(targets.counts):
            if count:
                pair = linear_sum_assignment(cost_BQK[scene, :, :count])
                query_P, object_P = (torch.from_numpy(side).to(device) for side in pair)
                object_BQ[scene, query_P] = object_P
                matched_BQ[scene, query_P] = 1
        found.append((object_BQ, matched_BQ))
    return found


def check_pairs(ours: Matches, theirs: list[tuple[Tensor, Tensor]], targets: DetectionTargets) -> None:
    """ValueError where the two ways pair other queries and objects."""
    object_LBQ = torch.stack([torch.where(matched_BQ > 0, object_BQ, -1) for object_BQ, matched_BQ in theirs])
    counts_B = torch.tensor(targets.counts, device=object_LBQ.device)
    first_B = counts_B.cumsum(0) - counts_B
    ours_LBQ = torch.full_like(object_LBQ, -1)
    ours_LBQ[ours.layer_P, ours.scene_P, ours.query_P] = ours.object_P - first_B[ours.scene_P]
    different = int((ours_LBQ != object_LBQ).sum())
    if different:
        raise ValueError(f"Matching differs from the peer's for {different} queries; not measured.")
