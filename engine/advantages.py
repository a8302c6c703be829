"""Advantages of groups of completions, and the health of their rewards. Pure functions.

    A_pg = (r_pg - mean_g r) / (std_g r + eps)

Sources: GRPO (DeepSeekMath, arXiv 2402.03300); no scaling (Dr. GRPO, 2503.20783); scaling by the batch (Lite PPO,
2508.08221); normalise, then sum (GDPO, 2601.05242).

Shapes: P prompts, G samples of a group, R rewards, N all rewards that are there.
"""

import torch
from torch import Tensor

from .grpo_presets import Scale, check_choice

ADVANTAGE_EPS = 1e-4


def group_advantages(rewards_PG: Tensor, scale: Scale = "group", eps: float = ADVANTAGE_EPS) -> Tensor:
    """Advantages [P, G]: rewards minus their group's mean, divided by the standard deviation plus `eps`.

    The deviation (unbiased) is the group's own, that of all rewards of the batch, or left out ("none"; Dr. GRPO).
    NaN rewards are failures: they count in no mean and no deviation and get advantage 0. A group without variance,
    or with fewer than two rewards, gets exactly 0. For "batch", pass the rewards of all ranks.
    """
    check_choice("scale", scale, Scale)
    if rewards_PG.dim() != 2:
        raise ValueError(f"Rewards must be [P, G], not {tuple(rewards_PG.shape)}.")
    valid_PG = ~rewards_PG.isnan()
    known_PG = rewards_PG.masked_fill(~valid_PG, 0.0)
    mean_P1 = _masked_mean(known_PG, valid_PG)
    centred_PG = known_PG - mean_P1
    counts_PG = valid_PG & informative_groups(rewards_PG)[:, None]
    if scale == "none":
        return torch.where(counts_PG, centred_PG, 0.0)
    if scale == "group":
        squares_P1 = (centred_PG.square() * valid_PG).sum(1, keepdim=True)
        std = (squares_P1 / (valid_PG.sum(1, keepdim=True) - 1).clamp(min=1)).sqrt()
    else:
        values_N = rewards_PG[valid_PG]
        std = values_N.std() if values_N.numel() > 1 else rewards_PG.new_ones(())
    return torch.where(counts_PG, centred_PG / (std + eps), 0.0)


def informative_groups(rewards_PG: Tensor) -> Tensor:
    """Whether each group [P] has two different rewards, and so a gradient; compared exactly, without rounding."""
    valid_PG = ~rewards_PG.isnan()
    highest_P = rewards_PG.masked_fill(~valid_PG, float("-inf")).amax(1)
    lowest_P = rewards_PG.masked_fill(~valid_PG, float("inf")).amin(1)
    return highest_P > lowest_P


def decoupled_advantages(rewards_RPG: Tensor, weights: Tensor, eps: float = ADVANTAGE_EPS) -> Tensor:
    """GDPO, "normalize then sum": advantages [P, G] from R rewards of different scales.

    Each reward is normalised within its groups, then their weighted sum over the batch. NaN entries (a reward that
    does not apply or failed) add 0; a response whose rewards are all NaN gets advantage 0.

    Args:
        weights: of the rewards [R], or of every response [R, P, G].
    """
    if rewards_RPG.dim() != 3 or weights.shape not in (rewards_RPG.shape[:1], rewards_RPG.shape):
        raise ValueError(
            f"Rewards must be [R, P, G] with weights [R] or [R, P, G], not {tuple(rewards_RPG.shape)}, "
            f"{tuple(weights.shape)}."
        )
    normalized_RPG = torch.stack([group_advantages(rewards_PG, "group", eps) for rewards_PG in rewards_RPG])
    summed_PG = (weights.reshape(len(weights), *weights.shape[1:] or (1, 1)) * normalized_RPG).sum(0)
    values_N = summed_PG[~rewards_RPG.isnan().all(0)]
    std = values_N.std() if values_N.numel() > 1 else rewards_RPG.new_zeros(())
    # the batch's mean is 0 already, reward by reward and group by group
    return summed_PG / (std + eps)


def group_statistics(rewards_PG: Tensor) -> dict[str, float]:
    """Health of a batch of rewards: mean, mean deviation within groups, shares of flat groups and of failures."""
    valid_PG = ~rewards_PG.isnan()
    values_N = rewards_PG[valid_PG]
    stds = [row[keep].std().item() for row, keep in zip(rewards_PG, valid_PG, strict=True) if keep.sum() > 1]
    return {
        "reward": values_N.mean().item() if values_N.numel() else float("nan"),
        "reward_std": sum(stds) / len(stds) if stds else 0.0,
        "frac_reward_zero_std": 1.0 - informative_groups(rewards_PG).float().mean().item(),
        "frac_reward_missing": 1.0 - valid_PG.float().mean().item(),
    }


def _masked_mean(values_PG: Tensor, mask_PG: Tensor) -> Tensor:
    return (values_PG * mask_PG).sum(1, keepdim=True) / mask_PG.sum(1, keepdim=True).clamp(min=1)
