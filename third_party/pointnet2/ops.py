"""The PointNet++ operations that the models call: argument checks in front of the operators of library.py.

Inputs may have any strides. Indices are int32. Selections (furthest points, balls, neighbours) carry no gradient;
gathers, grouping and the interpolation are differentiable. Which implementation computes is backends.py's choice; all
give the same indices. A scene needs at least one point; no scenes, no centres and no samples give empty results.
Coordinates must be finite: with others the indices are some valid ones.

Shapes: B scenes, N points, M centres or samples, S or K neighbours, C or F channels. Points are float32, any unit.
"""

import math

import torch
from torch import Tensor

from . import library as library  # defines torch.ops.threedr1

_operators = torch.ops.threedr1


def _check_points(name: str, points_BN3: Tensor) -> Tensor:
    if points_BN3.ndim != 3 or points_BN3.shape[2] != 3:
        raise ValueError(f"{name} must have shape [B, N, 3], not {list(points_BN3.shape)}.")
    if points_BN3.dtype != torch.float32:
        raise ValueError(
            f"{name} must be float32, as distances are defined in it, not {points_BN3.dtype} "
            f"(shape {list(points_BN3.shape)})."
        )
    return points_BN3


def _check_any_point(name: str, points_BN3: Tensor) -> None:
    if points_BN3.shape[1] == 0:
        raise ValueError(f"{name} is empty: a scene needs at least one point (shape {list(points_BN3.shape)}).")


def _check_features(name: str, features: Tensor) -> Tensor:
    if features.ndim != 3:
        raise ValueError(f"{name} must have three dimensions, not shape {list(features.shape)}.")
    return features


def _check_idx(name: str, idx: Tensor, ndim: int) -> Tensor:
    if idx.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions, not shape {list(idx.shape)}.")
    if idx.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} must be int32 or int64, not {idx.dtype} (got {list(idx.shape)}).")
    if idx.dtype == torch.int64:  # a wrong index stays wrong when the type narrows
        idx = idx.clamp(-1, 2**31 - 1)
    return idx.to(torch.int32)


def _check_pair(first: Tensor, first_name: str, second: Tensor, second_name: str) -> None:
    if first.shape[0] != second.shape[0]:
        raise ValueError(
            f"{first_name} holds {first.shape[0]} scenes, but {second_name} {second.shape[0]}: "
            f"shapes {list(first.shape)} and {list(second.shape)}."
        )
    if first.device != second.device:
        raise ValueError(f"{first_name} is on {first.device}, but {second_name} on {second.device}; move one of them.")


def _check_ball(radius: float, num_samples: int) -> None:
    if not 0 < radius < math.inf:
        raise ValueError(f"radius must be a positive number of the points' unit, got {radius}.")
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}.")


def furthest_point_sample(points_BN3: Tensor, num_samples: int) -> Tensor:
    """Indices int32 [B, num_samples] of a furthest-point walk that starts at index 0.

    Every step takes the point with the largest distance to the chosen ones, the lowest index on ties; all points are
    eligible. Once every distinct position is taken (so also when N < num_samples), index 0 repeats.
    ValueError: no points, a negative num_samples, a wrong shape or type.
    """
    _check_points("points_BN3", points_BN3)
    if num_samples < 0:
        raise ValueError(f"num_samples must not be negative, got {num_samples}.")
    _check_any_point("points_BN3", points_BN3)
    return _operators.furthest_point_sample(points_BN3.detach(), num_samples)


def ball_query(radius: float, num_samples: int, points_BN3: Tensor, centers_BM3: Tensor) -> Tensor:
    """Indices int32 [B, M, num_samples] of the first points, in index order, strictly within `radius` of each centre.

    Rows with fewer hits are padded with their first hit; a row without any hit is all zeros. `radius * radius` is
    rounded to float32. ValueError: no points, a radius that is not positive, num_samples below 1, shapes, types or
    devices that disagree.
    """
    _check_points("points_BN3", points_BN3)
    _check_points("centers_BM3", centers_BM3)
    _check_pair(points_BN3, "points_BN3", centers_BM3, "centers_BM3")
    _check_ball(radius, num_samples)
    _check_any_point("points_BN3", points_BN3)
    return _operators.ball_query(points_BN3.detach(), centers_BM3.detach(), radius, num_samples)


