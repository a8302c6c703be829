"""The object that a user points at, by a box or by a click: which proposal it is, and what the encoder saw there.

Boxes and points are in the frame of the encoded points (the model frame), metres; headings count. A side below zero
is read as zero. Which proposal and which tokens are taken carries no gradient; their features do.

Shapes: B queries, each with its own scene; K proposals of that scene, padded where `valid` is False, and T encoder
tokens; E encoder width, C classes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

NOTHING = -1
CLICK_REACH = 0.3  # metres around a click that count as its object where nothing is detected


@dataclass
class QueriedObjects:
    """What is known of each object that was pointed at."""

    boxes_B7: Tensor  # as asked
    proposal_B: Tensor  # int64, the proposal that covers the box; NOTHING where none does
    features_BE: Tensor  # of that proposal, zeros without one
    class_probs_BC: Tensor  # of that proposal, zeros without one
    colors_B6: Tensor  # of that proposal, zeros without one
    pooled_BE: Tensor  # encoder tokens inside the box, averaged


def distance_to_boxes(points: Tensor, boxes: Tensor) -> Tensor:
    """Metres [...] from points [..., 3] to the nearest point of boxes [..., 7], which broadcast; 0 inside, float64."""
    points, boxes = points.detach().double(), boxes.detach().double()
    offset = points - boxes[..., :3]
    cos, sin = boxes[..., 6].cos(), boxes[..., 6].sin()
    along = offset[..., 0] * cos + offset[..., 1] * sin
    across = offset[..., 1] * cos - offset[..., 0] * sin
    local = torch.stack([along, across, offset[..., 2]], dim=-1)
    return (local.abs() - boxes[..., 3:6].clamp(min=0) / 2).clamp(min=0).norm(dim=-1)


def select_by_click(points_B3: Tensor, proposals_BK7: Tensor, valid_BK: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest proposal that contains each clicked point, else the nearest one.

    Returns:
        Its index [B], int64, the first of equals, NOTHING in a scene without proposals; the distance [B] of the click
        from it in metres, 0 inside, infinite without one.

    Raises:
        ValueError: a point that is not finite.
    """
    if not bool(torch.isfinite(points_B3).all()):
        raise ValueError("The position of a click is not finite; give metres in the scene's frame.")
    if valid_BK.shape[1] == 0:
        nothing_B = torch.full((len(points_B3),), NOTHING, dtype=torch.int64, device=points_B3.device)
        return nothing_B, points_B3.new_full((len(points_B3),), torch.inf)
    distance_BK = distance_to_boxes(points_B3[:, None], proposals_BK7).masked_fill(~valid_BK, torch.inf)
    nearest_B, index_B = distance_BK.min(-1)
    volume_BK = proposals_BK7.detach()[..., 3:6].double().clamp(min=0).prod(-1)
    smallest_B = volume_BK.masked_fill(distance_BK > 0, torch.inf).argmin(-1)
    index_B = smallest_B.where(nearest_B == 0, index_B)
    return index_B.where(valid_BK.any(-1), NOTHING), nearest_B.to(points_B3.dtype)


def click_boxes(
    points_B3: Tensor, proposals_BK7: Tensor, valid_BK: Tensor, reach: float = CLICK_REACH
) -> tuple[Tensor, Tensor]:
    """The box that each click means: that of the proposal `select_by_click` takes, else a cube around the click.

    Args:
        reach: half the cube's side, metres.

    Returns:
        Boxes [B, 7]; the distance [B] of the click from the proposal, infinite without one.
    """
    index_B, distance_B = select_by_click(points_B3, proposals_BK7, valid_BK)
    side_B3 = torch.full_like(points_B3, 2 * reach)
    cube_B7 = torch.cat([points_B3, side_B3, torch.zeros_like(points_B3[:, :1])], dim=-1)
    return _pick(proposals_BK7, index_B, otherwise_BX=cube_B7), distance_B


def pool_in_boxes(boxes_B7: Tensor, token_xyz_BT3: Tensor, tokens_BTE: Tensor) -> Tensor:
    """Mean [B, E] of the encoder tokens inside each box, faces included; the nearest token where none is inside.

    Boxes and positions must be finite: a GPU is not waited for to look.
    """
    distance_BT = distance_to_boxes(token_xyz_BT3, boxes_B7[:, None])
    least_B1, nearest_B1 = distance_BT.min(-1, keepdim=True)
    only_nearest_BT = torch.zeros_like(distance_BT, dtype=torch.bool).scatter(1, nearest_B1, True)
    share_BT = torch.where(least_B1 == 0, distance_BT == 0, only_nearest_BT).to(tokens_BTE.dtype)
    share_BT = share_BT / share_BT.sum(-1, keepdim=True)
    return (share_BT[:, None] @ tokens_BTE)[:, 0]


def query_boxes(
    boxes_B7: Tensor,
    *,
    proposal_B: Tensor,
    features_BKE: Tensor,
    class_probs_BKC: Tensor,
    colors_BK6: Tensor,
    token_xyz_BT3: Tensor,
    tokens_BTE: Tensor,
) -> QueriedObjects:
    """What is known of the object in each box; a click becomes a box by `click_boxes`.

    Args:
        boxes_B7, token_xyz_BT3: finite, as `pool_in_boxes` wants them.
        proposal_B: the proposal that covers each box, int64; NOTHING where none does.
        features_BKE, class_probs_BKC: of the proposals, as `select_proposals` gives them.
        colors_BK6: likewise, as `colors_in_boxes` gives them.
        token_xyz_BT3, tokens_BTE: as a SceneEncoding holds them.
    """
    return QueriedObjects(
        boxes_B7=boxes_B7,
        proposal_B=proposal_B,
        features_BE=_pick(features_BKE, proposal_B),
        class_probs_BC=_pick(class_probs_BKC, proposal_B),
        colors_B6=_pick(colors_BK6, proposal_B),
        pooled_BE=pool_in_boxes(boxes_B7, token_xyz_BT3, tokens_BTE),
    )


def _pick(values_BKX: Tensor, index_B: Tensor, otherwise_BX: Tensor | None = None) -> Tensor:
    """Row `index` of each query's values [B, X]; another value, by default zeros, where the index is NOTHING."""
    if otherwise_BX is None:
        otherwise_BX = values_BKX.new_zeros(len(values_BKX), values_BKX.shape[-1])
    if values_BKX.shape[1] == 0:
        return otherwise_BX
    rows_B = torch.arange(len(index_B), device=index_B.device)
    return torch.where((index_B != NOTHING)[:, None], values_BKX[rows_B, index_B.clamp(min=0)], otherwise_BX)
