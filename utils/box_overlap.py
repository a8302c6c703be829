"""The mathematics of overlap: volumes, sides, footprints and hulls of boxes, differentiable in all seven numbers.

Boxes come with their columns first, before whatever axes broadcast: what is computed with each other then lies side by
side. boxes.py has the functions that take boxes as rows.

Shapes: C 6 or 7 columns (centre, size, heading); E the 4 edges of a footprint; H the 8 corners of two footprints.
"""

from typing import Literal

import torch
from torch import Tensor

Enclosing = Literal["aabb", "hull"]


def overlap(first_C: Tensor, second_C: Tensor, shared: Tensor, enclosing: Enclosing | None) -> Tensor:
    """IoU, or GIoU where it is said what encloses, given the intersection volumes."""
    union = volume(first_C) + volume(second_C) - shared
    iou = _ratio(shared, union)
    if enclosing is None:
        return iou
    sides_3 = _joint_sides(first_C, second_C)
    if enclosing == "aabb":
        around = _product(sides_3)
    elif enclosing == "hull":
        around = _footprint_hull(first_C, second_C) * sides_3[2]
    else:
        raise ValueError(f'enclosing must be "aabb" or "hull", not {enclosing!r}.')
    return iou - _ratio(around - union, around)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator, and 0 (with gradient 0) where the denominator is 0; NaN stays NaN."""
    empty = denominator == 0
    return torch.where(empty, 0.0, numerator / torch.where(empty, 1.0, denominator))


def _product(sides_3: Tensor) -> Tensor:
    """Product over the first axis; `Tensor.prod` waits for the device in its backward pass, and is slower."""
    x, y, z = sides_3.unbind(0)
    return x * y * z


def volume(boxes_C: Tensor) -> Tensor:
    """Cubic metres; a negative side counts as 0."""
    return _product(boxes_C[3:6].clamp(min=0))


def half_sides(boxes_C: Tensor) -> Tensor:
    """Half side lengths [3, ...]; a negative side counts as 0."""
    return boxes_C[3:6].clamp(min=0) / 2


def _heading(boxes_C: Tensor) -> Tensor:
    return boxes_C[6] if len(boxes_C) == 7 else torch.zeros_like(boxes_C[0])


def half_extent(boxes_C: Tensor) -> Tensor:
    """Half sides [3, ...] of the axis-aligned box around each box."""
    half_3 = half_sides(boxes_C)
    if len(boxes_C) == 6:
        return half_3
    cos, sin = boxes_C[6].cos().abs(), boxes_C[6].sin().abs()
    half_x, half_y = half_3[0] * cos + half_3[1] * sin, half_3[0] * sin + half_3[1] * cos
    return torch.stack([half_x, half_y, half_3[2]])


def _joint_sides(first_C: Tensor, second_C: Tensor) -> Tensor:
    """Sides [3, ...] of the axis-aligned box around both."""
    half_first_3, half_second_3 = half_extent(first_C), half_extent(second_C)
    shift_3 = second_C[:3] - first_C[:3]
    return torch.maximum(half_first_3, shift_3 + half_second_3) - torch.minimum(-half_first_3, shift_3 - half_second_3)


def intersection(first_C: Tensor, second_C: Tensor) -> Tensor:
    """Intersection volumes.

    Positions are taken relative to the first centre, so that precision does not depend on where a scene lies.
    """
    if len(first_C) == 6:
        return _product(_common(half_sides(first_C), half_sides(second_C), second_C[:3] - first_C[:3]))
    height = _common(_solid_half_height(first_C), _solid_half_height(second_C), second_C[2] - first_C[2])
    return _footprint_intersection(first_C, second_C) * height


def _common(half_first: Tensor, half_second: Tensor, shift: Tensor) -> Tensor:
    """Length common to intervals whose middles are `shift` apart."""
    upper, lower = torch.minimum(half_first, shift + half_second), torch.maximum(-half_first, shift - half_second)
    return (upper - lower).clamp(min=0)


def _solid_half_height(boxes_C: Tensor) -> Tensor:
    """0 for a box without volume: the area of its footprint may be off 0 by rounding, and then so is its overlap."""
    return torch.where(volume(boxes_C) == 0, 0.0, boxes_C[5].clamp(min=0) / 2)


def footprint(x: Tensor, y: Tensor, half_3: Tensor, heading: Tensor) -> tuple[Tensor, Tensor]:
    """Corners ([4, ...], [4, ...]) of rotated rectangles, counter-clockwise from the one in front on the left."""
    cos, sin = heading.cos(), heading.sin()
    along_x, along_y, across_x, across_y = half_3[0] * cos, half_3[0] * sin, half_3[1] * sin, half_3[1] * cos
    left_x, left_y, right_x, right_y = along_x - across_x, along_y + across_y, along_x + across_x, along_y - across_y
    corners_x = torch.stack([x + left_x, x - right_x, x - left_x, x + right_x])
    return corners_x, torch.stack([y + left_y, y - right_y, y - left_y, y + right_y])


def _footprint_in_frame(first_C: Tensor, second_C: Tensor) -> tuple[Tensor, Tensor]:
    """The second footprint's corners in the frame of the first: its centre the origin, its heading the x axis."""
    shift_x, shift_y = second_C[0] - first_C[0], second_C[1] - first_C[1]
    heading = _heading(first_C)
    cos, sin = heading.cos(), heading.sin()
    x, y = shift_x * cos + shift_y * sin, shift_y * cos - shift_x * sin
    return footprint(x, y, half_sides(second_C), _heading(second_C) - heading)


