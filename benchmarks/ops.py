"""PointNet++ operations (sampling, balls, neighbours, gathers), forward and backward, against plain torch and others.

Rooms of 6 x 5 x 2.7 m with uniform points; balls of 0.2 m with 64 samples; 16 grouped, 256 interpolated channels;
float32. A shape B_N_M means B scenes, N points and M centres. The peers, whose results are checked first, are

- the plain-torch reference everywhere (THREEDR1_OPS=torch), and tensor indexing for gathers and interpolation;
- on a CPU, `scipy.spatial.KDTree` for balls and neighbours (built in the timed call, as ours gets no index either);
- on a GPU, for these, distance tables of `torch.cdist` with sort and topk, as in plain-PyTorch PointNet++;
- our operations unfused, in the steps of a set abstraction, for `query_and_group`;
- fpsample, torch_fps, torch_quickfps, torch_cluster, pytorch3d and pointnet2_ops, where installed.

`ops.fps_B_N_M` has the fastest peer, `ops.fps_B_N_M.vs_NAME` another one. The backward rows time the backward pass
alone. On a GPU a time is the device's, over inputs that take turns so that they do not stay in its cache; the floor is
the time to read every input and write every result once at the speed of a large copy, and for furthest points, whose
steps wait for each other, a microsecond a step.
"""

import functools
import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..third_party import pointnet2
from ._arguments import measuring_parser
from ._measure import QUEUED, Load, median_device_seconds, median_seconds, report
from ._ops_data import RADIUS, SAMPLES, Data
from ._ops_packages import PACKAGES, distributions, load_packages, package_peers
from ._ops_peers import Call, Way, as_tuple, gradient, plain_peers
from .results import Row, shown

CPU_SHAPES = ("1_40000_2048", "8_40000_2048", "1_200000_4096")
GPU_SHAPES = ("1_40000_2048", "8_40000_2048", "32_40000_2048", "8_40000_256", "1_200000_4096", "8_2048_1024")
# the operations, and the inputs that each has to read
READS = {
    "fps": ("points_BN3",),
    "ball_query": ("points_BN3", "centers_BM3"),
    "group": ("features_BCN", "ball_BMS"),
    "three_nn": ("points_BN3", "centers_BM3"),
    "interpolate": ("features_BCM", "near_BN3", "weight_BN3"),
    "query_and_group": ("points_BN3", "centers_BM3", "features_BNF"),
    "group_backward": ("grad_BCMS", "ball_BMS"),
    "interpolate_backward": ("grad_BCN", "near_BN3", "weight_BN3"),
    "query_and_group_backward": ("grad_BMSX", "ball_BMS"),
}
SWITCH = "THREEDR1_OPS"
STEP_MS = 1e-3  # a step of furthest point sampling on a GPU: write, agree across the chip, read
SHORTFALL = 1e-5  # of a squared distance: what float32's rounding can make of it
MAX_SETS = 32


class Claim(NamedTuple):
    """The rows of one operation on one shape, and its floor in milliseconds (None on a CPU)."""

    rows: list[Row]
    floor: float | None


def our_way(operation: str) -> Way:
    """Our operation, as its users call it."""

    def group_gradient(data: Data) -> Call:
        def forward(features_BCN: Tensor) -> Tensor:
            return pointnet2.group_points(features_BCN, data.ball_BMS)

        return gradient(forward, data.grad_BCMS, data.features_BCN)

    def interpolate_gradient(data: Data) -> Call:
        def forward(features_BCM: Tensor) -> Tensor:
            return pointnet2.three_interpolate(features_BCM, data.near_BN3, data.weight_BN3)

        return gradient(forward, data.grad_BCN, data.features_BCM)

    def grouped(data: Data, features_BNF: Tensor, centers_BM3: Tensor) -> tuple[Tensor, Tensor]:
        return pointnet2.query_and_group(RADIUS, SAMPLES, data.points_BN3, centers_BM3, features_BNF)

    def grouped_gradient(data: Data) -> Call:
        def forward(features_BNF: Tensor, centers_BM3: Tensor) -> Tensor:
            return grouped(data, features_BNF, centers_BM3)[0]

        return gradient(forward, data.grad_BMSX, data.features_BNF, data.centers_BM3)

    partial = functools.partial
    builds: dict[str, Callable[[Data], Call]] = {
        "fps": lambda d: partial(pointnet2.furthest_point_sample, d.points_BN3, d.num_centers),
        "ball_query": lambda d: partial(pointnet2.ball_query, RADIUS, SAMPLES, d.points_BN3, d.centers_BM3),
        "group": lambda d: partial(pointnet2.group_points, d.features_BCN, d.ball_BMS),
        "three_nn": lambda d: partial(pointnet2.three_nn, d.points_BN3, d.centers_BM3),
        "interpolate": lambda d: partial(pointnet2.three_interpolate, d.features_BCM, d.near_BN3, d.weight_BN3),
        "query_and_group": lambda d: partial(grouped, d, d.features_BNF, d.centers_BM3),
        "group_backward": group_gradient,
        "interpolate_backward": interpolate_gradient,
        "query_and_group_backward": grouped_gradient,
    }
    read = _indices if operation == "three_nn" else as_tuple
    return Way("ours", "", builds[operation], read)


