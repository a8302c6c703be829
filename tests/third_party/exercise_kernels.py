"""Runs every kernel of a compiled backend, forward and backward, at odd sizes, and compares it with plain torch.

    python tests/third_party/exercise_kernels.py [--device cuda] [--quick]

Prints one line a case; the exit code is 1 after a mismatch. --quick takes each kernel once or more. For sanitizers
there is sanitize_kernels.py.

Shapes: B scenes, N points, M centres, S or K neighbours, C or F channels, P positions, X = 3 + F.
"""

import argparse
import contextlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

if "threedr1" not in sys.modules:  # started as a file: the checkout is the package
    _root = Path(__file__).resolve().parents[2]
    _spec = importlib.util.spec_from_file_location(
        "threedr1", _root / "__init__.py", submodule_search_locations=[str(_root)]
    )
    assert _spec is not None and _spec.loader is not None
    sys.modules["threedr1"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["threedr1"])

from threedr1.third_party import pointnet2

CLOUDS = (
    "uniform",
    "grid",
    "permuted",
    "duplicates",
    "planar",
    "line",
    "clustered",
    "far",
    "tiny",
    "equal",
    "outlier",
)
SIZES = (1, 2, 3, 31, 33, 127, 1000, 4096, 4097, 40001)
LARGEST = 250_000
# Scenes and points that the CUDA backend shares out over its blocks in different ways.
CROWDS = ((300, 2049), (150, 4096), (70, 16384), (20, 100_000), (9, 300_000), (1, 1_700_000))
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
SUM_TOLERANCE = 1e-5  # of the sum of absolute terms: float32 sums in any order

Case = tuple[str, Callable[[], str]]  # a label, and a function that says what is wrong, or nothing


