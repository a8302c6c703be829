"""The GRPO loss as pure functions: clipping, KL, aggregation. No state, no devices, no I/O.

    objective   min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A) - beta KL         `policy_loss`, `kl_estimate`

Advantages A are made in advantages.py, ratios in ratios.py; docs/grpo.md has the formulae of every option.

Losses are sums over the tokens of a micro-batch with weights that a `Normalizer` of the WHOLE optimisation batch
fixes, so the gradient does not depend on how that batch is cut into micro-batches, padded or spread over ranks: add
the micro-batch losses up; under DDP, which averages gradients, multiply by the number of ranks.

Sources: GRPO and its KL estimate (DeepSeekMath, arXiv 2402.03300), Dr. GRPO (2503.20783), DAPO (2503.14476),
CISPO (MiniMax-M1, 2506.13585), GSPO (2507.18071), two-sided clipping (INTELLECT-2, 2505.07291),
estimators k1, k2, k3 (Schulman, "Approximating KL divergence").

Shapes: B sequences of a micro-batch, T tokens of the padded responses.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from .grpo_presets import GrpoLossConfig, KlKind, LossType, RatioLevel, check_choice, check_clip, level_of
from .ratios import MAX_LOG_RATIO, correct_sampler, lengths, masked, ratios


class Normalizer(NamedTuple):
    """Size of the whole optimisation batch (all micro-batches, all ranks), which the token weights are made of.

    Both numbers are of what `without_truncated` has left; add those of micro-batches or ranks up.
    """

    num_sequences: Tensor | float
    num_tokens: Tensor | float
    max_length: int | None = None  # the longest response allowed; dr_grpo's constant

    @classmethod
    def of(cls, mask_BT: Tensor, max_length: int | None = None) -> "Normalizer":
        """The sizes of one batch, given the response mask of all of it. Rows without a token do not count."""
        return cls(_num_rows(mask_BT), mask_BT.sum(), max_length)


class Loss(NamedTuple):
    """A scalar loss and detached scalar metrics; see `merge_metrics` for how micro-batches combine."""

    loss: Tensor
    metrics: dict[str, Tensor]


# ---------------------------------------------------------------------------------------------------------------
# Clipping, KL


def clipped_surrogate(
    ratio_BT: Tensor, advantages_B: Tensor, *, clip_low: float, clip_high: float, delta: float | None = None
) -> Tensor:
    """-min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A) per token, [B, T].

    With `delta` the unclipped ratio is bounded by it, so that a bad response which became likely cannot give an
    unbounded loss (two-sided clipping).
    """
    check_clip(clip_low, clip_high, delta)
    advantages_B1 = advantages_B[:, None]
    free_BT = ratio_BT if delta is None else ratio_BT.clamp(max=delta)
    return -torch.minimum(free_BT * advantages_B1, ratio_BT.clamp(1 - clip_low, 1 + clip_high) * advantages_B1)


def kl_estimate(logps_BT: Tensor, ref_logps_BT: Tensor, kind: KlKind = "k3", ratio: Tensor | None = None) -> Tensor:
    """Estimate of KL(pi || pi_ref) from each sampled token; same shape as the input, in nats.

    With d = log pi - log pi_ref: k1 = d; k2 = d^2 / 2; k3 = exp(-d) - 1 + d, never negative. As a loss on policy,
    the gradient of k1 is 0 on average, that of k2 is the reverse KL's, that of k3 the FORWARD KL's. Multiplied by
    `ratio` = pi / pi_old (with its gradient), k1 and k3 give the reverse KL's gradient, off policy too.
    """
    check_choice("kl", kind, KlKind)
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
    check_choice("loss_type", loss_type, LossType)
    normalizer = normalizer or Normalizer.of(mask_BT)
    num_sequences = _at_least_one(normalizer.num_sequences)
    mask_BT = mask_BT.bool()
    if loss_type in ("grpo", "gspo"):
        return mask_BT / lengths(mask_BT) / num_sequences
    if loss_type == "dr_grpo":
        if normalizer.max_length is None:
            raise ValueError("dr_grpo divides by the longest response allowed; give Normalizer a max_length.")
        return mask_BT / (num_sequences * normalizer.max_length)
    if loss_type == "bnpo":
        share = _num_rows(mask_BT) / num_sequences
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
    factors_BT: Tensor | None = None,
) -> Loss:
    """The clipped policy objective, negated, as a weighted sum over the tokens of a micro-batch.

    `logps_BT` (with gradient) and `old_logps_BT` are log-probabilities of the sampled tokens, both at the sampling
    temperature; `mask_BT` is 1 on response tokens. cispo clips the ratio's weight from above only and keeps every
    token's gradient. Ratio level "response" gives one clipped term a response, weighted alike for any length.
    `factors_BT` (from `correct_sampler`) multiply the tokens' terms, after clipping.
    """
    level = level_of(loss_type, ratio_level)
    mask_BT = mask_BT.bool()
    normalizer = normalizer or Normalizer.of(mask_BT)
    ratio_BT = ratios(logps_BT, old_logps_BT, mask_BT, level)
    if loss_type == "cispo":
        weight_BT = ratio_BT.detach().clamp(max=1 + clip_high)
        losses_BT = -weight_BT * advantages_B[:, None] * masked(logps_BT, mask_BT)
    else:
        losses_BT = clipped_surrogate(ratio_BT, advantages_B, clip_low=clip_low, clip_high=clip_high, delta=delta)
    if factors_BT is not None:
        losses_BT = losses_BT * factors_BT
    loss = (losses_BT * token_weights(mask_BT, loss_type, normalizer)).sum()

    clipped = _clipped_tokens(ratio_BT, advantages_B[:, None], loss_type, clip_low, clip_high, delta)
    gap_BT = (masked(logps_BT.detach(), mask_BT) - masked(old_logps_BT, mask_BT)).abs()
    metrics = {
        "policy_loss": loss.detach(),
        **_spread("ratio", ratio_BT.detach(), mask_BT, normalizer),
        **{f"clip/{name}": _share(where_BT, mask_BT, normalizer) for name, where_BT in clipped.items()},
        "logp_diff/mean": _share(gap_BT, mask_BT, normalizer),
        "logp_diff/max": gap_BT.max(),
    }
    return Loss(loss, metrics)


def _clipped_tokens(
    ratio_BT: Tensor,
    advantages_B1: Tensor,
    loss_type: LossType,
    clip_low: float,
    clip_high: float,
    delta: float | None,
) -> dict[str, Tensor]:
    """Tokens that a bound takes the gradient from, by bound; with cispo those whose weight it lowers."""
    rising_B1, falling_B1 = advantages_B1 > 0, advantages_B1 < 0
    if loss_type == "cispo":
        high_BT = ratio_BT > 1 + clip_high
        return {"low": torch.zeros_like(high_BT), "high": high_BT, "region": high_BT}
    clipped = {
        "low": (ratio_BT < 1 - clip_low) & falling_B1,
        "high": (ratio_BT > 1 + clip_high) & rising_B1,
    }
    clipped["region"] = clipped["low"] | clipped["high"]
    if delta is not None:
        clipped["delta"] = (ratio_BT > delta) & falling_B1
    return clipped


def kl_loss(
    logps_BT: Tensor,
    old_logps_BT: Tensor,
    ref_logps_BT: Tensor,
    mask_BT: Tensor,
    config: GrpoLossConfig,
    normalizer: Normalizer,
) -> Loss:
    """beta times the KL to the reference policy; with beta 0 a zero, and the KL is only reported.

    The KL of a token weighs like its policy term; at ratio level "response" the KL of a response is the sum over its
    tokens, so that both are about whole responses.
    """
    token_ratio = ratios(logps_BT, old_logps_BT, mask_BT) if config.kl_ratio else None
    kl_BT = kl_estimate(masked(logps_BT, mask_BT), masked(ref_logps_BT, mask_BT), config.kl, token_ratio)
    metrics = {"kl": _share(kl_BT.detach(), mask_BT, normalizer)}
    if config.beta == 0:
        return Loss(logps_BT.new_zeros(()), metrics)
    weights_BT = token_weights(mask_BT, config.loss_type, normalizer)
    if config.ratio_level == "response":
        weights_BT = weights_BT * lengths(mask_BT)
    loss = config.beta * (kl_BT * weights_BT).sum()
    return Loss(loss, metrics | {"kl_loss": loss.detach()})


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
    sampler_logps_BT: Tensor | None = None,
) -> Loss:
    """The whole loss of a micro-batch: clipped policy objective plus beta times the KL to the reference policy.

    `old_logps_BT` None means on policy (the ratio is 1, with gradient). `ref_logps_BT` may be None where beta is 0.
    `entropy_BT` is only reported, and so is the distance to `sampler_logps_BT` (the log-probabilities noted while
    sampling), unless `config.sampler_correction` weights the policy terms by it. Completions that
    `config.mask_truncated` leaves out the caller leaves out, here and in `normalizer`, or masks altogether.
    """
    others = {"old_logps": old_logps_BT, "ref_logps": ref_logps_BT, "sampler_logps": sampler_logps_BT, "mask": mask_BT}
    _check_batch(logps_BT, advantages_B, others, config)
    mask_BT = mask_BT.bool()
    normalizer = normalizer or Normalizer.of(mask_BT)
    old_logps_BT = logps_BT.detach() if old_logps_BT is None else old_logps_BT
    factors_BT, metrics = None, {}
    if sampler_logps_BT is not None:
        factors_BT, metrics = _sampler_factors(old_logps_BT, sampler_logps_BT, mask_BT, config, normalizer)
    loss, policy_metrics = policy_loss(
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
        factors_BT=factors_BT,
    )
    metrics |= policy_metrics
    if ref_logps_BT is not None:
        kl, kl_metrics = kl_loss(logps_BT, old_logps_BT, ref_logps_BT, mask_BT, config, normalizer)
        loss, metrics = loss + kl, metrics | kl_metrics
    if entropy_BT is not None:
        metrics["entropy"] = _share(masked(entropy_BT.detach(), mask_BT), mask_BT, normalizer)
    metrics["loss"] = loss.detach()
    return Loss(loss, metrics)


@torch.no_grad()
def _sampler_factors(
    old_logps_BT: Tensor, sampler_logps_BT: Tensor, mask_BT: Tensor, config: GrpoLossConfig, normalizer: Normalizer
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """Factors of the tokens' terms, None where nothing is corrected, and how far sampler and trainer are apart."""
    gap_BT = (masked(old_logps_BT, mask_BT) - masked(sampler_logps_BT, mask_BT)).abs()
    metrics = {"mismatch/mean": _share(gap_BT, mask_BT, normalizer), "mismatch/max": gap_BT.max()}
    if config.sampler_correction == "none":
        return None, metrics
    kind, cap = config.sampler_correction, config.sampler_cap
    factors_BT, capped_BT = correct_sampler(old_logps_BT, sampler_logps_BT, mask_BT, kind, cap)
    metrics |= _spread("correction", factors_BT, mask_BT, normalizer)
    return factors_BT, metrics | {"correction/capped": _share(capped_BT, mask_BT, normalizer)}


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


