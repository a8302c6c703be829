"""Point splatting: every point is drawn as a disc, the nearest surface wins, and each pixel names its point.

A disc is a shallow paraboloid: its depth grows towards the rim, so that on a slanted surface a pixel shows the point
nearest to it on the screen and not the one nearest to the camera. Discs of one pixel radius that share a centre
differ only in depth, so the nearest stands for all of them; what is left is a min-dilation of one z-buffer a radius.
That costs the same for 40 thousand points as for a million.

On a GPU the kernels of `splat_triton.py` make the same pictures, elsewhere the operations here. The environment
variable THREEDR1_SPLAT chooses: `torch` takes the operations everywhere, `triton` the kernels, on a CPU too (for
Triton's interpreter).

Shapes: C cameras, N points, H rows, W columns, S pixel radii. World frame, metres.
"""

from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .camera import Camera, Render
from .kernels import takes_triton
from .projection import PROJECTED, homogeneous, inside, project, world_to_picture
from .threads import one_thread

VARIABLE = "THREEDR1_SPLAT"
EMPTY = torch.iinfo(torch.int64).max
STEPS = 1e4  # steps of the depth half of a key a metre
FARTHEST = (1 << 28) - 1  # steps, 27 km; what is farther away counts as there
_BLANK = 1 << 62  # above every key and what a disc's rim adds to it, with room for that above itself
_CELL = 0.15  # metres; cells in which the density of points is measured
_GRID = 1 << 24  # such cells, at most, to count in a table (64 MB); beyond that they are sorted
_CPU_PLANE = 1 << 16  # pixels of all views drawn at a time on a CPU: one z-buffer of them (512 KB) stays in its cache
_GPU_BUFFER = 1 << 24  # int64 cells of z-buffer at a time on a GPU (128 MB)
_RADII = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32)  # pixel radii that are drawn; others are rounded to the nearest
FILL_ROUNDS = 8


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

    A GPU makes the same pictures as a CPU, but for pixels where rounding decides (tests allow one in 10,000). There
    the pictures of one call share page-locked memory, which stays taken while one of them lives: copy what is kept
    for long.
    """
    points, colors = _check(points_N3, colors_N3, cameras)
    if not cameras:
        return []
    device = torch.device(device)
    with one_thread() if device.type == "cpu" else nullcontext():
        return _render(points, colors, cameras, radius, max_pixels, fill_holes, smooth, background, device)


def _render(
    points: np.ndarray,
    colors: np.ndarray,
    cameras: Sequence[Camera],
    radius: float | None,
    max_pixels: int | None,
    fill_holes: bool,
    smooth: bool,
    background: tuple[int, int, int],
    device: torch.device,
) -> list[Render]:
    """What `splat_batch` says, of arrays that `_check` let pass."""
    points_N3 = torch.from_numpy(points).to(device, non_blocking=True)
    colors_N3 = torch.from_numpy(colors).to(device, non_blocking=True)
    if radius is None:
        radius_N = point_radii(points_N3)
    else:
        radius_N = torch.full((len(points),), float(radius), device=device)
    middle = _median(radius_N) if radius is None else radius_N[0]
    width, height = cameras[0].width, cameras[0].height
    limit = max(width, height) // 16 if max_pixels is None else max_pixels
    radii = [size for size in _RADII if size <= max(limit, 0)]
    step = _cameras_at_once(device, (width + 2 * radii[-1]) * (height + 2 * radii[-1]), len(radii), len(points))
    some = [cameras[first : first + step] for first in range(0, len(cameras), step)]
    style = {"fill_holes": fill_holes, "smooth": smooth, "background": background}
    if takes_triton(VARIABLE, device.type == "cuda"):
        from .splat_triton import draw_views

        parts = [draw_views(points_N3, colors_N3, radius_N, middle, part, radii, **style) for part in some]
    else:
        parts = _draw_views(points_N3, colors_N3, radius_N, middle, some, radii, **style)
    return [render for part in parts for render in _to_host(*part)]


def _draw_views(
    points_N3: Tensor,
    colors_N3: Tensor,
    radius_N: Tensor,
    middle: Tensor,
    cameras: Sequence[Sequence[Camera]],
    radii: list[int],
    *,
    fill_holes: bool,
    smooth: bool,
    background: tuple[int, int, int],
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Colours, depth and points of each list of cameras, as `_shade` has them; `middle` is the median radius."""
    points_4N = homogeneous(points_N3)
    rise = min(2 * float(middle) * STEPS, float(FARTHEST))
    parts = []
    for some in cameras:
        key_CHW, depth_CN = _splat_keys(points_4N, radius_N, rise, some, radii)
        if fill_holes:
            key_CHW = _fill(key_CHW)
        parts.append(_shade(key_CHW, depth_CN, colors_N3, smooth, background))
    return parts


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
    # by a tensor: by a number, a GPU multiplies with its rounded inverse
    cell_N3 = torch.floor((points_N3 - points_N3.amin(0)) / _constant([_CELL], points_N3.device)).long()
    wide, deep, tall = (size + 1 for size in cell_N3.amax(0).tolist())
    flat_N = torch.add(cell_N3[:, 2], torch.add(cell_N3[:, 1], cell_N3[:, 0], alpha=deep), alpha=tall)
    if wide * deep * tall <= _GRID:
        count_U = torch.zeros(wide * deep * tall, dtype=torch.int32, device=flat_N.device)
        count_U.scatter_add_(0, flat_N, torch.ones_like(flat_N, dtype=torch.int32))
        number_N = count_U[flat_N].float()
    else:
        _, inverse_N, count_U = torch.unique(flat_N, return_inverse=True, return_counts=True)
        number_N = count_U[inverse_N].float()
    # cells that a surface only grazes hold few points: never thinner than twice the usual density suggests
    return _CELL / number_N.maximum(_median(number_N) / 4).sqrt()


