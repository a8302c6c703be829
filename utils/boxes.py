"""3D boxes: overlap, generalised overlap, suppression, matching, containment.

A box is `centre xyz, size xyz, heading` in metres and radians: full side lengths, heading counter-clockwise about +z
seen from above (`boxes_K7`). Six columns are read as heading 0. All functions take torch tensors on any device, or
NumPy arrays and lists, and return torch tensors in the input's float precision. Overlap uses no epsilon: boxes of one
cubic millimetre are exact too, and a box without volume overlaps nothing (IoU 0).

Shapes: N, M, K, T boxes; P points; E the 4 edges of a footprint; H the 8 corners of two footprints.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

ArrayLike: TypeAlias = "Tensor | np.ndarray | Sequence[Sequence[float]]"
Enclosing = Literal["aabb", "hull"]

# Corner signs in units of half a side, counter-clockwise from (+, +); the lower four corners come first.
_CORNER_SIGNS = ((1.0, 1.0), (-1.0, 1.0), (-1.0, -1.0), (1.0, -1.0))
_MAX_CONTAINMENT_ELEMENTS = 1 << 24


class BoxMatches(NamedTuple):
    """One-to-one pairs of predicted and target boxes, ordered by predicted index."""

    predicted: Tensor  # int64 [R], R = min(K, T)
    target: Tensor  # int64 [R]
    values: Tensor  # float [R], the IoU (or GIoU) of each pair


def as_boxes(boxes: ArrayLike) -> Tensor:
    """Boxes as a float tensor [K, 7]; empty input gives [0, 7], six columns get heading 0.

    Integers become float32. ValueError for any other shape.
    """
    tensor = boxes if isinstance(boxes, Tensor) else torch.as_tensor(np.asarray(boxes))
    if not tensor.is_floating_point():
        tensor = tensor.float()
    if tensor.numel() == 0 and tensor.shape[-1:] not in ((6,), (7,)):
        return tensor.new_zeros(0, 7)
    if tensor.dim() != 2 or tensor.shape[1] not in (6, 7):
        raise ValueError(
            f"Boxes must have shape [K, 7] (centre, size, heading) or [K, 6], not {list(tensor.shape)}; "
            "wrap a single box in a list."
        )
    if tensor.shape[1] == 6:
        tensor = torch.cat([tensor, tensor.new_zeros(len(tensor), 1)], dim=1)
    return tensor


def _as_pair(first: ArrayLike, second: ArrayLike) -> tuple[Tensor, Tensor]:
    """Both box sets on the first one's device and in the wider of the two precisions."""
    first_N7, second_M7 = as_boxes(first), as_boxes(second)
    dtype = torch.promote_types(first_N7.dtype, second_M7.dtype)
    return first_N7.to(dtype), second_M7.to(device=first_N7.device, dtype=dtype)


def volumes(boxes: ArrayLike) -> Tensor:
    """Volumes [K] in cubic metres; a negative side counts as 0."""
    return _volume(as_boxes(boxes))


def _volume(boxes_7: Tensor) -> Tensor:
    return boxes_7[..., 3:6].clamp(min=0).prod(-1)


def corners_3d(boxes: ArrayLike) -> Tensor:
    """Corners [K, 8, 3]: the lower face counter-clockwise seen from above, then the upper face above it."""
    boxes_K7 = as_boxes(boxes)
    x_K4, y_K4 = _footprint(boxes_K7[:, 0], boxes_K7[:, 1], boxes_K7[:, 3], boxes_K7[:, 4], boxes_K7[:, 6])
    half_K1 = boxes_K7[:, 5:6] / 2
    z_K8 = torch.cat([boxes_K7[:, 2:3] - half_K1, boxes_K7[:, 2:3] + half_K1], dim=1).repeat_interleave(4, dim=1)
    return torch.stack([x_K4.repeat(1, 2), y_K4.repeat(1, 2), z_K8], dim=-1)


