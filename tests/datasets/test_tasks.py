"""Benchmarks' readers: official schemas in, samples in the right frames out, and errors that name the row."""

import json
import logging
import pickle
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from threedr1.datasets.prompts import CAPTION_QUESTION
from threedr1.datasets.scannet import LABEL_MAP_NAME
from threedr1.datasets.scene_store import INDEX_NAME, SceneInfo, SceneStore, as_index
from threedr1.datasets.tasks import LOADERS, load_samples
from threedr1.datasets.tasks.nr3d import parse_stimulus
from threedr1.datasets.tasks.scanqa import question_type as scanqa_type
from threedr1.datasets.tasks.scanrefer import load_name_classes, unique_lookup
from threedr1.datasets.tasks.sqa3d import facing, from_world_pose, question_type, to_world_pose
from threedr1.utils.text import find_pointers

from .. import data_factory as factory


def shifted(store: SceneStore) -> dict[str, SceneInfo]:
    """The index with another floor centre, so that model frame and world frame differ."""
    origin_3 = np.array([0.5, -0.25, -0.1], np.float32)
    return {key: SceneInfo(**{**info.__dict__, "origin_3": origin_3}) for key, info in store.index.items()}


def test_grounding_answers_carry_the_target_in_the_model_frame(root, store):
    for dataset in ("scanrefer", "nr3d"):
        sample = load_samples(root, "train", [dataset], scenes=shifted(store))[0]
        assert sample.task == "grounding" and sample.target_object_ids == [factory.CHAIR]
        centre, size = factory.OBJECTS[factory.CHAIR]
        np.testing.assert_allclose(sample.target_boxes_K7, [[*centre, *size, 0]], atol=1e-5)
        (pointer,) = find_pointers(sample.answer)
        np.testing.assert_allclose(pointer, [0.0, 0.5, 0.55, *size, 0], atol=1e-6)
        assert sample.answer.startswith("office chair <box>") and sample.references == ["office chair"]


def test_scanrefer_unique_and_multiple(root, store):
    samples = load_samples(root, "train", ["scanrefer"], scenes=store)
    assert [sample.question_type for sample in samples] == ["unique", "unique"]
    assert [sample.sample_id for sample in samples] == ["scanrefer-scene0000_00-0-0", "scanrefer-scene0000_00-0-1"]
    path = root / "annotations" / "ScanRefer_filtered_train.json"
    rows = json.loads(path.read_text())
    rows.append({**rows[0], "object_id": str(factory.TABLE), "ann_id": "7"})  # called an office chair as well
    path.write_text(json.dumps(rows))
    samples = load_samples(root, "train", ["scanrefer"], scenes=store)
    assert [sample.question_type for sample in samples] == ["multiple"] * 3
    assert not samples[0].meta["others"]


def test_unique_lookup_by_hand():
    classes = {"chair": 2, "stool": 2, "lamp": 17}
    rows = [("a", 1, "chair"), ("a", 2, "stool"), ("a", 3, "lamp"), ("b", 1, "chair"), ("b", 1, "chair")]
    assert unique_lookup([*rows, ("b", 9, "piano")], classes) == {
        ("a", 1): (True, 2),
        ("a", 2): (True, 2),
        ("a", 3): (False, 17),
        ("b", 1): (False, 2),
        ("b", 9): (False, 17),
    }


def test_nr3d_takes_the_split_and_filters_as_referit3d(root, store):
    train, val = (load_samples(root, split, ["nr3d"], scenes=store) for split in ("train", "val"))
    assert [s.scene_id for s in train] == ["scene0000_00"] and [s.scene_id for s in val] == ["scene0001_00"]
    assert train[0].question_type == "easy" and train[0].meta["view_dependent"] is True
    assert train[0].meta["distractor_ids"] == [factory.TABLE] and train[0].meta["target_object_id"] == factory.CHAIR
    (distractor,) = train[0].meta["distractor_boxes"]
    np.testing.assert_allclose(distractor[:3], factory.OBJECTS[factory.TABLE][0], atol=1e-5)


