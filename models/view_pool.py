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
from ..utils.render import Camera, pinhole, splat_batch, visible_points
from ..utils.threads import one_thread
from .view_cameras import FIELD_OF_VIEW, place_cameras, ring_poses, splat_tolerance, top_poses
from .view_frames import choose_frames, is_usable, unreadable
from .view_kinds import kinds_of, share_out

COVERAGE_POINTS = 4096
_VISIBILITY_POINTS = 65536
_MEASURED_TOLERANCE = 0.08  # metres a point may lie behind the sensor's depth map and count as seen
_OBJECT_WEIGHT = 3.0  # what all boxes together are worth to a camera, where all points together are worth 1
_NAMES = {"inside": "rendered"}  # what a view of a kind is called, where not by its kind


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
    names: list[str]  # "frame 12" (index into Scene.frames), "rendered 3", "ring 0", "top 0", "bottom 0", "object 0"
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


@one_thread()
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
        source: kinds of views joined by +, or a name for some of them (view_kinds.py): "posed" takes frames from disk,
            squeezed to `image_size`, "rendered" renders the points from inside the room, "mixed" is "posed+inside",
            "none" makes an empty pool. Each kind gets an even share; what frames leave goes to the others.
        num_candidates: views in the pool; fewer where only frames are asked for and fewer are good.
        image_size: H, W.
        seed: everything random follows from it.
        boxes_K7: world frame; `visible_VK` is about these boxes. None takes the scene's own.

    Raises:
        ValueError: for "posed" alone without usable frames, a frame file that cannot be read, an unknown source, a
            scene without points.
    """
    kinds = kinds_of(source)
    if kinds and num_candidates < 1:
        raise ValueError(f"A pool needs at least one candidate view, not {num_candidates}; use source none for none.")
    if kinds == ("posed",) and not any(is_usable(frame) for frame in scene.frames):
        raise ValueError(
            f"Scene {scene.scene_id} has no posed frames (with finite pose and intrinsics); take its views from "
            "rendered or mixed."
        )
    if kinds and not len(scene.points_N3):
        raise ValueError(f"Scene {scene.scene_id} has no points; check the scan file.")
    boxes = (scene.boxes_K7 if boxes_K7 is None else np.asarray(boxes_K7, dtype=np.float32)).reshape(-1, 7)
    points_N3 = np.asarray(scene.points_N3, dtype=np.float32)
    visible = _subsample(len(points_N3), _VISIBILITY_POINTS)
    member_NK = points_in_boxes(points_N3[visible], boxes).numpy()
    weight_N = np.full(len(points_N3), 1 / max(len(visible), 1))
    weight_N[visible] += _OBJECT_WEIGHT * _equal_weights(member_NK)
    frames = choose_frames(scene.frames, share_out(kinds, num_candidates).get("posed", 0))
    pictures = [_read_frame(scene.frames[row], image_size) for row in frames]
    others = share_out(tuple(kind for kind in kinds if kind != "posed"), num_candidates - len(frames))
    place = _Places(points_N3, float(scene.origin_3[2]), image_size, weight_N, seed, device)
    placed = [
        (f"{_NAMES.get(kind, kind)} {number}", camera)
        for kind, count in others.items()
        for number, camera in enumerate(place.cameras(kind, count))
    ]
    cameras = [camera for _, _, camera in pictures] + [camera for _, camera in placed]
    measured_V = np.array([depth is not None for _, depth, _ in pictures] + [False] * len(placed), dtype=bool)
    images, depths = _look(scene, cameras, [picture[:2] for picture in pictures], device)
    seen_VN = _seen(points_N3[visible], cameras, depths, measured_V, device)
    return ViewPool(
        images_VHW3=np.stack(images) if images else np.zeros((0, *image_size, 3), dtype=np.uint8),
        cameras=cameras,
        names=[f"frame {row}" for row in frames] + [name for name, _ in placed],
        visible_VK=_shares(seen_VN, member_NK),
        coverage_VS=seen_VN[:, _subsample(len(visible), COVERAGE_POINTS)],
        points_N3=points_N3[visible],
        seen_VN=seen_VN,
    )


def _look(
    scene: Scene,
    cameras: list[Camera],
    pictures: list[tuple[np.ndarray, np.ndarray | None]],
    device: str | torch.device,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Picture and depth of every camera: the first ones' as read, the rest rendered, as is depth not measured."""
    missing = [row for row in range(len(cameras)) if row >= len(pictures) or pictures[row][1] is None]
    if not missing:
        return [image for image, _ in pictures], [depth for _, depth in pictures if depth is not None]
    some = [cameras[row] for row in missing]
    renders = dict(zip(missing, splat_batch(scene.points_N3, display_colors(scene), some, device=device), strict=True))
    images = [image for image, _ in pictures]
    images += [renders[row].color_HW3 for row in range(len(pictures), len(cameras))]
    depths = [pictures[row][1] if row not in renders else renders[row].depth_HW for row in range(len(cameras))]
    return images, [depth for depth in depths if depth is not None]


