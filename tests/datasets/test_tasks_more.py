"""The less common data sets: embodied QA, Nr3D's captions, ScanQA's tests, scene captions, targets, Cap3D."""

import csv
import json

import numpy as np
import pytest

from threedr1.datasets.scene import load_scene
from threedr1.datasets.scene_store import SceneStore
from threedr1.datasets.tasks import cap3d, inputs_of, load_samples
from threedr1.datasets.tasks.nr3d import at_most_tokens, parse_stimulus
from threedr1.utils.text import find_pointers

from .. import data_factory as factory


def load(root, dataset, store, split="train"):
    return load_samples(root, split, [dataset], scenes=store)


def test_embodied_qa_keeps_references_as_they_stand(root, store):
    (sample,) = load(root, "embodied_qa", store)
    assert (sample.task, sample.dataset, sample.sample_id) == ("qa", "embodied_qa", "embodied_qa-train-1")
    assert sample.references == ["a table,", "table"] and sample.answer == "a table,"


def test_nr3d_captions_are_made_of_the_csv_as_scan2cap_makes_them(root, store):
    train, val = load(root, "scan2cap_nr3d", store), load(root, "scan2cap_nr3d", store, "val")
    captions = ["the chair left of the table", "the black one"]  # lower case; one does not mention the class
    assert [sample.answer for sample in train] == captions
    assert [sample.sample_id for sample in train] == [f"scan2cap_nr3d-scene0000_00-0-{number}" for number in (0, 1)]
    assert len(val) == 1 and val[0].references == captions and val[0].task == "dense_caption"
    np.testing.assert_allclose(val[0].query_box_7[:3], factory.OBJECTS[factory.CHAIR][0], atol=1e-5)


def test_nr3d_captions_prefer_the_organised_file(root, store):
    row = {"scene_id": "scene0000_00", "object_id": "3", "object_name": "table", "ann_id": "0"}
    row |= {"description": "the low table", "token": ["the", "low", "table", "."]}
    (root / "annotations" / "nr3d_train.json").write_text(json.dumps([row]))
    (sample,) = load(root, "scan2cap_nr3d", store)
    assert sample.answer == "the low table ." and sample.target_object_ids == [factory.TABLE]
    assert inputs_of("scan2cap_nr3d", "train").absent(root) == []
    for name in ("nr3d_train.json", "nr3d.csv"):
        (root / "annotations" / name).unlink()
    assert inputs_of("scan2cap_nr3d", "train").absent(root) == ["annotations/nr3d.csv"]


@pytest.mark.parametrize(("split", "file"), [("test", "w"), ("test_w_obj", "w"), ("test_wo_obj", "wo")])
def test_scanqa_test_sets_have_no_answers(root, store, split, file):
    row = {"scene_id": "scene0000_00", "question_id": "test-0", "question": "Where is it?"}
    if file == "w":
        row |= {"object_ids": [factory.TABLE], "object_names": ["table"]}
    (root / "annotations" / f"ScanQA_v1.0_test_{file}_obj.json").write_text(json.dumps([row]))
    (sample,) = load(root, "scanqa", store, split)
    assert sample.references == [] and sample.answer == ""
    assert sample.target_object_ids == ([factory.TABLE] if file == "w" else [])


def test_scene_captions_leave_held_out_scenes_out_loudly(root, store, caplog):
    path = root / "annotations" / "scene_caption.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "scene0001_00": {"captions": ["Another room."]}}))
    train = load(root, "scene30k_captions", store)
    assert [sample.answer for sample in train] == ["A small room.", "A chair and a table."]
    assert {sample.task for sample in train} == {"scene_description"}
    assert "1 rows kept, dropped: 1 on held-out scenes" in caplog.text
    (val,) = load(root, "scene30k_captions", store, "val")
    assert val.scene_id == "scene0001_00" and val.references == ["Another room."]


def test_targets_take_the_name_from_the_scan(root, store):
    refer, nr3d = load(root, "scanrefer_targets", store)[0], load(root, "nr3d_targets", store)[0]
    assert refer.answer.startswith("office chair <box>") and refer.references == ["office chair"]
    np.testing.assert_allclose(find_pointers(nr3d.answer)[0][3:6], factory.OBJECTS[factory.CHAIR][1], atol=1e-5)
    assert (refer.question_type, refer.meta["multiple"]) == ("unique", False)
    assert (nr3d.question_type, nr3d.meta["view_dependent"]) == ("easy", False)
    path = root / "annotations" / "scanrefer_train_targets.json"
    other = {"scan_id": "scene0000_00", "target_id": factory.TABLE, "caption": "the low one"}
    path.write_text(json.dumps([*json.loads(path.read_text()), other]))
    assert [sample.question_type for sample in load(root, "scanrefer_targets", store)] == ["unique"] * 2


def test_nr3d_captions_by_scene_have_a_class_and_no_target(root, store):
    samples = load(root, "nr3d_captions", store)
    assert [(sample.answer, sample.question) for sample in samples] == [
        ("chair", "The tall one"),
        ("table", "The low one"),
    ]
    assert samples[0].meta == {"class": "chair"} and samples[0].target_boxes_K7.shape == (0, 7)
    assert load(root, "nr3d_captions", store, "val") == []


