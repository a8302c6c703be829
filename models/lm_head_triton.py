"""The two passes over a tile of logits as Triton kernels; `lm_head.py` has the same two in plain PyTorch.

One program takes one row. The fold reads a tile once. The gradient reads it once more and is written over it: the
gradient of a row takes the first bytes of that row, half of them where it is bfloat16, so that a tile needs no second
buffer. All arithmetic is float32. Kernels are compiled for each width of a tile: a vocabulary has two or three.

Imported only where it serves: a GPU, or the interpreter (`TRITON_INTERPRET=1`) on a CPU.

Shapes: C tokens of a chunk, W vocabulary rows of a chunk; a state [4, C] is top, total, weighted and picked of each
token (`lm_head.py`).
"""

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

BLOCK = 4096  # logits of a row in registers at a time
WARPS = 8


@triton.jit(do_not_specialize=["state_stride", "first"])
def _fold_kernel(logits, stride, targets, state, state_stride, first, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    state += row
    top = tl.load(state)
    total = tl.load(state + state_stride)
    weighted = tl.load(state + 2 * state_stride)
    for start in range(0, WIDTH, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < WIDTH
        values = tl.load(logits + columns, mask=inside, other=float("-inf"))
        new_top = tl.maximum(top, tl.max(values, 0))
        # 0 at the first block of all, where top is -inf
        shrink = tl.exp(top - new_top)
        exps = tl.exp(values - new_top)
        total = total * shrink + tl.sum(exps, 0)
        weighted = weighted * shrink + tl.sum(exps * tl.where(inside, values, 0.0), 0)
        top = new_top
    tl.store(state, top)
    tl.store(state + state_stride, total)
    tl.store(state + 2 * state_stride, weighted)
    target = tl.load(targets + row) - first
    here = (target >= 0) & (target < WIDTH)
    picked = tl.load(logits + target, mask=here, other=0.0)
    tl.store(state + 3 * state_stride, picked, mask=here)


@triton.jit(do_not_specialize=["first"])
def _gradient_kernel(
    logits,
    stride,
    gradient,
    targets,
    lse,
    mean,
    grad_logps,
    grad_entropy,
    first,
    WIDTH: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    gradient += row * stride * (32 // gradient.dtype.element_ty.primitive_bitwidth)
    target = tl.load(targets + row) - first
    row_lse = tl.load(lse + row)
    of_logps = tl.load(grad_logps + row)
    if HAS_ENTROPY:
        row_mean = tl.load(mean + row)
        of_entropy = tl.load(grad_entropy + row)
    for start in range(0, WIDTH, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < WIDTH
        values = tl.load(logits + columns, mask=inside, other=float("-inf"))
        probs = tl.exp(values - row_lse)
        grads = tl.where(columns == target, of_logps, 0.0) - probs * of_logps
        if HAS_ENTROPY:
            grads -= probs * (values - row_mean) * of_entropy
        # what is stored lies on logits that other threads of this row read in this round or before
        tl.debug_barrier()
        tl.store(gradient + columns, grads.to(gradient.dtype.element_ty), mask=inside)


def fold_tile(logits_CW: Tensor, targets_C: Tensor, state_4C: Tensor, first: int) -> None:
    """Take the logits of vocabulary rows `first` and on into the running state, in place."""
    with torch.cuda.device_of(logits_CW):
        _fold_kernel[(len(logits_CW),)](  # pyright: ignore[reportIndexIssue]
            logits_CW,
            logits_CW.stride(0),
            targets_C,
            state_4C,
            state_4C.stride(0),
            first,
            WIDTH=logits_CW.shape[1],
            BLOCK=BLOCK,
            num_warps=WARPS,
        )


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
    """Gradient [C, W] in the logits, in `dtype` and in the memory of the logits, which are gone."""
    width = logits_CW.shape[1]
    gradient_CW = logits_CW.view(dtype)[:, :width]
    with torch.cuda.device_of(logits_CW):
        _gradient_kernel[(len(logits_CW),)](  # pyright: ignore[reportIndexIssue]
            logits_CW,
            logits_CW.stride(0),
            gradient_CW,
            targets_C,
            lse_C,
            mean_C,
            grad_logps_C,
            grad_logps_C if grad_entropy_C is None else grad_entropy_C,
            first,
            WIDTH=width,
            HAS_ENTROPY=grad_entropy_C is not None,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
    return gradient_CW
