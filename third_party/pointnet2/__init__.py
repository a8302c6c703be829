"""PointNet++ operations: sampling, neighbourhoods, gathers and interpolation on point clouds."""

from .ops import (
    available_backends,
    backend_name,
    ball_query,
    furthest_point_sample,
    gather_points,
    group_points,
    three_interpolate,
    three_nn,
)

__all__ = [
    "available_backends",
    "backend_name",
    "ball_query",
    "furthest_point_sample",
    "gather_points",
    "group_points",
    "three_interpolate",
    "three_nn",
]
