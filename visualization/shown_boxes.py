"""Boxes as the viewers draw them: any rotation, a label and a score each, in one frame with the points.

Shapes: K boxes, 8 corners. Metres; a rotation's columns are the box's axes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.spatial.transform import Rotation

# corners of a unit box: the lower face counter-clockwise seen from above, then the upper face above it
_SIGNS_83 = np.array([(x, y, z) for z in (-1, 1) for x, y in ((-1, -1), (1, -1), (1, 1), (-1, 1))], dtype=np.float64)
EDGES = tuple((row + i, row + (i + 1) % 4) for row in (0, 4) for i in range(4)) + tuple((i, i + 4) for i in range(4))
_UPRIGHT = 1e-4  # how far the third axis of an upright box may be from vertical


@dataclass(frozen=True, eq=False)
class ShownBoxes:
    """K boxes: centres, full sizes, rotations (box to world), labels ("" for none), scores (None for none)."""

    centers_K3: np.ndarray
    sizes_K3: np.ndarray
    rotations_K33: np.ndarray
    labels: list[str] = field(default_factory=list)
    scores: list[float | None] = field(default_factory=list)

    def __post_init__(self):
        count = len(self.centers_K3)
        if not self.labels:
            object.__setattr__(self, "labels", [""] * count)
        if not self.scores:
            object.__setattr__(self, "scores", [None] * count)
        sizes = [len(part) for part in (self.sizes_K3, self.rotations_K33, self.labels, self.scores)]
        if any(size != count for size in sizes):
            raise ValueError(f"{count} boxes have {sizes} sizes, rotations, labels and scores; give one to each box.")

    @classmethod
    def from_rows(
        cls, rows: Sequence[Sequence[float]], labels: Sequence[str] = (), scores: Sequence[float | None] = ()
    ) -> "ShownBoxes":
        """Boxes from rows of 6 or 7 numbers: centre, size and heading (radians, counter-clockwise from above)."""
        rows_K7 = np.array([[*row, 0.0][:7] for row in rows], dtype=np.float64).reshape(-1, 7)
        rotations_K33 = Rotation.from_rotvec(rows_K7[:, 6:] * [[0.0, 0.0, 1.0]]).as_matrix()
        return cls(rows_K7[:, :3], rows_K7[:, 3:6], rotations_K33.reshape(-1, 3, 3), list(labels), list(scores))

    def __len__(self) -> int:
        return len(self.centers_K3)

    @property
    def corners_K83(self) -> np.ndarray:
        """Corners [K, 8, 3], in the order of EDGES."""
        offsets_K83 = _SIGNS_83 * self.sizes_K3[:, None] / 2
        return np.einsum("kij,kcj->kci", self.rotations_K33, offsets_K83) + self.centers_K3[:, None]

    @property
    def quaternions_K4(self) -> np.ndarray:
        """Rotations as quaternions x, y, z, w."""
        return Rotation.from_matrix(self.rotations_K33).as_quat() if len(self) else np.zeros((0, 4))

    @property
    def headings_K(self) -> np.ndarray | None:
        """Headings in radians; None where a box does not stand upright."""
        tilts_K = np.linalg.norm(self.rotations_K33[:, :, 2] - [0.0, 0.0, 1.0], axis=1)
        if (tilts_K > _UPRIGHT).any():
            return None
        return np.arctan2(self.rotations_K33[:, 1, 0], self.rotations_K33[:, 0, 0])

    def moved(self, matrix_44: np.ndarray) -> "ShownBoxes":
        """The boxes under a transform that keeps angles (a turn, a scale and a shift), as the points go through it."""
        matrix_44 = np.asarray(matrix_44, dtype=np.float64)
        scale = float(np.cbrt(np.linalg.det(matrix_44[:3, :3])))
        return ShownBoxes(
            self.centers_K3 @ matrix_44[:3, :3].T + matrix_44[:3, 3],
            self.sizes_K3 * scale,
            matrix_44[:3, :3] / scale @ self.rotations_K33,
            self.labels,
            self.scores,
        )

    def texts(self) -> list[str]:
        """What is written beside each box: its label, and its score with two decimals."""
        return [
            " ".join(filter(None, (label, "" if score is None else f"{score:.2f}")))
            for label, score in zip(self.labels, self.scores, strict=True)
        ]

    def first(self, count: int) -> "ShownBoxes":
        """The first `count` boxes."""
        return ShownBoxes(
            self.centers_K3[:count],
            self.sizes_K3[:count],
            self.rotations_K33[:count],
            self.labels[:count],
            self.scores[:count],
        )


def boxes_from_corners(corners_K83: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Centres, sizes and rotations of boxes from their corners: in any order if upright, in that of EDGES if tilted.

    Upright boxes come back with a heading of at most 45 degrees, and the sides along x and y to go with it.

    Raises:
        ValueError: corners that are those of no such box, by the number of the box (from 0).
    """
    found = [_from_corners(corners_83, number) for number, corners_83 in enumerate(corners_K83)]
    parts = list(zip(*found, strict=True)) or [[], [], []]
    shapes = ((-1, 3), (-1, 3), (-1, 3, 3))
    centers, sizes, rotations = (
        np.array(part, dtype=np.float64).reshape(shape) for part, shape in zip(parts, shapes, strict=True)
    )
    return centers, sizes, rotations


