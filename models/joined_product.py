"""One matrix product for several projections of one input, with the adapters' second factors as further columns.

What `fused_block.py` is made of, which says why.

Shapes: T tokens; of one product: K inputs, N outputs, R rows of all its adapters' first factors, P columns that the
matrix has for them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

_COLUMNS = 16  # P is a multiple: rows of the matrix begin at whole 32 bytes


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
        self.settled: Factors | None = None  # the adapter that counts whatever is active

    def _adapters(self) -> set[str]:
        return {name for layer in self.layers if isinstance(layer, LoraLayer) for name in layer.lora_A}

    def _rank(self, adapter: str) -> int:
        return sum(layer.r.get(adapter, 0) for layer in self.layers if isinstance(layer, LoraLayer))

    def factors(self) -> Factors:
        """The factors of the adapter that is active now, or was when it was settled."""
        if self.settled is not None:
            return self.settled
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

    def settle(self) -> None:
        """Put the active adapter where it belongs, once for many passes without gradients."""
        factors = self.factors()
        self.load(factors.up, factors.scales)
        self.settled = factors

    def load(self, up: Sequence[Tensor], scales: Sequence[float]) -> None:
        """Put s B of an adapter into its columns, where it is not there yet."""
        if self.settled is not None:
            return
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
