"""Importance ratios of sampled tokens: new policy over old (PPO's), and trainer over sampler. Pure functions.

A rollout is sampled by one program and scored by another. Where the two disagree about the very same weights (other
kernels, other precision, top-p), the trainer's old policy is not what the tokens came from; the second ratio says by
how much, and weights the loss by it.

Sources: sequence ratio (GSPO, arXiv 2507.18071); truncated and masked correction (Yao and others, "Your efficient RL
framework secretly brings you off-policy RL training"; IcePop; TRL's vllm_importance_sampling_mode).

Shapes: B sequences of a micro-batch, T tokens of the padded responses.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .grpo_presets import RatioLevel, SamplerCorrection, check_choice

MAX_LOG_RATIO = 20.0  # exp(20) is 5e8: far outside any clip range, and finite in float32


def masked(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Padding may hold anything, infinities too; here it becomes 0 in value and in gradient."""
    return values_BT.masked_fill(~mask_BT, 0.0)


def lengths(mask_BT: Tensor) -> Tensor:
    """Response tokens of each row [B, 1], at least 1."""
    return mask_BT.sum(1, keepdim=True).clamp(min=1)


def log_ratios(logps_BT: Tensor, old_logps_BT: Tensor, mask_BT: Tensor, level: RatioLevel = "token") -> Tensor:
    """Log importance ratios [B, T], clamped to +-20 and 0 outside the mask.

    "token": log pi(o_t) - log pi_old(o_t). "sequence": its mean over the response at every token (GSPO, the
    geometric mean). "response": its sum over the response at every token (the paper's pi(o|q) / pi_old(o|q)).
    """
    check_choice("ratio level", level, RatioLevel)
    mask_BT = mask_BT.bool()
    difference_BT = masked(logps_BT, mask_BT) - masked(old_logps_BT, mask_BT)
    if level != "token":
        total_B1 = difference_BT.sum(1, keepdim=True)
        if level == "sequence":
            total_B1 = total_B1 / lengths(mask_BT)
        difference_BT = masked(total_B1.expand_as(difference_BT), mask_BT)
    return difference_BT.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def ratios(logps_BT: Tensor, old_logps_BT: Tensor, mask_BT: Tensor, level: RatioLevel = "token") -> Tensor:
    """Importance ratios [B, T]: exp of `log_ratios`, 1 outside the mask."""
    return log_ratios(logps_BT, old_logps_BT, mask_BT, level).exp()


class Correction(NamedTuple):
    """Detached factors [B, T] of the policy terms, 1 outside the mask, and where the ratio was above the cap."""

    factors_BT: Tensor
    capped_BT: Tensor


@torch.no_grad()
def correct_sampler(
    old_logps_BT: Tensor,
    sampler_logps_BT: Tensor,
    mask_BT: Tensor,
    kind: SamplerCorrection,
    cap: float,
) -> Correction:
    """Factors for tokens that were drawn from the sampler's distribution but count as the trainer's.

    The ratio is pi_old(o_t) by the trainer / pi_old(o_t) by the sampler ("token_…"), or its product over the
    response, at every token ("sequence_…"). A ratio above `cap` becomes `cap` ("…_truncate") or 0 ("…_mask").

    Args:
        old_logps_BT: the trainer's log-probabilities of the tokens under the weights that sampled them.
        sampler_logps_BT: those that were noted while sampling, at the same temperature.
    """
    check_choice("sampler_correction", kind, SamplerCorrection)
    level, _, above = kind.partition("_")
    if kind == "none":
        return Correction(torch.ones_like(old_logps_BT), torch.zeros_like(old_logps_BT, dtype=torch.bool))
    ratio_BT = ratios(old_logps_BT, sampler_logps_BT, mask_BT, "token" if level == "token" else "response")
    capped_BT = ratio_BT > cap
    return Correction(ratio_BT.masked_fill(capped_BT, cap if above == "truncate" else 0.0), capped_BT)
