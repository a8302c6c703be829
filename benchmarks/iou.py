"""Overlap of 3D boxes against polygon clipping pair by pair, and against min/max for boxes without heading.

`boxes.iou_A_B`: all pairs of A and B boxes with headings. The peer is the way of VoteNet's, ScanRefer's and 3DETR's
evaluation: in Python, footprints clipped by Sutherland and Hodgman and measured by `scipy.spatial.ConvexHull`.
`boxes.iou_pytorch3d_A_B`, where PyTorch3D is installed: the same pairs against its `box3d_overlap`.
`boxes.iou_compiled_A_B`, on a CPU where box_intersection.pyx is built: the compiled loop against our vectorised path.
`boxes.iou_aligned_A_B`: the same function of ours on boxes of six columns, without heading; the peer is vectorised
min/max in PyTorch, which can do nothing else. Generalised IoU has no peer here. Ours and the peers agree, which is
checked, except PyTorch3D, whose error is noted.

Shapes: A, B boxes; K corners of a polygon.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.spatial import ConvexHull
from torch import Tensor

try:
    from pytorch3d.ops import box3d_overlap  # pyright: ignore[reportMissingImports]
except ModuleNotFoundError:  # its row is left out
    box3d_overlap = None

from ..utils import boxes as boxes_module
from ..utils.boxes import box3d_giou, box3d_iou, corners_3d
from ._arguments import measuring_parser
from ._measure import Load, median_seconds, report
from .results import Row

CLIPPING = "polygon clipping in Python, pair by pair"
MIN_MAX = "vectorised min/max, no headings"
PYTORCH3D = "pytorch3d.ops.box3d_overlap"
VECTORISED = "our own vectorised path"
Polygon = list[tuple[float, float]]


def random_boxes(count: int, seed: int, *, headings: bool) -> Tensor:
    """Boxes [count, 7] of furniture size in a room of 6 x 5 x 2.7 m."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.rand(count, 3, generator=generator) * torch.tensor([6.0, 5.0, 2.7])
    sizes = 0.2 + 1.8 * torch.rand(count, 3, generator=generator)
    angles = (torch.rand(count, 1, generator=generator) - 0.5) * 2 * torch.pi * headings
    return torch.cat([centres, sizes, angles], dim=1)


def clip(subject: Polygon, window: Polygon) -> Polygon:
    """The part of a polygon inside a convex one, both counter-clockwise; Sutherland and Hodgman's algorithm."""
    for (x1, y1), (x2, y2) in zip(window, window[1:] + window[:1], strict=True):
        sides = [(x2 - x1) * (y - y1) - (y2 - y1) * (x - x1) for x, y in subject]
        clipped: Polygon = []
        for index, (point, side) in enumerate(zip(subject, sides, strict=True)):
            before, side_before = subject[index - 1], sides[index - 1]
            if (side >= 0) != (side_before >= 0):
                share = side_before / (side_before - side)
                clipped.append(
                    (before[0] + share * (point[0] - before[0]), before[1] + share * (point[1] - before[1]))
                )
            if side >= 0:
                clipped.append(point)
        subject = clipped
    return subject


def clipped_iou(boxes_A7: np.ndarray, boxes_B7: np.ndarray) -> np.ndarray:
    """IoU [A, B], one pair at a time."""
    corners_A83, corners_B83 = (corners_3d(boxes).double().numpy() for boxes in (boxes_A7, boxes_B7))
    iou_AB = np.zeros((len(boxes_A7), len(boxes_B7)))
    for row, (box_7, corners_83) in enumerate(zip(boxes_A7, corners_A83, strict=True)):
        for column, (other_7, other_83) in enumerate(zip(boxes_B7, corners_B83, strict=True)):
            shared = clip([(x, y) for x, y, _ in corners_83[:4]], [(x, y) for x, y, _ in other_83[:4]])
            area = ConvexHull(shared).volume if len(shared) > 2 else 0.0
            low = max(box_7[2] - box_7[5] / 2, other_7[2] - other_7[5] / 2)
            high = min(box_7[2] + box_7[5] / 2, other_7[2] + other_7[5] / 2)
            both = area * max(0.0, high - low)
            iou_AB[row, column] = both / (box_7[3:6].prod() + other_7[3:6].prod() - both)
    return iou_AB


def aligned_iou(boxes_A7: Tensor, boxes_B7: Tensor) -> Tensor:
    """IoU [A, B] of boxes without heading."""
    low_A3, high_A3 = boxes_A7[:, :3] - boxes_A7[:, 3:6] / 2, boxes_A7[:, :3] + boxes_A7[:, 3:6] / 2
    low_B3, high_B3 = boxes_B7[:, :3] - boxes_B7[:, 3:6] / 2, boxes_B7[:, :3] + boxes_B7[:, 3:6] / 2
    sides_AB3 = torch.minimum(high_A3[:, None], high_B3) - torch.maximum(low_A3[:, None], low_B3)
    both_AB = sides_AB3.clamp(min=0).prod(-1)
    return both_AB / (boxes_A7[:, 3:6].prod(-1)[:, None] + boxes_B7[:, 3:6].prod(-1) - both_AB)


