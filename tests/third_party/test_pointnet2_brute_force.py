"""Every point operation, on every backend, against loops over scenes in NumPy.

Distances are `(dx*dx + dy*dy) + dz*dz`, each operation rounded to float32; NumPy fuses none of them.

Shapes: B scenes, N points, M centres or samples, S or K neighbours, C or F channels, X = 3 + F.
"""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from threedr1.third_party import pointnet2

from . import exercise_kernels
from .exercise_kernels import CLOUDS, make_centers, make_cloud, unaligned

RADII = (0.05, 0.1, 0.5, 1.0, 2.0, 1e5)  # 1 and 2 are distances between points of the grid
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

examples = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
seeds = st.integers(0, 2**31)
scenes = st.integers(0, 3)
sizes = st.integers(1, 200)
counts = st.integers(0, 60)
kinds = st.sampled_from(CLOUDS)


def squared_distances(from_P3, to_Q3):
    delta_PQ3 = from_P3[:, None] - to_Q3[None]
    square_PQ3 = delta_PQ3 * delta_PQ3
    return (square_PQ3[..., 0] + square_PQ3[..., 1]) + square_PQ3[..., 2]


def brute_furthest(points_BN3, num_samples):
    idx_BM = np.zeros((len(points_BN3), num_samples), np.int32)
    for points_N3, idx_M in zip(points_BN3, idx_BM, strict=True):
        nearest_N = np.full(len(points_N3), np.inf, np.float32)
        for step in range(1, num_samples):
            last = points_N3[idx_M[step - 1]][None]
            nearest_N = np.minimum(nearest_N, squared_distances(points_N3, last)[:, 0])
            idx_M[step] = nearest_N.argmax()  # the first of equals
    return idx_BM


def brute_ball(radius, num_samples, points_BN3, centers_BM3):
    radius_squared = np.float32(radius) * np.float32(radius)
    idx_BMS = np.zeros((*centers_BM3.shape[:2], num_samples), np.int32)
    for points_N3, centers_M3, idx_MS in zip(points_BN3, centers_BM3, idx_BMS, strict=True):
        hit_MN = squared_distances(centers_M3, points_N3) < radius_squared
        for hit_N, idx_S in zip(hit_MN, idx_MS, strict=True):
            hits = np.flatnonzero(hit_N)[:num_samples]
            if len(hits):
                idx_S[:] = hits[0]
                idx_S[: len(hits)] = hits
    return idx_BMS


def brute_nearest(query_BN3, points_BM3):
    distance_BN3 = np.full(query_BN3.shape, np.inf, np.float32)
    idx_BN3 = np.zeros(query_BN3.shape, np.int32)
    for scene, (query_N3, points_M3) in enumerate(zip(query_BN3, points_BM3, strict=True)):
        table_NM = squared_distances(query_N3, points_M3)
        order_NK = table_NM.argsort(1, kind="stable")[:, :3]  # the lower index first among equals
        count = order_NK.shape[1]
        idx_BN3[scene, :, :count] = order_NK
        distance_BN3[scene, :, :count] = np.sqrt(np.take_along_axis(table_NM, order_NK, 1))
    return distance_BN3, idx_BN3


def brute_group(features_BCN, idx_BMK):
    shape = (features_BCN.shape[0], features_BCN.shape[1], *idx_BMK.shape[1:])
    grouped = [features_CN[:, idx_MK] for features_CN, idx_MK in zip(features_BCN, idx_BMK, strict=True)]
    return np.stack(grouped) if grouped else np.zeros(shape, features_BCN.dtype)


def brute_interpolate(features_BCM, idx_BN3, weight_BN3):
    weighted_BCN3 = brute_group(features_BCM, idx_BN3) * weight_BN3[:, None]
    return (weighted_BCN3[..., 0] + weighted_BCN3[..., 1]) + weighted_BCN3[..., 2]


