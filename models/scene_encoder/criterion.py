"""Losses of the scene encoder: set prediction after every decoder layer, votes and token foreground.

Sums are divided by counts over the whole batch, and over all ranks where there are several, so that the gradient does
not depend on how a batch is split.

Shapes: L layers, B scenes, Q queries, M tokens, T objects of all scenes, K of the fullest one, P matched pairs of all
layers (in `owner_centres` points), C1 classes and no object.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ...utils.boxes import giou_axis_aligned
from .encoder import LayerPrediction, SceneEncoding
from .matcher import match
from .targets import DetectionTargets


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
    """Total loss and its parts. Every decoder layer is matched and supervised on its own.

    Args:
        repeats: queries that an object takes in the layers before the last one, where more of them learn sooner what
            an object is (H-DETR); in the last layer it takes one.
    """

    def __init__(self, num_classes: int, weights: LossWeights | None = None, repeats: int = 1):
        super().__init__()
        self.weights = weights or LossWeights()
        self.repeats = repeats
        class_weight_C1 = torch.ones(num_classes + 1)
        class_weight_C1[-1] = self.weights.no_object
        self.register_buffer("class_weight_C1", class_weight_C1, persistent=False)
        self.class_weight_C1: Tensor

    def forward(self, encoding: SceneEncoding, targets: DetectionTargets) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to minimise, and its unweighted parts (those of the last layer, detached) by name."""
        layers = self.layer_losses([*encoding.intermediate, encoding.final], targets)
        tokens = token_losses(encoding, targets)
        loss = encoding.boxes_BQ7.new_zeros(())
        for name, value in (layers | tokens).items():
            loss = loss + getattr(self.weights, name) * value.mean()
        parts = {name: value_L[-1] for name, value_L in layers.items()} | tokens
        return loss, {name: value.detach() for name, value in parts.items()}

    def layer_losses(self, predictions: Sequence[LayerPrediction], targets: DetectionTargets) -> dict[str, Tensor]:
        """Losses [L] of the decoder layers' predictions by name."""
        logits_LBQC1 = torch.stack([prediction.class_logits_BQC1 for prediction in predictions]).float()
        boxes_LBQ7 = torch.stack([prediction.boxes_BQ7 for prediction in predictions])
        repeats = [self.repeats] * (len(predictions) - 1) + [1]
        matches = match(logits_LBQC1.detach(), boxes_LBQ7.detach(), targets, repeats)
        places = (matches.layer_P, matches.scene_P, matches.query_P)
        num_layers, num_classes = len(predictions), logits_LBQC1.shape[-1] - 1
        wanted_LBQ = torch.full(logits_LBQC1.shape[:3], num_classes, device=logits_LBQC1.device)
        wanted_LBQ[places] = targets.classes_T[matches.object_P]
        entropy_LBQ = F.cross_entropy(
            logits_LBQC1.flatten(0, 2), wanted_LBQ.flatten(), self.class_weight_C1, reduction="none"
        ).view_as(wanted_LBQ)
        weight_L = global_mean(self.class_weight_C1[wanted_LBQ].sum((1, 2)))
        doubled = [layer.double_heading_BQ2 for layer in predictions if layer.double_heading_BQ2 is not None]
        double_P2 = torch.stack(doubled)[places] if doubled else None
        pairs = box_losses(boxes_LBQ7[places], targets.boxes_T7[matches.object_P], double_P2)
        of_layer_LP = (matches.layer_P == torch.arange(num_layers, device=matches.layer_P.device)[:, None]).float()
        count_L = global_mean(of_layer_LP.sum(1))
        losses = {"classification": entropy_LBQ.sum((1, 2)) / weight_L}
        return losses | {name: of_layer_LP @ value_P / count_L for name, value_P in pairs.items()}


