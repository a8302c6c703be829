"""All inputs of the scene encoder at once: augmented, in workers, trained, saved, and in the assembled model."""

import dataclasses
import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from threedr1.datasets.multiview import open_multiview
from threedr1.datasets.scene import save_scene
from threedr1.datasets.scene_store import SceneStore
from threedr1.datasets.transforms import Transform
from threedr1.engine import detect, evaluate, grpo, sft
from threedr1.engine.checkpoint import latest_checkpoint
from threedr1.engine.config import DetectConfig, to_dict
from threedr1.engine.detection_data import CloudSampler, SceneSamples, turn_directions
from threedr1.engine.predict import infer
from threedr1.models.scene_encoder import SceneEncoder
from threedr1.models.scene_encoder.inputs import estimate_normals
from threedr1.models.scene_vlm import SceneVLM

from .test_detect import assert_same_weights, data_root, make_config, make_scene, without_time  # noqa: F401 - fixture
from .test_pipeline import eval_config, grpo_config, sft_config

WIDTH = 5
ALL = {"use_normal": True, "multiview_dim": WIDTH}
transforms = st.builds(
    Transform,
    flip_x=st.booleans(),
    flip_y=st.booleans(),
    quarter_turns=st.integers(0, 3),
    angle=st.floats(-0.3, 0.3),
    scale=st.floats(0.8, 1.2),
)


def write_features(store: SceneStore, path: Path, width: int = WIDTH) -> str:
    """Features of every prepared scene: the number of the vertex in the first channel, noise in the others."""
    with h5py.File(path, "w") as file:
        for scene in store.values():
            rng = np.random.default_rng(scene.num_vertices)
            features_VW = rng.normal(size=(scene.num_vertices, width)).astype(np.float32)
            features_VW[:, 0] = np.arange(scene.num_vertices) / 1000
            file.create_dataset(scene.scene_id, data=features_VW)
    return str(path)


@pytest.fixture
def featured_root(data_root) -> Path:  # noqa: F811 - the fixture of test_detect
    """The detector's scenes with vertices, and features of them in `f.hdf5`."""
    for path in sorted((data_root / "prepared").glob("*.npz")):
        scene = make_scene(path.stem, int(path.stem[5:9]))
        ids_N = np.arange(len(scene.points_N3), dtype=np.int32)[::-1].copy()
        save_scene(dataclasses.replace(scene, vertex_ids_N=ids_N, num_vertices=len(ids_N)), path)
    write_features(SceneStore(data_root / "prepared"), data_root / "f.hdf5")
    return data_root


def all_inputs(root: Path, run_dir: Path, workers: int = 0, **run):
    config = make_config(root, run_dir, ALL, **run)
    return dataclasses.replace(
        config, data=dataclasses.replace(config.data, multiview=str(root / "f.hdf5"), workers=workers)
    )


@settings(max_examples=60, deadline=None)
@given(transform=transforms, seed=st.integers(0, 100))
def test_normals_turn_with_their_points(transform, seed):
    """A normal's tip, a point itself, lands where the turned normal says; and lengths stay."""
    rng = np.random.default_rng(seed)
    points_N3, normals_N3 = rng.normal(size=(2, 50, 3))
    normals_N3 /= np.linalg.norm(normals_N3, axis=1, keepdims=True)
    turned_N3 = turn_directions(transform, normals_N3)
    tips_N3 = (transform.points(points_N3 + normals_N3) - transform.points(points_N3)) / transform.scale
    np.testing.assert_allclose(turned_N3, tips_N3, atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(turned_N3, axis=1), 1, atol=1e-6)
    assert turned_N3.dtype == np.float32