def brute_fused(radius, num_samples, points_BN3, centers_BM3, features_BNF):
    idx_BMK = brute_ball(radius, num_samples, points_BN3, centers_BM3)
    grouped_BXMK = brute_group(np.concatenate([points_BN3, features_BNF], -1).transpose(0, 2, 1), idx_BMK)
    grouped_BMKX = np.ascontiguousarray(grouped_BXMK.transpose(0, 2, 3, 1))
    grouped_BMKX[..., :3] = (grouped_BMKX[..., :3] - centers_BM3[:, :, None]) / np.float32(radius)
    return grouped_BMKX, idx_BMK


def same(found, wanted):
    """Equal values, shapes and types."""
    assert found.cpu().numpy().dtype == wanted.dtype
    np.testing.assert_array_equal(found.cpu().numpy(), wanted)


def close(found, wanted, rtol, atol=0.0):
    torch.testing.assert_close(found.cpu(), torch.from_numpy(wanted), rtol=rtol, atol=atol)


def tensors(backend, *arrays):
    return [torch.from_numpy(array).to(backend.device) for array in arrays]


@examples
@given(seed=seeds, kind=kinds, num_scenes=scenes, num_points=sizes, num_samples=st.integers(0, 220))
def test_furthest_points(backend, seed, kind, num_scenes, num_points, num_samples):
    points_BN3 = make_cloud(kind, np.random.default_rng(seed), num_scenes, num_points)
    (points,) = tensors(backend, points_BN3)
    same(pointnet2.furthest_point_sample(points, num_samples), brute_furthest(points_BN3, num_samples))


@pytest.mark.parametrize("num_points", [1023, 1024, 1025, 2047, 4097, 10007])
@pytest.mark.parametrize("kind", CLOUDS)
def test_furthest_points_of_larger_clouds(backend, kind, num_points):
    points_BN3 = make_cloud(kind, np.random.default_rng(num_points), 2, num_points)
    (points,) = tensors(backend, points_BN3)
    same(pointnet2.furthest_point_sample(points, 150), brute_furthest(points_BN3, 150))


def test_furthest_points_of_every_point_are_a_permutation(backend):
    points_BN3 = make_cloud("uniform", np.random.default_rng(0), 2, 1500)
    (points,) = tensors(backend, points_BN3)
    idx_BM = pointnet2.furthest_point_sample(points, 1500)
    same(idx_BM.sort(1).values, np.tile(np.arange(1500, dtype=np.int32), (2, 1)))
    same(idx_BM, brute_furthest(points_BN3, 1500))


@examples
@given(
    seed=seeds,
    kind=kinds,
    num_scenes=scenes,
    num_points=sizes,
    num_centers=counts,
    num_samples=st.integers(1, 70),
    radius=st.sampled_from(RADII),
)
def test_balls(backend, seed, kind, num_scenes, num_points, num_centers, num_samples, radius):
    rng = np.random.default_rng(seed)
    points_BN3 = make_cloud(kind, rng, num_scenes, num_points)
    centers_BM3 = make_centers(rng, points_BN3, num_centers)
    found = pointnet2.ball_query(radius, num_samples, *tensors(backend, points_BN3, centers_BM3))
    same(found, brute_ball(radius, num_samples, points_BN3, centers_BM3))


def test_balls_end_before_the_square_of_the_radius_in_float32(backend):
    """Points a few units of the last place off the radius: neither float64 nor `<=` decides the same."""
    rng = np.random.default_rng(0)
    steps = np.arange(-3, 4, dtype=np.int32)
    for radius in (0.1, 0.2, 0.4, 1.0, *rng.uniform(0.01, 3, 60)):
        along_N = (np.float32(radius).view(np.int32) + steps).view(np.float32)
        points_BN3 = np.zeros((1, len(steps), 3), np.float32)
        points_BN3[0, :, int(radius * 100) % 3] = along_N
        centers_BM3 = np.zeros((1, 1, 3), np.float32)
        found = pointnet2.ball_query(float(radius), 7, *tensors(backend, points_BN3, centers_BM3))
        same(found, brute_ball(radius, 7, points_BN3, centers_BM3))


