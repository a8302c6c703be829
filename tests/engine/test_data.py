"""Which samples the loops get: splits by data set, and records whose scene or object is not there."""

import json
import shutil

import numpy as np
import pytest

from threedr1.datasets.scannet import prepare_scans
from threedr1.datasets.scene import save_scene
from threedr1.engine.config import DataConfig
from threedr1.engine.data import load_dataset, load_evaluated, load_split, open_store

from .. import data_factory as factory

SQA3D = ("v1_balanced_questions_{}_scannetv2.json", "v1_balanced_sqa_annotations_{}_scannetv2.json")
SCANQA = "ScanQA_v1.0_val.json"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = factory.write_root(tmp_path_factory.mktemp("root"))
    assert prepare_scans(root, workers=1) == []
    for name in SQA3D:  # SQA3D's test questions are about scenes of ScanNet's validation split
        shutil.copy(root / "annotations" / name.format("val"), root / "annotations" / name.format("test"))
    return root


@pytest.fixture
def root(prepared, tmp_path):
    for name in ("annotations", "prepared"):
        shutil.copytree(prepared / name, tmp_path / name)
    for path in prepared.glob("scannetv2*"):
        shutil.copy(path, tmp_path)
    return tmp_path


def config(root, *datasets, **options):
    return DataConfig(root=str(root), datasets=datasets, **options)


def test_a_data_set_may_be_evaluated_on_a_split_of_its_own(root):
    data = config(root, "scanrefer", "sqa3d", eval_splits={"sqa3d": "test"})
    assert not (root / "scannetv2_test.txt").exists()
    refer, sqa3d = load_evaluated(data, open_store(data), 0)
    assert (refer.split, refer.task, len(refer.samples)) == ("val", "grounding", 2)
    assert (sqa3d.split, sqa3d.task, len(sqa3d.samples)) == ("test", "situated_qa", 1)
    assert {sample.scene_id for sample in sqa3d.samples} == {"scene0001_00"}
    with pytest.raises(ValueError, match="Unknown data set 'sqa3'; did you mean 'sqa3d'"):
        load_evaluated(config(root, "scanrefer", eval_splits={"sqa3": "test"}), open_store(data), 0)
    with pytest.raises(ValueError, match="There is no annotation file .*ScanRefer_filtered_test.json"):
        load_evaluated(config(root, "scanrefer", eval_splits={"scanrefer": "test"}), open_store(data), 0)
    with pytest.raises(ValueError, match="There is no split file"):
        load_evaluated(config(root, "scanrefer", eval_split="test"), open_store(data), 0)


def change(root, edit):
    path = root / "annotations" / SCANQA
    (good,) = json.loads(path.read_text())
    path.write_text(json.dumps([good, *edit(good)]))


def test_missing_scenes_and_objects_are_left_out_and_counted(root, caplog):
    change(
        root,
        lambda good: [
            {**good, "question_id": "a", "scene_id": "scene0777_00"},
            {**good, "question_id": "b", "scene_id": "scene0778_00"},
            {**good, "question_id": "c", "object_ids": [55]},
        ],
    )
    strict = config(root, "scanqa")
    with pytest.raises(ValueError, match=r"names scene scene0777_00.*and 2 more records cannot be used"):
        load_dataset(strict, "scanqa", "val", open_store(strict), 0)
    data = config(root, "scanqa", missing="skip")
    for _ in range(2):  # read, and read back
        caplog.clear()
        loaded = load_dataset(data, "scanqa", "val", open_store(data), 0)
        assert len(loaded.samples) == 1
        assert loaded.left_out == {"missing_object": 1, "missing_scene": 2}
        text = "scanqa, val: 1 records kept, 1 missing object, 2 missing scene left out"
        assert [row.getMessage() for row in caplog.records if "left out" in row.getMessage()] == [text]
    assert len(load_split(config(root, "scanqa", missing="skip"), "val", 0)[0]) == 1
    with pytest.raises(ValueError, match="names scene scene0777_00"):
        load_dataset(strict, "scanqa", "val", open_store(strict), 0)


def test_skip_does_not_pass_over_broken_records(root):
    change(root, lambda good: [{**good, "question_id": "a", "answers": 5}, {**good, "scene_id": "scene0777_00"}])
    data = config(root, "scanqa", missing="skip")
    with pytest.raises(ValueError, match=r"row 2: 'answers' is int"):
        load_dataset(data, "scanqa", "val", open_store(data), 0)


def test_nothing_left_says_how_many_were_left_out(root):
    path = root / "annotations" / SCANQA
    (good,) = json.loads(path.read_text())
    path.write_text(json.dumps([{**good, "scene_id": "scene0777_00"}]))
    data = config(root, "scanqa", missing="skip")
    with pytest.raises(ValueError, match=r"No samples of scanqa in split val .*\(1 records were left out"):
        load_evaluated(data, open_store(data), 0)


def test_missing_takes_one_of_two_words():
    with pytest.raises(ValueError, match="missing is 'ignore'; choose error or skip"):
        DataConfig(missing="ignore")


@pytest.fixture(scope="module")
def real_root(real_data, tmp_path_factory):
    """A root with the real annotations, and as scenes the annotated objects of the scans that are there."""
    root = tmp_path_factory.mktemp("real")
    (root / "annotations").symlink_to(real_data / "annotations")
    shutil.copy(real_data / "scannet" / "scannetv2_val.txt", root)
    alignments = json.loads((real_data / "scannet" / "scans_axis_alignment_matrices.json").read_text())
    for path in sorted((real_data / "scannet_instances").glob("*.npz")):
        with np.load(path) as scan:
            ids_K, raw_K6, labels = scan["object_ids"], scan["boxes_min_max"], scan["labels"].tolist()
        scene = factory.scene_of_boxes(path.stem, ids_K, raw_K6, labels, np.reshape(alignments[path.stem], (4, 4)))
        save_scene(scene, root / "prepared" / f"{path.stem}.npz")
    return root


@pytest.mark.real
def test_part_of_scannet_can_be_evaluated_and_says_how_much(real_root):
    names = ("scanqa", "sqa3d", "scanrefer_targets", "nr3d_targets", "dialogue")
    data = DataConfig(root=str(real_root), datasets=names, eval_splits={"sqa3d": "test"}, missing="skip")
    parts = {part.dataset: part for part in load_evaluated(data, open_store(data), 0)}
    counts = {name: (len(parts[name].samples), parts[name].left_out) for name in names}
    assert counts["scanqa"] == (919, {"missing_object": 50, "missing_scene": 3706})
    assert counts["scanrefer_targets"] == (1930, {"missing_object": 55, "missing_scene": 7513})
    assert counts["nr3d_targets"] == (2054, {"missing_object": 50, "missing_scene": 5353})
    kept, left_out = counts["sqa3d"]
    assert kept > 0 and kept + left_out["missing_scene"] == 3519
    assert all(sample.situation_pose_7 is not None for sample in parts["sqa3d"].samples)
    strict = DataConfig(root=str(real_root), datasets=names, eval_splits={"sqa3d": "test"})
    with pytest.raises(ValueError, match="which is not prepared.*more records cannot be used"):
        load_evaluated(strict, open_store(strict), 0)
