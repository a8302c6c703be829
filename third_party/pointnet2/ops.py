"""The PointNet++ operations that the models call: argument checks and the choice of a backend.

The backend is chosen automatically, or forced with the environment variable `THREEDR1_OPS`. Indices are int32.
Selections (furthest points, balls, neighbours) carry no gradient; gathers and the interpolation are differentiable.

Shapes: B scenes, N points, M centres or samples, S or K neighbours, C channels. Points are float32, any unit.
"""

import os
from types import ModuleType

import torch
from torch import Tensor

from . import reference

BACKENDS: dict[str, ModuleType] = {"torch": reference}  # compiled backends register here, the fastest last
VARIABLE = "THREEDR1_OPS"


def available_backends() -> tuple[str, ...]:
    """Names that `THREEDR1_OPS` accepts on this machine."""
    return tuple(BACKENDS)


def backend_name() -> str:
    """The backend in use; ValueError where `THREEDR1_OPS` names one that this machine does not have."""
    forced = os.environ.get(VARIABLE, "")
    if not forced:
        return next(reversed(BACKENDS))
    if forced not in BACKENDS:
        raise ValueError(
            f"{VARIABLE}={forced} is not a backend of the point operations on this machine; "
            f"set it to one of {', '.join(BACKENDS)}, or unset it."
        )
    return forced


def _backend() -> ModuleType:
    return BACKENDS[backend_name()]


def _check_points(name: str, points_BN3: Tensor) -> Tensor:
    if points_BN3.ndim != 3 or points_BN3.shape[2] != 3:
        raise ValueError(f"{name} must have shape [B, N, 3], not {list(points_BN3.shape)}.")
    if points_BN3.dtype != torch.float32:
        raise ValueError(f"{name} must be float32, not {points_BN3.dtype}; distances are defined in float32.")
    return points_BN3.contiguous()


def _check_pair(first: Tensor, first_name: str, second: Tensor, second_name: str) -> None:
    if first.shape[0] != second.shape[0]:
        raise ValueError(f"{first_name} holds {first.shape[0]} scenes, but {second_name} {second.shape[0]}.")
    if first.device != second.device:
        raise ValueError(f"{first_name} is on {first.device}, but {second_name} on {second.device}.")


def furthest_point_sample(points_BN3: Tensor, num_samples: int) -> Tensor:
    """Indices int32 [B, num_samples] of a furthest-point walk that starts at index 0.

    Every step takes the point with the largest distance to the chosen ones, the lowest index on ties; all points are
    eligible. Once every distinct position is taken (so also when N < num_samples), index 0 repeats.
    ValueError: no points.
    """
    points_BN3 = _check_points("points_BN3", points_BN3)
    if num_samples < 0:
        raise ValueError(f"num_samples must not be negative, got {num_samples}.")
    if points_BN3.shape[1] == 0:
        raise ValueError("furthest_point_sample needs at least one point a scene; the cloud is empty.")
    return _backend().furthest_point_sample(points_BN3, num_samples)


def ball_query(radius: float, num_samples: int, points_BN3: Tensor, centers_BM3: Tensor) -> Tensor:
    """Indices int32 [B, M, num_samples] of the first points, in index order, strictly within `radius` of each centre.

    Rows with fewer hits are padded with their first hit; a row without any hit is all zeros. `radius * radius` is
    rounded to float32. ValueError: no points, a radius that is not positive.
    """
    points_BN3 = _check_points("points_BN3", points_BN3)
    centers_BM3 = _check_points("centers_BM3", centers_BM3)
    _check_pair(points_BN3, "points_BN3", centers_BM3, "centers_BM3")
    if radius <= 0 or num_samples < 1:
        raise ValueError(f"ball_query needs a positive radius and num_samples, got {radius} and {num_samples}.")
    if points_BN3.shape[1] == 0:
        raise ValueError("ball_query needs at least one point a scene; the cloud is empty.")
    return _backend().ball_query(radius, num_samples, points_BN3, centers_BM3)


def three_nn(query_BN3: Tensor, points_BM3: Tensor) -> tuple[Tensor, Tensor]:
    """The three points nearest to each query: Euclidean distances [B, N, 3], ascending, and indices int32 [B, N, 3].

    The lower index comes first on ties. With M < 3 the missing neighbours have index 0 and an infinite distance, so
    that inverse-distance weights give them nothing. ValueError: no points.
    """
    query_BN3 = _check_points("query_BN3", query_BN3)
    points_BM3 = _check_points("points_BM3", points_BM3)
    _check_pair(query_BN3, "query_BN3", points_BM3, "points_BM3")
    if points_BM3.shape[1] == 0:
        raise ValueError("three_nn needs at least one point a scene; the cloud is empty.")
    return _backend().three_nn(query_BN3, points_BM3)


def three_interpolate(features_BCM: Tensor, idx_BN3: Tensor, weight_BN3: Tensor) -> Tensor:
    """Weighted sums [B, C, N] of three neighbours' features; differentiable in features and weights."""
    if idx_BN3.shape != weight_BN3.shape or idx_BN3.shape[-1] != 3:
        raise ValueError(
            f"idx_BN3 and weight_BN3 must both be [B, N, 3], not {list(idx_BN3.shape)} and {list(weight_BN3.shape)}."
        )
    _check_pair(features_BCM, "features_BCM", idx_BN3, "idx_BN3")
    return _backend().three_interpolate(features_BCM, idx_BN3, weight_BN3)


def group_points(features_BCN: Tensor, idx_BMK: Tensor) -> Tensor:
    """Features [B, C, M, K] of each centre's neighbours; differentiable. ValueError: shapes or devices disagree."""
    if features_BCN.ndim != 3 or idx_BMK.ndim != 3:
        raise ValueError(
            f"group_points takes [B, C, N] and [B, M, K], not {list(features_BCN.shape)} and {list(idx_BMK.shape)}."
        )
    _check_pair(features_BCN, "features_BCN", idx_BMK, "idx_BMK")
    return _backend().group_points(features_BCN, idx_BMK)


def gather_points(features_BCN: Tensor, idx_BM: Tensor) -> Tensor:
    """Features [B, C, M] at the given indices; differentiable. ValueError: shapes or devices disagree."""
    if features_BCN.ndim != 3 or idx_BM.ndim != 2:
        raise ValueError(
            f"gather_points takes [B, C, N] and [B, M], not {list(features_BCN.shape)} and {list(idx_BM.shape)}."
        )
    _check_pair(features_BCN, "features_BCN", idx_BM, "idx_BM")
    return _backend().gather_points(features_BCN, idx_BM)
