"""The real labelled instances against facts from elsewhere, and the recipe on a few of them."""

import json
from pathlib import Path

import numpy as np
import pytest

from threedr1.datasets.scan_labels import LABEL_MAP_NAME, load_label_map
from threedr1.datasets.scannet import prepare_scans, read_split
from threedr1.datasets.scannet_instances import (
    FOLDER,
    MATRICES,
    build_scene_of_instances,
    extents,
    read_instances,
    shortfall,
)
from threedr1.datasets.scene_store import SceneStore
from threedr1.engine import detect
from threedr1.engine.config import load_config
from threedr1.models.scene_encoder import SceneEncoder
from threedr1.utils.boxes import box3d_iou
from threedr1.utils.labels import DETECTION_CLASSES

from .. import data_factory as factory

SCENE = "scene0000_00"
RECIPE = Path(__file__).resolve().parents[2] / "script" / "recipes" / "instances.detect.yaml"


@pytest.fixture(scope="module")
def real_root(real_data, tmp_path_factory):
    """All real instances, prepared once for this file."""
    root = tmp_path_factory.mktemp("real")
    (root / FOLDER).symlink_to(real_data / FOLDER)
    for name in (MATRICES, LABEL_MAP_NAME, "scannetv2_train.txt", "scannetv2_val.txt"):
        (root / name).symlink_to(real_data / "scannet" / name)
    assert prepare_scans(root, workers=1) == []
    return root


@pytest.mark.real
def test_real_splits_and_classes(real_root):
    index = SceneStore(real_root / "prepared").index
    assert len(index) == 246
    counts = {}
    for split in ("train", "val"):
        infos = [index[scene_id] for scene_id in read_split(real_root, split) if scene_id in index]
        classes = np.concatenate([info.class_ids_K for info in infos])
        counts[split] = len(infos), len(classes), np.bincount(classes, minlength=18)[:-1].min()
    assert counts == {"train": (222, 6121, 13), "val": (24, 821, 2)}, "scans, objects, objects of the rarest class"


@pytest.mark.real
def test_real_points_fill_their_stored_boxes(real_root):
    """In the raw frame, where the stored boxes are those of all vertices: equal up to thinning and rounding."""
    ious, inside, whole = [], [], []
    for path in sorted((real_root / FOLDER).glob("*.npz")):
        own = read_instances(path)
        corners = [
            np.c_[(c[:, :3] + c[:, 3:]) / 2, c[:, 3:] - c[:, :3], c[:, 0] * 0] for c in (extents(own), own.boxes_K6)
        ]
        ious.append(np.diag(box3d_iou(*(boxes_K7.astype(np.float32) for boxes_K7 in corners))))
        inside.append(shortfall(own))
        whole.append(np.bincount(own.rows_P) == own.point_counts_K)
    ious_K, inside_K6, whole_K = np.concatenate(ious), np.concatenate(inside), np.concatenate(whole)
    assert len(ious_K) == 8730
    assert ious_K.min() > 0.33 and np.mean(ious_K) > 0.94 and np.mean(ious_K > 0.5) > 0.999
    assert inside_K6.min() > -0.004, "nothing stands out by more than float16 rounds"
    assert np.abs(inside_K6[whole_K]).max() < 0.004 and ious_K[whole_K].min() > 0.9, "objects kept whole"
    assert np.percentile(inside_K6, 95) < 0.035 and inside_K6.max() < 0.39, "metres lost by thinning"


@pytest.mark.real
def test_real_walls_stand_along_the_axes(real_root):
    """Flat walls' headings modulo 90 degrees: aligned in the world frame, any in the raw one."""
    off = {"world": [], "raw": []}
    for scene in SceneStore(real_root / "prepared").values():
        inverse_44 = np.linalg.inv(scene.axis_align_44)
        for object_id in np.unique(scene.instance_ids_N[scene.nyu40_N == 1]):
            world_P3 = scene.points_N3[scene.instance_ids_N == object_id].astype(np.float64)
            for name, points_P3 in (("world", world_P3), ("raw", world_P3 @ inverse_44[:3, :3].T)):
                spread_2, axes_22 = np.linalg.eigh(np.cov(points_P3[:, :2].T))
                if len(points_P3) >= 400 and spread_2[0] < 0.02 * spread_2[1]:
                    heading = np.degrees(np.arctan2(axes_22[1, 0], axes_22[0, 0])) % 90
                    off[name].append(min(heading, 90 - heading))
    assert len(off["world"]) > 1000
    assert np.median(off["world"]) < 1.5 and np.mean(np.array(off["world"]) < 3) > 0.8
    assert np.median(off["raw"]) > 10


@pytest.mark.real
def test_real_sizes_are_those_of_the_field(real_root, real_data):
    """The field's mean sizes, taken of all of ScanNet's training scans after alignment."""
    means_C3 = np.load(real_data / "scannet" / "class_mean_sizes.npy")
    index = SceneStore(real_root / "prepared").index.values()
    classes_K = np.concatenate([info.class_ids_K for info in index])
    sizes_K3 = np.concatenate([info.boxes_K7[:, 3:6] for info in index])
    for class_id, name in enumerate(DETECTION_CLASSES[:-1]):  # the last one holds more here: all that is none of these
        own_3 = sizes_K3[classes_K == class_id].mean(0)
        assert 0.75 < own_3.prod() / means_C3[class_id].prod() < 1.4, name


