"""The splatter's passes as Triton kernels; `splat.py` has the same in plain PyTorch.

Fifteen launches draw all views of 224 x 224: one scatters every point's key into the z-buffer of its disc's radius,
one draws the discs, eight fill holes, one looks up what pixels show, four mix colours. Nothing waits for the GPU.

Imported only where it serves: a GPU, or the interpreter (`TRITON_INTERPRET=1`) on a CPU.

Shapes: C cameras, N points, H rows, W columns, S pixel radii, K pixels of all discs, P = C H W pixels of all pictures.
"""

import functools
from collections.abc import Sequence

import numpy as np
import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from .camera import NEAR_PLANE, Camera
from .projection import world_to_picture
from .splat import EMPTY, FARTHEST, FILL_ROUNDS, STEPS, disc_half_widths, mixing_steps, size_limits

BLOCK = 256  # points, cells or pixels of a program
_EMPTY = tl.constexpr(EMPTY)
_NEAR = tl.constexpr(NEAR_PLANE)
_STEPS = tl.constexpr(STEPS)
_FARTHEST = tl.constexpr(float(FARTHEST))
# a product and a sum that were rounded together would be another number than the plain passes'
_OPTIONS = {"enable_fp_fusion": False}


@triton.jit
def _along(matrix, row, x, y, z):
    """Row of a camera's matrix times points, float32; the product is taken in float64."""
    a = tl.load(matrix + 4 * row)
    b = tl.load(matrix + 4 * row + 1)
    c = tl.load(matrix + 4 * row + 2)
    return (a * x + b * y + c * z + tl.load(matrix + 4 * row + 3)).to(tl.float32)


@triton.jit
def _pixel_of(image, scale):
    """Whole column or row of an image coordinate, within what an int32 holds."""
    return tl.minimum(tl.maximum(tl.floor(image * scale + 0.5), -1048576.0), 1048576.0).to(tl.int64)


@triton.jit(do_not_specialize=["count", "cameras", "tall", "wide", "pad"])
def _scatter_kernel(
    points, radius, views, limits, planes, count, cameras, tall, wide, pad, SIZES: tl.constexpr, BLOCK: tl.constexpr
):
    camera = tl.program_id(1)
    point = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = point < count
    x = tl.load(points + 3 * point, mask=live, other=0.0).to(tl.float64)
    y = tl.load(points + 3 * point + 1, mask=live, other=0.0).to(tl.float64)
    z = tl.load(points + 3 * point + 2, mask=live, other=0.0).to(tl.float64)
    view = views + 13 * camera
    depth = _along(view, 2, x, y, z)
    live = live & (depth >= _NEAR)
    before = tl.where(live, depth, 1.0)
    scale = tl.div_rn(1.0, before)
    column = _pixel_of(_along(view, 0, x, y, z), scale) + pad
    row = _pixel_of(_along(view, 1, x, y, z), scale) + pad
    live = live & (column >= 0) & (column < wide) & (row >= 0) & (row < tall)
    pixels = tl.div_rn(tl.load(view + 12).to(tl.float32) * tl.load(radius + point, mask=live, other=0.0), before)
    size = tl.zeros([BLOCK], tl.int64)
    for larger in tl.static_range(SIZES - 1):
        size += (pixels > tl.load(limits + larger)).to(tl.int64)
    steps = tl.minimum(before.to(tl.float64) * _STEPS, _FARTHEST).to(tl.int64)
    cell = ((size * cameras + camera) * tall + row) * wide + column
    tl.atomic_min(planes + cell, (steps << 32) + point, mask=live, sem="relaxed")


