"""Losses of the scene encoder: set prediction after every decoder layer, votes and token foreground.

Sums are divided by counts over the whole batch, and over all ranks where there are several, so that the gradient does
not depend on how a batch is split.

Shapes: B scenes, Q queries, M tokens, K objects of one scene, R matched pairs, C1 classes and no object.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ...utils.boxes import paired_giou_axis_aligned
from .encoder import LayerPrediction, SceneEncoding
from .matcher import assign, match_cost


@dataclass(frozen=True)
class DetectionTargets:
    """Ground truth of a batch: one entry a scene, in the frame of the points."""

    boxes: list[Tensor]  # [K, 7] each, metres
    classes: list[Tensor]  # int64 [K] each

    def to(self, device: torch.device | str) -> "DetectionTargets":
        return DetectionTargets([part.to(device) for part in self.boxes], [part.to(device) for part in self.classes])


@dataclass(frozen=True)
class LossWeights:
    """Weights of the sum; `no_object` is that of the background class inside the classification loss."""

    classification: float = 1.0
    no_object: float = 0.2
    centre: float = 3.0
    size: float = 1.0
    giou: float = 2.0
    heading: float = 1.0
    vote: float = 2.0
    foreground: float = 1.0


class SetCriterion(nn.Module):
    """Total loss and its parts. Every decoder layer is matched and supervised on its own."""

    def __init__(self, num_classes: int, weights: LossWeights | None = None):
        super().__init__()
        self.weights = weights or LossWeights()
        class_weight_C1 = torch.ones(num_classes + 1)
        class_weight_C1[-1] = self.weights.no_object
        self.register_buffer("class_weight_C1", class_weight_C1, persistent=False)
        self.class_weight_C1: Tensor

    def forward(self, encoding: SceneEncoding, targets: DetectionTargets) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to minimise, and its unweighted parts (those of the last layer, detached) by name."""
        parts: dict[str, Tensor] = {}
        loss = encoding.class_logits_BQC1.new_zeros((), dtype=torch.float32)
        for prediction in [*encoding.intermediate, encoding.final]:
            parts = self.layer_losses(prediction, targets)
            loss = loss + sum(getattr(self.weights, name) * value for name, value in parts.items())
        loss = loss / (1 + len(encoding.intermediate))
        extra = token_losses(encoding, targets)
        loss = loss + sum(getattr(self.weights, name) * value for name, value in extra.items())
        return loss, {name: value.detach() for name, value in (parts | extra).items()}

    def layer_losses(self, prediction: LayerPrediction, targets: DetectionTargets) -> dict[str, Tensor]:
        """Losses of one decoder layer's predictions."""
        logits_BQC1 = prediction.class_logits_BQC1.float()
        wanted_BQ = logits_BQC1.new_full(logits_BQC1.shape[:2], logits_BQC1.shape[2] - 1, dtype=torch.int64)
        predicted, truth, double = [], [], []
        for scene, (boxes_K7, classes_K) in enumerate(zip(targets.boxes, targets.classes, strict=True)):
            cost_QK = match_cost(
                logits_BQC1[scene].detach(), prediction.boxes_BQ7[scene].detach(), boxes_K7, classes_K
            )
            query_R, object_R = assign(cost_QK)
            wanted_BQ[scene, query_R] = classes_K[object_R]
            predicted.append(prediction.boxes_BQ7[scene, query_R])
            truth.append(boxes_K7[object_R])
            if prediction.double_heading_BQ2 is not None:
                double.append(prediction.double_heading_BQ2[scene, query_R])
        entropy_BQ = F.cross_entropy(logits_BQC1.transpose(1, 2), wanted_BQ, self.class_weight_C1, reduction="none")
        losses = {"classification": entropy_BQ.sum() / global_mean(self.class_weight_C1[wanted_BQ].sum())}
        return losses | box_losses(torch.cat(predicted), torch.cat(truth), torch.cat(double) if double else None)