def _indices(distance_and_index: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    return distance_and_index[1:]


def reference_way(operation: str) -> Way:
    """The same operation, with plain torch serving it."""
    ours = our_way(operation)

    def build(data: Data) -> Call:
        with _plain_torch():
            call = ours.build(data)

        def served() -> Any:
            with _plain_torch():
                return call()

        return served

    return Way("plain-torch reference", "torch", build, ours.read)


@contextmanager
def _plain_torch() -> Iterator[None]:
    before = os.environ.get(SWITCH)
    os.environ[SWITCH] = "torch"
    try:
        yield
    finally:
        if before is None:
            del os.environ[SWITCH]
        else:
            os.environ[SWITCH] = before


def share_different(ours: Sequence[Tensor], peers: Sequence[Tensor]) -> float:
    """Share of indices that differ, or of values by more than float32's rounding; the worst of several tensors.

    Only the first tensors are compared where a peer gives fewer.
    """
    shares = []
    for our, peer in zip(ours, peers, strict=False):
        if our.shape != peer.shape:
            shares.append(1.0)
        elif our.is_floating_point():
            shares.append(float((~torch.isclose(our, peer, rtol=1e-4, atol=1e-5)).float().mean()))
        else:
            shares.append(float((our.long() != peer.long()).float().mean()))
    return max(shares)


def shortfall(points_BN3: Tensor, chosen_BM: Tensor) -> float:
    """How far a walk of furthest points is from a greedy one, wherever it begins: the largest share by which the
    squared distance of a chosen point to those before it falls short of the furthest point's. Counted in float64;
    infinite where an index is no point's."""
    points_BN3, chosen_BM = points_BN3.double(), chosen_BM.long()
    if int(chosen_BM.min()) < 0 or int(chosen_BM.max()) >= points_BN3.shape[1]:
        return math.inf
    nearest_BN = points_BN3.new_full(points_BN3.shape[:2], math.inf)
    worst_B = points_BN3.new_zeros(len(points_BN3))
    for before_B1, next_B1 in itertools.pairwise(chosen_BM.split(1, dim=1)):
        last_B13 = points_BN3.gather(1, before_B1[..., None].expand(-1, -1, 3))
        nearest_BN = torch.minimum(nearest_BN, ((points_BN3 - last_B13) ** 2).sum(-1))
        taken_B = nearest_BN.gather(1, next_B1)[:, 0]
        worst_B = torch.maximum(worst_B, 1 - taken_B / nearest_BN.amax(1).clamp(min=1e-30))
    return float(worst_B.max())


def admit(claim: str, operation: str, ours: Sequence[Tensor], way: Way, data: Data) -> str | None:
    """What to note of a peer's result beside its time; None, and why is printed, where it cannot be compared.

    Raises:
        ValueError: ours differs from a peer that is known to be right.
    """
    try:
        found = way.read(way.build(data)())
    except RuntimeError as error:
        if way.trusted:
            raise
        print(f"{claim}: {way.name} fails and is not measured: {error}")
        return None
    differ = share_different(ours, found)
    if differ <= way.allowed:
        return f"{differ:.2%} of its results differ by rounding" if differ else ""
    if way.trusted:
        raise ValueError(f"{claim}: {differ:.2%} of ours differ from {way.name}; not measured.")
    if operation == "fps" and found[0].shape == ours[0].shape and shortfall(data.points_BN3, found[0]) < SHORTFALL:
        start = "" if bool((found[0][:, 0] == 0).all()) else ", as it begins at another point"
        return f"{differ:.2%} of its indices differ{start}; each is a furthest one to {SHORTFALL:g}"
    print(f"{claim}: {differ:.2%} of the results of {way.name} differ from ours; it is not measured.")
    return None


def bytes_of(tensors: Sequence[object]) -> int:
    """Memory of those that are tensors."""
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))


def _turns(way: Way, sets: Sequence[Data]) -> Callable[[], object]:
    """The call that is timed: each time on the next set of inputs."""
    calls = itertools.cycle([way.build(data) for data in sets])
    return lambda: next(calls)()


def copy_bandwidth(device: str) -> float:
    """Bytes a second, read and written, of a large copy on a GPU."""
    source = torch.ones(1 << 28, device=device)
    target = torch.empty_like(source)
    (taken,) = median_device_seconds([lambda: target.copy_(source)], 9, device)
    return 2 * source.nbytes / taken


