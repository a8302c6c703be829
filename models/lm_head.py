"""The LM head as losses: log-probabilities, entropy and cross-entropy without the matrix of logits.

A vocabulary of 152,064 makes the logits of 8,192 tokens 5 GB in float32, and their softmax as much again. Here the
product `hidden @ weight.T` is walked in tiles of [chunk of tokens, chunk of vocabulary]; each tile is folded into
three running numbers per token (maximum, sum of exponentials, sum of exponential times logit: the online
log-sum-exp), and the backward pass makes the tiles again. Products and sums are float32 (float64 for float64
input): rounding a tile to bfloat16 before it is summed biases training. A frozen weight costs no gradient product.

A sum of losses knows its gradient but for one factor. `cross_entropy` therefore takes chunks of tokens with the whole
vocabulary, and makes the gradient of a chunk while its logits are there: two products where three would be needed.

Used by SFT (`cross_entropy`) and by RL (`token_logprobs`) alike, so that the two cannot disagree. On a GPU the passes
over a tile are the Triton kernels of `lm_head_triton.py`, elsewhere those of `lm_head_torch.py`; the products are the
same. The environment variable THREEDR1_LM_HEAD chooses: `torch` takes the plain passes everywhere, `triton` the
kernels, on a CPU too (for Triton's interpreter). float64 always takes the plain ones.

Shapes: T tokens, D width, V vocabulary, C tokens of a chunk, W vocabulary rows of a chunk; a state [4, C] is top (the
maximum), total (sum of exp(logit - top)), weighted (sum of exp(logit - top) * logit) and picked (the target's logit).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..utils.kernels import takes_triton
from . import lm_head_torch

VARIABLE = "THREEDR1_LM_HEAD"
# tokens and vocabulary rows of a tile. The GPU's is large for the sake of the products: 4096 x 16896 are 16 rounds of
# 128 x 256 on the 132 processors of an H100, and 9 of them cover 152,064. Tiles that fit the L2 cache would save one
# read of the logits, 1.5 ms of some 14 for 8,192 tokens, and lose as much in the products.
CPU_TILE, GPU_TILE = (1024, 16384), (4096, 16896)
# tokens that `cross_entropy` takes at a time, with all their logits; on a GPU as many more as a vocabulary is smaller
CPU_LOSS_CHUNK, GPU_LOSS_CHUNK, _GPU_LOSS_LOGITS = 256, 1024, 1024 * 152_064


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
    chunk_size: int | None = None,
    vocab_chunk_size: int | None = None,
    bias: Tensor | None = None,
    with_entropy: bool = True,
) -> TokenLogprobs:
    """log softmax(hidden @ weight.T + bias, over V, at `temperature`) of the targets, and its entropy.

    `hidden_TD[t]` is the last hidden state of the position BEFORE `targets_T[t]` (the caller shifts). Both results
    are differentiable in hidden, weight and bias; only those that require a gradient cost one. At most
    [chunk_size, vocab_chunk_size] logits exist at a time (default: CPU_TILE or GPU_TILE). T = 0 is allowed.

    ValueError on wrong shapes, on a temperature that is not positive and, on a CPU, on targets outside [0, V). A GPU
    is not waited for to look at the targets: there the results of such a token, and the gradients, are NaN.
    """
    if not temperature > 0:
        raise ValueError(f"The temperature must be positive, not {temperature}.")
    _check(hidden_TD, weight_VD, targets_T, bias)
    tokens, rows = GPU_TILE if hidden_TD.is_cuda else CPU_TILE
    tokens = tokens if chunk_size is None else chunk_size
    rows = rows if vocab_chunk_size is None else vocab_chunk_size
    tiling = _tiling(hidden_TD, 1 / temperature, tokens, rows)
    logps_T, entropy_T = _TokenLogprobs.apply(hidden_TD, weight_VD, bias, targets_T.contiguous(), tiling)
    return TokenLogprobs(logps_T, entropy_T if with_entropy else None)


def cross_entropy(
    hidden: Tensor,
    weight_VD: Tensor,
    labels: Tensor,
    ignore_index: int | None = -100,
    *,
    normalizer: Tensor | float | None = None,
    chunk_size: int | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of next-token prediction, a scalar: the sum over supervised tokens divided by `normalizer`.

    `hidden` [..., D] and `labels` [...] are aligned: `labels[t]` is the token that `hidden[t]` predicts (the caller
    shifts). `normalizer` is the number of supervised tokens of the WHOLE optimisation batch, so that the sum over
    micro-batches does not depend on how they were cut; without one it is the number in this call. A batch without
    supervised tokens gives a 0 that can be back-propagated.

    Counting supervised tokens waits for a GPU; with `ignore_index` None all are, and nothing does. Where a gradient
    is wanted, it is made here, and [chunk_size, V] logits exist at a time (default: CPU_LOSS_CHUNK or, on a GPU,
    GPU_LOSS_CHUNK tokens, more where V is below 152,064). ValueErrors are those of `token_logprobs`.
    """
    if hidden.shape[:-1] != labels.shape:
        raise ValueError(f"hidden {tuple(hidden.shape)} and labels {tuple(labels.shape)} do not belong together.")
    hidden_TD, targets_T = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    if ignore_index is not None:
        keep_T = (targets_T != ignore_index).nonzero()[:, 0]
        hidden_TD, targets_T = hidden_TD[keep_T], targets_T[keep_T]
    count = max(len(targets_T), 1) if normalizer is None else normalizer
    return summed_loss(hidden_TD, weight_VD, targets_T, chunk_size=chunk_size, bias=bias)[0] / count


