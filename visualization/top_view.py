"""A plan of a scene from above, as a picture: points, boxes with their labels, and a scale.

Shapes: N points, H rows, W columns. World frame, metres; x to the right, y upwards.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..datasets.scene import Scene
from ..utils.camera import Camera, look_at
from ..utils.splat import splat
from .shown_boxes import EDGES, ShownBoxes

Color = tuple[int, int, int]
_FAR = 200.0  # heights of the camera in room sizes: so far that lines of sight are all but parallel
_MARGIN = 40  # pixels around the plan; the scale stands in the lower one
_CEILING_SHARE = 0.85  # what is above this share of the height is left out, so that a ceiling hides nothing
_LINE, _TEXT = 2, 13
_INK = (31, 41, 55)
_SCALES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0)


def plan_camera(low_3: np.ndarray, high_3: np.ndarray, width: int) -> Camera:
    """A camera straight above the middle of an extent, far away; the extent fits into a picture `width` wide."""
    size_3 = np.maximum(high_3 - low_3, 0.1)
    middle_3 = (low_3 + high_3) / 2
    pixels_per_metre = (width - 2 * _MARGIN) / float(size_3[0])
    height = min(round(float(size_3[1]) * pixels_per_metre) + 2 * _MARGIN, 4 * width)
    pixels_per_metre = min(pixels_per_metre, (height - 2 * _MARGIN) / float(size_3[1]))
    distance = _FAR * float(size_3.max())
    eye_3 = middle_3 + [0.0, 0.0, distance]
    focal = pixels_per_metre * distance
    intrinsics_33 = np.array([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1]])
    return Camera(look_at(eye_3, middle_3), intrinsics_33, width, height)


def top_view(scene: Scene, layers: Sequence[tuple[ShownBoxes, Color]], *, width: int = 1000) -> np.ndarray:
    """The plan [H, W, 3] uint8 of a scene, without its ceiling, each layer of boxes in its colour, the last on top.

    Raises:
        ValueError: a scene without points.
    """
    if not len(scene.points_N3):
        raise ValueError(f"Scene {scene.scene_id} has no points; check the scan file.")
    low_3, high_3 = scene.points_N3.min(0).astype(np.float64), scene.points_N3.max(0).astype(np.float64)
    floor, top = (float(value) for value in np.percentile(scene.points_N3[:, 2], (1.0, 99.0)))
    kept_N = scene.points_N3[:, 2] <= floor + _CEILING_SHARE * (top - floor)
    # far from the origin, single-precision coordinates lose the millimetre; the plan is drawn around its middle
    middle_3 = (low_3 + high_3) / 2
    camera = plan_camera(low_3 - middle_3, high_3 - middle_3, width)
    points_N3 = (scene.points_N3[kept_N] - middle_3).astype(np.float32)
    image_HW3 = splat(points_N3, scene.colors_N3[kept_N], camera).color_HW3
    picture = Image.fromarray(np.ascontiguousarray(image_HW3))
    pen = ImageDraw.Draw(picture)
    font = ImageFont.load_default(_TEXT)
    for boxes, color in layers:
        _draw(pen, font, boxes, middle_3, camera, color)
    _draw_scale(pen, font, camera)
    return np.asarray(picture)


def _draw(
    pen: ImageDraw.ImageDraw,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    boxes: ShownBoxes,
    middle_3: np.ndarray,
    camera: Camera,
    color: Color,
) -> None:
    for corners_83, text in zip(boxes.corners_K83, boxes.texts(), strict=True):
        uv_82, _ = camera.project(corners_83 - middle_3)
        for start, end in EDGES:
            pen.line((*uv_82[start], *uv_82[end]), fill=color, width=_LINE)
        if text:
            left, top = float(uv_82[:, 0].min()), float(uv_82[:, 1].min())
            frame = pen.textbbox((left, top - _TEXT - 4), text, font=font)
            pen.rectangle((frame[0] - 2, frame[1] - 1, frame[2] + 2, frame[3] + 1), fill=color)
            pen.text((left, top - _TEXT - 4), text, fill=(255, 255, 255), font=font)


def _draw_scale(pen: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, camera: Camera) -> None:
    """A bar of a round length below the plan, at most a third as long as the plan is wide."""
    pixels_per_metre = float(camera.intrinsics_33[0, 0]) / float(camera.position_3[2])
    room = (camera.width - 2 * _MARGIN) / 3
    length = max((size for size in _SCALES if size * pixels_per_metre <= room), default=_SCALES[0])
    start, end, row = _MARGIN, _MARGIN + length * pixels_per_metre, camera.height - _MARGIN / 2
    pen.line((start, row, end, row), fill=_INK, width=2)
    for column in (start, end):
        pen.line((column, row - 4, column, row + 4), fill=_INK, width=2)
    pen.text((end + 6, row), f"{length:g} m", fill=_INK, font=font, anchor="lm")
