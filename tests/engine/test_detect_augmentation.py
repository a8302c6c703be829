"""Augmentation of the detector's samples: what configurations ask for, old ones included, and what samples hold."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import yaml

from threedr1.datasets.scene import save_scene
from threedr1.datasets.transforms import Augmentation, object_outlines
from threedr1.engine import detect
from threedr1.engine.config import AugmentConfig, DataConfig, DetectConfig, EncoderConfig, load_config, to_dict
from threedr1.engine.detection_data import CloudSampler, SceneSamples
from threedr1.engine.runtime import Runtime
from threedr1.models.scene_encoder.inputs import sample_indices
from threedr1.utils.streams import stream

from .test_detect import make_config, make_scene

RECIPES = Path(detect.__file__).parents[1] / "script" / "recipes"
EVERYTHING = AugmentConfig(
    max_angle=180.0, cuboid=0.7, cuboid_min_points=0.1, color=0.2, color_noise=0.02, color_drop=0.2, jitter=2.0
)


def sampler(augment: AugmentConfig, num_points: int = 512, **encoder) -> CloudSampler:
    config = DetectConfig(data=DataConfig(num_points=num_points), encoder=EncoderConfig(**encoder), augment=augment)
    return CloudSampler(config, augment=True)


def write_root(folder: Path) -> Path:
    for number in range(3):
        scene_id = f"scene{number:04d}_00"
        save_scene(make_scene(scene_id, number), folder / "prepared" / f"{scene_id}.npz")
    (folder / "scannetv2_train.txt").write_text("scene0000_00\nscene0001_00\n")
    (folder / "scannetv2_val.txt").write_text("scene0002_00\n")
    return folder


# ---- configuration


def test_true_and_false_switch_augmentation_as_in_older_recipes(tmp_path):
    assert load_config("detect", None).augment == AugmentConfig(enabled=True)
    assert load_config("detect", None, ["augment=false"]).augment == AugmentConfig(enabled=False)
    old, recipe = tmp_path / "old.yaml", tmp_path / "mine.yaml"
    old.write_text("augment: true\n")
    assert load_config("detect", old).augment == AugmentConfig()
    assert load_config("detect", old, ["augment.cuboid=0.5"]).augment == AugmentConfig(cuboid=0.5)
    old.write_text("augment: false\n")
    recipe.write_text("base: old.yaml\naugment:\n  jitter: 1\n")
    assert load_config("detect", recipe).augment == AugmentConfig(enabled=False, jitter=1.0), "groups are merged"
    assert load_config("detect", recipe, ["augment=true"]).augment == AugmentConfig(jitter=1.0)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("augment=3", "Config key augment takes a mapping, not 3."),
        ("augment.cuboids=1", "Unknown config key 'augment.cuboids'; did you mean 'cuboid'?"),
        ("augment.cuboid=1.5", "Config key augment.cuboid is 1.5; it must be within 0 and 1."),
        ("augment.object_dropout=-0.1", "Config key augment.object_dropout is -0.1; it must be within 0 and 1."),
        ("augment.max_angle=200", "Config key augment.max_angle is 200.0; it is in degrees, from 0 to 180."),
        ("augment.scale_low=1.2", "Config key augment.scale_low is 1.2; it must be above 0 and not above scale_high."),
        ("augment.jitter=-1", "Config key augment.jitter is -1.0; it must not be below 0."),
        ("run=true", "Config key run takes a mapping, not True."),
    ],
)
def test_settings_that_make_no_sense_are_one_sentence(override, message):
    with pytest.raises(ValueError) as caught:
        load_config("detect", None, [override])
    assert str(caught.value) == message


def test_runs_from_before_augmentation_was_a_group_go_on(tmp_path):
    config = make_config(write_root(tmp_path / "data"), tmp_path / "run", steps=1)
    detect.train(config)
    saved = tmp_path / "run" / "checkpoints" / "step-000001" / "config.yaml"
    old = to_dict(config) | {"augment": True}
    del old["precision"], old["ema_decay"], old["queries_per_object"]
    saved.write_text(yaml.safe_dump(old))
    assert detect.train(config, resume=True) == tmp_path / "run" / "best"
    cut = dataclasses.replace(config, augment=AugmentConfig(cuboid=0.5))
    with pytest.raises(ValueError, match=r"augment.cuboid: 0.0 -> 0.5"):
        detect.train(cut, resume=True)


# ---- samples


def test_a_cut_does_not_change_how_the_scene_is_turned():
    scene = make_scene("scene0000_00", 0)
    for seed in range(10):
        plain, cut = (
            sampler(AugmentConfig(cuboid=share, cuboid_min_points=0.05))._augmented(0, scene, stream(1, seed))
            for share in (0.0, 1.0)
        )
        assert plain.change == cut.change and not np.array_equal(plain.kept_N, cut.kept_N)


def test_the_defaults_sample_as_they_did_before_there_was_more():
    """Points first, then the transform, from the sample's own stream."""
    scene = make_scene("scene0000_00", 0)
    sample = sampler(AugmentConfig())(0, scene, stream(1, 2))
    rng = stream(1, 2)
    kept_N = sample_indices(len(scene.points_N3), 512, rng)
    transform = Augmentation().draw(rng)
    outlines = object_outlines(scene.to_model(scene.points_N3), scene.instance_ids_N, scene.object_ids_K)
    points_N3 = transform.points(scene.to_model(scene.points_N3[kept_N]))
    np.testing.assert_array_equal(sample.inputs.points_N3, points_N3)
    np.testing.assert_array_equal(sample.inputs.features_NF[:, :3], scene.colors_N3[kept_N].astype(np.float32) / 255)
    np.testing.assert_array_equal(sample.inputs.features_NF[:, 3], points_N3[:, 2])
    boxes_K7 = transform.axis_aligned_boxes(scene.to_model(scene.boxes_K7), outlines)
    np.testing.assert_array_equal(sample.boxes_K7, boxes_K7)


