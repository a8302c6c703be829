"""Point Transformer V3: its parts against dense or naive computations, the whole against what it promises."""

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from threedr1.models.point_transformer import (
    DropPath,
    GridPooling,
    GridUnpooling,
    PatchAttention,
    PointTransformer,
    SubmanifoldConv3d,
    drop_path_rates,
    max_over_cells,
)
from threedr1.models.space_filling import ORDERS, curve_codes
from threedr1.models.voxels import BITS, Voxels, pack, unpack

TINY = {
    "grid_size": 0.2,
    "strides": (2, 2),
    "enc_depths": (1, 1, 1),
    "enc_channels": (8, 16, 16),
    "enc_heads": (2, 2, 2),
    "dec_depths": (1, 1),
    "dec_channels": (16, 16),
    "dec_heads": (2, 2),
    "patch_size": 16,
    "drop_path": 0.0,
    "stem_kernel": 3,
}


@pytest.fixture(autouse=True)
def one_thread():
    """Operations as small as these only wait for each other's threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny_transformer(**changes) -> PointTransformer:
    torch.manual_seed(0)
    return PointTransformer(**({"feature_dim": 2} | TINY | changes))


def random_cloud(num_scenes: int = 3, num_points: int = 150) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    points_BN3 = torch.rand(num_scenes, num_points, 3, generator=generator) * torch.tensor([3.0, 2.0, 1.0])
    return points_BN3, torch.rand(num_scenes, num_points, 2, generator=generator)


def random_voxels(counts: list[int], side: int, seed: int = 0) -> Voxels:
    """Scenes of so many cells at random places in a cube of `side` cells."""
    generator = torch.Generator().manual_seed(seed)
    keys = []
    for scene, count in enumerate(counts):
        cell_V = torch.randperm(side**3, generator=generator)[:count]
        grid_V3 = torch.stack([cell_V // side**2, cell_V // side % side, cell_V % side], 1)
        keys.append(pack(torch.full((count,), scene), grid_V3))
    keys_V = torch.cat(keys).sort().values
    return Voxels(keys_V, curve_codes(unpack(keys_V)[1], BITS, ORDERS), len(counts), BITS)


@pytest.mark.parametrize("counts", [[40], [1], [5, 60, 17], [125, 2]])
@pytest.mark.parametrize(("kernel_size", "bias"), [(1, True), (3, True), (3, False), (5, True)])
def test_submanifold_convolution_equals_a_dense_one_at_the_occupied_cells(counts, kernel_size, bias):
    torch.manual_seed(0)
    voxels, side = random_voxels(counts, 5), 5
    sparse = SubmanifoldConv3d(3, 4, kernel_size, bias=bias).double()
    dense = nn.Conv3d(3, 4, kernel_size, padding=kernel_size // 2, bias=bias).double()
    weight_C4CXYZ = sparse.weight_TCC.detach().permute(1, 2, 0).reshape(4, 3, *[kernel_size] * 3)
    with torch.no_grad():
        dense.weight.copy_(weight_C4CXYZ)
        if bias:
            dense.bias.copy_(sparse.bias_C)
    leaves = [torch.randn(len(voxels), 3, dtype=torch.float64).requires_grad_()]
    leaves.append(leaves[0].detach().clone().requires_grad_())
    volume = torch.zeros(len(counts), side, side, side, 3, dtype=torch.float64)
    x_V, y_V, z_V = voxels.grid_V3.T
    filled = volume.index_put((voxels.scene_V, x_V, y_V, z_V), leaves[1])
    expected_VC = dense(filled.permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1)[voxels.scene_V, x_V, y_V, z_V]
    found_VC = sparse(leaves[0], voxels)
    torch.testing.assert_close(found_VC, expected_VC)
    weight_VC = torch.randn_like(found_VC)
    (found_VC * weight_VC).sum().backward()
    (expected_VC * weight_VC).sum().backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)
    gradient_C4CXYZ = sparse.weight_TCC.grad.permute(1, 2, 0).reshape(dense.weight.shape)
    torch.testing.assert_close(gradient_C4CXYZ, dense.weight.grad)


def attention_by_loops(layer: PatchAttention, features_VC: torch.Tensor, voxels: Voxels, row: int) -> torch.Tensor:
    """Every cell attends, head by head, to the cells of its run: 0..K-1, K..2K-1, ..., and the scene's last K."""
    query_VC, key_VC, value_VC = layer.qkv(features_VC).chunk(3, dim=1)
    width = features_VC.shape[1] // layer.num_heads
    mixed_VC = torch.zeros_like(features_VC)
    for scene, count in enumerate(voxels.counts):
        cells = (voxels.scene_V == scene).nonzero()[:, 0]
        cells = cells[voxels.codes_OV[row, cells].argsort()].tolist()
        for place, cell in enumerate(cells):
            start = place - place % layer.patch_size
            run = cells[start : start + layer.patch_size]
            if start + layer.patch_size > count:
                run = cells[-layer.patch_size :]
            for head in range(layer.num_heads):
                part = slice(head * width, (head + 1) * width)
                share_K = (key_VC[run, part] @ query_VC[cell, part] / width**0.5).softmax(0)
                mixed_VC[cell, part] = share_K @ value_VC[run, part]
    return layer.out(mixed_VC)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=3), st.integers(1, 9), st.integers(0, 3))
