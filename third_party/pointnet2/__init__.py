"""PointNet++ operations: sampling, neighbourhoods, gathers and interpolation on point clouds."""

from .backends import available_backends, backend_name, describe_backends
from .ops import (
    ball_query,
    furthest_point_sample,
    gather_points,
    group_points,
    query_and_group,
    three_interpolate,
    three_nn,
)

__all__ = [
    "available_backends",
    "backend_name",
    "ball_query",
    "describe_backends",
    "furthest_point_sample",
    "gather_points",
    "group_points",
    "query_and_group",
    "three_interpolate",
    "three_nn",
]
