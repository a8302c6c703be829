"""Cells of a grid over scenes: quantisation, neighbours, runs, coarser grids, against hand-made cases and loops."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from threedr1.models.space_filling import ORDERS, curve_codes
from threedr1.models.voxels import BITS, Voxels, cut_patches, pack, unpack, voxelise


def voxels_of(*scenes: list[list[int]]) -> Voxels:
    """Cells of some scenes, each given as coordinates."""
    keys = [pack(torch.tensor(scene), torch.tensor(cell)) for scene, cells in enumerate(scenes) for cell in cells]
    keys_V = torch.stack(keys).unique()
    return Voxels(keys_V, curve_codes(unpack(keys_V)[1], BITS, ORDERS), len(scenes), BITS)


def test_points_of_a_cell_are_averaged():
    points_BN3 = torch.tensor([[[1.0, 2.0, 3.0], [1.3, 2.0, 3.0], [1.1, 2.2, 3.0], [1.7, 2.0, 3.9]]])
    features_BNF = torch.tensor([[[1.0], [5.0], [2.0], [7.0]]])
    cells = voxelise(points_BN3, features_BNF, 0.5, ORDERS)
    assert cells.voxels.grid_V3.tolist() == [[0, 0, 0], [1, 0, 1]]
    assert cells.voxel_BN.tolist() == [[0, 0, 0, 1]]
    torch.testing.assert_close(cells.xyz_V3, torch.tensor([[3.4 / 3, 6.2 / 3, 3.0], [1.7, 2.0, 3.9]]))
    # the mean point is 0.4/3 and 0.2/3 m from the corner, the centre of a cell 0.25 m
    expected_VX = torch.tensor([[0.8 / 3 - 0.5, 0.4 / 3 - 0.5, -0.5, 8 / 3], [1.4 - 1.5, -0.5, 1.8 - 1.5, 7.0]])
    torch.testing.assert_close(cells.features_VX, expected_VX, rtol=1e-5, atol=1e-5)


def test_means_do_not_depend_on_the_order_of_the_points_in_a_single_bit():
    generator = torch.Generator().manual_seed(0)
    points_BN3, features_BNF = (torch.rand(2, 2000, 3, generator=generator) for _ in range(2))
    order_N = torch.randperm(2000, generator=generator)
    first = voxelise(points_BN3, features_BNF, 0.5, ORDERS)
    other = voxelise(points_BN3[:, order_N], features_BNF[:, order_N], 0.5, ORDERS)
    assert torch.equal(first.xyz_V3, other.xyz_V3) and torch.equal(first.features_VX, other.features_VX)
    assert torch.equal(first.voxel_BN[:, order_N], other.voxel_BN)


def test_clouds_that_do_not_fit_the_grid_are_refused():
    points_BN3 = torch.tensor([[[0.0, 0, 0], [700.0, 0, 0]]])
    assert len(voxelise(points_BN3, torch.zeros(1, 2, 0), 0.02, ORDERS).voxels) == 2
    with pytest.raises(ValueError, match="700 m wide.*raise grid_size"):
        voxelise(points_BN3, torch.zeros(1, 2, 0), 0.01, ORDERS)
    for bad in (torch.nan, torch.inf):
        points_BN3[0, 1, 0] = bad
        with pytest.raises(ValueError, match="m wide"):
            voxelise(points_BN3, torch.zeros(1, 2, 0), 0.02, ORDERS)


def test_packing_keeps_scene_and_cell():
    scene_V, grid_V3 = torch.tensor([0, 32766]), torch.tensor([[1, 2, 3], [65535, 65534, 65533]])
    keys_V = pack(scene_V, grid_V3)
    assert (keys_V >= 0).all()
    assert torch.equal(unpack(keys_V)[0], scene_V) and torch.equal(unpack(keys_V)[1], grid_V3)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(*[st.integers(0, 4)] * 3), min_size=1, max_size=40, unique=True), min_size=1, max_size=3
    ),
    st.sampled_from([1, 3, 5]),
)
def test_neighbours_equal_a_search_of_all_pairs(scenes, kernel_size):
    voxels = voxels_of(*[[list(cell) for cell in cells] for cells in scenes])
    half = kernel_size // 2
    steps = [(x, y, z) for x in range(-half, half + 1) for y in range(-half, half + 1) for z in range(-half, half + 1)]
    pairs = voxels.neighbor_pairs(kernel_size)
    assert len(pairs) == len(steps) // 2
    where = [(int(scene), *cell) for scene, cell in zip(voxels.scene_V, voxels.grid_V3.tolist(), strict=True)]
    for (x, y, z), (cell_E, neighbor_E) in zip(steps, pairs, strict=False):
        expected = {
            (row, where.index(wanted))
            for row, (scene, *cell) in enumerate(where)
            if (wanted := (scene, cell[0] + x, cell[1] + y, cell[2] + z)) in where
        }
        assert set(zip(cell_E.tolist(), neighbor_E.tolist(), strict=True)) == expected
        assert len(cell_E) == len(expected)


def test_no_neighbours_across_edges_and_scenes():
    last = (1 << BITS) - 9  # the last coordinate that voxelise gives
    voxels = voxels_of([[1, 1, 0], [1, 0, last], [0, last, last], [last, last, last]], [[0, 0, 0], [last, 0, 0]])
    for kernel_size in (3, 5, 7):
        assert all(len(cell_E) == 0 for cell_E, _ in voxels.neighbor_pairs(kernel_size))


def test_orders_follow_the_curves_scene_by_scene():
    cells = [[0, 0, 1], [0, 1, 0], [1, 0, 0], [3, 3, 3], [2, 0, 1]]
    voxels = voxels_of(cells, cells[:2])
    for row in range(4):
        order_V, place_V = voxels.order(row)
        assert voxels.scene_V[order_V].tolist() == [0] * 5 + [1] * 2
        assert (voxels.codes_OV[row, order_V][:5].diff() > 0).all()
        assert order_V[place_V].tolist() == list(range(7))
    x_leads, y_leads = voxels.grid_V3[voxels.order(0)[0][:3]], voxels.grid_V3[voxels.order(1)[0][:3]]
    assert x_leads.tolist() == [[0, 0, 1], [0, 1, 0], [1, 0, 0]]
    assert y_leads.tolist() == [[0, 0, 1], [1, 0, 0], [0, 1, 0]]


def test_runs_by_hand():
    scene_V = torch.tensor([0] * 5 + [1] * 2 + [2] * 3)
    patches = cut_patches(scene_V, [5, 2, 3], 3)
    assert patches.place_PK.tolist() == [[0, 1, 2], [2, 3, 4], [5, 6, 6], [7, 8, 9]]
    assert patches.valid_PK is not None
    assert patches.valid_PK.tolist() == [[True] * 3, [True] * 3, [True, True, False], [True] * 3]
    # places 3 and 4 are answered in the second run, behind place 2, which the first one answers
    assert patches.home_V.tolist() == [0, 1, 2, 4, 5, 6, 7, 9, 10, 11]
    whole = cut_patches(scene_V, [5, 2, 3], 100)
    assert whole.place_PK.shape == (3, 5), "runs are no longer than the largest scene"
    assert cut_patches(scene_V[:5], [5], 3).valid_PK is None


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=4), st.integers(1, 12))
def test_every_place_is_answered_in_a_run_of_its_scene(counts, patch_size):
    scene_V = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    patches = cut_patches(scene_V, counts, patch_size)
    assert patches.place_PK.flatten()[patches.home_V].tolist() == list(range(sum(counts)))
    for run, places_K in enumerate(patches.place_PK):
        valid_K = torch.ones_like(places_K, dtype=torch.bool) if patches.valid_PK is None else patches.valid_PK[run]
        (scene,) = set(scene_V[places_K].tolist())
        read = places_K[valid_K].tolist()
        assert len(set(read)) == len(read) == min(patch_size, counts[scene])


def test_coarser_grids_halve_the_cells_and_keep_the_curves():
    cells = [[0, 0, 1], [1, 1, 0], [2, 0, 0], [7, 6, 5], [6, 7, 4]]
    voxels = voxels_of(cells, cells[:3])
    coarse, parent_V = voxels.coarser(1)
    assert coarse.grid_V3.tolist() == [[0, 0, 0], [1, 0, 0], [3, 3, 2], [0, 0, 0], [1, 0, 0]]
    assert coarse.counts == [3, 2]
    assert torch.equal(coarse.grid_V3[parent_V], voxels.grid_V3 >> 1)
    assert torch.equal(coarse.scene_V[parent_V], voxels.scene_V)
    assert torch.equal(coarse.codes_OV, curve_codes(coarse.grid_V3, BITS - 1, ORDERS))
    twice, _ = coarse.coarser(1)
    assert torch.equal(voxels.coarser(2)[0].keys_V, twice.keys_V)


def test_shuffling_exchanges_orders_by_the_seed():
    voxels = voxels_of([[0, 0, 1], [0, 1, 0], [1, 0, 0]])
    before_OV = voxels.codes_OV
    voxels.order(0)
    torch.manual_seed(1)
    expected_O = torch.randperm(4)
    torch.manual_seed(1)
    assert torch.equal(voxels.shuffled().codes_OV, before_OV[expected_O])
    assert torch.equal(voxels.order(0)[0], before_OV[expected_O[0]].argsort()), "nothing old is kept"
