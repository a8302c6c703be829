"""Point Transformer V3 in front of the tokens: a cloud of cells with learned features in place of the raw points.

Furthest cells become tokens, and a token pools the features of the cells in the ball around it, as the furthest
points of PointNet++ do with raw points; what follows is the same for both.

Shapes: B scenes, N points, V cells of all scenes, X cells of the fullest scene, F extra channels, C channels.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..point_transformer import PointTransformer
from ..voxels import BITS, Voxels

BACKBONES = ("pointnet2", "ptv3")
_CELL_MASK = (1 << 3 * BITS) - 1
_MIXER = 0x9E3779B97F4B  # odd, near 2^48 over the golden ratio: multiplication scatters numbers, and none coincide


def point_transformer_options(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of PointTransformer but feature_dim: its defaults, and `chosen` in their place.

    ValueError: `chosen` has a name that PointTransformer does not know.
    """
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(PointTransformer).parameters.items()
        if name != "feature_dim"
    }
    unknown = sorted(set(chosen) - set(defaults))
    if unknown:
        raise ValueError(f"ptv3 has the unknown key {unknown[0]!r}; known keys: {', '.join(defaults)}.")
    return defaults | dict(chosen)


class PointTransformerCloud(nn.Module):
    """Points to the cells of Point Transformer V3, batched.

    Args:
        feature_dim: channels F of a point besides its position.
        options: other arguments of PointTransformer by name; those left out are the paper's.
    """

    def __init__(self, feature_dim: int, options: dict[str, Any]):
        super().__init__()
        self.network = PointTransformer(feature_dim, **options)
        self.out_channels = self.network.out_channels
        self.compute_dtype = torch.float32

    def forward(self, points_BN3: Tensor, features_BNF: Tensor) -> tuple[Tensor, Tensor]:
        """Mean positions [B, X, 3] and features [B, X, C] of the cells; a scene's first one repeats at its end."""
        low = self.compute_dtype != torch.float32
        with torch.autocast(points_BN3.device.type, self.compute_dtype if low else None, enabled=low):
            found = self.network(points_BN3, features_BNF)
        cell_BX = scattered_cells(found.cells.voxels)
        return found.cells.xyz_V3[cell_BX], found.features_VC[cell_BX].float()


def scattered_cells(voxels: Voxels) -> Tensor:
    """Indices int64 [B, X] of each scene's cells in an order without direction, filled up with the scene's first one.

    Balls take the first points that they meet: in the order of the grid these would all lie on one side.
    """
    mixed_V = (voxels.keys_V & _CELL_MASK) * _MIXER & _CELL_MASK
    order_V = (voxels.scene_V << 3 * BITS | mixed_V).argsort()
    counts_B1 = torch.tensor(voxels.counts, device=order_V.device)[:, None]
    first_B1 = counts_B1.cumsum(0) - counts_B1
    slot_X = torch.arange(max(voxels.counts), device=order_V.device)
    return order_V[first_B1 + torch.where(slot_X < counts_B1, slot_X, 0)]
