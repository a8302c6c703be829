"""PointNet++ operations (sampling, balls, neighbours, gathers) against SciPy's tree and plain vectorised PyTorch.

Rooms of 6 x 5 x 2.7 m with uniform points; balls of 0.2 m with 64 samples; 16 grouped, 256 interpolated channels.
A shape B_N_M means B scenes, N points and M centres. The peers return the same indices but for rounding,
which is checked; they are

- on a CPU, `scipy.spatial.KDTree` for balls and neighbours (built in the timed call, as ours gets no index either);
- on a GPU, for these, distance tables of `torch.cdist` with sort and topk, as in plain-PyTorch PointNet++;
- the widespread plain-PyTorch loop for furthest points, and tensor indexing for gathers and interpolation.

Shapes: B scenes, N points, M centres, S samples of a ball, C channels.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.spatial import KDTree
from torch import Tensor

from ..third_party import pointnet2
from ._arguments import measuring_parser
from ._measure import Load, median_seconds, report
from .results import Row

RADIUS, SAMPLES, GROUP_CHANNELS, INTERPOLATED_CHANNELS = 0.2, 64, 16, 256
ROOM = (6.0, 5.0, 2.7)  # metres
CPU_SHAPES = ("1_40000_2048", "8_40000_2048", "1_200000_4096")
GPU_SHAPES = ("1_40000_2048", "8_40000_2048", "32_40000_2048", "8_40000_256", "1_200000_4096", "8_2048_1024")
NAMES = ("fps", "ball_query", "group", "three_nn", "interpolate")
INDEXING, LOOP, TREE, TABLE = (
    "tensor indexing",
    "plain PyTorch loop",
    "scipy.spatial.KDTree",
    "torch.cdist with sort or topk",
)
# share that may differ; distances by matrix products, which is what makes `cdist` fast, are good to some 1e-5
ALLOWED = {INDEXING: 0.0, LOOP: 1e-3, TREE: 1e-3, TABLE: 2e-2}


class Case(NamedTuple):
    """Ours and the peer's on the same data; `differ` is the share of indices (or values) on which they disagree."""

    ours: Callable[[], object]
    peer: Callable[[], object]
    peer_name: str
    differ: Callable[[], float]


def sample_loop(points_BN3: Tensor, num_samples: int) -> Tensor:
    """Furthest points [B, M] as plain-PyTorch PointNet++ code takes them: all in one tensor operation a step."""
    num_scenes, num_points, _ = points_BN3.shape
    chosen_BM = torch.zeros(num_scenes, num_samples, dtype=torch.long, device=points_BN3.device)
    nearest_BN = torch.full((num_scenes, num_points), 1e10, device=points_BN3.device)
    scene_B = torch.arange(num_scenes, device=points_BN3.device)
    for step in range(1, num_samples):
        last_B13 = points_BN3[scene_B, chosen_BM[:, step - 1]][:, None]
        nearest_BN = torch.minimum(nearest_BN, ((points_BN3 - last_B13) ** 2).sum(-1))
        chosen_BM[:, step] = nearest_BN.argmax(-1)
    return chosen_BM


def ball_tree(points_BN3: Tensor, centers_BM3: Tensor) -> Tensor:
    """Ball indices [B, M, S] by SciPy's tree: the first in index order, padded with the first hit."""
    found_BMS = np.zeros((*centers_BM3.shape[:2], SAMPLES), dtype=np.int32)
    for found_MS, points_N3, centers_M3 in zip(found_BMS, points_BN3.numpy(), centers_BM3.numpy(), strict=True):
        hits_M = KDTree(points_N3).query_ball_point(centers_M3, RADIUS, return_sorted=True)
        for row_S, hits in zip(found_MS, hits_M, strict=True):
            if hits:
                row_S[:] = hits[0]
                row_S[: len(hits)] = hits[:SAMPLES]
    return torch.from_numpy(found_BMS)


def ball_table(points_BN3: Tensor, centers_BM3: Tensor) -> Tensor:
    """Ball indices [B, M, S] from a table of distances, far points sorted to the end; one scene at a time."""
    num_points = points_BN3.shape[1]
    rows = []
    for points_N3, centers_M3 in zip(points_BN3, centers_BM3, strict=True):
        index_MN = torch.arange(num_points, device=points_N3.device).expand(len(centers_M3), num_points)
        distance_MN = torch.cdist(centers_M3, points_N3)
        index_MN = torch.where(distance_MN < RADIUS, index_MN, num_points)
        found_MS = index_MN.sort(dim=-1).values[:, :SAMPLES]
        first_M1 = torch.where(found_MS[:, :1] == num_points, 0, found_MS[:, :1])
        rows.append(torch.where(found_MS == num_points, first_M1, found_MS))
    return torch.stack(rows)


def neighbours_tree(query_BN3: Tensor, points_BM3: Tensor) -> Tensor:
    """Indices [B, N, 3] of the three nearest points by SciPy's tree."""
    found = [KDTree(points).query(query, k=3)[1] for query, points in zip(query_BN3, points_BM3, strict=True)]
    return torch.from_numpy(np.stack(found))


def neighbours_table(query_BN3: Tensor, points_BM3: Tensor) -> Tensor:
    """Indices [B, N, 3] of the three nearest points from a table of distances."""
    pairs = zip(query_BN3, points_BM3, strict=True)
    tables = (torch.cdist(query, points) for query, points in pairs)
    return torch.stack([table_NM.topk(3, largest=False).indices for table_NM in tables])