@given(
    st.from_regex(r"scene[0-9]{4}_[0-9]{2}", fullmatch=True),
    st.from_regex(r"[a-z]+([ -][a-z]+){0,2}", fullmatch=True),
    st.integers(0, 300),
    st.lists(st.integers(0, 300), max_size=6),
)
def test_stimulus_round_trip(scene, label, target, others):
    text = "-".join([scene, label, str(len(others) + 1), *map(str, [target, *others])])
    stimulus = parse_stimulus(text)
    assert (stimulus.scene_id, stimulus.label, stimulus.target_id) == (scene, label, target)
    assert stimulus.distractor_ids == others and stimulus.count == len(others) + 1


def test_captions_group_by_object(root, store):
    for dataset, task, first in (
        ("scan2cap", "dense_caption", "the chair right of the table ."),
        ("object_caption", "object_caption", "the chair right of the table."),
    ):
        train, val = (load_samples(root, split, [dataset], scenes=store) for split in ("train", "val"))
        assert len(train) == 2 and len(val) == 1  # descriptions; objects
        assert val[0].task == task and val[0].question == CAPTION_QUESTION
        assert val[0].answer == first and len(val[0].references) == 2
        np.testing.assert_array_equal(val[0].query_box_7, val[0].target_boxes_K7[0])
        assert train[1].answer == train[0].references[1] and train[0].sample_id != train[1].sample_id


def test_scanqa(root, store):
    (sample,) = load_samples(root, "val", ["scanqa"], scenes=store)
    assert (sample.sample_id, sample.answer, sample.references) == ("val-scene0001-0", "table", ["table", "the table"])
    np.testing.assert_allclose(sample.target_boxes_K7[0, :3], factory.OBJECTS[factory.TABLE][0], atol=1e-5)
    kinds = {"Where is it?": "place", "How many beds?": "number", "What color is it?": "color", "Is it?": "other"}
    assert {question: scanqa_type(question) for question in kinds} == kinds


def test_structure_has_no_box_but_is_known(root, store):
    path = root / "annotations" / "ScanQA_v1.0_val.json"
    rows = json.loads(path.read_text())
    rows[0]["object_ids"] = [factory.WALLS, factory.TABLE]
    path.write_text(json.dumps(rows))
    (sample,) = load_samples(root, "val", ["scanqa"], scenes=store)
    assert sample.target_object_ids == [factory.WALLS, factory.TABLE] and len(sample.target_boxes_K7) == 1


def test_sqa3d_pose_comes_to_the_world(root, store):
    (sample,) = load_samples(root, "train", ["sqa3d"], scenes=store)
    assert (sample.sample_id, sample.task, sample.answer) == ("sqa3d-220602000000", "situated_qa", "table")
    assert sample.situation.startswith("I am facing the table") and sample.question_type == "what"
    np.testing.assert_allclose(sample.situation_pose_7[:2], [1.0, -0.5], atol=1e-5)
    assert abs(abs(sample.meta["facing"]) - np.pi) < 1e-5  # the table is at x = -1
    assert question_type("Can I sit?") == "can" and question_type("Where?") == "others"


def test_sqa3d_has_no_pose_where_the_raw_frame_is_unknown(root, store, caplog):
    index = {scene_id: replace(info, raw_frame_known=False) for scene_id, info in store.index.items()}
    with caplog.at_level(logging.WARNING):
        (sample,) = load_samples(root, "train", ["sqa3d"], scenes=index)
    assert sample.situation_pose_7 is None and "facing" not in sample.meta
    assert sample.situation.startswith("I am facing the table")
    assert "1 of 1 poses are left out" in caplog.text and "of 1 scenes is not known, as scene0000_00" in caplog.text


@given(st.floats(-180, 180), st.floats(-180, 180), st.floats(-5, 5), st.floats(-5, 5))
def test_sqa3d_pose_round_trip(turn, yaw, x, y):
    align_44 = factory.axis_alignment(turn, (1.0, -2.0, 0.3))
    middle_3 = np.array([3.0, 4.0, 1.2])
    pose_7 = np.array([x, y, 0.0, *Rotation.from_euler("z", yaw, degrees=True).as_quat()])
    again_7 = to_world_pose(*from_world_pose(pose_7, align_44, middle_3), align_44, middle_3)
    np.testing.assert_allclose(again_7[:3], pose_7[:3], atol=1e-9)
    assert abs(np.angle(np.exp(1j * (facing(again_7) - np.radians(yaw))))) < 1e-6


