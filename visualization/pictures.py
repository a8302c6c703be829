"""Pictures of scenes with boxes drawn in: what the report, `infer` and the README show.

Shapes: N points, K boxes, H rows, W columns.
"""

import base64
import io
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ..datasets.scene import Scene
from ..utils.boxes import corners_3d
from ..utils.camera import Camera, look_at, pinhole
from ..utils.render import draw_boxes
from ..utils.splat import splat
from .extent import room_extent
from .palette import Color

# What stands between the camera and the room is left out: near walls, and everything above this share of the height.
_WALL_MARGIN = 0.2
_CEILING_SHARE = 0.92
_DIRECTION_3 = np.array([-0.62, -0.62, 0.95])  # from the room to the camera
_LOOKED_AT_SHARE = 0.3  # of the height
_FIELD_OF_VIEW = 55.0  # degrees
_MARGIN = 1.05


def overview(
    scene: Scene, width: int = 640, height: int = 480, corners_C3: np.ndarray | None = None
) -> tuple[np.ndarray, Camera]:
    """A doll's-house view of a room from above one corner, near walls and ceiling cut away: picture and camera.

    Args:
        corners_C3: of boxes that will be drawn in, world frame; the room and they are in the picture.
    """
    room_low_3, room_high_3 = room_extent(scene)
    low_3, high_3 = room_extent(scene, corners_C3)
    size_3 = np.maximum(high_3 - low_3, 0.1)
    target_3 = (low_3 + high_3) / 2
    target_3[2] = low_3[2] + _LOOKED_AT_SHARE * size_3[2]
    direction_3 = _DIRECTION_3 / np.linalg.norm(_DIRECTION_3)
    matrix_33 = pinhole(width, height, _FIELD_OF_VIEW)
    corners_83 = low_3 + np.array(list(itertools.product((0.0, 1.0), repeat=3))) * size_3
    distance = fitting_distance(corners_83 - target_3, -direction_3, matrix_33[0, 0], width, height)
    eye_3 = target_3 + direction_3 * distance
    kept_N = (
        (scene.points_N3[:, 0] > room_low_3[0] + _WALL_MARGIN)
        & (scene.points_N3[:, 1] > room_low_3[1] + _WALL_MARGIN)
        & (scene.points_N3[:, 2] < room_low_3[2] + _CEILING_SHARE * max(room_high_3[2] - room_low_3[2], 0.1))
    )
    if kept_N.sum() < 0.2 * len(kept_N):
        kept_N[:] = True  # a single object or a thin slab: nothing to cut away
    camera = Camera(look_at(eye_3, target_3), matrix_33, width, height)
    # not smoothed: from so far away things on a surface lie as deep as the surface, and would be mixed with it
    rendered = splat(scene.points_N3[kept_N], scene.colors_N3[kept_N], camera, smooth=False)
    return rendered.color_HW3, camera


def fitting_distance(offsets_C3: np.ndarray, forward_3: np.ndarray, focal: float, width: int, height: int) -> float:
    """How far from a target a camera must be, in metres, for some points to be in its picture, and a margin around.

    Args:
        offsets_C3: the points, from the target, which is in the middle of the picture.
        forward_3: where the camera looks, a unit vector.
        focal: pixels.
    """
    right_down_forward_33 = look_at(np.zeros(3), forward_3)[:3, :3]
    across_C, down_C, ahead_C = (offsets_C3 @ right_down_forward_33).T
    needed_C = np.maximum(np.abs(across_C) / (width / 2), np.abs(down_C) / (height / 2)) * focal * _MARGIN
    return float(np.max(needed_C - ahead_C))


def scene_picture(
    scene: Scene, groups: Sequence[tuple[Sequence[Sequence[float]], Color]], *, width: int = 640
) -> np.ndarray:
    """The overview with boxes (world frame) drawn in, each group in its colour; the last group on top."""
    layers = [(np.asarray(boxes, dtype=np.float64), color) for boxes, color in groups if len(boxes)]
    corners = [corners_3d(boxes_K7).numpy().reshape(-1, 3) for boxes_K7, _ in layers]
    image_HW3, camera = overview(scene, width, width * 3 // 4, np.concatenate([np.zeros((0, 3)), *corners]))
    for boxes_K7, color in layers:
        image_HW3 = draw_boxes(image_HW3, boxes_K7, camera, color)
    return image_HW3


def save_picture(image_HW3: np.ndarray, path: str | Path) -> Path:
    """Write a picture (PNG or JPEG by its name)."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image_HW3).save(path)
    return path


def data_url(image_HW3: np.ndarray, quality: int = 85) -> str:
    """A picture as a data URL, so that a report is one file."""
    stream = io.BytesIO()
    Image.fromarray(image_HW3).save(stream, format="JPEG", quality=quality)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()
