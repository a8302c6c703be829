"""The pool of candidate views of a scene: posed frames, rendered views, or both, with what each of them sees.

Shapes: V views, N points, S points of the coverage subsample, K boxes, H rows, W columns. World frame, metres.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..datasets.frames import read_depth
from ..datasets.scene import Frame, Scene
from ..utils.boxes import points_in_boxes
from ..utils.render import Camera, splat_batch, visible_points
from .view_cameras import place_cameras, spread

SOURCES = ("posed", "rendered", "mixed", "none")
COVERAGE_POINTS = 4096
_VISIBILITY_POINTS = 65536
# metres a point may lie behind the depth map and count as seen: sensor noise; discs that overhang their surface
_MEASURED_TOLERANCE, _SPLATTED_TOLERANCE = 0.08, 0.15
_OBJECT_WEIGHT = 3.0  # what all boxes together are worth to a camera, where all points together are worth 1
_TURN_METRES = 1.5  # a turn by 60 degrees separates two frames as much as so many metres


@dataclass(eq=False)
class ViewPool:
    """Candidate views of one scene.

    `visible_VK` is the share in [0, 1] of each box's points that each view sees (0 for a box without points);
    `coverage_VS` says which points of a fixed subsample of the scene each view sees; `points_N3` and `seen_VN` say the
    same of a larger one, for the visibility of boxes that were not known when the pool was made. `embeddings` caches
    what encoders made of the pictures, by encoder name.
    """

    images_VHW3: np.ndarray  # uint8
    cameras: list[Camera]
    names: list[str]  # "frame 12" (index into Scene.frames), "rendered 3"
    visible_VK: np.ndarray  # float32
    coverage_VS: np.ndarray  # bool
    points_N3: np.ndarray  # float32
    seen_VN: np.ndarray  # bool
    embeddings: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.names)

    def visibility(self, boxes_K7: np.ndarray) -> np.ndarray:
        """Share [V, K] of each box's points that each view sees, float32; boxes in the world frame."""
        boxes_K7 = np.asarray(boxes_K7, dtype=np.float32).reshape(-1, 7)
        return _shares(self.seen_VN, points_in_boxes(self.points_N3, boxes_K7).numpy())