def test_3d_llm_tasks(root, store):
    samples = load_samples(root, "val", ["dialogue", "planning", "scene_description"], scenes=store)
    assert [sample.task for sample in samples] == ["dialogue", "planning", "scene_description"]
    assert samples[0].question == "### human: hello ### assistant:" and samples[1].answer == "sit down on the chair"
    assert all(sample.references == [sample.answer] for sample in samples)


def test_scene30k_drops_leaked_rows_and_says_so(root, store, caplog):
    with caplog.at_level(logging.WARNING):
        samples = load_samples(root, "train", ["scene30k"], scenes=shifted(store))
    assert "2 rows kept" in caplog.text and "2 on held-out scenes" in caplog.text
    assert {sample.scene_id for sample in samples} == {"scene0000_00"}
    qa, grounding = samples
    assert (qa.task, qa.answer, qa.think[:6]) == ("qa", "table", "First,")
    assert grounding.task == "grounding" and grounding.references == ["the chair"]
    np.testing.assert_allclose(grounding.target_boxes_K7[0, :3], factory.OBJECTS[factory.CHAIR][0], atol=1e-5)
    with pytest.raises(ValueError, match="Scene-30K_val"):
        load_samples(root, "val", ["scene30k"], scenes=store)


def test_scene30k_boxes_of_the_answer_become_targets_in_the_world(root, store, caplog):
    path = root / "annotations" / "Scene-30K.jsonl"
    cot = "<think>First.</think><answer>it <box>1, 2, 3, 1, 1, 1</box></answer>"
    rows = [
        {"scene_id": "scene0000_00", "question": "Where?", "cot": cot},
        {"scene_id": "scene0000_00", "question": "Where?", "cot": "no tags"},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    with caplog.at_level(logging.WARNING):
        (sample,) = load_samples(root, "train", ["scene30k"], scenes=shifted(store))
    np.testing.assert_allclose(sample.target_boxes_K7, [[1.5, 1.75, 2.9, 1, 1, 1, 0]], atol=1e-6)
    assert sample.references == ["it"] and "1 outside the answer grammar" in caplog.text


ANNOTATION_FILES = {
    "scanrefer": "ScanRefer_filtered_train.json",
    "scan2cap": "ScanRefer_filtered_train.json",
    "object_caption": "ScanRefer_filtered_train.json",
    "scanqa": "ScanQA_v1.0_train.json",
    "sqa3d": "v1_balanced_questions_train_scannetv2.json",
    "dialogue": "3d_llm_embodied_dialogue_filtered_train.json",
    "planning": "3d_llm_embodied_planning_filtered_train.json",
    "scene_description": "3d_llm_scene_description_train.json",
    "scene30k": "Scene-30K.jsonl",
    "nr3d": "nr3d.csv",
    "scan2cap_nr3d": "nr3d.csv",
    "embodied_qa": "3d_llm_embodied_question_answer_train.json",
    "scene30k_captions": "scene_caption.json",
    "scanrefer_targets": "scanrefer_train_targets.json",
    "nr3d_targets": "nr3d_train_targets.json",
    "nr3d_captions": "nr3d_captions_by_scene.json",
    "cap3d": "Cap3D_automated_Objaverse_full.csv",
    "inventory": "../scannetv2_train.txt",
    "contents": "../scannetv2_train.txt",
}


@pytest.mark.parametrize("dataset", sorted(LOADERS))
def test_unknown_scenes_name_file_row_and_remedy(root, store, dataset):
    path = root / "annotations" / ANNOTATION_FILES[dataset]
    path.write_text(path.read_text().replace("scene0000_00", "scene0777_00"))
    with (root / "scannetv2_train.txt").open("a") as stream:
        stream.write("scene0777_00\n")
    with pytest.raises(ValueError, match=rf"{path.name}, row 1 names scene scene0777_00.*prepare"):
        load_samples(root, "train", [dataset], scenes=store)


@pytest.mark.parametrize(
    ("dataset", "old", "new"),
    [
        ("scanrefer", '"object_id": "0"', '"object_id": "55"'),
        ("scan2cap", '"object_id": "0"', '"object_id": "55"'),
        ("scanqa", '"object_ids": [3]', '"object_ids": [55]'),
        ("nr3d", "scene0000_00,0,", "scene0000_00,55,"),
    ],
)
def test_unknown_objects_name_file_row_and_remedy(root, store, dataset, old, new):
    path = root / "annotations" / ANNOTATION_FILES[dataset]
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ValueError, match=rf"{path.name}, row 1 names object 55.*take the row out"):
        load_samples(root, "train", [dataset], scenes=store)


