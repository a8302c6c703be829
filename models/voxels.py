"""Occupied cells of a grid over scenes: quantised points, neighbours, orders along curves, patches, coarser grids.

What point_transformer.py computes with, in plain torch: sorted keys and binary search stand for the hash table of
sparse-convolution libraries. Cells are sorted by scene, then by x, y and z; nothing depends on the order of the
points, nor on the other scenes of a batch.

Shapes: B scenes, N points a scene, V cells of all scenes, F channels, O orders, P patches, K cells a patch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .space_filling import curve_codes

BITS = 16  # of a coordinate in the finest grid: 65,528 cells are used, 1.3 km at 2 cm
_MARGIN = 8  # the last coordinates are never used: neighbours beyond the lowest corner wrap around to them
_MAX_SCENES = 1 << (63 - 3 * BITS)


@dataclass
class Patches:
    """Runs of K cells along an order, the attention windows; the same for every order.

    A scene's last run is filled up with the cells before it (which are not answered for twice); a scene of fewer than
    K cells is one run, the rest of which is masked.
    """

    place_PK: Tensor  # int64, places in the order
    valid_PK: Tensor | None  # bool; None where every run is full
    home_V: Tensor  # int64, where in the flattened runs each place is answered


class Voxels:
    """The cells of a batch at one resolution.

    Args:
        keys_V: scene and coordinates in one int64 (see `pack`), sorted, each once.
        codes_OV: places along the curves, int64, within a scene.
        num_scenes: B.
        bits: of a coordinate at this resolution.
    """

    def __init__(self, keys_V: Tensor, codes_OV: Tensor, num_scenes: int, bits: int):
        self.keys_V, self.codes_OV, self.bits = keys_V, codes_OV, bits
        self.scene_V, self.grid_V3 = unpack(keys_V)
        self.counts = torch.bincount(self.scene_V, minlength=num_scenes).tolist()
        self._orders: dict[int, tuple[Tensor, Tensor]] = {}
        self._patches: dict[int, Patches] = {}
        self._pairs: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def __len__(self) -> int:
        return len(self.keys_V)

    def order(self, row: int) -> tuple[Tensor, Tensor]:
        """Cells along the curve of `row`, scene after scene, and each cell's place in that: int64 [V] each."""
        if row not in self._orders:
            order_V = (self.scene_V << 3 * BITS | self.codes_OV[row]).argsort()
            places_V = torch.arange(len(order_V), device=order_V.device)
            self._orders[row] = order_V, torch.empty_like(order_V).scatter_(0, order_V, places_V)
        return self._orders[row]

    def patches(self, patch_size: int) -> Patches:
        """Runs of `patch_size` cells, or of all cells of the largest scene where that is less."""
        if patch_size not in self._patches:
            self._patches[patch_size] = cut_patches(self.scene_V, self.counts, patch_size)
        return self._patches[patch_size]

    def neighbor_pairs(self, kernel_size: int) -> list[tuple[Tensor, Tensor]]:
        """For each offset of the first half of a cube of kernel_size^3 cells: cells, and their neighbours there.

        Offsets run over x, y, z, z fastest, each from -(kernel_size // 2); the second half is the first one, mirrored
        and with the two exchanged. Int64 pairs; cells without that neighbour are left out.
        """
        if kernel_size not in self._pairs:
            self._pairs[kernel_size] = self._find_neighbors(kernel_size)
        return self._pairs[kernel_size]

    def _find_neighbors(self, kernel_size: int) -> list[tuple[Tensor, Tensor]]:
        half = kernel_size // 2
        assert half <= _MARGIN
        reach_k = torch.arange(-half, half + 1, device=self.keys_V.device)
        offset_H3 = torch.cartesian_prod(reach_k, reach_k, reach_k)[: kernel_size**3 // 2]
        step_H = (offset_H3 * torch.tensor([1 << 2 * BITS, 1 << BITS, 1], device=offset_H3.device)).sum(1)
        wanted_HV = step_H[:, None] + self.keys_V  # beyond an edge it lands in a margin, which holds no cells
        found_HV = torch.searchsorted(self.keys_V, wanted_HV).clamp(max=len(self) - 1)
        there_HV = self.keys_V[found_HV] == wanted_HV
        sizes = there_HV.sum(1).tolist()
        cells = there_HV.nonzero()[:, 1].split(sizes)
        return list(zip(cells, found_HV[there_HV].split(sizes), strict=True))

    def coarser(self, halvings: int) -> tuple["Voxels", Tensor]:
        """The grid with cells 2^halvings times as large, and the coarse cell, int64 [V], of each of these."""
        keys_C, parent_V = pack(self.scene_V, self.grid_V3 >> halvings).unique(return_inverse=True)
        codes_OC = self.codes_OV.new_empty(len(self.codes_OV), len(keys_C))
        codes_OC[:, parent_V] = self.codes_OV >> 3 * halvings  # all cells of a coarse one agree
        return Voxels(keys_C, codes_OC, len(self.counts), self.bits - halvings), parent_V

    def shuffled(self) -> "Voxels":
        """Marks the orders as exchanged at random, by torch's generator of the CPU; returns self."""
        self.codes_OV = self.codes_OV[torch.randperm(len(self.codes_OV)).to(self.codes_OV.device)]
        self._orders.clear()
        return self


@dataclass
class PointVoxels:
    """Points put into cells."""

    voxels: Voxels
    xyz_V3: Tensor  # mean position of a cell's points, in their frame and unit
    features_VX: Tensor  # X = 3 + F: mean offset from the cell's centre, in cells, and mean features
    voxel_BN: Tensor  # int64, the cell of each point


def voxelise(points_BN3: Tensor, features_BNF: Tensor, grid_size: float, orders: Sequence[str]) -> PointVoxels:
    """Cells of `grid_size`, counted from each scene's lowest corner, and the means of what lies in them.

    ValueError: points that are not finite, or a scene wider than 65,528 cells.
    """
    low_B13 = points_BN3.amin(1, keepdim=True)
    cells_BN3 = (points_BN3 - low_B13) / grid_size
    widest = float(cells_BN3.amax())
    if not widest < (1 << BITS) - _MARGIN:
        raise ValueError(
            f"A scene is {widest * grid_size:.4g} m wide, more than {(1 << BITS) - _MARGIN} cells of {grid_size} m; "
            "give points in metres without outliers, or raise grid_size."
        )
    num_scenes, num_points, _ = points_BN3.shape
    assert num_scenes < _MAX_SCENES
    scene_BN = torch.arange(num_scenes, device=points_BN3.device)[:, None].expand(-1, num_points)
    grid_BN3 = cells_BN3.floor().long()
    keys_V, voxel_BN = pack(scene_BN, grid_BN3).unique(return_inverse=True)
    voxels = Voxels(keys_V, curve_codes(unpack(keys_V)[1], BITS, orders), num_scenes, BITS)
    # sums in double precision, so that their rounding, which depends on the order, is lost in the result
    values_BNX = torch.cat([points_BN3, cells_BN3 - grid_BN3 - 0.5, features_BNF], -1).double().flatten(0, 1)
    sums_VX = values_BNX.new_zeros(len(keys_V), values_BNX.shape[1]).index_add_(0, voxel_BN.flatten(), values_BNX)
    size_V1 = torch.bincount(voxel_BN.flatten(), minlength=len(keys_V))[:, None]
    means_VX = (sums_VX / size_V1).to(points_BN3.dtype)
    return PointVoxels(voxels, means_VX[:, :3], means_VX[:, 3:], voxel_BN)


def pack(scene: Tensor, grid: Tensor) -> Tensor:
    """Scene and coordinates, last dimension 3, in one int64: 15, 16, 16 and 16 bits."""
    x, y, z = grid.unbind(-1)
    return scene << 3 * BITS | x << 2 * BITS | y << BITS | z


def unpack(keys_V: Tensor) -> tuple[Tensor, Tensor]:
    """Scene [V] and coordinates [V, 3]."""
    shift_3 = torch.tensor([2 * BITS, BITS, 0], device=keys_V.device)
    return keys_V >> 3 * BITS, keys_V[:, None] >> shift_3 & (1 << BITS) - 1


def cut_patches(scene_V: Tensor, counts: Sequence[int], patch_size: int) -> Patches:
    """Runs along any order that goes scene after scene.

    Args:
        scene_V: the scene of each place, ascending.
        counts: cells of each scene.
    """
    device = scene_V.device
    patch_size = min(patch_size, max(counts))
    counts_B = torch.tensor(counts, device=device)
    first_B = counts_B.cumsum(0) - counts_B
    runs_B = (counts_B + patch_size - 1) // patch_size
    first_run_B = runs_B.cumsum(0) - runs_B
    spare_B = (counts_B - patch_size).clamp(min=0)  # where the last full run starts

    scene_P = torch.repeat_interleave(torch.arange(len(counts), device=device), runs_B)
    number_P = torch.arange(len(scene_P), device=device) - first_run_B[scene_P]
    start_P = torch.minimum(number_P * patch_size, spare_B[scene_P])
    local_PK = start_P[:, None] + torch.arange(patch_size, device=device)
    last_P1 = counts_B[scene_P][:, None] - 1
    place_PK = first_B[scene_P][:, None] + torch.minimum(local_PK, last_P1)
    valid_PK = None if min(counts) >= patch_size else local_PK <= last_P1

    local_V = torch.arange(len(scene_V), device=device) - first_B[scene_V]
    run_V = local_V // patch_size
    slot_V = local_V - torch.minimum(run_V * patch_size, spare_B[scene_V])
    return Patches(place_PK, valid_PK, (first_run_B[scene_V] + run_V) * patch_size + slot_V)