def summed_loss(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    *,
    chunk_size: int | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The sum of cross-entropies, as `cross_entropy` makes it, and each token's own [T], which has no gradient.

    Both are there at once: nothing is computed or waited for besides. Without gradients the logits come in tiles.
    """
    inputs = [value for value in (hidden_TD, weight_VD, bias) if value is not None]
    if not (torch.is_grad_enabled() and any(value.requires_grad for value in inputs)):
        found = token_logprobs(hidden_TD, weight_VD, targets_T, chunk_size=chunk_size, bias=bias, with_entropy=False)
        return -found.logps_T.sum(), -found.logps_T
    _check(hidden_TD, weight_VD, targets_T, bias)
    if chunk_size is None:
        chunk_size = CPU_LOSS_CHUNK
        if hidden_TD.is_cuda:
            chunk_size = max(GPU_LOSS_CHUNK, _GPU_LOSS_LOGITS // len(weight_VD))
    tiling = _tiling(hidden_TD, 1.0, chunk_size, len(weight_VD))
    return _SummedLoss.apply(hidden_TD, weight_VD, bias, targets_T.contiguous(), tiling)


def _check(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, bias: Tensor | None) -> None:
    if hidden_TD.dim() != 2 or weight_VD.dim() != 2 or hidden_TD.shape[1] != weight_VD.shape[1]:
        raise ValueError(
            f"hidden must be [T, D] and weight [V, D]; got {tuple(hidden_TD.shape)} and {tuple(weight_VD.shape)}."
        )
    if targets_T.shape != hidden_TD.shape[:1] or targets_T.is_floating_point():
        raise ValueError(f"targets must be {hidden_TD.shape[0]} integers, not {tuple(targets_T.shape)}.")
    if bias is not None and bias.shape != weight_VD.shape[:1]:
        raise ValueError(f"bias must be [{weight_VD.shape[0]}], not {tuple(bias.shape)}.")
    if targets_T.is_cpu and len(targets_T):
        low, high = int(targets_T.min()), int(targets_T.max())
        if low < 0 or high >= len(weight_VD):
            raise ValueError(
                f"Targets must lie in [0, {len(weight_VD)}), not in [{low}, {high}]; "
                "leave masked positions out before the call."
            )


class _Tiling(NamedTuple):
    """How the product is cut, and in what and with what it is computed."""

    scale: float  # 1 / temperature
    dtype: torch.dtype
    chunk_size: int
    vocab_chunk_size: int
    fold_tile: Callable[..., None]
    gradient_tile: Callable[..., Tensor]


def _tiling(hidden_TD: Tensor, scale: float, chunk_size: int, vocab_chunk_size: int) -> _Tiling:
    if chunk_size < 1 or vocab_chunk_size < 1:
        raise ValueError(f"Chunk sizes must be at least 1, not {chunk_size} and {vocab_chunk_size}.")
    dtype = torch.promote_types(hidden_TD.dtype, torch.float32)
    return _Tiling(scale, dtype, chunk_size, vocab_chunk_size, *_tile_passes(hidden_TD.is_cuda, dtype))


def _tile_passes(on_gpu: bool, dtype: torch.dtype) -> tuple[Callable[..., None], Callable[..., Tensor]]:
    """The fold and the gradient of a tile: Triton's or plain."""
    if takes_triton(VARIABLE, on_gpu) and dtype == torch.float32:
        from . import lm_head_triton as passes
    else:
        passes = lm_head_torch
    return passes.fold_tile, passes.gradient_tile


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TD, weight_VD, bias, targets_T, tiling):
        ctx.tiling = tiling
        # autocast would round the float32 products below
        with torch.autocast(hidden_TD.device.type, enabled=False):
            lse_T, mean_T, picked_T = _fold(hidden_TD, weight_VD, bias, targets_T, tiling)
        ctx.save_for_backward(hidden_TD, weight_VD, bias, targets_T, lse_T, mean_T)
        ctx.set_materialize_grads(False)
        return picked_T - lse_T, lse_T - mean_T

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grad_outputs):  # pyright: ignore[reportIncompatibleMethodOverride]
        inputs = ctx.saved_tensors[:3]  # hidden, weight, bias
        buffers = _Gradients.zeros(inputs, ctx.needs_input_grad, ctx.tiling.dtype)
        if any(grad_T is not None for grad_T in grad_outputs):  # logps, entropy
            with torch.autocast(inputs[0].device.type, enabled=False):
                _unfold(ctx.saved_tensors, ctx.tiling, grad_outputs, buffers)
        cast = [None if grad is None else grad.to(value.dtype) for grad, value in zip(buffers, inputs, strict=True)]
        return (*cast, None, None)


