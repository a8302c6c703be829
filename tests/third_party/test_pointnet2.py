"""The point operations against the published oracle, on degenerate input, and the choice of a backend."""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from threedr1.third_party import pointnet2
from threedr1.third_party.pointnet2 import reference


@pytest.fixture(scope="module")
def oracle(parity_data):
    with np.load(parity_data / "pointnet2_ops.npz") as archive:
        return {name: archive[name] for name in archive.files}


@pytest.fixture(params=["cloud0_", "cloud1_"])
def cloud(request, oracle, backend):
    names = [name for name in oracle if name.startswith(request.param)]
    return {
        name.removeprefix(request.param): torch.from_numpy(oracle[name])[None].to(backend.device) for name in names
    }


def test_furthest_points_match_the_oracle(cloud):
    idx_BM = pointnet2.furthest_point_sample(cloud["xyz"], 1024)
    assert idx_BM.dtype == torch.int32
    assert torch.equal(idx_BM, cloud["fps_plain"])


def test_furthest_points_are_those_of_the_classic_kernel(cloud):
    """Coordinates, because that kernel resolves ties between duplicates by the layout of its threads."""
    if not torch.equal(cloud["fps_plain"], cloud["fps_skip_origin"]):
        pytest.skip("the classic kernel never takes points near the origin, which this cloud has")
    points_N3 = cloud["xyz"][0]
    idx_M = pointnet2.furthest_point_sample(cloud["xyz"], 1024)[0]
    assert torch.equal(points_N3[idx_M], points_N3[cloud["fps_skip_origin_512thread_ties"][0]])


def test_ball_query_matches_the_oracle(cloud):
    centers_BM3 = cloud["ball_new_xyz"]
    idx_BMS = pointnet2.ball_query(0.2, 32, cloud["xyz"], centers_BM3)
    assert idx_BMS.dtype == torch.int32
    assert torch.equal(idx_BMS, cloud["ball_idx"].int())
    assert (cloud["ball_count"] == 0).any(), "the oracle covers centres without a hit"
    wide_BMS = pointnet2.ball_query(0.4, 16, cloud["xyz"], centers_BM3[:, :160].contiguous())
    assert torch.equal(wide_BMS, cloud["ball2_idx"].int())


@pytest.mark.parametrize("slab", [1 << 12, 1 << 20])
def test_slabs_of_the_reference_change_nothing(oracle, monkeypatch, slab):
    monkeypatch.setenv("THREEDR1_OPS", "torch")
    monkeypatch.setattr(reference, "_SLAB", slab)
    points_BN3, centers_BM3 = (torch.from_numpy(oracle[f"cloud0_{name}"])[None] for name in ("xyz", "ball_new_xyz"))
    idx_BMS = pointnet2.ball_query(0.2, 32, points_BN3, centers_BM3)
    assert np.array_equal(idx_BMS[0].numpy(), oracle["cloud0_ball_idx"])
    known_BM3 = points_BN3[:, oracle["cloud0_fps_skip_origin"][:512].astype(np.int64)]
    assert np.array_equal(pointnet2.three_nn(points_BN3, known_BM3)[1][0].numpy(), oracle["cloud0_three_nn_idx"])


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


def test_fused_set_abstraction_matches_the_oracle(cloud):
    features_BNF = cloud["features"].transpose(1, 2)
    centers_BM3 = cloud["ball_new_xyz"]
    grouped_BMKX, idx_BMK = pointnet2.query_and_group(0.2, 32, cloud["xyz"], centers_BM3, features_BNF)
    assert torch.equal(idx_BMK, cloud["ball_idx"].int())
    assert torch.equal(grouped_BMKX[..., 3:5], cloud["group"].permute(0, 2, 3, 1))
    points_BMK3 = cloud["xyz"][0][cloud["ball_idx"][0].long()][None]
    offset_BMK3 = (points_BMK3.double() - centers_BM3.double()[:, :, None]) / 0.2
    torch.testing.assert_close(grouped_BMKX[..., :3].double(), offset_BMK3, rtol=1e-6, atol=2e-6)


