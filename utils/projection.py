"""Points in pictures: where cameras see them, and which of them they see.

Shapes: C cameras, N points, H rows, W columns, M pixels of all depth maps in one line. World frame, metres.
"""

from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor

from .camera import NEAR_PLANE, Camera
from .threads import one_thread

PROJECTED = 1 << 24  # points times cameras at a time on a GPU (400 MB of coordinates)
_CPU_PROJECTED = 1 << 16  # likewise on a CPU: what one operation makes stays in its cache


def world_to_picture(cameras: Sequence[Camera]) -> np.ndarray:
    """Matrices float64 [C, 3, 4] that take (x, y, z, 1) of the world to (u depth, v depth, depth)."""
    pose_C44 = np.linalg.inv(np.stack([np.asarray(camera.pose_44, dtype=np.float64) for camera in cameras]))
    matrix_C33 = np.stack([np.asarray(camera.intrinsics_33, dtype=np.float64) for camera in cameras])
    return matrix_C33 @ pose_C44[:, :3]


def homogeneous(points_N3: Tensor) -> Tensor:
    """Points as columns (x, y, z, 1), float64 [4, N]: what `project` takes."""
    columns_4N = torch.ones(4, len(points_N3), dtype=torch.float64, device=points_N3.device)
    columns_4N[:3] = points_N3.T
    return columns_4N


def project(points_4N: Tensor, world_C34: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """Rounded columns and rows [C, N] (whole float32) and depth [C, N] (float32, metres) of points in every camera.

    Those of points nearer than the near plane mean nothing. The product is taken in float64: in float32 a GPU may run
    it in TF32, off by pixels, and every device and library rounds it otherwise.
    """
    matrix_C34 = torch.from_numpy(world_C34).to(points_4N.device, non_blocking=True)
    image_C3N = (matrix_C34.flatten(0, 1) @ points_4N).float().view(len(world_C34), 3, -1)
    depth_CN = image_C3N[:, 2]
    scale_C1N = 1 / depth_CN[:, None].clamp(min=NEAR_PLANE)
    limit = float(1 << 20)
    uv_C2N = (image_C3N[:, :2] * scale_C1N).add_(0.5).floor_().clamp_(-limit, limit)
    return uv_C2N[:, 0], uv_C2N[:, 1], depth_CN


def inside(
    column_CN: Tensor, row_CN: Tensor, depth_CN: Tensor, width: int | Tensor, height: int | Tensor, pad: int = 0
) -> Tensor:
    """Which points [C, N] lie before the near plane and in the picture or within `pad` pixels of it."""
    across_CN = (column_CN >= -pad) & (column_CN < width + pad)
    return across_CN & (row_CN >= -pad) & (row_CN < height + pad) & (depth_CN >= NEAR_PLANE)


def visible_points(
    points_N3: np.ndarray,
    cameras: Sequence[Camera],
    depths: Sequence[np.ndarray],
    *,
    tolerance: float = 0.08,
    device: str | torch.device = "cpu",
) -> np.ndarray:
    """Which points each view sees, bool [C, N].

    A point is seen where it falls into the picture and lies no more than `tolerance` metres (plus 2 % of its depth)
    behind the depth map's surface. `depths` are metres along z, one map [H, W] a camera, 0 where nothing was
    measured; a point that falls there counts as not seen. ValueError for a map that is not of its camera's size.
    """
    for row, (camera, depth_HW) in enumerate(zip(cameras, depths, strict=True)):
        if np.shape(depth_HW) != (camera.height, camera.width):
            raise ValueError(
                f"The depth map of view {row} is {np.shape(depth_HW)}, its camera's picture "
                f"{(camera.height, camera.width)}; resize one of them."
            )
    if not len(cameras) or not len(points_N3):
        return np.zeros((len(cameras), len(points_N3)), dtype=bool)
    device = torch.device(device)
    surface = np.concatenate([np.asarray(depth_HW, dtype=np.float32).ravel() for depth_HW in depths])
    surface_M = torch.from_numpy(surface).to(device, non_blocking=True)
    points = torch.from_numpy(np.ascontiguousarray(points_N3, dtype=np.float32)).to(device, non_blocking=True)
    points_4N = homogeneous(points)
    world_C34 = world_to_picture(cameras)
    sizes = [(camera.width, camera.height) for camera in cameras]
    width_C, height_C = torch.tensor(sizes).to(device, non_blocking=True).T
    start_C = torch.cumsum(width_C * height_C, 0) - width_C * height_C
    step = max(1, (_CPU_PROJECTED if device.type == "cpu" else PROJECTED) // len(points))
    seen = []
    with one_thread() if device.type == "cpu" else nullcontext():
        for first in range(0, len(cameras), step):
            some = slice(first, first + step)
            where = (width_C[some, None], height_C[some, None], start_C[some, None])
            seen.append(_before_surface(project(points_4N, world_C34[some]), surface_M, where, tolerance))
        return torch.cat(seen).cpu().numpy()


def _before_surface(
    projected: tuple[Tensor, Tensor, Tensor],
    surface_M: Tensor,
    where: tuple[Tensor, Tensor, Tensor],
    tolerance: float,
) -> Tensor:
    """Which points [C, N] that depth maps show; `where`: width, height and start in M of each map."""
    column_CN, row_CN, depth_CN = projected
    width_C1, height_C1, start_C1 = where
    inside_CN = inside(column_CN, row_CN, depth_CN, width_C1, height_C1)
    pixel_CN = (row_CN.long() * width_C1 + column_CN.long() + start_C1).masked_fill_(~inside_CN, 0)
    surface_CN = surface_M.take(pixel_CN)
    return inside_CN & (surface_CN > 0) & (depth_CN <= surface_CN * 1.02 + tolerance)