@pytest.mark.parametrize("dataset", sorted(LOADERS))
def test_missing_and_broken_files_are_clear(root, store, dataset):
    path = root / "annotations" / ANNOTATION_FILES[dataset]
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2 - 5] if path.suffix != ".csv" else b"a,b\n1,2\n")
    with pytest.raises(ValueError, match=path.name.replace(".", r"\.")):
        load_samples(root, "train", [dataset], scenes=store)
    path.unlink()
    with pytest.raises(ValueError, match="no (annotation|split) file"):
        load_samples(root, "train", [dataset], scenes=store)


def test_fields_of_a_wrong_kind_name_the_row(root, store):
    path = root / "annotations" / "ScanRefer_filtered_train.json"
    row = json.loads(path.read_text())[0]
    for change, words in (
        ({"object_id": "chair"}, "'object_id' is 'chair', not a whole number"),
        ({"description": 3}, "'description' is int, not str"),
        ({"token": None}, "'token' is missing"),
    ):
        path.write_text(json.dumps([{**row, **change}]))
        with pytest.raises(ValueError, match=rf"row 1: .*{words}"):
            load_samples(root, "train", ["scanrefer"], scenes=store)


def test_unknown_data_set_names_the_nearest(root, store):
    with pytest.raises(ValueError, match="did you mean 'scanrefer'"):
        load_samples(root, "train", ["scanreffer"], scenes=store)


def test_store_is_lazy_and_keeps_the_latest(root):
    store = SceneStore(root / "prepared", capacity=1)
    assert store.scene_ids == ["scene0000_00", "scene0001_00"] and len(store) == 2 and not store._recent
    first = store["scene0000_00"]
    assert store["scene0000_00"] is first
    assert store["scene0001_00"].scene_id == "scene0001_00" and list(store._recent) == ["scene0001_00"]
    with pytest.raises(KeyError):
        store["scene0005_00"]
    copy = pickle.loads(pickle.dumps(store))
    assert not copy._recent and copy["scene0000_00"].scene_id == "scene0000_00"


def test_index_is_cached_and_follows_the_scenes(root):
    store = SceneStore(root / "prepared")
    index_path = root / "prepared" / INDEX_NAME
    before = index_path.stat().st_mtime_ns
    again = SceneStore(root / "prepared")
    assert index_path.stat().st_mtime_ns == before
    for scene_id, info in store.index.items():
        for name, value in info.__dict__.items():
            np.testing.assert_array_equal(value, again.index[scene_id].__dict__[name])
    whole = as_index({"scene0000_00": store["scene0000_00"]})["scene0000_00"]
    np.testing.assert_array_equal(whole.raw_middle_3, store.index["scene0000_00"].raw_middle_3)
    assert whole.structure_ids == {factory.FLOOR, factory.WALLS}
    (root / "prepared" / "scene0001_00.npz").unlink()
    assert SceneStore(root / "prepared").scene_ids == ["scene0000_00"]
    index_path.write_bytes(b"broken")
    assert SceneStore(root / "prepared").scene_ids == ["scene0000_00"]
    with pytest.raises(ValueError, match="prepare"):
        SceneStore(root / "nowhere")