def test_batched_scenes_equal_single_ones(backend):
    generator = torch.Generator().manual_seed(0)
    points_BN3 = torch.rand(3, 200, 3, generator=generator).to(backend.device)
    centers_BM3 = torch.rand(3, 17, 3, generator=generator).to(backend.device)
    features_BNF = torch.rand(3, 200, 5, generator=generator).to(backend.device)

    def everything(part: slice) -> tuple[torch.Tensor, ...]:
        points, centers, features = points_BN3[part], centers_BM3[part], features_BNF[part]
        distance_BN3, idx_BN3 = pointnet2.three_nn(points, centers)
        features_BFM = features.transpose(1, 2)[..., :17]
        return (
            pointnet2.furthest_point_sample(points, 20),
            pointnet2.ball_query(0.3, 8, points, centers),
            distance_BN3,
            idx_BN3,
            pointnet2.three_interpolate(features_BFM, idx_BN3, distance_BN3),
            pointnet2.group_points(features_BFM, idx_BN3),
            *pointnet2.query_and_group(0.3, 8, points, centers, features),
        )

    together = everything(slice(None))
    for scene in range(3):
        for whole, single in zip(together, everything(slice(scene, scene + 1)), strict=True):
            assert torch.equal(whole[scene : scene + 1], single)


def test_calls_from_several_threads_do_not_meet(backend):
    generator = torch.Generator().manual_seed(0)
    clouds = [torch.rand(1, 400, 3, generator=generator).to(backend.device) for _ in range(8)]

    def work(points_BN3: torch.Tensor) -> list[torch.Tensor]:
        idx_BM = pointnet2.furthest_point_sample(points_BN3, 50)
        centers_BM3 = pointnet2.gather_points(points_BN3.mT, idx_BM).mT
        grouped_BMKX, ball_BMS = pointnet2.query_and_group(0.2, 8, points_BN3, centers_BM3)
        return [idx_BM, grouped_BMKX, ball_BMS, *pointnet2.three_nn(points_BN3, centers_BM3)]

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(work, clouds))
    for points_BN3, found in zip(clouds, together, strict=True):
        for value, wanted in zip(found, work(points_BN3), strict=True):
            assert torch.equal(value, wanted)


def test_small_clouds_are_defined(backend):
    points_BN3 = torch.tensor([[[0.0, 0, 0], [1.0, 0, 0]]], device=backend.device)
    assert pointnet2.furthest_point_sample(points_BN3, 5).tolist() == [[0, 1, 0, 0, 0]]
    assert pointnet2.furthest_point_sample(points_BN3, 0).shape == (1, 0)
    query_BN3 = torch.tensor([[[0.9, 0, 0]]], device=backend.device)
    distance_BN3, idx_BN3 = pointnet2.three_nn(query_BN3, points_BN3)
    assert idx_BN3.tolist() == [[[1, 0, 0]]]
    assert distance_BN3[0, 0, 2] == float("inf")
    assert (1 / (distance_BN3 + 1e-8))[0, 0, 2] == 0
    far_BM3 = torch.full((1, 2, 3), 50.0, device=backend.device)
    assert pointnet2.ball_query(0.2, 3, points_BN3, far_BM3).tolist() == [[[0, 0, 0], [0, 0, 0]]]
    edge_BM3 = torch.zeros(1, 1, 3, device=backend.device)
    assert pointnet2.ball_query(1.0, 2, points_BN3, edge_BM3).tolist() == [[[0, 0]]], "the radius itself is outside"


def test_one_position_many_times(backend):
    points_BN3 = torch.full((2, 3000, 3), 0.1, device=backend.device)
    assert not pointnet2.furthest_point_sample(points_BN3, 9).any()
    first_S = torch.arange(7, dtype=torch.int32, device=backend.device)
    idx_BMS = pointnet2.ball_query(0.2, 7, points_BN3, points_BN3[:, :50])
    assert torch.equal(idx_BMS, first_S.expand(2, 50, 7))
    distance_BN3, idx_BN3 = pointnet2.three_nn(points_BN3[:, :50], points_BN3)
    assert torch.equal(idx_BN3, first_S[:3].expand(2, 50, 3))
    assert not distance_BN3.any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_coordinates_that_are_no_numbers_stay_in_range(backend, value):
    generator = torch.Generator().manual_seed(0)
    points_BN3 = torch.rand(2, 500, 3, generator=generator)
    points_BN3[0, ::7, 1] = value
    points_BN3[1] = value
    points_BN3 = points_BN3.to(backend.device)
    centers_BM3 = points_BN3[:, :40].contiguous()
    chosen_BM = pointnet2.furthest_point_sample(points_BN3, 60)
    ball_BMS = pointnet2.ball_query(0.3, 5, points_BN3, centers_BM3)
    near_BN3 = pointnet2.three_nn(centers_BM3, points_BN3)[1]
    for idx in (chosen_BM, ball_BMS, near_BN3):
        assert idx.min() >= 0 and idx.max() < 500


