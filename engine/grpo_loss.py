"""GRPO as pure functions: group advantages, ratios, clipping, KL, aggregation. No state, no devices, no I/O.

    advantage   A_pg = (r_pg - mean_g r) / (std_g r + eps)                                  `group_advantages`
    objective   min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A) - beta KL         `policy_loss`, `kl_estimate`

Losses are sums over the tokens of a micro-batch with weights that a `Normalizer` of the WHOLE optimisation batch
fixes, so the gradient does not depend on how that batch is cut into micro-batches, padded or spread over ranks: add
the micro-batch losses up; under DDP, which averages gradients, multiply by the number of ranks.

Sources: GRPO and its KL estimate (DeepSeekMath, arXiv 2402.03300), Dr. GRPO (2503.20783), DAPO (2503.14476),
CISPO (MiniMax-M1, 2506.13585), GSPO (2507.18071), two-sided clipping (INTELLECT-2, 2505.07291), GDPO (2601.05242),
estimators k1, k2, k3 (Schulman, "Approximating KL divergence").

Shapes: P prompts, G samples of a group, R rewards, B sequences of a micro-batch, T tokens of the padded responses.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

LossType = Literal["grpo", "dr_grpo", "dapo", "bnpo", "cispo", "gspo"]
RatioLevel = Literal["token", "sequence", "response"]
KlKind = Literal["k1", "k2", "k3"]
Scale = Literal["group", "batch", "none"]

MAX_LOG_RATIO = 20.0  # exp(20) is 5e8: far outside any clip range, and finite in float32
ADVANTAGE_EPS = 1e-4


def _level_of(loss_type: LossType, ratio_level: RatioLevel) -> RatioLevel:
    _check_choice("loss_type", loss_type, LossType)
    _check_choice("ratio_level", ratio_level, RatioLevel)
    if ratio_level == "response" and loss_type != "grpo":
        raise ValueError(
            f'ratio_level "response" is one term a response; use it with loss_type grpo, not {loss_type}.'
        )
    return "sequence" if loss_type == "gspo" else ratio_level


def _check_choice(name: str, value: str, choices: object) -> None:
    if value not in get_args(choices):
        raise ValueError(f"Unknown {name} {value!r}; choose one of {', '.join(get_args(choices))}.")


def _check_clip(clip_low: float, clip_high: float, delta: float | None) -> None:
    if not 0 <= clip_low < 1 or clip_high < 0:
        raise ValueError(f"Clip ranges must be 0 <= clip_low < 1 and clip_high >= 0, not {clip_low} and {clip_high}.")
    if delta is not None and delta <= 1 + clip_high:
        raise ValueError(f"delta must lie above 1 + clip_high = {1 + clip_high}, not at {delta}.")


@dataclass(frozen=True)
class GrpoLossConfig:
    """Everything that `grpo_loss` needs to know; `PAPER` and `RECOMMENDED` are the presets."""

    loss_type: LossType = "grpo"
    ratio_level: RatioLevel = "token"
    clip_low: float = 0.2
    clip_high: float = 0.2
    delta: float | None = None  # upper bound of the ratio where the advantage is negative
    beta: float = 0.02
    kl: KlKind = "k3"
    # multiply the KL estimate by the token ratio: unbiased off policy, and with k3 (or k1) the gradient of the
    # REVERSE KL, which is what the objective names; plain k3 descends the forward KL
    kl_ratio: bool = False
    scale: Scale = "group"

    def __post_init__(self):
        _check_choice("loss_type", self.loss_type, LossType)
        _check_choice("ratio_level", self.ratio_level, RatioLevel)
        _check_choice("kl", self.kl, KlKind)
        _check_choice("scale", self.scale, Scale)
        _check_clip(self.clip_low, self.clip_high, self.delta)
        _level_of(self.loss_type, self.ratio_level)
        if self.beta < 0:
            raise ValueError(f"beta must not be negative, not {self.beta}.")


# The paper: ratio of whole responses, KL to the SFT policy with beta 0.02; the clip range 0.2 is our filling.
PAPER = GrpoLossConfig(ratio_level="response")
# Token mean over the batch, wider upper clip range, reverse-KL gradient.
RECOMMENDED = GrpoLossConfig(loss_type="dapo", clip_high=0.28, kl_ratio=True)


class Normalizer(NamedTuple):
    """Size of the whole optimisation batch (all micro-batches, all ranks), which the token weights are made of."""

    num_sequences: Tensor | float
    num_tokens: Tensor | float
    max_length: int | None = None  # the longest response allowed; dr_grpo's constant

    @classmethod
    def of(cls, mask_BT: Tensor, max_length: int | None = None) -> "Normalizer":
        """The sizes of one batch, given the response mask of all of it."""
        return cls(mask_BT.shape[0], mask_BT.sum(), max_length)


class Loss(NamedTuple):
    """A scalar loss and detached scalar metrics; see `merge_metrics` for how micro-batches combine."""

    loss: Tensor
    metrics: dict[str, Tensor]


# ---------------------------------------------------------------------------------------------------------------
# Advantages


def group_advantages(rewards_PG: Tensor, scale: Scale = "group", eps: float = ADVANTAGE_EPS) -> Tensor:
    """Advantages [P, G]: rewards minus their group's mean, divided by the standard deviation plus `eps`.

    The deviation (unbiased) is the group's own, that of all rewards of the batch, or left out ("none"; Dr. GRPO).
    NaN rewards are failures: they count in no mean and no deviation and get advantage 0. A group without variance,
    or with fewer than two rewards, gets exactly 0. For "batch", pass the rewards of all ranks.
    """
    _check_choice("scale", scale, Scale)
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


def decoupled_advantages(rewards_RPG: Tensor, weights_R: Tensor, eps: float = ADVANTAGE_EPS) -> Tensor:
    """GDPO, "normalize then sum": advantages [P, G] from R rewards of different scales.

    Each reward is normalised within its groups, then their weighted sum over the batch. NaN entries (a reward that
    does not apply or failed) add 0; a response whose rewards are all NaN gets advantage 0.
    """
    if rewards_RPG.dim() != 3 or weights_R.shape != rewards_RPG.shape[:1]:
        raise ValueError(
            f"Rewards must be [R, P, G] with weights [R], not {tuple(rewards_RPG.shape)}, {tuple(weights_R.shape)}."
        )
    normalized_RPG = torch.stack([group_advantages(rewards_PG, "group", eps) for rewards_PG in rewards_RPG])
    summed_PG = (weights_R[:, None, None] * normalized_RPG).sum(0)
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


# ---------------------------------------------------------------------------------------------------------------
# Ratios, clipping, KL


def log_ratios(logps_BT: Tensor, old_logps_BT: Tensor, mask_BT: Tensor, level: RatioLevel = "token") -> Tensor:
    """Log importance ratios [B, T], clamped to +-20 and 0 outside the mask.

    "token": log pi(o_t) - log pi_old(o_t). "sequence": its mean over the response at every token (GSPO, the
    geometric mean). "response": its sum over the response at every token (the paper's pi(o|q) / pi_old(o|q)).
    """
    _check_choice("ratio level", level, RatioLevel)
    mask_BT = mask_BT.bool()
    difference_BT = _masked(logps_BT, mask_BT) - _masked(old_logps_BT, mask_BT)
    if level != "token":
        total_B1 = difference_BT.sum(1, keepdim=True)
        if level == "sequence":
            total_B1 = total_B1 / _lengths(mask_BT)
        difference_BT = _masked(total_B1.expand_as(difference_BT), mask_BT)
    return difference_BT.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def ratios(logps_BT: Tensor, old_logps_BT: Tensor, mask_BT: Tensor, level: RatioLevel = "token") -> Tensor:
    """Importance ratios [B, T]: exp of `log_ratios`, 1 outside the mask."""
    return log_ratios(logps_BT, old_logps_BT, mask_BT, level).exp()


def clipped_surrogate(
    ratio_BT: Tensor, advantages_B: Tensor, *, clip_low: float, clip_high: float, delta: float | None = None
) -> Tensor:
    """-min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A) per token, [B, T].

    With `delta` the unclipped ratio is bounded by it, so that a bad response which became likely cannot give an
    unbounded loss (two-sided clipping).
    """
    _check_clip(clip_low, clip_high, delta)
    advantages_B1 = advantages_B[:, None]
    free_BT = ratio_BT if delta is None else ratio_BT.clamp(max=delta)
    return -torch.minimum(free_BT * advantages_B1, ratio_BT.clamp(1 - clip_low, 1 + clip_high) * advantages_B1)


def kl_estimate(logps_BT: Tensor, ref_logps_BT: Tensor, kind: KlKind = "k3", ratio: Tensor | None = None) -> Tensor:
    """Estimate of KL(pi || pi_ref) from each sampled token; same shape as the input, in nats.

    With d = log pi - log pi_ref: k1 = d; k2 = d^2 / 2; k3 = exp(-d) - 1 + d, never negative. As a loss on policy,
    the gradient of k1 is 0 on average, that of k2 is the reverse KL's, that of k3 the FORWARD KL's. Multiplied by
    `ratio` = pi / pi_old (with its gradient), k1 and k3 give the reverse KL's gradient, off policy too.
    """
    _check_choice("kl", kind, KlKind)
    difference_BT = (logps_BT - ref_logps_BT).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if kind == "k1":
        kl_BT = difference_BT
    elif kind == "k2":
        kl_BT = difference_BT.square() / 2
    else:
        kl_BT = torch.expm1(-difference_BT) + difference_BT
    return kl_BT if ratio is None else kl_BT * ratio


# ---------------------------------------------------------------------------------------------------------------
# Aggregation


def token_weights(mask_BT: Tensor, loss_type: LossType, normalizer: Normalizer | None = None) -> Tensor:
    """Weight [B, T] of each token's loss; 0 outside the mask. `normalizer` defaults to this batch alone.

    grpo, gspo: the mean over a response's tokens, then over sequences.
    dr_grpo: 1 / (sequences * max_length). dapo, cispo: 1 / tokens of the whole batch. bnpo: the token mean of THIS
    micro-batch, times its share of the sequences; the one type whose result depends on the cut, by its definition.
    """
    _check_choice("loss_type", loss_type, LossType)
    normalizer = normalizer or Normalizer.of(mask_BT)
    mask_BT = mask_BT.bool()
    if loss_type in ("grpo", "gspo"):
        return mask_BT / _lengths(mask_BT) / normalizer.num_sequences
    if loss_type == "dr_grpo":
        if normalizer.max_length is None:
            raise ValueError("dr_grpo divides by the longest response allowed; give Normalizer a max_length.")
        return mask_BT / (normalizer.num_sequences * normalizer.max_length)
    if loss_type == "bnpo":
        share = mask_BT.shape[0] / normalizer.num_sequences
        return mask_BT * share / mask_BT.sum().clamp(min=1)
    return mask_BT / _at_least_one(normalizer.num_tokens)


def policy_loss(
    logps_BT: Tensor,
    old_logps_BT: Tensor,
    advantages_B: Tensor,
    mask_BT: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    delta: float | None = None,
    loss_type: LossType = "grpo",
    ratio_level: RatioLevel = "token",
    normalizer: Normalizer | None = None,
) -> Loss:
    """The clipped policy objective, negated, as a weighted sum over the tokens of a micro-batch.

    `logps_BT` (with gradient) and `old_logps_BT` are log-probabilities of the sampled tokens, both at the sampling
    temperature; `mask_BT` is 1 on response tokens. cispo clips the ratio's weight from above only and keeps every
    token's gradient. Ratio level "response" gives one clipped term a response, weighted alike for any length.
    """
    level = _level_of(loss_type, ratio_level)
    mask_BT = mask_BT.bool()
    normalizer = normalizer or Normalizer.of(mask_BT)
    ratio_BT = ratios(logps_BT, old_logps_BT, mask_BT, level)
    if loss_type == "cispo":
        weight_BT = ratio_BT.detach().clamp(max=1 + clip_high)
        losses_BT = -weight_BT * advantages_B[:, None] * _masked(logps_BT, mask_BT)
    else:
        losses_BT = clipped_surrogate(ratio_BT, advantages_B, clip_low=clip_low, clip_high=clip_high, delta=delta)
    loss = (losses_BT * token_weights(mask_BT, loss_type, normalizer)).sum()

    with torch.no_grad():
        gap_BT = (_masked(logps_BT, mask_BT) - _masked(old_logps_BT, mask_BT)).abs()
        low_BT = (ratio_BT < 1 - clip_low) & (advantages_B[:, None] < 0) & (loss_type != "cispo")
        high_BT = (ratio_BT > 1 + clip_high) & ((advantages_B[:, None] > 0) | (loss_type == "cispo"))
        metrics = {
            "policy_loss": loss.detach(),
            "ratio/mean": _share(ratio_BT, mask_BT, normalizer),
            "ratio/min": ratio_BT.min(),
            "ratio/max": ratio_BT.max(),
            "clip/low": _share(low_BT, mask_BT, normalizer),
            "clip/high": _share(high_BT, mask_BT, normalizer),
            "logp_diff/mean": _share(gap_BT, mask_BT, normalizer),
            "logp_diff/max": gap_BT.max(),
        }
        if delta is not None:
            beyond_BT = (ratio_BT > delta) & (advantages_B[:, None] < 0)
            metrics["clip/delta"] = _share(beyond_BT, mask_BT, normalizer)
    return Loss(loss, metrics)


def grpo_loss(
    logps_BT: Tensor,
    old_logps_BT: Tensor | None,
    ref_logps_BT: Tensor | None,
    advantages_B: Tensor,
    mask_BT: Tensor,
    config: GrpoLossConfig,
    *,
    normalizer: Normalizer | None = None,
    entropy_BT: Tensor | None = None,
) -> Loss:
    """The whole loss of a micro-batch: clipped policy objective plus beta times the KL to the reference policy.

    `old_logps_BT` None means on policy (the ratio is 1, with gradient). `ref_logps_BT` may be None where beta is 0.
    `entropy_BT` is only reported. The KL of a token weighs like its policy term; at ratio level "response" the KL of
    a response is the sum over its tokens, so that both are about whole responses.
    """
    _check_batch(logps_BT, old_logps_BT, ref_logps_BT, advantages_B, mask_BT)
    mask_BT = mask_BT.bool()
    normalizer = normalizer or Normalizer.of(mask_BT)
    old_logps_BT = logps_BT.detach() if old_logps_BT is None else old_logps_BT
    loss, metrics = policy_loss(
        logps_BT,
        old_logps_BT,
        advantages_B,
        mask_BT,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        delta=config.delta,
        loss_type=config.loss_type,
        ratio_level=config.ratio_level,
        normalizer=normalizer,
    )
    if ref_logps_BT is not None:
        token_ratio = ratios(logps_BT, old_logps_BT, mask_BT) if config.kl_ratio else None
        kl_BT = kl_estimate(_masked(logps_BT, mask_BT), _masked(ref_logps_BT, mask_BT), config.kl, token_ratio)
        metrics["kl"] = _share(kl_BT.detach(), mask_BT, normalizer)
        if config.beta > 0:
            weights_BT = token_weights(mask_BT, config.loss_type, normalizer)
            if config.ratio_level == "response":
                weights_BT = weights_BT * _lengths(mask_BT)
            kl_loss = config.beta * (kl_BT * weights_BT).sum()
            loss = loss + kl_loss
            metrics["kl_loss"] = kl_loss.detach()
    elif config.beta > 0:
        raise ValueError(f"beta is {config.beta}, so the reference policy's log-probabilities are needed.")
    if entropy_BT is not None:
        metrics["entropy"] = _share(_masked(entropy_BT.detach(), mask_BT), mask_BT, normalizer)
    metrics["loss"] = loss.detach()
    return Loss(loss, metrics)


def merge_metrics(parts: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Metrics of a batch from those of its micro-batches: "/max" and "/min" by extreme, all else by sum."""
    merged: dict[str, Tensor] = {}
    for part in parts:
        for name, value in part.items():
            if name not in merged:
                merged[name] = value
            elif name.endswith("/max"):
                merged[name] = torch.maximum(merged[name], value)
            elif name.endswith("/min"):
                merged[name] = torch.minimum(merged[name], value)
            else:
                merged[name] = merged[name] + value
    return merged


