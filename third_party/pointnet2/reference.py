"""The PointNet++ operations in plain torch: the fallback everywhere, and the oracle for the compiled backends.

Squared distances are `(dx*dx + dy*dy) + dz*dz`, each operation rounded to float32 and never fused, so that the indices
are the same on every machine. Work that needs a distance table is cut into slabs of at most `_SLAB` entries.
Arguments are checked in ops.py; call these functions through it. The `…_backward` functions are the gradients that
library.py registers.

Shapes: B scenes, N points, M centres or samples, S or K neighbours, C or F channels, P positions, X = 3 + F.
"""

import numpy as np
import torch
from torch import Tensor

_SLAB = 1 << 20  # entries of one distance table: 4 MiB, which stays in cache on most CPUs
_SLAB_GPU = 1 << 26


def _rows_per_slab(table_width: int, device: torch.device) -> int:
    entries = _SLAB if device.type == "cpu" else _SLAB_GPU
    return max(1, entries // max(1, table_width))


def _squared_distances(from_P3: Tensor, to_3Q: Tensor) -> Tensor:
    """Table [P, Q] of squared distances."""
    total_PQ = from_P3[:, 0:1] - to_3Q[0]
    total_PQ.mul_(total_PQ)
    for axis in (1, 2):
        delta_PQ = from_P3[:, axis : axis + 1] - to_3Q[axis]
        total_PQ.add_(delta_PQ.mul_(delta_PQ))
    return total_PQ


@torch.no_grad()
def furthest_point_sample(points_BN3: Tensor, num_samples: int) -> Tensor:
    points_3BN = points_BN3.permute(2, 0, 1).contiguous()
    _, num_scenes, num_points = points_3BN.shape
    chosen_MB1 = torch.zeros(num_samples, num_scenes, 1, dtype=torch.int64, device=points_BN3.device)
    nearest_BN = points_3BN.new_full((num_scenes, num_points), float("inf"))
    delta_3BN = torch.empty_like(points_3BN)
    dx_BN, dy_BN, dz_BN = delta_3BN.unbind(0)
    centre_3B1 = points_3BN.new_empty(3, num_scenes, 1)
    for step in range(1, num_samples):
        last_3B1 = chosen_MB1[step - 1].expand(3, num_scenes, 1)
        torch.gather(points_3BN, 2, last_3B1, out=centre_3B1)
        torch.sub(points_3BN, centre_3B1, out=delta_3BN)
        delta_3BN.mul_(delta_3BN)
        dx_BN.add_(dy_BN).add_(dz_BN)
        torch.minimum(nearest_BN, dx_BN, out=nearest_BN)
        torch.argmax(nearest_BN, 1, keepdim=True, out=chosen_MB1[step])
    return chosen_MB1[..., 0].t().to(torch.int32).contiguous()


@torch.no_grad()
def ball_query(radius: float, num_samples: int, points_BN3: Tensor, centers_BM3: Tensor) -> Tensor:
    num_scenes, num_points, _ = points_BN3.shape
    num_centers = centers_BM3.shape[1]
    radius_squared = float(np.float32(radius) * np.float32(radius))
    points_B3N = points_BN3.transpose(1, 2).contiguous()
    found_BMS = torch.zeros(num_scenes, num_centers, num_samples, dtype=torch.int32, device=points_BN3.device)
    rows = _rows_per_slab(num_points, points_BN3.device)
    for scene in range(num_scenes):
        for start in range(0, num_centers, rows):
            part_P3 = centers_BM3[scene, start : start + rows]
            hit_PN = _squared_distances(part_P3, points_B3N[scene]) < radius_squared
            found_BMS[scene, start : start + rows] = _first_hits(hit_PN, num_samples)
    return found_BMS


def _first_hits(hit_PN: Tensor, num_samples: int) -> Tensor:
    """The first `num_samples` true columns of each row, padded with the row's first; zeros where there is none."""
    row_H, column_H = hit_PN.nonzero(as_tuple=True)  # row-major: columns ascend within a row
    count_P = torch.bincount(row_H, minlength=hit_PN.shape[0])
    first_P = count_P.cumsum(0) - count_P  # where each row's hits begin
    slot_PS = torch.arange(num_samples, device=hit_PN.device).expand(hit_PN.shape[0], num_samples)
    slot_PS = torch.where(slot_PS < count_P[:, None], slot_PS, 0) + first_P[:, None]
    column_H = torch.cat([column_H, column_H.new_zeros(1)])  # a place to read from when the last rows are empty
    found_PS = column_H[slot_PS.clamp(max=column_H.numel() - 1)]
    return torch.where(count_P[:, None] > 0, found_PS, 0).to(torch.int32)


@torch.no_grad()
def three_nn(query_BN3: Tensor, points_BM3: Tensor) -> tuple[Tensor, Tensor]:
    num_scenes, num_queries, _ = query_BN3.shape
    squared_BN3 = torch.empty_like(query_BN3)
    index_BN3 = torch.zeros(num_scenes, num_queries, 3, dtype=torch.int64, device=query_BN3.device)
    points_B3M = points_BM3.transpose(1, 2).contiguous()
    rows = _rows_per_slab(points_BM3.shape[1], query_BN3.device)
    for scene in range(num_scenes):
        for start in range(0, num_queries, rows):
            part = slice(start, start + rows)
            table_PM = _squared_distances(query_BN3[scene, part], points_B3M[scene])
            for rank in range(3):  # argmin takes the lowest index on ties; topk promises no order there
                nearest_P1 = table_PM.argmin(1, keepdim=True)
                squared_BN3[scene, part, rank] = table_PM.gather(1, nearest_P1)[:, 0]
                index_BN3[scene, part, rank] = nearest_P1[:, 0]
                table_PM.scatter_(1, nearest_P1, float("inf"))
    return squared_BN3.sqrt_(), index_BN3.to(torch.int32)


def _checked(idx: Tensor, num_points: int) -> Tensor:
    """Indices as int64. A GPU's own gather reports a wrong one; on the CPU we do, as scatter would write anywhere."""
    if idx.device.type == "cpu" and idx.numel() and (int(idx.min()) < 0 or int(idx.max()) >= num_points):
        raise IndexError(f"an index lies outside the {num_points} points.")
    return idx.long()


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Sums of half-precision features are taken in float32."""
    return torch.promote_types(dtype, torch.float32)


def group_points(features_BCN: Tensor, idx_BP: Tensor) -> Tensor:
    num_scenes, channels, num_points = features_BCN.shape
    idx_BCP = _checked(idx_BP, num_points)[:, None].expand(num_scenes, channels, idx_BP.shape[1])
    return features_BCN.gather(2, idx_BCP)


def group_points_backward(grad_BCP: Tensor, idx_BP: Tensor, num_points: int) -> Tensor:
    num_scenes, channels, positions = grad_BCP.shape
    sums_BCN = grad_BCP.new_zeros(num_scenes, channels, num_points, dtype=_sum_dtype(grad_BCP.dtype))
    idx_BCP = _checked(idx_BP, num_points)[:, None].expand(num_scenes, channels, positions)
    return sums_BCN.scatter_add_(2, idx_BCP, grad_BCP.to(sums_BCN.dtype)).to(grad_BCP.dtype)


def three_interpolate(features_BCM: Tensor, idx_BN3: Tensor, weight_BN3: Tensor) -> Tensor:
    near_BCN3 = group_points(features_BCM, idx_BN3.flatten(1)).unflatten(2, idx_BN3.shape[1:])
    weighted_BCN3 = near_BCN3.to(_sum_dtype(features_BCM.dtype)) * weight_BN3[:, None]
    mixed_BCN = (weighted_BCN3[..., 0] + weighted_BCN3[..., 1]) + weighted_BCN3[..., 2]
    return mixed_BCN.to(features_BCM.dtype)


def three_interpolate_backward(
    grad_BCN: Tensor,
    features_BCM: Tensor,
    idx_BN3: Tensor,
    weight_BN3: Tensor,
    need_features: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    grad_features = grad_BCN.new_empty(0)
    grad_weight = weight_BN3.new_empty(0)
    exact_BCN1 = grad_BCN.to(_sum_dtype(grad_BCN.dtype))[..., None]
    if need_features:
        spread_BCP = (exact_BCN1 * weight_BN3[:, None]).flatten(2)
        sums_BCM = group_points_backward(spread_BCP, idx_BN3.flatten(1), features_BCM.shape[2])
        grad_features = sums_BCM.to(features_BCM.dtype)
    if need_weight:
        near_BCN3 = group_points(features_BCM, idx_BN3.flatten(1)).unflatten(2, idx_BN3.shape[1:])
        grad_weight = (exact_BCN1 * near_BCN3).sum(1).to(weight_BN3.dtype)
    return grad_features, grad_weight


def group_offsets(
    points_BN3: Tensor, centers_BM3: Tensor, features_BNF: Tensor | None, idx_BMK: Tensor, radius: float
) -> Tensor:
    near_BMK3 = _gather_rows(points_BN3, idx_BMK)
    offset_BMK3 = (near_BMK3 - centers_BM3[:, :, None]) / radius
    if features_BNF is None:
        return offset_BMK3
    return torch.cat([offset_BMK3.to(features_BNF.dtype), _gather_rows(features_BNF, idx_BMK)], -1)


def group_offsets_backward(
    grad_BMKX: Tensor, idx_BMK: Tensor, num_points: int, radius: float, needs: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    need_points, need_centers, need_features = needs
    exact = _sum_dtype(grad_BMKX.dtype)
    grad_points = grad_centers = grad_BMKX.new_empty(0, dtype=exact)
    grad_features = grad_BMKX.new_empty(0)
    grad_offset_BMK3 = grad_BMKX[..., :3].to(exact) / radius
    if need_points:
        grad_points = _scatter_rows(grad_offset_BMK3, idx_BMK, num_points)
    if need_centers:
        grad_centers = -grad_offset_BMK3.sum(2)
    if need_features:
        grad_features = _scatter_rows(grad_BMKX[..., 3:].to(exact), idx_BMK, num_points).to(grad_BMKX.dtype)
    return grad_points, grad_centers, grad_features


def _gather_rows(rows_BNF: Tensor, idx_BMK: Tensor) -> Tensor:
    """Rows [B, M, K, F] at the indices."""
    num_points, width = rows_BNF.shape[1:]
    idx_BPF = _checked(idx_BMK, num_points).flatten(1)[..., None].expand(-1, -1, width)
    return rows_BNF.gather(1, idx_BPF).unflatten(1, idx_BMK.shape[1:])


def _scatter_rows(grad_BMKF: Tensor, idx_BMK: Tensor, num_points: int) -> Tensor:
    """Sums [B, N, F] of the rows that each point received."""
    grad_BPF = grad_BMKF.flatten(1, 2)
    sums_BNF = grad_BPF.new_zeros(grad_BPF.shape[0], num_points, grad_BPF.shape[2])
    idx_BPF = _checked(idx_BMK, num_points).flatten(1)[..., None].expand_as(grad_BPF)
    return sums_BNF.scatter_add_(1, idx_BPF, grad_BPF)
