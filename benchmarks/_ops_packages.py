"""Packages that do some of the point operations, for ops.py: those that are installed, taken as they come.

They are told to start at point 0 and given our radius and samples. Layouts that differ from ours are made before the
timed call and undone after it, to compare. Where a package has variants, its fastest one on these inputs is taken.

Shapes: B scenes, N points, M centres, S samples of a ball, C or F channels, P all samples, X = 3 + F.
"""

import importlib
import importlib.metadata
import importlib.util
import time
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ._ops_data import RADIUS, SAMPLES, Data
from ._ops_peers import ROUNDING, Call, Way, as_tuple, gradient

# by operation: prepare the timed call; read its result
Peers: TypeAlias = dict[str, tuple[Callable[[Data], Call], Callable[[Any], tuple[Tensor, ...]]]]


def _fastest(variants: Sequence[Callable[..., Any]], *inputs: object) -> Callable[..., Any]:
    """The quickest of several functions on the same inputs, each called once after the first one warmed up."""

    def seconds(variant: Callable[..., Any]) -> float:
        start = time.perf_counter()
        result = variant(*inputs)
        if isinstance(result, Tensor) and result.is_cuda:
            torch.cuda.synchronize(result.device)
        return time.perf_counter() - start

    seconds(variants[0])
    return min(variants, key=seconds)


def _fpsample(module: Any) -> Peers:
    """CPU code for NumPy; from a GPU the points are copied and the indices copied back, as a user would have to."""

    def build(data: Data) -> Call:
        heights = [height for height in range(3, 10) if 2**height <= data.num_points]
        samplers = [partial(module.bucket_fps_kdline_sampling, h=height) for height in heights]
        samplers.append(partial(module.bucket_fps_kdtree_sampling))
        walks = [partial(sampler, n_samples=data.num_centers, start_idx=0) for sampler in samplers]
        walk = _fastest(walks, data.points_BN3[0].cpu().numpy())

        def call() -> Tensor:
            found_BM = np.stack([walk(points_N3) for points_N3 in data.points_BN3.cpu().numpy()])
            return torch.from_numpy(found_BM.astype(np.int64)).to(data.device)

        return call

    return {"fps": (build, as_tuple)}


def _torch_fps(module: Any) -> Peers:
    def build(data: Data) -> Call:
        every_BN = torch.ones(data.points_BN3.shape[:2], dtype=torch.bool, device=data.device)
        walk = partial(module.farthest_point_sampling, random_start=False, validate=False, assume_finite=True)
        return partial(walk, data.points_BN3, every_BN, data.num_centers)

    return {"fps": (build, as_tuple)}


def _torch_quickfps(module: Any) -> Peers:
    def build(data: Data) -> Call:
        heights = (None, *(height for height in (5, 7, 9) if 2**height <= data.num_points))
        samplers = [partial(module.sample_idx, h=height) for height in heights]
        samplers.append(partial(module.sample_idx_baseline))
        walks = [partial(sampler, k=data.num_centers, start_idx=0) for sampler in samplers]
        return partial(_fastest(walks, data.points_BN3), data.points_BN3)

    return {"fps": (build, as_tuple)}