def _median(values_N: Tensor) -> Tensor:
    """The lower median, which `Tensor.median` finds on a GPU by some twenty walks of one core over all values."""
    if values_N.device.type == "cpu":
        return values_N.median()
    return values_N.sort().values[(len(values_N) - 1) // 2]


def _cameras_at_once(device: torch.device, cells: int, num_radii: int, num_points: int) -> int:
    """Cameras, of so many cells a z-buffer, to draw together: few and large tasks for a GPU, small ones for a CPU."""
    drawn = _CPU_PLANE // cells if device.type == "cpu" else _GPU_BUFFER // (num_radii * cells)
    return max(1, min(drawn, PROJECTED // num_points))


def _radii_at_once(device: torch.device) -> int:
    """Pixel radii to draw together, likewise."""
    return 1 if device.type == "cpu" else len(_RADII)


def _constant(values: Sequence[float] | Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """A short tensor on `device`, without waiting for what the device still does."""
    return torch.tensor(values).to(device, non_blocking=True)


def _splat_keys(
    points_4N: Tensor, radius_N: Tensor, rise: float, cameras: Sequence[Camera], radii: list[int]
) -> tuple[Tensor, Tensor]:
    """Z-buffers [C, H, W] of int64 keys (biased depth above, point below) and depth [C, N] of the points."""
    width, height, device = cameras[0].width, cameras[0].height, points_4N.device
    column_CN, row_CN, depth_CN = project(points_4N, world_to_picture(cameras))
    pad = radii[-1]  # discs whose centre lies outside the picture still reach into it
    wide, tall = width + 2 * pad, height + 2 * pad
    key_CHW = torch.full((len(cameras), tall, wide), EMPTY, dtype=torch.int64, device=device)
    inside_CHW = key_CHW[:, pad : pad + height, pad : pad + width]
    at_L = torch.nonzero(inside(column_CN, row_CN, depth_CN, width, height, pad).view(-1))[:, 0]
    if not len(at_L):
        return inside_CHW, depth_CN
    camera_L = torch.div(at_L, len(radius_N), rounding_mode="floor")
    point_L = torch.sub(at_L, camera_L, alpha=len(radius_N))
    depth_L = depth_CN.take(at_L)
    focal_C = _constant([float(camera.intrinsics_33[0][0]) for camera in cameras], device)
    size_L = _disc_sizes(focal_C[camera_L] * radius_N[point_L] / depth_L, radii)
    smallest, largest = torch.stack(torch.aminmax(size_L)).tolist()
    plane_L = torch.add(camera_L, size_L - smallest, alpha=len(cameras))
    pixel_L = torch.add(column_CN.take(at_L), row_CN.take(at_L), alpha=wide).long() + (pad * wide + pad)
    cell_L = torch.add(pixel_L, plane_L, alpha=tall * wide)
    steps_L = (depth_L.double() * STEPS).clamp_(max=FARTHEST).long()
    key_SCHW = torch.full((largest - smallest + 1, *key_CHW.shape), _BLANK, dtype=torch.int64, device=device)
    key_SCHW.view(-1).scatter_reduce_(0, cell_L, torch.add(point_L, steps_L, alpha=1 << 32), "amin")
    used, together = radii[smallest : largest + 1], _radii_at_once(device)
    for first in range(0, len(key_SCHW), together):
        some = used[first : first + together]
        margin = pad - some[-1]  # no disc from within it reaches the picture
        window = (..., slice(margin, tall - margin), slice(margin, wide - margin))
        _draw_discs(key_CHW[window], key_SCHW[first : first + together][window], some, rise)
    return inside_CHW.masked_fill_(inside_CHW >= _BLANK, EMPTY), depth_CN


def _disc_sizes(pixels_L: Tensor, radii: list[int]) -> Tensor:
    """Index into `radii` of the radius nearest to each of `pixels_L`; the smaller one half way between two."""
    return torch.bucketize(pixels_L, _constant(size_limits(radii), pixels_L.device))


def size_limits(radii: Sequence[int]) -> list[float]:
    """The largest pixel radius that is drawn as each of `radii` but the last."""
    return [(low + high) / 2 for low, high in zip(radii, radii[1:], strict=False)]


def disc_rise(radius: int, rise: float) -> int:
    """Depth steps that a disc of `radius` pixels falls back at one pixel from its centre (times distance squared)."""
    return round(rise / (radius + 0.5) ** 2)


def disc_half_widths(radius: int) -> list[int]:
    """Half width of a disc's rows, at 0..radius rows from its centre: pixels within radius + 1/2 of it."""
    return [int(np.sqrt((radius + 0.5) ** 2 - row**2)) for row in range(radius + 1)]


def _draw_discs(target_CHW: Tensor, key_SCHW: Tensor, radii: Sequence[int], rise: float) -> None:
    """Draw a disc of `radii[s]` pixels a key of `key_SCHW[s]` into `target_CHW`, the smallest key winning everywhere.

    A disc is the union of its rows, each a dilation along columns: keys of all radii are widened together, one
    column on both sides at a time, and each row is drawn when the keys are as wide as it.
    """
    backs = [disc_rise(radius, rise) if radius else 0 for radius in radii]
    widths = [disc_half_widths(radius) for radius in radii]
    bias_WS = [
        [(back * away**2) << 32 if away <= radius else 0 for back, radius in zip(backs, radii, strict=True)]
        for away in range(radii[-1] + 1)
    ]
    bias_WS111 = _constant(bias_WS, key_SCHW.device)[..., None, None, None]
    widened_SCHW, scratch_SCHW = key_SCHW.clone(), torch.empty_like(key_SCHW)
    rows: dict[int, Tensor] = {}  # what is left to draw that many rows above and below
    for away in range(radii[-1] + 1):
        first = sum(radius < away for radius in radii)
        if away:
            some_SCHW, wider_SCHW = scratch_SCHW[first:], widened_SCHW[first:]
            torch.add(key_SCHW[first:], bias_WS111[away, first:], out=some_SCHW)
            _minimum(wider_SCHW[..., away:], some_SCHW[..., :-away])
            _minimum(wider_SCHW[..., :-away], some_SCHW[..., away:])
        for size in range(first, len(radii)):
            for row in [row for row, width in enumerate(widths[size]) if width == away]:
                if row == 0:
                    _minimum(target_CHW, widened_SCHW[size])
                    continue
                more = size + 1 < len(radii)  # a larger disc has this row too, wider: it comes later
                out_CHW = None if more and row not in rows else scratch_SCHW[size]
                row_CHW = torch.add(widened_SCHW[size], bias_WS[row][size], out=out_CHW)
                if row in rows:
                    row_CHW = torch.minimum(rows[row], row_CHW, out=rows[row])
                if more:
                    rows[row] = row_CHW
                    continue
                _minimum(target_CHW[:, row:], row_CHW[:, :-row])
                _minimum(target_CHW[:, :-row], row_CHW[:, row:])


def _minimum(target: Tensor, other: Tensor) -> None:
    torch.minimum(target, other, out=target)


def _fill(key_CHW: Tensor) -> Tensor:
    """Fill empty pixels, rim first, each with its farthest neighbour where four or more of the eight are filled."""
    empty_CHW = key_CHW == EMPTY
    padded_CHW = F.pad(key_CHW.masked_fill(empty_CHW, -1), (1, 1, 1, 1), value=-1)
    wide, flat_M = padded_CHW.shape[2], padded_CHW.view(-1)
    inner_CHW = torch.zeros_like(padded_CHW, dtype=torch.bool)
    inner_CHW[:, 1:-1, 1:-1] = empty_CHW
    hole_P = torch.nonzero(inner_CHW.view(-1))[:, 0]
    offsets = [down * wide + right for down in (-1, 0, 1) for right in (-1, 0, 1) if (down, right) != (0, 0)]
    around_8P = hole_P + _constant(offsets, hole_P.device)[:, None]
    needed_P, nothing_1 = torch.full_like(hole_P, 4), hole_P.new_full((1,), -1)
    for _ in range(FILL_ROUNDS):
        near_8P = flat_M.take(around_8P)
        ready_P = (near_8P >= 0).sum(0) >= needed_P
        # asking a GPU would make the host wait in every round
        if flat_M.device.type == "cpu" and not ready_P.any():
            break
        flat_M.scatter_reduce_(0, hole_P, torch.where(ready_P, near_8P.amax(0), nothing_1), "amax")
        needed_P.masked_fill_(ready_P, 9)  # more than there are: what is filled stays as it is
    filled_CHW = padded_CHW[:, 1:-1, 1:-1]
    return filled_CHW.masked_fill(filled_CHW < 0, EMPTY)


def _shade(
    key_CHW: Tensor, depth_CN: Tensor, colors_N3: Tensor, smooth: bool, background: tuple[int, int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Colours [C, H, W, 3] uint8, depth [C, H, W] float32 and point [C, H, W] int32 of what z-buffers show."""
    empty_CHW = key_CHW == EMPTY
    index_CHW = (key_CHW & 0xFFFFFFFF).masked_fill_(empty_CHW, 0)
    depth_CHW = depth_CN.gather(1, index_CHW.flatten(1)).view(index_CHW.shape).masked_fill_(empty_CHW, 0)
    color_CHW3 = colors_N3[index_CHW]
    if smooth:
        mixed_C3HW = _smooth(color_CHW3.permute(0, 3, 1, 2), depth_CHW)
        color_CHW3 = mixed_C3HW.add_(0.5).clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    paper_3 = _constant(background, key_CHW.device).to(torch.uint8)
    color_CHW3 = torch.where(empty_CHW[..., None], paper_3, color_CHW3).contiguous()
    return color_CHW3, depth_CHW, index_CHW.masked_fill_(empty_CHW, -1).int()


def mixing_steps(height: int, width: int) -> list[int]:
    """How many pixels apart neighbours are in each round of smoothing: 1, 2 at 224; 1, 2, 4, 8 at 640."""
    return [1 << power for power in range(max(height, width).bit_length() - 6)]


def _smooth(color_C3HW: Tensor, depth_CHW: Tensor) -> Tensor:
    """Colours, float32, mixed with neighbouring pixels whose depth (0 for none) says that they lie on one surface."""
    height, width = depth_CHW.shape[1:]
    # the fourth channel counts what was mixed
    mixed_C4HW = torch.ones(len(depth_CHW), 4, height, width, device=depth_CHW.device)
    mixed_C4HW[:, :3] = color_C3HW
    limit_C1HW = 0.03 + 0.03 * depth_CHW[:, None]  # metres
    for step in mixing_steps(height, width):
        for axis in (2, 3):
            keep, first, last = mixed_C4HW.shape[axis] - step, (axis, 0), (axis, step)
            if keep < 1:
                continue
            apart_C1HW = depth_CHW[:, None].narrow(*first, keep) - depth_CHW[:, None].narrow(*last, keep)
            near_C1HW = (apart_C1HW.abs_() < limit_C1HW.narrow(*first, keep)).float()
            total_C4HW = mixed_C4HW.clone()
            total_C4HW.narrow(*last, keep).addcmul_(mixed_C4HW.narrow(*first, keep), near_C1HW)
            total_C4HW.narrow(*first, keep).addcmul_(mixed_C4HW.narrow(*last, keep), near_C1HW)
            mixed_C4HW = total_C4HW / total_C4HW[:, 3:]
    return mixed_C4HW[:, :3]


def _to_host(*pictures_CHW: Tensor) -> list[Render]:
    """Renders of colours [C, H, W, 3], depth [C, H, W] and point [C, H, W], fetched from their device in one wait."""
    if pictures_CHW[0].device.type == "cpu":
        return [Render(*(picture.numpy() for picture in view)) for view in zip(*pictures_CHW, strict=True)]
    fetched = [torch.empty_like(picture, device="cpu", pin_memory=True) for picture in pictures_CHW]
    for there, here in zip(pictures_CHW, fetched, strict=True):
        here.copy_(there, non_blocking=True)
    torch.cuda.current_stream(pictures_CHW[0].device).synchronize()
    return [Render(*view) for view in zip(*(picture.numpy() for picture in fetched), strict=True)]