def test_patch_attention_equals_loops(counts, patch_size, row):
    torch.manual_seed(0)
    voxels = random_voxels(counts, 4)
    layer = PatchAttention(8, 2, patch_size)
    leaves = [torch.randn(len(voxels), 8).requires_grad_()]
    leaves.append(leaves[0].detach().clone().requires_grad_())
    found_VC = layer(leaves[0], voxels, row)
    expected_VC = attention_by_loops(layer, leaves[1], voxels, row)
    torch.testing.assert_close(found_VC, expected_VC, rtol=1e-4, atol=1e-5)
    weight_VC = torch.randn_like(found_VC)
    (found_VC * weight_VC).sum().backward()
    (expected_VC * weight_VC).sum().backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-4, atol=1e-5)


def test_pooling_takes_the_maximum_of_a_cell_and_unpooling_gives_it_back():
    torch.manual_seed(0)
    voxels = random_voxels([30, 12], 6)
    pooling = GridPooling(4, 5, 1)
    features_VC = torch.randn(len(voxels), 4)
    pooled_XC, coarse, parent_V = pooling(features_VC, voxels)
    projected_VC = pooling.project(features_VC)
    highest_XC = torch.stack([projected_VC[parent_V == row].amax(0) for row in range(len(coarse))])
    torch.testing.assert_close(pooled_XC, nn.functional.gelu(pooling.norm(highest_XC)))
    assert torch.equal(max_over_cells(highest_XC[parent_V], parent_V, len(coarse)), highest_XC), "down again"

    unpooling = GridUnpooling(5, 4, 3)
    found_VC = unpooling(pooled_XC, features_VC, parent_V)
    rows = [unpooling.skip(features_VC[cell]) + unpooling.coarse(pooled_XC[parent_V[cell]]) for cell in range(42)]
    torch.testing.assert_close(found_VC, torch.stack(rows))


def test_drop_path_leaves_branches_out_in_training_only():
    torch.manual_seed(0)
    layer, branch_VC = DropPath(0.25), torch.rand(4000, 3) + 0.5
    dropped_VC = layer(branch_VC)
    kept_V = dropped_VC.any(1)
    assert 0.7 < kept_V.float().mean() < 0.8
    torch.testing.assert_close(dropped_VC[kept_V], branch_VC[kept_V] / 0.75)
    assert layer.eval()(branch_VC) is branch_VC
    rates = drop_path_rates(0.3, (1, 2, 1))
    assert [len(stage) for stage in rates] == [1, 2, 1]
    assert sum(rates, []) == pytest.approx([0.0, 0.1, 0.2, 0.3])


def test_the_defaults_are_the_papers():
    """The published network, 46.2 million parameters, with colour and normal."""
    with torch.device("meta"):
        network = PointTransformer(3)
    assert sum(parameter.numel() for parameter in network.parameters()) / 1e6 == pytest.approx(46.2, abs=0.05)
    assert network.out_channels == 64
    assert [block.row for block in network.encoder[3].blocks] == [0, 1, 2, 3, 0, 1], "blocks take the orders in turn"
    rates = [block.drop_path.rate for stage in network.decoder for block in stage.blocks]
    assert rates == pytest.approx([0.3 / 7, 0, 0.9 / 7, 0.6 / 7, 1.5 / 7, 1.2 / 7, 0.3, 1.8 / 7])
    assert inspect.signature(PointTransformer).parameters["patch_size"].default == 1024


def test_every_parameter_gets_a_gradient_and_points_their_cells_features():
    network = tiny_transformer(drop_path=0.1).train()
    points_BN3, features_BNF = random_cloud()
    found = network(points_BN3, features_BNF)
    assert found.features_VC.shape == (len(found.cells.voxels), 16) and network.out_channels == 16
    assert found.of_points_BNC.shape == (3, 150, 16)
    assert torch.equal(found.of_points_BNC[2, 7], found.features_VC[found.cells.voxel_BN[2, 7]])
    found.of_points_BNC.square().sum().backward()
    silent = [name for name, value in network.named_parameters() if value.grad is None or not value.grad.any()]
    assert not silent


def test_a_scene_does_not_depend_on_its_companions():
    """Also in training, and beside a scene that is wider and one that is denser."""
    network = tiny_transformer(shuffle_orders=False)
    points_BN3, features_BNF = random_cloud()
    points_BN3[0] *= 9
    points_BN3[2] *= 0.5
    for mode in (True, False):
        network.train(mode)
        together_BNC = network(points_BN3, features_BNF).of_points_BNC
        for scene in range(3):
            alone_BNC = network(points_BN3[scene, None], features_BNF[scene, None]).of_points_BNC
            torch.testing.assert_close(together_BNC[scene], alone_BNC[0], rtol=1e-4, atol=1e-5)