def three_nn(query_BN3: Tensor, points_BM3: Tensor) -> tuple[Tensor, Tensor]:
    """The three points nearest to each query: Euclidean distances [B, N, 3], ascending, and indices int32 [B, N, 3].

    The lower index comes first on ties. With M < 3 the missing neighbours have index 0 and an infinite distance, so
    that inverse-distance weights give them nothing. ValueError: no points, shapes, types or devices that disagree.
    """
    _check_points("query_BN3", query_BN3)
    _check_points("points_BM3", points_BM3)
    _check_pair(query_BN3, "query_BN3", points_BM3, "points_BM3")
    _check_any_point("points_BM3", points_BM3)
    return _operators.three_nn(query_BN3.detach(), points_BM3.detach())


def three_interpolate(features_BCM: Tensor, idx_BN3: Tensor, weight_BN3: Tensor) -> Tensor:
    """Weighted sums [B, C, N] of three neighbours' features; differentiable (once) in features and weights.

    The result has the features' type; products and sums are taken in float32 at least.
    ValueError: shapes or devices that disagree, indices that are no integers.
    """
    _check_features("features_BCM", features_BCM)
    idx_BN3 = _check_idx("idx_BN3", idx_BN3, 3)
    if idx_BN3.shape != weight_BN3.shape or idx_BN3.shape[-1] != 3:
        raise ValueError(
            f"idx_BN3 and weight_BN3 must both be [B, N, 3], not {list(idx_BN3.shape)} and {list(weight_BN3.shape)}."
        )
    _check_pair(features_BCM, "features_BCM", idx_BN3, "idx_BN3")
    _check_pair(idx_BN3, "idx_BN3", weight_BN3, "weight_BN3")
    if not (features_BCM.is_floating_point() and weight_BN3.is_floating_point()):
        raise ValueError(
            f"features_BCM and weight_BN3 must be floating-point, not {features_BCM.dtype} and {weight_BN3.dtype}."
        )
    exact = torch.promote_types(features_BCM.dtype, torch.float32)
    return _operators.three_interpolate(features_BCM, idx_BN3, weight_BN3.to(exact))


def group_points(features_BCN: Tensor, idx_BMK: Tensor) -> Tensor:
    """Features [B, C, M, K] of each centre's neighbours; differentiable, any number type.

    ValueError: shapes or devices that disagree, indices that are no integers. IndexError or a device-side assertion:
    an index outside the points.
    """
    _check_features("features_BCN", features_BCN)
    idx_BMK = _check_idx("idx_BMK", idx_BMK, 3)
    _check_pair(features_BCN, "features_BCN", idx_BMK, "idx_BMK")
    return _operators.group_points(features_BCN, idx_BMK.flatten(1)).unflatten(2, idx_BMK.shape[1:])


def gather_points(features_BCN: Tensor, idx_BM: Tensor) -> Tensor:
    """Features [B, C, M] at the given indices; differentiable, any number type. Errors as `group_points`."""
    _check_features("features_BCN", features_BCN)
    idx_BM = _check_idx("idx_BM", idx_BM, 2)
    _check_pair(features_BCN, "features_BCN", idx_BM, "idx_BM")
    return _operators.group_points(features_BCN, idx_BM)


def query_and_group(
    radius: float, num_samples: int, points_BN3: Tensor, centers_BM3: Tensor, features_BNF: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The balls of a set abstraction in one pass: neighbours [B, M, K, 3 + F] and their indices int32 [B, M, K].

    A neighbour is its offset from the centre divided by the radius, then its features; see `ball_query` for which
    points a ball holds (K is num_samples), and mind that a ball without hits holds point 0. The result has the
    features' type (float32 without features), and is differentiable (once) in points, centres and features.
    ValueError: as `ball_query`, and features that are not [B, N, F].
    """
    idx_BMK = ball_query(radius, num_samples, points_BN3, centers_BM3)
    if features_BNF is not None:
        _check_features("features_BNF", features_BNF)
        _check_pair(points_BN3, "points_BN3", features_BNF, "features_BNF")
        if features_BNF.shape[1] != points_BN3.shape[1]:
            raise ValueError(
                f"features_BNF must have a row for each of the {points_BN3.shape[1]} points, not shape "
                f"{list(features_BNF.shape)}."
            )
        if not features_BNF.is_floating_point():
            raise ValueError(f"features_BNF must be floating-point, not {features_BNF.dtype}.")
    return _operators.group_offsets(points_BN3, centers_BM3, features_BNF, idx_BMK, radius), idx_BMK
