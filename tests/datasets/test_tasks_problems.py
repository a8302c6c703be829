"""Bad records: each is named with file, row and field, and hides no other."""

import csv
import json
from collections import Counter

import numpy as np
import pytest

from threedr1.datasets.scene_store import SceneInfo
from threedr1.datasets.tasks import Problem, count_problems, load_samples

from .. import data_factory as factory

SCANREFER = "ScanRefer_filtered_train.json"
SCANQA = "ScanQA_v1.0_train.json"
QUESTIONS = "v1_balanced_questions_train_scannetv2.json"
ANSWERS = "v1_balanced_sqa_annotations_train_scannetv2.json"
DIALOGUE = "3d_llm_embodied_dialogue_filtered_train.json"


def rows_of(root, name):
    return json.loads((root / "annotations" / name).read_text())


def write(root, name, content):
    (root / "annotations" / name).write_text(json.dumps(content))


def load(root, dataset, store):
    problems: list[Problem] = []
    return load_samples(root, "train", [dataset], scenes=store, problems=problems), problems


def test_good_records_stay_and_every_bad_one_is_told(root, store):
    (good,) = rows_of(root, SCANQA)
    write(
        root,
        SCANQA,
        [
            {**good, "question_id": "a", "scene_id": "scene0777_00"},
            {**good, "question_id": "b", "object_ids": [3, 55]},
            good,
            {**good, "question_id": "c", "answers": ["ok", 5]},
            good,
            "text",
            {**good, "question_id": "d"},
        ],
    )
    samples, problems = load(root, "scanqa", store)
    assert [sample.sample_id for sample in samples] == [good["question_id"], "d"]
    assert [(one.kind, one.row, one.record_id, one.field) for one in sorted(problems, key=lambda one: one.row)] == [
        ("missing_scene", 1, "a", "scene_id"),
        ("missing_object", 2, "b", "object_ids"),
        ("bad_field", 4, "c", "answers"),
        ("duplicate", 5, good["question_id"], "question_id"),
        ("bad_record", 6, "", ""),
    ]
    by_kind = {one.kind: one for one in problems}
    assert by_kind["missing_scene"].scene_id == "scene0777_00" and by_kind["missing_object"].object_id == 55
    assert "'answers' holds 5, which is not a text" in by_kind["bad_field"].message
    assert all(one.path.endswith(SCANQA) and one.message.startswith(f"{one.path}, row {one.row}") for one in problems)
    assert {(one.dataset, one.split) for one in problems} == {("scanqa", "train")}


def test_without_a_list_the_first_is_raised_and_the_others_counted(root, store):
    (good,) = rows_of(root, SCANQA)
    bad = [{**good, "question_id": f"{number}", "scene_id": "scene0777_00"} for number in range(3)]
    write(root, SCANQA, [*bad, good, good])
    with pytest.raises(
        ValueError, match=r"row 1 names scene scene0777_00.*out; and 3 more .*2 missing scene"
    ) as caught:
        load_samples(root, "train", ["scanqa"], scenes=store)
    assert "1 duplicate" in str(caught.value) and "\n" not in str(caught.value)


def test_problems_of_several_data_sets_are_counted_apart(root, store):
    (qa,) = rows_of(root, SCANQA)
    write(root, SCANQA, [{**qa, "scene_id": "scene0777_00"}])
    refer = rows_of(root, SCANREFER)
    write(root, SCANREFER, [{**refer[0], "object_id": "55"}, refer[1], refer[1]])
    problems: list[Problem] = []
    samples = load_samples(root, "train", ["scanqa", "scanrefer"], scenes=store, problems=problems)
    assert len(samples) == 1
    assert count_problems(problems) == Counter(
        {("scanqa", "missing_scene"): 1, ("scanrefer", "missing_object"): 1, ("scanrefer", "duplicate"): 1}
    )