def box_losses(predicted_P7: Tensor, truth_P7: Tensor, double_heading_P2: Tensor | None) -> dict[str, Tensor]:
    """Of each pair: L1 of centres (metres, summed over axes), L1 of logarithms of sizes, 1 - GIoU, and heading."""
    truth_log_P3 = truth_P7[:, 3:6].clamp(min=0.01).log()  # a flat picture still has a size
    losses = {
        "centre": (predicted_P7[:, :3] - truth_P7[:, :3]).abs().sum(-1),
        "size": (predicted_P7[:, 3:6].log() - truth_log_P3).abs().sum(-1),
        "giou": 1 - giou_axis_aligned(predicted_P7, truth_P7),
    }
    if double_heading_P2 is not None:  # a box turned by pi is the same box, hence the doubled angle
        wanted_P2 = torch.stack([(2 * truth_P7[:, 6]).cos(), (2 * truth_P7[:, 6]).sin()], -1)
        losses["heading"] = (double_heading_P2 - wanted_P2).square().sum(-1)
    return losses


def token_losses(encoding: SceneEncoding, targets: DetectionTargets) -> dict[str, Tensor]:
    """Vote loss: L1 of the votes cast from inside a box to its centre. Foreground: is a token inside any box."""
    assert encoding.seed_xyz_BQ3 is not None and encoding.vote_xyz_BQ3 is not None
    assert encoding.foreground_BM is not None
    num_seeds = encoding.seed_xyz_BQ3.shape[1]
    with torch.no_grad():
        places_BP3 = torch.cat([encoding.seed_xyz_BQ3, encoding.token_xyz_BM3], 1)
        centres_BP3, inside_BP = owner_centres(places_BP3, targets)
    inside_BQ, inside_BM = inside_BP[:, :num_seeds], inside_BP[:, num_seeds:].float()
    distance_BQ = (encoding.vote_xyz_BQ3 - centres_BP3[:, :num_seeds]).abs().sum(-1)
    return {
        "vote": (distance_BQ * inside_BQ).sum() / global_mean(inside_BQ.sum().float()),
        "foreground": F.binary_cross_entropy_with_logits(encoding.foreground_BM.float(), inside_BM),
    }


def owner_centres(points_BP3: Tensor, targets: DetectionTargets, margin: float = 0.02) -> tuple[Tensor, Tensor]:
    """For each point the centre [B, P, 3] of the smallest box of its scene around it, and whether there is one [B, P].

    `margin` metres are added to every side of a box, for sensor noise. The smallest box is the most specific: a
    monitor's, not that of the desk below whose extents it may reach into.
    """
    boxes_T7 = targets.boxes_T7
    offset_TP3 = points_BP3[targets.scene_T] - boxes_T7[:, None, :3]
    cos_T1, sin_T1 = boxes_T7[:, 6:].cos(), boxes_T7[:, 6:].sin()
    along_TP = offset_TP3[..., 0] * cos_T1 + offset_TP3[..., 1] * sin_T1
    across_TP = offset_TP3[..., 1] * cos_T1 - offset_TP3[..., 0] * sin_T1
    half_T13 = boxes_T7[:, None, 3:6] / 2 + margin
    inside_TP = (torch.stack([along_TP, across_TP, offset_TP3[..., 2]], -1).abs() <= half_T13).all(-1)
    volume_TP = boxes_T7[:, 3:6].prod(-1, keepdim=True).expand_as(inside_TP).masked_fill(~inside_TP, torch.inf)
    # one more row, which is around nothing, stands for the objects that a scene does not have
    volume_UP = torch.cat([volume_TP, volume_TP.new_full((1, volume_TP.shape[1]), torch.inf)])
    centre_U3 = torch.cat([boxes_T7[:, :3], boxes_T7.new_zeros(1, 3)])
    nobody_B1 = targets.slot_BK.new_full((len(points_BP3), 1), len(boxes_T7))  # also where no scene has an object
    slot_BK = torch.cat([targets.slot_BK, nobody_B1], 1)
    smallest_BP, slot_BP = volume_UP[slot_BK].min(1)
    return centre_U3[slot_BK.gather(1, slot_BP)], smallest_BP.isfinite()


def global_mean(total: Tensor) -> Tensor:
    """Means over ranks of counts: what a rank divides its sums by, as gradients are averaged over ranks.

    A count over all ranks is taken as 1 where it is less, so that a batch without objects has a loss of 0.
    """
    total = total.detach().clone()
    num_ranks = 1
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(total)
        num_ranks = dist.get_world_size()
    return total.clamp(min=1.0) / num_ranks
