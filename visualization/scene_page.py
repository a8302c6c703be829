"""One scene as one HTML file to walk around in: points, boxes, cameras, questions; no server, no network.

The page's frame is the world frame moved by the scene's floor centre (`Scene.origin_3`), in which the model speaks of
boxes too; points, boxes and cameras all go through that one shift. Points are 16-bit steps of their extent.

Shapes: N points. Metres.
"""

import base64
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..datasets.scene import Scene
from ..utils.camera import Camera
from ..utils.files import write_whole
from ..utils.splat import point_radii
from .extent import room_extent
from .palette import LAYERS
from .shown_boxes import EDGES, ShownBoxes
from .shown_scene import ShownQuestion, ShownScene

MAX_BYTES = 10_000_000
_TEMPLATE = Path(__file__).with_name("viewer.html")
_MARK = "/*DATA*/"
_MAX_POINTS = 250_000  # 3.0 MB of text
_STEPS = 65535
_PICTURE_BYTES = 5_500_000  # of all pictures as text
_PICTURE_SIZES = ((480, 82), (384, 78), (288, 74), (208, 68), (144, 60))  # longest side in pixels, quality
_FRUSTUM = 0.35  # metres from a camera to its picture
_CAMERAS = (190, 24, 93)
_NAMES = {"asked": "asked about", "near walls": "near walls"}


def write_scene_page(shown: ShownScene, out: str | Path, *, max_points: int = _MAX_POINTS, seed: int = 0) -> Path:
    """Write the page of one scene.

    Args:
        max_points: a larger cloud is thinned by a seeded choice.

    Raises:
        ValueError: a scene without points, a picture that cannot be read, or more text than 10 MB hold.
    """
    page = page_text(page_data(shown, max_points=max_points, seed=seed)).encode("utf-8", errors="replace")
    if len(page) > MAX_BYTES:
        raise ValueError(
            f"The page would have {len(page) / 1e6:.0f} MB, 10 at most; show fewer questions, with --limit."
        )
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, page)
    return out


def page_text(data: dict[str, Any]) -> str:
    """The page with its data in it."""
    # a text that closes the script would end the data
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    before, _, after = _TEMPLATE.read_text(encoding="utf-8").partition(_MARK)
    return before + text + after


def page_data(shown: ShownScene, *, max_points: int = _MAX_POINTS, seed: int = 0) -> dict[str, Any]:
    """What the page's script reads, as JSON."""
    scene = shown.scene
    extent_23 = np.stack(room_extent(scene))
    offset_3 = scene.origin_3.astype(np.float64)
    files = list(dict.fromkeys(view.file for question in shown.questions for view in question.views))
    pictures = _pictures(files)
    numbers = {file: number for number, file in enumerate(files)}
    # far ones would leave few of the 16 bits to the room
    near_N = (np.abs(scene.points_N3 - extent_23.mean(0)) <= 1.5 * np.maximum(np.ptp(extent_23, axis=0), 1.0)).all(1)
    kept = np.flatnonzero(near_N)
    notes = list(scene.notes)
    if not near_N.all():
        notes.append(f"{np.count_nonzero(~near_N):,} stray points not shown")
    if len(kept) > max_points:
        kept = np.sort(np.random.default_rng(seed).choice(kept, max_points, replace=False))
        notes.append(f"{max_points:,} of {len(scene.points_N3):,} points shown")
    points_N3 = scene.points_N3[kept].astype(np.float64) - offset_3
    return {
        "title": scene.scene_id,
        "notes": notes,
        "offset": offset_3.tolist(),
        "points": quantised(points_N3, scene.colors_N3[kept]),
        "extent": (extent_23 - offset_3).tolist(),
        "edges": EDGES,
        "colors": {**LAYERS, "cameras": _CAMERAS},
        "names": _NAMES,
        "layers": {
            name: box_rows(boxes, scene) for name, boxes in (("boxes", shown.boxes), ("objects", shown.objects))
        },
        "questions": [_question(question, scene, numbers) for question in shown.questions],
        "pictures": pictures,
    }


