"""The box-conditioned query against hand-computed values and brute force: which proposal, which tokens, gradients."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from threedr1.datasets.scene import Scene
from threedr1.models.connector import Connector
from threedr1.models.named_proposals import NAME_IOU, NamedProposals, best_proposals, pointer_to
from threedr1.models.observation import EncodedScene, asked_objects, clicked_box
from threedr1.models.scene_encoder import SceneEncoder, select_proposals
from threedr1.models.scene_encoder.object_query import (
    CLICK_REACH,
    NOTHING,
    click_boxes,
    distance_to_boxes,
    pool_in_boxes,
    query_boxes,
    select_by_click,
)
from threedr1.utils.boxes import points_in_boxes

# a table, a cup on it (inside the table's box), and a shelf turned by 90 degrees
TABLE = [0.0, 0.0, 0.5, 2.0, 1.0, 1.0, 0.0]
CUP = [0.5, 0.0, 0.9, 0.2, 0.2, 0.2, 0.0]
SHELF = [4.0, 0.0, 1.0, 2.0, 0.4, 2.0, math.pi / 2]
PROPOSALS = torch.tensor([TABLE, CUP, SHELF])
VALID = torch.ones(1, 3, dtype=torch.bool)
XYZ = torch.tensor([[0.5, 0.0, 0.9], [-0.9, 0.0, 0.5], [4.0, 0.9, 1.0], [4.9, 0.0, 1.0], [1.0, 0.5, 1.0]])
COLORS = torch.arange(18.0).view(3, 6) / 18  # of each proposal
TOKENS = torch.tensor([[1.0, 0.0], [3.0, 2.0], [10.0, 0.0], [20.0, 0.0], [5.0, 7.0]])


def click(*points):
    points_B3 = torch.tensor(points)
    index_B, distance_B = select_by_click(
        points_B3, PROPOSALS.expand(len(points), -1, -1), VALID.expand(len(points), -1)
    )
    return index_B.tolist(), distance_B.tolist()


def test_distance_to_boxes_by_hand():
    boxes = torch.tensor([TABLE, SHELF, SHELF, SHELF])
    points = torch.tensor([[4.0, 4.5, 0.2], [4.0, 0.9, 1.0], [4.9, 0.0, 1.0], [4.5, 1.4, 2.0]])
    # beside and before the table: 3 m and 4 m; turned, the shelf reaches 1 m along y and 0.2 m along x
    torch.testing.assert_close(
        distance_to_boxes(points, boxes), torch.tensor([5.0, 0.0, 0.7, 0.5], dtype=torch.float64), atol=1e-6, rtol=0
    )


def test_the_proposal_that_covers_a_box_best_by_hand():
    # shifted by a tenth of its length: 1.8 / 2.2; the shelf, given unturned with its sides exchanged, is the same box
    asked = [CUP, [0.2, 0.0, 0.5, 2.0, 1.0, 1.0, 0.0], [4.0, 0.0, 1.0, 0.4, 2.0, 2.0, 0.0], [9.0] * 7]
    asked += [[*TABLE[:3], *sides, 0.0] for sides in ([0.0, 0.0, 0.0], [2.0, 0.0, 1.0], [-1.0, 1.0, 1.0])]
    boxes = np.asarray(asked, np.float32)
    assert best_proposals(boxes, PROPOSALS.numpy()) == [1, 0, 2, None, None, None, None]
    assert best_proposals(boxes[1:2], PROPOSALS[1:].numpy()) == [None]
    assert best_proposals(boxes[:1], PROPOSALS[:0].numpy()) == [None]


def test_a_click_selects_the_smallest_box_around_it_else_the_nearest():
    inside_cup, on_table, beside, far = [0.5, 0.05, 0.9], [-0.5, 0.0, 0.9], [4.0, 1.3, 1.0], [1e30, 0.0, 0.0]
    index, distance = click(inside_cup, on_table, beside)
    assert index == [1, 0, 2]
    assert distance == pytest.approx([0.0, 0.0, 0.3], abs=1e-6)
    index, distance = click(far)
    assert index[0] in (0, 1, 2) and distance == pytest.approx([1e30])
    padded = torch.tensor([[True, False, True]])
    assert select_by_click(torch.tensor([inside_cup]), PROPOSALS[None], padded)[0].tolist() == [0]


def test_a_click_means_its_proposals_box_or_a_cube_where_nothing_is_detected():
    point = torch.tensor([[0.5, 0.05, 0.9]])
    boxes_B7, distance_B = click_boxes(point, PROPOSALS[None], VALID)
    assert torch.equal(boxes_B7, torch.tensor([CUP])) and distance_B.tolist() == [0.0]
    for proposals, valid in ((PROPOSALS[None], torch.zeros_like(VALID)), (PROPOSALS[None, :0], VALID[:, :0])):
        boxes_B7, distance_B = click_boxes(point, proposals, valid)
        torch.testing.assert_close(boxes_B7, torch.tensor([[0.5, 0.05, 0.9, *[2 * CLICK_REACH] * 3, 0.0]]))
        assert distance_B.tolist() == [math.inf]


def test_pooling_by_hand_with_faces_headings_and_the_nearest_token():
    asked = torch.tensor([TABLE, CUP, SHELF, [4.6, 0.3, 1.0, 0.1, 0.1, 0.1, 0.0], [9.0, 0, 1.0, 0, 0, 0, 0]])
    pooled = pool_in_boxes(asked, XYZ.expand(5, -1, -1), TOKENS.expand(5, -1, -1))
    # the last token lies on the table's corner and counts; the shelf holds the third and not the fourth, which it
    # would hold if its heading were ignored; the last two boxes hold none, and the fourth token is nearest
    expected = [[3.0, 3.0], [1.0, 0.0], [10.0, 0.0], [20.0, 0.0], [20.0, 0.0]]
    torch.testing.assert_close(pooled, torch.tensor(expected))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(bad):
    with pytest.raises(ValueError, match="The box that is asked about is not finite"):
        asked_objects([[*TABLE[:3], bad, 1.0, 1.0, 0.0]], [encoded_scene()])
    with pytest.raises(ValueError, match="The position of a click is not finite"):
        select_by_click(torch.tensor([[0.0, bad, 0.0]]), PROPOSALS[None], VALID)


@settings(deadline=None)
@given(st.integers(0, 10_000))
def test_selection_and_pooling_equal_brute_force(seed):
    rng = np.random.default_rng(seed)
    batch, proposals, tokens = 3, 4, 20
    # quarter metres, so that faces are hit exactly
    boxes = np.concatenate(
        [
            rng.integers(-4, 5, (batch, proposals + 1, 3)) / 4,
            rng.integers(0, 7, (batch, proposals + 1, 3)) / 4,
            rng.uniform(-4, 4, (batch, proposals + 1, 1)) * rng.integers(0, 2, (batch, proposals + 1, 1)),
        ],
        axis=-1,
    )
    boxes = torch.from_numpy(boxes)  # float64, as the brute force below
    asked, proposals_BK7 = boxes[:, 0], boxes[:, 1:]
    xyz = torch.from_numpy(rng.integers(-6, 7, (batch, tokens, 3)) / 4)
    features = torch.from_numpy(rng.normal(size=(batch, tokens, 2)))
    valid_BK = torch.from_numpy(rng.random((batch, proposals)) < 0.8)
    clicked_B, _ = select_by_click(xyz[:, 0], proposals_BK7, valid_BK)
    pooled_BE = pool_in_boxes(asked, xyz, features)
    for row in range(batch):
        around = points_in_boxes(xyz[row, :1], proposals_BK7[row])[0] & valid_BK[row]
        if around.any():
            volumes = proposals_BK7[row, :, 3:6].prod(-1)
            assert around[clicked_B[row]] and volumes[clicked_B[row]] == volumes[around].min()
        inside = points_in_boxes(xyz[row], asked[row, None])[:, 0]
        if inside.any():
            torch.testing.assert_close(pooled_BE[row], features[row, inside].mean(0))
        else:
            assert any(torch.equal(pooled_BE[row], token) for token in features[row])


def query(tokens_BTE, features_BKE, asked):
    covering = best_proposals(np.asarray(asked, np.float32), PROPOSALS.numpy())
    return query_boxes(
        torch.tensor(asked),
        proposal_B=torch.tensor([NOTHING if row is None else row for row in covering]),
        features_BKE=features_BKE,
        class_probs_BKC=torch.eye(3).expand(len(asked), -1, -1),
        colors_BK6=COLORS.expand(len(asked), -1, -1),
        token_xyz_BT3=XYZ.expand(len(asked), -1, -1),
        tokens_BTE=tokens_BTE,
    )


def test_a_query_selects_and_pools_and_is_differentiable_in_what_it_takes():
    tokens = TOKENS.expand(2, -1, -1).clone().requires_grad_()
    features = torch.arange(12.0).view(2, 3, 2).requires_grad_()
    queried = query(tokens, features, [CUP, [*XYZ[1].tolist(), 0.1, 0.1, 0.1, 0.0]])
    assert queried.proposal_B.tolist() == [1, NOTHING]
    assert queried.features_BE.tolist() == [[2.0, 3.0], [0.0, 0.0]]
    assert queried.class_probs_BC.tolist() == [[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    assert queried.colors_B6.tolist() == [COLORS[1].tolist(), [0.0] * 6]
    assert queried.pooled_BE.tolist() == [[1.0, 0.0], [3.0, 2.0]]
    (queried.features_BE.sum() + queried.pooled_BE.sum()).backward()
    assert tokens.grad[:, :, 0].tolist() == [[1.0, 0, 0, 0, 0], [0, 1.0, 0, 0, 0]]
    assert features.grad[:, :, 0].tolist() == [[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]


def test_the_order_of_a_batch_does_not_matter():
    asked = [TABLE, CUP, SHELF]
    tokens, features = TOKENS.expand(3, -1, -1), torch.randn(1, 3, 2).expand(3, -1, -1)
    together = query(tokens, features, asked)
    for row in range(3):
        alone = query(tokens[:1], features[:1], asked[row : row + 1])
        torch.testing.assert_close(together.pooled_BE[row], alone.pooled_BE[0])
        torch.testing.assert_close(together.features_BE[row], alone.features_BE[0])


def connector(**changes):
    sizes = {"encoder_width": 2, "language_width": 8, "num_classes": 3, "num_proposals": 3, "num_layout_tokens": 0}
    return Connector(**{**sizes, **changes})


def test_the_connectors_token_differs_from_the_proposals_and_takes_gradients():
    torch.manual_seed(0)
    made = connector()
    tokens = TOKENS[None].clone().requires_grad_()
    features = torch.randn(1, 3, 2)
    queried = query(tokens, features, [CUP])
    token_D = made.asked(queried)[0]
    with torch.no_grad():
        objects_KD = made.objects(features, PROPOSALS[None], torch.eye(3)[None], COLORS[None])[0]
        proposals_KD = made.named(objects_KD, torch.arange(3))
        apart_K = (proposals_KD - token_D).abs().amax(-1)
    assert token_D.shape == (8,) and bool((apart_K > 1e-3).all())
    assert not torch.allclose(made.asked(query(tokens + torch.tensor([0.0, 9.0]), features, [CUP]))[0], token_D)
    (token_D * torch.arange(8.0)).sum().backward()
    assert float(made.asked_mark.weight.grad.abs().sum()) > 0
    assert float(tokens.grad[0, 0].abs().sum()) > 0 and float(tokens.grad[0, 1:].abs().sum()) == 0


def test_a_connector_without_object_tokens_has_no_parameters_for_them_and_refuses():
    with_token, without = connector(), connector(object_token=False)
    added = {"pooled_norm.weight", "pooled_norm.bias", "pooled_linear.weight", "pooled_linear.bias"}
    assert set(with_token.state_dict()) - set(without.state_dict()) == added | {"asked_mark.weight"}
    with pytest.raises(ValueError, match="made without object tokens"):
        without.asked(query(TOKENS[None], torch.randn(1, 3, 2), [CUP]))


def test_a_real_encoders_output_is_queried_and_its_tokens_get_gradients():
    torch.manual_seed(0)
    encoder = SceneEncoder(
        feature_dim=1,
        num_tokens=32,
        radius=0.4,
        num_neighbors=8,
        width=32,
        encoder_layers=1,
        decoder_layers=1,
        num_heads=2,
        num_queries=8,
    )
    points = torch.rand(2, 256, 3) * torch.tensor([4.0, 3.0, 2.0])
    encoding = encoder(points, points[..., 2:])
    encoding.tokens_BMD.retain_grad()
    proposals = select_proposals(encoding, 4)
    asked_B7, _ = click_boxes(points[:, 0], proposals.boxes_BK7, proposals.valid_BK)
    queried = query_boxes(
        asked_B7,
        proposal_B=torch.zeros(2, dtype=torch.int64),
        features_BKE=proposals.features_BKD,
        class_probs_BKC=proposals.class_probs_BKC,
        colors_BK6=torch.zeros(2, 4, 6),
        token_xyz_BT3=encoding.token_xyz_BM3,
        tokens_BTE=encoding.tokens_BMD,
    )
    assert not asked_B7.requires_grad
    queried.pooled_BE.pow(2).sum().backward()
    assert bool((encoding.tokens_BMD.grad.abs().sum((1, 2)) > 0).all())


def encoded_scene(proposals_K7=PROPOSALS):
    num_proposals = len(proposals_K7)
    return EncodedScene(
        features_KE=torch.arange(2.0 * num_proposals).view(num_proposals, 2),
        boxes_K7=proposals_K7,
        class_probs_KC=torch.eye(3)[:num_proposals],
        objectness_K=torch.ones(num_proposals),
        token_xyz_T3=XYZ,
        tokens_TE=TOKENS,
        colors_K6=COLORS[:num_proposals],
        valid_n=torch.arange(num_proposals),
        found=NamedProposals(proposals_K7.numpy()),
    )


def test_a_proposal_counts_as_the_object_exactly_where_it_lends_its_name():
    encoded = encoded_scene()
    # slid along a table of 2 m by d, the overlap is (2 - d) / (2 + d): 0.25 at 1.2 m
    asked = [[shift, *TABLE[1:]] for shift in (1.19, 1.21)]
    queried = asked_objects(asked, [encoded, encoded])
    assert queried.proposal_B.tolist() == [0, NOTHING] and NAME_IOU == 0.25
    found = encoded.told.covering(asked)
    names = [pointer_to(box, index).partition(">")[0] for box, index in zip(asked, found, strict=True)]
    assert found == encoded.told.covering(asked) == [0, None] and len(encoded.told.covered) == 2
    assert names == ["<obj0", "<box"]


@pytest.mark.parametrize("are_named", [True, False])
def test_the_object_asked_for_is_a_row_of_all_proposals_and_only_one_that_is_shown(are_named):
    whole = replace(encoded_scene(), are_named=are_named)
    part = whole.showing([1, 2])
    # as SFT cuts the graph: with other tensors it is the same part
    cut = replace(part, features_KE=part.features_KE.clone())
    flat = [*TABLE[:3], 2.0, 0.0, 1.0, 0.0]  # no volume
    for scene, expected in ((whole, [2, 0, NOTHING]), (part, [2, NOTHING, NOTHING]), (cut, [2, NOTHING, NOTHING])):
        assert asked_objects([SHELF, TABLE, flat], [scene] * 3).proposal_B.tolist() == expected
        assert scene.valid_K.nonzero()[:, 0].tolist() == scene.valid_n.tolist()
    assert len(part.told) == (2 if are_named else 0)
    assert asked_objects([SHELF], [encoded_scene(PROPOSALS[:0])]).proposal_B.tolist() == [NOTHING]


def test_a_click_is_read_and_answered_in_the_world_frame():
    empty = np.zeros(0, np.int32)
    origin_3 = np.array([10.0, -20.0, 0.5], np.float32)
    scene = Scene(
        scene_id="s",
        points_N3=np.zeros((1, 3), np.float32),
        colors_N3=np.zeros((1, 3), np.uint8),
        instance_ids_N=np.full(1, -1, np.int32),
        nyu40_N=np.zeros(1, np.uint8),
        object_ids_K=empty,
        object_labels=[],
        class_ids_K=empty,
        boxes_K7=np.zeros((0, 7), np.float32),
        axis_align_44=np.eye(4),
        origin_3=origin_3,
    )
    box_7, distance = clicked_box(origin_3 + [4.0, 1.3, 1.0], scene, encoded_scene())
    np.testing.assert_allclose(box_7, [14.0, -20.0, 1.5, *SHELF[3:]], atol=1e-5)
    assert distance == pytest.approx(0.3, abs=1e-5)
    box_7, distance = clicked_box(origin_3, scene, encoded_scene(PROPOSALS[:0]))
    np.testing.assert_allclose(box_7, [*origin_3, *[2 * CLICK_REACH] * 3, 0.0], atol=1e-5)
    assert distance == math.inf
    with pytest.raises(ValueError, match="The position of a click is not finite"):
        clicked_box([math.nan, 0.0, 0.0], scene, encoded_scene())
    unlikely = encoded_scene()
    unlikely.objectness_K[1] = 0.1  # the cup on the table
    on_cup_3 = origin_3 + np.asarray(CUP[:3])
    np.testing.assert_allclose(clicked_box(on_cup_3, scene, encoded_scene())[0][3:], CUP[3:], atol=1e-6)
    assert not np.allclose(clicked_box(on_cup_3, scene, unlikely)[0][3:], CUP[3:])
    unlikely.objectness_K[:] = 0.1
    np.testing.assert_allclose(clicked_box(on_cup_3, scene, unlikely)[0][3:], CUP[3:], atol=1e-6)