class _SummedLoss(torch.autograd.Function):
    """Sum of -log p(target) over tokens, its gradient made in the forward pass; and each token's share of it."""

    @staticmethod
    def forward(ctx, hidden_TD, weight_VD, bias, targets_T, tiling):
        inputs = (hidden_TD, weight_VD, bias)
        buffers = _Gradients.zeros(inputs, ctx.needs_input_grad, tiling.dtype)
        loss = hidden_TD.new_zeros((), dtype=tiling.dtype)
        losses_T = hidden_TD.new_empty(len(hidden_TD), dtype=tiling.dtype)
        with torch.autocast(hidden_TD.device.type, enabled=False):
            for _, tile_VD, bias_V in _weight_tiles(hidden_TD, weight_VD, bias, tiling):  # one, of all rows
                for span in _spans(len(hidden_TD), tiling.chunk_size):
                    losses_T[span] = _chunk_losses(hidden_TD, tile_VD, bias_V, targets_T, span, tiling, buffers)
                    loss += losses_T[span].sum()
        ctx.save_for_backward(*buffers)
        ctx.dtypes = [None if value is None else value.dtype for value in inputs]
        ctx.mark_non_differentiable(losses_T)
        return loss, losses_T

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _):  # pyright: ignore[reportIncompatibleMethodOverride]
        scaled = [
            None if value is None else torch.mul(value, grad, out=torch.empty_like(value, dtype=dtype))
            for value, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None)


class _Gradients(NamedTuple):
    """Where gradients are summed; None for what needs none."""

    hidden_TD: Tensor | None
    weight_VD: Tensor | None
    bias_V: Tensor | None

    @classmethod
    def zeros(cls, inputs: Sequence[Tensor | None], needed: Sequence[bool], dtype: torch.dtype) -> "_Gradients":
        return cls(
            *(
                torch.zeros_like(value, dtype=dtype, memory_format=torch.contiguous_format)
                if value is not None and wanted
                else None
                for value, wanted in zip(inputs, needed, strict=False)
            )
        )


def _spans(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def _add_product(total: Tensor, a: Tensor, b: Tensor, *, keep: float = 1.0, scale: float = 1.0) -> None:
    """total = keep * total + scale * a @ b, in place, accumulated in the dtype of `total`.

    Half-precision factors stay so on CUDA, where that is fast. With keep 0 it does not matter what was there.
    """
    if a.is_cuda and a.dtype != total.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=keep, alpha=scale, out=total)
    else:
        torch.addmm(total, a.to(total.dtype), b.to(total.dtype), beta=keep, alpha=scale, out=total)


def _tile_logits(hidden_CD: Tensor, tile_WD: Tensor, bias_W: Tensor | None, tiling: _Tiling) -> Tensor:
    """Logits [C, W] of one tile, divided by the temperature."""
    logits_CW = hidden_CD.new_empty(len(hidden_CD), len(tile_WD), dtype=tiling.dtype)
    if bias_W is not None:
        logits_CW[:] = bias_W
    keep = 0.0 if bias_W is None else tiling.scale
    _add_product(logits_CW, hidden_CD, tile_WD.T, keep=keep, scale=tiling.scale)
    return logits_CW


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


