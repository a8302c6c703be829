"""Decoder blocks under LoRA in few, large products, forward and backward written out.

A projection with an adapter is y = x W^T + s (x A^T) B^T. Taken one by one, as peft does, each of a block's seven
costs three products and a sum forward and five products and two sums backward, and the sums and the thin products read
and write the widest tensors of the model: a fifth of a step. Here projections of one input are one matrix, and the
adapters' second factors stand beside it as further columns, so that the sum happens inside the product:

    y = [x, x A^T] [W, s B]^T        [dx, d(x A^T)] = dy [W, s B]

The norm and the gated activation write straight into the left part of [x, x A^T]. For the backward pass a block keeps
its input, queries, keys and values, what attention gave, the sum after it, and the MLP's gate and up; norms and the
gated product are made again. Pointwise parts are compiled on a GPU. The base is frozen: it gets no gradient.

Values are those of transformers' blocks with peft's adapters, to rounding; tests/models/test_fused_block.py.

Shapes: T tokens, D width, F width of the MLP, H query heads, G key and value heads, E width of a head; of one product:
K inputs, N outputs, R rows of all its adapters' first factors, P columns that the matrix has for them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

from .attention import Attends
from .block_parts import gate_back, gate_into, normalize_back, normalize_into, rotate_, rotate_back

_COLUMNS = 16  # P is a multiple: rows of the matrix begin at whole 32 bytes


# One product -------------------------------------------------------------------------------------------------------


@dataclass
class Factors:
    """The active adapter of each projection of a product; nothing where there is none."""

    down_RK: Tensor | None = None  # A of all, one under the other
    up: list[Tensor] = field(default_factory=list)  # B [its N, its rank]
    scales: list[float] = field(default_factory=list)  # s


class Joined:
    """Projections of one input as one matrix [N, K + P]; their own weights become views of it.

    Args:
        layers: linear layers, with adapters or without.

    Raises:
        ValueError: a layer that learns itself, or adapters with dropout.
    """

    def __init__(self, layers: Sequence[nn.Module]):
        self.layers = list(layers)
        bases = [_base(layer) for layer in self.layers]
        if any(base.weight.requires_grad for base in bases):
            raise ValueError("Blocks with weights that learn cannot be fused; set blocks to compiled or plain.")
        self.num_inputs = bases[0].in_features
        rank = max((self._rank(name) for name in self._adapters()), default=0)
        outputs = sum(base.out_features for base in bases)
        weight = bases[0].weight
        self.weight = weight.new_zeros(outputs, self.num_inputs + _COLUMNS * -(-rank // _COLUMNS))
        self.rows: list[slice] = []
        start = 0
        for base in bases:
            rows = slice(start, start + base.out_features)
            self.weight[rows, : self.num_inputs] = base.weight
            base.weight.data = self.weight[rows, : self.num_inputs]
            self.rows.append(rows)
            start = rows.stop
        has_bias = bases[0].bias is not None
        self.bias = torch.cat([base.bias.detach() for base in bases]) if has_bias else None
        self._loaded: list[tuple[Tensor, int, float]] = []  # B that its columns hold, as of which change, and s
        self._down: Tensor | None = None  # A of all, one under the other, for passes without gradients
        self._down_of: list[tuple[Tensor, int]] = []  # which they are, as of which change

    def _adapters(self) -> set[str]:
        return {name for layer in self.layers if isinstance(layer, LoraLayer) for name in layer.lora_A}

    def _rank(self, adapter: str) -> int:
        return sum(layer.r.get(adapter, 0) for layer in self.layers if isinstance(layer, LoraLayer))

    def factors(self) -> Factors:
        """The factors of the adapter that is active now."""
        loras = [layer for layer in self.layers if isinstance(layer, LoraLayer) and not layer.disable_adapters]
        if not loras:
            return Factors()
        if len(loras) < len(self.layers):
            raise ValueError("Of the projections of one input some have an adapter; set blocks to compiled or plain.")
        down, up, scales = [], [], []
        for layer in loras:
            (name,) = layer.active_adapters
            _check_adapter(layer, name, self.weight.dtype)
            down.append(layer.lora_A[name].weight)
            up.append(layer.lora_B[name].weight)
            scales.append(layer.scaling[name])
        if self.num_inputs + sum(map(len, down)) > self.weight.shape[1]:
            raise ValueError("An adapter came after the blocks were fused; fuse them again.")
        return Factors(self._stacked(down), up, scales)

    def _stacked(self, down: Sequence[Tensor]) -> Tensor:
        """A of all, one under the other; without gradients in a buffer that stays where it is, as graphs need it."""
        if len(down) == 1:
            return down[0]
        if torch.is_grad_enabled():
            return torch.cat(list(down))
        wanted, held = [(factor, factor._version) for factor in down], self._down_of
        same = len(held) == len(wanted) and all(
            mine[0] is its[0] and mine[1] == its[1] for mine, its in zip(held, wanted, strict=True)
        )
        rows = sum(map(len, down))
        if self._down is None or len(self._down) != rows:
            self._down, same = down[0].new_empty(rows, self.num_inputs), False
        if not same:
            torch.cat([factor.detach() for factor in down], out=self._down)
            self._down_of = wanted
        return self._down

    def load(self, up: Sequence[Tensor], scales: Sequence[float]) -> None:
        """Put s B of an adapter into its columns, where it is not there yet."""
        wanted = [(factor, factor._version, scale) for factor, scale in zip(up, scales, strict=True)]
        held = self._loaded
        if len(held) == len(wanted) and all(
            mine[0] is its[0] and mine[1:] == its[1:] for mine, its in zip(held, wanted, strict=True)
        ):
            return
        self._loaded = wanted
        self.weight[:, self.num_inputs :] = 0  # another adapter's columns may be more
        for rows, columns, factor, scale in self._blocks(up, scales):
            torch.mul(
                factor, scale, out=self.weight[rows, self.num_inputs + columns.start : self.num_inputs + columns.stop]
            )

    def _blocks(self, up: Sequence[Tensor], scales: Sequence[float]) -> list[tuple[slice, slice, Tensor, float]]:
        """Rows, columns (counted from K), B and s of each projection's block."""
        blocks, start = [], 0
        for rows, factor, scale in zip(self.rows[: len(up)], up, scales, strict=True):
            columns = slice(start, start + factor.shape[1])
            blocks.append((rows, columns, factor, scale))
            start = columns.stop
        return blocks

    def room(self, like_T: Tensor) -> Tensor:
        """An empty [T, K + P] for the input and what the adapters make of it."""
        return like_T.new_empty(len(like_T), self.weight.shape[1])

    def extend(self, x_TK: Tensor, down_RK: Tensor | None) -> Tensor:
        """Fill the right part of a `room` whose left part is filled: x A^T [T, R], which is returned, and zeros."""
        start = self.num_inputs
        if down_RK is None:
            x_TK[:, start:] = 0
            return x_TK[:, start:start]
        end = start + len(down_RK)
        torch.mm(x_TK[:, :start], down_RK.T, out=x_TK[:, start:end])
        if end < x_TK.shape[1]:
            x_TK[:, end:] = 0
        return x_TK[:, start:end]

    def __call__(self, x_TK: Tensor) -> Tensor:
        """The product [T, N] of a filled `room`, with the bias."""
        return torch.mm(x_TK, self.weight.T) if self.bias is None else torch.addmm(self.bias, x_TK, self.weight.T)

    def added_to(self, sum_TN: Tensor, x_TK: Tensor, *, kept: bool) -> Tensor:
        """The product without a bias, added to a tensor; to that tensor itself unless it must be kept."""
        if kept:
            return torch.addmm(sum_TN, x_TK, self.weight.T)
        return sum_TN.addmm_(x_TK, self.weight.T)

    def back(
        self, grad_TN: Tensor, down_RK: Tensor | None, up: Sequence[Tensor], scales: Sequence[float]
    ) -> tuple[Tensor, Tensor]:
        """Gradients of the input [T, K] and of x A^T [T, R]; the columns hold the adapter again."""
        self.load(up, scales)
        both_TK = grad_TN @ self.weight
        grad_x = both_TK[:, : self.num_inputs]
        rank = 0 if down_RK is None else len(down_RK)
        grad_TR = both_TK[:, self.num_inputs : self.num_inputs + rank]
        if down_RK is not None:
            grad_x.addmm_(grad_TR, down_RK)
        return grad_x, grad_TR

    def back_up(self, grad_TN: Tensor, thin_TR: Tensor, up: Sequence[Tensor], scales: Sequence[float]) -> list[Tensor]:
        """Gradients of each B."""
        return [
            torch.addmm(factor, grad_TN[:, rows].T, thin_TR[:, columns], beta=0, alpha=scale)
            for rows, columns, factor, scale in self._blocks(up, scales)
        ]


