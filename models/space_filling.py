"""Orders of grid cells along space-filling curves: Z-order (Morton) and Hilbert, each also with x and y exchanged.

A code is a place on the curve through a cube of 2^bits cells a side: an int64 of 3 * bits bits, each cell another one.
The leading 3 * (bits - s) bits of a cell's code are the code of the cell 2^s times as large around it, so that codes
of a coarser grid are shifted codes.

Shapes: V cells, O orders.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

ORDERS = ("z", "z-trans", "hilbert", "hilbert-trans")
MAX_BITS = 20  # 60 bits a code


def curve_codes(grid_V3: Tensor, bits: int, orders: Sequence[str]) -> Tensor:
    """Codes int64 [O, V] of cells, one row for each name in `orders`.

    Args:
        grid_V3: int64 coordinates in [0, 2^bits).
        bits: 1 to 20.

    Raises:
        ValueError: an unknown order.
    """
    assert 1 <= bits <= MAX_BITS
    rows = []
    for order in orders:
        if order not in ORDERS:
            raise ValueError(f"There is no order {order!r}; choose of {', '.join(ORDERS)}.")
        curve, _, transposed = order.partition("-")
        cells_V3 = grid_V3[:, [1, 0, 2]] if transposed else grid_V3
        rows.append(z_codes(cells_V3) if curve == "z" else hilbert_codes(cells_V3, bits))
    return torch.stack(rows)


def z_codes(grid_V3: Tensor) -> Tensor:
    """Bits of x, y and z in turn, from the highest; x leads."""
    x_V, y_V, z_V = (_spread(axis_V) for axis_V in grid_V3.unbind(1))
    return x_V << 2 | y_V << 1 | z_V


def hilbert_codes(grid_V3: Tensor, bits: int) -> Tensor:
    """Places on a Hilbert curve, by Skilling's transform (Programming the Hilbert curve, AIP 707, 2004).

    Cells that follow each other on the curve share a face.
    """
    axes = list(grid_V3.unbind(1))
    for level in range(bits - 1, 0, -1):  # undo the turns of the sub-cubes, from the largest
        below = (1 << level) - 1
        for index in range(3):
            upper_V = (axes[index] >> level & 1).bool()
            exchanged_V = torch.where(upper_V, 0, (axes[0] ^ axes[index]) & below)
            axes[0] = axes[0] ^ torch.where(upper_V, below, exchanged_V)
            axes[index] = axes[index] ^ exchanged_V if index else axes[0]
    axes[1] = axes[1] ^ axes[0]  # Gray code
    axes[2] = axes[2] ^ axes[1]
    flips_V = torch.zeros_like(axes[2])
    for level in range(bits - 1, 0, -1):
        flips_V = flips_V ^ (axes[2] >> level & 1) * ((1 << level) - 1)
    return z_codes(torch.stack([axis_V ^ flips_V for axis_V in axes], 1))


def _spread(values_V: Tensor) -> Tensor:
    """Two zero bits between the bits of numbers below 2^21."""
    for shift, mask in (
        (32, 0x1F00000000FFFF),
        (16, 0x1F0000FF0000FF),
        (8, 0x100F00F00F00F00F),
        (4, 0x10C30C30C30C30C3),
        (2, 0x1249249249249249),
    ):
        values_V = (values_V | values_V << shift) & mask
    return values_V