@pytest.mark.parametrize(
    ("dataset", "name", "change", "field"),
    [
        ("scanqa", SCANQA, {"answers": ["ok", 5]}, "answers"),
        ("scanqa", SCANQA, {"answers": "ok"}, "answers"),
        ("scanqa", SCANQA, {"object_ids": [10**30]}, "object_ids"),
        ("scanqa", SCANQA, {"object_names": [None]}, "object_names"),
        ("scanqa", SCANQA, {"question_id": True}, "question_id"),
        ("scanrefer", SCANREFER, {"token": ["the", None]}, "token"),
        ("scanrefer", SCANREFER, {"ann_id": {"a": 1}}, "ann_id"),
        ("scanrefer", SCANREFER, {"object_id": "1_0"}, "object_id"),
        ("scan2cap", SCANREFER, {"token": "the"}, "token"),
        ("dialogue", DIALOGUE, {"answers": [["hello"]]}, "answers"),
        ("dialogue", DIALOGUE, {"question": " "}, "question"),
    ],
)
def test_fields_that_are_no_text_are_named(root, store, dataset, name, change, field):
    first, *rest = rows_of(root, name)
    write(root, name, [{**first, **change}, *rest])
    _, (problem,) = load(root, dataset, store)
    assert (problem.kind, problem.row, problem.field) == ("bad_field", 1, field)
    assert repr(field) in problem.message


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"answers": [5]}, "answers"),
        ({"answers": [{"answer": 5}]}, "answers"),
        ({"answers": 5}, "answers"),
        ({"answers": []}, "answers"),
        ({"position": {"x": 1, "y": "2", "z": 0}}, "position"),
        ({"position": [1, 2, 3]}, "position"),
        ({"rotation": {"_x": 0, "_y": 0, "_z": 0, "_w": 0}}, "rotation"),
        ({"rotation": None}, "rotation"),
        ({"scene_id": "scene0001_00"}, "scene_id"),
    ],
)
def test_sqa3d_annotations_are_checked(root, store, change, field):
    (answer,) = rows_of(root, ANSWERS)["annotations"]
    write(root, ANSWERS, {"annotations": [{**answer, **change}]})
    samples, (problem,) = load(root, "sqa3d", store)
    assert samples == [] and (problem.kind, problem.field) == ("bad_field", field)
    assert problem.path.endswith(ANSWERS) and problem.record_id == "220602000000"


def test_sqa3d_files_must_pair_up(root, store):
    (question,), (answer,) = rows_of(root, QUESTIONS)["questions"], rows_of(root, ANSWERS)["annotations"]
    write(root, QUESTIONS, {"questions": [question, {**question, "question_id": 7}, question]})
    write(root, ANSWERS, {"annotations": [answer, answer, {**answer, "question_id": 8}]})
    samples, problems = load(root, "sqa3d", store)
    assert len(samples) == 1
    found = {(one.kind, one.path.rpartition("/")[2], one.row) for one in problems}
    assert found == {
        ("duplicate", QUESTIONS, 3),
        ("duplicate", ANSWERS, 2),
        ("unpaired", QUESTIONS, 2),
        ("unpaired", ANSWERS, 3),
    }


def test_sqa3d_poses_are_made_one_by_one_or_all_at_once_alike(root, store):
    """Each row has its own scan's alignment; a row without a pose stays without one."""
    (question,), (answer,) = rows_of(root, QUESTIONS)["questions"], rows_of(root, ANSWERS)["annotations"]
    info = store.index["scene0000_00"]
    turned_44 = factory.axis_alignment(75.0, (1.0, 2.0, 3.0))
    other = SceneInfo(**{**info.__dict__, "scene_id": "scene0009_00", "axis_align_44": turned_44})
    bare = {key: value for key, value in answer.items() if key not in ("position", "rotation")}
    ids = (1, 2, 3)
    scenes = ("scene0000_00", "scene0000_00", "scene0009_00")
    pairs = list(zip(ids, scenes, strict=True))
    write(root, QUESTIONS, {"questions": [{**question, "question_id": i, "scene_id": s} for i, s in pairs]})
    answers = [{**(bare if i == 2 else answer), "question_id": i, "scene_id": s} for i, s in pairs]
    write(root, ANSWERS, {"annotations": answers})
    index = {"scene0000_00": info, "scene0009_00": other}
    first, second, third = load_samples(root, "train", ["sqa3d"], scenes=index)
    np.testing.assert_allclose(first.situation_pose_7[:2], [1.0, -0.5], atol=1e-5)
    assert second.situation_pose_7 is None and "facing" not in second.meta
    raw_3 = np.linalg.inv(info.axis_align_44) @ np.array([*first.situation_pose_7[:3], 1.0])
    np.testing.assert_allclose(third.situation_pose_7[:3], (turned_44 @ raw_3)[:3], atol=1e-6)
    turn = np.radians(75.0 - factory.ALIGN_DEGREES)
    assert abs(np.angle(np.exp(1j * (third.meta["facing"] - first.meta["facing"] - turn)))) < 1e-6


@pytest.mark.parametrize(
    ("column", "value", "kind", "field"),
    [
        (6, "3", "bad_field", "tokens"),
        (6, "['the', 5]", "bad_field", "tokens"),
        (6, "__import__('os')", "bad_field", "tokens"),
        (6, "[" * 5_000, "bad_field", "tokens"),
        (6, r"['\ud800']", "bad_field", "tokens"),
        (1, "scene0000_00-chair", "bad_field", "stimulus_id"),
        (1, "s-" + "1-" * 50_000 + "x", "bad_field", "stimulus_id"),
        (3, "chair", "bad_field", "target_id"),
        (3, str(factory.WALLS), "no_box", "target_id"),
        (9, "perhaps", "bad_field", "mentions_target_class"),
        (5, " ", "bad_field", "utterance"),
    ],
)
def test_cells_of_nr3d_are_checked(root, store, column, value, kind, field):
    path = root / "annotations" / "nr3d.csv"
    with path.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.reader(stream))
    broken = list(rows[1])
    broken[column] = value
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([rows[0], broken, [100, *rows[1][1:]], rows[1][:4], [*rows[1], "more"]])
    samples, problems = load(root, "nr3d", store)
    assert [sample.sample_id for sample in samples] == ["nr3d-100"]
    assert sorted((one.kind, one.row) for one in problems) == sorted([(kind, 1), ("bad_record", 3), ("bad_record", 4)])
    assert next(one for one in problems if one.row == 1).field == field