def _at_least_one(count: Tensor | float) -> Tensor | float:
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)


def _num_rows(mask_BT: Tensor) -> Tensor:
    return mask_BT.bool().any(1).sum()


def _share(values_BT: Tensor, mask_BT: Tensor, normalizer: Normalizer) -> Tensor:
    """This micro-batch's part of a mean over all response tokens of the batch."""
    return (values_BT * mask_BT).sum() / _at_least_one(normalizer.num_tokens)


def _spread(name: str, values_BT: Tensor, mask_BT: Tensor, normalizer: Normalizer) -> dict[str, Tensor]:
    """Mean, least and greatest value over response tokens; padding, and a batch without any, counts as 1."""
    values_BT = values_BT.masked_fill(~mask_BT, 1.0)
    mean = _share(values_BT, mask_BT, normalizer)
    return {f"{name}/mean": mean, f"{name}/min": values_BT.min(), f"{name}/max": values_BT.max()}


def _check_batch(
    logps_BT: Tensor, advantages_B: Tensor, others: dict[str, Tensor | None], config: GrpoLossConfig
) -> None:
    for name, value in others.items():
        if value is not None and value.shape != logps_BT.shape:
            raise ValueError(f"{name} must have logps' shape {tuple(logps_BT.shape)}, not {tuple(value.shape)}.")
    if advantages_B.shape != logps_BT.shape[:1]:
        raise ValueError(f"There must be {logps_BT.shape[0]} advantages, not {tuple(advantages_B.shape)}.")
    if config.beta > 0 and others["ref_logps"] is None:
        raise ValueError(f"beta is {config.beta}, so the reference policy's log-probabilities are needed.")
    if config.sampler_correction != "none" and others["sampler_logps"] is None:
        raise ValueError(f"sampler_correction is {config.sampler_correction}, so the sampler's log-probs are needed.")