def _check_adapter(layer: LoraLayer, name: str, dtype: torch.dtype) -> None:
    """ValueError for an adapter that does more than y + s (x A^T) B^T, or was merged."""
    known = {
        "with dropout": not isinstance(layer.lora_dropout[name], nn.Identity),
        "merged into the weights": layer.merged,
        "of another kind (DoRA)": bool(layer.lora_variant.get(name)),
        "with a bias": layer.lora_bias.get(name, False),
        f"in another precision than {dtype}": layer.lora_A[name].weight.dtype != dtype,
    }
    for what, found in known.items():
        if found:
            raise ValueError(f"Fused blocks take no adapter {what}; set blocks to compiled or plain.")


def _base(layer: nn.Module) -> nn.Linear:
    base = layer.get_base_layer() if isinstance(layer, LoraLayer) else layer
    assert isinstance(base, nn.Linear)
    return base


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
        heads: Any = _Heads.apply(x_TD, self, cos_TE, sin_TE, qkv.scales, kept, qkv.down_RK, *qkv.up)
        query_THE, key_TGE, value_TGE = heads
        attended_THE = attends.attend(self.layer, query_THE, key_TGE, value_TGE, self.scale)
        rest = [product.factors() for product in (self.out, self.gate_up, self.down)]
        scales = [factors.scales for factors in rest]
        down, up = [factors.down_RK for factors in rest], [value for factors in rest for value in factors.up]
        result: Any = _Rest.apply(attended_THE.flatten(1), x_TD, self, scales, kept, *down, *up)
        return result


class FusedBlocks:
    """The decoder of a Qwen2.5-VL whose base is frozen, over packed rows.

    Made when the model is where it stays: weights are joined there, and moving the model would part them again.

    Raises:
        ValueError: blocks or adapters of a kind that cannot be fused.
    """

    def __init__(self, decoder: Any):
        self.decoder = decoder
        self.blocks = [FusedBlock(layer) for layer in decoder.layers]
        for block in self.blocks:
            for product in (block.qkv, block.out, block.gate_up, block.down):
                product.factors()  # an adapter of a kind that they do not know is refused here

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