def vectorised_iou(boxes_A7: Tensor, boxes_B7: Tensor) -> Tensor:
    """IoU [A, B] as where the compiled loop is not built."""
    compiled = boxes_module._box_intersection
    boxes_module._box_intersection = None
    try:
        return box3d_iou(boxes_A7, boxes_B7)
    finally:
        boxes_module._box_intersection = compiled


def _distance(first_AB: Tensor, second_AB: Tensor) -> float:
    return float((first_AB.double().cpu() - second_AB.double().cpu()).abs().max())


def _check(peer: str, ours_AB: Tensor, peers_AB: Tensor) -> None:
    distance = _distance(ours_AB, peers_AB)
    if distance > 1e-4:
        raise ValueError(f"Ours differs from {peer} by up to {distance:.2g}; not measured.")


def measure(num_first: int, num_second: int, device: str, repeats: int) -> list[Row]:
    """Milliseconds for all pairs. ValueError where ours and a peer disagree."""
    turned_A7 = random_boxes(num_first, 0, headings=True).to(device)
    turned_B7 = random_boxes(num_second, 1, headings=True).to(device)
    aligned_A7 = random_boxes(num_first, 0, headings=False).to(device)
    aligned_B7 = random_boxes(num_second, 1, headings=False).to(device)
    arrays = [boxes.double().cpu().numpy() for boxes in (turned_A7, turned_B7)]
    pairs = f"{num_first}_{num_second}"
    compiled = boxes_module._box_intersection is not None and device == "cpu"
    path = "float32, compiled loop" if compiled else "float32, vectorised"

    def row(name: str, ours: Callable[[], Tensor], peer: str, peers: Callable[[], Tensor], note: str) -> Row:
        if peer != PYTORCH3D:
            _check(peer, ours(), peers())
        seconds, peer_seconds = median_seconds((ours, peers), repeats, device)
        return Row(f"boxes.{name}_{pairs}", 1000 * seconds, "ms", peer, 1000 * peer_seconds, note=note)

    def turned() -> Tensor:
        return box3d_iou(turned_A7, turned_B7)

    def clipped() -> Tensor:
        return torch.from_numpy(clipped_iou(arrays[0], arrays[1]))

    def vectorised() -> Tensor:
        return vectorised_iou(turned_A7, turned_B7)

    def aligned() -> Tensor:
        return box3d_iou(aligned_A7[:, :6], aligned_B7[:, :6])  # what says, on a GPU too, that there are no headings

    def min_max() -> Tensor:
        return aligned_iou(aligned_A7, aligned_B7)

    rows = [row("iou", turned, CLIPPING, clipped, f"{path}; the peer in float64 on one CPU core")]
    overlap = box3d_overlap
    if overlap is not None:  # takes float32 and is inexact in it, which is noted
        corners_A83, corners_B83 = corners_3d(turned_A7), corners_3d(turned_B7)

        def pytorch3d() -> Tensor:
            return overlap(corners_A83, corners_B83)[1]

        off = _distance(torch.from_numpy(clipped_iou(arrays[0], arrays[1])), pytorch3d())
        note = f"{path}; the peer is off by up to {off:.2g} from clipping in float64"
        rows.append(row("iou_pytorch3d", turned, PYTORCH3D, pytorch3d, note))
    if compiled:
        rows.append(row("iou_compiled", turned, VECTORISED, vectorised, "float32"))
    rows.append(row("iou_aligned", aligned, MIN_MAX, min_max, "float32"))
    (ours,) = median_seconds((lambda: box3d_giou(turned_A7, turned_B7),), repeats, device)
    rows.append(Row(f"boxes.giou_{pairs}", 1000 * ours, "ms", note=path))
    return rows


def main(argv: Sequence[str] = ()) -> int:
    """Print a table."""
    parser = measuring_parser("iou", __doc__, repeats=5)
    parser.add_argument(
        "--boxes",
        nargs=2,
        type=int,
        default=(256, 64),
        metavar=("A", "B"),
        help="boxes of each side (default: 256 64)",
    )
    arguments = parser.parse_args(list(argv))
    if min(arguments.boxes) < 1:
        parser.error("--boxes takes two numbers from 1 on")
    load = Load(arguments)
    first, second = arguments.boxes
    rows = measure(first, second, arguments.device, arguments.repeats)
    packages = ("scipy",) if box3d_overlap is None else ("scipy", "pytorch3d")
    report("iou", rows, arguments, load, argv=argv, packages=packages)
    return 0