def test_nr3d_repeated_assignments_are_told(root, store):
    path = root / "annotations" / "nr3d.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, lines[1]]) + "\n")
    samples, (problem,) = load(root, "nr3d", store)
    assert len(samples) == 1 and (problem.kind, problem.field, problem.record_id) == ("duplicate", "assignmentid", "0")


def test_3d_llm_files_may_repeat_questions(root, store):
    rows = rows_of(root, DIALOGUE)
    write(root, DIALOGUE, rows * 2)
    samples, problems = load(root, "dialogue", store)
    assert [sample.sample_id for sample in samples] == ["dialogue-train-1", "dialogue-train-2"] and problems == []


def test_lines_of_scene30k_are_read_one_by_one(root, store):
    path = root / "annotations" / "Scene-30K.jsonl"
    lines = path.read_bytes().splitlines()
    path.write_bytes(
        b"\xef\xbb\xbf" + b"\n".join([lines[0], b'{"scene_id": "sc', b"[1]", b'{"a": "\xe9"}', b"", lines[1]])
    )
    samples, problems = load(root, "scene30k", store)
    assert len(samples) == 2
    assert [(one.kind, one.row) for one in problems] == [("bad_record", 2), ("bad_record", 3), ("bad_record", 4)]
    assert "not UTF-8 at byte 7" in problems[2].message


def test_other_encodings_are_named_as_such(root, store):
    for name, dataset in ((SCANQA, "scanqa"), ("nr3d.csv", "nr3d")):
        path = root / "annotations" / name
        content = path.read_bytes()
        path.write_bytes(b"\xef\xbb\xbf" + content)
        assert len(load_samples(root, "train", [dataset], scenes=store)) == 1
        path.write_bytes(content.replace(b"the", "thé".encode("latin-1"), 1))
        place = content.index(b"the") + 2
        with pytest.raises(ValueError, match=rf"{name} is not UTF-8 at byte {place}"):
            load_samples(root, "train", [dataset], scenes=store)


def test_tables_with_a_scene_named_twice_are_refused(root, store):
    path = root / "annotations" / "scene_caption.json"
    path.write_text('{"scene0000_00": {"captions": ["One."]}, "scene0000_00": {"captions": ["Two."]}}')
    with pytest.raises(ValueError, match="two records named 'scene0000_00'"):
        load_samples(root, "train", ["scene30k_captions"], scenes=store)


def real_index(real_data) -> dict[str, SceneInfo]:
    """Index entries of the real scans' annotated instances, boxes in the raw frame."""
    index = {}
    for path in sorted((real_data / "scannet_instances").glob("*.npz")):
        with np.load(path) as scan:
            ids_K, raw_K6, labels = scan["object_ids"], scan["boxes_min_max"], scan["labels"].tolist()
        low_K3, high_K3 = raw_K6[:, :3], raw_K6[:, 3:]
        boxes_K7 = np.concatenate([(low_K3 + high_K3) / 2, high_K3 - low_K3, np.zeros((len(ids_K), 1))], axis=1)
        empty = factory.fake_index([path.stem])[path.stem].__dict__
        arrays = {"object_ids_K": ids_K.astype(np.int32), "boxes_K7": boxes_K7.astype(np.float32)}
        classes_K = np.zeros(len(ids_K), np.int32)
        index[path.stem] = SceneInfo(**{**empty, **arrays, "object_labels": labels, "class_ids_K": classes_K})
    return index


@pytest.mark.real
def test_official_object_ids_resolve_as_far_as_the_scans_go(real_data):
    """Scans that are not there, and object 0 that the instances lack everywhere, are told; nothing else is missing."""
    index = real_index(real_data)
    expected = {"scanqa": (919, 3706, 50), "scanrefer_targets": (1930, 7513, 55), "nr3d_targets": (2054, 5353, 50)}
    for dataset, counts in expected.items():
        problems: list[Problem] = []
        samples = load_samples(real_data, "val", [dataset], scenes=index, problems=problems)
        told = count_problems(problems)
        assert (len(samples), told[dataset, "missing_scene"], told[dataset, "missing_object"]) == counts
        assert len(problems) == counts[1] + counts[2]
        assert {one.object_id for one in problems if one.kind == "missing_object"} == {0}
        assert all(len(one.target_boxes_K7) == len(one.target_object_ids) for one in samples)
    asked = json.loads((real_data / "annotations" / "ScanQA_v1.0_val.json").read_text())
    ids = [(row["scene_id"], number) for row in asked if row["scene_id"] in index for number in row["object_ids"]]
    found = [index[scene_id].row_of(number) is not None for scene_id, number in ids]
    assert (sum(found), len(found) - sum(found)) == (1981, 50)
