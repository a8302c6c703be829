"""The point operations as torch.library operators: schemas, tracing, and compiled graphs.

Shapes: B scenes, N points, M centres, K neighbours, C or F channels, P positions, X = 3 + F.
"""

import pytest
import torch

from threedr1.third_party import pointnet2

RADIUS = 0.4
DIFFERENTIABLE = ("group_points", "group_points_backward", "three_interpolate", "group_offsets")
DTYPES = (torch.float32, torch.bfloat16)


def sample_inputs(device, dtype):
    """Arguments of every operator, one tuple or more each; features of one type."""
    generator = torch.Generator().manual_seed(0)
    points, centers = (torch.rand(2, count, 3, generator=generator).to(device) for count in (19, 5))
    features_BCN = torch.randn(2, 4, 19, generator=generator).to(device, dtype)
    features_BNF = features_BCN.mT.contiguous()
    idx_BMK = torch.randint(0, 19, (2, 5, 3), generator=generator, dtype=torch.int32).to(device)
    idx_BP = idx_BMK.flatten(1)
    weight_BN3 = torch.rand(2, 5, 3, generator=generator).to(device)
    grad_BCP, grad_BCN, grad_BMKX = (
        features_BCN[..., :15],
        features_BCN[..., :5],
        torch.rand(2, 5, 3, 7).to(features_BCN),
    )
    return {
        "furthest_point_sample": [(points, 6), (points, 0)],
        "ball_query": [(points, centers, RADIUS, 3), (points, centers[:, :0], RADIUS, 3)],
        "three_nn": [(points, centers), (centers[:, :2], points)],
        "group_points": [(features_BCN, idx_BP), (features_BCN, idx_BP[:, ::2])],
        "group_points_backward": [(grad_BCP, idx_BP, 19)],
        "three_interpolate": [(features_BCN, idx_BMK, weight_BN3), (features_BNF.mT, idx_BMK, weight_BN3)],
        "three_interpolate_backward": [
            (grad_BCN, features_BCN, idx_BMK, weight_BN3),
            (grad_BCN, features_BCN, idx_BMK, weight_BN3, True, False),
            (grad_BCN, features_BCN, idx_BMK, weight_BN3, False, True),
        ],
        "group_offsets": [
            (points, centers, features_BNF, idx_BMK, RADIUS),
            (points, centers, None, idx_BMK, RADIUS),
        ],
        "group_offsets_backward": [
            (grad_BMKX, idx_BMK, 19, RADIUS),
            (grad_BMKX, idx_BMK, 19, RADIUS, False, True, False),
            (grad_BMKX[..., :3], idx_BMK, 19, RADIUS, True, False, False),
        ],
    }


