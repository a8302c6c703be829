"""Labelled vertices of a scan -> Scene: what every source of ScanNet's scans shares.

Shapes: V vertices, N points kept, K objects.
"""

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..utils.labels import BOXLESS_NYU40_IDS, class_of_nyu40
from .frames import Views
from .scene import Scene, floor_centre

GREY = 128  # every channel of every point, where a source has no colours
_ROWS = 16_384
_ENDS = (np.argmin, np.argmax)


@dataclass(frozen=True)
class LabelledObject:
    """One object with a box (float32 [7], world frame)."""

    object_id: int
    label: str
    class_id: int
    box_7: np.ndarray


@dataclass
class LabelledCloud:
    """All vertices of one scan; `raw_V3` and `world_V3` are float32 metres before and after the axis alignment."""

    scene_id: str
    raw_V3: np.ndarray
    world_V3: np.ndarray
    colors_V3: np.ndarray  # uint8
    instance_ids_V: np.ndarray  # int32 objectId, -1 where unlabelled
    nyu40_V: np.ndarray  # uint8, 0 where unlabelled
    axis_align_44: np.ndarray
    raw_frame_known: bool = True

    def to_scene(
        self, objects: Sequence[LabelledObject], views: Views, notes: list[str], *, max_points: int, seed: int
    ) -> Scene:
        """The scene, thinned to `max_points` by a choice that the seed and the scene's name determine."""
        rng = np.random.default_rng([seed, zlib.crc32(self.scene_id.encode())])
        kept_N = keep_points(self.raw_V3, self.world_V3, max_points, rng)
        return Scene(
            scene_id=self.scene_id,
            points_N3=self.world_V3[kept_N],
            colors_N3=self.colors_V3[kept_N],
            instance_ids_N=self.instance_ids_V[kept_N],
            nyu40_N=self.nyu40_V[kept_N],
            object_ids_K=np.array([thing.object_id for thing in objects], dtype=np.int32),
            object_labels=[thing.label for thing in objects],
            class_ids_K=np.array([thing.class_id for thing in objects], dtype=np.int32),
            boxes_K7=np.stack([thing.box_7 for thing in objects]) if objects else np.zeros((0, 7), np.float32),
            axis_align_44=self.axis_align_44,
            origin_3=floor_centre(self.world_V3),
            frames=views.frames,
            notes=[*notes, *views.notes],
            vertex_ids_N=kept_N.astype(np.int32),
            num_vertices=len(self.world_V3),
            raw_frame_known=self.raw_frame_known,
            pictures=views.pictures,
        )


def read_axis_alignment(path: Path) -> np.ndarray | None:
    """The 4x4 `axisAlignment` of `<scene_id>.txt`; None where the file or the line is absent."""
    if not path.exists():
        return None
    match = re.search(r"^\s*axisAlignment\s*=(.*)$", path.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    if match is None:
        return None
    return rigid_matrix(match[1].split(), f"axisAlignment in {path}")


def rigid_matrix(numbers: Sequence[float] | Sequence[str], what: str) -> np.ndarray:
    """16 row-major numbers as a 4x4 rigid transform, float64; ValueError, which begins with `what`, where not."""
    try:
        matrix_44 = np.array(numbers, dtype=np.float64).reshape(4, 4)
    except (TypeError, ValueError):
        raise ValueError(f"{what} is not 16 numbers; copy the file again.") from None
    rotation_33 = matrix_44[:3, :3]
    if not np.isfinite(matrix_44).all() or np.abs(rotation_33 @ rotation_33.T - np.eye(3)).max() > 1e-2:
        raise ValueError(f"{what} is not a rigid transform; copy the file again.")
    return matrix_44


def transform(points_N3: np.ndarray, matrix_44: np.ndarray) -> np.ndarray:
    """Points moved by a 4x4 transform, computed in float64, float32 out."""
    moved_N3 = np.empty(points_N3.shape, dtype=np.float32)
    for start in range(0, len(points_N3), _ROWS):  # in pieces that fit the cache: three times faster for millions
        part_N3 = points_N3[start : start + _ROWS].astype(np.float64)
        moved_N3[start : start + _ROWS] = part_N3 @ matrix_44[:3, :3].T + matrix_44[:3, 3]
    return moved_N3


def instance_boxes(points_V3: np.ndarray, instance_ids_V: np.ndarray) -> dict[int, np.ndarray]:
    """Box (centre, size, heading 0; float32 [7]) of every instance id >= 0 from the extents of its points."""
    order = np.argsort(instance_ids_V, kind="stable")
    order = order[np.searchsorted(instance_ids_V[order], 0) :]
    if order.size == 0:
        return {}
    ids, starts = np.unique(instance_ids_V[order], return_index=True)
    low_K3 = np.minimum.reduceat(points_V3[order], starts, axis=0)
    high_K3 = np.maximum.reduceat(points_V3[order], starts, axis=0)
    boxes_K7 = np.concatenate([(low_K3 + high_K3) / 2, high_K3 - low_K3, np.zeros((len(ids), 1))], axis=1)
    return {int(number): box_7 for number, box_7 in zip(ids, boxes_K7.astype(np.float32), strict=True)}


def furniture(boxes: dict[int, np.ndarray], labels: dict[int, str], label_map: dict[str, int]) -> list[LabelledObject]:
    """Objects without those of structure and of labels that stand for nothing (NYU40 id 0)."""
    objects = []
    for object_id, box_7 in boxes.items():
        nyu40 = label_map[labels[object_id]]
        if nyu40 not in BOXLESS_NYU40_IDS:
            objects.append(LabelledObject(object_id, labels[object_id], class_of_nyu40(nyu40), box_7))
    return objects


def keep_points(raw_V3: np.ndarray, world_V3: np.ndarray, max_points: int, rng: np.random.Generator) -> np.ndarray:
    """Indices of at most `max_points` points, in order, by a uniform choice.

    The outermost points along each axis of both frames are always kept, so that the extents of the cached cloud are
    those of the full one in either frame.
    """
    count = len(raw_V3)
    if count <= max_points:
        return np.arange(count)
    outermost = np.unique(np.concatenate([end(cloud, axis=0) for cloud in (raw_V3, world_V3) for end in _ENDS]))
    rest = np.setdiff1d(np.arange(count), outermost, assume_unique=True)
    chosen = rng.choice(rest, size=max(0, max_points - len(outermost)), replace=False)
    return np.sort(np.concatenate([outermost, chosen]))