def extents(boxes: ArrayLike) -> tuple[Tensor, Tensor]:
    """Lower and upper corners ([K, 3], [K, 3]) of the axis-aligned box around each oriented box."""
    boxes_K7 = as_boxes(boxes)
    half_K3 = _half_extent(boxes_K7)
    return boxes_K7[:, :3] - half_K3, boxes_K7[:, :3] + half_K3


def from_extents(lower_K3: Tensor, upper_K3: Tensor) -> Tensor:
    """Boxes [K, 7] with heading 0 from lower and upper corners."""
    heading_K1 = torch.zeros_like(lower_K3[:, :1])
    return torch.cat([(lower_K3 + upper_K3) / 2, upper_K3 - lower_K3, heading_K1], dim=1)


def box3d_iou(boxes_N7: ArrayLike, boxes_M7: ArrayLike) -> Tensor:
    """Intersection over union [N, M] of oriented boxes, exact up to rounding."""
    first_N7, second_M7 = _as_pair(boxes_N7, boxes_M7)
    intersection_NM, union_NM = _overlap(first_N7[:, None], second_M7[None])
    return _ratio(intersection_NM, union_NM)


def box3d_giou(boxes_N7: ArrayLike, boxes_M7: ArrayLike, enclosing: Enclosing = "aabb") -> Tensor:
    """Generalised IoU [N, M] in (-1, 1]: IoU minus the share of the enclosing volume that the union leaves free.

    `enclosing="aabb"` encloses by the axis-aligned box of all 16 corners (3DETR's definition);
    `"hull"` by the convex hull of both footprints times the joint height range (invariant to rotation;
    512 numbers of working memory a pair).
    """
    first_N7, second_M7 = _as_pair(boxes_N7, boxes_M7)
    return _giou(first_N7[:, None], second_M7[None], enclosing)


def paired_iou(boxes_N7: ArrayLike, others_N7: ArrayLike) -> Tensor:
    """IoU [N] of row i with row i."""
    first_N7, second_N7 = _as_rows(boxes_N7, others_N7)
    return _ratio(*_overlap(first_N7, second_N7))


def paired_giou(boxes_N7: ArrayLike, others_N7: ArrayLike, enclosing: Enclosing = "aabb") -> Tensor:
    """Generalised IoU [N] of row i with row i; see `box3d_giou`."""
    first_N7, second_N7 = _as_rows(boxes_N7, others_N7)
    return _giou(first_N7, second_N7, enclosing)


def paired_giou_axis_aligned(boxes_N7: ArrayLike, others_N7: ArrayLike) -> Tensor:
    """Generalised IoU [N] of row i with row i, headings ignored: differentiable and cheap, for losses."""
    first_N7, second_N7 = _as_rows(boxes_N7, others_N7)
    intersection_N = _sides_overlap(first_N7, second_N7).prod(-1)
    union_N = _volume(first_N7) + _volume(second_N7) - intersection_N
    half_first_N3, half_second_N3 = first_N7[:, 3:6].clamp(min=0) / 2, second_N7[:, 3:6].clamp(min=0) / 2
    enclosing_N = _joint_sides(first_N7, second_N7, half_first_N3, half_second_N3).prod(-1)
    return _ratio(intersection_N, union_N) - _ratio(enclosing_N - union_N, enclosing_N)


def nms_3d(
    boxes_K7: ArrayLike,
    scores_K: Tensor | np.ndarray | Sequence[float],
    iou_threshold: float,
    classes_K: Tensor | np.ndarray | Sequence[int] | None = None,
) -> Tensor:
    """Non-maximum suppression: indices (int64) of the kept boxes, best score first.

    A box goes when its IoU with a better kept box (of the same class, where classes are given) is above the
    threshold. Of equal scores the lower index is better.
    """
    boxes_tensor_K7 = as_boxes(boxes_K7)
    device = boxes_tensor_K7.device
    order_K = torch.argsort(torch.as_tensor(scores_K, device=device), descending=True, stable=True)
    if len(order_K) != len(boxes_tensor_K7):
        raise ValueError(f"nms_3d got {len(boxes_tensor_K7)} boxes but {len(order_K)} scores; give one score a box.")
    sorted_K7 = boxes_tensor_K7.detach()[order_K]
    suppresses_KK = box3d_iou(sorted_K7, sorted_K7) > iou_threshold
    if classes_K is not None:
        sorted_classes_K = torch.as_tensor(classes_K, device=device)[order_K]
        suppresses_KK &= sorted_classes_K[:, None] == sorted_classes_K[None]
    # The greedy pass is sequential by nature; it runs on bits, on the host.
    suppresses = suppresses_KK.cpu().numpy()
    gone = np.zeros(len(suppresses), dtype=bool)
    kept = []
    for index in range(len(suppresses)):
        if not gone[index]:
            kept.append(index)
            gone |= suppresses[index]
    return order_K[torch.tensor(kept, dtype=torch.int64, device=device)]


