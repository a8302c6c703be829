"""A plan of a scene from above, as a picture: points, boxes with their labels, and a scale.

Shapes: N points, H rows, W columns. World frame, metres; x to the right, y upwards.
"""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..datasets.scene import Scene
from ..utils.camera import Camera, look_at
from ..utils.splat import splat
from .extent import room_extent
from .palette import Color
from .shown_boxes import EDGES, ShownBoxes

Font: TypeAlias = ImageFont.FreeTypeFont | ImageFont.ImageFont
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
    low_3, high_3 = room_extent(
        scene, np.concatenate([np.zeros((0, 3)), *(boxes.corners_K83.reshape(-1, 3) for boxes, _ in layers)])
    )
    floor, top = (float(value) for value in np.percentile(scene.points_N3[:, 2], (1.0, 99.0)))
    kept_N = scene.points_N3[:, 2] <= floor + _CEILING_SHARE * (top - floor)
    # far from the origin, single-precision coordinates lose the millimetre; the plan is drawn around its middle
    middle_3 = (low_3 + high_3) / 2
    camera = plan_camera(low_3 - middle_3, high_3 - middle_3, width)
    points_N3 = (scene.points_N3[kept_N] - middle_3).astype(np.float32)
    image_HW3 = splat(points_N3, scene.colors_N3[kept_N], camera, smooth=False).color_HW3
    picture = Image.fromarray(np.ascontiguousarray(image_HW3))
    pen = ImageDraw.Draw(picture)
    font = ImageFont.load_default(_TEXT)
    # labels last, so that no box crosses one
    corners = [_projected(boxes, middle_3, camera) for boxes, _ in layers]
    for (_, color), corners_K82 in zip(layers, corners, strict=True):
        _draw_boxes(pen, corners_K82, color)
    for (boxes, color), corners_K82 in zip(layers, corners, strict=True):
        _draw_labels(pen, font, corners_K82, boxes.texts(), color)
    _draw_scale(pen, font, camera)
    return np.asarray(picture)


def _projected(boxes: ShownBoxes, middle_3: np.ndarray, camera: Camera) -> np.ndarray:
    """Corners of boxes in the picture [K, 8, 2], pixels."""
    uv_C2, _ = camera.project((boxes.corners_K83 - middle_3).reshape(-1, 3))
    return uv_C2.reshape(-1, 8, 2)


def _draw_boxes(pen: ImageDraw.ImageDraw, corners_K82: np.ndarray, color: Color) -> None:
    for corners_82 in corners_K82:
        for start, end in EDGES:
            pen.line((*corners_82[start], *corners_82[end]), fill=color, width=_LINE)


def _draw_labels(
    pen: ImageDraw.ImageDraw, font: Font, corners_K82: np.ndarray, texts: Sequence[str], color: Color
) -> None:
    """Each label above the upper left corner of its box, or as far to the left as the picture's edge makes it."""
    for corners_82, text in zip(corners_K82, texts, strict=True):
        if not text:
            continue
        place = (float(corners_82[:, 0].min()), float(corners_82[:, 1].min()) - _TEXT - 4)
        beyond = max(pen.textbbox(place, text, font=font)[2] + 4 - pen.im.size[0], 0)
        place = (max(place[0] - beyond, 2), place[1])
        left, top, right, bottom = pen.textbbox(place, text, font=font)
        pen.rectangle((left - 2, top - 1, right + 2, bottom + 1), fill=color)
        pen.text(place, text, fill=(255, 255, 255), font=font)


def _draw_scale(pen: ImageDraw.ImageDraw, font: Font, camera: Camera) -> None:
    """A bar of a round length below the plan, at most a third as long as the plan is wide."""
    pixels_per_metre = float(camera.intrinsics_33[0, 0]) / float(camera.position_3[2])
    room = (camera.width - 2 * _MARGIN) / 3
    length = max((size for size in _SCALES if size * pixels_per_metre <= room), default=_SCALES[0])
    start, end, row = _MARGIN, _MARGIN + length * pixels_per_metre, camera.height - _MARGIN / 2
    pen.line((start, row, end, row), fill=_INK, width=2)
    for column in (start, end):
        pen.line((column, row - 4, column, row + 4), fill=_INK, width=2)
    pen.text((end + 6, row), f"{length:g} m", fill=_INK, font=font, anchor="lm")