@triton.jit(do_not_specialize=["cells", "pad", "height", "width"])
def _disc_kernel(
    planes,
    picture,
    offsets,
    starts,
    backs,
    cells,
    pad,
    height,
    width,
    SIZES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    size = SIZES - 1 - tl.program_id(1)  # large discs, which take longest, first
    cell = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(planes + size.to(tl.int64) * cells + cell, mask=cell < cells, other=_EMPTY)
    live = key != _EMPTY
    if tl.max(live.to(tl.int32), 0) > 0:
        wide = width + 2 * pad
        first_row = cell // ((height + 2 * pad) * wide) * height
        row = cell // wide % (height + 2 * pad) - pad
        column = cell % wide - pad
        back = tl.load(backs + size)
        pixel = tl.load(starts + size)
        end = tl.load(starts + size + 1)
        while pixel < end:  # the interpreter cannot count to a number that it has loaded
            down = row + tl.load(offsets + 3 * pixel)
            right = column + tl.load(offsets + 3 * pixel + 1)
            drawn = live & (down >= 0) & (down < height) & (right >= 0) & (right < width)
            bias = (back * tl.load(offsets + 3 * pixel + 2)) << 32
            tl.atomic_min(picture + (first_row + down) * width + right, key + bias, mask=drawn, sem="relaxed")
            pixel += 1


@triton.jit(do_not_specialize=["pixels", "height", "width"])
def _fill_kernel(source, target, pixels, height, width, BLOCK: tl.constexpr):
    pixel = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = pixel < pixels
    key = tl.load(source + pixel, mask=live, other=0)
    hole = key == _EMPTY
    row = pixel // width % height
    column = pixel % width
    around = tl.zeros([BLOCK], tl.int32)
    farthest = tl.full([BLOCK], -1, tl.int64)
    for down in tl.static_range(-1, 2):
        for right in tl.static_range(-1, 2):
            there = hole & (row + down >= 0) & (row + down < height) & (column + right >= 0) & (column + right < width)
            near = tl.load(source + pixel + down * width + right, mask=there, other=_EMPTY)
            filled = near != _EMPTY  # the pixel itself, a hole, is not
            around += filled.to(tl.int32)
            farthest = tl.maximum(farthest, tl.where(filled, near, -1))
    tl.store(target + pixel, tl.where(hole & (around >= 4), farthest, key), mask=live)


@triton.jit(do_not_specialize=["pixels", "size", "paper"])
def _look_up_kernel(
    keys,
    points,
    colors,
    views,
    depth,
    index,
    target,
    pixels,
    size,
    paper,
    SMOOTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pixel = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = pixel < pixels
    key = tl.load(keys + pixel, mask=live, other=_EMPTY)
    filled = key != _EMPTY
    point = tl.where(filled, key & 0x7FFFFFFF, 0)
    x = tl.load(points + 3 * point).to(tl.float64)
    y = tl.load(points + 3 * point + 1).to(tl.float64)
    z = tl.load(points + 3 * point + 2).to(tl.float64)
    view = views + 13 * tl.where(live, pixel // size, 0)
    tl.store(depth + pixel, tl.where(filled, _along(view, 2, x, y, z), 0.0), mask=live)
    tl.store(index + pixel, tl.where(filled, point, -1).to(tl.int32), mask=live)
    for channel in tl.static_range(3):
        color = tl.load(colors + 3 * point + channel)
        if SMOOTH:
            tl.store(target + channel * pixels + pixel, color.to(tl.float32), mask=live)
        else:
            tl.store(
                target + 3 * pixel + channel,
                tl.where(filled, color.to(tl.int32), paper >> (8 * channel)).to(tl.uint8),
                mask=live,
            )


@triton.jit(do_not_specialize=["pixels", "stride", "length", "step", "paper"])
def _mix_kernel(
    source,
    target,
    depth,
    index,
    picture,
    pixels,
    stride,
    length,
    step,
    paper,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pixel = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = pixel < pixels
    place = pixel // stride % length
    before = live & (place >= step)
    behind = live & (place + step < length)
    apart = step * stride
    own = tl.load(depth + pixel, mask=live, other=0.0)
    one = tl.load(depth + pixel - apart, mask=before, other=0.0)
    two = tl.load(depth + pixel + apart, mask=behind, other=0.0)
    before = before & (tl.abs(one - own) < 0.03 + 0.03 * one)
    behind = behind & (tl.abs(own - two) < 0.03 + 0.03 * own)
    count = 1.0 + before.to(tl.float32) + behind.to(tl.float32)
    filled = tl.load(index + pixel, mask=live, other=-1) >= 0
    for channel in tl.static_range(3):
        color = source + channel * pixels + pixel
        total = tl.load(color, mask=live, other=0.0) + tl.load(color - apart, mask=before, other=0.0)
        mean = tl.div_rn(total + tl.load(color + apart, mask=behind, other=0.0), count)
        if LAST:
            shown = tl.minimum(tl.maximum(mean + 0.5, 0.0), 255.0).to(tl.int32)
            tl.store(
                picture + 3 * pixel + channel, tl.where(filled, shown, paper >> (8 * channel)).to(tl.uint8), mask=live
            )
        else:
            tl.store(target + channel * pixels + pixel, mean, mask=live)


@functools.lru_cache(maxsize=8)
def _discs(radii: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of discs of `radii` pixels, on `device`: pixels [K, 3] int32 (rows down, columns right, sum of squares), first
    pixel of each [S + 1] int32, (radius + 1/2)^2 [S] float64 (infinite for one pixel), `size_limits` [S - 1].
    """
    pixels, starts = [], [0]
    for radius in radii:
        for row, half in enumerate(disc_half_widths(radius)):
            for down in {row, -row}:
                pixels += [(down, right, down**2 + right**2) for right in range(-half, half + 1)]
        starts.append(len(pixels))
    reaches = [(radius + 0.5) ** 2 if radius else float("inf") for radius in radii]
    return (
        torch.tensor(pixels, dtype=torch.int32).to(device),
        torch.tensor(starts, dtype=torch.int32).to(device),
        torch.tensor(reaches, dtype=torch.float64).to(device),
        torch.tensor(size_limits(radii) or [0.0]).to(device),
    )


def _programs(count: int) -> int:
    return triton.cdiv(count, BLOCK)


def draw_views(
    points_N3: Tensor,
    colors_N3: Tensor,
    radius_N: Tensor,
    middle: Tensor,
    cameras: Sequence[Camera],
    radii: Sequence[int],
    *,
    fill_holes: bool,
    smooth: bool,
    background: tuple[int, int, int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Colours [C, H, W, 3] uint8, depth [C, H, W] float32 and point [C, H, W] int32; `middle` is the median radius."""
    matrix_C13 = np.empty((len(cameras), 13))
    matrix_C13[:, :12] = world_to_picture(cameras).reshape(-1, 12)
    matrix_C13[:, 12] = [camera.intrinsics_33[0][0] for camera in cameras]
    views_C13 = torch.from_numpy(matrix_C13).to(points_N3.device, non_blocking=True)
    with torch.cuda.device_of(points_N3):
        key_CHW = _draw(points_N3, radius_N, middle, views_C13, (cameras[0].height, cameras[0].width), tuple(radii))
        if fill_holes:
            key_CHW = _fill(key_CHW)
        return _shade(key_CHW, points_N3, colors_N3, views_C13, smooth, background)


def _draw(
    points_N3: Tensor,
    radius_N: Tensor,
    middle: Tensor,
    views_C13: Tensor,
    size_HW: tuple[int, int],
    radii: tuple[int, ...],
) -> Tensor:
    """Z-buffers [C, H, W] of int64 keys, as `splat.py` makes them."""
    cameras, (height, width), pad = len(views_C13), size_HW, radii[-1]
    tall, wide = height + 2 * pad, width + 2 * pad
    cells, pixels = cameras * tall * wide, cameras * height * width
    offsets_K3, starts_S, reach_S, limits_S = _discs(radii, points_N3.device)
    rise = (2 * middle.double() * STEPS).clamp_(max=FARTHEST)
    back_S = (rise / reach_S).round_().long()
    key_M = torch.full((len(radii) * cells + pixels,), EMPTY, dtype=torch.int64, device=points_N3.device)
    picture_P = key_M[len(radii) * cells :]
    _scatter_kernel[(_programs(len(points_N3)), cameras)](  # pyright: ignore[reportIndexIssue]
        points_N3, radius_N, views_C13, limits_S, key_M,
        len(points_N3), cameras, tall, wide, pad, SIZES=len(radii), BLOCK=BLOCK, **_OPTIONS,
    )  # fmt: skip
    _disc_kernel[(_programs(cells), len(radii))](  # pyright: ignore[reportIndexIssue]
        key_M, picture_P, offsets_K3, starts_S, back_S,
        cells, pad, height, width, SIZES=len(radii), BLOCK=BLOCK,
    )  # fmt: skip
    return picture_P.view(cameras, height, width)


def _fill(key_CHW: Tensor) -> Tensor:
    height, width = key_CHW.shape[1:]
    other_CHW = torch.empty_like(key_CHW)
    for _ in range(FILL_ROUNDS):
        _fill_kernel[(_programs(key_CHW.numel()),)](  # pyright: ignore[reportIndexIssue]
            key_CHW, other_CHW, key_CHW.numel(), height, width, BLOCK=BLOCK
        )
        key_CHW, other_CHW = other_CHW, key_CHW
    return key_CHW


def _shade(
    key_CHW: Tensor,
    points_N3: Tensor,
    colors_N3: Tensor,
    views_C13: Tensor,
    smooth: bool,
    background: tuple[int, int, int],
) -> tuple[Tensor, Tensor, Tensor]:
    height, width = key_CHW.shape[1:]
    pixels, programs, device = key_CHW.numel(), (_programs(key_CHW.numel()),), key_CHW.device
    depth_CHW = torch.empty(key_CHW.shape, dtype=torch.float32, device=device)
    index_CHW = torch.empty(key_CHW.shape, dtype=torch.int32, device=device)
    color_CHW3 = torch.empty((*key_CHW.shape, 3), dtype=torch.uint8, device=device)
    passes = [(step, *axis) for step in mixing_steps(height, width) for axis in ((width, height), (1, width))]
    smooth = smooth and bool(passes)
    paper = sum(value << (8 * channel) for channel, value in enumerate(background))
    source_3P, target_3P = torch.empty(2, 3, pixels if smooth else 0, device=device)
    _look_up_kernel[programs](  # pyright: ignore[reportIndexIssue]
        key_CHW, points_N3, colors_N3, views_C13, depth_CHW, index_CHW, source_3P if smooth else color_CHW3,
        pixels, height * width, paper, SMOOTH=smooth, BLOCK=BLOCK, **_OPTIONS,
    )  # fmt: skip
    for number, (step, stride, length) in enumerate(passes if smooth else ()):
        _mix_kernel[programs](  # pyright: ignore[reportIndexIssue]
            source_3P, target_3P, depth_CHW, index_CHW, color_CHW3,
            pixels, stride, length, step, paper, LAST=number == len(passes) - 1, BLOCK=BLOCK, **_OPTIONS,
        )  # fmt: skip
        source_3P, target_3P = target_3P, source_3P
    return color_CHW3, depth_CHW, index_CHW
