"""Training augmentation of a scene: flips, quarter turns, small turns about z, scale; boxes follow exactly.

Everything turns about the origin of the frame it is given: use the model frame. Axis-aligned boxes stay axis-aligned:
after a small turn they are fitted again to their object's outline instead of growing to enclose the turned box.

Shapes: N points, K boxes, P points of an outline.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.spatial import ConvexHull, QhullError

_FEWEST_POINTS = 20  # an object with fewer points is not fitted again: its turned box is enclosed


@dataclass(frozen=True)
class Augmentation:
    """Ranges that `draw` samples from."""

    flip_x: bool = True
    flip_y: bool = True
    quarter_turns: bool = True
    max_angle: float = math.radians(5.0)
    scale: tuple[float, float] = (0.9, 1.1)

    def draw(self, rng: np.random.Generator) -> "Transform":
        """One transform. The same number of random values is drawn whatever is switched on.

        Of an angle beyond 45 degrees the whole quarter turns, which are exact for boxes, are counted as such.
        """
        flips = rng.random(2) < 0.5
        turns, angle, scale = rng.integers(4), rng.uniform(-self.max_angle, self.max_angle), rng.uniform(*self.scale)
        quarters = round(angle / (math.pi / 2))
        return Transform(
            flip_x=bool(flips[0]) and self.flip_x,
            flip_y=bool(flips[1]) and self.flip_y,
            quarter_turns=((int(turns) if self.quarter_turns else 0) + quarters) % 4,
            angle=float(angle - quarters * (math.pi / 2)),
            scale=float(scale),
        )


@dataclass(frozen=True)
class Transform:
    """Flips first, then quarter turns and `angle` (radians, counter-clockwise seen from above), then the scale."""

    flip_x: bool = False
    flip_y: bool = False
    quarter_turns: int = 0
    angle: float = 0.0
    scale: float = 1.0

    def points(self, points_N3: np.ndarray) -> np.ndarray:
        """Transformed positions, float32."""
        return (points_N3.astype(np.float64) @ self._matrix(self.angle).T * self.scale).astype(np.float32)

    def _matrix(self, angle: float) -> np.ndarray:
        # whole quarter turns by table, so that they are exact
        cos, sin = ((1, 0), (0, 1), (-1, 0), (0, -1))[self.quarter_turns % 4]
        quarter_33 = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]], dtype=np.float64)
        turn_33 = np.array([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, 1]])
        flip_33 = np.diag([-1.0 if self.flip_x else 1.0, -1.0 if self.flip_y else 1.0, 1.0])
        return turn_33 @ quarter_33 @ flip_33

    def oriented_boxes(self, boxes_K7: np.ndarray) -> np.ndarray:
        """Transformed boxes with their headings: exact for any box."""
        moved_K7 = np.array(boxes_K7, dtype=np.float64)
        moved_K7[:, :3] = moved_K7[:, :3] @ self._matrix(self.angle).T * self.scale
        moved_K7[:, 3:6] *= self.scale
        heading_K = moved_K7[:, 6]
        if self.flip_x:
            heading_K = math.pi - heading_K
        if self.flip_y:
            heading_K = -heading_K
        heading_K = heading_K + self.quarter_turns * math.pi / 2 + self.angle
        moved_K7[:, 6] = (heading_K + math.pi) % (2 * math.pi) - math.pi
        return moved_K7.astype(np.float32)

    def axis_aligned_boxes(self, boxes_K7: np.ndarray, outlines: Sequence[np.ndarray | None]) -> np.ndarray:
        """Transformed boxes of heading 0, fitted again to the objects' outlines after a small turn.

        Args:
            boxes_K7: heading 0, before the transform.
            outlines: what `object_outlines` says of the same objects in the same frame. Where it says None, the turned
                box is enclosed.

        What a box reaches beyond its object's points (prepared clouds are thinned) is kept on every side.
        """
        boxes_K7 = np.asarray(boxes_K7, dtype=np.float64).reshape(-1, 7)
        flip_33 = Transform(self.flip_x, self.flip_y, self.quarter_turns)._matrix(0.0)
        moved_K7 = np.zeros_like(boxes_K7)
        moved_K7[:, :3] = boxes_K7[:, :3] @ flip_33.T
        moved_K7[:, 3:6] = boxes_K7[:, 3:6] @ np.abs(flip_33).T
        if self.angle:
            cos, sin = math.cos(self.angle), math.sin(self.angle)
            turn_22 = np.array([[cos, -sin], [sin, cos]])
            for box_7, outline_P2 in zip(moved_K7, outlines, strict=True):
                _turn_box(box_7, turn_22, None if outline_P2 is None else outline_P2 @ flip_33[:2, :2].T)
        moved_K7[:, :6] *= self.scale
        return moved_K7.astype(np.float32)


def _turn_box(box_7: np.ndarray, turn_22: np.ndarray, outline_P2: np.ndarray | None) -> None:
    """Turn one box about the origin in place, keeping its heading 0."""
    if outline_P2 is None:
        box_7[:2] = turn_22 @ box_7[:2]
        box_7[3:5] = np.abs(turn_22) @ box_7[3:5]
        return
    turned_P2 = outline_P2 @ turn_22.T
    low_margin_2 = outline_P2.min(0) - (box_7[:2] - box_7[3:5] / 2)
    high_margin_2 = (box_7[:2] + box_7[3:5] / 2) - outline_P2.max(0)
    low_2, high_2 = turned_P2.min(0) - low_margin_2, turned_P2.max(0) + high_margin_2
    box_7[:2], box_7[3:5] = (low_2 + high_2) / 2, high_2 - low_2


def object_outlines(
    points_N3: np.ndarray, instance_ids_N: np.ndarray, object_ids_K: np.ndarray
) -> list[np.ndarray | None]:
    """Convex outline [P, 2] of each object seen from above; None for an object of too few points to trust.

    The outline has the extents of all points under any turn about z, so it is made once a scene and used every time.
    """
    order_N = np.argsort(instance_ids_N, kind="stable")
    sorted_N = instance_ids_N.take(order_N)
    labelled = int(np.searchsorted(sorted_N, 0))  # what is before has no object
    sorted_N = sorted_N[labelled:]
    sorted_N2 = points_N3[:, :2].take(order_N[labelled:], axis=0).astype(np.float64)
    outlines: list[np.ndarray | None] = []
    for object_id in object_ids_K:
        low, high = np.searchsorted(sorted_N, [object_id, object_id + 1])
        own_P2 = sorted_N2[low:high]
        if len(own_P2) < _FEWEST_POINTS:
            outlines.append(None)
            continue
        try:
            outlines.append(own_P2[ConvexHull(own_P2).vertices])
        except QhullError:  # all points on one line have no hull; they are few enough to keep
            outlines.append(own_P2)
    return outlines
