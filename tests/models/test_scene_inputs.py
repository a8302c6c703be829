"""What the scene encoder reads of a scene: channels in order, normals made once, multi-view rows of the points."""

import dataclasses

import h5py
import numpy as np
import pytest
import torch

from threedr1.datasets.multiview import MultiviewFeatures, open_multiview
from threedr1.datasets.scene import Scene, load_scene, save_scene
from threedr1.engine.config import EncoderConfig, from_dict
from threedr1.models.scene_encoder import SceneEncoder, build_scene_encoder, feature_dim, inputs, point_features
from threedr1.models.scene_encoder.inputs import channel_names, features_of, scene_normals

NUM_POINTS, NUM_VERTICES = 60, 90


@pytest.fixture
def scene() -> Scene:
    """A floor at z = 1 under one point that says where the middle is; point i is vertex 89 - i."""
    rng = np.random.default_rng(0)
    points_N3 = np.c_[rng.uniform([10, 20], [14, 23], (NUM_POINTS, 2)), np.ones(NUM_POINTS)].astype(np.float32)
    points_N3[-1, 2] = 40.0
    return Scene(
        scene_id="scene0000_00",
        points_N3=points_N3,
        colors_N3=rng.integers(0, 256, (NUM_POINTS, 3)).astype(np.uint8),
        instance_ids_N=np.full(NUM_POINTS, -1, np.int32),
        nyu40_N=np.zeros(NUM_POINTS, np.uint8),
        object_ids_K=np.zeros(0, np.int32),
        object_labels=[],
        class_ids_K=np.zeros(0, np.int32),
        boxes_K7=np.zeros((0, 7), np.float32),
        axis_align_44=np.eye(4),
        origin_3=np.array([12, 21.5, 1], np.float32),
        vertex_ids_N=np.arange(NUM_VERTICES - 1, NUM_VERTICES - 1 - NUM_POINTS, -1, dtype=np.int32),
        num_vertices=NUM_VERTICES,
    )


def write(path, array, **options) -> MultiviewFeatures:
    with h5py.File(path, "w") as file:
        file.create_dataset("scene0000_00", data=array, **options)
    return MultiviewFeatures(path, array.shape[1])


def test_channels_stand_in_the_order_of_the_names():
    points_N3 = np.array([[1.0, 2.0, 0.5], [3.0, 4.0, 1.5]])
    colors_N3 = np.array([[0, 51, 255], [255, 102, 0]], np.uint8)
    normals_N3 = np.array([[0, 0, 1], [-1, 0, 0]], np.float16)
    multiview_N2 = np.array([[7.0, 8.0], [9.0, 10.0]])
    whole = features_of(points_N3, colors_N3, normals_N3=normals_N3, multiview_NW=multiview_N2)
    expected = [[0, 0.2, 1, 0.5, 0, 0, 1, 7, 8], [1, 0.4, 0, 1.5, -1, 0, 0, 9, 10]]
    np.testing.assert_array_equal(whole.features_NF, np.array(expected, np.float32))
    assert whole.features_NF.dtype == whole.points_N3.dtype == np.float32
    every = {"use_color": True, "use_height": True, "use_normal": True, "multiview_dim": 2}
    assert feature_dim(**every) == 9 and channel_names(**every) == "color height normal multiview"
    part = features_of(points_N3, colors_N3, use_color=False, use_height=False, multiview_NW=multiview_N2)
    np.testing.assert_array_equal(part.features_NF, multiview_N2.astype(np.float32))
    assert channel_names(use_color=False, use_height=False) == "none"


def test_a_sampled_scene_carries_the_normals_and_features_of_its_points(scene, tmp_path):
    features_V2 = np.stack([np.arange(NUM_VERTICES), -np.arange(NUM_VERTICES)], 1).astype(np.float16)
    multiview = write(tmp_path / "f.hdf5", features_V2)
    sampled = point_features(
        scene, 50, np.random.default_rng(1), use_normal=True, multiview_dim=2, multiview=multiview
    )
    assert sampled.features_NF.shape == (50, 9) and sampled.features_NF.dtype == np.float32
    floor_N = sampled.points_N3[:, 2] < 1
    apart_NN = np.abs(scene.to_model(scene.points_N3)[None] - sampled.points_N3[:, None]).sum(2)
    row_N = apart_NN.argmin(1)
    near_stray_N = np.abs(sampled.features_NF[:, 6] - 1) > 1e-2  # the one point above bends its neighbours' planes
    assert near_stray_N[floor_N].sum() < 25
    np.testing.assert_array_equal(sampled.features_NF[:, 7], 89 - row_N)
    np.testing.assert_array_equal(sampled.features_NF[:, 8], row_N - 89)
    np.testing.assert_allclose(sampled.features_NF[:, 4:7], scene_normals(scene)[row_N])
    np.testing.assert_allclose(np.linalg.norm(sampled.features_NF[:, 4:7], axis=1), 1, atol=1e-3)
    plain = point_features(scene, 50, np.random.default_rng(1))
    np.testing.assert_array_equal(plain.features_NF, sampled.features_NF[:, :4])