def _torch_cluster(module: Any) -> Peers:
    """Takes all scenes as one row of points, and a share of them, rounded up, in place of a number of samples."""

    def build(data: Data) -> Call:
        rows_P3 = data.points_BN3.flatten(0, 1)
        first_B = data.num_points * torch.arange(data.num_scenes + 1, device=data.device)
        share = torch.tensor((data.num_centers - 0.5) / data.num_points, device=data.device)
        return lambda: (module.fps(rows_P3, ratio=share, random_start=False, ptr=first_B), first_B[:-1])

    def read(result: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        chosen_P, first_B = result
        return (chosen_P.reshape(len(first_B), -1) - first_B[:, None],)

    return {"fps": (build, read)}


def _pytorch3d(module: Any) -> Peers:
    walk = module.sample_farthest_points
    ball = partial(module.ball_query, K=SAMPLES, radius=RADIUS, return_nn=False)
    nearest = partial(module.knn_points, K=3, return_nn=False)

    def read_ball(result: Any) -> tuple[Tensor, ...]:
        idx_BMS = result.idx  # -1 past the last hit, where ours repeats the first one
        return (torch.where(idx_BMS < 0, idx_BMS[..., :1].clamp(min=0), idx_BMS),)

    return {
        "fps": (lambda d: partial(walk, d.points_BN3, K=d.num_centers), lambda result: (result[1],)),
        "ball_query": (lambda d: partial(ball, d.centers_BM3, d.points_BN3), read_ball),
        "three_nn": (lambda d: partial(nearest, d.points_BN3, d.centers_BM3), lambda result: (result.idx,)),
    }


def _pointnet2_ops(module: Any) -> Peers:
    """The CUDA kernels of VoteNet and its descendants. Their balls have channels first and offsets not divided."""

    def grouped(data: Data) -> Callable[[Tensor, Tensor], Tensor]:
        balls = module.QueryAndGroup(RADIUS, SAMPLES)
        return lambda features_BFN, centers_BM3: balls(data.points_BN3, centers_BM3, features_BFN)

    def read_grouped(grouped_BXMS: Tensor) -> tuple[Tensor, ...]:
        grouped_BMSX = grouped_BXMS.permute(0, 2, 3, 1)
        return (torch.cat([grouped_BMSX[..., :3] / RADIUS, grouped_BMSX[..., 3:]], -1),)

    def grouped_gradient(data: Data) -> Call:
        upstream_BXMS = data.grad_BMSX.permute(0, 3, 1, 2).contiguous()
        return gradient(grouped(data), upstream_BXMS, data.features_BCN, data.centers_BM3)

    def read_grouped_gradient(grads: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        return grads[0].transpose(1, 2), grads[1] / RADIUS

    def group_gradient(data: Data) -> Call:
        def forward(features_BCN: Tensor) -> Tensor:
            return module.grouping_operation(features_BCN, data.ball_BMS)

        return gradient(forward, data.grad_BCMS, data.features_BCN)

    def interpolate_gradient(data: Data) -> Call:
        def forward(features_BCM: Tensor) -> Tensor:
            return module.three_interpolate(features_BCM, data.near_BN3, data.weight_BN3)

        return gradient(forward, data.grad_BCN, data.features_BCM)

    return {
        "fps": (lambda d: partial(module.furthest_point_sample, d.points_BN3, d.num_centers), as_tuple),
        "ball_query": (lambda d: partial(module.ball_query, RADIUS, SAMPLES, d.points_BN3, d.centers_BM3), as_tuple),
        "group": (lambda d: partial(module.grouping_operation, d.features_BCN, d.ball_BMS), as_tuple),
        "three_nn": (lambda d: partial(module.three_nn, d.points_BN3, d.centers_BM3), lambda result: result[1:]),
        "interpolate": (
            lambda d: partial(module.three_interpolate, d.features_BCM, d.near_BN3, d.weight_BN3),
            as_tuple,
        ),
        "query_and_group": (lambda d: partial(grouped(d), d.features_BCN, d.centers_BM3), read_grouped),
        "group_backward": (group_gradient, as_tuple),
        "interpolate_backward": (interpolate_gradient, as_tuple),
        "query_and_group_backward": (grouped_gradient, read_grouped_gradient),
    }


class _Package(NamedTuple):
    """Where its functions are, what it can do, how it is used, and whether it works on a GPU only."""

    module: str
    peers: Callable[[Any], Peers]
    how: str = ""
    only_gpu: bool = False


PACKAGES = {
    "fpsample": _Package("fpsample", _fpsample, ", fastest bucketed sampler, one CPU core"),
    "torch_fps": _Package("torch_fps", _torch_fps),
    "torch_quickfps": _Package("torch_quickfps", _torch_quickfps, ", fastest sampler and bucket height"),
    "torch_cluster": _Package("torch_cluster", _torch_cluster),
    "pytorch3d": _Package("pytorch3d.ops", _pytorch3d),
    "pointnet2_ops": _Package("pointnet2_ops.pointnet2_utils", _pointnet2_ops, only_gpu=True),
}


def load_packages(wanted: Sequence[str], device: str) -> dict[str, ModuleType]:
    """Those of the wanted packages that are installed, by name; says so where one cannot be loaded."""
    found = {}
    for name in wanted:
        if importlib.util.find_spec(name) is None or (PACKAGES[name].only_gpu and device == "cpu"):
            continue
        try:
            found[name] = importlib.import_module(PACKAGES[name].module)
        except (ImportError, OSError) as error:  # built for another torch, Python or CUDA
            print(f"{name} is installed but cannot be loaded, and is not measured: {error}")
    return found


def distributions(packages: Sequence[str]) -> list[str]:
    """Names of the distributions that the packages came with."""
    owners = importlib.metadata.packages_distributions()
    return sorted({owner for name in packages for owner in owners.get(name, [])})


def package_peers(operation: str, packages: dict[str, ModuleType]) -> list[Way]:
    """The packages that do an operation."""
    found = []
    for name, module in packages.items():
        ways = PACKAGES[name].peers(module)
        if operation in ways:
            build, read = ways[operation]
            found.append(Way(name + PACKAGES[name].how, name, build, read, allowed=ROUNDING, trusted=False))
    return found
