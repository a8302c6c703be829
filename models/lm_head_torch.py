"""The two passes over a tile of logits in plain PyTorch; `lm_head_triton.py` has the same two as kernels.

Shapes: C tokens of a chunk, W vocabulary rows of a chunk; a state [4, C] is top, total, weighted and picked of each
token (`lm_head.py`).
"""

import torch
from torch import Tensor


def _locate(targets_C: Tensor, first: int, width: int) -> tuple[Tensor, Tensor]:
    """Column of each target in a tile (clamped into it), and whether the target lies in the tile."""
    local_C = targets_C - first
    return local_C.clamp(0, width - 1).long(), (local_C >= 0) & (local_C < width)


def fold_tile(logits_CW: Tensor, targets_C: Tensor, state_4C: Tensor, first: int) -> None:
    """Take the logits of vocabulary rows `first` and on into the running state, in place."""
    top_C, total_C, weighted_C, picked_C = state_4C
    column_C, inside_C = _locate(targets_C, first, logits_CW.shape[1])
    picked_C.copy_(torch.where(inside_C, logits_CW.gather(1, column_C[:, None])[:, 0], picked_C))
    new_top_C = torch.maximum(top_C, logits_CW.amax(1))
    # 0 at the first tile, where top is -inf
    shrink_C = torch.exp(top_C - new_top_C)
    exps_CW = (logits_CW - new_top_C[:, None]).exp_()
    total_C.mul_(shrink_C).add_(exps_CW.sum(1))
    weighted_C.mul_(shrink_C).add_(exps_CW.mul_(logits_CW).sum(1))
    top_C.copy_(new_top_C)


def gradient_tile(
    logits_CW: Tensor,
    targets_C: Tensor,
    lse_C: Tensor,
    mean_C: Tensor,
    grad_logps_C: Tensor,
    grad_entropy_C: Tensor | None,
    first: int,
    dtype: torch.dtype,
) -> Tensor:
    """Gradient [C, W] in the logits, in `dtype`; the logits are overwritten.

    With p = softmax(l): d logp / d l = onehot - p, and d entropy / d l = -p (l - E l).
    """
    slope_CW = -grad_logps_C[:, None]  # [C, 1] without an entropy
    if grad_entropy_C is not None:
        slope_CW = slope_CW - (logits_CW - mean_C[:, None]).mul_(grad_entropy_C[:, None])
    grad_CW = logits_CW.sub_(lse_C[:, None]).exp_().mul_(slope_CW)
    column_C, inside_C = _locate(targets_C, first, logits_CW.shape[1])
    grad_CW.scatter_add_(1, column_C[:, None], (grad_logps_C * inside_C)[:, None])
    return grad_CW.to(dtype)