@examples
@given(seed=seeds, kind=kinds, num_scenes=scenes, num_points=sizes, num_queries=counts)
def test_nearest_three(backend, seed, kind, num_scenes, num_points, num_queries):
    rng = np.random.default_rng(seed)
    points_BM3 = make_cloud(kind, rng, num_scenes, num_points)
    query_BN3 = make_centers(rng, points_BM3, num_queries)
    distance_BN3, idx_BN3 = brute_nearest(query_BN3, points_BM3)
    found_distance_BN3, found_idx_BN3 = pointnet2.three_nn(*tensors(backend, query_BN3, points_BM3))
    same(found_idx_BN3, idx_BN3)
    close(found_distance_BN3, distance_BN3, rtol=3e-7)


@pytest.mark.parametrize("num_points", [1025, 4097, 10007])
@pytest.mark.parametrize("kind", CLOUDS)
def test_neighbourhoods_in_larger_clouds(backend, kind, num_points):
    rng = np.random.default_rng(num_points)
    points_BN3 = make_cloud(kind, rng, 2, num_points)
    centers_BM3 = make_centers(rng, points_BN3, 65)
    points, centers = tensors(backend, points_BN3, centers_BM3)
    for radius, num_samples in ((0.2, 64), (1.0, 7), (3.0, 33)):
        found_BMS = pointnet2.ball_query(radius, num_samples, points, centers)
        same(found_BMS, brute_ball(radius, num_samples, points_BN3, centers_BM3))
    for query, known in (
        ((centers, centers_BM3), (points, points_BN3)),
        ((points, points_BN3), (centers, centers_BM3)),
    ):
        distance_BN3, idx_BN3 = pointnet2.three_nn(query[0], known[0])
        wanted_BN3, wanted_idx_BN3 = brute_nearest(query[1], known[1])
        same(idx_BN3, wanted_idx_BN3)
        close(distance_BN3, wanted_BN3, rtol=3e-7)


@examples
@given(
    seed=seeds,
    num_scenes=scenes,
    num_points=sizes,
    channels=st.integers(0, 20),
    positions=counts,
    samples=st.integers(1, 9),
    dtype=st.sampled_from(
        ["float32", "float16", "float64", "complex64", "complex128", "int64", "int32", "int16", "uint8", "bool"]
    ),
    wide_idx=st.booleans(),
)
def test_gathers(backend, seed, num_scenes, num_points, channels, positions, samples, dtype, wide_idx):
    rng = np.random.default_rng(seed)
    features_BCN = (rng.random((num_scenes, channels, num_points)) * 3).astype(dtype)
    idx_BMK = rng.integers(0, num_points, (num_scenes, positions, samples), np.int64 if wide_idx else np.int32)
    features, idx = tensors(backend, features_BCN, idx_BMK)
    grouped_BCMK = brute_group(features_BCN, idx_BMK)
    same(pointnet2.group_points(features, idx), grouped_BCMK)
    same(pointnet2.group_points(unaligned(features), idx), grouped_BCMK)
    same(pointnet2.gather_points(features, idx[..., 0]), grouped_BCMK[..., 0])


