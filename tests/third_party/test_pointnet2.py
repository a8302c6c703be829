"""The point operations against the published oracle, against brute force, and on degenerate input."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from threedr1.third_party import pointnet2
from threedr1.third_party.pointnet2 import reference


@pytest.fixture(scope="module")
def oracle(parity_data):
    with np.load(parity_data / "pointnet2_ops.npz") as archive:
        return {name: archive[name] for name in archive.files}


@pytest.fixture(params=["cloud0_", "cloud1_"])
def cloud(request, oracle):
    names = [name for name in oracle if name.startswith(request.param)]
    return {name.removeprefix(request.param): torch.from_numpy(oracle[name])[None] for name in names}


def test_furthest_points_match_the_oracle(cloud):
    idx_BM = pointnet2.furthest_point_sample(cloud["xyz"], 1024)
    assert idx_BM.dtype == torch.int32
    assert torch.equal(idx_BM, cloud["fps_plain"])


@pytest.mark.parametrize("slab", [1 << 12, 1 << 20])
def test_ball_query_matches_the_oracle_for_any_slab(cloud, monkeypatch, slab):
    monkeypatch.setattr(reference, "_SLAB", slab)
    centers_BM3 = cloud["ball_new_xyz"]
    idx_BMS = pointnet2.ball_query(0.2, 32, cloud["xyz"], centers_BM3)
    assert idx_BMS.dtype == torch.int32
    assert torch.equal(idx_BMS, cloud["ball_idx"].int())
    assert (cloud["ball_count"] == 0).any(), "the oracle covers centres without a hit"
    wide_BMS = pointnet2.ball_query(0.4, 16, cloud["xyz"], centers_BM3[:, :160].contiguous())
    assert torch.equal(wide_BMS, cloud["ball2_idx"].int())


def test_three_nn_and_interpolation_match_the_oracle(cloud):
    known_BM = cloud["fps_skip_origin"][:, :512]
    known_B3M = pointnet2.gather_points(cloud["xyz"].transpose(1, 2).contiguous(), known_BM)
    distance_BN3, idx_BN3 = pointnet2.three_nn(cloud["xyz"], known_B3M.transpose(1, 2).contiguous())
    assert torch.equal(idx_BN3, cloud["three_nn_idx"].int())
    torch.testing.assert_close(distance_BN3, cloud["three_nn_dist"], rtol=3e-7, atol=0)  # the last bit of sqrt
    weight_BN3 = 1 / (distance_BN3 + 1e-8)
    weight_BN3 = weight_BN3 / weight_BN3.sum(-1, keepdim=True)
    torch.testing.assert_close(weight_BN3, cloud["three_weights"], rtol=0, atol=2e-7)
    features_BCM = pointnet2.gather_points(cloud["features"], known_BM)
    assert torch.equal(features_BCM, cloud["gather"])
    mixed_BCN = pointnet2.three_interpolate(features_BCM, idx_BN3, weight_BN3)
    torch.testing.assert_close(mixed_BCN, cloud["three_interpolate"], rtol=0, atol=1e-6)


def test_grouping_matches_the_oracle(cloud):
    grouped_BCMK = pointnet2.group_points(cloud["features"][:, :2].contiguous(), cloud["ball_idx"].int())
    assert torch.equal(grouped_BCMK, cloud["group"])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), num_points=st.integers(1, 60), num_samples=st.integers(1, 80))
def test_furthest_points_match_a_scalar_walk(seed, num_points, num_samples):
    rng = np.random.default_rng(seed)
    points_BN3 = rng.integers(-2, 3, (2, num_points, 3)).astype(np.float32)  # a coarse grid: many exact ties
    idx_BM = pointnet2.furthest_point_sample(torch.from_numpy(points_BN3), num_samples).numpy()
    for points_N3, idx_M in zip(points_BN3, idx_BM, strict=True):
        nearest_N = np.full(num_points, np.inf)
        last = 0
        for chosen in idx_M:
            assert chosen == last
            nearest_N = np.minimum(nearest_N, ((points_N3 - points_N3[last]) ** 2).sum(-1))
            last = int(nearest_N.argmax())


def test_batched_scenes_equal_single_ones():
    generator = torch.Generator().manual_seed(0)
    points_BN3 = torch.rand(3, 200, 3, generator=generator)
    centers_BM3 = torch.rand(3, 17, 3, generator=generator)
    together = (
        pointnet2.furthest_point_sample(points_BN3, 20),
        pointnet2.ball_query(0.3, 8, points_BN3, centers_BM3),
        *pointnet2.three_nn(points_BN3, centers_BM3),
    )
    for scene in range(3):
        part = slice(scene, scene + 1)
        alone = (
            pointnet2.furthest_point_sample(points_BN3[part], 20),
            pointnet2.ball_query(0.3, 8, points_BN3[part], centers_BM3[part]),
            *pointnet2.three_nn(points_BN3[part], centers_BM3[part]),
        )
        for whole, single in zip(together, alone, strict=True):
            assert torch.equal(whole[part], single)


def test_small_clouds_are_defined():
    points_BN3 = torch.tensor([[[0.0, 0, 0], [1.0, 0, 0]]])
    assert pointnet2.furthest_point_sample(points_BN3, 5).tolist() == [[0, 1, 0, 0, 0]]
    assert pointnet2.furthest_point_sample(points_BN3, 0).shape == (1, 0)
    distance_BN3, idx_BN3 = pointnet2.three_nn(torch.tensor([[[0.9, 0, 0]]]), points_BN3)
    assert idx_BN3.tolist() == [[[1, 0, 0]]]
    assert distance_BN3[0, 0, 2] == float("inf")
    assert (1 / (distance_BN3 + 1e-8))[0, 0, 2] == 0
    far_BM3 = torch.full((1, 2, 3), 50.0)
    assert pointnet2.ball_query(0.2, 3, points_BN3, far_BM3).tolist() == [[[0, 0, 0], [0, 0, 0]]]
    edge_BM3 = torch.tensor([[[0.0, 0, 0]]])
    assert pointnet2.ball_query(1.0, 2, points_BN3, edge_BM3).tolist() == [[[0, 0]]], "the radius itself is outside"


def test_gradients_of_gathers_and_interpolation():
    generator = torch.Generator().manual_seed(0)
    features_BCN = torch.rand(2, 3, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    weight_BN3 = torch.rand(2, 5, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    idx_BN3 = torch.randint(0, 7, (2, 5, 3), generator=generator, dtype=torch.int32)
    idx_BM = idx_BN3[..., 0].contiguous()
    assert torch.autograd.gradcheck(lambda x: pointnet2.gather_points(x, idx_BM), features_BCN)
    assert torch.autograd.gradcheck(lambda x: pointnet2.group_points(x, idx_BN3), features_BCN)
    assert torch.autograd.gradcheck(
        lambda x, weight: pointnet2.three_interpolate(x, idx_BN3, weight), (features_BCN, weight_BN3)
    )


def test_wrong_arguments_say_what_is_wrong():
    points_BN3 = torch.zeros(1, 4, 3)
    with pytest.raises(ValueError, match="float32"):
        pointnet2.furthest_point_sample(points_BN3.double(), 2)
    with pytest.raises(ValueError, match="empty"):
        pointnet2.furthest_point_sample(points_BN3[:, :0], 2)
    with pytest.raises(ValueError, match="empty"):
        pointnet2.three_nn(points_BN3, points_BN3[:, :0])
    with pytest.raises(ValueError, match=r"\[B, N, 3\]"):
        pointnet2.ball_query(0.2, 4, points_BN3[0], points_BN3)
    with pytest.raises(ValueError, match="positive radius"):
        pointnet2.ball_query(0.0, 4, points_BN3, points_BN3)
    with pytest.raises(ValueError, match="2 scenes"):
        pointnet2.ball_query(0.2, 4, points_BN3.expand(2, 4, 3), points_BN3)


def test_backend_is_forced_by_the_environment(monkeypatch):
    monkeypatch.setenv("THREEDR1_OPS", "torch")
    assert pointnet2.backend_name() == "torch"
    monkeypatch.setenv("THREEDR1_OPS", "quantum")
    with pytest.raises(ValueError, match="quantum.*torch"):
        pointnet2.furthest_point_sample(torch.zeros(1, 4, 3), 2)
