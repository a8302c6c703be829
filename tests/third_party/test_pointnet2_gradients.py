"""Gradients of the point operations: numeric in float64, sums written out in float64, half precision, threads.

Shapes: B scenes, N points, M centres, K neighbours, C or F channels, X = 3 + F.
"""

import numpy as np
import pytest
import torch

from threedr1.third_party import pointnet2
from threedr1.third_party.pointnet2 import reference

from .exercise_kernels import (
    FLOATS,
    check_fused,
    check_group,
    check_interpolate,
    make_centers,
    make_cloud,
    unaligned,
)

RADIUS = 0.5


@pytest.fixture
def problem(backend):
    """Random inputs of every differentiable operation, with repeated indices, on the backend's device."""
    generator = torch.Generator().manual_seed(0)

    def make(num_scenes=2, num_points=40, channels=5, num_centers=13, dtype=torch.float32):
        inputs = {
            "features_BCN": torch.randn(num_scenes, channels, num_points, generator=generator).to(dtype),
            "features_BNF": torch.randn(num_scenes, num_points, channels, generator=generator).to(dtype),
            "weight_BN3": torch.rand(num_scenes, num_centers, 3, generator=generator),
            "idx_BMK": torch.randint(0, num_points // 3, (num_scenes, num_centers, 7), generator=generator),
            "points_BN3": torch.rand(num_scenes, num_points, 3, generator=generator),
            "centers_BM3": torch.rand(num_scenes, num_centers, 3, generator=generator),
        }
        inputs["idx_BMK"] = inputs["idx_BMK"].int()
        return {name: value.to(backend.device) for name, value in inputs.items()}

    return make


def gradients(function, *inputs, grad=None):
    """Gradients of some inputs under a fixed pattern of weights on the outputs."""
    leaves = [value.detach().requires_grad_() for value in inputs]
    out = function(*leaves)
    if grad is None:
        grad = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
    return torch.autograd.grad(out, leaves, grad.to(out))


def fused(points, centers, features=None):
    return pointnet2.query_and_group(RADIUS, 6, points, centers, features)[0]


def test_numeric_gradients_of_gathers_and_interpolation(monkeypatch):
    monkeypatch.setenv("THREEDR1_OPS", "torch")
    generator = torch.Generator().manual_seed(0)
    features_BCN = torch.rand(2, 3, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    weight_BN3 = torch.rand(2, 5, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    idx_BN3 = torch.randint(0, 4, (2, 5, 3), generator=generator, dtype=torch.int32)
    idx_BM = idx_BN3[..., 0].contiguous()

    def mix(features, weight):
        return pointnet2.three_interpolate(features, idx_BN3, weight)

    assert torch.autograd.gradcheck(lambda x: pointnet2.gather_points(x, idx_BM), features_BCN)
    assert torch.autograd.gradcheck(lambda x: pointnet2.group_points(x, idx_BN3), features_BCN)
    assert torch.autograd.gradgradcheck(lambda x: pointnet2.group_points(x, idx_BN3), features_BCN)
    assert torch.autograd.gradcheck(mix, (features_BCN, weight_BN3))
    assert torch.autograd.gradcheck(lambda x: mix(x, weight_BN3.detach()), features_BCN)
    assert torch.autograd.gradcheck(lambda x: mix(features_BCN.detach(), x), weight_BN3)


@pytest.mark.parametrize("channels", [None, 0, 4])
def test_numeric_gradients_of_grouped_offsets(monkeypatch, channels):
    """At the operator, which takes float64 points; the public function insists on float32 ones."""
    monkeypatch.setenv("THREEDR1_OPS", "torch")
    generator = torch.Generator().manual_seed(1)
    points_BN3 = torch.rand(2, 7, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    centers_BM3 = torch.rand(2, 4, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    idx_BMK = torch.randint(0, 4, (2, 4, 3), generator=generator, dtype=torch.int32)

    def group(points, centers, features=None):
        return torch.ops.threedr1.group_offsets(points, centers, features, idx_BMK, RADIUS)

    inputs = [points_BN3, centers_BM3]
    if channels is not None:
        inputs.append(torch.rand(2, 7, channels, generator=generator, dtype=torch.float64, requires_grad=True))
    assert torch.autograd.gradcheck(group, inputs)
    for kept, value in enumerate(inputs):

        def alone(x, kept=kept):
            others = [other.detach() for other in inputs]
            return group(*others[:kept], x, *others[kept + 1 :])

        if value.numel():
            assert torch.autograd.gradcheck(alone, value)


def test_numeric_gradients_of_fused_features(backend):
    """float64 features go to the reference, whichever backend is asked for."""
    generator = torch.Generator().manual_seed(2)
    points_BN3 = torch.rand(2, 9, 3, generator=generator).to(backend.device)
    features_BNF = torch.rand(2, 9, 4, generator=generator, dtype=torch.float64).to(backend.device).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: fused(points_BN3, points_BN3[:, :3], x), features_BNF)


def test_gradients_equal_those_of_plain_torch(problem, monkeypatch):
    inputs = problem(num_points=300, channels=17, num_centers=129)
    idx_BMK, idx_BN3 = inputs["idx_BMK"], inputs["idx_BMK"][..., :3].contiguous()

    def everything():
        features_BCN, weight_BN3 = inputs["features_BCN"], inputs["weight_BN3"]
        return (
            *gradients(lambda x: pointnet2.group_points(x, idx_BMK), features_BCN),
            *gradients(lambda x: pointnet2.gather_points(x, idx_BMK[..., 0]), features_BCN),
            *gradients(lambda x, w: pointnet2.three_interpolate(x, idx_BN3, w), features_BCN, weight_BN3),
            *gradients(fused, inputs["points_BN3"], inputs["centers_BM3"], inputs["features_BNF"]),
            *gradients(fused, inputs["points_BN3"], inputs["centers_BM3"]),
        )

    found = everything()
    monkeypatch.setenv("THREEDR1_OPS", "torch")
    for value, wanted in zip(found, everything(), strict=True):
        scale = float(wanted.abs().max())
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("channels", [1, 5, 16])
@pytest.mark.parametrize("aligned", [True, False])
def test_sums_equal_float64_sums(problem, dtype, channels, aligned):
    """Against sums written out in float64: every entry within its own rounding, so also in half precision."""
    inputs = problem(channels=channels, dtype=dtype)
    place = (lambda values: values) if aligned else unaligned
    idx_BMK, weight_BN3 = inputs["idx_BMK"], inputs["weight_BN3"]
    assert not check_group(place(inputs["features_BCN"]), idx_BMK)
    assert not check_group(place(inputs["features_BCN"]), torch.zeros_like(idx_BMK))
    idx_BN3 = idx_BMK[..., :3].contiguous()
    assert not check_interpolate(place(inputs["features_BCN"]), idx_BN3, place(weight_BN3))
    points_BN3, centers_BM3 = place(inputs["points_BN3"]), place(inputs["centers_BM3"])
    assert not check_fused(RADIUS, 6, points_BN3, centers_BM3, place(inputs["features_BNF"]))
    assert not check_fused(RADIUS, 6, points_BN3, centers_BM3, None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_sums_in_float32(backend, dtype):
    """4,096 equal gradients add up, where sums in half precision would stop at 256 or 2,048 and a bit."""
    features_BCN = torch.ones(1, 1, 3, dtype=dtype, device=backend.device, requires_grad=True)
    idx_BM = torch.full((1, 4096), 1, dtype=torch.int32, device=backend.device)
    pointnet2.gather_points(features_BCN, idx_BM).sum(dtype=torch.float32).backward()
    assert features_BCN.grad is not None
    assert features_BCN.grad.dtype == dtype and features_BCN.grad.tolist() == [[[0, 4096, 0]]]
    features_BCM = torch.tensor([[[1024.0, -1024.0, 1.0]]], dtype=dtype, device=backend.device)
    idx_BN3 = torch.tensor([[[0, 2, 1]]], dtype=torch.int32, device=backend.device)
    weight_BN3 = torch.tensor([[[1.0, 2**-10, 1.0]]], device=backend.device)
    assert pointnet2.three_interpolate(features_BCM, idx_BN3, weight_BN3).item() == 2**-10


def test_each_input_may_need_a_gradient_alone(problem):
    inputs = problem()
    idx_BN3 = inputs["idx_BMK"][..., :3].contiguous()

    def mix(features, weight):
        return pointnet2.three_interpolate(features, idx_BN3, weight)

    for function, names in (
        (mix, ("features_BCN", "weight_BN3")),
        (fused, ("points_BN3", "centers_BM3", "features_BNF")),
    ):
        values = [inputs[name] for name in names]
        together = gradients(function, *values)
        for kept in range(len(values)):

            def alone(x, function=function, values=values, kept=kept):
                return function(*values[:kept], x, *values[kept + 1 :])

            torch.testing.assert_close(gradients(alone, values[kept])[0], together[kept], rtol=1e-6, atol=1e-6)


def test_selections_carry_no_gradient(problem):
    inputs = problem()
    points_BN3, centers_BM3 = inputs["points_BN3"].requires_grad_(), inputs["centers_BM3"].requires_grad_()
    outputs = (
        pointnet2.furthest_point_sample(points_BN3, 5),
        pointnet2.ball_query(RADIUS, 4, points_BN3, centers_BM3),
        *pointnet2.three_nn(points_BN3, centers_BM3),
        pointnet2.query_and_group(RADIUS, 4, points_BN3, centers_BM3)[1],
    )
    assert not any(output.requires_grad for output in outputs)


def test_strided_inputs_and_gradients(problem):
    """Transposed inputs, and the gradient of a sum, which is one number expanded."""
    inputs = problem()
    idx_BMK, weight_BN3 = inputs["idx_BMK"], inputs["weight_BN3"]
    strided_BMK = torch.stack([idx_BMK, idx_BMK], -1)[..., 0]
    features_BCN = inputs["features_BNF"].transpose(1, 2)
    plain_BCN = features_BCN.contiguous()
    idx_BN3 = idx_BMK[..., :3]
    one = torch.ones((), device=idx_BMK.device)

    def summed(function):
        return lambda *values: function(*values).permute(2, 0, *range(3, function(*values).ndim), 1).sum()

    pairs = (
        (lambda x: pointnet2.group_points(x, strided_BMK), lambda x: pointnet2.group_points(x, idx_BMK)),
        (
            lambda x: pointnet2.three_interpolate(x, idx_BN3, weight_BN3.mT.contiguous().mT),
            lambda x: pointnet2.three_interpolate(x, idx_BN3.contiguous(), weight_BN3),
        ),
    )
    for strided, plain in pairs:
        (found,) = gradients(summed(strided), features_BCN, grad=one)
        (wanted,) = gradients(plain, plain_BCN, grad=torch.ones_like(plain(plain_BCN)))
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    points_BN3, centers_BM3, features_BNF = (inputs[name] for name in ("points_BN3", "centers_BM3", "features_BNF"))
    strides = [part.mT.contiguous().mT for part in (points_BN3, centers_BM3, features_BNF)]
    found = gradients(summed(fused), *strides, grad=one)
    wanted = gradients(fused, points_BN3, centers_BM3, features_BNF, grad=torch.ones(2, 13, 6, 8))
    for value, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=2e-6)


def test_empty_outputs_give_zero_gradients(backend):
    features_BCN = torch.ones(2, 3, 9, device=backend.device)
    nothing_BMK = torch.zeros(2, 0, 4, dtype=torch.int32, device=backend.device)
    assert not gradients(lambda x: pointnet2.group_points(x, nothing_BMK), features_BCN)[0].any()
    weight_BN3 = torch.zeros(2, 0, 3, device=backend.device)
    found = gradients(lambda x, w: pointnet2.three_interpolate(x, nothing_BMK[..., :3], w), features_BCN, weight_BN3)
    assert not found[0].any() and found[1].shape == (2, 0, 3)
    points_BN3, features_BNF = features_BCN.transpose(1, 2).contiguous(), torch.ones(2, 9, 2, device=backend.device)
    for part in gradients(fused, points_BN3, points_BN3[:, :0], features_BNF):
        assert not part.any()


def test_number_of_threads_changes_nothing(backend):
    """Bit for bit, indices and sums: results do not depend on how the work was cut."""
    if backend.device.type != "cpu":
        pytest.skip("threads of the CPU")
    rng = np.random.default_rng(3)
    points_BN3 = make_cloud("clustered", rng, 3, 2500)
    points, centers = torch.from_numpy(points_BN3), torch.from_numpy(make_centers(rng, points_BN3, 400))
    features_BNF = torch.from_numpy(rng.normal(size=(3, 2500, 12)).astype(np.float32))

    def everything():
        distance_BN3, idx_BN3 = pointnet2.three_nn(points, centers)
        features_BCM = features_BNF[:, :400].mT.contiguous()
        idx_BMK = pointnet2.ball_query(0.1, 16, points, centers)
        return (
            pointnet2.furthest_point_sample(points, 300),
            distance_BN3,
            idx_BN3,
            idx_BMK,
            pointnet2.three_interpolate(features_BCM, idx_BN3, distance_BN3),
            *gradients(lambda x, w: pointnet2.three_interpolate(x, idx_BN3, w), features_BCM, distance_BN3),
            *gradients(lambda x: pointnet2.group_points(x, idx_BMK), features_BNF.mT.contiguous()),
            fused(points, centers, features_BNF),
            *gradients(fused, points, centers, features_BNF),
        )

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = everything()
        torch.set_num_threads(4)
        together = everything()
    finally:
        torch.set_num_threads(before)
    for one, four in zip(alone, together, strict=True):
        assert torch.equal(one, four)


def test_reference_backward_is_what_autograd_finds():
    """The written-out gradients of the reference against autograd through its forward, in float64."""
    generator = torch.Generator().manual_seed(4)
    features_BCN = torch.rand(2, 3, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    weight_BN3 = torch.rand(2, 6, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    points_BN3 = torch.rand(2, 8, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    centers_BM3 = torch.rand(2, 6, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    idx_BN3 = torch.randint(0, 8, (2, 6, 3), generator=generator, dtype=torch.int32)
    mixed_BCN = reference.three_interpolate(features_BCN, idx_BN3, weight_BN3)
    grad_BCN = torch.rand(mixed_BCN.shape, generator=generator, dtype=torch.float64)
    wanted = torch.autograd.grad(mixed_BCN, (features_BCN, weight_BN3), grad_BCN)
    found = reference.three_interpolate_backward(grad_BCN, features_BCN, idx_BN3, weight_BN3, True, True)
    torch.testing.assert_close(found, wanted)
    features_BNF = features_BCN.mT.contiguous()
    grouped_BMKX = reference.group_offsets(points_BN3, centers_BM3, features_BNF, idx_BN3, RADIUS)
    grad_BMKX = torch.rand(grouped_BMKX.shape, generator=generator, dtype=torch.float64)
    wanted = torch.autograd.grad(grouped_BMKX, (points_BN3, centers_BM3, features_BNF), grad_BMKX)
    found = reference.group_offsets_backward(grad_BMKX, idx_BN3, 8, RADIUS, (True, True, True))
    torch.testing.assert_close(found, wanted)