def test_nr3d_may_be_cut_to_short_utterances(root, store):
    samples = load(root, "nr3d", store)
    assert samples[0].meta["num_tokens"] == 6
    assert at_most_tokens(samples, 6) == samples and at_most_tokens(samples, 5) == []
    with pytest.raises(ValueError, match="says 3 objects and names 2"):
        parse_stimulus("scene0000_00-chair-3-1-2")


@pytest.fixture
def objects(root):
    """Two objects of Cap3D with captions, and a third caption without a cloud."""
    (root / "cap3d").mkdir()
    for uid, size in (("a1", (1.0, 2.0, 0.5)), ("b2", (0.2, 0.2, 0.4))):
        corners_83 = factory.box_shell((0.1, 0.2, 0.3), size, 1.0).astype(np.float32)
        factory.write_ply(root / "cap3d" / f"{uid}.ply", corners_83)
    with (root / "annotations" / cap3d.FILE).open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([["a1", "a long, flat table"], ["b2", "a cup"], ["c3", "a lamp"]])
    return root


def test_cap3d_objects_are_scenes_of_their_own(objects, caplog):
    (objects / "annotations" / "Cap3D_val.txt").write_text("a1\n")
    assert cap3d.prepare_objects(objects) == []
    store = SceneStore(objects / "prepared")
    (sample,) = load(objects, "cap3d", store, "val")
    assert (sample.task, sample.scene_id, sample.answer) == ("object_caption", "a1", "a long, flat table")
    np.testing.assert_allclose(sample.query_box_7, [0.1, 0.2, 0.3, 1.0, 2.0, 0.5, 0], atol=1e-6)
    assert len(sample.target_boxes_K7) == 0 and caplog.text == ""
    np.testing.assert_allclose(store["a1"].points_N3.max(0), [0.6, 1.2, 0.55], atol=1e-6)
    problems = []
    train = load_samples(objects, "train", ["cap3d"], scenes=store, problems=problems)
    assert [one.scene_id for one in train] == ["b2"]  # not a1, which the other list holds
    assert "has no list annotations/Cap3D_train.txt" in caplog.text
    assert [(one.kind, one.record_id, one.row) for one in problems] == [("missing_scene", "c3", 3)]


def test_cap3d_prepares_what_is_new_and_names_what_is_broken(objects):
    (objects / "cap3d" / "b2.ply").write_bytes(b"ply\nbroken")
    (failure,) = cap3d.prepare_objects(objects)
    assert failure.scene_id == "b2" and "not a whole PLY" in failure.message
    before = (objects / "prepared" / "a1.npz").stat().st_mtime_ns
    cap3d.prepare_objects(objects)
    assert (objects / "prepared" / "a1.npz").stat().st_mtime_ns == before
    assert load_scene(objects / "prepared" / "a1.npz").object_labels == ["object"]


def test_prepare_makes_objects_with_and_without_scans(objects, tmp_path, capsys):
    from threedr1.main import main

    assert main(["prepare", "--root", str(objects), "--out", str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in (tmp_path / "out").glob("*.npz")) == ["a1.npz", "b2.npz"]
    (objects / "cap3d" / "b2.ply").write_bytes(b"ply\nbroken")
    factory.write_mini_scan(objects / "scans", "scene0009_00")
    assert main(["prepare", "--root", str(objects), "--out", str(tmp_path / "more"), "--workers", "1"]) == 1
    assert sorted(path.name for path in (tmp_path / "more").glob("*.npz")) == ["a1.npz", "scene0009_00.npz"]
    said = capsys.readouterr().err
    assert "b2: " in said and "not a whole PLY" in said and "1 of the scans could not be prepared" in said


def test_cap3d_refuses_pickled_lists(objects, store):
    (objects / "annotations" / "Cap3D_val.pkl").write_bytes(b"cos\nsystem\n")
    with pytest.raises(ValueError, match="Cap3D_val.pkl is a pickle.*one a line"):
        load(objects, "cap3d", store, "val")


@pytest.mark.real
def test_repackaged_files_load_whole(real_data, tmp_path):
    """Every annotation file has as many records as its README says, and every one becomes a sample."""
    folder = real_data / "annotations"
    by_scene = json.loads((folder / "nr3d_captions_by_scene.json").read_text())
    scene_ids = set(by_scene)
    for path in folder.glob("*.json"):
        content = json.loads(path.read_text())
        rows = content if isinstance(content, list) else []
        scene_ids |= {row.get("scene_id") or row["scan_id"] for row in rows}
    index = factory.fake_index(scene_ids, range(400))

    def count(dataset, split, root=real_data):
        return len(load_samples(root, split, [dataset], scenes=index))

    assert [count("embodied_qa", split) for split in ("train", "val")] == [14944, 1938]
    assert [count("scene_description", split) for split in ("train", "val")] == [912, 121]
    assert count("scanrefer_targets", "val") == 9498 and count("nr3d_targets", "val") == 7457
    (tmp_path / "annotations").symlink_to(folder)
    for split in ("train", "val", "test"):
        (tmp_path / f"scannetv2_{split}.txt").symlink_to(real_data / "scannet" / f"scannetv2_{split}.txt")
    by_split = {split: count("nr3d_captions", split, tmp_path) for split in ("train", "val", "test")}
    assert (
        sum(by_split.values()) == 41503
        and len(json.loads((folder / "nr3d_captions_by_scene.json").read_text())) == 641
    )
