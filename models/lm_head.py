"""The LM head as losses: log-probabilities, entropy and cross-entropy without the matrix of logits.

A vocabulary of 152,064 makes the logits of 8,192 tokens 5 GB in float32, and their softmax as much again. Here the
product `hidden @ weight.T` is walked in tiles of [chunk of tokens, chunk of vocabulary]; each tile is folded into
three running numbers per token (maximum, sum of exponentials, sum of exponential times logit: the online
log-sum-exp), and the backward pass makes the tiles again. Products and sums are float32 (float64 for float64
input): rounding a tile to bfloat16 before it is summed biases training. A frozen weight costs no gradient product.

Used by SFT (`cross_entropy`) and by RL (`token_logprobs`) alike, so that the two cannot disagree.

Shapes: T tokens, D width, V vocabulary, C tokens of a chunk, W vocabulary rows of a chunk.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

TOKEN_CHUNK = 1024
VOCAB_CHUNK = 16384


class TokenLogprobs(NamedTuple):
    """Log-probability of each target and the entropy of its distribution, in nats, float32 (float64 for float64)."""

    logps_T: Tensor
    entropy_T: Tensor | None


def token_logprobs(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    *,
    temperature: float = 1.0,
    chunk_size: int = TOKEN_CHUNK,
    vocab_chunk_size: int = VOCAB_CHUNK,
    bias: Tensor | None = None,
    with_entropy: bool = True,
) -> TokenLogprobs:
    """log softmax(hidden @ weight.T + bias, over V, at `temperature`) of the targets, and its entropy.

    `hidden_TD[t]` is the last hidden state of the position BEFORE `targets_T[t]` (the caller shifts). Both results
    are differentiable in hidden, weight and bias; only those that require a gradient cost one. At most
    [chunk_size, vocab_chunk_size] logits exist at a time. T = 0 is allowed. ValueError on wrong shapes, on a
    temperature that is not positive and on targets outside [0, V).
    """
    _check_shapes(hidden_TD, weight_VD, targets_T, bias)
    if not temperature > 0:
        raise ValueError(f"The temperature must be positive, not {temperature}.")
    if chunk_size < 1 or vocab_chunk_size < 1:
        raise ValueError(f"Chunk sizes must be at least 1, not {chunk_size} and {vocab_chunk_size}.")
    if targets_T.numel() and (int(targets_T.min()) < 0 or int(targets_T.max()) >= weight_VD.shape[0]):
        raise ValueError(
            f"Targets must lie in [0, {weight_VD.shape[0]}), not in [{int(targets_T.min())}, {int(targets_T.max())}]; "
            "leave masked positions out before the call."
        )
    logps_T, entropy_T = _TokenLogprobs.apply(
        hidden_TD, weight_VD, bias, targets_T, temperature, chunk_size, vocab_chunk_size
    )
    return TokenLogprobs(logps_T, entropy_T if with_entropy else None)


def cross_entropy(
    hidden: Tensor,
    weight_VD: Tensor,
    labels: Tensor,
    ignore_index: int = -100,
    *,
    normalizer: Tensor | float | None = None,
    chunk_size: int = TOKEN_CHUNK,
    vocab_chunk_size: int = VOCAB_CHUNK,
    bias: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of next-token prediction, a scalar: the sum over supervised tokens divided by `normalizer`.

    `hidden` [..., D] and `labels` [...] are aligned: `labels[t]` is the token that `hidden[t]` predicts (the caller
    shifts). `normalizer` is the number of supervised tokens of the WHOLE optimisation batch, so that the sum over
    micro-batches does not depend on how they were cut; without one it is the number in this call. A batch without
    supervised tokens gives a 0 that can be back-propagated.
    """
    if hidden.shape[:-1] != labels.shape:
        raise ValueError(f"hidden {tuple(hidden.shape)} and labels {tuple(labels.shape)} do not belong together.")
    keep_T = (labels != ignore_index).reshape(-1).nonzero()[:, 0]
    result = token_logprobs(
        hidden.reshape(-1, hidden.shape[-1])[keep_T],
        weight_VD,
        labels.reshape(-1)[keep_T],
        chunk_size=chunk_size,
        vocab_chunk_size=vocab_chunk_size,
        bias=bias,
        with_entropy=False,
    )
    count = max(len(keep_T), 1) if normalizer is None else normalizer
    return -result.logps_T.sum() / count


