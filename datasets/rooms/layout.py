"""A furnished room before it is meshed, and the free floor in it. Frame as in placement.py.

P placed objects, M free cells, X and Y cells of the floor's grid.
"""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from .placement import Furnisher, Placed
from .programmes import KIND_WEIGHTS, PROGRAMMES

MIN_PLACED = 14
CELL = 0.1  # metres, grid of free space
BODY = 0.2  # metres, radius of a person walking


@dataclass
class Layout:
    """A furnished room before it is meshed."""

    kind: str
    size_3: np.ndarray
    placed: list[Placed]
    lows_P3: np.ndarray
    highs_P3: np.ndarray


def free_cells(
    size_3: np.ndarray, lows_P3: np.ndarray, highs_P3: np.ndarray, radius: float, height: float
) -> np.ndarray:
    """The largest connected part of the floor on which a person of that radius can stand, as a grid [X, Y] of bool.

    Cells are CELL metres wide, the first one at the room's corner of least x and y. Boxes that begin above `height`
    do not stand in the way.
    """
    counts = np.maximum((size_3[:2] / CELL).astype(int), 1)
    x, y = (np.arange(count) * CELL + CELL / 2 - side / 2 for count, side in zip(counts, size_3[:2], strict=True))
    free_XY = (np.abs(x)[:, None] < size_3[0] / 2 - radius) & (np.abs(y)[None] < size_3[1] / 2 - radius)
    for low_3, high_3 in zip(lows_P3, highs_P3, strict=True):
        if low_3[2] < height:
            in_x = (x > low_3[0] - radius) & (x < high_3[0] + radius)
            in_y = (y > low_3[1] - radius) & (y < high_3[1] + radius)
            free_XY[np.ix_(in_x, in_y)] = False
    labels_XY, count = ndimage.label(free_XY)  # type: ignore[misc]
    if count == 0:
        return np.zeros_like(free_XY)
    sizes = np.bincount(labels_XY.reshape(-1))[1:]
    return labels_XY == int(sizes.argmax()) + 1


def cell_centres(size_3: np.ndarray, free_XY: np.ndarray) -> np.ndarray:
    """World x, y of the free cells, [M, 2]."""
    return np.argwhere(free_XY) * CELL + CELL / 2 - size_3[:2] / 2


def _doors_are_reachable(layout: Layout, free_M2: np.ndarray) -> bool:
    for thing in layout.placed:
        if thing.item.label == "door":
            inward_2 = np.array([np.cos(thing.yaw), np.sin(thing.yaw)])
            if (
                len(free_M2) == 0
                or np.linalg.norm(free_M2 - (thing.position_3[:2] + inward_2 * 0.5), axis=1).min() > 0.4
            ):
                return False
    return True


def sample_layout(rng: np.random.Generator) -> Layout | None:
    """Draw one room; None where it came out too empty or too full to walk through, so that the caller draws again."""
    kinds = list(KIND_WEIGHTS)
    kind = kinds[int(rng.choice(len(kinds), p=list(KIND_WEIGHTS.values())))]
    programme = next(programme for programme in PROGRAMMES if programme.kind == kind)
    builder = Furnisher(programme, rng)
    builder.furnish(programme.entries)
    layout = Layout(kind, builder.size_3, builder.placed, builder.lows_P3, builder.highs_P3)
    if len(layout.placed) < MIN_PLACED:
        return None
    free_M2 = cell_centres(layout.size_3, free_cells(layout.size_3, layout.lows_P3, layout.highs_P3, BODY, 1.6))
    if len(free_M2) * CELL**2 < 0.1 * layout.size_3[0] * layout.size_3[1] or not _doors_are_reachable(layout, free_M2):
        return None
    return layout