def group_index(features_BCN: Tensor, idx_BMS: Tensor) -> Tensor:
    """Features [B, C, M, S] by tensor indexing."""
    return torch.stack([features_CN[:, idx_MS] for features_CN, idx_MS in zip(features_BCN, idx_BMS, strict=True)])


def interpolate_index(features_BCM: Tensor, idx_BN3: Tensor, weight_BN3: Tensor) -> Tensor:
    """Weighted sums [B, C, N] by tensor indexing."""
    return (group_index(features_BCM, idx_BN3) * weight_BN3[:, None]).sum(-1)


def build_cases(shape: str, device: str) -> dict[str, Case]:
    """The five operations on one shape; each gets the indices that it would get in the network."""
    num_scenes, num_points, num_centers = (int(number) for number in shape.split("_"))
    generator = torch.Generator().manual_seed(0)

    def random(*sizes: int) -> Tensor:
        return torch.rand(sizes, generator=generator).to(device)

    points_BN3 = random(num_scenes, num_points, 3) * torch.tensor(ROOM, device=device)
    chosen_BM = pointnet2.furthest_point_sample(points_BN3, num_centers)
    centers_BM3 = pointnet2.gather_points(points_BN3.transpose(1, 2).contiguous(), chosen_BM).transpose(1, 2)
    centers_BM3 = centers_BM3.contiguous()
    ball_BMS = pointnet2.ball_query(RADIUS, SAMPLES, points_BN3, centers_BM3)
    near_BN3 = pointnet2.three_nn(points_BN3, centers_BM3)[1]
    features_BCN = random(num_scenes, GROUP_CHANNELS, num_points)
    features_BCM = random(num_scenes, INTERPOLATED_CHANNELS, num_centers)
    weight_BN3 = random(num_scenes, num_points, 3)
    long_BMS, long_BN3 = ball_BMS.long(), near_BN3.long()
    on_gpu = device != "cpu"
    ball, nearest, search = (ball_table, neighbours_table, TABLE) if on_gpu else (ball_tree, neighbours_tree, TREE)

    def case(ours: Callable[[], Tensor], peer: Callable[[], Tensor], name: str) -> Case:
        return Case(ours, peer, name, lambda: _share_different(ours(), peer()))

    return {
        "fps": case(
            lambda: pointnet2.furthest_point_sample(points_BN3, num_centers),
            lambda: sample_loop(points_BN3, num_centers),
            LOOP,
        ),
        "ball_query": case(
            lambda: pointnet2.ball_query(RADIUS, SAMPLES, points_BN3, centers_BM3),
            lambda: ball(points_BN3, centers_BM3),
            search,
        ),
        "group": case(
            lambda: pointnet2.group_points(features_BCN, ball_BMS),
            lambda: group_index(features_BCN, long_BMS),
            INDEXING,
        ),
        "three_nn": case(
            lambda: pointnet2.three_nn(points_BN3, centers_BM3)[1], lambda: nearest(points_BN3, centers_BM3), search
        ),
        "interpolate": case(
            lambda: pointnet2.three_interpolate(features_BCM, near_BN3, weight_BN3),
            lambda: interpolate_index(features_BCM, long_BN3, weight_BN3),
            INDEXING,
        ),
    }


def _share_different(ours: Tensor, peers: Tensor) -> float:
    """Share of indices that differ, or of values by more than float32's rounding."""
    if ours.is_floating_point():
        return float((~torch.isclose(ours, peers, rtol=1e-5, atol=1e-5)).float().mean())
    return float((ours.long() != peers.long()).float().mean())


def measure(shape: str, names: Sequence[str], device: str, repeats: int) -> list[Row]:
    """Milliseconds of each operation on one shape. ValueError where ours and the peer disagree."""
    rows = []
    for name, case in build_cases(shape, device).items():
        if name not in names:
            continue
        # a point at the rim of a ball falls either way in the peers' arithmetic, and moves the rest of its row
        differ = case.differ()
        if differ > ALLOWED[case.peer_name]:
            raise ValueError(f"ops.{name}_{shape}: {differ:.2%} of ours differ from {case.peer_name}; not measured.")
        ours, peer = median_seconds((case.ours, case.peer), repeats, device)
        note = f"backend {pointnet2.backend_name()}"
        rows.append(Row(f"ops.{name}_{shape}", 1000 * ours, "ms", case.peer_name, 1000 * peer, note=note))
    return rows


def main(argv: Sequence[str] = ()) -> int:
    """Print a table of every operation and shape."""
    parser = measuring_parser("ops", __doc__, repeats=5)
    parser.add_argument("--shapes", nargs="+", metavar="B_N_M", help="default: three on a CPU, six on a GPU")
    parser.add_argument("--ops", nargs="+", choices=NAMES, default=NAMES, metavar="OP", help=", ".join(NAMES))
    arguments = parser.parse_args(list(argv))
    shapes = arguments.shapes or (CPU_SHAPES if arguments.device == "cpu" else GPU_SHAPES)
    for shape in shapes:
        numbers = shape.split("_")
        if len(numbers) != 3 or not all(number.isdigit() and int(number) for number in numbers):
            parser.error(f"--shapes takes scenes_points_centres, as 8_40000_2048, not {shape}")
    load = Load(arguments)
    rows = [row for shape in shapes for row in measure(shape, arguments.ops, arguments.device, arguments.repeats)]
    report("ops", rows, arguments, load, argv=argv, packages=("scipy",))
    return 0