def test_permuted_points_get_the_same_features():
    network = tiny_transformer().eval()
    points_BN3, features_BNF = random_cloud()
    order_N = torch.randperm(150, generator=torch.Generator().manual_seed(3))
    first_BNC = network(points_BN3, features_BNF).of_points_BNC
    assert torch.equal(first_BNC, network(points_BN3, features_BNF).of_points_BNC), "evaluation repeats"
    other_BNC = network(points_BN3[:, order_N], features_BNF[:, order_N]).of_points_BNC
    torch.testing.assert_close(other_BNC, first_BNC[:, order_N], rtol=1e-5, atol=1e-6)


def test_orders_are_shuffled_in_training_by_the_seed():
    network = tiny_transformer().train()
    points_BN3, features_BNF = random_cloud()

    def encode(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return network(points_BN3, features_BNF).features_VC

    assert torch.equal(encode(5), encode(5))
    assert any(not torch.allclose(encode(5), encode(seed)) for seed in range(6, 10))


@pytest.mark.parametrize("num_points", [1, 2, 20])
def test_small_clouds(num_points):
    network = tiny_transformer().eval()
    points_BN3, features_BNF = random_cloud(1, num_points)
    assert network(points_BN3, features_BNF).of_points_BNC.isfinite().all()
    same = network(points_BN3[:, :1].expand(-1, 9, -1), features_BNF[:, :1].expand(-1, 9, -1))
    assert len(same.cells.voxels) == 1 and same.features_VC.isfinite().all()


def test_mixed_precision_stays_near():
    network = tiny_transformer().eval()
    points_BN3, features_BNF = random_cloud()
    results = []
    for mixed in (False, True):
        network.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            features_VC = network(points_BN3, features_BNF).features_VC
        features_VC.float().square().mean().backward()
        convolutions = [network.stem, network.encoder[1].blocks[0].position_conv]
        results.append([features_VC.detach(), *(layer.weight_TCC.grad for layer in convolutions)])
    for exact, found in zip(*results, strict=True):
        assert not torch.equal(exact, found) and (found - exact).norm() < 0.05 * exact.norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_device_gives_the_same():
    points_BN3, features_BNF = random_cloud()
    results = []
    for device in ("cpu", "cuda"):
        network = tiny_transformer().eval().to(device)
        found = network(points_BN3.to(device), features_BNF.to(device))
        found.of_points_BNC.square().sum().backward()
        gradients = {name: value.grad.cpu() for name, value in network.named_parameters() if value.grad is not None}
        results.append((found.of_points_BNC.cpu(), gradients))
    torch.testing.assert_close(*(features for features, _ in results), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(*(gradients for _, gradients in results), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"enc_heads": (2, 2)}, "enc_heads has 2 entries, but enc_depths has 3, so it takes 3"),
        ({"strides": (2, 2, 2)}, "strides has 3 entries, but enc_depths has 3, so it takes 2"),
        ({"dec_depths": (1, 0)}, "at least one block a stage"),
        ({"strides": (2, 3)}, "power of two"),
        ({"enc_heads": (2, 3, 2)}, "16 channels are not a multiple of 3 heads"),
        ({"orders": ("z", "peano")}, r"not \['peano'\]"),
        ({"orders": ()}, "not none"),
        ({"grid_size": 0.0}, "grid_size is 0.0"),
        ({"patch_size": 0}, "patch_size is 0"),
        ({"drop_path": 1.0}, "drop_path is 1.0"),
        ({"stem_kernel": 4}, "kernel_size is 4"),
    ],
)
def test_sizes_that_do_not_fit_are_explained(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        tiny_transformer(**changes)


def test_a_tiny_network_learns_to_segment():
    """A floor and two equal boxes over it at different places: three classes."""
    generator = torch.Generator().manual_seed(0)
    floor_BN3 = torch.rand(1, 120, 3, generator=generator) * torch.tensor([2.0, 2.0, 0.05])
    box_BN3 = torch.rand(1, 120, 3, generator=generator) * 0.5 + torch.tensor([0.1, 0.1, 0.4])
    points_BN3 = torch.cat([floor_BN3, box_BN3, box_BN3 + torch.tensor([1.3, 1.3, 0.0])], 1)
    labels_BN = torch.arange(3).repeat_interleave(120)[None]
    network = tiny_transformer(feature_dim=0)
    head = nn.Linear(16, 3)
    adam = torch.optim.Adam([*network.parameters(), *head.parameters()], 5e-3)
    features_BNF = torch.zeros(1, 360, 0)
    for _ in range(60):
        adam.zero_grad()
        logits_BN3 = head(network(points_BN3, features_BNF).of_points_BNC)
        nn.functional.cross_entropy(logits_BN3.transpose(1, 2), labels_BN).backward()
        adam.step()
    logits_BN3 = head(network.eval()(points_BN3, features_BNF).of_points_BNC)
    assert (logits_BN3.argmax(-1) == labels_BN).float().mean() > 0.95