def make_cloud(kind: str, rng: np.random.Generator, num_scenes: int, num_points: int) -> np.ndarray:
    """Points float32 [B, N, 3] in metres, in one of the arrangements that `CLOUDS` names."""
    shape = (num_scenes, num_points, 3)
    room = np.array([6.0, 5.0, 2.7])
    points_BN3 = rng.random(shape) * room
    if kind == "grid":  # many equal distances
        points_BN3 = rng.integers(-2, 3, shape).astype(np.float64)
    elif kind == "permuted":  # equal distances to the origin, but for the order of the sum and its roundings
        few_BN3 = rng.random((num_scenes, num_points // 12 + 1, 3)) * 2 - 1
        points_BN3 = np.take_along_axis(few_BN3, rng.integers(0, few_BN3.shape[1], (num_scenes, num_points, 1)), 1)
        points_BN3 = rng.permuted(points_BN3, axis=2)
        points_BN3[:, 0] = 0
    elif kind == "duplicates":
        few_BN3 = rng.random((num_scenes, 7, 3)) * room
        points_BN3 = np.take_along_axis(few_BN3, rng.integers(0, 7, (num_scenes, num_points, 1)), 1)
    elif kind == "planar":
        points_BN3[..., 2] = 1.25
    elif kind == "line":
        points_BN3[..., 1:] = 0.5
    elif kind == "clustered":
        places_BN3 = rng.integers(0, 3, (num_scenes, num_points, 1)) * np.array([2.0, 1.5, 0.0])
        points_BN3 = places_BN3 + rng.normal(0, 0.05, shape)
    elif kind == "far":  # a unit of the last place is about a millimetre there: ties again
        points_BN3 = points_BN3 + 1e4
    elif kind == "tiny":  # squares are subnormal numbers, or nothing
        points_BN3 = points_BN3 * 1e-21
    elif kind == "equal":
        points_BN3 = np.broadcast_to(room / 3, shape)
    elif kind == "outlier":  # two: the second is the furthest by far
        points_BN3[:, num_points // 3] = 3e5
        points_BN3[:, num_points // 2] = 1e6
    elif kind != "uniform":
        raise ValueError(f"{kind} is no arrangement of points; choose one of {', '.join(CLOUDS)}.")
    return np.ascontiguousarray(points_BN3, dtype=np.float32)


def make_centers(rng: np.random.Generator, points_BN3: np.ndarray, num_centers: int) -> np.ndarray:
    """Centres float32 [B, M, 3]: points of the cloud, places near them, and some far away from all."""
    num_scenes, num_points, _ = points_BN3.shape
    idx_BM1 = rng.integers(0, num_points, (num_scenes, num_centers, 1))
    centers_BM3 = np.take_along_axis(points_BN3, idx_BM1, 1)
    shift_BM1 = rng.choice([0.0, 0.0, 0.1, 50.0], (num_scenes, num_centers, 1))
    return (centers_BM3 + shift_BM1 * rng.normal(size=centers_BM3.shape)).astype(np.float32)


def unaligned(values: Tensor) -> Tensor:
    """The same values, contiguous, one element behind an aligned address: wide loads must not be taken for granted."""
    return torch.cat([values.new_zeros(1), values.flatten()])[1:].view(values.shape)


@contextlib.contextmanager
def forced(name: str) -> Iterator[None]:
    before = os.environ.get("THREEDR1_OPS")
    os.environ["THREEDR1_OPS"] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ["THREEDR1_OPS"]
        else:
            os.environ["THREEDR1_OPS"] = before


def plain(function: Callable, *arguments: object):
    """The result of plain torch on the CPU."""
    with forced("torch"):
        return function(*[value.cpu() if isinstance(value, Tensor) else value for value in arguments])


def differ(found: Tensor, wanted: Tensor) -> str:
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return f"{found.dtype} {list(found.shape)} for {wanted.dtype} {list(wanted.shape)}"
    unequal = int((found.detach().cpu() != wanted).sum())
    return f"{unequal} of {wanted.numel()} entries differ" if unequal else ""


def stray(found: Tensor, wanted: Tensor, terms: Tensor, dtype: torch.dtype) -> str:
    """What is wrong with sums; `wanted` and the sums of absolute `terms` are float64 on the CPU."""
    if found.shape != wanted.shape or found.dtype != dtype:
        return f"{found.dtype} {list(found.shape)} for {dtype} {list(wanted.shape)}"
    bound = SUM_TOLERANCE * terms + torch.finfo(dtype).eps / 2 * wanted.abs() + 1e-7  # rounded to nearest
    over = (found.detach().cpu().double() - wanted).abs() - bound
    outside = int((~(over <= 0)).sum())
    return f"{outside} of {wanted.numel()} sums are off by up to {float(over.max()):.1e} too much" if outside else ""


def first_of(*faults: str) -> str:
    return next(filter(None, faults), "")


def check_furthest(points_BN3: Tensor, num_samples: int) -> str:
    arguments = (points_BN3, num_samples)
    return differ(pointnet2.furthest_point_sample(*arguments), plain(pointnet2.furthest_point_sample, *arguments))


def check_ball(radius: float, num_samples: int, points_BN3: Tensor, centers_BM3: Tensor) -> str:
    arguments = (radius, num_samples, points_BN3, centers_BM3)
    return differ(pointnet2.ball_query(*arguments), plain(pointnet2.ball_query, *arguments))


def check_nearest(query_BN3: Tensor, points_BM3: Tensor) -> str:
    distance_BN3, idx_BN3 = pointnet2.three_nn(query_BN3, points_BM3)
    wanted_BN3, wanted_idx_BN3 = plain(pointnet2.three_nn, query_BN3, points_BM3)
    off = (distance_BN3.cpu() != wanted_BN3) & ~((distance_BN3.cpu() - wanted_BN3).abs() <= 3e-7 * wanted_BN3)
    return first_of(differ(idx_BN3, wanted_idx_BN3), f"{int(off.sum())} distances differ" if off.any() else "")


def _sum_at(terms_BPC: Tensor, idx_BP: Tensor, count: int) -> Tensor:
    """Sums [B, count, C] of the terms of each index, float64."""
    sums_BCN = terms_BPC.new_zeros(idx_BP.shape[0], count, terms_BPC.shape[2])
    return sums_BCN.scatter_add_(1, idx_BP.cpu().long()[..., None].expand(terms_BPC.shape), terms_BPC)


def check_group(features_BCN: Tensor, idx_BMK: Tensor) -> str:
    features_BCN = features_BCN.detach().requires_grad_(features_BCN.is_floating_point())
    grouped_BCMK = pointnet2.group_points(features_BCN, idx_BMK)
    fault = differ(grouped_BCMK, plain(pointnet2.group_points, features_BCN.detach(), idx_BMK))
    if fault or not features_BCN.requires_grad:
        return fault
    grad_BCMK = torch.randn(grouped_BCMK.shape).to(grouped_BCMK)
    (found_BCN,) = torch.autograd.grad(grouped_BCMK, features_BCN, grad_BCMK)
    terms_BPC = grad_BCMK.cpu().double().flatten(2).transpose(1, 2)
    idx_BP, count = idx_BMK.flatten(1), features_BCN.shape[2]
    wanted, terms = (_sum_at(part, idx_BP, count).transpose(1, 2) for part in (terms_BPC, terms_BPC.abs()))
    return stray(found_BCN, wanted, terms, features_BCN.dtype)


def check_interpolate(features_BCM: Tensor, idx_BN3: Tensor, weight_BN3: Tensor) -> str:
    features_BCM, weight_BN3 = features_BCM.detach().requires_grad_(), weight_BN3.detach().requires_grad_()
    mixed_BCN = pointnet2.three_interpolate(features_BCM, idx_BN3, weight_BN3)
    exact_BCM, exact_BN3 = features_BCM.detach().cpu().double(), weight_BN3.detach().cpu().double()
    taken_BCN3 = plain(pointnet2.group_points, exact_BCM, idx_BN3)
    terms_BCN3 = taken_BCN3 * exact_BN3[:, None]
    fault = stray(mixed_BCN, terms_BCN3.sum(-1), terms_BCN3.abs().sum(-1), features_BCM.dtype)
    if fault:
        return fault
    grad_BCN = torch.randn(mixed_BCN.shape).to(mixed_BCN)
    found_BCM, found_BN3 = torch.autograd.grad(mixed_BCN, (features_BCM, weight_BN3), grad_BCN)
    exact_BCN = grad_BCN.cpu().double()
    spread_BPC = (exact_BCN[..., None] * exact_BN3[:, None]).flatten(2).transpose(1, 2)
    idx_BP, count = idx_BN3.flatten(1), features_BCM.shape[2]
    wanted, terms = (_sum_at(part, idx_BP, count).transpose(1, 2) for part in (spread_BPC, spread_BPC.abs()))
    products_BCN3 = exact_BCN[..., None] * taken_BCN3
    return first_of(
        stray(found_BCM, wanted, terms, features_BCM.dtype),
        stray(found_BN3, products_BCN3.sum(1), products_BCN3.abs().sum(1), torch.float32),
    )


def check_fused(
    radius: float, num_samples: int, points_BN3: Tensor, centers_BM3: Tensor, features_BNF: Tensor | None
) -> str:
    inputs = [points_BN3.detach().requires_grad_(), centers_BM3.detach().requires_grad_()]
    if features_BNF is not None:
        inputs.append(features_BNF.detach().requires_grad_())
    dtype = torch.float32 if features_BNF is None else features_BNF.dtype
    grouped_BMKX, idx_BMK = pointnet2.query_and_group(radius, num_samples, *inputs, *[None] * (3 - len(inputs)))
    channels_BNX = torch.cat([part.detach().cpu().double() for part in (inputs[0], *inputs[2:])], -1)
    wanted_BMKX = plain(pointnet2.group_points, channels_BNX.transpose(1, 2).contiguous(), idx_BMK).permute(0, 2, 3, 1)
    wanted_BMKX[..., :3] = (wanted_BMKX[..., :3] - centers_BM3.cpu().double()[:, :, None]) / radius
    fault = first_of(
        differ(idx_BMK, plain(pointnet2.ball_query, radius, num_samples, points_BN3, centers_BM3)),
        stray(grouped_BMKX, wanted_BMKX, wanted_BMKX.abs(), dtype),
        differ(grouped_BMKX[..., 3:], wanted_BMKX[..., 3:].to(dtype)),
    )
    if fault:
        return fault
    grad_BMKX = torch.randn(grouped_BMKX.shape).to(grouped_BMKX)
    found = torch.autograd.grad(grouped_BMKX, inputs, grad_BMKX)
    exact_BMKX = grad_BMKX.cpu().double()
    exact_BMKX[..., :3] /= radius
    faults = []
    idx_BP, count = idx_BMK.flatten(1), points_BN3.shape[1]
    wanted, terms = (_sum_at(part.flatten(1, 2), idx_BP, count) for part in (exact_BMKX, exact_BMKX.abs()))
    faults.append(stray(found[0], wanted[..., :3], terms[..., :3], torch.float32))
    centers = exact_BMKX[..., :3]
    faults.append(stray(found[1], -centers.sum(2), centers.abs().sum(2), torch.float32))
    if features_BNF is not None:
        faults.append(stray(found[2], wanted[..., 3:], terms[..., 3:], dtype))
    return first_of(*faults)


class Cases:
    """Cases on one device, in order; a seed gives the same ones everywhere.

    Args:
        device: where the kernels run.
        seed: of all random numbers.
    """

    def __init__(self, device: str, seed: int):
        self.device = device
        self.rng = np.random.default_rng(seed)

    def cloud(self, kind: str, num_scenes: int, num_points: int, num_centers: int) -> tuple[Tensor, Tensor]:
        points_BN3 = make_cloud(kind, self.rng, num_scenes, num_points)
        centers_BM3 = make_centers(self.rng, points_BN3, num_centers)
        return torch.from_numpy(points_BN3).to(self.device), torch.from_numpy(centers_BM3).to(self.device)

    def features(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        values = torch.from_numpy(self.rng.normal(0, 3, shape))
        return (values > 0 if dtype == torch.bool else values.to(dtype)).to(self.device)

    def indices(self, count: int, *shape: int) -> Tensor:
        idx = torch.from_numpy(self.rng.integers(0, count, shape, dtype=np.int32))
        return idx.to(self.device)

    def selections(self, kind: str, num_scenes: int, num_points: int, num_centers: int, num_samples: int):
        points_BN3, centers_BM3 = self.cloud(kind, num_scenes, num_points, num_centers)
        place = f"{kind} B={num_scenes} N={num_points} M={num_centers}"
        radius = 1.0 if kind == "grid" else 0.4
        yield f"furthest_point_sample {place}", lambda: check_furthest(points_BN3, num_centers)
        yield (
            f"ball_query {place} S={num_samples}",
            lambda: check_ball(radius, num_samples, points_BN3, centers_BM3),
        )
        yield f"three_nn of points {place}", lambda: check_nearest(centers_BM3, points_BN3)
        if num_centers:
            yield f"three_nn of centres {place}", lambda: check_nearest(points_BN3, centers_BM3)

    def gathers(
        self, num_scenes: int, num_points: int, channels: int, positions: int, samples: int, dtype: torch.dtype
    ):
        features_BCN = self.features(num_scenes, channels, num_points, dtype=dtype)
        idx_BMK = self.indices(num_points, num_scenes, positions, samples)
        place = f"{dtype} B={num_scenes} N={num_points} C={channels} M={positions}"
        yield f"group_points {place} K={samples}", lambda: check_group(features_BCN, idx_BMK)
        yield (
            f"group_points {place} K={samples}, unaligned and one index only",
            lambda: check_group(unaligned(features_BCN), torch.full_like(idx_BMK, num_points - 1)),
        )

    def sums(self, num_scenes: int, num_points: int, channels: int, positions: int, samples: int, dtype: torch.dtype):
        features_BCN = self.features(num_scenes, channels, num_points, dtype=dtype)
        idx_BN3 = self.indices(num_points, num_scenes, positions, 3)
        weight_BN3 = torch.from_numpy(self.rng.random(idx_BN3.shape, dtype=np.float32)).to(self.device)
        place = f"{dtype} B={num_scenes} N={num_points} C={channels} M={positions}"
        yield f"three_interpolate {place}", lambda: check_interpolate(features_BCN, idx_BN3, weight_BN3)
        points_BN3, centers_BM3 = self.cloud("uniform", num_scenes, num_points, positions)
        features_BNF = self.features(num_scenes, num_points, channels, dtype=dtype)
        yield (
            f"query_and_group {place} K={samples}",
            lambda: check_fused(0.4, samples, points_BN3, centers_BM3, features_BNF),
        )
        yield (
            f"three_interpolate {place}, unaligned",
            lambda: check_interpolate(unaligned(features_BCN), idx_BN3, unaligned(weight_BN3)),
        )
        yield (
            f"query_and_group {place} K={samples}, unaligned",
            lambda: check_fused(0.4, samples, unaligned(points_BN3), unaligned(centers_BM3), unaligned(features_BNF)),
        )

    def bare_offsets(self, num_scenes: int, num_points: int, num_centers: int, samples: int):
        points_BN3, centers_BM3 = self.cloud("uniform", num_scenes, num_points, num_centers)
        yield (
            f"query_and_group without features B={num_scenes} N={num_points} M={num_centers} K={samples}",
            lambda: check_fused(0.4, samples, points_BN3, centers_BM3, None),
        )

    def quick(self) -> Iterator[Case]:
        """Few launches: each kernel and each way through it."""
        yield from self.selections("uniform", 1, 1, 3, 1)
        yield from self.selections("grid", 2, 129, 33, 7)
        yield from self.selections("permuted", 1, 1000, 33, 31)
        yield from self.selections("outlier", 1, 4097, 65, 64)
        yield from self.selections("equal", 1, 4097, 3, 5)
        yield from self.selections("uniform", 1, 12_000, 5, 3)
        yield from self.selections("uniform", 1, LARGEST, 3, 3)
        yield from self.gathers(2, 33, 3, 31, 7, torch.float32)
        yield from self.gathers(1, 127, 5, 3, 1, torch.bfloat16)
        yield from self.gathers(1, 127, 8, 4, 64, torch.int64)
        yield from self.gathers(16, 33, 16, 64, 64, torch.float32)
        yield from self.sums(2, 1000, 5, 33, 7, torch.float32)
        yield from self.sums(2, 33, 5, 1000, 7, torch.float32)
        yield from self.sums(1, 33, 3, 31, 1, torch.float16)
        yield from self.bare_offsets(1, 127, 3, 7)

    def full(self) -> Iterator[Case]:
        for num_points in SIZES:
            for num_scenes in (1, 5):
                num_centers = min(num_points // 3 + 2, 257)
                for num_samples in (1, 7, 64):
                    yield from self.selections("uniform", num_scenes, num_points, num_centers, num_samples)
                yield from self.selections("uniform", num_scenes, num_points, 0, 7)
                for dtype in (*FLOATS, torch.float64, torch.int64, torch.int16, torch.bool):
                    yield from self.gathers(num_scenes, num_points, 3, num_centers, 7, dtype)
                for dtype in (*FLOATS, torch.float64):
                    yield from self.sums(num_scenes, num_points, 5, num_centers, 7, dtype)
                yield from self.bare_offsets(num_scenes, num_points, num_centers, 33)
        for kind in CLOUDS:
            for num_points in (33, 1000, 4097, 40001):
                yield from self.selections(kind, 2, num_points, 65, 31)
        for dtype in FLOATS:  # channels and positions that fit wide loads, and many of them
            yield from self.gathers(2, 4097, 16, 256, 64, dtype)
            yield from self.sums(2, 4097, 128, 256, 64, dtype)
            yield from self.gathers(1, 1000, 7, 0, 5, dtype)
            yield from self.sums(1, 1000, 7, 0, 5, dtype)
        for kind in ("uniform", "equal"):
            yield from self.selections(kind, 1, LARGEST, 65, 64)
        for num_scenes, num_points in CROWDS:
            yield from self.selections("uniform", num_scenes, num_points, 17, 64)
        yield from self.gathers(1, LARGEST, 3, 33333, 7, torch.float32)
        yield from self.sums(1, LARGEST, 4, 999, 7, torch.float32)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="whose kernels run (default: cpu)")
    parser.add_argument("--quick", action="store_true", help="few and small cases")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    cases = Cases(options.device, options.seed)
    failed = 0
    with forced(options.device):
        pointnet2.backend_name(options.device)  # refuse at once where the kernels are not built
        for label, check in cases.quick() if options.quick else cases.full():
            fault = check()
            failed += bool(fault)
            sys.stdout.write(f"{'WRONG' if fault else 'ok':5} {label}{': ' + fault if fault else ''}\n")
            sys.stdout.flush()
    sys.stdout.write(f"{failed} cases are wrong\n" if failed else "all cases are right\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