def quantised(points_N3: np.ndarray, colors_N3: np.ndarray) -> dict[str, Any]:
    """Points as 16-bit steps from their lowest corner colours and sizes as bytes, in base64."""
    low_3 = points_N3.min(0)
    step_3 = np.maximum(np.ptp(points_N3, axis=0), 1e-6) / _STEPS
    places_N3 = np.rint((points_N3 - low_3) / step_3).astype("<u2")
    wide_N = 2 * point_radii(torch.from_numpy((points_N3 - low_3).astype(np.float32))).numpy()
    widest = max(float(wide_N.max()), 1e-6)
    return {
        "low": low_3.tolist(),
        "step": step_3.tolist(),
        "widest": widest,
        "sizes": base64.b64encode(np.rint(wide_N / widest * 255).astype(np.uint8).tobytes()).decode(),
        "positions": base64.b64encode(places_N3.tobytes()).decode(),
        "colors": base64.b64encode(np.ascontiguousarray(colors_N3, dtype=np.uint8).tobytes()).decode(),
    }


def box_rows(boxes: ShownBoxes, scene: Scene) -> list[dict[str, Any]]:
    """Boxes (world frame) as the page's script takes them, in the page's frame."""
    corners_K83 = np.round(boxes.corners_K83 - scene.origin_3, 4)
    return [
        {"corners": corners_83, "label": text}
        for corners_83, text in zip(corners_K83.tolist(), boxes.texts(), strict=True)
    ]


def _question(question: ShownQuestion, scene: Scene, numbers: dict[Path, int]) -> dict[str, Any]:
    prediction = question.prediction
    scores = " · ".join(f"{name} {value}" for name, value in prediction.scores.items())
    malformed = "" if prediction.well_formed or prediction.text.startswith("<answer>") else "not well formed"
    return {
        "task": prediction.task.replace("_", " "),
        "question": prediction.question,
        "situation": question.situation,
        "think": prediction.think,
        "answer": question.answer,
        "reference": question.references,
        "note": " · ".join(filter(None, (scores, malformed, prediction.model))),
        "layers": {name: box_rows(boxes, scene) for name, boxes in question.layers.items()},
        "views": [
            {
                "name": view.name,
                "picture": numbers[view.file],
                "frustum": None if view.camera is None else _frustum(view.camera, scene.origin_3),
            }
            for view in question.views
        ],
    }


def _frustum(camera: Camera, offset_3: np.ndarray) -> list[list[float]]:
    """A camera's place, then the corners of its picture: upper left, upper right, lower right, lower left."""
    columns, rows = (-0.5, camera.width - 0.5), (-0.5, camera.height - 0.5)
    pixels_43 = np.array([(u, v, 1.0) for u, v in zip((*columns, *columns[::-1]), np.repeat(rows, 2), strict=True)])
    rays_43 = pixels_43 @ np.linalg.inv(camera.intrinsics_33).T * _FRUSTUM
    corners_43 = rays_43 @ camera.pose_44[:3, :3].T + camera.position_3
    return np.round(np.concatenate([camera.position_3[None], corners_43]) - offset_3, 4).tolist()


def _pictures(files: Sequence[Path]) -> list[str]:
    """Pictures as data URLs, as large as all of them fit into the page."""
    for longest, quality in _PICTURE_SIZES:
        urls = []
        for url in _encoded(files, longest, quality):
            urls.append(url)
            if sum(map(len, urls)) > _PICTURE_BYTES:
                break
        else:
            return urls
    raise ValueError(f"{len(files)} pictures are too many for one page of 10 MB; show fewer questions, with --limit.")


def _encoded(files: Sequence[Path], longest: int, quality: int) -> Iterator[str]:
    for file in files:
        try:
            with Image.open(file) as opened:
                image = opened.convert("RGB")
        except (OSError, SyntaxError, Image.DecompressionBombError):
            raise ValueError(f"{file} is no picture that can be read; run eval or infer again.") from None
        image.thumbnail((longest, longest))
        stream = io.BytesIO()
        image.save(stream, format="JPEG", quality=quality)
        yield "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()