def _footprint_intersection(first_C: Tensor, second_C: Tensor) -> Tensor:
    """Area common to both footprints.

    In the first box's frame the area is the integral over y in [-b, b] of the width of the second rectangle, both of
    its sides clamped to [-a, a]. By Green's theorem that is the sum over the rectangle's 4 directed edges of
    integral clamp(x, -a, a) dy. Each term is continuous in the corners, so that coincident and nearly coincident
    edges lose nothing but rounding; no polygon has to be assembled and there is no branch.
    """
    x_E, y_E = _footprint_in_frame(first_C, second_C)
    half_a, half_b = half_sides(first_C)[:2]
    run_x_E, run_y_E = x_E.roll(-1, 0) - x_E, y_E.roll(-1, 0) - y_E

    # the part of each edge inside |y| <= b, as shares of the edge
    start_y_E = y_E.clamp(-half_b, half_b)
    end_y_E = start_y_E.roll(-1, 0)
    level_E = run_y_E == 0
    safe_y_E = torch.where(level_E, 1.0, run_y_E)
    start_E = (start_y_E - y_E) / safe_y_E
    # A level edge adds nothing, but it does once it is turned a little: the gradient needs the mean over all of it.
    end_E = torch.where(level_E, 1.0, (end_y_E - y_E) / safe_y_E)
    mean_x_E = _mean_clamped(x_E + run_x_E * start_E, x_E + run_x_E * end_E, half_a)
    return (mean_x_E * (end_y_E - start_y_E)).sum(0).clamp(min=0)


def _mean_clamped(start: Tensor, end: Tensor, limit: Tensor) -> Tensor:
    """Mean of clamp(x, -limit, limit) for x going evenly from start to end."""
    low, high = torch.minimum(start, end), torch.maximum(start, end)
    length = high - low
    safe_length = torch.where(length == 0, 1.0, length)
    share_below = (torch.minimum(high, -limit) - low).clamp(min=0) / safe_length
    share_above = (high - torch.maximum(low, limit)).clamp(min=0) / safe_length
    between = (low.clamp(-limit, limit) + high.clamp(-limit, limit)) / 2
    return between + share_below * (-limit - between) + share_above * (limit - between)


def _footprint_hull(first_C: Tensor, second_C: Tensor) -> Tensor:
    """Area of the convex hull of both footprints.

    The hull's upper rim is piecewise linear with kinks at corners only, and at a corner it is the highest chord
    between corners on either side; so too the lower rim. The area is the trapezoid sum between the rims.
    """
    second_x_E, second_y_E = _footprint_in_frame(first_C, second_C)
    zero = torch.zeros_like(second_x_E[0])
    first_x_E, first_y_E = footprint(zero, zero, half_sides(first_C) + zero, zero)
    x_H, order_H = torch.cat([first_x_E, second_x_E]).movedim(0, -1).sort(dim=-1)
    y_H = torch.cat([first_y_E, second_y_E]).movedim(0, -1).gather(-1, order_H)
    # chord from corner i to corner j (i <= j by x), read at corner k between them: [..., i, j, k]
    index = torch.arange(8, device=x_H.device)
    spans = (index[:, None, None] <= index) & (index[None, :, None] >= index)
    run = x_H[..., None, :, None] - x_H[..., :, None, None]
    no_chord = (run == 0) | ~spans
    share = (x_H[..., None, None, :] - x_H[..., :, None, None]) / torch.where(no_chord, 1.0, run)
    height = y_H[..., :, None, None] + share * (y_H[..., None, :, None] - y_H[..., :, None, None])
    upper_H = height.masked_fill(~spans, -torch.inf).amax((-3, -2))
    lower_H = height.masked_fill(~spans, torch.inf).amin((-3, -2))
    thickness_H = upper_H - lower_H
    return ((thickness_H[..., 1:] + thickness_H[..., :-1]) / 2 * x_H.diff(dim=-1)).sum(-1)