@settings(max_examples=15, deadline=None)
@given(transform=transforms)
def test_turned_normals_are_those_of_the_turned_cloud(transform):
    """Estimated before and turned, or turned and estimated then: the same, side included."""
    rng = np.random.default_rng(0)
    sides = [rng.uniform(-1, 1, (200, 3)) for _ in range(6)]
    for face, side_P3 in enumerate(sides):
        side_P3[:, face // 2] = (-1) ** face * 2.0  # six walls, apart from one another
    points_N3 = np.concatenate(sides) * [1.0, 1.3, 0.7]
    expected_N3 = estimate_normals(transform.points(points_N3))
    np.testing.assert_allclose(turn_directions(transform, estimate_normals(points_N3)), expected_N3, atol=2e-3)


def test_an_augmented_sample_turns_its_normals_and_keeps_its_features(featured_root, tmp_path):
    config = all_inputs(featured_root, tmp_path)
    scene = SceneStore(featured_root / "prepared")["scene0001_00"]
    plain, moved = CloudSampler(config, augment=False), CloudSampler(config, augment=True)
    determinants = set()
    for seed in range(12):
        before = plain(1, scene, np.random.default_rng(seed)).inputs
        after = moved(1, scene, np.random.default_rng(seed)).inputs
        assert after.features_NF.shape == (512, 3 + 1 + 3 + WIDTH)
        matrix_33 = np.linalg.lstsq(before.points_N3, after.points_N3, rcond=None)[0]
        scale = abs(np.linalg.det(matrix_33)) ** (1 / 3)
        determinants.add(round(float(np.linalg.det(matrix_33 / scale))))
        expected_N3 = before.features_NF[:, 4:7] @ (matrix_33 / scale)
        np.testing.assert_allclose(after.features_NF[:, 4:7], expected_N3, atol=1e-5)
        np.testing.assert_array_equal(after.features_NF[:, 3], after.points_N3[:, 2])
        for same in (slice(0, 3), slice(7, None)):
            np.testing.assert_array_equal(after.features_NF[:, same], before.features_NF[:, same])
        vertex_N = np.rint(before.features_NF[:, 7] * 1000).astype(int)
        rows_N = len(scene.points_N3) - 1 - vertex_N
        np.testing.assert_allclose(before.points_N3, scene.to_model(scene.points_N3)[rows_N])
    assert determinants == {-1, 1}, "flips were among them"


def test_the_detector_trains_on_all_inputs_in_workers_and_without(featured_root, tmp_path):
    alone = all_inputs(featured_root, tmp_path / "alone", steps=3)
    folder = detect.train(alone)
    detect.train(all_inputs(featured_root, tmp_path / "other", workers=1, steps=3))
    assert without_time(tmp_path / "alone") == without_time(tmp_path / "other")
    assert_same_weights(folder, tmp_path / "other" / "best")
    encoder = SceneEncoder.from_pretrained(folder)
    assert encoder.config["feature_dim"] == 12
    assert encoder.config["channels"] == "color height normal multiview"
    scenes = SceneSamples(alone, "val")
    points_BN3, features_BNF, _ = scenes.batch([0], [np.random.default_rng(0)], augment=False)
    encoding = encoder.eval()(points_BN3, features_BNF)
    assert torch.isfinite(encoding.boxes_BQ7).all()
    features_BNF[..., 7:] = 0
    assert not torch.equal(encoder(points_BN3, features_BNF).tokens_BMD, encoding.tokens_BMD)


def test_features_that_do_not_fit_are_refused_before_training(featured_root, tmp_path):
    config = all_inputs(featured_root, tmp_path / "run")

    def with_file(path) -> DetectConfig:
        return dataclasses.replace(config, data=dataclasses.replace(config.data, multiview=str(path)))

    with pytest.raises(ValueError, match="set data.multiview"):
        detect.train(with_file(""))
    with pytest.raises(ValueError, match="no feature file"):
        detect.train(with_file(tmp_path / "absent.hdf5"))
    with pytest.raises(ValueError, match="takes none"):
        detect.train(dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, multiview_dim=0)))
    with pytest.raises(ValueError, match=f"have {WIDTH} channels, but the scene encoder takes 128"):
        detect.train(dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, multiview_dim=128)))
    with h5py.File(featured_root / "f.hdf5", "a") as file:
        del file["scene0004_00"]
    with pytest.raises(ValueError, match="no features of 1 of 2 scenes, scene0004_00"):
        detect.train(config)
    assert not (tmp_path / "run").exists()


def test_a_run_from_before_these_inputs_goes_on(featured_root, tmp_path):
    config = make_config(featured_root, tmp_path / "run", steps=1)
    detect.train(config)
    saved = tmp_path / "run" / "checkpoints" / "step-000001" / "config.yaml"
    old = to_dict(config)
    for name in ("use_normal", "multiview_dim", "backbone", "ptv3", "use_height"):
        del old["encoder"][name]
    del old["data"]["multiview"], old["data"]["workers"]
    saved.write_text(yaml.safe_dump(old))
    assert detect.train(config, resume=True) == tmp_path / "run" / "best"
    with pytest.raises(ValueError, match="encoder.use_normal: False -> True"):
        detect.train(
            dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, use_normal=True)), resume=True
        )
    old["optim"].pop("lr")  # a key that is missing takes its default, which is another one
    saved.write_text(yaml.safe_dump(old))
    with pytest.raises(ValueError, match="optim.lr: 0.0007 -> 0.002"):
        detect.train(config, resume=True)


@pytest.fixture(scope="module")
def features_of_rooms(rooms_root, tmp_path_factory) -> str:
    return write_features(SceneStore(rooms_root / "prepared"), tmp_path_factory.mktemp("features") / "f.hdf5")