@pytest.mark.real
def test_real_classes_are_those_of_scanrefer(real_root, parity_data):
    index = SceneStore(real_root / "prepared").index
    items = json.loads((parity_data / "scanrefer_grounding.json").read_text())["items"]
    pairs = []
    for item in items:
        if item["scene_id"] in index:
            info = index[item["scene_id"]]
            row = info.row_of(int(item["object_id"]))
            assert row is not None, item
            pairs.append((int(info.class_ids_K[row]), item["semantic_class"]))
    assert len(pairs) == 301
    assert all(ours == theirs for ours, theirs in pairs)


@pytest.mark.real
@pytest.mark.parametrize("most", [10**9, 512])
def test_boxes_of_scene0000_00_come_back_through_the_table(real_data, tmp_path, most):
    """It is not among the instances: cut its raw cloud by its ground-truth boxes and store it in their form."""
    content = json.loads((real_data / "scannet" / "scene0000_00_boxes.json").read_text())
    matrix_44 = np.array(content["axis_align_matrix"])
    truth_K7 = np.array([[*item["box_aligned"], 0] for item in content["instances"]], np.float32)
    raw_V3 = np.load(real_data / "scannet" / "scene0000_00_cloud.npz")["xyz"].astype(np.float64)
    world_V3 = raw_V3 @ matrix_44[:3, :3].T + matrix_44[:3, 3]
    own = [raw_V3[(np.abs(world_V3 - box_7[:3]) <= box_7[3:6] / 2 + 1e-3).all(1)] for box_7 in truth_K7]
    kept = [np.random.default_rng(0).permutation(points_P3)[:most] for points_P3 in own]
    # "garbagebin" is the field's name of the last class
    names = [item["label"].replace("garbagebin", "trash can") for item in content["instances"]]
    factory.write_instances(
        tmp_path,
        object_ids=np.arange(len(own)),
        labels=np.array(names),
        boxes_min_max=np.stack([np.r_[part.min(0), part.max(0)] for part in own]).astype(np.float32),
        point_counts=np.array([len(part) for part in own]),
        points=np.concatenate(kept).astype(np.float16),
        offsets=np.cumsum([0, *map(len, kept)]),
    )
    folder = real_data / "scannet"
    table = load_label_map(folder / LABEL_MAP_NAME)
    scene = build_scene_of_instances(tmp_path / f"{SCENE}.npz", table, folder / MATRICES)
    assert scene.class_ids_K.tolist() == [item["label_id"] for item in content["instances"]]
    ious_K = np.diag(box3d_iou(scene.boxes_K7, truth_K7))
    assert len(ious_K) == 27
    assert ious_K.min() > 0.87 and np.median(ious_K) > 0.98 and (ious_K > 0.9).sum() >= 26
    still = tmp_path / "still.json"
    still.write_text(json.dumps({SCENE: np.eye(4).ravel().tolist()}))
    wrong = build_scene_of_instances(tmp_path / f"{SCENE}.npz", table, still)
    assert np.diag(box3d_iou(wrong.boxes_K7, truth_K7)).max() < 0.05, "without the alignment none would"


@pytest.mark.real
def test_the_recipe_trains_on_a_few_real_scans(real_root, tmp_path):
    """The recipe's own settings but for size: two steps on a CPU, evaluated, the encoder saved and read back."""
    root = tmp_path / "data"
    root.mkdir()
    (root / "prepared").symlink_to(real_root / "prepared")
    for split in ("train", "val"):
        there = [name for name in read_split(real_root, split) if (root / "prepared" / f"{name}.npz").exists()]
        (root / f"scannetv2_{split}.txt").write_text("\n".join(there[:2]))
    small = ("num_tokens=64", "num_neighbors=8", "width=32", "encoder_layers=1", "decoder_layers=1", "num_queries=32")
    overrides = [f"encoder.{setting}" for setting in small]
    overrides += [f"data.root={root}", "data.num_points=2048", "data.workers=0"]
    overrides += [f"run.dir={tmp_path / 'run'}", "run.steps=2", "run.batch_size=2", "run.device=cpu"]
    config = load_config("detect", RECIPE, overrides)
    assert config.augment.enabled and config.augment.object_dropout and not config.encoder.use_color
    encoder = SceneEncoder.from_pretrained(detect.train(config))
    assert encoder.config["feature_dim"] == 1, "height alone"
    scores = json.loads((tmp_path / "run" / "detection.json").read_text())
    assert scores["scenes"] == 2 and 0 <= scores["0.25"]["mAP"] <= 1


@pytest.mark.real
def test_the_recipe_samples_most_real_scans_whole(real_root):
    config = load_config("detect", RECIPE)
    counts = [len(scene.points_N3) for scene in SceneStore(real_root / "prepared").values()]
    assert 0.7 < np.mean(np.array(counts) <= config.data.num_points) < 0.8