def _from_corners(corners_83: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The upright box that 8 corners are those of, else the tilted one."""
    extent = max(float(np.ptp(corners_83, axis=0).max()), 1e-6)
    for center_3, size_3, rotation_33 in (_upright(corners_83, extent), _along_edges(corners_83, extent)):
        made_83 = center_3 + (_SIGNS_83 * size_3 / 2) @ rotation_33.T
        gaps_88 = np.linalg.norm(made_83[:, None] - corners_83[None], axis=-1)
        if max(gaps_88.min(0).max(), gaps_88.min(1).max()) <= 1e-3 * extent:
            return center_3, size_3, rotation_33
    raise ValueError(f"box {number}: its corners are not those of an upright box, nor of a tilted one edge by edge")


def _upright(corners_83: np.ndarray, extent: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The box around 8 corners whose footprint is the smallest among those along a side or a diagonal of them."""
    sides_P2 = (corners_83[:, None, :2] - corners_83[None, :, :2]).reshape(-1, 2)
    sides_P2 = sides_P2[np.linalg.norm(sides_P2, axis=1) > 1e-4 * extent]
    turns_P = np.arctan2(sides_P2[:, 1], sides_P2[:, 0])
    quarter = np.pi / 2
    turns_P = np.concatenate([[0.0], turns_P - quarter * np.round(turns_P / quarter)])
    rotations_P33 = Rotation.from_rotvec(turns_P[:, None] * [[0.0, 0.0, 1.0]]).as_matrix()
    local_P83 = np.einsum("pji,cj->pci", rotations_P33, corners_83)
    spans_P3 = np.ptp(local_P83, axis=1)
    best = int(np.argmin(spans_P3[:, 0] * spans_P3[:, 1] + 1e-6 * extent * spans_P3[:, :2].sum(1)))
    low_3, high_3 = local_P83[best].min(0), local_P83[best].max(0)
    size_3, rotation_33 = high_3 - low_3, rotations_P33[best]
    return rotation_33 @ ((low_3 + high_3) / 2), size_3, rotation_33


def _along_edges(corners_83: np.ndarray, extent: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The box with the edges 0-1, 0-3 and 0-4 of 8 corners; an edge without length stands upright on the others."""
    edges_33 = corners_83[[1, 3, 4]] - corners_83[0]
    size_3 = np.linalg.norm(edges_33, axis=1)
    axes_33 = edges_33 / np.maximum(size_3, 1e-12)[:, None]
    if (size_3 < 1e-6 * extent).sum() == 1:
        flat = int(size_3.argmin())
        axes_33[flat] = np.cross(axes_33[(flat + 1) % 3], axes_33[(flat + 2) % 3])
    if np.abs(axes_33 @ axes_33.T - np.eye(3)).max() > 1e-3:
        return corners_83.mean(0), np.zeros(3), np.eye(3)  # no box, which shows where it is compared
    left_33, _, right_33 = np.linalg.svd(axes_33.T)  # the rotation, or reflection, next to the axes
    rotation_33 = left_33 @ right_33
    if np.linalg.det(rotation_33) < 0:  # an exporter that counts the other way round; the corners are the same
        rotation_33[:, 2] *= -1
    return corners_83.mean(0), size_3, rotation_33
