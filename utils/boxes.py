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

Shapes: N, M, K, T boxes; P points; R rows; C 6 or 7 columns, which box_overlap.py takes first, before whatever axes
broadcast (N and 1 against 1 and M for all pairs).
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.autograd import forward_ad

from .box_overlap import Enclosing, footprint, half_extent, half_sides, intersection, overlap, volume

try:
    from .box_intersection import box_intersection as _box_intersection  # pyright: ignore[reportMissingImports]
except ModuleNotFoundError:  # not built; a build that is broken raises
    _box_intersection = None

ArrayLike: TypeAlias = "Tensor | np.ndarray | Sequence[Sequence[float]]"

_CONTAINMENT_ELEMENTS_CPU = 1 << 18  # points times boxes at once: a core's cache holds what is made of them
_CONTAINMENT_ELEMENTS_GPU = 1 << 24
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
    return volume(_read(boxes).T)


def corners_3d(boxes: ArrayLike) -> Tensor:
    """Corners [K, 8, 3]: the lower face counter-clockwise seen from above, then the upper face above it."""
    boxes_7K = as_boxes(boxes).T
    x_4K, y_4K = footprint(boxes_7K[0], boxes_7K[1], half_sides(boxes_7K), boxes_7K[6])
    half_K = boxes_7K[5] / 2
    z_8K = torch.stack([boxes_7K[2] - half_K, boxes_7K[2] + half_K]).repeat_interleave(4, dim=0)
    return torch.stack([x_4K.repeat(2, 1), y_4K.repeat(2, 1), z_8K], dim=-1).transpose(0, 1)


def boxes_to_xyzxyz(boxes: ArrayLike) -> Tensor:
    """Lower and upper corner [K, 6] of the axis-aligned box around each box; inverse of `xyzxyz_to_boxes`."""
    boxes_CK = _read(boxes).T
    half_3K = half_extent(boxes_CK)
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
    return overlap(first_6, second_6, intersection(first_6, second_6), "aabb")


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
    boxes = as_boxes(boxes_K7)
    scores = torch.as_tensor(scores_K, device=boxes.device)
    if len(scores) != len(boxes):
        raise ValueError(f"nms_3d got {len(boxes)} boxes but {len(scores)} scores; give one score a box.")
    classes = None if classes_K is None else torch.as_tensor(classes_K, device=boxes.device)[None]
    (kept,) = batched_nms_3d(boxes[None], scores[None], iou_threshold, classes)
    return kept.to(boxes.device)


def batched_nms_3d(
    boxes_BK7: Tensor, scores_BK: Tensor, iou_threshold: float, classes_BK: Tensor | None = None
) -> list[Tensor]:
    """`nms_3d` of each scene of a batch, on the host; a GPU is waited for twice, however many scenes there are.

    Args:
        classes_BK: int64.
    """
    order_BK = torch.argsort(scores_BK, dim=1, descending=True, stable=True)
    sorted_BK7 = boxes_BK7.detach().gather(1, order_BK[..., None].expand(-1, -1, boxes_BK7.shape[-1]))
    flat_NC, _ = _without_zero_headings(sorted_BK7.flatten(0, 1), sorted_BK7.flatten(0, 1)[:0], wait=True)
    suppresses_BKK = torch.stack(
        [box3d_iou(boxes_KC, boxes_KC) > iou_threshold for boxes_KC in flat_NC.unflatten(0, order_BK.shape)]
    )
    if classes_BK is not None:
        sorted_classes_BK = classes_BK.gather(1, order_BK)
        suppresses_BKK &= sorted_classes_BK[:, :, None] == sorted_classes_BK[:, None]
    # bits and order in one copy, as bytes
    found_BKX = torch.cat([order_BK[..., None].view(torch.uint8), suppresses_BKK.view(torch.uint8)], dim=2).cpu()
    # a copy, since one box's bytes are contiguous as they are, in strides that no integer has
    orders_BK = found_BKX[..., :8].clone(memory_format=torch.contiguous_format).view(torch.int64)[..., 0]
    return [
        order_K[_greedy(found_KX[:, 8:].bool().numpy())]
        for order_K, found_KX in zip(orders_BK, found_BKX, strict=True)
    ]


def _greedy(suppresses_KK: np.ndarray) -> list[int]:
    """Rows that no row before them that is kept suppresses; sequential by nature, so on bits, on the host."""
    gone = np.zeros(len(suppresses_KK), dtype=bool)
    kept = []
    for index in range(len(suppresses_KK)):
        if not gone[index]:
            kept.append(index)
            gone |= suppresses_KK[index]
    return kept


def points_in_boxes(points_P3: ArrayLike, boxes_K7: ArrayLike) -> Tensor:
    """Which points lie in which boxes, faces included: bool [P, K]."""
    boxes = as_boxes(boxes_K7)
    points = points_P3 if isinstance(points_P3, Tensor) else torch.as_tensor(np.asarray(points_P3))
    x_P, y_P, z_P = points.to(device=boxes.device, dtype=boxes.dtype).reshape(-1, 3).T.contiguous()
    inside_KP = torch.empty(len(boxes), len(x_P), dtype=torch.bool, device=boxes.device)
    limit = _CONTAINMENT_ELEMENTS_CPU if boxes.device.type == "cpu" else _CONTAINMENT_ELEMENTS_GPU
    step = max(1, limit // max(1, len(x_P)))
    for start in range(0, len(boxes), step):
        chunk_C71 = boxes[start : start + step, :, None]
        x_CP, y_CP, z_CP = x_P - chunk_C71[:, 0], y_P - chunk_C71[:, 1], z_P - chunk_C71[:, 2]
        cos_C1, sin_C1 = chunk_C71[:, 6].cos(), chunk_C71[:, 6].sin()
        half_C31 = chunk_C71[:, 3:6] / 2
        inside_KP[start : start + step] = (
            ((x_CP * cos_C1 + y_CP * sin_C1).abs() <= half_C31[:, 0])
            & ((y_CP * cos_C1 - x_CP * sin_C1).abs() <= half_C31[:, 1])
            & (z_CP.abs() <= half_C31[:, 2])
        )
    return inside_KP.T


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
        shared_RM = _compiled_volumes(rows_RC, second_MC) if compiled else intersection(rows_CR1, second_C1M)
        blocks.append(overlap(rows_CR1, second_C1M, shared_RM, enclosing))
    return torch.cat(blocks) if len(blocks) > 1 else blocks[0]


def _row_by_row(boxes_N7: ArrayLike, others_N7: ArrayLike, enclosing: Enclosing | None) -> Tensor:
    first_NC, second_NC = _without_zero_headings(*_pair(boxes_N7, others_N7))
    if len(first_NC) != len(second_NC):
        raise ValueError(
            f"Paired overlap needs equally many boxes on both sides, got {len(first_NC)} and {len(second_NC)}."
        )
    first_CN, second_CN = first_NC.T.contiguous(), second_NC.T.contiguous()
    return overlap(first_CN, second_CN, intersection(first_CN, second_CN), enclosing)


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
    if bool(torch.cat([first_NC[:, 6], second_MC[:, 6]]).any()):
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
