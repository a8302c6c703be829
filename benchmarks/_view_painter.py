"""The peer of rendering: a loop over views in which every point paints a square of pixels, far to near.

Shapes: N points, F fragments (a pixel that a point paints), H rows, W columns.
"""

from collections.abc import Sequence

import numpy as np
import torch

from ..utils.render import NEAR_PLANE, Camera, Render


def paint_views(
    points_N3: np.ndarray,
    colors_N3: np.ndarray,
    cameras: Sequence[Camera],
    *,
    reach: int = 1,
    device: str | torch.device = "cpu",
) -> list[Render]:
    """Pictures in which every point is a square of 2 `reach` + 1 pixels; no hole is filled, nothing smoothed.

    A painter overwrites the far with the near. Indexed writes have no order on a GPU, so each view sorts its fragments
    by pixel, then depth, and keeps the first of each pixel, which is the picture that a painter ends with.
    """
    points_N3t = torch.from_numpy(np.ascontiguousarray(points_N3, dtype=np.float32)).to(device)
    colors_N3t = torch.from_numpy(np.ascontiguousarray(colors_N3)).to(device)
    return [_paint(points_N3t, colors_N3t, camera, reach) for camera in cameras]


def _paint(points_N3: torch.Tensor, colors_N3: torch.Tensor, camera: Camera, reach: int) -> Render:
    width, height, device = camera.width, camera.height, points_N3.device
    pose_44 = torch.from_numpy(camera.world_to_camera_44()).float().to(device)
    matrix_33 = torch.from_numpy(np.asarray(camera.intrinsics_33, dtype=np.float32)).to(device)
    camera_N3 = points_N3 @ pose_44[:3, :3].T + pose_44[:3, 3]
    index_N = torch.nonzero(camera_N3[:, 2] >= NEAR_PLANE)[:, 0]
    depth_N = camera_N3[index_N, 2]
    uv_N2 = ((camera_N3[index_N] / depth_N[:, None]) @ matrix_33.T)[:, :2].round().long()
    side = torch.arange(-reach, reach + 1, device=device)
    offset_S2 = torch.cartesian_prod(side, side).view(-1, 2)
    uv_F2 = (uv_N2[:, None] + offset_S2).view(-1, 2)
    point_F, depth_F = index_N.repeat_interleave(len(offset_S2)), depth_N.repeat_interleave(len(offset_S2))
    inside_F = ((uv_F2 >= 0) & (uv_F2 < torch.tensor([width, height], device=device))).all(1)
    pixel_F = uv_F2[inside_F, 1] * width + uv_F2[inside_F, 0]
    key_F, order_F = torch.sort((pixel_F << 32) | depth_F[inside_F].view(torch.int32).long(), stable=True)
    first_F = torch.ones_like(key_F, dtype=torch.bool)
    first_F[1:] = (key_F[1:] >> 32) != (key_F[:-1] >> 32)
    kept = order_F[first_F]
    pixel, point = pixel_F[kept], point_F[inside_F][kept]
    color = torch.full((height * width, 3), 255, dtype=torch.uint8, device=device)
    depth = torch.zeros(height * width, device=device)
    index = torch.full((height * width,), -1, dtype=torch.int32, device=device)
    color[pixel], depth[pixel], index[pixel] = colors_N3[point], depth_F[inside_F][kept], point.int()
    return Render(
        color.view(height, width, 3).cpu().numpy(),
        depth.view(height, width).cpu().numpy(),
        index.view(height, width).cpu().numpy(),
    )