def measure(
    operation: str,
    shape: str,
    inputs: Callable[[int], Data],
    repeats: int,
    packages: dict[str, ModuleType],
    bandwidth: float | None,
) -> Claim:
    """Milliseconds of an operation on one shape, ours and every peer's, and its floor.

    Args:
        inputs: gives the set of inputs of a number, the same one whenever it is asked for.
        bandwidth: bytes a second of a copy on the GPU; None on a CPU, where no floor is given.

    Raises:
        ValueError: ours and a peer that is known to be right disagree.
    """
    claim, data = f"ops.{operation}_{shape}", inputs(0)
    backend = pointnet2.backend_name(data.device)
    ours = our_way(operation)
    result = ours.build(data)()
    floor, num_sets = None, 1
    if bandwidth is not None:
        read = bytes_of([getattr(data, name) for name in READS[operation]])
        floor = 1000 * (read + bytes_of(as_tuple(result))) / bandwidth
        if operation == "fps":
            floor = STEP_MS * (data.num_centers - 1)
        else:
            cache = torch.cuda.get_device_properties(data.device).L2_cache_size
            num_sets = min(MAX_SETS, 1 + math.ceil(2 * cache / read))
    ways = plain_peers(operation, data.device, ours_is_plain=backend == "torch") + package_peers(operation, packages)
    if backend != "torch":
        ways.insert(0, reference_way(operation))
    compared = ours.read(result)
    # a point at the rim of a ball falls either way in a peer's arithmetic, and moves the rest of its row
    admitted = [(way, admit(claim, operation, compared, way, data)) for way in ways]
    peers = [(way, note) for way, note in admitted if note is not None]
    del result, compared

    sets = [inputs(number) for number in range(num_sets)]
    actions = [_turns(way, sets) for way in (ours, *(way for way, _ in peers))]
    if bandwidth is None:
        times = median_seconds(actions, repeats)
    else:
        times = median_device_seconds(actions, repeats, data.device)
    value, *peer_values = (1000 * taken for taken in times)
    notes = [f"backend {backend}"]
    if floor is not None:
        notes.append(f"floor {shown(floor)} ms, {floor / value:.0%} of it reached")
        notes.append(f"device time, under 1 ms of {QUEUED} queued calls, {num_sets} sets of inputs")
    rows = []
    for peer_value, (way, note) in sorted(zip(peer_values, peers, strict=True), key=lambda pair: pair[0]):
        name = f"{claim}.vs_{way.suffix}" if rows else claim
        rows.append(Row(name, value, "ms", way.name, peer_value, note="; ".join(filter(None, [*notes, note]))))
    return Claim(rows, floor)


def main(argv: Sequence[str] = ()) -> int:
    """Print a table of every operation, shape and peer."""
    names = tuple(READS)
    parser = measuring_parser("ops", __doc__, repeats=5)
    parser.add_argument("--shapes", nargs="+", metavar="B_N_M", help="default: three on a CPU, six on a GPU")
    parser.add_argument("--ops", nargs="+", choices=names, default=names, metavar="OP", help=", ".join(names))
    parser.add_argument(
        "--packages",
        nargs="*",
        choices=PACKAGES,
        default=[*PACKAGES],
        metavar="NAME",
        help=f"of {', '.join(PACKAGES)}",
    )
    arguments = parser.parse_args(list(argv))
    device = arguments.device
    shapes = arguments.shapes or (CPU_SHAPES if device == "cpu" else GPU_SHAPES)
    for shape in shapes:
        numbers = shape.split("_")
        if len(numbers) != 3 or not all(number.isdigit() and int(number) for number in numbers):
            parser.error(f"--shapes takes scenes_points_centres, as 8_40000_2048, not {shape}")
    load = Load(arguments)
    packages = load_packages(arguments.packages, device)
    bandwidth = None if device == "cpu" else copy_bandwidth(device)
    if bandwidth is not None:
        print(f"a large copy on the GPU moves {bandwidth / 1e12:.2f} TB/s, read and written")
    claims: list[Claim] = []
    for shape in shapes:
        inputs = functools.cache(functools.partial(Data, shape, device))
        chosen = (name for name in names if name in arguments.ops)
        claims += [measure(name, shape, inputs, arguments.repeats, packages, bandwidth) for name in chosen]
    remarks = {}
    for rows, floor in claims:
        share = f"; floor {shown(floor)} ms, {floor / rows[0].value:.0%}" if floor else ""
        remarks[rows[0].name] = f"   {rows[0].peer}{share}"
    rows = [row for claim in claims for row in claim.rows]
    versions = ("scipy", *distributions(tuple(packages)))
    report("ops", rows, arguments, load, argv=argv, packages=versions, remarks=remarks)
    return 0