def build_view_pool(
    scene: Scene,
    *,
    source: str,
    num_candidates: int = 16,
    image_size: tuple[int, int] = (224, 224),
    seed: int = 0,
    boxes_K7: np.ndarray | None = None,
    device: str | torch.device = "cpu",
) -> ViewPool:
    """Make the candidate views of a scene.

    Args:
        source: "posed" takes frames from disk, spread over positions and directions, squeezed to `image_size`;
            "rendered" renders the points from inside the room; "mixed" takes up to half of the views from frames and
            renders the rest (all of them where the scene has no frames); "none" makes an empty pool.
        num_candidates: views in the pool; fewer where "posed" finds fewer frames.
        image_size: H, W.
        seed: everything random follows from it.
        boxes_K7: world frame; `visible_VK` is about these boxes. None takes the scene's own.

    Raises:
        ValueError: for "posed" without frames, a frame file that cannot be read, an unknown source.
    """
    if source not in SOURCES:
        raise ValueError(f"Unknown source of views {source!r}; choose one of {', '.join(SOURCES)}.")
    if source != "none" and num_candidates < 1:
        raise ValueError(f"A pool needs at least one candidate view, not {num_candidates}; use source none for none.")
    if source == "posed" and not scene.frames:
        raise ValueError(f"Scene {scene.scene_id} has no posed frames; take its views from rendered or mixed.")
    boxes = (scene.boxes_K7 if boxes_K7 is None else np.asarray(boxes_K7, dtype=np.float32)).reshape(-1, 7)
    posed = {"posed": num_candidates, "mixed": num_candidates // 2}.get(source, 0)
    frames = spread_frames(scene.frames, posed)
    rendered = 0 if source in ("posed", "none") else num_candidates - len(frames)
    pictures = [_read_frame(scene.frames[row], image_size) for row in frames]
    cameras = [camera for _, _, camera in pictures]
    points_N3 = np.asarray(scene.points_N3, dtype=np.float32)
    colors_N3 = display_colors(scene)
    visible = _subsample(len(points_N3), _VISIBILITY_POINTS)
    member_NK = points_in_boxes(points_N3[visible], boxes).numpy()
    if rendered:
        weight_N = np.full(len(points_N3), 1 / len(visible))
        weight_N[visible] += _OBJECT_WEIGHT * _equal_weights(member_NK)
        cameras += place_cameras(
            points_N3,
            float(scene.origin_3[2]),
            rendered,
            image_size,
            weight_N=weight_N,
            seed=seed,
            device=device,
        )
    images, depths = [image for image, _, _ in pictures], [depth for _, depth, _ in pictures]
    without_depth = [row for row, depth in enumerate(depths) if depth is None]
    to_render = [cameras[row] for row in without_depth] + cameras[len(frames) :]
    renders = splat_batch(points_N3, colors_N3, to_render, device=device) if to_render else []
    for row, render in zip(without_depth, renders, strict=False):
        depths[row] = render.depth_HW
    for render in renders[len(without_depth) :]:
        images.append(render.color_HW3)
        depths.append(render.depth_HW)
    measured_V = np.array([row < len(frames) and row not in without_depth for row in range(len(cameras))], dtype=bool)
    seen_VN = _seen(points_N3[visible], cameras, [depth for depth in depths if depth is not None], measured_V)
    height, width = image_size
    return ViewPool(
        images_VHW3=np.stack(images) if images else np.zeros((0, height, width, 3), dtype=np.uint8),
        cameras=cameras,
        names=[f"frame {row}" for row in frames] + [f"rendered {row}" for row in range(len(cameras) - len(frames))],
        visible_VK=_shares(seen_VN, member_NK),
        coverage_VS=seen_VN[:, _subsample(len(visible), COVERAGE_POINTS)],
        points_N3=points_N3[visible],
        seen_VN=seen_VN,
    )


def visible_shares(scene: Scene, cameras: Sequence[Camera], boxes_K7: np.ndarray) -> np.ndarray:
    """Share [V, K] of each box's points that each camera sees, float32; occlusion by a splat of the scene's points."""
    points_N3 = np.asarray(scene.points_N3, dtype=np.float32)
    renders = splat_batch(points_N3, display_colors(scene), cameras, smooth=False)
    visible = _subsample(len(points_N3), _VISIBILITY_POINTS)
    depths = [render.depth_HW for render in renders]
    seen_VN = visible_points(points_N3[visible], cameras, depths, tolerance=_SPLATTED_TOLERANCE)
    return _shares(seen_VN, points_in_boxes(points_N3[visible], boxes_K7).numpy())


def spread_frames(frames: Sequence[Frame], count: int) -> list[int]:
    """Indices of `count` frames spread evenly in pose space (position and viewing direction), in frame order."""
    if not frames or count < 1:
        return []
    pose_F6 = np.stack([np.r_[frame.pose_44[:3, 3], _TURN_METRES * frame.pose_44[:3, 2]] for frame in frames])
    return sorted(int(row) for row in spread(pose_F6, count))


def display_colors(scene: Scene) -> np.ndarray:
    """The scene's colours [N, 3] uint8, or, for a scan without any, shades of grey by height."""
    colors_N3 = np.asarray(scene.colors_N3, dtype=np.uint8)
    if len(colors_N3) and (colors_N3 != colors_N3[0]).any():
        return colors_N3
    height_N = scene.points_N3[:, 2].astype(np.float64)
    share_N = (height_N - height_N.min()) / max(float(np.ptp(height_N)), 1e-6)
    return np.repeat((70 + 160 * share_N).astype(np.uint8)[:, None], 3, axis=1)


def _read_frame(frame: Frame, image_size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray | None, Camera]:
    """Picture [H, W, 3] uint8, depth [H, W] in metres (0 for none; None without a depth file) and camera."""
    height, width = image_size
    try:
        with Image.open(frame.color_path) as picture:
            camera = Camera(frame.pose_44, frame.intrinsics_33, picture.width, picture.height).resized(width, height)
            picture.draft("RGB", (width, height))  # lets the JPEG decoder skip detail that resizing would drop
            image_HW3 = np.asarray(picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC))
        if frame.depth_path is None:
            return image_HW3, None, camera
        depth = Image.fromarray(read_depth(frame.depth_path))
    except OSError as error:
        raise ValueError(
            f"Cannot read the frame {frame.color_path} ({error}); prepare the scan again or use rendered views."
        ) from None
    return image_HW3, np.array(depth.resize((width, height), Image.Resampling.NEAREST)), camera


def _subsample(size: int, limit: int) -> np.ndarray:
    """At most `limit` of `size` indices, evenly spaced."""
    if size <= limit:
        return np.arange(size)
    return np.linspace(0, size - 1, limit).astype(np.int64)


def _seen(
    points_N3: np.ndarray, cameras: list[Camera], depths: list[np.ndarray], measured_V: np.ndarray
) -> np.ndarray:
    """Which points each view sees, bool [V, N]; splatted depth is given more tolerance than measured depth."""
    seen_VN = np.zeros((len(cameras), len(points_N3)), dtype=bool)
    for measured, tolerance in ((True, _MEASURED_TOLERANCE), (False, _SPLATTED_TOLERANCE)):
        rows = np.nonzero(measured_V == measured)[0]
        some, maps = [cameras[row] for row in rows], [depths[row] for row in rows]
        seen_VN[rows] = visible_points(points_N3, some, maps, tolerance=tolerance)
    return seen_VN


def _equal_weights(member_NK: np.ndarray) -> np.ndarray:
    """Weight of each point such that every box that holds points weighs the same, whatever its size; sum 1 (or 0)."""
    count_K = member_NK.sum(0)
    held = count_K > 0
    if not held.any():
        return np.zeros(len(member_NK))
    return member_NK[:, held] @ (1 / count_K[held]) / held.sum()


def _shares(seen_VN: np.ndarray, member_NK: np.ndarray) -> np.ndarray:
    """Share of each box's points that each view sees, float32 [V, K]."""
    count_K = member_NK.sum(0, dtype=np.float32)
    return seen_VN.astype(np.float32) @ member_NK.astype(np.float32) / np.maximum(count_K, 1)
