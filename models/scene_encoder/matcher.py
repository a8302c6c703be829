"""Assignment of queries to ground-truth objects: the Hungarian method on class, centre and box costs.

Shapes: Q queries, K objects of one scene, C1 classes and no object, R = min(Q, K) pairs.
"""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ...utils.boxes import box3d_giou


def match_cost(
    class_logits_QC1: Tensor,
    boxes_Q7: Tensor,
    target_boxes_K7: Tensor,
    target_classes_K: Tensor,
    *,
    class_weight: float = 1.0,
    centre_weight: float = 1.0,
    giou_weight: float = 2.0,
) -> Tensor:
    """Cost [Q, K]: -p(class), the L1 distance of the centres in metres and -GIoU (headings ignored), weighted."""
    probability_QK = class_logits_QC1.float().softmax(-1)[:, target_classes_K]
    distance_QK = torch.cdist(boxes_Q7[:, :3], target_boxes_K7[:, :3], p=1)
    giou_QK = box3d_giou(boxes_Q7[:, :6], target_boxes_K7[:, :6])
    return centre_weight * distance_QK - class_weight * probability_QK - giou_weight * giou_QK


@torch.no_grad()
def assign(cost_QK: Tensor) -> tuple[Tensor, Tensor]:
    """Query and object indices, int64 [R] each, of the cheapest one-to-one assignment.

    FloatingPointError: a cost is not finite, which means that the training has diverged.
    """
    cost = cost_QK.detach().double().cpu()
    if not bool(torch.isfinite(cost).all()):
        raise FloatingPointError("The matching cost is not finite: the scene encoder has diverged; lower optim.lr.")
    query_R, object_R = linear_sum_assignment(cost.numpy())
    device = cost_QK.device
    return torch.from_numpy(query_R).to(device), torch.from_numpy(object_R).to(device)