def test_backend_is_forced_by_the_environment(monkeypatch):
    points_BN3 = torch.zeros(1, 4, 3)
    for name in pointnet2.available_backends():
        monkeypatch.setenv("THREEDR1_OPS", name)
        assert pointnet2.backend_name("cuda" if name == "cuda" else "cpu") == name
    monkeypatch.setenv("THREEDR1_OPS", "quantum")
    with pytest.raises(ValueError, match="quantum.*torch"):
        pointnet2.furthest_point_sample(points_BN3, 2)
    with pytest.raises(ValueError, match="quantum.*torch"):
        pointnet2.backend_name()


def test_backend_is_chosen_by_the_device(monkeypatch):
    monkeypatch.delenv("THREEDR1_OPS", raising=False)
    names = pointnet2.available_backends()
    assert set(names) <= {"torch", "cpu", "cuda"} and "torch" in names
    assert pointnet2.backend_name() == pointnet2.backend_name("cpu") == ("cpu" if "cpu" in names else "torch")
    if "cuda" in names:
        assert pointnet2.backend_name("cuda") == pointnet2.backend_name(torch.device("cuda", 0)) == "cuda"


def test_cpu_backend_is_there(compiler):
    if os.environ.get("THREEDR1_JIT") == "0":
        pytest.skip("THREEDR1_JIT=0 forbids building it")
    assert "cpu" in pointnet2.available_backends(), f"{compiler} could build it"


@pytest.mark.gpu
def test_cuda_backend_is_there():
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    if shutil.which("nvcc") is None and shutil.which(f"{home}/bin/nvcc") is None:
        pytest.skip("no nvcc on this machine")
    assert "cuda" in pointnet2.available_backends()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_forced_backend_refuses_tensors_of_another_device(monkeypatch, name):
    if name not in pointnet2.available_backends():
        pytest.skip(f"this machine has no backend {name}")
    monkeypatch.setenv("THREEDR1_OPS", name)
    elsewhere = "cuda" if name == "cpu" else "cpu"
    with pytest.raises(ValueError, match=rf"THREEDR1_OPS={name}.*{elsewhere}"):
        pointnet2.furthest_point_sample(torch.zeros(1, 4, 3, device=elsewhere), 2)


@pytest.mark.gpu
def test_device_is_never_waited_for(monkeypatch):
    """What a training step needs: launches on the current stream, and no copy to the host."""
    if "cuda" not in pointnet2.available_backends():
        pytest.skip("this machine has no backend cuda")
    monkeypatch.setenv("THREEDR1_OPS", "cuda")
    points_BN3 = torch.rand(2, 3000, 3, device="cuda")
    features_BNF = torch.rand(2, 3000, 6, device="cuda", requires_grad=True)

    def step() -> tuple[torch.Tensor, ...]:
        idx_BM = pointnet2.furthest_point_sample(points_BN3, 64)
        centers_BM3 = pointnet2.gather_points(points_BN3.transpose(1, 2), idx_BM).transpose(1, 2)
        grouped_BMKX, _ = pointnet2.query_and_group(0.2, 16, points_BN3, centers_BM3, features_BNF)
        distance_BN3, near_BN3 = pointnet2.three_nn(points_BN3, centers_BM3)
        mixed_BCN = pointnet2.three_interpolate(grouped_BMKX.amax(2).transpose(1, 2), near_BN3, 1 / (1 + distance_BN3))
        return idx_BM, mixed_BCN, *torch.autograd.grad(mixed_BCN.sum(), features_BNF)

    expected = step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(torch.cuda.Stream()):
            found = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    for value, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-5)