@pytest.fixture(scope="module")
def all_inputs_run(rooms_root, features_of_rooms, tmp_path_factory) -> Path:
    """An SFT run of two steps on every input; its scene encoder trains, so that scenes are sampled again."""
    run_dir = tmp_path_factory.mktemp("runs") / "sft"
    more = ["model.encoder.use_normal=true", f"model.encoder.multiview_dim={WIDTH}", "run.steps=2"]
    more += ["model.train_scene_encoder=true", f"data.multiview={features_of_rooms}"]
    sft.train(sft_config(rooms_root, run_dir, *more))
    return run_dir


def test_the_assembled_model_observes_what_it_was_trained_on(rooms_root, features_of_rooms, all_inputs_run):
    model = SceneVLM.from_pretrained(latest_checkpoint(all_inputs_run) / "model")
    assert (model.settings.use_normal, model.settings.multiview_dim) == (True, WIDTH)
    scene = SceneStore(rooms_root / "prepared")["scene0000_00"]
    with pytest.raises(ValueError, match=f"takes {WIDTH} multi-view features a point, but no file"):
        model.observe(scene)
    model.multiview = open_multiview(features_of_rooms, WIDTH)
    seen, again = model.observe(scene, seed=3), model.observe(scene, seed=3)
    assert seen.features_NF.shape == (512, 7 + WIDTH) and torch.equal(seen.features_NF, again.features_NF)
    vertex_N = np.rint(seen.features_NF[:, 7].numpy() * 1000).astype(int)
    assert scene.vertex_ids_N is not None
    rows_N = np.searchsorted(scene.vertex_ids_N, vertex_N)
    np.testing.assert_array_equal(scene.vertex_ids_N[rows_N], vertex_N)
    np.testing.assert_allclose(seen.points_N3.numpy(), scene.to_model(scene.points_N3[rows_N]))
    assert scene.normals_N3 is not None
    np.testing.assert_array_equal(seen.features_NF[:, 4:7].numpy(), scene.normals_N3[rows_N].astype(np.float32))
    (encoded,) = model.encode([seen])
    assert torch.isfinite(encoded.tokens_TE).all()


def test_grpo_and_evaluation_read_the_same_inputs(rooms_root, features_of_rooms, all_inputs_run, tmp_path):
    with pytest.raises(ValueError, match="set data.multiview"):
        grpo.train(grpo_config(rooms_root, all_inputs_run, tmp_path / "refused", "run.steps=1"))
    file = f"data.multiview={features_of_rooms}"
    grpo.train(grpo_config(rooms_root, all_inputs_run, tmp_path / "grpo", "run.steps=1", file))
    results = evaluate.evaluate(
        eval_config(tmp_path / "grpo", rooms_root, tmp_path / "eval", "data.datasets=scanrefer", file)
    )
    assert json.loads(results.read_text())["results"]["scanrefer"]["questions"] == 3
    with h5py.File(features_of_rooms) as file, h5py.File(tmp_path / "less.hdf5", "w") as less:
        for name in list(file)[:-1]:
            file.copy(name, less)
    more = ["data.datasets=scanrefer", f"data.multiview={tmp_path / 'less.hdf5'}"]
    with pytest.raises(ValueError, match="no features of 1 of 1 scenes"):
        evaluate.evaluate(eval_config(tmp_path / "grpo", rooms_root, tmp_path / "refused", *more))


def test_one_scan_is_asked_about_with_its_features(rooms_root, features_of_rooms, all_inputs_run):
    scan, asked = rooms_root / "scans" / "scene0000_00", ["What is here?"]
    answered = infer(scan, all_inputs_run, asked, multiview=features_of_rooms, max_new_tokens=4, device="cpu")
    assert answered.observation.features_NF.shape[1] == 7 + WIDTH
    with pytest.raises(ValueError, match="for infer --multiview"):
        infer(scan, all_inputs_run, asked, max_new_tokens=4, device="cpu")


def test_models_from_before_take_none_of_them(rooms_root, all_inputs_run, tmp_path):
    run_dir = tmp_path / "plain"
    sft.train(sft_config(rooms_root, run_dir, "run.steps=0"))
    shutil.copytree(latest_checkpoint(run_dir) / "model", tmp_path / "old")
    path = tmp_path / "old" / "scene_vlm.json"
    description = json.loads(path.read_text())
    del description["settings"]["use_normal"], description["settings"]["multiview_dim"]
    path.write_text(json.dumps(description))
    model = SceneVLM.from_pretrained(tmp_path / "old")
    assert (model.settings.use_normal, model.settings.multiview_dim) == (False, 0)
    scene = SceneStore(rooms_root / "prepared")["scene0000_00"]
    assert model.observe(scene).features_NF.shape == (512, 4)
    with pytest.raises(ValueError, match="made with use_normal False, but the configuration says True"):
        sft.train(
            sft_config(rooms_root, tmp_path / "run", f"init={tmp_path / 'old'}", "model.encoder.use_normal=true")
        )