def points_in_boxes(points_P3: ArrayLike, boxes_K7: ArrayLike) -> Tensor:
    """Which points lie in which boxes, faces included: bool [P, K]."""
    boxes = as_boxes(boxes_K7)
    points = points_P3 if isinstance(points_P3, Tensor) else torch.as_tensor(np.asarray(points_P3))
    points = points.to(device=boxes.device, dtype=boxes.dtype).reshape(-1, 3)
    inside_PK = torch.empty(len(points), len(boxes), dtype=torch.bool, device=boxes.device)
    step = max(1, _MAX_CONTAINMENT_ELEMENTS // max(1, len(points)))
    for start in range(0, len(boxes), step):
        chunk_C7 = boxes[start : start + step]
        offset_PC3 = points[:, None] - chunk_C7[None, :, :3]
        cos_C, sin_C = chunk_C7[:, 6].cos(), chunk_C7[:, 6].sin()
        half_C3 = chunk_C7[:, 3:6] / 2
        along_PC = offset_PC3[..., 0] * cos_C + offset_PC3[..., 1] * sin_C
        across_PC = offset_PC3[..., 1] * cos_C - offset_PC3[..., 0] * sin_C
        inside_PK[:, start : start + step] = (
            (along_PC.abs() <= half_C3[:, 0])
            & (across_PC.abs() <= half_C3[:, 1])
            & (offset_PC3[..., 2].abs() <= half_C3[:, 2])
        )
    return inside_PK


def match_boxes(predicted_K7: ArrayLike, target_T7: ArrayLike, metric: Literal["iou", "giou"] = "iou") -> BoxMatches:
    """One-to-one assignment with the largest sum of IoU (or GIoU): min(K, T) pairs, also those of IoU 0."""
    overlap = box3d_iou if metric == "iou" else box3d_giou
    values_KT = overlap(predicted_K7, target_T7).detach()
    if not torch.isfinite(values_KT).all():
        raise ValueError("match_boxes got boxes that are not finite; drop boxes with NaN or infinite numbers first.")
    rows, columns = linear_sum_assignment(values_KT.double().cpu().numpy(), maximize=True)
    predicted_R = torch.as_tensor(rows, dtype=torch.int64, device=values_KT.device)
    target_R = torch.as_tensor(columns, dtype=torch.int64, device=values_KT.device)
    return BoxMatches(predicted_R, target_R, values_KT[predicted_R, target_R])


# The maths below works on boxes of any leading shape that broadcast with each other.


def _as_rows(boxes_N7: ArrayLike, others_N7: ArrayLike) -> tuple[Tensor, Tensor]:
    first_N7, second_N7 = _as_pair(boxes_N7, others_N7)
    if len(first_N7) != len(second_N7):
        raise ValueError(
            f"Paired overlap needs equally many boxes on both sides, got {len(first_N7)} and {len(second_N7)}."
        )
    return first_N7, second_N7


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator, and 0 (with gradient 0) where the denominator is 0; NaN stays NaN."""
    empty = denominator == 0
    return torch.where(empty, 0.0, numerator / torch.where(empty, 1.0, denominator))


def _sides_overlap(first_7: Tensor, second_7: Tensor) -> Tensor:
    """Overlap [..., 3] of the boxes' sides as if both had heading 0.

    Positions are taken relative to the first centre, so that precision does not depend on where a scene lies.
    """
    half_first_3, half_second_3 = first_7[..., 3:6].clamp(min=0) / 2, second_7[..., 3:6].clamp(min=0) / 2
    shift_3 = second_7[..., :3] - first_7[..., :3]
    upper_3 = torch.minimum(half_first_3, shift_3 + half_second_3)
    lower_3 = torch.maximum(-half_first_3, shift_3 - half_second_3)
    return (upper_3 - lower_3).clamp(min=0)


def _overlap(first_7: Tensor, second_7: Tensor) -> tuple[Tensor, Tensor]:
    """Intersection and union volumes."""
    sides_3 = _sides_overlap(first_7, second_7)
    if bool((first_7[..., 6] == 0).all()) and bool((second_7[..., 6] == 0).all()):
        intersection = sides_3.prod(-1)
    else:
        intersection = _footprint_intersection(first_7, second_7) * sides_3[..., 2]
    return intersection, _volume(first_7) + _volume(second_7) - intersection


def _footprint(x: Tensor, y: Tensor, dx: Tensor, dy: Tensor, heading: Tensor) -> tuple[Tensor, Tensor]:
    """Corners ([..., 4], [..., 4]) of rotated rectangles, counter-clockwise."""
    signs_E2 = torch.tensor(_CORNER_SIGNS, dtype=dx.dtype, device=dx.device)
    along_E = dx.clamp(min=0)[..., None] / 2 * signs_E2[:, 0]
    across_E = dy.clamp(min=0)[..., None] / 2 * signs_E2[:, 1]
    cos, sin = heading.cos()[..., None], heading.sin()[..., None]
    return x[..., None] + along_E * cos - across_E * sin, y[..., None] + along_E * sin + across_E * cos


def _footprint_in_frame(first_7: Tensor, second_7: Tensor) -> tuple[Tensor, Tensor]:
    """The second footprint's corners in the frame of the first: its centre the origin, its heading the x axis."""
    shift_x, shift_y = second_7[..., 0] - first_7[..., 0], second_7[..., 1] - first_7[..., 1]
    cos, sin = first_7[..., 6].cos(), first_7[..., 6].sin()
    x, y = shift_x * cos + shift_y * sin, shift_y * cos - shift_x * sin
    return _footprint(x, y, second_7[..., 3], second_7[..., 4], second_7[..., 6] - first_7[..., 6])


def _footprint_intersection(first_7: Tensor, second_7: Tensor) -> Tensor:
    """Area common to both footprints.

    In the first box's frame the area is the integral over y in [-b, b] of the width of the second rectangle, both of
    its sides clamped to [-a, a]. By Green's theorem that is the sum over the rectangle's 4 directed edges of
    integral clamp(x, -a, a) dy. Each term is continuous in the corners, so that coincident and nearly coincident
    edges lose nothing but rounding; no polygon has to be assembled and there is no branch.
    """
    x_E, y_E = _footprint_in_frame(first_7, second_7)
    half_a = first_7[..., 3, None].clamp(min=0) / 2
    half_b = first_7[..., 4, None].clamp(min=0) / 2
    next_x_E, next_y_E = x_E.roll(-1, -1), y_E.roll(-1, -1)

    # the part of each edge inside |y| <= b, as parameters along the edge
    start_y_E = torch.maximum(torch.minimum(y_E, half_b), -half_b)
    end_y_E = torch.maximum(torch.minimum(next_y_E, half_b), -half_b)
    run_x_E, run_y_E = next_x_E - x_E, next_y_E - y_E
    safe_y_E = torch.where(run_y_E == 0, 1.0, run_y_E)
    start_x_E = x_E + run_x_E * ((start_y_E - y_E) / safe_y_E)
    end_x_E = x_E + run_x_E * ((end_y_E - y_E) / safe_y_E)
    area = (_mean_clamped(start_x_E, end_x_E, half_a) * (end_y_E - start_y_E)).sum(-1)
    return area.clamp(min=0)


def _mean_clamped(start: Tensor, end: Tensor, limit: Tensor) -> Tensor:
    """Mean of clamp(x, -limit, limit) for x going evenly from start to end."""
    low, high = torch.minimum(start, end), torch.maximum(start, end)
    length = high - low
    safe_length = torch.where(length == 0, 1.0, length)
    share_below = (torch.minimum(high, -limit) - low).clamp(min=0) / safe_length
    share_above = (high - torch.maximum(low, limit)).clamp(min=0) / safe_length
    low_clamped = torch.maximum(torch.minimum(low, limit), -limit)
    high_clamped = torch.maximum(torch.minimum(high, limit), -limit)
    between = (low_clamped + high_clamped) / 2
    return between + share_below * (-limit - between) + share_above * (limit - between)


def _half_extent(boxes_7: Tensor) -> Tensor:
    """Half sides [..., 3] of the axis-aligned box around each box."""
    half_3 = boxes_7[..., 3:6].clamp(min=0) / 2
    cos, sin = boxes_7[..., 6].cos().abs(), boxes_7[..., 6].sin().abs()
    half_x = half_3[..., 0] * cos + half_3[..., 1] * sin
    half_y = half_3[..., 0] * sin + half_3[..., 1] * cos
    return torch.stack([half_x, half_y, half_3[..., 2]], dim=-1)


def _joint_sides(first_7: Tensor, second_7: Tensor, half_first_3: Tensor, half_second_3: Tensor) -> Tensor:
    """Sides [..., 3] of the axis-aligned box around both, given their half extents."""
    shift_3 = second_7[..., :3] - first_7[..., :3]
    upper_3 = torch.maximum(half_first_3, shift_3 + half_second_3)
    lower_3 = torch.minimum(-half_first_3, shift_3 - half_second_3)
    return upper_3 - lower_3


def _giou(first_7: Tensor, second_7: Tensor, enclosing: Enclosing) -> Tensor:
    intersection, union = _overlap(first_7, second_7)
    sides_3 = _joint_sides(first_7, second_7, _half_extent(first_7), _half_extent(second_7))
    if enclosing == "aabb":
        around = sides_3.prod(-1)
    elif enclosing == "hull":
        around = _footprint_hull(first_7, second_7) * sides_3[..., 2]
    else:
        raise ValueError(f'enclosing must be "aabb" or "hull", not {enclosing!r}.')
    return _ratio(intersection, union) - _ratio(around - union, around)


def _footprint_hull(first_7: Tensor, second_7: Tensor) -> Tensor:
    """Area of the convex hull of both footprints.

    The hull's upper rim is piecewise linear with kinks at corners only, and at a corner it is the highest chord
    between corners on either side; so too the lower rim. The area is the trapezoid sum between the rims.
    """
    second_x_E, second_y_E = _footprint_in_frame(first_7, second_7)
    zero = torch.zeros_like(second_x_E[..., 0])
    size_x, size_y = first_7[..., 3] + zero, first_7[..., 4] + zero
    first_x_E, first_y_E = _footprint(zero, zero, size_x, size_y, zero)
    x_H, order_H = torch.cat([first_x_E, second_x_E], dim=-1).sort(dim=-1)
    y_H = torch.cat([first_y_E, second_y_E], dim=-1).gather(-1, order_H)
    # chord from corner i to corner j (i <= j by x), read at corner k between them: [..., i, j, k]
    run = x_H[..., None, :, None] - x_H[..., :, None, None]
    share = (x_H[..., None, None, :] - x_H[..., :, None, None]) / torch.where(run == 0, 1.0, run)
    share = torch.where(run == 0, 0.0, share)
    height = y_H[..., :, None, None] + share * (y_H[..., None, :, None] - y_H[..., :, None, None])
    index = torch.arange(8, device=x_H.device)
    spans = (index[:, None, None] <= index) & (index[None, :, None] >= index)
    upper_H = height.masked_fill(~spans, -torch.inf).amax((-3, -2))
    lower_H = height.masked_fill(~spans, torch.inf).amin((-3, -2))
    thickness_H = upper_H - lower_H
    return ((thickness_H[..., 1:] + thickness_H[..., :-1]) / 2 * x_H.diff(dim=-1)).sum(-1)