def _new_state(like: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """The state [4, count] before the first tile; a target that no tile holds keeps a picked logit of NaN."""
    state_4T = like.new_zeros(4, count, dtype=dtype)
    state_4T[0] = float("-inf")
    state_4T[3] = float("nan")
    return state_4T


def _read_state(state_4T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp, mean logit under the softmax, and the target's logit, each [T]; all NaN without a target."""
    top_T, total_T, weighted_T, picked_T = state_4T
    lse_T = torch.where(picked_T.isnan(), picked_T, top_T + total_T.log())
    return lse_T, weighted_T / total_T, picked_T


def _fold(
    hidden_TD: Tensor, weight_VD: Tensor, bias: Tensor | None, targets_T: Tensor, tiling: _Tiling
) -> tuple[Tensor, Tensor, Tensor]:
    """What `_read_state` says, each [T], of all tiles; the forward pass."""
    state_4T = _new_state(hidden_TD, len(hidden_TD), tiling.dtype)
    for rows, tile_WD, bias_W in _weight_tiles(hidden_TD, weight_VD, bias, tiling):
        for span in _spans(len(hidden_TD), tiling.chunk_size):
            # an expression, so that a tile is gone before the next is made
            tiling.fold_tile(
                _tile_logits(hidden_TD[span], tile_WD, bias_W, tiling), targets_T[span], state_4T[:, span], rows.start
            )
    return _read_state(state_4T)


def _unfold(
    saved: Sequence[Tensor], tiling: _Tiling, grad_outputs: Sequence[Tensor | None], buffers: _Gradients
) -> None:
    """Make the tiles again and add to the gradient buffers in place; the backward pass."""
    hidden_TD, weight_VD, bias, targets_T, lse_T, mean_T = saved
    grad_logps_T, grad_entropy_T = (None if grad_T is None else grad_T.contiguous() for grad_T in grad_outputs)
    if grad_logps_T is None:
        grad_logps_T = torch.zeros_like(lse_T)
    for rows, tile_WD, bias_W in _weight_tiles(hidden_TD, weight_VD, bias, tiling):
        for span in _spans(len(hidden_TD), tiling.chunk_size):
            grad_entropy_C = None if grad_entropy_T is None else grad_entropy_T[span]
            per_token = (targets_T[span], lse_T[span], mean_T[span], grad_logps_T[span], grad_entropy_C)
            logits_CW = _tile_logits(hidden_TD[span], tile_WD, bias_W, tiling)
            _add_gradients(buffers, logits_CW, per_token, hidden_TD, tile_WD, span, rows, tiling)
            del logits_CW


def _chunk_losses(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    bias: Tensor | None,
    targets_T: Tensor,
    span: slice,
    tiling: _Tiling,
    buffers: _Gradients,
) -> Tensor:
    """Losses [C] of a chunk of tokens, whose gradient is added to the buffers; all the vocabulary is one tile."""
    logits_CV = _tile_logits(hidden_TD[span], weight_VD, bias, tiling)
    state_4C = _new_state(hidden_TD, len(logits_CV), tiling.dtype)
    tiling.fold_tile(logits_CV, targets_T[span], state_4C, 0)
    lse_C, mean_C, picked_C = _read_state(state_4C)
    per_token = (targets_T[span], lse_C, mean_C, torch.full_like(lse_C, -1), None)
    _add_gradients(buffers, logits_CV, per_token, hidden_TD, weight_VD, span, slice(0, len(weight_VD)), tiling)
    return lse_C - picked_C


def _add_gradients(
    buffers: _Gradients,
    logits_CW: Tensor,
    per_token: tuple[Tensor | None, ...],
    hidden_TD: Tensor,
    tile_WD: Tensor,
    span: slice,
    rows: slice,
    tiling: _Tiling,
) -> None:
    """Overwrite a tile's logits by their gradient, and add what that gives to the buffers.

    `per_token` is targets, log-sum-exp, mean logit, and the gradients of log-probability and entropy, each [C].
    """
    # a bias sums the gradient itself, so that it must not be rounded before
    dtype = tile_WD.dtype if buffers.bias_V is None else tiling.dtype
    grad_CW = tiling.gradient_tile(logits_CW, *per_token, rows.start, dtype)
    if buffers.bias_V is not None:
        buffers.bias_V[rows] += grad_CW.sum(0) * tiling.scale
        grad_CW = grad_CW.to(tile_WD.dtype)
    if buffers.hidden_TD is not None:
        _add_product(buffers.hidden_TD[span], grad_CW, tile_WD, scale=tiling.scale)
    if buffers.weight_VD is not None:
        _add_product(buffers.weight_VD[rows], grad_CW.T, hidden_TD[span].to(tile_WD.dtype), scale=tiling.scale)
