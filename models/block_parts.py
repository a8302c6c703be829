"""The pointwise parts of a decoder block, forward and backward: norm, rotary embedding, gated activation.

Each writes where its caller says, in one pass on a GPU, where they are compiled. Arithmetic is float32 (float64 for
float64), rounded where transformers' own modules round.

Shapes: T tokens, D width, F width of the MLP, H query heads, G key and value heads, E width of a head.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo import maybe_mark_dynamic


def compiled_on_gpu(function: Callable) -> Callable:
    """A pointwise function without gradients, compiled where its first argument is on a GPU, once for any length."""

    @lru_cache(maxsize=1)
    def compiled() -> Callable:
        return torch.compile(function)

    def call(first: Tensor, *others: Any) -> Any:
        if not first.is_cuda:
            return function(first, *others)
        # what autograd knows of a tensor, and the number of tokens, would each call for another compilation
        arguments = [value.detach() if isinstance(value, Tensor) else value for value in (first, *others)]
        for value in arguments:
            if isinstance(value, Tensor) and value.dim() > 1:
                maybe_mark_dynamic(value, 0)
        return compiled()(*arguments)

    return call


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@compiled_on_gpu
def normalize_into(x_TD: Tensor, weight_D: Tensor, epsilon: float, out_TD: Tensor) -> None:
    """RMSNorm, written into `out_TD`."""
    wide_TD = _wide(x_TD)
    scale_T1 = torch.rsqrt(wide_TD.square().mean(-1, keepdim=True) + epsilon)
    out_TD.copy_(weight_D * (wide_TD * scale_T1).to(x_TD.dtype))


@compiled_on_gpu
def normalize_back(x_TD: Tensor, weight_D: Tensor, epsilon: float, grad_TD: Tensor, add_TD: Tensor | None) -> Tensor:
    """Gradient of RMSNorm's input, plus `add_TD`."""
    wide_TD = _wide(x_TD)
    scale_T1 = torch.rsqrt(wide_TD.square().mean(-1, keepdim=True) + epsilon)
    through_TD = _wide(grad_TD) * _wide(weight_D)
    along_T1 = (through_TD * wide_TD).mean(-1, keepdim=True) * scale_T1.square()
    result_TD = scale_T1 * (through_TD - wide_TD * along_T1)
    if add_TD is not None:
        result_TD = result_TD + _wide(add_TD)
    return result_TD.to(x_TD.dtype)


def _turn(x_THE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    first, second = _wide(x_THE).chunk(2, dim=-1)
    turned = _wide(x_THE) * _wide(cos_TE)[:, None] + torch.cat([-second, first], dim=-1) * _wide(sin_TE)[:, None]
    return turned.to(x_THE.dtype)


@compiled_on_gpu
def rotate_(x_THE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> None:
    """Rotary embedding, in place."""
    x_THE.copy_(_turn(x_THE, cos_TE, sin_TE))


@compiled_on_gpu
def rotate_back(grad_THE: Tensor, grad_TGE: Tensor, value_TGE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    """Gradients of queries, keys and values before the rotary embedding, side by side: [T, (H + 2 G) E]."""
    parts = [_turn(grad_THE, cos_TE, -sin_TE), _turn(grad_TGE, cos_TE, -sin_TE), value_TGE]
    return torch.cat(parts, dim=1).flatten(1)


@compiled_on_gpu
def gate_into(gate_up_TF: Tensor, out_TF: Tensor) -> None:
    """silu(gate) * up of [gate, up] [T, 2 F], written into `out_TF`."""
    gate, up = gate_up_TF.chunk(2, dim=1)
    out_TF.copy_(F.silu(_wide(gate)).to(gate.dtype) * up)


def gate_back(gate_up_TF: Tensor, grad_TF: Tensor) -> Tensor:
    """Gradient of [gate, up]; silu(gate) * up is written over `grad_TF`."""
    result_TF = torch.empty_like(gate_up_TF)
    _gate_back_into(gate_up_TF, grad_TF, *result_TF.chunk(2, dim=1))
    return result_TF


@compiled_on_gpu
def _gate_back_into(gate_up_TF: Tensor, grad_TF: Tensor, grad_gate_TF: Tensor, grad_up_TF: Tensor) -> None:
    gate, up = (_wide(half) for half in gate_up_TF.chunk(2, dim=1))
    grad = _wide(grad_TF)
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    grad_gate_TF.copy_(grad * up * (sigmoid + silu * (1 - sigmoid)))
    grad_up_TF.copy_(grad * silu)
    grad_TF.copy_(silu.to(grad_TF.dtype) * up.to(grad_TF.dtype))