@dataclass(frozen=True, eq=False)
class _Places:
    """Where rendered views of one scene are looked at from; see `place_cameras` for the fields."""

    points_N3: np.ndarray
    floor: float
    image_size: tuple[int, int]
    weight_N: np.ndarray
    seed: int
    device: str | torch.device

    def cameras(self, kind: str, count: int) -> list[Camera]:
        """`count` cameras of one rendered kind; fewer where there are no more places."""
        if count < 1:
            return []
        if kind in ("inside", "object"):
            return place_cameras(
                self.points_N3,
                self.floor,
                count,
                self.image_size,
                weight_N=self.weight_N,
                around=kind == "object",
                seed=self.seed,
                device=self.device,
            )
        height, width = self.image_size
        matrix_33 = pinhole(width, height, FIELD_OF_VIEW)
        if kind == "top":
            poses = top_poses(self.points_N3, count)
        else:
            poses = ring_poses(self.points_N3, self.floor, count, low=kind == "bottom")
        return [Camera(pose_44, matrix_33, width, height) for pose_44 in poses]


def visible_shares(scene: Scene, cameras: Sequence[Camera], boxes_K7: np.ndarray) -> np.ndarray:
    """Share [V, K] of each box's points that each camera sees, float32; occlusion by a splat of the scene's points."""
    points_N3 = np.asarray(scene.points_N3, dtype=np.float32)
    renders = splat_batch(points_N3, display_colors(scene), cameras, smooth=False)
    visible = _subsample(len(points_N3), _VISIBILITY_POINTS)
    depths = [render.depth_HW for render in renders]
    seen_VN = visible_points(points_N3[visible], cameras, depths, tolerance=splat_tolerance(points_N3))
    return _shares(seen_VN, points_in_boxes(points_N3[visible], boxes_K7).numpy())


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
        raise unreadable(frame, error) from None
    return image_HW3, np.array(depth.resize((width, height), Image.Resampling.NEAREST)), camera


def _subsample(size: int, limit: int) -> np.ndarray:
    """At most `limit` of `size` indices, evenly spaced."""
    if size <= limit:
        return np.arange(size)
    return np.linspace(0, size - 1, limit).astype(np.int64)


def _seen(
    points_N3: np.ndarray,
    cameras: list[Camera],
    depths: list[np.ndarray],
    measured_V: np.ndarray,
    device: str | torch.device,
) -> np.ndarray:
    """Which points each view sees, bool [V, N]; a room's splatted depth is given more tolerance than measured."""
    seen_VN = np.zeros((len(cameras), len(points_N3)), dtype=bool)
    for measured, tolerance in ((True, _MEASURED_TOLERANCE), (False, splat_tolerance(points_N3))):
        rows = np.nonzero(measured_V == measured)[0]
        some, maps = [cameras[row] for row in rows], [depths[row] for row in rows]
        seen_VN[rows] = visible_points(points_N3, some, maps, tolerance=tolerance, device=device)
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
    # by PyTorch, whose threads can be limited; counts below 2^24 are exact in float32, in any order
    seen_VK = torch.from_numpy(seen_VN).float() @ torch.from_numpy(member_NK).float()
    return seen_VK.numpy() / np.maximum(count_K, 1)
