"""Pre-training of the scene encoder: what it writes, exact resume, equality across ranks, bad input."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from threedr1.datasets.scene import Scene, floor_centre, save_scene
from threedr1.engine import detect
from threedr1.engine.checkpoint import list_checkpoints
from threedr1.engine.config import DetectConfig, from_dict, save_config, to_dict
from threedr1.engine.detection_data import SceneSamples
from threedr1.engine.runtime import init_runtime
from threedr1.engine.tracking import read_metrics
from threedr1.models.scene_encoder import SceneEncoder
from threedr1.utils.labels import DETECTION_CLASSES, NUM_CLASSES

ROOT = Path(__file__).resolve().parents[2]


def make_scene(scene_id: str, seed: int) -> Scene:
    """A floor with three coloured boxes of three classes."""
    rng = np.random.default_rng(seed)
    points, colors, ids = [np.c_[rng.uniform(-2, 2, (900, 2)), np.zeros(900)]], [np.full((900, 3), 120)], [-1] * 900
    boxes = []
    for object_id, centre_2 in enumerate(rng.permutation([[-1.2, -1], [1, -1], [1, 1.1], [-1, 1]])[:3]):
        size_3 = np.array([0.5, 0.7, 0.4 + 0.4 * object_id]) * rng.uniform(0.9, 1.1, 3)
        low_3 = np.array([*centre_2, 0.0]) - [size_3[0] / 2, size_3[1] / 2, 0]
        points.append(low_3 + rng.random((300, 3)) * size_3)
        colors.append(np.full((300, 3), 60 * object_id))
        ids += [object_id] * 300
        boxes.append([*(points[-1].min(0) + points[-1].max(0)) / 2, *np.ptp(points[-1], axis=0), 0])
    points_N3 = np.concatenate(points).astype(np.float32)
    return Scene(
        scene_id=scene_id,
        points_N3=points_N3,
        colors_N3=np.concatenate(colors).astype(np.uint8),
        instance_ids_N=np.array(ids, np.int32),
        nyu40_N=np.zeros(len(points_N3), np.uint8),
        object_ids_K=np.arange(3, dtype=np.int32),
        object_labels=["box"] * 3,
        class_ids_K=np.array([2, 4, 7], np.int32),
        boxes_K7=np.array(boxes, np.float32),
        axis_align_44=np.eye(4),
        origin_3=floor_centre(points_N3),
    )


@pytest.fixture
def data_root(tmp_path) -> Path:
    root = tmp_path / "data"
    for number in range(5):
        scene_id = f"scene{number:04d}_00"
        save_scene(make_scene(scene_id, number), root / "prepared" / f"{scene_id}.npz")
    (root / "scannetv2_train.txt").write_text("scene0000_00\nscene0001_00\nscene0002_00\n")
    (root / "scannetv2_val.txt").write_text("scene0003_00\nscene0004_00\n")
    return root


PTV3 = {
    "backbone": "ptv3",
    "ptv3": {
        "grid_size": 0.1,
        "strides": [2],
        "enc_depths": [1, 1],
        "enc_channels": [8, 16],
        "enc_heads": [2, 2],
        "dec_depths": [1],
        "dec_channels": [16],
        "dec_heads": [2],
        "patch_size": 64,
        "stem_kernel": 3,
    },
}
both_backbones = pytest.mark.parametrize("backbone", [{}, PTV3], ids=["pointnet2", "ptv3"])


def make_config(data_root: Path, run_dir: Path, backbone: dict | None = None, **run) -> DetectConfig:
    encoder = {
        "num_tokens": 32,
        "radius": 0.4,
        "num_neighbors": 8,
        "width": 32,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "num_heads": 2,
        "num_queries": 12,
        "dropout": 0.1,
    } | (backbone or {})
    run = {"dir": str(run_dir), "steps": 6, "batch_size": 2, "log_every": 1, "save_every": 3, "device": "cpu"} | run
    data = {"root": str(data_root), "num_points": 512}
    return from_dict(
        DetectConfig, {"run": run, "data": data, "encoder": encoder, "optim": {"lr": 2e-3, "warmup_steps": 2}}
    )


def without_time(run_dir: Path) -> list[dict]:
    return [
        {name: value for name, value in row.items() if name != "seconds"}
        for row in read_metrics(run_dir / "metrics.jsonl")
    ]


def assert_same_weights(first: Path, second: Path) -> None:
    weights, others = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, others[name]), name


@both_backbones
def test_a_killed_and_resumed_run_equals_one_that_was_not(data_root, tmp_path, monkeypatch, backbone):
    whole = make_config(data_root, tmp_path / "whole", backbone, eval_every=3)
    whole = dataclasses.replace(whole, ema_decay=0.9, precision="bfloat16", queries_per_object=2)
    folder = detect.train(whole)
    assert folder == tmp_path / "whole" / "best"
    assert SceneEncoder.from_pretrained(tmp_path / "whole").config["width"] == 32
    scores = json.loads((tmp_path / "whole" / "detection.json").read_text())
    assert scores["scenes"] == 2 and 0 <= scores["0.25"]["mAP"] <= 1
    rows = without_time(tmp_path / "whole")
    assert [row["step"] for row in rows] == [0, 1, 2, 2, 3, 4, 5, 5]
    assert sum("map25" in row for row in rows) == 2

    broken = dataclasses.replace(whole, run=dataclasses.replace(whole.run, dir=str(tmp_path / "broken")))
    real_step = detect.train_step

    def killed_at_step_4(encoder, criterion, scenes, step, *more):
        if step == 4:
            raise KeyboardInterrupt
        return real_step(encoder, criterion, scenes, step, *more)

    monkeypatch.setattr(detect, "train_step", killed_at_step_4)
    with pytest.raises(KeyboardInterrupt):
        detect.train(broken)
    monkeypatch.setattr(detect, "train_step", real_step)
    with pytest.raises(ValueError, match="--resume"):
        detect.train(broken)
    detect.train(broken, resume=True)
    assert without_time(tmp_path / "broken") == rows
    last = Path("checkpoints") / "step-000006" / "model"
    assert_same_weights(tmp_path / "whole" / last, tmp_path / "broken" / last)
    assert_same_weights(tmp_path / "whole" / "best", tmp_path / "broken" / "best")


def test_workers_change_nothing(data_root, tmp_path):
    alone = make_config(data_root, tmp_path / "alone", steps=4)
    pair = make_config(data_root, tmp_path / "pair", steps=4)
    pair = dataclasses.replace(pair, data=dataclasses.replace(pair.data, workers=2))
    detect.train(alone)
    detect.train(pair)
    assert without_time(tmp_path / "pair") == without_time(tmp_path / "alone")
    assert_same_weights(tmp_path / "alone" / "best", tmp_path / "pair" / "best")


def test_the_best_encoder_is_kept_and_not_the_last(data_root, tmp_path, monkeypatch):
    values = iter([(0.3, 0.2), (0.4, 0.1)])  # the best at IoU 0.5 counts

    def scores(*_):
        entries = [{"mAP": value, "AR": 0.0} for value in next(values)]
        return dict(zip(("0.25", "0.5"), entries, strict=True))

    monkeypatch.setattr(detect, "evaluate_encoder", scores)
    folder = detect.train(make_config(data_root, tmp_path / "run", eval_every=3))
    assert_same_weights(folder, tmp_path / "run" / "checkpoints" / "step-000003" / "model")
    assert json.loads((tmp_path / "run" / "detection.json").read_text())["step"] == 3


class Finder(torch.nn.Module):
    """In place of an encoder: finds all objects of two scenes, and a chair besides, of which it is surest."""

    def __init__(self, boxes_B37: torch.Tensor, chair_B7: torch.Tensor):
        super().__init__()
        self.boxes_B47 = torch.cat([boxes_B37, chair_B7[:, None]], dim=1)

    def forward(self, points_BN3, features_BNF):
        logits_BQC1 = torch.full((2, 4, NUM_CLASSES + 1), -20.0)
        logits_BQC1[..., -1] = 0.0
        for query, (class_id, logit) in enumerate([(2, 5.0), (4, 5.0), (7, 5.0), (2, 9.0)]):
            logits_BQC1[:, query, class_id] = logit
        return SimpleNamespace(boxes_BQ7=self.boxes_B47, class_logits_BQC1=logits_BQC1)


def test_empty_boxes_are_left_out_of_the_scores(data_root, tmp_path, monkeypatch):
    """By hand: two false chairs come before the two true ones, precision 1/3 and 2/4, unless nothing is in them."""
    scored = []
    plain = detect.evaluate_detections
    monkeypatch.setattr(
        detect, "evaluate_detections", lambda found, *rest, **more: scored.extend(found) or plain(found, *rest, **more)
    )
    scenes = detect.SceneSamples(make_config(data_root, tmp_path / "run"), "val")
    boxes_237 = torch.stack([torch.as_tensor(scene.to_model(scene.boxes_K7)) for scene in (scenes[0], scenes[1])])
    names = [DETECTION_CLASSES[number] for number in (2, 4, 7)]
    for lifted, expected in ((0.35, [0.5, 1.0, 1.0]), (5.0, [1.0, 1.0, 1.0])):
        chair_27 = boxes_237[:, 0] + torch.tensor([0, 0, lifted, 0, 0, 0, 0])
        scores = detect.evaluate_encoder(Finder(boxes_237, chair_27), scenes, init_runtime("cpu"))
        assert [scores["0.25"]["AP"][name] for name in names] == expected
        # nothing is left for the host to find
        assert [len(scene.boxes_K7) for scene in scored] == [4 if lifted < 1 else 3] * 2
        assert all(scene.points_P3 is None for scene in scored)
        scored.clear()


def test_the_averaged_weights_are_evaluated_and_kept(data_root, tmp_path):
    """Recomputed from the weights of every step."""
    config = make_config(data_root, tmp_path / "run", steps=3, save_every=1, keep_checkpoints=0)
    config = dataclasses.replace(config, ema_decay=0.2)
    start = make_config(data_root, tmp_path / "start", steps=0)
    weights = [load_file(detect.train(start) / "model.safetensors")]
    folder = detect.train(config)
    for checkpoint in list_checkpoints(tmp_path / "run"):
        weights.append(load_file(checkpoint / "model" / "model.safetensors"))
    assert len(weights) == 4
    kept = load_file(folder / "model.safetensors")
    for name, value in kept.items():
        expected = weights[0][name]
        for step, now in enumerate(weights[1:]):
            decay = min(0.2, (1 + step) / (10 + step))
            expected = decay * expected + (1 - decay) * now[name]
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6, msg=name)
    assert not torch.equal(kept["class_head.0.weight"], weights[3]["class_head.0.weight"])


def test_a_resumed_run_wants_the_same_scenes(data_root, tmp_path):
    config = make_config(data_root, tmp_path / "run", steps=2, save_every=1)
    detect.train(config)
    (data_root / "scannetv2_train.txt").write_text("scene0000_00\nscene0002_00\n")
    with pytest.raises(ValueError, match="training data has changed"):
        detect.train(config, resume=True)


def test_runs_from_before_the_choice_of_a_backbone_go_on(data_root, tmp_path):
    config = make_config(data_root, tmp_path / "run", steps=1)
    detect.train(config)
    saved = tmp_path / "run" / "checkpoints" / "step-000001" / "config.yaml"
    old = to_dict(config)
    del old["encoder"]["backbone"], old["encoder"]["ptv3"]
    saved.write_text(yaml.safe_dump(old))
    assert detect.train(config, resume=True) == tmp_path / "run" / "best"
    other = make_config(data_root, tmp_path / "run", PTV3, steps=1)
    with pytest.raises(ValueError, match="encoder.backbone: pointnet2 -> ptv3"):
        detect.train(other, resume=True)


def test_no_steps_write_the_untrained_encoder(data_root, tmp_path):
    folder = detect.train(make_config(data_root, tmp_path / "run", steps=0))
    assert SceneEncoder.from_pretrained(folder).config["num_queries"] == 12


def test_samples_follow_their_stream_and_not_their_neighbours(data_root, tmp_path):
    scenes = SceneSamples(make_config(data_root, tmp_path / "run"), "train")
    streams = [np.random.default_rng(seed) for seed in (1, 2)]
    points_BN3, features_BNF, targets = scenes.batch([0, 2], streams, augment=True)
    alone_BN3, alone_BNF, alone = scenes.batch([2], [np.random.default_rng(2)], augment=True)
    assert points_BN3.shape == (2, 512, 3) and features_BNF.shape == (2, 512, 4)
    assert torch.equal(points_BN3[1:], alone_BN3) and torch.equal(features_BNF[1:], alone_BNF)
    assert torch.equal(targets.of_scene(1)[0], alone.of_scene(0)[0])
    assert targets.of_scene(0)[1].tolist() == [2, 4, 7]
    plain_BN3, _, plain = scenes.batch([2], [np.random.default_rng(2)], augment=False)
    assert not torch.equal(plain_BN3, alone_BN3)
    assert plain.of_scene(0)[0][:, 2].min() > 0, "boxes stand on the floor of the model frame"


def test_scenes_without_objects_and_with_more_than_there_are_queries(data_root, tmp_path):
    """An empty scene teaches that everything is background; with 2 queries, one of 3 objects gets none."""
    for split in ("train", "val"):
        scene_id = (data_root / f"scannetv2_{split}.txt").read_text().split()[0]
        scene = make_scene(scene_id, 0)
        empty = dataclasses.replace(
            scene,
            instance_ids_N=np.full_like(scene.instance_ids_N, -1),
            object_ids_K=scene.object_ids_K[:0],
            object_labels=[],
            class_ids_K=scene.class_ids_K[:0],
            boxes_K7=scene.boxes_K7[:0],
        )
        save_scene(empty, data_root / "prepared" / f"{scene_id}.npz")
    config = make_config(data_root, tmp_path / "run", {"num_queries": 2}, batch_size=3, steps=3)
    detect.train(config)
    losses = [row["loss"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert len(losses) == 3 and np.isfinite(losses).all()
    (data_root / "scannetv2_train.txt").write_text("scene0000_00\n")
    (data_root / "scannetv2_val.txt").write_text("scene0003_00\n")
    detect.train(make_config(data_root, tmp_path / "nothing", batch_size=1, steps=2))
    scores = json.loads((tmp_path / "nothing" / "detection.json").read_text())
    assert scores["0.25"]["mAP"] == scores["0.5"]["AR"] == 0.0


def test_the_best_encoder_is_there_after_every_run(data_root, tmp_path):
    """Also where a kill came between removing the old one and renaming the new one, or an older run left one."""
    config = make_config(data_root, tmp_path / "run", steps=2)
    folder = detect.train(config)
    first = load_file(folder / "model.safetensors")
    shutil.rmtree(folder)
    assert detect.train(config, resume=True) == folder
    for name, value in load_file(folder / "model.safetensors").items():
        assert torch.equal(value, first[name])
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(ValueError, match="holds the model of an earlier run"):
        detect.train(make_config(data_root, tmp_path / "run", steps=0))
    untrained = detect.train(make_config(data_root, tmp_path / "run", steps=0), resume=True)
    assert not torch.equal(
        load_file(untrained / "model.safetensors")["class_head.0.weight"], first["class_head.0.weight"]
    )
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_class_outside_the_map_is_refused(data_root, tmp_path):
    scene = make_scene("scene0000_00", 0)
    scene.class_ids_K[1] = 23
    save_scene(scene, data_root / "prepared" / "scene0000_00.npz")
    with pytest.raises(ValueError, match="object of class 23; classes run from 0 to 17"):
        detect.train(make_config(data_root, tmp_path / "run", batch_size=3, steps=1))


def test_missing_data_and_settings_that_do_not_fit_are_explained(data_root, tmp_path):
    config = make_config(data_root, tmp_path / "run")
    (data_root / "scannetv2_val.txt").write_text("scene0707_00\n")
    with pytest.raises(ValueError, match="No scene of split val is prepared"):
        detect.train(config)
    with pytest.raises(ValueError, match="micro_batch_size"):
        detect.train(dataclasses.replace(config, run=dataclasses.replace(config.run, micro_batch_size=1)))
    with pytest.raises(ValueError, match="run.best_metric is 'map99'; choose ar25, ar50, map25, map50"):
        detect.train(dataclasses.replace(config, run=dataclasses.replace(config.run, best_metric="map99")))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@both_backbones
def test_two_ranks_equal_one_with_the_same_global_batch(data_root, tmp_path, backbone):
    """Two processes of one scene each against one process of two: the same gradients up to rounding."""
    quiet = {"steps": 3, "save_every": 3}
    if backbone:  # what is drawn differs between ranks
        backbone = PTV3 | {"ptv3": PTV3["ptv3"] | {"drop_path": 0.0, "shuffle_orders": False}}
    alone = make_config(data_root, tmp_path / "alone", backbone, batch_size=2, **quiet)
    pair = make_config(data_root, tmp_path / "pair", backbone, batch_size=2, **quiet)
    alone, pair = (
        dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, dropout=0.0))
        for config in (alone, pair)
    )
    detect.train(alone)
    save_config(pair, tmp_path / "pair.yaml")
    worker = tmp_path / "worker.py"
    worker.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT / 'tests')!r})\nimport conftest\n"
        "from threedr1.engine.config import load_config\nfrom threedr1.engine.detect import train\n"
        "train(load_config('detect', sys.argv[1]))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--standalone"]
    subprocess.run(
        [*command, str(worker), str(tmp_path / "pair.yaml")],
        check=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    last = Path("checkpoints") / "step-000003" / "model" / "model.safetensors"
    weights, others = load_file(tmp_path / "alone" / last), load_file(tmp_path / "pair" / last)
    for name, weight in weights.items():
        torch.testing.assert_close(others[name], weight, rtol=1e-3, atol=2e-4, msg=name)
    losses = [[row["loss"] for row in without_time(tmp_path / name) if "loss" in row] for name in ("alone", "pair")]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
