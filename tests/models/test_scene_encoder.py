"""The scene encoder, its matcher, criterion, proposals, inputs and files, against hand-computed values."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from threedr1.datasets.scene import Scene
from threedr1.engine.config import EncoderConfig, PointTransformerConfig, from_dict
from threedr1.models.scene_encoder import (
    DetectionTargets,
    LayerPrediction,
    SceneEncoder,
    SceneEncoding,
    SetCriterion,
    build_scene_encoder,
    feature_dim,
    point_features,
    select_proposals,
)
from threedr1.models.scene_encoder.backbone import point_transformer_options, scattered_cells
from threedr1.models.scene_encoder.encoder import _distances, _distances_to_boxes
from threedr1.models.scene_encoder.inputs import estimate_normals
from threedr1.models.scene_encoder.layers import Attention, BallFeatures, EncoderLayer
from threedr1.models.voxels import Voxels, pack
from threedr1.third_party.pointnet2 import ball_query, group_points

TINY = {
    "num_tokens": 32,
    "radius": 0.4,
    "num_neighbors": 8,
    "width": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "num_heads": 2,
    "num_queries": 12,
    "dropout": 0.0,
}
TINY_PTV3 = {
    "grid_size": 0.1,
    "strides": [2],
    "enc_depths": [1, 1],
    "enc_channels": [8, 16],
    "enc_heads": [2, 2],
    "dec_depths": [1],
    "dec_channels": [16],
    "dec_heads": [2],
    "patch_size": 64,
    "drop_path": 0.0,
    "stem_kernel": 3,
}
BACKBONES = {"pointnet2": {}, "ptv3": {"backbone": "ptv3", "ptv3": TINY_PTV3}}
both_backbones = pytest.mark.parametrize("backbone", list(BACKBONES.values()), ids=list(BACKBONES))


def tiny_encoder(**changes) -> SceneEncoder:
    torch.manual_seed(0)
    return SceneEncoder(**({"feature_dim": 4} | TINY | changes))


def random_batch(num_scenes: int = 2, num_points: int = 256) -> tuple[torch.Tensor, torch.Tensor, DetectionTargets]:
    generator = torch.Generator().manual_seed(1)
    points_BN3 = torch.rand(num_scenes, num_points, 3, generator=generator) * torch.tensor([4.0, 3.0, 2.0])
    boxes = torch.tensor([[1.0, 1.0, 0.5, 1.0, 0.8, 1.0, 0.0], [3.0, 2.0, 1.0, 0.5, 1.5, 2.0, 0.0]])
    targets = DetectionTargets.of([boxes] * num_scenes, [torch.tensor([2, 7])] * num_scenes)
    return points_BN3, torch.rand(num_scenes, num_points, 4, generator=generator), targets


def encoding_of(boxes_Q7: torch.Tensor, logits_QC1: torch.Tensor) -> SceneEncoding:
    num_queries = len(boxes_Q7)
    return SceneEncoding(
        token_xyz_BM3=torch.zeros(1, 4, 3),
        tokens_BMD=torch.zeros(1, 4, 5),
        query_features_BQD=torch.arange(1, num_queries * 5 + 1.0).view(1, num_queries, 5).requires_grad_(),
        final=LayerPrediction(logits_QC1[None], boxes_Q7[None]),
    )


@pytest.mark.parametrize(("predict_heading", "dtype"), [(False, "float32"), (True, "float32"), (True, "bfloat16")])
@both_backbones
def test_every_parameter_gets_a_gradient(predict_heading, dtype, backbone):
    encoder = tiny_encoder(predict_heading=predict_heading, **backbone)
    encoder.compute_in(getattr(torch, dtype))
    points_BN3, features_BNF, targets = random_batch()
    encoding = encoder(points_BN3, features_BNF)
    assert encoding.token_xyz_BM3.shape == (2, 32, 3)
    assert encoding.tokens_BMD.shape == (2, 32, 32)
    assert encoding.query_features_BQD.shape == (2, 12, 32)
    assert encoding.boxes_BQ7.shape == (2, 12, 7)
    assert encoding.class_logits_BQC1.shape == (2, 12, 19)
    assert len(encoding.intermediate) == 2  # one before the first layer, one between the two
    assert (encoding.boxes_BQ7[..., 3:6] > 0).all()
    assert bool((encoding.boxes_BQ7[..., 6] != 0).any()) == predict_heading
    loss, parts = SetCriterion(18)(encoding, targets)
    loss.backward()
    assert torch.isfinite(loss)
    assert ("heading" in parts) == predict_heading
    silent = [
        name
        for name, parameter in encoder.named_parameters()
        if parameter.grad is None or (not name.endswith("key.bias") and not parameter.grad.any())
    ]  # a key's bias shifts all scores of a row alike, so its gradient is zero by nature
    assert not silent


def test_objectness_is_one_minus_no_object():
    logits_QC1 = torch.zeros(1, 19)
    logits_QC1[0, 18] = math.log(18.0)  # no object weighs as much as the 18 classes together
    encoding = encoding_of(torch.ones(1, 7), logits_QC1)
    assert encoding.objectness_BQ.item() == pytest.approx(0.5)


@both_backbones
def test_encoding_does_not_depend_on_the_other_scenes_of_a_batch(backbone):
    encoder = tiny_encoder(**backbone).eval()
    points_BN3, features_BNF, _ = random_batch(3)
    points_BN3[0] *= 5  # with the other backbone, more cells than the scene in question
    points_BN3[2] *= 0.5
    together = encoder(points_BN3, features_BNF)
    alone = encoder(points_BN3[1:2], features_BNF[1:2])
    torch.testing.assert_close(together.boxes_BQ7[1:2], alone.boxes_BQ7, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together.tokens_BMD[1:2], alone.tokens_BMD, rtol=1e-4, atol=1e-5)


@both_backbones
def test_the_order_of_the_points_does_not_matter(backbone):
    """Beyond the first one, where PointNet++ starts its walk, and as long as no ball overflows."""
    encoder = tiny_encoder(num_neighbors=256, **backbone).eval()
    points_BN3, features_BNF, _ = random_batch()
    order_N = torch.randperm(256, generator=torch.Generator().manual_seed(2))
    if not backbone:
        order_N = torch.cat([torch.tensor([0]), order_N[order_N != 0]])
    first = encoder(points_BN3, features_BNF)
    other = encoder(points_BN3[:, order_N], features_BNF[:, order_N])
    torch.testing.assert_close(other.token_xyz_BM3, first.token_xyz_BM3, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(other.tokens_BMD, first.tokens_BMD, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(other.boxes_BQ7, first.boxes_BQ7, rtol=1e-4, atol=1e-5)


def test_tokens_are_furthest_cells_with_the_features_around_them():
    encoder = tiny_encoder(num_neighbors=256, **BACKBONES["ptv3"]).eval()
    points_BN3, features_BNF, _ = random_batch()
    found = encoder.point_transformer.network(points_BN3, features_BNF)
    token_xyz_BM3, tokens_BMD = encoder.set_abstraction(*encoder.point_transformer(points_BN3, features_BNF))
    assert torch.equal(encoder(points_BN3, features_BNF).token_xyz_BM3, token_xyz_BM3)
    for scene in range(2):
        own_V = found.cells.voxels.scene_V == scene
        xyz_V3, features_VC = found.cells.xyz_V3[own_V], found.features_VC[own_V]
        assert len(xyz_V3) < 256, "some points share a cell"
        distance_MV = torch.cdist(token_xyz_BM3[scene], xyz_V3, compute_mode="donot_use_mm_for_euclid_dist")
        token_M = distance_MV.argmin(1)
        assert torch.equal(xyz_V3[token_M], token_xyz_BM3[scene])
        apart_VV = torch.cdist(xyz_V3, xyz_V3, compute_mode="donot_use_mm_for_euclid_dist")
        for count in range(1, 32):  # each the furthest from those before
            nearest_V = apart_VV[token_M[:count]].amin(0)
            assert nearest_V[token_M[count]] == pytest.approx(nearest_V.max().item())
        for token in (0, 31):
            near_V = distance_MV[token] < 0.4
            offset_V3 = (xyz_V3[near_V] - token_xyz_BM3[scene, token]) / 0.4
            pooled_D = encoder.set_abstraction.ball.network(torch.cat([offset_V3, features_VC[near_V]], 1)).amax(0)
            torch.testing.assert_close(tokens_BMD[scene, token], pooled_D, rtol=1e-4, atol=1e-5)


def test_cells_go_to_the_balls_in_no_direction():
    """The first cells of a box are spread over all of it, as the first ones of a random sample would be."""
    grid_V3 = torch.cartesian_prod(torch.arange(20), torch.arange(20), torch.arange(2))
    keys_V = torch.cat([pack(torch.zeros(800, dtype=torch.int64), grid_V3), pack(torch.tensor([1]), grid_V3[:1])])
    cell_BX = scattered_cells(Voxels(keys_V, keys_V[None], 2, 16))
    assert cell_BX.shape == (2, 800)
    assert sorted(cell_BX[0].tolist()) == list(range(800)) and set(cell_BX[1].tolist()) == {800}
    for count in (32, 64, 128):
        mean_3 = grid_V3[cell_BX[0, :count]].float().mean(0)
        assert (mean_3 - torch.tensor([9.5, 9.5, 0.5])).abs().max() < 2.0


@both_backbones
def test_points_that_are_not_finite_are_refused(backbone):
    encoder = tiny_encoder(**backbone)
    points_BN3, features_BNF, _ = random_batch()
    for bad in (math.nan, math.inf, -math.inf):
        points_BN3[1, 5, 2] = bad
        with pytest.raises(ValueError, match="points with NaN or infinite coordinates; clean the scan"):
            encoder(points_BN3, features_BNF)
        points_BN3[1, 5, 2], features_BNF[0, 3, 1] = 0.0, bad
        with pytest.raises(ValueError, match="channels .* that are NaN or infinite"):
            encoder(points_BN3, features_BNF)
        features_BNF[0, 3, 1] = 0.0


def balls_step_by_step(
    ball: BallFeatures, centre_BQ3: torch.Tensor, points_BN3: torch.Tensor, features_BNF: torch.Tensor
) -> torch.Tensor:
    """BallFeatures from single operations."""
    idx_BQK = ball_query(ball.radius, ball.num_neighbors, points_BN3, centre_BQ3)
    channels_BXN = torch.cat([points_BN3, features_BNF.float()], -1).transpose(1, 2).contiguous()
    grouped_BQKX = group_points(channels_BXN, idx_BQK).permute(0, 2, 3, 1)
    offset_BQK3 = (grouped_BQKX[..., :3] - centre_BQ3[:, :, None]) / ball.radius
    hit_BQ1 = (torch.cdist(centre_BQ3, points_BN3) < ball.radius).any(-1, keepdim=True)
    return ball.network(torch.cat([offset_BQK3, grouped_BQKX[..., 3:]], -1)).amax(2) * hit_BQ1


@pytest.mark.parametrize(("feature_dim", "dtype"), [(4, torch.float32), (4, torch.bfloat16), (0, torch.float32)])
def test_ball_features_equal_the_steps_one_by_one(feature_dim, dtype):
    torch.manual_seed(0)
    ball = BallFeatures(feature_dim, 0.5, 8, 16)
    points_BN3, _, _ = random_batch()
    centre_BQ3 = points_BN3[:, 10:30] + 0.1 * torch.randn(2, 20, 3)
    centre_BQ3[:, 3] = 50.0  # far from every point
    features_BNF = torch.randn(2, 256, feature_dim).to(dtype)
    leaves = [
        (centre_BQ3.clone().requires_grad_(), points_BN3, features_BNF.clone().requires_grad_()) for _ in range(2)
    ]
    found_BQD, expected_BQD = ball(*leaves[0]), balls_step_by_step(ball, *leaves[1])
    assert found_BQD.dtype == torch.float32 and not found_BQD[:, 3].any()
    torch.testing.assert_close(found_BQD, expected_BQD)
    weight_BQD = torch.randn_like(found_BQD)
    for pooled_BQD in (found_BQD, expected_BQD):
        (pooled_BQD * weight_BQD).sum().backward()
    for leaf in (0, 2):
        torch.testing.assert_close(leaves[0][leaf].grad, leaves[1][leaf].grad, rtol=1e-4, atol=1e-5)
    assert leaves[0][0].grad[:, :3].any() and not leaves[0][0].grad[:, 3].any()


def test_half_precision_changes_results_by_rounding_only():
    encoder = tiny_encoder().eval()
    points_BN3, features_BNF, _ = random_batch()
    exact = encoder(points_BN3, features_BNF)
    encoder.compute_in(torch.bfloat16)
    rounded = encoder(points_BN3, features_BNF)
    assert rounded.tokens_BMD.dtype == rounded.boxes_BQ7.dtype == torch.float32
    assert not torch.equal(rounded.tokens_BMD, exact.tokens_BMD)
    assert (rounded.tokens_BMD - exact.tokens_BMD).norm() < 0.02 * exact.tokens_BMD.norm()
    assert "compute_dtype" not in encoder.config


def test_distances_equal_those_of_single_points():
    generator = torch.Generator().manual_seed(0)
    from_BQ3, to_BM3 = (20 * torch.rand(2, count, 3, generator=generator) for count in (5, 7))
    boxes_BQ7 = torch.cat([from_BQ3, 8 * torch.rand(2, 5, 3, generator=generator), torch.zeros(2, 5, 1)], -1)
    between_BQM, outside_BQM = _distances(from_BQ3, to_BM3), _distances_to_boxes(boxes_BQ7, to_BM3)
    for scene, query, token in np.ndindex(2, 5, 7):
        apart_3 = (to_BM3[scene, token] - from_BQ3[scene, query]).double().abs()
        assert between_BQM[scene, query, token].item() == pytest.approx(apart_3.norm().item(), rel=1e-5)
        beyond_3 = (apart_3 - boxes_BQ7[scene, query, 3:6].double() / 2).clamp(min=0)
        assert outside_BQM[scene, query, token].item() == pytest.approx(beyond_3.norm().item(), rel=1e-4, abs=1e-5)
    assert (outside_BQM == 0).any() and (outside_BQM > 0).any()


def test_encoder_attention_stops_at_the_radius():
    torch.manual_seed(0)
    layer = EncoderLayer(8, 2, 0.0, radius=1.0)
    tokens_BMD, position_BMD = torch.rand(1, 3, 8), torch.zeros(1, 3, 8)
    xyz_BM3 = torch.tensor([[[0.0, 0, 0], [0.9, 0, 0], [5.0, 0, 0]]])
    before = layer(tokens_BMD, position_BMD, torch.cdist(xyz_BM3, xyz_BM3))
    tokens_BMD = tokens_BMD.clone()
    tokens_BMD[0, 2] += 1.0
    after = layer(tokens_BMD, position_BMD, torch.cdist(xyz_BM3, xyz_BM3))
    assert torch.equal(before[0, :2], after[0, :2])
    assert not torch.equal(before[0, 2], after[0, 2])


@both_backbones
def test_wrong_sizes_are_explained(backbone):
    encoder = tiny_encoder(**backbone)
    with pytest.raises(ValueError, match="takes 4 channels.*got 3"):
        encoder(torch.rand(1, 64, 3), torch.rand(1, 64, 3))
    with pytest.raises(ValueError, match="empty"):
        encoder(torch.rand(1, 0, 3), torch.rand(1, 0, 4))
    with pytest.raises(ValueError, match="num_queries 40 is more than num_tokens 32"):
        tiny_encoder(num_queries=40, **backbone)
    with pytest.raises(ValueError, match="not a multiple"):
        Attention(10, 3, 0.0)


def test_proposals_are_suppressed_ordered_and_padded():
    boxes_Q7 = torch.tensor(
        [
            [0.0, 0, 0, 1, 1, 1, 0],  # chair, second best
            [0.1, 0, 0, 1, 1, 1, 0],  # chair, suppressed by query 0
            [0.1, 0, 0, 1, 1, 1, 0],  # table at the same place: another class stays
            [5.0, 0, 0, 1, 1, 1, 0],  # best
            [8.0, 0, 0, 1, 1, 1, 0],  # background
        ]
    )
    logits_QC1 = torch.tensor([[4.0, 0, 1], [3.0, 0, 1], [0, 3.0, 1], [6.0, 0, 1], [0, 0, 6.0]])
    encoding = encoding_of(boxes_Q7, logits_QC1)
    chosen = select_proposals(encoding, 6, min_objectness=0.1)
    assert chosen.query_BK[0].tolist() == [3, 0, 2, 0, 0, 0]
    assert chosen.valid_BK[0].tolist() == [True, True, True, False, False, False]
    assert chosen.classes_BK[0].tolist() == [0, 0, 1, 0, 0, 0]
    assert torch.equal(chosen.boxes_BK7[0, :3], boxes_Q7[[3, 0, 2]])
    assert not chosen.boxes_BK7[0, 3:].any() and not chosen.features_BKD[0, 3:].any()
    torch.testing.assert_close(chosen.class_probs_BKC.sum(-1), chosen.objectness_BK)
    chosen.features_BKD.sum().backward()
    assert encoding.query_features_BQD.grad is not None
    assert encoding.query_features_BQD.grad[0].any(-1).tolist() == [True, False, True, True, False]
    assert select_proposals(encoding, 2).query_BK[0].tolist() == [3, 0], "the best come first"
    assert select_proposals(encoding, 6).query_BK[0, :4].tolist() == [3, 0, 2, 4]
    ordered = select_proposals(encoding, 6, left_to_right=True)
    assert ordered.query_BK[0, :4].tolist() == [0, 2, 3, 4], "by x; of one x the best first"
    assert torch.equal(ordered.boxes_BK7[0, :4], boxes_Q7[[0, 2, 3, 4]])
    assert select_proposals(encoding, 2, left_to_right=True).query_BK[0].tolist() == [0, 3], "the best are kept"
    with pytest.raises(ValueError, match="at least 1"):
        select_proposals(encoding, 0)


def test_wrong_backbones_are_explained():
    with pytest.raises(ValueError, match="backbone is 'pointnet3'; choose pointnet2 or ptv3"):
        tiny_encoder(backbone="pointnet3")
    with pytest.raises(ValueError, match="pointnet2 takes no ptv3 settings"):
        tiny_encoder(ptv3=TINY_PTV3)
    with pytest.raises(ValueError, match="unknown key 'grid'; known keys: grid_size, orders"):
        tiny_encoder(backbone="ptv3", ptv3={"grid": 0.1})


@both_backbones
def test_saved_encoder_is_the_same(tmp_path, backbone):
    encoder = tiny_encoder(**backbone).eval()
    encoder.save_pretrained(tmp_path / "model")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]
    points_BN3, features_BNF, _ = random_batch()
    encoder.save_pretrained(tmp_path / "run" / "best")
    for folder in (tmp_path / "model", tmp_path, tmp_path / "run"):  # also by the folder of a checkpoint or a run
        loaded = SceneEncoder.from_pretrained(folder).eval()
        assert torch.equal(loaded(points_BN3, features_BNF).boxes_BQ7, encoder(points_BN3, features_BNF).boxes_BQ7)


def test_checkpoints_from_before_the_choice_hold_pointnet2(tmp_path):
    encoder = tiny_encoder().eval()
    encoder.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("backbone") == "pointnet2" and config.pop("ptv3") is None
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = SceneEncoder.from_pretrained(tmp_path).eval()
    assert loaded.config == encoder.config
    points_BN3, features_BNF, _ = random_batch()
    assert torch.equal(loaded(points_BN3, features_BNF).boxes_BQ7, encoder(points_BN3, features_BNF).boxes_BQ7)


def test_the_configuration_chooses_the_backbone(tmp_path):
    sizes = {name: value for name, value in TINY.items() if name != "dropout"}
    plain, chosen = (from_dict(EncoderConfig, sizes | more) for more in ({}, BACKBONES["ptv3"]))
    assert build_scene_encoder(plain).point_transformer is None
    encoder = build_scene_encoder(chosen)
    assert encoder.point_transformer is not None and encoder.config["ptv3"]["enc_channels"] == [8, 16]
    encoder.save_pretrained(tmp_path)
    again = build_scene_encoder(dataclasses.replace(chosen, pretrained=str(tmp_path)))
    assert torch.equal(again.class_head[0].weight, encoder.class_head[0].weight)
    with pytest.raises(ValueError, match="has backbone ptv3, but the configuration says pointnet2"):
        build_scene_encoder(dataclasses.replace(plain, pretrained=str(tmp_path)))
    other = from_dict(EncoderConfig, sizes | {"backbone": "ptv3", "ptv3": TINY_PTV3 | {"patch_size": 32}})
    with pytest.raises(ValueError, match="'patch_size': 64.*the configuration says.*'patch_size': 32"):
        build_scene_encoder(dataclasses.replace(other, pretrained=str(tmp_path)))
    assert dataclasses.asdict(PointTransformerConfig()) == point_transformer_options({}), "the same defaults twice"
    with pytest.raises(ValueError, match="backbone is 'pointnet'"):
        from_dict(EncoderConfig, {"backbone": "pointnet"})


def test_checkpoints_that_do_not_fit_are_explained(tmp_path):
    tiny_encoder().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="another model size.*configured model"):
        tiny_encoder(width=64).load_weights(tmp_path)
    with pytest.raises(ValueError, match="lacks decoder.2"):
        tiny_encoder(decoder_layers=3).load_weights(tmp_path)
    with pytest.raises(ValueError, match="holds decoder.1"):
        tiny_encoder(decoder_layers=1).load_weights(tmp_path)
    with pytest.raises(ValueError, match="no scene encoder at"):
        SceneEncoder.from_pretrained(tmp_path / "elsewhere")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="truncated"):
        SceneEncoder.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 3}))
    with pytest.raises(ValueError, match="hidden_size"):
        SceneEncoder.from_pretrained(tmp_path)


@pytest.fixture
def scene() -> Scene:
    rng = np.random.default_rng(0)
    points_N3 = rng.uniform([10, 20, 1], [14, 23, 3], (500, 3)).astype(np.float32)
    return Scene(
        scene_id="scene0000_00",
        points_N3=points_N3,
        colors_N3=rng.integers(0, 256, (500, 3)).astype(np.uint8),
        instance_ids_N=np.full(500, -1, np.int32),
        nyu40_N=np.zeros(500, np.uint8),
        object_ids_K=np.zeros(0, np.int32),
        object_labels=[],
        class_ids_K=np.zeros(0, np.int32),
        boxes_K7=np.zeros((0, 7), np.float32),
        axis_align_44=np.eye(4),
        origin_3=np.array([12, 21.5, 1], np.float32),
    )


def test_point_features_are_seeded_and_in_the_model_frame(scene):
    first = point_features(scene, 100, np.random.default_rng(3))
    again = point_features(scene, 100, np.random.default_rng(3))
    other = point_features(scene, 100, np.random.default_rng(4))
    assert np.array_equal(first.points_N3, again.points_N3) and not np.array_equal(first.points_N3, other.points_N3)
    assert first.points_N3.dtype == first.features_NF.dtype == np.float32
    assert first.features_NF.shape == (100, feature_dim()) == (100, 4)
    assert np.abs(first.points_N3).max() <= 2.0 and len(np.unique(first.points_N3, axis=0)) == 100
    assert first.features_NF[:, :3].min() >= 0 and first.features_NF[:, :3].max() <= 1
    assert np.array_equal(first.features_NF[:, 3], first.points_N3[:, 2])
    bare = point_features(scene, 10, np.random.default_rng(3), use_color=False, use_height=False)
    assert bare.features_NF.shape == (10, 0)


def test_small_clouds_repeat_points_and_bad_ones_are_refused(scene):
    sampled = point_features(scene, 800, np.random.default_rng(3))
    assert len(np.unique(sampled.points_N3, axis=0)) == 500, "every point is there"
    scene.points_N3[7, 1] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        point_features(scene, 800, np.random.default_rng(3))
    scene.points_N3 = scene.points_N3[:0]
    with pytest.raises(ValueError, match="no points"):
        point_features(scene, 10, np.random.default_rng(3))


def test_normals_face_the_middle_of_the_cloud():
    rng = np.random.default_rng(0)
    floor_N3 = np.c_[rng.uniform(-1, 1, (300, 2)), np.zeros(300)]
    wall_N3 = np.c_[np.full(300, 3.0), rng.uniform(-1, 1, 300), rng.uniform(1, 2, 300)]
    normals_N3 = estimate_normals(np.concatenate([floor_N3, wall_N3]).astype(np.float32))
    np.testing.assert_allclose(normals_N3[:300], np.tile([0, 0, 1], (300, 1)), atol=1e-3)
    np.testing.assert_allclose(normals_N3[300:], np.tile([-1, 0, 0], (300, 1)), atol=1e-3)


@pytest.mark.slow
@both_backbones
def test_a_tiny_encoder_learns_three_boxes(backbone):
    """500 steps on one scene: every object is found with IoU > 0.5 and the right class."""
    rng = np.random.default_rng(0)
    boxes_K7 = np.array(
        [[-1.0, -0.8, 0.4, 0.8, 0.8, 0.8, 0], [1.0, 0.6, 0.6, 1.0, 0.6, 1.2, 0], [0.2, -1.0, 0.3, 0.6, 0.5, 0.6, 0]]
    )
    objects = [rng.uniform(-0.5, 0.5, (300, 3)) * box_7[3:6] + box_7[:3] for box_7 in boxes_K7]
    floor_N3 = np.c_[rng.uniform(-2, 2, (600, 2)), np.zeros(600)]
    points_BN3 = torch.from_numpy(np.concatenate([*objects, floor_N3]).astype(np.float32))[None]
    features_BNF = points_BN3[..., 2:]
    targets = DetectionTargets.of([torch.from_numpy(boxes_K7.astype(np.float32))], [torch.tensor([4, 1, 9])])
    encoder = tiny_encoder(feature_dim=1, num_tokens=64, **backbone)
    criterion, adam = SetCriterion(18), torch.optim.Adam(encoder.parameters(), 3e-3)
    for _ in range(500):
        adam.zero_grad()
        criterion(encoder(points_BN3, features_BNF), targets)[0].backward()
        adam.step()
    from threedr1.utils.boxes import box3d_iou

    found = select_proposals(encoder.eval()(points_BN3, features_BNF), 3)
    iou_KK = box3d_iou(found.boxes_BK7[0].detach(), targets.of_scene(0)[0])
    best_K = iou_KK.argmax(0)
    assert (iou_KK.amax(0) > 0.5).all()
    assert found.classes_BK[0, best_K].tolist() == [4, 1, 9]