def differentiable(arguments):
    """The same arguments, floating-point tensors requiring a gradient."""
    return tuple(
        value.detach().clone().requires_grad_()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for value in arguments
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", list(sample_inputs("cpu", torch.float32)))
def test_operators_keep_their_contract(backend, name, dtype):
    operator = getattr(torch.ops.threedr1, name).default
    for arguments in sample_inputs(backend.device, dtype)[name]:
        torch.library.opcheck(operator, arguments)
        if name in DIFFERENTIABLE:
            torch.library.opcheck(operator, differentiable(arguments))


@pytest.mark.parametrize("dtype", DTYPES)
def test_operators_have_no_say_over_their_inputs(backend, dtype):
    """Inputs stay as they were, and no output shares their memory."""
    for name, calls in sample_inputs(backend.device, dtype).items():
        for arguments in calls:
            before = [value.clone() for value in arguments if isinstance(value, torch.Tensor)]
            outputs = getattr(torch.ops.threedr1, name)(*arguments)
            inputs = [value for value in arguments if isinstance(value, torch.Tensor)]
            assert all(torch.equal(value, copy) for value, copy in zip(inputs, before, strict=True))
            taken = {value.untyped_storage().data_ptr() for value in inputs if value.numel()}
            for output in outputs if isinstance(outputs, tuple) else (outputs,):
                assert not output.numel() or output.untyped_storage().data_ptr() not in taken, name


def set_abstraction(points_BN3, features_BNF, num_centers=16, num_samples=8):
    idx_BM = pointnet2.furthest_point_sample(points_BN3, num_centers)
    centers_BM3 = pointnet2.gather_points(points_BN3.mT, idx_BM).mT
    grouped_BMKX, _ = pointnet2.query_and_group(RADIUS, num_samples, points_BN3, centers_BM3, features_BNF)
    return grouped_BMKX.amax(2)


def propagation(points_BN3, features_BNF):
    """Down to centres and back to all points: every operation once."""
    idx_BM = pointnet2.furthest_point_sample(points_BN3, 16)
    centers_BM3 = pointnet2.gather_points(points_BN3.mT, idx_BM).mT
    pooled_BMX = set_abstraction(points_BN3, features_BNF)
    distance_BN3, near_BN3 = pointnet2.three_nn(points_BN3, centers_BM3)
    weight_BN3 = 1 / (distance_BN3 + 1e-2)
    mixed_BXN = pointnet2.three_interpolate(pooled_BMX.mT, near_BN3, weight_BN3)
    grouped_BXMK = pointnet2.group_points(mixed_BXN, pointnet2.ball_query(RADIUS, 4, points_BN3, centers_BM3))
    return grouped_BXMK.sum(-1)


def with_gradients(function, points_BN3, features_BNF):
    points_BN3, features_BNF = points_BN3.clone().requires_grad_(), features_BNF.clone().requires_grad_()
    out = function(points_BN3, features_BNF)
    return out, *torch.autograd.grad(out.square().sum(), (points_BN3, features_BNF))


def cloud(device, num_points=100, dtype=torch.float32):
    generator = torch.Generator().manual_seed(num_points)
    points_BN3 = torch.rand(2, num_points, 3, generator=generator)
    features_BNF = torch.randn(2, num_points, 5, generator=generator)
    return points_BN3.to(device), features_BNF.to(device, dtype)


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("function", [set_abstraction, propagation])
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiled_graphs_are_whole_and_equal(backend, fresh_compiler, function, compiler):
    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    inputs = cloud(backend.device)
    for found, wanted in zip(with_gradients(compiled, *inputs), with_gradients(function, *inputs), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    half = cloud(backend.device, dtype=torch.bfloat16)
    assert torch.equal(torch.compile(set_abstraction, fullgraph=True, backend=compiler)(*half), set_abstraction(*half))


def test_one_compiled_graph_serves_any_number_of_points(backend, fresh_compiler):
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(set_abstraction, fullgraph=True, backend=count, dynamic=True)
    for num_points in (50, 100, 1200):
        inputs = cloud(backend.device, num_points)
        assert torch.equal(compiled(*inputs), set_abstraction(*inputs))
    assert len(graphs) == 1


@pytest.mark.slow
def test_inductor_compiles_the_operators(backend, fresh_compiler):
    compiled = torch.compile(propagation, fullgraph=True)
    inputs = cloud(backend.device)
    for found, wanted in zip(with_gradients(compiled, *inputs), with_gradients(propagation, *inputs), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_operators_are_traced_without_data(backend):
    """Fake tensors: shapes and types of the whole chain, and of its gradients, and nothing computed."""
    inputs = cloud(backend.device)
    real = with_gradients(propagation, *inputs)
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        fake = with_gradients(propagation, *(mode.from_tensor(value) for value in inputs))
    for shape, value in zip(fake, real, strict=True):
        assert (shape.shape, shape.dtype, shape.device) == (value.shape, value.dtype, value.device)


def test_forcing_a_backend_works_after_compilation(monkeypatch, fresh_compiler):
    """The choice is made at each call, so that a compiled graph follows the variable."""
    compiled = torch.compile(set_abstraction, fullgraph=True, backend="eager")
    inputs = cloud("cpu")
    wanted = compiled(*inputs)
    monkeypatch.setenv("THREEDR1_OPS", "torch")
    torch.testing.assert_close(compiled(*inputs), wanted)
    monkeypatch.setenv("THREEDR1_OPS", "quantum")
    with pytest.raises(ValueError, match="quantum"):
        compiled(*inputs)


def test_automatic_mixed_precision_keeps_coordinates(backend):
    """Under autocast points stay float32 and features keep the type they come in."""
    points_BN3, features_BNF = cloud(backend.device, dtype=torch.bfloat16)
    wanted = set_abstraction(points_BN3, features_BNF)
    with torch.autocast(backend.device.type, torch.bfloat16):
        found = set_abstraction(points_BN3, features_BNF)
    assert found.dtype == torch.bfloat16 and torch.equal(found, wanted)