# ---------------------------------------------------------------------------------------------------------------
# Small pieces


def _masked(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Padding may hold anything, infinities too; here it becomes 0 in value and in gradient."""
    return values_BT.masked_fill(~mask_BT, 0.0)


def _lengths(mask_BT: Tensor) -> Tensor:
    return mask_BT.sum(1, keepdim=True).clamp(min=1)


def _masked_mean(values_PG: Tensor, mask_PG: Tensor) -> Tensor:
    return (values_PG * mask_PG).sum(1, keepdim=True) / mask_PG.sum(1, keepdim=True).clamp(min=1)


def _at_least_one(count: Tensor | float) -> Tensor | float:
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)


def _share(values_BT: Tensor, mask_BT: Tensor, normalizer: Normalizer) -> Tensor:
    """This micro-batch's part of a mean over all response tokens of the batch."""
    return (values_BT * mask_BT).sum() / _at_least_one(normalizer.num_tokens)


def _check_batch(
    logps_BT: Tensor, old_logps_BT: Tensor | None, ref_logps_BT: Tensor | None, advantages_B: Tensor, mask_BT: Tensor
) -> None:
    for name, value in (("old_logps", old_logps_BT), ("ref_logps", ref_logps_BT), ("mask", mask_BT)):
        if value is not None and value.shape != logps_BT.shape:
            raise ValueError(f"{name} must have logps' shape {tuple(logps_BT.shape)}, not {tuple(value.shape)}.")
    if advantages_B.shape != logps_BT.shape[:1]:
        raise ValueError(f"There must be {logps_BT.shape[0]} advantages, not {tuple(advantages_B.shape)}.")