def _check_shapes(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, bias: Tensor | None) -> None:
    if hidden_TD.dim() != 2 or weight_VD.dim() != 2 or hidden_TD.shape[1] != weight_VD.shape[1]:
        raise ValueError(
            f"hidden must be [T, D] and weight [V, D]; got {tuple(hidden_TD.shape)} and {tuple(weight_VD.shape)}."
        )
    if targets_T.shape != hidden_TD.shape[:1] or targets_T.is_floating_point():
        raise ValueError(f"targets must be {hidden_TD.shape[0]} integers, not {tuple(targets_T.shape)}.")
    if bias is not None and bias.shape != weight_VD.shape[:1]:
        raise ValueError(f"bias must be [{weight_VD.shape[0]}], not {tuple(bias.shape)}.")


def _spans(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def _matmul(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
    """a @ b accumulated and returned in `out_dtype`; half-precision inputs stay so on CUDA, where that is fast."""
    if a.dtype == out_dtype:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=out_dtype)
    return a.to(out_dtype) @ b.to(out_dtype)


class _Tiling(NamedTuple):
    """How the product is cut, and in what it is computed."""

    scale: float  # 1 / temperature
    dtype: torch.dtype
    chunk_size: int
    vocab_chunk_size: int


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TD, weight_VD, bias, targets_T, temperature, chunk_size, vocab_chunk_size):
        dtype = torch.promote_types(hidden_TD.dtype, torch.float32)
        ctx.tiling = _Tiling(1 / temperature, dtype, chunk_size, vocab_chunk_size)
        # autocast would round the float32 products below
        with torch.autocast(hidden_TD.device.type, enabled=False):
            lse_T, mean_T, picked_T = _fold(hidden_TD, weight_VD, bias, targets_T, ctx.tiling)
        ctx.save_for_backward(hidden_TD, weight_VD, bias, targets_T, lse_T, mean_T)
        ctx.set_materialize_grads(False)
        return picked_T - lse_T, lse_T - mean_T

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grad_outputs):  # pyright: ignore[reportIncompatibleMethodOverride]
        inputs = ctx.saved_tensors[:3]  # hidden, weight, bias
        buffers = [
            torch.zeros_like(value, dtype=ctx.tiling.dtype) if needed else None
            for value, needed in zip(inputs, ctx.needs_input_grad[:3], strict=True)
        ]
        if any(grad_T is not None for grad_T in grad_outputs):  # logps, entropy
            with torch.autocast(inputs[0].device.type, enabled=False):
                _unfold(ctx.saved_tensors, ctx.tiling, grad_outputs, buffers)
        cast = [None if grad is None else grad.to(value.dtype) for grad, value in zip(buffers, inputs, strict=True)]
        return (*cast, None, None, None, None)


def _tile_logits(hidden_CD: Tensor, tile_WD: Tensor, bias_W: Tensor | None, tiling: _Tiling) -> Tensor:
    """Logits [C, W] of one tile, divided by the temperature."""
    logits_CW = _matmul(hidden_CD, tile_WD.T, tiling.dtype)
    if bias_W is not None:
        logits_CW += bias_W
    return logits_CW.mul_(tiling.scale)