@pytest.mark.real
def test_official_files_load_whole(real_data):
    folder = real_data / "annotations"
    scene_ids = {path.stem for path in (real_data / "scannet_instances").glob("*.npz")}
    for path in folder.glob("*_val.json"):
        scene_ids |= {row["scene_id"] for row in json.loads(path.read_text())}
    index = factory.fake_index(scene_ids, range(400))
    counts = {
        name: len(load_samples(real_data, "val", [name], scenes=index)) for name in ("scanqa", "dialogue", "planning")
    }
    assert counts == {"scanqa": 4675, "dialogue": 1222, "planning": 2282}
    descriptions = load_samples(real_data, "val", ["scene_description"], scenes=index)
    assert len(descriptions) == 121
    questions = json.loads((folder / "v1_balanced_questions_test_scannetv2.json").read_text())["questions"]
    situated = load_samples(
        real_data, "test", ["sqa3d"], scenes=factory.fake_index({row["scene_id"] for row in questions})
    )
    assert len(situated) == 3519
    kinds = {
        kind: sum(sample.question_type == kind for sample in situated)
        for kind in ("what", "is", "how", "can", "which")
    }
    assert kinds == {"what": 1147, "is": 652, "how": 465, "can": 338, "which": 351}


@pytest.mark.real
def test_official_poses_stand_where_their_situations_say(real_data):
    """Who sits on a toilet, bed or chair is near one; who faces a thing looks at it: the frame is the right one."""
    folder = real_data / "annotations"
    matrices = json.loads((real_data / "scannet" / "scans_axis_alignment_matrices.json").read_text())
    index, boxes, names = {}, {}, {}
    for path in sorted((real_data / "scannet_instances").glob("*.npz")):
        with np.load(path) as scan:
            raw_K6, labels = scan["boxes_min_max"].astype(float), scan["labels"].tolist()
        align_44 = np.array(matrices[path.stem]).reshape(4, 4)
        middle_3 = (raw_K6[:, :3].min(0) + raw_K6[:, 3:].max(0)) / 2
        empty = factory.fake_index([path.stem])[path.stem].__dict__
        index[path.stem] = SceneInfo(**{**empty, "axis_align_44": align_44, "raw_middle_3": middle_3})
        centre_K3 = (raw_K6[:, :3] + raw_K6[:, 3:]) / 2
        boxes[path.stem] = centre_K3 @ align_44[:3, :3].T + align_44[:3, 3]
        names[path.stem] = labels
    questions = json.loads((folder / "v1_balanced_questions_test_scannetv2.json").read_text())["questions"]
    index.update(factory.fake_index({row["scene_id"] for row in questions} - set(index)))
    near, ahead = [], []
    for sample in load_samples(real_data, "test", ["sqa3d"], scenes=index):
        if sample.scene_id not in boxes:
            continue
        position_2 = sample.situation_pose_7[:2]
        for row, label in enumerate(names[sample.scene_id]):
            if names[sample.scene_id].count(label) > 1:
                continue
            offset_2 = boxes[sample.scene_id][row, :2] - position_2
            if f"sitting on the {label}" in sample.situation:
                near.append(np.linalg.norm(offset_2))
            if f"facing the {label}" in sample.situation or f"facing a {label}" in sample.situation:
                turn = np.arctan2(offset_2[1], offset_2[0]) - sample.meta["facing"]
                ahead.append(abs(np.degrees(np.angle(np.exp(1j * turn)))))
    assert len(near) >= 10 and np.median(near) < 0.5
    assert len(ahead) >= 30 and np.mean(np.array(ahead) < 60) > 0.9


@pytest.mark.real
def test_unique_lookup_agrees_with_scanrefer(real_data, parity_data):
    content = json.loads((parity_data / "scanrefer_grounding.json").read_text())
    classes = load_name_classes(real_data / "scannet" / LABEL_MAP_NAME)
    described = [(row[0], int(row[1]), row[2].replace("_", " ")) for row in content["lookup_annotations"]]
    lookup = unique_lookup(described, classes)
    assert len(content["items"]) == 500
    for item in content["items"]:
        multiple, number = lookup[item["scene_id"], int(item["object_id"])]
        assert (int(multiple), number) == (item["multiple"], item["semantic_class"])
