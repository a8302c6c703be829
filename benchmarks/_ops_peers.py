"""Who else does the point operations, for ops.py: SciPy and plain PyTorch, always there. Ours must agree with them.

Shapes: B scenes, N points, M centres, S samples of a ball, C or F channels, X = 3 + F.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.spatial import KDTree
from torch import Tensor

from ..third_party import pointnet2
from ._ops_data import RADIUS, SAMPLES, Data

Call = Callable[[], Any]
ROUNDING = 1e-3  # share that differs where points at a ball's rim, or equally far ones, fall either way by rounding
TABLE = 2e-2  # distances by matrix products, which is what makes `cdist` fast, are good to some 1e-5


def as_tuple(result: Any) -> tuple[Tensor, ...]:
    """What is compared of a result: all of it."""
    return result if isinstance(result, tuple) else (result,)


class Way(NamedTuple):
    """One implementation of an operation.

    Attributes:
        name: as the results name it.
        suffix: of its rows, where it is not the fastest peer.
        build: prepares and gives the call that is timed.
        read: the tensors of a call's result that are compared, laid out as ours.
        allowed: share of them that may differ from ours.
        trusted: a difference is an error of ours.
    """

    name: str
    suffix: str
    build: Callable[[Data], Call]
    read: Callable[[Any], tuple[Tensor, ...]] = as_tuple
    allowed: float = 0.0
    trusted: bool = True


def gradient(forward: Callable[..., Tensor], upstream: Tensor, *inputs: Tensor) -> Call:
    """The backward pass alone: gradients of the inputs, the forward pass done beforehand."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    return functools.partial(torch.autograd.grad, forward(*leaves), leaves, upstream, retain_graph=True)


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


def group_unfused(points_BN3: Tensor, centers_BM3: Tensor, features_BNF: Tensor) -> tuple[Tensor, Tensor]:
    """`query_and_group` step by step: our ball query and gather, then PyTorch's offsets and concatenation."""
    ball_BMS = pointnet2.ball_query(RADIUS, SAMPLES, points_BN3, centers_BM3)
    channels_BXN = torch.cat([points_BN3, features_BNF], -1).transpose(1, 2).contiguous()
    grouped_BMSX = pointnet2.group_points(channels_BXN, ball_BMS).permute(0, 2, 3, 1)
    offset_BMS3 = (grouped_BMSX[..., :3] - centers_BM3[:, :, None]) / RADIUS
    return torch.cat([offset_BMS3, grouped_BMSX[..., 3:]], -1), ball_BMS


def plain_peers(operation: str, device: str, *, ours_is_plain: bool) -> list[Way]:
    """The trusted peers of an operation; the slow loop over samples only where ours is no better than plain torch."""
    on_gpu = device != "cpu"
    ball, nearest = (ball_table, neighbours_table) if on_gpu else (ball_tree, neighbours_tree)
    search = ("torch.cdist with sort or topk", "cdist") if on_gpu else ("scipy.spatial.KDTree", "scipy")
    allowed = TABLE if on_gpu else ROUNDING
    indexing, partial = ("tensor indexing", "indexing"), functools.partial

    def group_gradient(data: Data) -> Call:
        return gradient(
            lambda features: group_index(features, data.ball_BMS.long()), data.grad_BCMS, data.features_BCN
        )

    def interpolate_gradient(data: Data) -> Call:
        idx_BN3, weight_BN3 = data.near_BN3.long(), data.weight_BN3
        forward = partial(interpolate_index, idx_BN3=idx_BN3, weight_BN3=weight_BN3)
        return gradient(forward, data.grad_BCN, data.features_BCM)

    def unfused_gradient(data: Data) -> Call:
        def forward(features_BNF: Tensor, centers_BM3: Tensor) -> Tensor:
            return group_unfused(data.points_BN3, centers_BM3, features_BNF)[0]

        return gradient(forward, data.grad_BMSX, data.features_BNF, data.centers_BM3)

    unfused = ("our operations unfused", "unfused")
    ways = {
        "fps": [
            Way(
                "plain PyTorch loop",
                "loop",
                lambda d: partial(sample_loop, d.points_BN3, d.num_centers),
                allowed=ROUNDING,
            )
        ],
        "ball_query": [Way(*search, lambda d: partial(ball, d.points_BN3, d.centers_BM3), allowed=allowed)],
        "group": [Way(*indexing, lambda d: partial(group_index, d.features_BCN, d.ball_BMS.long()))],
        "three_nn": [Way(*search, lambda d: partial(nearest, d.points_BN3, d.centers_BM3), allowed=allowed)],
        "interpolate": [
            Way(*indexing, lambda d: partial(interpolate_index, d.features_BCM, d.near_BN3.long(), d.weight_BN3))
        ],
        "query_and_group": [
            Way(*unfused, lambda d: partial(group_unfused, d.points_BN3, d.centers_BM3, d.features_BNF))
        ],
        "group_backward": [Way(*indexing, group_gradient)],
        "interpolate_backward": [Way(*indexing, interpolate_gradient)],
        "query_and_group_backward": [Way(*unfused, unfused_gradient)],
    }
    return [] if operation == "fps" and not ours_is_plain else ways[operation]
