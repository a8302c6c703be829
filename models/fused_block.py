"""Decoder blocks under LoRA in few, large products, forward and backward written out.

A projection with an adapter is y = x W^T + s (x A^T) B^T. Taken one by one, as peft does, each of a block's seven
costs three products and a sum forward and five products and two sums backward, and the sums and the thin products read
and write the widest tensors of the model: a fifth of a step. Here projections of one input are one matrix, and the
adapters' second factors stand beside it as further columns, so that the sum happens inside the product:

    y = [x, x A^T] [W, s B]^T        [dx, d(x A^T)] = dy [W, s B]

That is joined_product.py. The norm and the gated activation write straight into the left part of [x, x A^T]. For the
backward pass a block keeps its input, queries, keys and values, what attention gave, the sum after it, and the MLP's
gate and up; norms and the gated product are made again. Pointwise parts are compiled on a GPU. The base is frozen: it
gets no gradient.

Values are those of transformers' blocks with peft's adapters, to rounding; tests/models/test_fused_block.py.

Shapes: T tokens, D width, F width of the MLP, H query heads, G key and value heads, E width of a head; of one product:
K inputs, N outputs, R rows of all its adapters' first factors.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

from .attention import Attends
from .block_parts import gate_back, gate_into, normalize_back, normalize_into, rotate_, rotate_back
from .joined_product import Joined

# The two halves of a block, before and after attention -------------------------------------------------------------


class _Heads(Function):
    """Norm, queries, keys and values, rotary embedding: [T, D] -> [T, H, E], [T, G, E], [T, G, E]."""

    @staticmethod
    def forward(ctx, x_TD, block, cos_TE, sin_TE, scales, kept, down_RK, *up):
        product = block.qkv
        x_TK = product.room(x_TD)
        normalize_into(x_TD, block.norm_in.weight, block.epsilon, x_TK[:, : product.num_inputs])
        thin_TR = product.extend(x_TK, down_RK)
        product.load(up, scales)
        heads_TJE = product(x_TK).unflatten(1, (-1, block.head_width))
        turned = block.num_heads + block.num_kv_heads
        rotate_(heads_TJE[:, :turned], cos_TE, sin_TE)
        if kept:
            ctx.block, ctx.scales = block, scales
            ctx.save_for_backward(x_TD, cos_TE, sin_TE, thin_TR.clone(), down_RK, *up)
        return heads_TJE.split([block.num_heads, block.num_kv_heads, block.num_kv_heads], dim=1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):  # pyright: ignore[reportIncompatibleMethodOverride]
        x_TD, cos_TE, sin_TE, thin_TR, down_RK, *up = ctx.saved_tensors
        block, product = ctx.block, ctx.block.qkv
        grad_TN = rotate_back(*grads, cos_TE, sin_TE)
        grad_norm_TD, grad_TR = product.back(grad_TN, down_RK, up, ctx.scales)
        grad_down, grad_up = None, [None] * len(up)
        if any(ctx.needs_input_grad[6:]):
            again_TD = torch.empty_like(x_TD)
            normalize_into(x_TD, block.norm_in.weight, block.epsilon, again_TD)
            grad_down = grad_TR.T @ again_TD
            grad_up = product.back_up(grad_TN, thin_TR, up, ctx.scales)
        grad_x = normalize_back(x_TD, block.norm_in.weight, block.epsilon, grad_norm_TD, None)
        return grad_x, None, None, None, None, None, grad_down, *grad_up


class _Rest(Function):
    """Output projection and MLP, each added to what came in: attention's [T, D] and the block's input [T, D]."""

    @staticmethod
    def forward(ctx, attended_TD, x_TD, block, scales, kept, *factors):
        counts = [len(its) for its in scales]
        down, ups = factors[:3], _grouped(factors[3:], counts)
        out, gate_up, mlp = products = (block.out, block.gate_up, block.down)
        for product, its_ups, its_scales in zip(products, ups, scales, strict=True):
            product.load(its_ups, its_scales)

        a_TK = out.room(x_TD)
        a_TK[:, : out.num_inputs] = attended_TD
        thin_out = out.extend(a_TK, down[0])
        mid_TD = out.added_to(x_TD, a_TK, kept=kept)
        m_TK = gate_up.room(x_TD)
        normalize_into(mid_TD, block.norm_mid.weight, block.epsilon, m_TK[:, : gate_up.num_inputs])
        thin_gate = gate_up.extend(m_TK, down[1])
        gate_up_TF = gate_up(m_TK)
        p_TK = mlp.room(x_TD)
        gate_into(gate_up_TF, p_TK[:, : mlp.num_inputs])
        thin_mlp = mlp.extend(p_TK, down[2])
        result_TD = mlp.added_to(mid_TD, p_TK, kept=kept)

        if kept:
            ctx.block, ctx.counts, ctx.scales = block, counts, scales
            thin = [part.clone() for part in (thin_out, thin_gate, thin_mlp)]  # else each would keep its whole room
            ctx.save_for_backward(attended_TD, mid_TD, gate_up_TF, *thin, *factors)
        return result_TD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad_TD,) = grads
        attended_TD, mid_TD, gate_up_TF, thin_out, thin_gate, thin_mlp, *factors = ctx.saved_tensors
        block, down, ups = ctx.block, factors[:3], _grouped(factors[3:], ctx.counts)
        needed = ctx.needs_input_grad[5:]
        learns = [one or any(its) for one, its in zip(needed[:3], _grouped(needed[3:], ctx.counts), strict=True)]
        grad_down: list[Tensor | None] = [None] * 3
        grad_ups: list[list[Any]] = [[None] * count for count in ctx.counts]

        gated_TF, grad_TR = block.down.back(grad_TD, down[2], ups[2], ctx.scales[2])
        grad_gate_up_TF = gate_back(gate_up_TF, gated_TF)  # from here `gated_TF` is the product itself
        if learns[2]:
            grad_down[2] = grad_TR.T @ gated_TF
            grad_ups[2] = block.down.back_up(grad_TD, thin_mlp, ups[2], ctx.scales[2])
        del gated_TF, grad_TR
        grad_norm_TD, grad_TR = block.gate_up.back(grad_gate_up_TF, down[1], ups[1], ctx.scales[1])
        if learns[1]:
            again_TD = torch.empty_like(mid_TD)
            normalize_into(mid_TD, block.norm_mid.weight, block.epsilon, again_TD)
            grad_down[1] = grad_TR.T @ again_TD
            grad_ups[1] = block.gate_up.back_up(grad_gate_up_TF, thin_gate, ups[1], ctx.scales[1])
        del grad_gate_up_TF
        grad_mid_TD = normalize_back(mid_TD, block.norm_mid.weight, block.epsilon, grad_norm_TD, grad_TD)
        grad_attended_TD, grad_TR = block.out.back(grad_mid_TD, down[0], ups[0], ctx.scales[0])
        if learns[0]:
            grad_down[0] = grad_TR.T @ attended_TD
            grad_ups[0] = block.out.back_up(grad_mid_TD, thin_out, ups[0], ctx.scales[0])
        flat = [grad for part in grad_ups for grad in part]
        return grad_attended_TD, grad_mid_TD, None, None, None, *grad_down, *flat


def _run(function: Any, kept: bool, *arguments: Any) -> Any:
    """A function of autograd; by itself where there is nothing to keep."""
    return function.apply(*arguments) if kept else function.forward(None, *arguments)


def _grouped(values: Sequence[Any], counts: Sequence[int]) -> list[list[Any]]:
    rest = list(values)
    return [[rest.pop(0) for _ in range(count)] for count in counts]


class FusedBlock:
    """One decoder block of transformers, its projections joined; parameters stay where they are."""

    def __init__(self, layer: Any):
        attention, mlp = layer.self_attn, layer.mlp
        self.layer = int(attention.layer_idx)
        if layer.mlp.act_fn.__class__.__name__ not in ("SiLU", "SiLUActivation") or attention.sliding_window:
            raise ValueError("Fused blocks gate by SiLU and attend to all; set blocks to compiled or plain.")
        self.qkv = Joined([attention.q_proj, attention.k_proj, attention.v_proj])
        self.out = Joined([attention.o_proj])
        self.gate_up = Joined([mlp.gate_proj, mlp.up_proj])
        self.down = Joined([mlp.down_proj])
        if self.out.bias is not None or self.down.bias is not None:
            raise ValueError("Fused blocks add what comes in where a bias would be; set blocks to compiled or plain.")
        self.norm_in, self.norm_mid = layer.input_layernorm, layer.post_attention_layernorm
        self.epsilon = float(self.norm_in.variance_epsilon)
        self.head_width = attention.head_dim
        self.num_heads, self.num_kv_heads = attention.num_heads, attention.num_key_value_heads
        self.scale = attention.scaling

    def __call__(self, x_TD: Tensor, cos_TE: Tensor, sin_TE: Tensor, attends: Attends) -> Tensor:
        qkv, kept = self.qkv.factors(), torch.is_grad_enabled()
        heads = _run(_Heads, kept, x_TD, self, cos_TE, sin_TE, qkv.scales, kept, qkv.down_RK, *qkv.up)
        query_THE, key_TGE, value_TGE = heads
        attended_THE = attends.attend(self.layer, query_THE, key_TGE, value_TGE, self.scale)
        rest = [product.factors() for product in (self.out, self.gate_up, self.down)]
        scales = [factors.scales for factors in rest]
        down, up = [factors.down_RK for factors in rest], [value for factors in rest for value in factors.up]
        return _run(_Rest, kept, attended_THE.flatten(1), x_TD, self, scales, kept, *down, *up)


class FusedBlocks:
    """The decoder of a Qwen2.5-VL whose base is frozen, over packed rows.

    Made when the model is where it stays: weights are joined there, and moving the model would part them again.

    Raises:
        ValueError: blocks or adapters of a kind that cannot be fused.
    """

    def __init__(self, decoder: Any):
        self.decoder = decoder
        self.blocks = [FusedBlock(layer) for layer in decoder.layers]
        self.products = [
            product for block in self.blocks for product in (block.qkv, block.out, block.gate_up, block.down)
        ]
        for product in self.products:
            product.factors()  # an adapter of a kind that they do not know is refused here

    @contextmanager
    def settled(self) -> Iterator[None]:
        """In the block there are no gradients, and the adapter is the one that is active at its beginning.

        To look it up takes as long as the small products of a decoding step on a CPU.
        """
        try:
            for product in self.products:
                product.settle()
            yield
        finally:
            for product in self.products:
                product.settled = None

    def __call__(self, embeds_LD: Tensor, position_ids_4L: Tensor, attends: Attends) -> Tensor:
        """Last hidden states [L, D]."""
        cos, sin = self.decoder.rotary_emb(embeds_LD[None], position_ids_4L[1:, None])
        # without gradients blocks add to what they are given
        hidden_LD = embeds_LD if torch.is_grad_enabled() else embeds_LD.clone()
        for block in self.blocks:
            run = partial(block, cos_TE=cos[0], sin_TE=sin[0], attends=attends)
            if self.decoder.gradient_checkpointing and torch.is_grad_enabled():
                hidden_LD = checkpoint(run, hidden_LD, use_reentrant=False)
            else:
                hidden_LD = run(hidden_LD)
        return self.decoder.norm(hidden_LD)