@examples
@given(
    seed=seeds,
    num_scenes=scenes,
    num_points=sizes,
    channels=st.integers(0, 20),
    positions=counts,
    dtype=st.sampled_from(DTYPES),
    wide_idx=st.booleans(),
)
def test_interpolation(backend, seed, num_scenes, num_points, channels, positions, dtype, wide_idx):
    rng = np.random.default_rng(seed)
    features_BCM = torch.from_numpy(rng.normal(size=(num_scenes, channels, num_points))).to(dtype)
    idx_BN3 = rng.integers(0, num_points, (num_scenes, positions, 3), np.int64 if wide_idx else np.int32)
    weight_BN3 = rng.random(idx_BN3.shape, np.float32)
    idx, weight = tensors(backend, idx_BN3, weight_BN3)
    wanted_BCN = brute_interpolate(features_BCM.float().numpy(), idx_BN3, weight_BN3)
    features = features_BCM.to(backend.device)
    rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    for given_features, given_weight in ((features, weight), (unaligned(features), unaligned(weight))):
        found_BCN = pointnet2.three_interpolate(given_features, idx, given_weight)
        assert found_BCN.dtype == dtype
        close(found_BCN.float(), wanted_BCN, rtol=rounding, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_numbers_keep_their_value(backend, dtype):
    """All 65,536 of them, subnormal, infinite and no numbers too, through a sum with two zeros."""
    features_BCM = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)[None, None]
    features_BCM = torch.cat([features_BCM, features_BCM.new_zeros(1, 1, 1)], -1).to(backend.device)
    idx_BN3 = torch.full((1, 2**16, 3), 2**16, dtype=torch.int32, device=backend.device)
    idx_BN3[0, :, 0] = torch.arange(2**16)
    weight_BN3 = torch.ones(1, 2**16, 3, device=backend.device)
    found_BCN = pointnet2.three_interpolate(features_BCM, idx_BN3, weight_BN3)
    torch.testing.assert_close(found_BCN, features_BCM[..., :-1], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_results_are_rounded_to_the_nearest_even_half_precision_number(backend, dtype):
    """Random float32 bit patterns, exact halves between two results, and both ends of the range."""
    bits = np.random.default_rng(0).integers(-(2**31), 2**31, 1 << 16).astype(np.int32)
    small = np.random.default_rng(1).normal(size=1 << 15).astype(np.float32) * np.float32(2.0) ** np.arange(
        -8, 8
    ).repeat(2048)
    halfway = (np.arange(1 << 16, dtype=np.int64) * 0x1000 + 0x37800000).astype(np.int32)
    values_N = torch.from_numpy(
        np.concatenate([bits.view(np.float32), small.astype(np.float32), halfway.view(np.float32)])
    )
    weight_BN3 = torch.stack([values_N, torch.zeros_like(values_N), torch.zeros_like(values_N)], -1)[None]
    features_BCM = torch.ones(1, 1, 1, dtype=dtype, device=backend.device)
    idx_BN3 = torch.zeros(weight_BN3.shape, dtype=torch.int32, device=backend.device)
    found_N = pointnet2.three_interpolate(features_BCM, idx_BN3, weight_BN3.to(backend.device))[0, 0].cpu()
    torch.testing.assert_close(found_N, values_N.to(dtype), rtol=0, atol=0, equal_nan=True)


@examples
@given(
    seed=seeds,
    kind=kinds,
    num_scenes=scenes,
    num_points=sizes,
    num_centers=counts,
    num_samples=st.integers(1, 40),
    channels=st.one_of(st.none(), st.integers(0, 9)),
    radius=st.sampled_from(RADII),
    dtype=st.sampled_from(DTYPES),
)
def test_fused_set_abstraction(
    backend, seed, kind, num_scenes, num_points, num_centers, num_samples, channels, radius, dtype
):
    rng = np.random.default_rng(seed)
    points_BN3 = make_cloud(kind, rng, num_scenes, num_points)
    centers_BM3 = make_centers(rng, points_BN3, num_centers)
    features_BNF = torch.from_numpy(rng.normal(size=(num_scenes, num_points, channels or 0))).to(dtype)
    wanted_BMKX, idx_BMK = brute_fused(radius, num_samples, points_BN3, centers_BM3, features_BNF.float().numpy())
    points, centers = tensors(backend, points_BN3, centers_BM3)
    features = None if channels is None else features_BNF.to(backend.device)
    found_BMKX, found_idx_BMK = pointnet2.query_and_group(radius, num_samples, points, centers, features)
    same(found_idx_BMK, idx_BMK)
    assert found_BMKX.dtype == (torch.float32 if features is None else dtype)
    same(found_BMKX[..., 3:].float(), wanted_BMKX[..., 3:])
    finite = torch.from_numpy(np.abs(wanted_BMKX) <= torch.finfo(found_BMKX.dtype).max / 2)  # float16 ends at 65,504
    close(
        torch.where(finite, found_BMKX.cpu().float(), 0.0),
        np.where(finite.numpy(), wanted_BMKX, np.float32(0)),
        rtol=1e-6 + torch.finfo(found_BMKX.dtype).eps / 2,
        atol=1e-7,
    )


@pytest.mark.parametrize("kind", ["uniform", "grid", "duplicates", "far"])
def test_strides_change_nothing(backend, kind):
    rng = np.random.default_rng(5)
    points_BN3 = make_cloud(kind, rng, 2, 150)
    centers_BM3 = make_centers(rng, points_BN3, 30)
    features_BNF = rng.normal(size=(2, 150, 5)).astype(np.float32)
    plain = tensors(backend, points_BN3, centers_BM3, features_BNF)
    strided = [part.transpose(1, 2).contiguous().transpose(1, 2) for part in plain]
    sliced = [torch.stack([part, part + 1], -1)[..., 0] for part in plain]
    (points, centers, features), features_BFN = plain, plain[2].transpose(1, 2)
    distance_BN3, idx_BN3 = pointnet2.three_nn(centers, points)
    wanted = [
        pointnet2.furthest_point_sample(points, 40),
        *pointnet2.query_and_group(0.5, 8, points, centers, features),
        distance_BN3,
        idx_BN3,
        pointnet2.group_points(features_BFN.contiguous(), idx_BN3),
        pointnet2.three_interpolate(features_BFN.contiguous(), idx_BN3, distance_BN3),
    ]
    wide_BN3 = torch.stack([idx_BN3.long(), idx_BN3.long()], -1)[..., 1]
    for points, centers, features in (strided, sliced):
        assert not points.is_contiguous() and not features.is_contiguous()
        features_BFN = features.transpose(1, 2)
        found = [
            pointnet2.furthest_point_sample(points, 40),
            *pointnet2.query_and_group(0.5, 8, points, centers, features),
            *pointnet2.three_nn(centers, points),
            pointnet2.group_points(features_BFN, wide_BN3),
            pointnet2.three_interpolate(features_BFN, wide_BN3, distance_BN3.mT.contiguous().mT),
        ]
        for value, expected in zip(found, wanted, strict=True):
            assert torch.equal(value, expected)


def test_expanded_scenes_equal_copies(backend):
    (points,) = tensors(backend, make_cloud("uniform", np.random.default_rng(0), 1, 99))
    expanded = points.expand(3, 99, 3)
    copied = expanded.contiguous()
    assert torch.equal(pointnet2.furthest_point_sample(expanded, 20), pointnet2.furthest_point_sample(copied, 20))
    assert torch.equal(pointnet2.ball_query(0.5, 5, expanded, expanded), pointnet2.ball_query(0.5, 5, copied, copied))
    for found, wanted in zip(pointnet2.three_nn(expanded, expanded), pointnet2.three_nn(copied, copied), strict=True):
        assert torch.equal(found, wanted)


def test_exercise_of_the_kernels(backend, capsys, monkeypatch):
    if backend.name == "torch":
        pytest.skip("plain torch is what the kernels are compared with")
    arguments = ["--device", backend.name, "--quick"]
    assert exercise_kernels.main(arguments) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert last == "all cases are right" and lines and all(line.startswith("ok ") for line in lines)
    monkeypatch.setattr(exercise_kernels, "plain", lambda function, *_: torch.zeros(1))
    monkeypatch.setattr(exercise_kernels, "check_nearest", lambda *_: "")
    monkeypatch.setattr(exercise_kernels.Cases, "sums", lambda *_: iter(()))
    monkeypatch.setattr(exercise_kernels.Cases, "bare_offsets", lambda *_: iter(()))
    assert exercise_kernels.main(arguments) == 1
    assert "WRONG group_points" in capsys.readouterr().out
