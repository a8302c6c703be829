"""3D boxes: overlap, generalised overlap, suppression, matching, containment.

A box is `centre xyz, size xyz, heading` in metres and radians: full side lengths, heading counter-clockwise about +z
seen from above (`boxes_K7`). Six columns are read as heading 0. All functions take torch tensors on any device, or
NumPy arrays and lists, and return torch tensors in the input's precision, float32 or float64; half precision and
integers are computed and returned in float32. Overlap uses no epsilon: boxes of one cubic millimetre are exact too,
and a box without volume overlaps nothing (IoU 0).

Overlap is differentiable in all seven numbers. Where boxes touch, or their edges coincide, the gradient is one-sided
and finite. On a GPU overlap never waits for the device, so that headings which are all 0 are not noticed there: pass
six columns, which is several times faster. On a CPU, where no gradient is asked for, the pairs run through a compiled
loop if it was built (box_intersection.pyx), which changes results by rounding only.

Shapes: N, M, K, T boxes; P points; C 6 or 7 columns, which come first inside the maths, before whatever axes broadcast
(N and 1 against 1 and M for all pairs); E the 4 edges of a footprint; H the 8 corners of two footprints; R rows.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.autograd import forward_ad

try:
    from .box_intersection import box_intersection as _box_intersection  # pyright: ignore[reportMissingImports]
except ModuleNotFoundError:  # not built; a build that is broken raises
    _box_intersection = None

ArrayLike: TypeAlias = "Tensor | np.ndarray | Sequence[Sequence[float]]"
Enclosing = Literal["aabb", "hull"]

_MAX_CONTAINMENT_ELEMENTS = 1 << 24
# All pairs are computed in blocks of rows, whose intermediates stay close to a core's cache, or below a gigabyte on a
# GPU; the hull needs many more numbers a pair.
_BLOCK_PAIRS_CPU = 1 << 14
_BLOCK_PAIRS_GPU = 1 << 21
_HULL_SHARE = 16


class BoxMatches(NamedTuple):
    """One-to-one pairs of predicted and target boxes, ordered by predicted index."""

    predicted: Tensor  # int64 [R], R = min(K, T)
    target: Tensor  # int64 [R]
    values: Tensor  # float [R], the IoU (or GIoU) of each pair


def as_boxes(boxes: ArrayLike) -> Tensor:
    """Boxes as a float32 or float64 tensor [K, 7]; empty input gives [0, 7], six columns get heading 0.

    Every other type of number becomes float32. ValueError for any other shape.
    """
    return _with_heading(_read(boxes))


def _read(boxes: ArrayLike) -> Tensor:
    """Boxes [K, C] as they were given."""
    tensor = boxes if isinstance(boxes, Tensor) else torch.as_tensor(np.asarray(boxes))
    if tensor.dtype not in (torch.float32, torch.float64):
        tensor = tensor.float()
    if tensor.numel() == 0 and tensor.shape[-1:] not in ((6,), (7,)):
        return tensor.new_zeros(0, 7)
    if tensor.dim() != 2 or tensor.shape[1] not in (6, 7):
        raise ValueError(
            f"Boxes must have shape [K, 7] (centre, size, heading) or [K, 6], not {list(tensor.shape)}; "
            "wrap a single box in a list."
        )
    return tensor


def _with_heading(boxes_KC: Tensor) -> Tensor:
    return boxes_KC if boxes_KC.shape[1] == 7 else torch.nn.functional.pad(boxes_KC, (0, 1))


def volumes(boxes: ArrayLike) -> Tensor:
    """Volumes [K] in cubic metres; a negative side counts as 0."""
    return _volume(_read(boxes).T)


def corners_3d(boxes: ArrayLike) -> Tensor:
    """Corners [K, 8, 3]: the lower face counter-clockwise seen from above, then the upper face above it."""
    boxes_7K = as_boxes(boxes).T
    x_4K, y_4K = _footprint(boxes_7K[0], boxes_7K[1], _half_sides(boxes_7K), boxes_7K[6])
    half_K = boxes_7K[5] / 2
    z_8K = torch.stack([boxes_7K[2] - half_K, boxes_7K[2] + half_K]).repeat_interleave(4, dim=0)
    return torch.stack([x_4K.repeat(2, 1), y_4K.repeat(2, 1), z_8K], dim=-1).transpose(0, 1)


def boxes_to_xyzxyz(boxes: ArrayLike) -> Tensor:
    """Lower and upper corner [K, 6] of the axis-aligned box around each box; inverse of `xyzxyz_to_boxes`."""
    boxes_CK = _read(boxes).T
    half_3K = _half_extent(boxes_CK)
    return torch.cat([boxes_CK[:3] - half_3K, boxes_CK[:3] + half_3K]).T


def xyzxyz_to_boxes(corners_K6: ArrayLike) -> Tensor:
    """Boxes [K, 7] with heading 0 from lower and upper corners in one row, as of the points of an object."""
    given_KC = _read(corners_K6)
    if len(given_KC) and given_KC.shape[1] != 6:
        raise ValueError(
            f"Corners must have shape [K, 6] (lower xyz, upper xyz), not {list(given_KC.shape)}; give no heading."
        )
    lower_K3, upper_K3 = given_KC[:, :6].split(3, dim=1)
    return _with_heading(torch.cat([(lower_K3 + upper_K3) / 2, upper_K3 - lower_K3], dim=1))


def extents(boxes: ArrayLike) -> tuple[Tensor, Tensor]:
    """`boxes_to_xyzxyz` in two: lower and upper corners ([K, 3], [K, 3])."""
    lower_K3, upper_K3 = boxes_to_xyzxyz(boxes).split(3, dim=1)
    return lower_K3, upper_K3


def box3d_iou(boxes_N7: ArrayLike, boxes_M7: ArrayLike) -> Tensor:
    """Intersection over union [N, M] of oriented boxes, exact up to rounding.

    With gradients it keeps about 100 numbers a pair (15 for six columns) until the backward pass.
    """
    return _all_pairs(boxes_N7, boxes_M7, None)


def box3d_giou(boxes_N7: ArrayLike, boxes_M7: ArrayLike, enclosing: Enclosing = "aabb") -> Tensor:
    """Generalised IoU [N, M] in (-1, 1]: IoU minus the share of the enclosing volume that the union leaves free.

    `enclosing="aabb"` encloses by the axis-aligned box of all 16 corners (3DETR's definition);
    `"hull"` by the convex hull of both footprints times the joint height range (invariant to rotation, but 512 numbers
    of working memory a pair).
    """
    return _all_pairs(boxes_N7, boxes_M7, enclosing)


def paired_iou(boxes_N7: ArrayLike, others_N7: ArrayLike) -> Tensor:
    """IoU [N] of row i with row i."""
    return _row_by_row(boxes_N7, others_N7, None)


def paired_giou(boxes_N7: ArrayLike, others_N7: ArrayLike, enclosing: Enclosing = "aabb") -> Tensor:
    """Generalised IoU [N] of row i with row i; see `box3d_giou`."""
    return _row_by_row(boxes_N7, others_N7, enclosing)


def giou_axis_aligned(boxes: Tensor, others: Tensor) -> Tensor:
    """Generalised IoU of boxes [..., 6 or 7], headings ignored; axes broadcast. Cheap, for losses and costs."""
    axes = max(boxes.dim(), others.dim())
    boxes, others = (side[(None,) * (axes - side.dim())] for side in (boxes, others))
    first_6, second_6 = (side[..., :6].movedim(-1, 0).contiguous() for side in (boxes, others))
    return _score(first_6, second_6, _intersection(first_6, second_6), "aabb")


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
    suppresses_KK = box3d_iou(*_without_zero_headings(sorted_K7, sorted_K7, wait=True)) > iou_threshold
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
    pair = _pair(_read(predicted_K7).detach(), _read(target_T7).detach())
    values_KT = _all_pairs(*_without_zero_headings(*pair, wait=True), None if metric == "iou" else "aabb")
    if not torch.isfinite(values_KT).all():
        raise ValueError("match_boxes got boxes that are not finite; drop boxes with NaN or infinite numbers first.")
    rows, columns = linear_sum_assignment(values_KT.double().cpu().numpy(), maximize=True)
    predicted_R = torch.as_tensor(rows, dtype=torch.int64, device=values_KT.device)
    target_R = torch.as_tensor(columns, dtype=torch.int64, device=values_KT.device)
    return BoxMatches(predicted_R, target_R, values_KT[predicted_R, target_R])


def _pair(boxes_N7: ArrayLike, boxes_M7: ArrayLike) -> tuple[Tensor, Tensor]:
    """Both box sets with equally many columns, on the first one's device, in the wider of the two precisions."""
    first_NC, second_MC = _read(boxes_N7), _read(boxes_M7)
    if first_NC.shape[1] != second_MC.shape[1]:
        first_NC, second_MC = _with_heading(first_NC), _with_heading(second_MC)
    dtype = torch.promote_types(first_NC.dtype, second_MC.dtype)
    return first_NC.to(dtype), second_MC.to(device=first_NC.device, dtype=dtype)


def _all_pairs(boxes_N7: ArrayLike, boxes_M7: ArrayLike, enclosing: Enclosing | None) -> Tensor:
    """IoU [N, M], or GIoU where it is said what encloses."""
    first_NC, second_MC = _without_zero_headings(*_pair(boxes_N7, boxes_M7))
    compiled = _takes_compiled_loop(first_NC, second_MC)
    on_cpu = first_NC.device.type == "cpu"
    num_pairs = _BLOCK_PAIRS_CPU * torch.get_num_threads() if on_cpu else _BLOCK_PAIRS_GPU
    if enclosing == "hull":
        num_pairs //= _HULL_SHARE
    second_C1M = second_MC.T.contiguous()[:, None]
    num_rows = max(1, num_pairs // max(1, len(second_MC)))
    blocks = []
    for start in range(0, max(1, len(first_NC)), num_rows):
        rows_RC = first_NC[start : start + num_rows]
        rows_CR1 = rows_RC.T.contiguous()[:, :, None]
        shared_RM = _compiled_volumes(rows_RC, second_MC) if compiled else _intersection(rows_CR1, second_C1M)
        blocks.append(_score(rows_CR1, second_C1M, shared_RM, enclosing))
    return torch.cat(blocks) if len(blocks) > 1 else blocks[0]


def _row_by_row(boxes_N7: ArrayLike, others_N7: ArrayLike, enclosing: Enclosing | None) -> Tensor:
    first_NC, second_NC = _without_zero_headings(*_pair(boxes_N7, others_N7))
    if len(first_NC) != len(second_NC):
        raise ValueError(
            f"Paired overlap needs equally many boxes on both sides, got {len(first_NC)} and {len(second_NC)}."
        )
    first_CN, second_CN = first_NC.T.contiguous(), second_NC.T.contiguous()
    return _score(first_CN, second_CN, _intersection(first_CN, second_CN), enclosing)


def _differentiated(*tensors: Tensor) -> bool:
    """Whether a derivative, of either direction, is asked for."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return True
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def _without_zero_headings(first_NC: Tensor, second_MC: Tensor, *, wait: bool = False) -> tuple[Tensor, Tensor]:
    """Six columns where all headings are 0, as far as that can be seen: on a GPU only by waiting for it.

    With a derivative the column stays: turning a box changes its overlap at heading 0 too.
    """
    visible = wait or first_NC.device.type == "cpu"
    if first_NC.shape[1] == 6 or not visible or _differentiated(first_NC, second_MC):
        return first_NC, second_MC
    if bool(first_NC[:, 6].any()) or bool(second_MC[:, 6].any()):
        return first_NC, second_MC
    return first_NC[:, :6], second_MC[:, :6]


def _takes_compiled_loop(first_NC: Tensor, second_MC: Tensor) -> bool:
    """Whether the compiled loop was built, can do these pairs and is faster: at every size, if there are headings."""
    if _box_intersection is None or first_NC.shape[1] == 6 or first_NC.device.type != "cpu":
        return False
    return not _differentiated(first_NC, second_MC)


def _compiled_volumes(first_N7: Tensor, second_M7: Tensor) -> Tensor:
    """Intersection volumes [N, M] by the compiled loop."""
    assert _box_intersection is not None
    shared_NM = np.empty((len(first_N7), len(second_M7)))
    _box_intersection(first_N7.detach().double().numpy(), second_M7.detach().double().numpy(), shared_NM)
    return torch.from_numpy(shared_NM).to(first_N7.dtype)


# The maths below works on boxes with their columns first: what is computed with each other then lies side by side.


def _score(first_C: Tensor, second_C: Tensor, intersection: Tensor, enclosing: Enclosing | None) -> Tensor:
    """IoU or GIoU, given the intersection volumes."""
    union = _volume(first_C) + _volume(second_C) - intersection
    iou = _ratio(intersection, union)
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


def _volume(boxes_C: Tensor) -> Tensor:
    return _product(boxes_C[3:6].clamp(min=0))


def _half_sides(boxes_C: Tensor) -> Tensor:
    return boxes_C[3:6].clamp(min=0) / 2


def _heading(boxes_C: Tensor) -> Tensor:
    return boxes_C[6] if len(boxes_C) == 7 else torch.zeros_like(boxes_C[0])


def _half_extent(boxes_C: Tensor) -> Tensor:
    """Half sides [3, ...] of the axis-aligned box around each box."""
    half_3 = _half_sides(boxes_C)
    if len(boxes_C) == 6:
        return half_3
    cos, sin = boxes_C[6].cos().abs(), boxes_C[6].sin().abs()
    half_x, half_y = half_3[0] * cos + half_3[1] * sin, half_3[0] * sin + half_3[1] * cos
    return torch.stack([half_x, half_y, half_3[2]])


def _joint_sides(first_C: Tensor, second_C: Tensor) -> Tensor:
    """Sides [3, ...] of the axis-aligned box around both."""
    half_first_3, half_second_3 = _half_extent(first_C), _half_extent(second_C)
    shift_3 = second_C[:3] - first_C[:3]
    return torch.maximum(half_first_3, shift_3 + half_second_3) - torch.minimum(-half_first_3, shift_3 - half_second_3)


def _intersection(first_C: Tensor, second_C: Tensor) -> Tensor:
    """Intersection volumes.

    Positions are taken relative to the first centre, so that precision does not depend on where a scene lies.
    """
    if len(first_C) == 6:
        return _product(_common(_half_sides(first_C), _half_sides(second_C), second_C[:3] - first_C[:3]))
    height = _common(_solid_half_height(first_C), _solid_half_height(second_C), second_C[2] - first_C[2])
    return _footprint_intersection(first_C, second_C) * height


def _common(half_first: Tensor, half_second: Tensor, shift: Tensor) -> Tensor:
    """Length common to intervals whose middles are `shift` apart."""
    upper, lower = torch.minimum(half_first, shift + half_second), torch.maximum(-half_first, shift - half_second)
    return (upper - lower).clamp(min=0)


def _solid_half_height(boxes_C: Tensor) -> Tensor:
    """0 for a box without volume: the area of its footprint may be off 0 by rounding, and then so is its overlap."""
    return torch.where(_volume(boxes_C) == 0, 0.0, boxes_C[5].clamp(min=0) / 2)


def _footprint(x: Tensor, y: Tensor, half_3: Tensor, heading: Tensor) -> tuple[Tensor, Tensor]:
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
    return _footprint(x, y, _half_sides(second_C), _heading(second_C) - heading)


def _footprint_intersection(first_C: Tensor, second_C: Tensor) -> Tensor:
    """Area common to both footprints.

    In the first box's frame the area is the integral over y in [-b, b] of the width of the second rectangle, both of
    its sides clamped to [-a, a]. By Green's theorem that is the sum over the rectangle's 4 directed edges of
    integral clamp(x, -a, a) dy. Each term is continuous in the corners, so that coincident and nearly coincident
    edges lose nothing but rounding; no polygon has to be assembled and there is no branch.
    """
    x_E, y_E = _footprint_in_frame(first_C, second_C)
    half_a, half_b = _half_sides(first_C)[:2]
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
    first_x_E, first_y_E = _footprint(zero, zero, _half_sides(first_C) + zero, zero)
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
