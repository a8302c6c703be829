"""Pictures of scenes with boxes drawn in: what the report, `infer` and the README show.

Shapes: N points, K boxes, H rows, W columns.
"""

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ..datasets.scene import Scene
from ..utils.camera import Camera, look_at, pinhole
from ..utils.render import draw_boxes
from ..utils.splat import splat
from .extent import room_extent
from .palette import Color

# What stands between the camera and the room is left out: near walls, and everything above this share of the height.
_WALL_MARGIN = 0.2
_CEILING_SHARE = 0.92


def overview(scene: Scene, width: int = 640, height: int = 480) -> tuple[np.ndarray, Camera]:
    """A doll's-house view of a room from above one corner, near walls and ceiling cut away: picture and camera."""
    low_3, high_3 = room_extent(scene)
    size_3 = np.maximum(high_3 - low_3, 0.1)
    target_3 = (low_3 + high_3) / 2
    target_3[2] = low_3[2] + 0.3 * size_3[2]
    distance = 1.3 * float(np.linalg.norm(size_3[:2])) + 0.5
    direction_3 = np.array([-0.62, -0.62, 0.95])
    eye_3 = target_3 + direction_3 / np.linalg.norm(direction_3) * distance
    kept_N = (
        (scene.points_N3[:, 0] > low_3[0] + _WALL_MARGIN)
        & (scene.points_N3[:, 1] > low_3[1] + _WALL_MARGIN)
        & (scene.points_N3[:, 2] < low_3[2] + _CEILING_SHARE * size_3[2])
    )
    if kept_N.sum() < 0.2 * len(kept_N):
        kept_N[:] = True  # a single object or a thin slab: nothing to cut away
    camera = Camera(look_at(eye_3, target_3), pinhole(width, height, 55.0), width, height)
    # not smoothed: from so far away things on a surface lie as deep as the surface, and would be mixed with it
    rendered = splat(scene.points_N3[kept_N], scene.colors_N3[kept_N], camera, smooth=False)
    return rendered.color_HW3, camera


def scene_picture(
    scene: Scene, groups: Sequence[tuple[Sequence[Sequence[float]], Color]], *, width: int = 640
) -> np.ndarray:
    """The overview with boxes (world frame) drawn in, each group in its colour; the last group on top."""
    image_HW3, camera = overview(scene, width, width * 3 // 4)
    for boxes, color in groups:
        if len(boxes):
            image_HW3 = draw_boxes(image_HW3, np.asarray(boxes, dtype=np.float64), camera, color)
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
