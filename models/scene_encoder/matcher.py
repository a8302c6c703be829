"""Assignment of queries to ground-truth objects: the Hungarian method on class, centre and box costs.

The costs of all layers and scenes are computed at once where the predictions are, and cross to the host in one
transfer; scipy's solver runs there.

Shapes: L layers, B scenes, Q queries, T objects of all scenes, C1 classes and no object, P pairs of all layers.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ...utils.boxes import giou_axis_aligned
from .targets import DetectionTargets


class Matches(NamedTuple):
    """Matched pairs, int64 [P] each: ordered by layer, then scene."""

    layer_P: Tensor
    scene_P: Tensor
    query_P: Tensor
    object_P: Tensor  # among the T objects of the batch


def match_cost(
    class_logits_LBQC1: Tensor,
    boxes_LBQ7: Tensor,
    targets: DetectionTargets,
    *,
    class_weight: float = 1.0,
    centre_weight: float = 1.0,
    giou_weight: float = 2.0,
) -> Tensor:
    """Cost [L, T, Q] of giving an object to a query of its scene, weighted.

    -p(class), the L1 distance of the centres in metres and -GIoU (headings ignored), as 3DETR's.
    """
    probability_LBC1Q = class_logits_LBQC1.float().softmax(-1).transpose(2, 3)
    probability_LTQ = probability_LBC1Q[:, targets.scene_T, targets.classes_T]
    boxes_LTQ6 = boxes_LBQ7[..., :6].float()[:, targets.scene_T]
    wanted_T16 = targets.boxes_T7[:, None, :6]
    distance_LTQ = (boxes_LTQ6[..., :3] - wanted_T16[..., :3]).abs().sum(-1)
    giou_LTQ = giou_axis_aligned(boxes_LTQ6, wanted_T16)
    return centre_weight * distance_LTQ - class_weight * probability_LTQ - giou_weight * giou_LTQ


@torch.no_grad()
def match(
    class_logits_LBQC1: Tensor, boxes_LBQ7: Tensor, targets: DetectionTargets, repeats: Sequence[int] | None = None
) -> Matches:
    """The cheapest assignment in every layer and scene.

    Args:
        repeats: for each layer, how many queries an object takes; None is one in all layers. Where a scene has fewer
            queries than that, some objects take fewer, or none.

    Raises:
        FloatingPointError: a cost is not finite, which means that the training has diverged.
    """
    cost_LTQ = _to_host(match_cost(class_logits_LBQC1, boxes_LBQ7, targets))
    return assign(cost_LTQ, targets.counts, repeats or [1] * len(cost_LTQ), boxes_LBQ7.device)


def assign(
    cost_LTQ: np.ndarray, counts: Sequence[int], repeats: Sequence[int], device: torch.device | str = "cpu"
) -> Matches:
    """Pairs of the cheapest assignments, given the costs on the host; see `match`."""
    if not np.isfinite(cost_LTQ).all():
        raise FloatingPointError("The matching cost is not finite: the scene encoder has diverged; lower optim.lr.")
    found = [np.zeros((4, 0), np.int64)]
    for layer, (cost_TQ, times) in enumerate(zip(cost_LTQ, repeats, strict=True)):
        first = 0
        for scene, count in enumerate(counts):
            cost_KQ = cost_TQ[first : first + count]
            row_R, query_R = linear_sum_assignment(np.repeat(cost_KQ, times, axis=0) if times > 1 else cost_KQ)
            object_R = first + row_R // times
            found.append(np.stack([np.full_like(row_R, layer), np.full_like(row_R, scene), query_R, object_R]))
            first += count
    return Matches(*torch.from_numpy(np.concatenate(found, axis=1)).to(device))


def _to_host(cost: Tensor) -> np.ndarray:
    """The one transfer: through pinned memory, which is several times faster."""
    if cost.device.type != "cuda":
        return cost.cpu().numpy()
    pinned = torch.empty(cost.shape, dtype=cost.dtype, pin_memory=True)
    pinned.copy_(cost, non_blocking=True)
    torch.cuda.current_stream(cost.device).synchronize()
    return pinned.numpy()