def _weight_tiles(
    hidden_TD: Tensor, weight_VD: Tensor, bias: Tensor | None, tiling: _Tiling
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Row span, weight and bias of each vocabulary chunk.

    The weight comes in the dtype of the product: hidden's own on CUDA, float32 on a CPU. Callers walk the vocabulary
    outside and the tokens inside, so that each tile is read (and on a CPU converted) once.
    """
    dtype = hidden_TD.dtype if hidden_TD.is_cuda else tiling.dtype
    for rows in _spans(len(weight_VD), tiling.vocab_chunk_size):
        yield rows, weight_VD[rows].to(dtype), None if bias is None else bias[rows].to(tiling.dtype)


def _locate(targets_C: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """Column of each target in a tile (clamped into it), and whether the target lies in the tile."""
    local_C = targets_C - rows.start
    width = rows.stop - rows.start
    return local_C.clamp(0, width - 1), (local_C >= 0) & (local_C < width)


def _fold(
    hidden_TD: Tensor, weight_VD: Tensor, bias: Tensor | None, targets_T: Tensor, tiling: _Tiling
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp, mean logit under the softmax, and the target's logit, each [T]; the forward pass."""
    top_T = hidden_TD.new_full((len(hidden_TD),), float("-inf"), dtype=tiling.dtype)
    total_T, weighted_T, picked_T = (torch.zeros_like(top_T) for _ in range(3))
    for rows, tile_WD, bias_W in _weight_tiles(hidden_TD, weight_VD, bias, tiling):
        for span in _spans(len(hidden_TD), tiling.chunk_size):
            logits_CW = _tile_logits(hidden_TD[span], tile_WD, bias_W, tiling)
            column_C, inside_C = _locate(targets_T[span], rows)
            found_C = logits_CW.gather(1, column_C[:, None])[:, 0]
            picked_T[span] = torch.where(inside_C, found_C, picked_T[span])
            new_top_C = torch.maximum(top_T[span], logits_CW.amax(1))
            # 0 at the first tile, where top is -inf
            shrink_C = torch.exp(top_T[span] - new_top_C)
            exps_CW = torch.exp(logits_CW - new_top_C[:, None])
            total_T[span] = total_T[span] * shrink_C + exps_CW.sum(1)
            weighted_T[span] = weighted_T[span] * shrink_C + exps_CW.mul_(logits_CW).sum(1)
            top_T[span] = new_top_C
    return top_T + total_T.log(), weighted_T / total_T, picked_T


def _unfold(
    saved: Sequence[Tensor],
    tiling: _Tiling,
    grad_outputs: Sequence[Tensor | None],
    buffers: Sequence[Tensor | None],
) -> None:
    """Make the tiles again and add to the gradient buffers (hidden, weight, bias) in place; the backward pass.

    With p = softmax(l): d logp / d l = onehot - p, and d entropy / d l = -p (l - E l).
    """
    hidden_TD, weight_VD, bias, targets_T, lse_T, mean_T = saved
    grad_logps_T, grad_entropy_T = grad_outputs
    grad_hidden_TD, grad_weight_VD, grad_bias_V = buffers
    for rows, tile_WD, bias_W in _weight_tiles(hidden_TD, weight_VD, bias, tiling):
        for span in _spans(len(hidden_TD), tiling.chunk_size):
            logits_CW = _tile_logits(hidden_TD[span], tile_WD, bias_W, tiling)
            probs_CW = torch.exp(logits_CW - lse_T[span, None])
            grad_CW = torch.zeros_like(probs_CW)
            if grad_entropy_T is not None:
                grad_CW -= probs_CW * (logits_CW - mean_T[span, None]) * grad_entropy_T[span, None]
            if grad_logps_T is not None:
                grad_CW -= probs_CW * grad_logps_T[span, None]
                column_C, inside_C = _locate(targets_T[span], rows)
                grad_CW.scatter_add_(1, column_C[:, None], (grad_logps_T[span] * inside_C)[:, None])
            grad_CW *= tiling.scale
            if grad_bias_V is not None:
                grad_bias_V[rows] += grad_CW.sum(0)
            grad_CW = grad_CW.to(tile_WD.dtype)
            if grad_hidden_TD is not None:
                grad_hidden_TD[span] += _matmul(grad_CW, tile_WD, tiling.dtype)
            if grad_weight_VD is not None:
                grad_weight_VD[rows] += _matmul(grad_CW.T, hidden_TD[span].to(tile_WD.dtype), tiling.dtype)