def box_losses(predicted_R7: Tensor, truth_R7: Tensor, double_heading_R2: Tensor | None) -> dict[str, Tensor]:
    """Centre L1 (metres, summed over axes), size L1 of logarithms, 1 - GIoU and heading, means over matched pairs."""
    count = global_mean(torch.tensor(float(len(truth_R7)), device=truth_R7.device))
    truth_log_R3 = truth_R7[:, 3:6].clamp(min=0.01).log()  # a flat picture still has a size
    losses = {
        "centre": (predicted_R7[:, :3] - truth_R7[:, :3]).abs().sum() / count,
        "size": (predicted_R7[:, 3:6].log() - truth_log_R3).abs().sum() / count,
        "giou": (1 - paired_giou_axis_aligned(predicted_R7, truth_R7)).sum() / count,
    }
    if double_heading_R2 is not None:  # a box turned by pi is the same box, hence the doubled angle
        wanted_R2 = torch.stack([(2 * truth_R7[:, 6]).cos(), (2 * truth_R7[:, 6]).sin()], -1)
        losses["heading"] = (double_heading_R2 - wanted_R2).square().sum() / count
    return losses


def token_losses(encoding: SceneEncoding, targets: DetectionTargets) -> dict[str, Tensor]:
    """Vote loss: L1 of the votes cast from inside a box to its centre. Foreground: is a token inside any box."""
    assert encoding.seed_xyz_BQ3 is not None and encoding.vote_xyz_BQ3 is not None
    assert encoding.foreground_BM is not None
    with torch.no_grad():
        votes = [owner_centres(*pair) for pair in zip(encoding.seed_xyz_BQ3, targets.boxes, strict=True)]
        wanted_BQ3 = torch.stack([centre_Q3 for centre_Q3, _ in votes])
        inside_BQ = torch.stack([inside_Q for _, inside_Q in votes])
        tokens = [owner_centres(*pair)[1] for pair in zip(encoding.token_xyz_BM3, targets.boxes, strict=True)]
        inside_BM = torch.stack(tokens).float()
    distance_BQ = (encoding.vote_xyz_BQ3 - wanted_BQ3).abs().sum(-1)
    votes_cast = global_mean(inside_BQ.sum().float())
    return {
        "vote": (distance_BQ * inside_BQ).sum() / votes_cast,
        "foreground": F.binary_cross_entropy_with_logits(encoding.foreground_BM.float(), inside_BM),
    }


def owner_centres(points_P3: Tensor, boxes_K7: Tensor, margin: float = 0.02) -> tuple[Tensor, Tensor]:
    """For each point the centre [P, 3] of the smallest box around it, and whether there is one (bool [P]).

    `margin` metres are added to every side of a box, for sensor noise. The smallest box is the most specific: a
    monitor's, not that of the desk below whose extents it may reach into.
    """
    if len(boxes_K7) == 0:
        return torch.zeros_like(points_P3), torch.zeros(len(points_P3), dtype=torch.bool, device=points_P3.device)
    offset_PK3 = points_P3[:, None] - boxes_K7[None, :, :3]
    cos_K, sin_K = boxes_K7[:, 6].cos(), boxes_K7[:, 6].sin()
    turned_PK3 = torch.stack(
        [
            offset_PK3[..., 0] * cos_K + offset_PK3[..., 1] * sin_K,
            offset_PK3[..., 1] * cos_K - offset_PK3[..., 0] * sin_K,
            offset_PK3[..., 2],
        ],
        -1,
    )
    inside_PK = (turned_PK3.abs() <= boxes_K7[:, 3:6] / 2 + margin).all(-1)
    volume_PK = boxes_K7[:, 3:6].prod(-1).expand(len(points_P3), -1).masked_fill(~inside_PK, torch.inf)
    return boxes_K7[volume_PK.argmin(1), :3], inside_PK.any(1)


def global_mean(total: Tensor) -> Tensor:
    """Mean over ranks of a count: what a rank divides its sums by, as gradients are averaged over ranks.

    The count over all ranks is taken as 1 where it is less, so that a batch without objects has a loss of 0.
    """
    total = total.detach().clone()
    num_ranks = 1
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(total)
        num_ranks = dist.get_world_size()
    return total.clamp(min=1.0) / num_ranks
