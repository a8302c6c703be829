"""Point splatting: every point is drawn as a disc, the nearest surface wins, and each pixel names its point.

A disc is a shallow paraboloid: its depth grows towards the rim, so that on a slanted surface a pixel shows the point
nearest to it on the screen and not the one nearest to the camera. Discs of one pixel radius that share a centre
differ only in depth, so the nearest stands for all of them; what is left is a min-dilation of one z-buffer a radius.
That costs the same for 40 thousand points as for a million.

Shapes: C cameras, N points, H rows, W columns, S pixel radii. World frame, metres.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .camera import NEAR_PLANE, Camera, Render

EMPTY = torch.iinfo(torch.int64).max
_DEPTH_UNIT = 1e-4  # metres a step of the depth half of a key
_CELL = 0.15  # metres; cells in which the density of points is measured
_BUFFER = 1 << 24  # int64 cells of z-buffer at a time (128 MB)
_RADII = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32)  # pixel radii that are drawn; others are rounded to the nearest


def splat(
    points_N3: np.ndarray,
    colors_N3: np.ndarray,
    camera: Camera,
    *,
    radius: float | None = None,
    max_pixels: int | None = None,
    fill_holes: bool = True,
    smooth: bool = True,
    background: tuple[int, int, int] = (255, 255, 255),
    device: str | torch.device = "cpu",
) -> Render:
    """Render a coloured point cloud; see `splat_batch`."""
    return splat_batch(
        points_N3,
        colors_N3,
        [camera],
        radius=radius,
        max_pixels=max_pixels,
        fill_holes=fill_holes,
        smooth=smooth,
        background=background,
        device=device,
    )[0]


def splat_batch(
    points_N3: np.ndarray,
    colors_N3: np.ndarray,
    cameras: Sequence[Camera],
    *,
    radius: float | None = None,
    max_pixels: int | None = None,
    fill_holes: bool = True,
    smooth: bool = True,
    background: tuple[int, int, int] = (255, 255, 255),
    device: str | torch.device = "cpu",
) -> list[Render]:
    """Render one coloured point cloud from several cameras of one picture size.

    `radius` is every point's radius in metres; None adapts it to the local density, so that surfaces close. No disc
    is drawn with a radius above `max_pixels` (None: a sixteenth of the picture's longer side). `fill_holes` closes
    gaps of up to about six pixels with what lies behind their rim. `smooth` mixes colours of neighbouring pixels
    on one surface, which hides the discs. `index_HW` of a render is the row of `points_N3`, also where a hole was
    filled, and its depth is that of this point. ValueError for an empty cloud, coordinates that are not finite and
    cameras of different sizes.
    """
    points, colors = _check(points_N3, colors_N3, cameras)
    if not cameras:
        return []
    points_N3t = torch.from_numpy(points).to(device)
    colors_N3t = torch.from_numpy(colors).to(device)
    if radius is None:
        radius_N = point_radii(points_N3t)
    else:
        radius_N = torch.full((len(points),), float(radius), device=device)
    width, height = cameras[0].width, cameras[0].height
    limit = max(width, height) // 16 if max_pixels is None else max_pixels
    radii = [size for size in _RADII if size <= max(limit, 0)]
    step = max(1, _BUFFER // (len(radii) * width * height))
    renders: list[Render] = []
    for first in range(0, len(cameras), step):
        some = cameras[first : first + step]
        key_CHW, depth_CN = _splat_keys(points_N3t, radius_N, some, radii)
        if fill_holes:
            key_CHW = _fill(key_CHW)
        for key_HW, depth_N in zip(key_CHW, depth_CN, strict=True):
            where = torch.nonzero(key_HW != EMPTY, as_tuple=True)
            index_P = key_HW[where] & 0xFFFFFFFF
            color_P3, depth_P = colors_N3t[index_P], depth_N[index_P]
            if smooth:
                color_P3 = _smooth(key_HW.shape, where, color_P3, depth_P)
            renders.append(unpack_render(key_HW.shape, where, color_P3, depth_P, index_P, background))
    return renders


def _check(points_N3: np.ndarray, colors_N3: np.ndarray, cameras: Sequence[Camera]) -> tuple[np.ndarray, np.ndarray]:
    """Contiguous float32 points and uint8 colours, or a ValueError that says what is wrong."""
    points_N3 = np.ascontiguousarray(points_N3, dtype=np.float32)
    colors_N3 = np.ascontiguousarray(colors_N3, dtype=np.uint8)
    if points_N3.ndim != 2 or points_N3.shape[1] != 3 or colors_N3.shape != points_N3.shape:
        raise ValueError(
            f"A cloud needs points [N, 3] and as many colours, not {points_N3.shape} and {colors_N3.shape}."
        )
    if not len(points_N3):
        raise ValueError("The cloud has no points; check the scan file.")
    if not np.isfinite(points_N3).all():
        raise ValueError("The cloud has coordinates that are not finite; remove these points first.")
    if len({(camera.width, camera.height) for camera in cameras}) > 1:
        raise ValueError("Cameras of one batch must share their picture size; splat other sizes on their own.")
    return points_N3, colors_N3


def point_radii(points_N3: Tensor) -> Tensor:
    """Radius [N], metres, at which neighbouring discs on a surface overlap, from the local density of points.

    n points in a cell of side s lie about s / sqrt(n) apart where one sheet of surface crosses the cell. The factor
    covers the diagonal of a square grid and some irregularity.
    """
    cell_N3 = torch.floor((points_N3 - points_N3.amin(0)) / _CELL).long()
    size_3 = cell_N3.amax(0) + 1
    flat_N = (cell_N3[:, 0] * size_3[1] + cell_N3[:, 1]) * size_3[2] + cell_N3[:, 2]
    _, inverse_N, count_U = torch.unique(flat_N, return_inverse=True, return_counts=True)
    # cells that a surface only grazes hold few points: never thinner than twice the usual density suggests
    usual = count_U[inverse_N].float().median()
    count_N = count_U[inverse_N].float().maximum(usual / 4)
    return _CELL / count_N.sqrt()


def _project(points_N3: Tensor, cameras: Sequence[Camera]) -> tuple[Tensor, Tensor, Tensor]:
    """Rounded columns and rows [C, N] (int64) and depth [C, N] (float32, metres) of points in every camera.

    Points nearer than the near plane get column and row -2^20, far outside every picture.
    """
    pose_C44 = torch.from_numpy(np.stack([camera.world_to_camera_44() for camera in cameras]))
    matrix_C33 = torch.from_numpy(np.stack([np.asarray(camera.intrinsics_33, np.float64) for camera in cameras]))
    world_C34 = (matrix_C33 @ pose_C44[:, :3]).float().to(points_N3.device)
    image_C3N = world_C34[:, :, :3] @ points_N3.T + world_C34[:, :, 3:]
    depth_CN = image_C3N[:, 2]
    front_CN = depth_CN >= NEAR_PLANE
    scale_CN = 1 / torch.where(front_CN, depth_CN, 1.0)
    limit = float(1 << 20)
    uv_C2N = (image_C3N[:, :2] * scale_CN[:, None] + 0.5).floor().clamp(-limit, limit)
    uv_C2N = torch.where(front_CN[:, None], uv_C2N, -limit).long()
    return uv_C2N[:, 0], uv_C2N[:, 1], depth_CN


def _splat_keys(
    points_N3: Tensor, radius_N: Tensor, cameras: Sequence[Camera], radii: list[int]
) -> tuple[Tensor, Tensor]:
    """Z-buffers [C, H, W] of int64 keys (biased depth above, point below) and depth [C, N] of the points."""
    width, height, device = cameras[0].width, cameras[0].height, points_N3.device
    column_CN, row_CN, depth_CN = _project(points_N3, cameras)
    focal_C1 = torch.tensor([float(camera.intrinsics_33[0][0]) for camera in cameras], device=device)[:, None]
    pixels_CN = focal_C1 * radius_N / depth_CN.clamp(min=NEAR_PLANE)
    middles = torch.tensor([(low + high) / 2 for low, high in zip(radii, radii[1:], strict=False)], device=device)
    size_CN = torch.bucketize(pixels_CN, middles)
    pad = radii[-1]  # discs whose centre lies outside the picture still reach into it
    wide, tall = width + 2 * pad, height + 2 * pad
    kept_CN = (column_CN >= -pad) & (column_CN < width + pad) & (row_CN >= -pad) & (row_CN < height + pad)
    camera_L, point_L = torch.nonzero(kept_CN, as_tuple=True)
    column_L, row_L = column_CN[camera_L, point_L] + pad, row_CN[camera_L, point_L] + pad
    cell_L = ((size_CN[camera_L, point_L] * len(cameras) + camera_L) * tall + row_L) * wide + column_L
    steps_L = (depth_CN[camera_L, point_L].double() / _DEPTH_UNIT).long()
    key_SCHW = torch.full((len(radii) * len(cameras) * tall * wide,), EMPTY, dtype=torch.int64, device=device)
    key_SCHW.scatter_reduce_(0, cell_L, (steps_L << 32) | point_L, "amin")
    used = torch.unique(size_CN[camera_L, point_L]).tolist()
    key_SCHW = key_SCHW.view(len(radii), len(cameras), tall, wide)
    rise = 2 * float(radius_N.median()) / _DEPTH_UNIT
    key_CHW = torch.full((len(cameras), tall, wide), EMPTY, dtype=torch.int64, device=device)
    for size in used:
        _dilate_into(key_CHW, key_SCHW[size], radii[size], rise)
    return key_CHW[:, pad : pad + height, pad : pad + width], depth_CN


def disc_rise(radius: int, rise: float) -> int:
    """Depth steps that a disc of `radius` pixels falls back at one pixel from its centre (times distance squared)."""
    return round(rise / (radius + 0.5) ** 2)


def disc_half_widths(radius: int) -> list[int]:
    """Half width of a disc's rows, at 0..radius rows from its centre: pixels within radius + 1/2 of it."""
    return [int(np.sqrt((radius + 0.5) ** 2 - row**2)) for row in range(radius + 1)]


def _dilate_into(target_CHW: Tensor, key_CHW: Tensor, radius: int, rise: float) -> None:
    """Draw one disc of `radius` pixels a key into `target_CHW`, the smallest key winning in every pixel."""
    if radius == 0:
        torch.minimum(target_CHW, key_CHW, out=target_CHW)
        return
    back = disc_rise(radius, rise)
    rows_by_width: dict[int, list[int]] = {}
    for row, half_width in enumerate(disc_half_widths(radius)):
        rows_by_width.setdefault(half_width, []).append(row)
    # EMPTY must survive the additions below
    source_CHW = key_CHW.clamp(max=EMPTY - ((2 * back * (radius + 1) ** 2) << 32))
    widened_CHW, scratch_CHW = source_CHW.clone(), torch.empty_like(source_CHW)
    for half_width in range(max(rows_by_width) + 1):
        if half_width:
            torch.add(source_CHW, (back * half_width**2) << 32, out=scratch_CHW)
            _minimum(widened_CHW[..., half_width:], scratch_CHW[..., :-half_width])
            _minimum(widened_CHW[..., :-half_width], scratch_CHW[..., half_width:])
        for row in rows_by_width.get(half_width, []):
            if row == 0:
                _minimum(target_CHW, widened_CHW)
                continue
            torch.add(widened_CHW, (back * row**2) << 32, out=scratch_CHW)
            _minimum(target_CHW[:, row:], scratch_CHW[:, :-row])
            _minimum(target_CHW[:, :-row], scratch_CHW[:, row:])
    target_CHW.masked_fill_(target_CHW >= EMPTY - ((4 * back * (radius + 1) ** 2) << 32), EMPTY)


def _minimum(target: Tensor, other: Tensor) -> None:
    torch.minimum(target, other, out=target)


def _fill(key_CHW: Tensor, rounds: int = 8) -> Tensor:
    """Fill empty pixels, rim first, each with its farthest neighbour where four or more of the eight are filled."""
    padded_CHW = F.pad(torch.where(key_CHW == EMPTY, -1, key_CHW), (1, 1, 1, 1), value=-1)
    camera_P, row_P, column_P = torch.nonzero(key_CHW == EMPTY, as_tuple=True)
    offsets = [(down, right) for down in range(3) for right in range(3) if (down, right) != (1, 1)]
    for _ in range(rounds):
        around_8P = torch.stack([padded_CHW[camera_P, row_P + down, column_P + right] for down, right in offsets])
        ready_P = (around_8P >= 0).sum(0) >= 4
        if not ready_P.any():
            break
        at = (camera_P[ready_P], row_P[ready_P] + 1, column_P[ready_P] + 1)
        padded_CHW[at] = around_8P[:, ready_P].amax(0)
        camera_P, row_P, column_P = camera_P[~ready_P], row_P[~ready_P], column_P[~ready_P]
    filled_CHW = padded_CHW[:, 1:-1, 1:-1]
    return torch.where(filled_CHW < 0, EMPTY, filled_CHW)


def _smooth(size_HW: Sequence[int], where: tuple[Tensor, ...], color_P3: Tensor, depth_P: Tensor) -> Tensor:
    """Colours of the pixels `where`, each mixed with neighbours whose depth says that they lie on one surface."""
    height, width = size_HW
    color_3HW = torch.zeros(3, height, width, device=depth_P.device)
    color_3HW[(slice(None), *where)] = color_P3.T.float()
    depth_HW = torch.zeros(height, width, device=depth_P.device)
    depth_HW[where] = depth_P
    steps = [1 << power for power in range(max(height, width).bit_length() - 6)]  # 1, 2 at 224; 1, 2, 4, 8 at 640
    for step in steps:
        for axis in (0, 1):
            keep, first, last = depth_HW.shape[axis] - step, (axis, 0), (axis, step)
            if keep < 1:
                continue
            before_HW, after_HW = depth_HW.narrow(*first, keep), depth_HW.narrow(*last, keep)
            near_HW = ((before_HW - after_HW).abs() < 0.03 + 0.03 * before_HW).float()
            total_3HW, weight_HW = color_3HW.clone(), torch.ones_like(depth_HW)
            total_3HW.narrow(axis + 1, step, keep).addcmul_(color_3HW.narrow(axis + 1, 0, keep), near_HW)
            total_3HW.narrow(axis + 1, 0, keep).addcmul_(color_3HW.narrow(axis + 1, step, keep), near_HW)
            weight_HW.narrow(*last, keep).add_(near_HW)
            weight_HW.narrow(*first, keep).add_(near_HW)
            color_3HW = total_3HW.div_(weight_HW)
    return color_3HW[(slice(None), *where)].T.add(0.5).clamp(0, 255).to(torch.uint8)


def unpack_render(
    size_HW: Sequence[int],
    where: tuple[Tensor, ...],
    color_P3: Tensor,
    depth_P: Tensor,
    index_P: Tensor,
    background: tuple[int, int, int],
) -> Render:
    """A Render from the values of the P pixels `where` (rows, columns) that show something."""
    height, width = size_HW
    device = depth_P.device
    color_HW3 = torch.tensor(background, dtype=torch.uint8, device=device).expand(height, width, 3).clone()
    depth_HW = torch.zeros(height, width, device=device)
    index_HW = torch.full((height, width), -1, dtype=torch.int32, device=device)
    color_HW3[where], depth_HW[where], index_HW[where] = color_P3, depth_P.float(), index_P.int()
    return Render(color_HW3.cpu().numpy(), depth_HW.cpu().numpy(), index_HW.cpu().numpy())


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
    measured; a point that falls there counts as not seen.
    """
    points = torch.from_numpy(np.ascontiguousarray(points_N3, dtype=np.float32)).to(device)
    seen = np.zeros((len(cameras), len(points)), dtype=bool)
    for row, (camera, depth_HW) in enumerate(zip(cameras, depths, strict=True)):
        column_1N, row_1N, depth_1N = _project(points, [camera])
        inside_N = ((column_1N >= 0) & (column_1N < camera.width) & (row_1N >= 0) & (row_1N < camera.height))[0]
        point_L = torch.nonzero(inside_N)[:, 0]
        surface_HW = torch.from_numpy(np.ascontiguousarray(depth_HW, dtype=np.float32)).to(device)
        surface_L = surface_HW[row_1N[0, point_L], column_1N[0, point_L]]
        kept_L = (surface_L > 0) & (depth_1N[0, point_L] <= surface_L * 1.02 + tolerance)
        seen[row, point_L[kept_L].cpu().numpy()] = True
    return seen
