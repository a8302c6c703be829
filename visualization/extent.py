"""Where a room is, whatever stray points a reconstruction left around it. Metres.

Shapes: C corners of boxes.
"""

import numpy as np

from ..datasets.scene import Scene

_PERCENTILES = (0.2, 99.8)
_EDGE = 0.05  # of the size: how far beyond these percentiles a room's own points may lie
_BOXES = 0.5  # of the size: how far boxes may widen it; an answer far off must not make the room a dot


def room_extent(scene: Scene, corners_C3: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest corner of a scene without its stray points, and of the boxes shown in it; world, float64.

    Where no point is stray it is the extent of all of them.

    Raises:
        ValueError: a scene without points.
    """
    points_N3 = scene.points_N3
    if not len(points_N3):
        raise ValueError(f"Scene {scene.scene_id} has no points; check the scan file.")
    inner_low_3, inner_high_3 = np.percentile(points_N3, _PERCENTILES, axis=0).astype(np.float64)
    size_3 = np.maximum(inner_high_3 - inner_low_3, 1e-3)
    low_3 = np.maximum(points_N3.min(0), inner_low_3 - _EDGE * size_3)
    high_3 = np.minimum(points_N3.max(0), inner_high_3 + _EDGE * size_3)
    if corners_C3 is not None and len(corners_C3):
        least_3, most_3 = low_3 - _BOXES * size_3, high_3 + _BOXES * size_3
        low_3 = np.minimum(low_3, np.clip(corners_C3.min(0), least_3, most_3))
        high_3 = np.maximum(high_3, np.clip(corners_C3.max(0), least_3, most_3))
    return low_3, high_3
