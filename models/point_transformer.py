"""Point Transformer V3 (Wu et al., CVPR 2024) in plain torch: attention among points that follow each other on curves.

Points are put into the cells of a grid and ordered along space-filling curves. A block is a conditional positional
encoding (a sparse convolution), attention within runs of `patch_size` cells of an order and a feed-forward network,
each with a skip; the blocks of a stage take the orders in turn. Between stages the cells become larger (maximum), and
on the way back the features go down to the finer cells beside those kept from the way up.

It differs from the authors' code in three things: LayerNorm stands where that has batch normalisation, so that a
scene's result depends neither on its companions nor on how a batch is split over processes; orders are shuffled in
training only, so that evaluation repeats; the points of a cell are averaged, not chosen at random.

Shapes: B scenes, N points a scene, V cells of all scenes, C channels, P patches, K cells a patch, H heads, d channels
of a head, T = kernel_size^3 taps of a convolution.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .space_filling import ORDERS
from .voxels import BITS, PointVoxels, Voxels, voxelise

Pairs = list[tuple[Tensor, Tensor]]  # for each tap of the first half: cells, and their neighbours there


def _taps(weight_TCC: Tensor, pairs: Pairs) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Tap, cells that are written and cells that are read, for all taps but the middle one."""
    for tap, (cell_E, neighbor_E) in enumerate(pairs):
        yield tap, cell_E, neighbor_E
        yield len(weight_TCC) - 1 - tap, neighbor_E, cell_E