def test_normals_are_made_once_and_never_outlive_their_points(scene, tmp_path, monkeypatch):
    made = []
    real = inputs.estimate_normals
    monkeypatch.setattr(inputs, "estimate_normals", lambda points_N3: made.append(1) or real(points_N3))
    first = scene_normals(scene)
    assert first.dtype == np.float16 and scene_normals(scene) is first and len(made) == 1
    moved = dataclasses.replace(scene, points_N3=scene.points_N3[:, [2, 0, 1]])
    assert moved.normals_N3 is None
    np.testing.assert_allclose(np.abs(scene_normals(moved)[:, 0]), np.abs(first[:, 2]), atol=2e-3)
    save_scene(scene, tmp_path / "scene0000_00.npz")
    assert load_scene(tmp_path / "scene0000_00.npz").normals_N3 is None
    scene.normals_N3 = None
    scene.points_N3[3] = np.inf
    with pytest.raises(ValueError, match="NaN or infinite coordinates"):
        scene_normals(scene)


@pytest.mark.parametrize("options", [{}, {"chunks": (16, 3)}, {"chunks": (16, 3), "compression": "gzip"}])
@pytest.mark.parametrize("kind", ["<f4", ">f4", "<f2"])
def test_rows_are_the_same_however_the_file_is_laid_out(scene, tmp_path, options, kind):
    features_V3 = np.random.default_rng(0).normal(size=(NUM_VERTICES, 3)).astype(kind)
    with h5py.File(tmp_path / "f.hdf5", "w", userblock_size=512) as file:
        file.create_dataset("another", data=np.zeros((7, 3)))
        file.create_dataset("scene0000_00", data=features_V3, **options)
    kept_N = np.array([59, 3, 3, 0])
    found_N3 = MultiviewFeatures(tmp_path / "f.hdf5", 3).of(scene, kept_N)
    np.testing.assert_array_equal(found_N3, features_V3[[30, 86, 86, 89]].astype(np.float32))
    assert found_N3.dtype == np.float32


def test_features_that_do_not_fit_are_refused(scene, tmp_path):
    bad_V2 = np.ones((NUM_VERTICES, 2), np.float32)
    bad_V2[89, 0] = np.nan
    features = write(tmp_path / "f.hdf5", bad_V2)
    with pytest.raises(ValueError, match="scene0000_00 have NaN"):
        features.of(scene)
    assert np.isfinite(features.of(scene, np.array([1, 2]))).all(), "only what is asked for is read"
    with pytest.raises(ValueError, match="have 2 channels, but the scene encoder takes 128"):
        MultiviewFeatures(tmp_path / "f.hdf5", 128).of(scene)
    with pytest.raises(ValueError, match="have 2 channels"):
        MultiviewFeatures(tmp_path / "f.hdf5", 128).check(["scene0000_00"])
    with pytest.raises(ValueError, match="no features of 2 of 3 scenes, scene0001_00 among them"):
        features.check(["scene0000_00", "scene0001_00", "scene0002_00"])
    features.check(["scene0000_00"])
    with pytest.raises(ValueError, match="takes 2 multi-view features a point, but no file"):
        point_features(scene, 10, np.random.default_rng(0), multiview_dim=2)


def test_a_file_and_a_width_go_together(tmp_path):
    write(tmp_path / "f.hdf5", np.ones((NUM_VERTICES, 2), np.float32))
    assert open_multiview("", 0) is None
    opened = open_multiview(tmp_path / "f.hdf5", 2)
    assert opened is not None and opened.width == 2
    with pytest.raises(ValueError, match="takes none; leave data.multiview"):
        open_multiview(tmp_path / "f.hdf5", 0)
    with pytest.raises(ValueError, match="no file of them is named; set data.multiview"):
        open_multiview("", 2)
    with pytest.raises(ValueError, match="no feature file"):
        open_multiview(tmp_path / "absent.hdf5", 2)
    with pytest.raises(ValueError, match="multiview_dim is -1"):
        from_dict(EncoderConfig, {"multiview_dim": -1})


def test_an_encoder_of_as_many_but_other_channels_is_refused(tmp_path):
    sizes = {"num_tokens": 16, "num_queries": 4, "width": 16, "encoder_layers": 1, "decoder_layers": 1, "num_heads": 2}
    normal = from_dict(EncoderConfig, sizes | {"use_color": False, "use_normal": True})
    encoder = build_scene_encoder(normal)
    assert encoder.config["feature_dim"] == 4 and encoder.config["channels"] == "height normal"
    encoder.save_pretrained(tmp_path)
    color = from_dict(EncoderConfig, sizes | {"pretrained": str(tmp_path)})
    with pytest.raises(ValueError, match="has channels height normal, but the configuration says color height"):
        build_scene_encoder(color)
    again = build_scene_encoder(dataclasses.replace(normal, pretrained=str(tmp_path)))
    assert torch.equal(again.class_head[0].weight, encoder.class_head[0].weight)
    old = SceneEncoder(**{name: value for name, value in encoder.config.items() if name != "channels"})
    old.save_pretrained(tmp_path)
    assert build_scene_encoder(color).config["feature_dim"] == 4, "encoders of before do not say; their width counts"