def test_a_scene_is_cut_before_its_points_are_sampled():
    """As many different points as without a cut, though fewer than half of the scene's are inside."""
    scene = make_scene("scene0000_00", 1)
    still = {"flip": False, "quarter_turns": False, "max_angle": 0.0, "scale_low": 1.0, "scale_high": 1.0}
    cut = sampler(AugmentConfig(cuboid=1.0, cuboid_min_points=0.2, **still), num_points=300)
    cut_to = []
    for seed in range(30):
        sample = cut(0, scene, stream(seed))
        points_N3 = sample.inputs.points_N3
        assert len(np.unique(points_N3, axis=0)) == 300
        assert len(sample.boxes_K7) == len(sample.class_ids_K) > 0
        inside_N = (scene.to_model(scene.points_N3) >= points_N3.min(0)).all(1)
        inside_N &= (scene.to_model(scene.points_N3) <= points_N3.max(0)).all(1)
        cut_to.append(inside_N.mean())
        for box_7, class_id in zip(sample.boxes_K7, sample.class_ids_K, strict=True):
            whole_7 = scene.to_model(scene.boxes_K7)[list(scene.class_ids_K).index(class_id)]
            assert (np.abs(box_7[:3] - whole_7[:3]) + box_7[3:6] / 2 <= whole_7[3:6] / 2 + 1e-5).all()
    assert 0.15 < np.median(cut_to) < 0.8


def test_colours_change_only_where_they_are_read():
    scene = make_scene("scene0000_00", 0)
    colored = AugmentConfig(color=0.2, color_noise=0.05)
    plain, changed = (sampler(config)(0, scene, stream(3)).inputs for config in (AugmentConfig(), colored))
    assert np.abs(plain.features_NF[:, :3] - changed.features_NF[:, :3]).max() > 0.05
    np.testing.assert_array_equal(plain.features_NF[:, 3], changed.features_NF[:, 3])
    np.testing.assert_array_equal(plain.points_N3, changed.points_N3)
    heights = sampler(colored, use_color=False)(0, scene, stream(3)).inputs.features_NF
    np.testing.assert_array_equal(heights, plain.features_NF[:, 3:])


def test_objects_are_dropped_from_clouds_of_instances_alone():
    scene = make_scene("scene0000_00", 0)
    dropping = sampler(AugmentConfig(object_dropout=0.5), num_points=900)
    with pytest.raises(ValueError, match="set augment.object_dropout to 0"):
        dropping(0, scene, stream(0))
    things_N = scene.instance_ids_N >= 0
    arrays = ("points_N3", "colors_N3", "instance_ids_N", "nyu40_N")
    alone = dataclasses.replace(scene, **{name: getattr(scene, name)[things_N] for name in arrays})
    seen = set()
    for seed in range(30):
        sample = dropping(0, alone, stream(seed))
        assert len(np.unique(sample.inputs.points_N3, axis=0)) == 300 * len(sample.class_ids_K)
        seen.add(tuple(sample.class_ids_K))
    assert {len(classes) for classes in seen} == {1, 2, 3}


def test_batches_with_everything_on_repeat_and_workers_change_nothing(tmp_path):
    alone = make_config(write_root(tmp_path / "data"), tmp_path / "run", steps=4)
    alone = dataclasses.replace(alone, augment=EVERYTHING)
    pair = dataclasses.replace(alone, data=dataclasses.replace(alone.data, workers=2))
    runtime = Runtime(device=detect.torch.device("cpu"))
    samples, others, later = (SceneSamples(config, "train") for config in (alone, pair, alone))
    with others.loader:
        for step in range(4):
            batch, other = (each.training_batch(step, runtime) for each in (samples, others))
            assert_same(batch, other)
    assert_same(batch, later.training_batch(3, runtime))


def test_a_resumed_run_with_everything_on_equals_one_that_was_not(tmp_path, monkeypatch):
    root = write_root(tmp_path / "data")
    whole, broken = (
        dataclasses.replace(make_config(root, tmp_path / name, steps=4, save_every=2), augment=EVERYTHING)
        for name in ("whole", "broken")
    )
    detect.train(whole)
    real_step = detect.train_step

    def killed(encoder, criterion, scenes, step, runtime):
        if step == 3:
            raise KeyboardInterrupt
        return real_step(encoder, criterion, scenes, step, runtime)

    monkeypatch.setattr(detect, "train_step", killed)
    with pytest.raises(KeyboardInterrupt):
        detect.train(broken)
    monkeypatch.setattr(detect, "train_step", real_step)
    detect.train(broken, resume=True)
    last = Path("checkpoints") / "step-000004" / "model" / "model.safetensors"
    assert (tmp_path / "whole" / last).read_bytes() == (tmp_path / "broken" / last).read_bytes()


def assert_same(batch, other) -> None:
    for one, two in zip(batch[:2], other[:2], strict=True):
        assert detect.torch.equal(one, two)
    assert batch[2].counts == other[2].counts
    for scene in range(len(batch[2].counts)):
        for one, two in zip(batch[2].of_scene(scene), other[2].of_scene(scene), strict=True):
            assert detect.torch.equal(one, two)