class _GatherConvolution(torch.autograd.Function):
    """Sums over taps in one buffer, forward and backward; autograd on its own would keep every tap's cells.

    A cell occurs once in a tap, so that sums are made in a fixed order also where threads make them.
    """

    @staticmethod
    def forward(ctx: Any, features_VC: Tensor, weight_TCC: Tensor, pairs: Pairs) -> Tensor:
        ctx.save_for_backward(features_VC, weight_TCC)
        ctx.pairs = pairs
        precise = torch.promote_types(features_VC.dtype, torch.float32)
        sums_VC = (features_VC @ weight_TCC[len(weight_TCC) // 2].T).to(precise)
        for tap, to_E, from_E in _taps(weight_TCC, pairs):
            sums_VC.index_add_(0, to_E, (features_VC[from_E] @ weight_TCC[tap].T).to(precise))
        return sums_VC

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_VC: Tensor) -> tuple[Tensor, Tensor, None]:
        features_VC, weight_TCC = ctx.saved_tensors
        middle = len(weight_TCC) // 2
        precise, gradient_VC = gradient_VC.dtype, gradient_VC.to(features_VC.dtype)
        down_VC = (gradient_VC @ weight_TCC[middle]).to(precise)
        down_TCC = torch.zeros_like(weight_TCC)
        down_TCC[middle] = gradient_VC.T @ features_VC
        for tap, to_E, from_E in _taps(weight_TCC, ctx.pairs):
            part_EC = gradient_VC[to_E]
            down_VC.index_add_(0, from_E, (part_EC @ weight_TCC[tap]).to(precise))
            down_TCC[tap] = part_EC.T @ features_VC[from_E]
        return down_VC.to(features_VC.dtype), down_TCC, None


class SubmanifoldConv3d(nn.Module):
    """Convolution over occupied cells only: a dense one with zero padding, read at those cells.

    Args:
        kernel_size: odd, cells a side.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3, bias: bool = True):
        super().__init__()
        if kernel_size % 2 == 0 or not 1 <= kernel_size <= 7:
            raise ValueError(f"kernel_size is {kernel_size}; it must be 1, 3, 5 or 7.")
        self.kernel_size = kernel_size
        bound = (in_channels * kernel_size**3) ** -0.5  # as torch.nn.Conv3d starts
        self.weight_TCC = nn.Parameter(torch.empty(kernel_size**3, out_channels, in_channels).uniform_(-bound, bound))
        self.bias_C = nn.Parameter(torch.empty(out_channels).uniform_(-bound, bound)) if bias else None

    def forward(self, features_VC: Tensor, voxels: Voxels) -> Tensor:
        """Features [V, out_channels], float32; under autocast the products are of its type, the sums are not."""
        device = features_VC.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else features_VC.dtype
        pairs = voxels.neighbor_pairs(self.kernel_size)
        sums_VC = _GatherConvolution.apply(features_VC.to(dtype), self.weight_TCC.to(dtype), pairs)
        return sums_VC if self.bias_C is None else sums_VC + self.bias_C


class PatchAttention(nn.Module):
    """Multi-head self-attention within the runs of one order, without position bias."""

    def __init__(self, width: int, num_heads: int, patch_size: int):
        super().__init__()
        if width % num_heads:
            raise ValueError(f"{width} channels are not a multiple of {num_heads} heads; change one of them.")
        self.num_heads, self.patch_size = num_heads, patch_size
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, features_VC: Tensor, voxels: Voxels, row: int) -> Tensor:
        """`row` is that of the order."""
        patches = voxels.patches(self.patch_size)
        order_V, place_V = voxels.order(row)
        # plain indexing: unlike index_select its gradient is summed in a fixed order where a cell is read twice
        qkv_PKX = self.qkv(features_VC)[order_V[patches.place_PK]]
        query_PHKd, key_PHKd, value_PHKd = qkv_PKX.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mask_P11K = None if patches.valid_PK is None else patches.valid_PK[:, None, None]
        mixed_PHKd = F.scaled_dot_product_attention(query_PHKd, key_PHKd, value_PHKd, attn_mask=mask_P11K)
        mixed_XC = mixed_PHKd.transpose(1, 2).flatten(2).flatten(0, 1)
        return self.out(mixed_XC[patches.home_V[place_V]])


class DropPath(nn.Module):
    """In training, leaves a residual branch out for a random share of the cells, and scales it up for the others."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, branch_VC: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return branch_VC
        return branch_VC * F.dropout(branch_VC.new_ones(len(branch_VC), 1), self.rate)


class Block(nn.Module):
    """Positional encoding, attention and feed-forward network, each added to its input; norms come first.

    The encoding is the paper's xCPE: sparse convolution, linear map and norm.
    """

    def __init__(self, width: int, num_heads: int, patch_size: int, mlp_ratio: float, drop_path: float, row: int):
        super().__init__()
        self.row = row
        self.position_conv = SubmanifoldConv3d(width, width)
        self.position_linear, self.position_norm = nn.Linear(width, width), nn.LayerNorm(width)
        self.attention_norm, self.feed_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = PatchAttention(width, num_heads, patch_size)
        hidden = round(width * mlp_ratio)
        self.feed = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.drop_path = DropPath(drop_path)

    def forward(self, features_VC: Tensor, voxels: Voxels) -> Tensor:
        placed_VC = self.position_linear(self.position_conv(features_VC, voxels))
        features_VC = features_VC + self.position_norm(placed_VC)
        mixed_VC = self.attention(self.attention_norm(features_VC), voxels, self.row)
        features_VC = features_VC + self.drop_path(mixed_VC)
        return features_VC + self.drop_path(self.feed(self.feed_norm(features_VC)))


class Stage(nn.Module):
    """Blocks at one resolution, which take the orders in turn."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        patch_size: int,
        mlp_ratio: float,
        drop_paths: Sequence[float],
        num_orders: int,
    ):
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(width, num_heads, patch_size, mlp_ratio, drop_path, row % num_orders)
            for row, drop_path in enumerate(drop_paths)
        )

    def forward(self, features_VC: Tensor, voxels: Voxels) -> Tensor:
        for block in self.blocks:
            features_VC = block(features_VC, voxels)
        return features_VC


def max_over_cells(features_VC: Tensor, parent_V: Tensor, num_parents: int) -> Tensor:
    """Maximum of each coarse cell's fine cells, channel by channel: [num_parents, C]."""
    lowest_XC = features_VC.new_full((num_parents, features_VC.shape[1]), -torch.inf)
    return lowest_XC.scatter_reduce(0, parent_V[:, None].expand_as(features_VC), features_VC, "amax")


class GridPooling(nn.Module):
    """To cells 2^halvings times as large: linear map, maximum over the cells, norm, GELU."""

    def __init__(self, in_channels: int, out_channels: int, halvings: int):
        super().__init__()
        self.halvings = halvings
        self.project, self.norm = nn.Linear(in_channels, out_channels), nn.LayerNorm(out_channels)

    def forward(self, features_VC: Tensor, voxels: Voxels) -> tuple[Tensor, Voxels, Tensor]:
        """Coarse features, coarse cells, and the coarse cell of each fine one, int64 [V]."""
        coarse, parent_V = voxels.coarser(self.halvings)
        pooled_XC = max_over_cells(self.project(features_VC), parent_V, len(coarse))
        return F.gelu(self.norm(pooled_XC)), coarse, parent_V


class GridUnpooling(nn.Module):
    """Back to fine cells: their own features of the way up plus those of the coarse cell around, each mapped."""

    def __init__(self, coarse_channels: int, skip_channels: int, out_channels: int):
        super().__init__()
        self.coarse = nn.Sequential(nn.Linear(coarse_channels, out_channels), nn.LayerNorm(out_channels), nn.GELU())
        self.skip = nn.Sequential(nn.Linear(skip_channels, out_channels), nn.LayerNorm(out_channels), nn.GELU())

    def forward(self, coarse_XC: Tensor, skip_VC: Tensor, parent_V: Tensor) -> Tensor:
        return self.skip(skip_VC) + self.coarse(coarse_XC)[parent_V]


@dataclass
class PointFeatures:
    """What PointTransformer finds: features of the finest cells."""

    cells: PointVoxels
    features_VC: Tensor

    @property
    def of_points_BNC(self) -> Tensor:
        """Features of the given points: those of their cells."""
        return self.features_VC[self.cells.voxel_BN]


class PointTransformer(nn.Module):
    """U-net of serialised attention. The defaults are the paper's.

    Args:
        feature_dim: channels F of a point besides its position.
        grid_size: cells at the first stage, metres.
        orders: names of space_filling.ORDERS.
        shuffle_orders: in training, every stage draws which blocks take which order.
        strides: how many times as large the cells become between stages, powers of two.
        enc_depths, enc_channels, enc_heads: blocks, channels and attention heads of each stage on the way up.
        dec_depths, dec_channels, dec_heads: the same on the way back, finest stage first; one entry fewer.
        patch_size: cells that attend to each other.
        drop_path: rate of the last block; earlier ones rise to it evenly.
        stem_kernel: side of the first convolution, cells.
    """

    def __init__(  # noqa: PLR0913 - the architecture, spelled out
        self,
        feature_dim: int,
        grid_size: float = 0.02,
        orders: Sequence[str] = ORDERS,
        shuffle_orders: bool = True,
        strides: Sequence[int] = (2, 2, 2, 2),
        enc_depths: Sequence[int] = (2, 2, 2, 6, 2),
        enc_channels: Sequence[int] = (32, 64, 128, 256, 512),
        enc_heads: Sequence[int] = (2, 4, 8, 16, 32),
        dec_depths: Sequence[int] = (2, 2, 2, 2),
        dec_channels: Sequence[int] = (64, 64, 128, 256),
        dec_heads: Sequence[int] = (4, 4, 8, 16),
        patch_size: int = 1024,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.3,
        stem_kernel: int = 5,
    ):
        super().__init__()
        _check_lengths(enc_depths, strides, enc_channels, enc_heads, dec_depths, dec_channels, dec_heads)
        _check_values(grid_size, orders, strides, patch_size, drop_path)
        self.grid_size, self.orders, self.shuffle_orders = grid_size, tuple(orders), shuffle_orders

        def stages(depths: Sequence[int], channels: Sequence[int], heads: Sequence[int], rates: list[list[float]]):
            return nn.ModuleList(
                Stage(width, num_heads, patch_size, mlp_ratio, stage_rates, len(orders))
                for width, num_heads, stage_rates, _ in zip(channels, heads, rates, depths, strict=True)
            )

        self.stem = SubmanifoldConv3d(3 + feature_dim, enc_channels[0], stem_kernel, bias=False)
        self.stem_norm = nn.LayerNorm(enc_channels[0])
        self.encoder = stages(enc_depths, enc_channels, enc_heads, drop_path_rates(drop_path, enc_depths))
        self.down = nn.ModuleList(
            GridPooling(narrow, wide, stride.bit_length() - 1)
            for narrow, wide, stride in zip(enc_channels[:-1], enc_channels[1:], strides, strict=True)
        )
        # on the way back the rates fall again, to 0 at the end of the finest stage
        falling = [rates[::-1] for rates in drop_path_rates(drop_path, dec_depths)]
        self.decoder = stages(dec_depths, dec_channels, dec_heads, falling)
        below = [*dec_channels[1:], enc_channels[-1]]
        self.up = nn.ModuleList(
            GridUnpooling(*channels) for channels in zip(below, enc_channels[:-1], dec_channels, strict=True)
        )
        self.out_channels = dec_channels[0] if dec_channels else enc_channels[0]

    def forward(self, points_BN3: Tensor, features_BNF: Tensor) -> PointFeatures:
        """Features [V, out_channels] of the cells of every scene.

        ValueError: points that are not finite, or a scene wider than the grid.
        """
        cells = voxelise(points_BN3, features_BNF, self.grid_size, self.orders)
        voxels = self._arranged(cells.voxels)
        features_VC = F.gelu(self.stem_norm(self.stem(cells.features_VX, voxels)))
        features_VC = self.encoder[0](features_VC, voxels)
        above = []
        for down, stage in zip(self.down, self.encoder[1:], strict=True):
            coarse_VC, coarse, parent_V = down(features_VC, voxels)
            above.append((features_VC, voxels, parent_V))
            voxels = self._arranged(coarse)
            features_VC = stage(coarse_VC, voxels)
        for level in reversed(range(len(above))):
            skip_VC, voxels, parent_V = above[level]
            features_VC = self.decoder[level](self.up[level](features_VC, skip_VC, parent_V), voxels)
        return PointFeatures(cells, features_VC)

    def _arranged(self, voxels: Voxels) -> Voxels:
        return voxels.shuffled() if self.training and self.shuffle_orders else voxels


def drop_path_rates(last: float, depths: Sequence[int]) -> list[list[float]]:
    """Rates rising evenly from 0 to `last` over all blocks, stage by stage."""
    count = sum(depths)
    rates = iter([last * block / max(count - 1, 1) for block in range(count)])
    return [[next(rates) for _ in range(depth)] for depth in depths]


def _check_lengths(
    enc_depths: Sequence[int],
    strides: Sequence[int],
    enc_channels: Sequence[int],
    enc_heads: Sequence[int],
    dec_depths: Sequence[int],
    dec_channels: Sequence[int],
    dec_heads: Sequence[int],
) -> None:
    stages = len(enc_depths)
    wanted = {"enc_channels": (enc_channels, stages), "enc_heads": (enc_heads, stages)}
    wanted |= {"strides": (strides, stages - 1), "dec_depths": (dec_depths, stages - 1)}
    wanted |= {"dec_channels": (dec_channels, stages - 1), "dec_heads": (dec_heads, stages - 1)}
    for name, (values, length) in wanted.items():
        if len(values) != length:
            raise ValueError(
                f"{name} has {len(values)} entries, but enc_depths has {stages}, so it takes {length}; "
                "strides and the way back have one fewer than the stages."
            )
    if min([*enc_depths, *dec_depths], default=0) < 1:
        raise ValueError("enc_depths and dec_depths take at least one block a stage, and at least one stage.")


def _check_values(
    grid_size: float, orders: Sequence[str], strides: Sequence[int], patch_size: int, drop_path: float
) -> None:
    if not 0 < grid_size < float("inf"):
        raise ValueError(f"grid_size is {grid_size}; it must be a positive length in metres.")
    unknown = sorted(set(orders) - set(ORDERS))
    if unknown or not orders:
        raise ValueError(f"orders takes one or more of {', '.join(ORDERS)}, not {unknown or 'none'}.")
    if any(stride < 2 or stride & (stride - 1) for stride in strides):
        raise ValueError(f"strides are {list(strides)}; each must be a power of two, at least 2.")
    if sum(stride.bit_length() - 1 for stride in strides) > BITS:
        raise ValueError(f"strides {list(strides)} make the cells more than 2^{BITS} times as large; take fewer.")
    if patch_size < 1:
        raise ValueError(f"patch_size is {patch_size}; it must be at least 1.")
    if not 0 <= drop_path < 1:
        raise ValueError(f"drop_path is {drop_path}; it must be in [0, 1).")
