"""The doctor on data roots with one thing wrong: what it finds, and the fix it names."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from threedr1.datasets.doctor import Examination, Finding, examine, to_text
from threedr1.datasets.doctor.survey import survey
from threedr1.datasets.published import SCENE_LISTS
from threedr1.datasets.scannet import LABEL_MAP_NAME, prepare_scans

from .. import data_factory as factory

TRAIN, VAL = "scene0000_00", "scene0001_00"
SCANQA = "ScanQA_v1.0_{}.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A whole root that passes for one of generated rooms: nothing is compared with published numbers."""
    root = factory.write_root(tmp_path_factory.mktemp("doctor"))
    (root / "rooms.json").write_text("{}")
    # the generator writes chains of thought of training rooms only
    path = root / "annotations" / "Scene-30K.jsonl"
    lines = [line for line in path.read_text().splitlines() if json.loads(line)["scene_id"] == TRAIN]
    path.write_text("\n".join(lines) + "\n")
    (root / "annotations" / "scene_caption.json").write_text(json.dumps({TRAIN: {"captions": ["A room."]}}))
    assert prepare_scans(root, workers=1) == []
    return root


@pytest.fixture
def rooms(made, tmp_path) -> Path:
    """A copy of it to break."""
    return Path(shutil.copytree(made, tmp_path / "rooms"))


def found(examination: Examination, code: str) -> list[Finding]:
    return [finding for finding in examination.findings if finding.code == code]


def change(root: Path, name: str, **fields: object) -> None:
    """Set fields of the first record of an annotation file."""
    path = root / "annotations" / name
    rows = json.loads(path.read_text())
    rows[0] |= fields
    path.write_text(json.dumps(rows))


def test_nothing_is_wrong_with_a_whole_root(made):
    examination = examine(made)
    assert examination.findings == [] and not examination.blocking and examination.kind == "generated"
    assert to_text(examination).endswith("Nothing is wrong.")
    keys = [(row.dataset, row.split) for row in examination.datasets]
    assert len(keys) == len(set(keys)) and ("scan2cap", "val") in keys
    rows = {(row.dataset, row.split): row for row in examination.datasets}
    # two descriptions of one chair: one caption to give in validation
    assert (rows["scan2cap", "val"].records, rows["scan2cap", "val"].usable) == (2, 1)
    # of two utterances a scene one mentions the class
    assert (rows["nr3d", "train"].records, rows["nr3d", "train"].usable) == (4, 1)
    assert {row.state for row in examination.datasets} == {"ok"}
    assert [(row.split, row.scenes, row.scans, row.prepared) for row in examination.scenes] == [
        ("train", 1, 1, 1),
        ("val", 1, 1, 1),
        ("test", None, 0, 0),
    ]


def test_a_root_that_is_not_there_or_empty_gets_advice(tmp_path):
    for root, kind, code in ((tmp_path / "nowhere", "absent", "root_missing"), (tmp_path, "empty", "root_empty")):
        examination = examine(root)
        assert (examination.kind, [one.code for one in examination.findings]) == (kind, [code])
        assert examination.blocking and examination.datasets == []
        text = to_text(examination)
        assert "bash script/quickstart.sh" in text and f"python main.py rooms --out {root}" in text
        assert text.index("quickstart") < text.index("github.com/ScanNet")
        assert "main.py prepare" not in text, "there is nothing to prepare"


def test_annotations_without_scans_are_counted_and_nothing_is_prepared(rooms):
    for name in ("scans", "prepared"):
        shutil.rmtree(rooms / name)
    examination = examine(rooms)
    assert [one.code for one in examination.findings] == ["scans_missing"]
    assert "main.py prepare" not in to_text(examination)
    states = {row.state for row in examination.datasets}
    assert states == {"unchecked"} and all(row.records for row in examination.datasets)
    assert any("Ask for ScanNet" in line for line in examination.advice)


def test_scans_that_are_not_prepared_name_the_command(rooms):
    (rooms / "prepared" / f"{VAL}.npz").unlink()
    examination = examine(rooms)
    (unprepared,) = found(examination, "not_prepared")
    assert unprepared.level == "warning" and unprepared.files == (f"prepared/{VAL}.npz",)
    assert unprepared.fix == f"python main.py prepare --root {rooms}"
    records = found(examination, "scene_not_prepared")
    assert {one.fix for one in records} == {unprepared.fix} and all(one.split == "val" for one in records)
    # ScanRefer's file serves three data sets and is told of once
    labels = [one.message.partition(":")[0] for one in records]
    assert labels[0] == "scanrefer, scan2cap, object_caption (val)" and len(labels) == len(set(labels)) > 3
    (line,) = [line for line in to_text(examination).splitlines() if "records on scenes that are not prepared" in line]
    assert "scanqa (val) 1; sqa3d (val) 1" in line
    shutil.rmtree(rooms / "prepared")
    assert found(examine(rooms), "not_prepared")[0].level == "error", "nothing runs without any prepared scene"


def test_scans_that_are_missing_are_told_from_unknown_scenes(rooms):
    (rooms / "prepared" / f"{VAL}.npz").unlink()
    shutil.rmtree(rooms / "scans" / VAL)
    change(rooms, SCANQA.format("train"), scene_id="scene9999_00")
    examination = examine(rooms)
    (missing,) = found(examination, "scans_missing")
    assert (missing.split, missing.count, missing.files) == ("val", 1, (f"scans/{VAL}",))
    assert {one.split for one in found(examination, "scene_without_scan")} == {"val"}
    (unknown,) = found(examination, "scene_unknown")
    assert (unknown.dataset, unknown.split, unknown.count) == ("scanqa", "train", 1)
    assert "scene9999_00" in unknown.message and "(row 1 of annotations/ScanQA_v1.0_train.json)" in unknown.fix
    assert not found(examination, "scene_not_prepared")


def test_every_kind_of_bad_record_is_counted_and_hides_no_other(rooms):
    path = rooms / "annotations" / SCANQA.format("train")
    (good,) = json.loads(path.read_text())
    rows = [
        good,
        good,  # a duplicate
        good | {"question_id": "b", "object_ids": [55]},
        good | {"question_id": "c", "answers": ["yes", 5]},
        good | {"question_id": "d"},
        7,
    ]
    path.write_text(json.dumps(rows))
    examination = examine(rooms)
    (row,) = [row for row in examination.datasets if (row.dataset, row.split) == ("scanqa", "train")]
    assert (row.state, row.records, row.usable) == ("problems", 6, 2)
    assert row.problems == {"duplicate": 1, "missing_object": 1, "bad_field": 1, "bad_record": 1}
    (missing,) = found(examination, "missing_object")
    assert "object 55 of scene0000_00" in missing.message and "(row 3 of annotations/" in missing.fix
    (bad,) = found(examination, "bad_field")
    assert "row 4" in bad.message and bad.level == "error"


def test_a_description_of_a_floor_has_no_box(rooms):
    change(rooms, "ScanRefer_filtered_val.json", object_id=str(factory.FLOOR))
    (boxless,) = found(examine(rooms), "no_box")
    assert boxless.message.startswith("scanrefer, scan2cap, object_caption (val): 1 record on walls")


@pytest.mark.parametrize("content", [b"[", b"{}\xff", b"7", b""])
def test_a_broken_file_is_reported_and_the_rest_is_read(rooms, content):
    (rooms / "annotations" / SCANQA.format("val")).write_bytes(content)
    examination = examine(rooms)
    (broken,) = found(examination, "file_broken")
    assert (broken.dataset, broken.split, broken.level) == ("scanqa", "val", "error")
    assert broken.files == ("annotations/ScanQA_v1.0_val.json",) and "main.py rooms" in broken.fix
    states = {(row.dataset, row.split): row.state for row in examination.datasets}
    assert states.pop(("scanqa", "val")) == "broken" and set(states.values()) == {"ok"}


def test_a_file_of_another_form_is_reported_by_its_reader(rooms):
    (rooms / "annotations" / SCANQA.format("val")).write_text('{"questions": 5}')
    (refused,) = found(examine(rooms), "file_refused")
    assert "does not hold a list of records" in refused.message and refused.dataset == "scanqa"


def test_a_broken_prepared_scene_hides_no_other(rooms):
    path = rooms / "prepared" / f"{VAL}.npz"
    path.write_bytes(path.read_bytes()[:200])
    examination = examine(rooms)
    (broken,) = found(examination, "prepared_broken")
    assert broken.files == (f"prepared/{VAL}.npz",)
    assert broken.fix == f"rm {path} && python main.py prepare --root {rooms}"
    rows = {(row.dataset, row.split): row for row in examination.datasets}
    assert rows["scanqa", "train"].state == "ok" and rows["scanqa", "val"].problems == {"missing_scene": 1}


def test_a_missing_file_is_named_once_with_all_that_read_it(rooms):
    (rooms / "annotations" / "nr3d.csv").unlink()
    (rooms / "annotations" / "ScanRefer_filtered_val.json").unlink()
    examination = examine(rooms)
    messages = [one.message for one in found(examination, "file_missing")]
    assert messages == [
        "scanrefer, scan2cap, object_caption (val): annotations/ScanRefer_filtered_val.json is missing.",
        "nr3d, scan2cap_nr3d (train, val): annotations/nr3d.csv is missing.",
    ]
    text = to_text(examination)
    assert text.count("nr3d.csv") == 1 and not examination.blocking


@pytest.mark.parametrize(
    "name", ["ScanRefer_filtered_train.json", SCANQA.format("train"), "3d_llm_scene_description_train.json"]
)
def test_validation_scenes_in_any_training_file_stop_training(rooms, name):
    change(rooms, name, scene_id=VAL)
    (leak,) = found(examine(rooms), "leak")
    assert leak.level == "error" and (leak.count, leak.split, leak.files) == (1, "train", (f"annotations/{name}",))
    assert "training would read them" in leak.message


def test_leaked_rows_of_scene30k_are_dropped_loudly(rooms):
    with (rooms / "annotations" / "Scene-30K.jsonl").open("a") as stream:
        stream.write(json.dumps({"scene_id": VAL, "question": "?", "cot": ""}) + "\n")
    (rooms / "annotations" / "scene_caption.json").write_text(
        json.dumps({TRAIN: {"captions": ["A room."]}, VAL: {"captions": ["A room."]}})
    )
    cot, captions = found(examine(rooms), "leak")
    assert "1 of 3 rows" in cot.message and "dropped before training" in cot.message and cot.level == "warning"
    assert (captions.dataset, captions.count) == ("scene30k_captions", 1)


def test_evaluation_on_training_scenes_is_pointed_out(rooms):
    change(rooms, "3d_llm_scene_description_val.json", scene_id=TRAIN)
    (shared,) = found(examine(rooms), "evaluation_on_train_scenes")
    assert shared.level == "warning" and shared.count == 1
    assert "ScanQA_v1.0_train.json" in shared.message, "the training files about the same scenes are named"


def test_lists_of_scenes_are_compared_with_scannets(rooms):
    (rooms / "rooms.json").unlink()
    (rooms / "scannetv2_test.txt").write_text(f"{VAL}\n")
    examination = examine(rooms)
    others = found(examination, "list_other")
    assert [(one.split, one.count, one.expected) for one in others] == [
        ("train", 1, SCENE_LISTS["train"].scenes),
        ("val", 1, 312),
        ("test", 1, 100),
    ]
    (shared,) = found(examination, "lists_share")
    assert shared.message == f"Val and test share 1 scene: {VAL}." and shared.level == "error"
    counts = {one.files[0]: (one.count, one.expected) for one in found(examination, "count_differs")}
    assert counts["annotations/nr3d.csv"] == (4, 41_503) and counts["annotations/Scene-30K.jsonl"] == (2, 30_238)
    unverified = [one.level for one in found(examination, "count_differs") if "v1_balanced" in one.files[0]]
    assert set(unverified) == {"note"}, "a number that nobody could verify accuses no file"


def test_a_missing_list_or_label_table_is_an_error(rooms):
    (rooms / "scannetv2_val.txt").unlink()
    (rooms / LABEL_MAP_NAME).write_text("nothing")
    examination = examine(rooms)
    assert found(examination, "list_missing")[0].files == ("scannetv2_val.txt",)
    assert found(examination, "label_table_broken")[0].level == "error"
    rows = {(row.dataset, row.split): row for row in examination.datasets}
    assert rows["nr3d", "val"].missing == ("scannetv2_val.txt",) and rows["scanqa", "val"].state == "ok"


def test_incomplete_scans_name_the_file(rooms):
    (rooms / "scans" / TRAIN / f"{TRAIN}.aggregation.json").unlink()
    (rooms / "scans" / VAL / f"{VAL}.txt").unlink()
    incomplete = {one.files: one.level for one in found(examine(rooms), "scan_incomplete")}
    assert incomplete == {
        (f"scans/{TRAIN}/{TRAIN}.aggregation.json",): "error",
        (f"scans/{VAL}/{VAL}.txt",): "warning",
    }


def test_a_full_disk_is_noticed_before_preparing(rooms, monkeypatch):
    shutil.rmtree(rooms / "prepared")
    monkeypatch.setattr("threedr1.datasets.doctor.scans.free_bytes", lambda path: 1000)
    (full,) = found(examine(rooms), "disk_full")
    assert full.level == "error" and full.count == 1000 and full.expected == 2 * 50_000 * 24


def test_unaligned_boxes_of_arrays_are_told_of(rooms):
    shutil.rmtree(rooms / "scans" / TRAIN)
    (rooms / "scannet_data").mkdir()
    factory.write_arrays(rooms / "scannet_data", unaligned_boxes=True)
    assert prepare_scans(rooms, workers=1) == []
    examination = examine(rooms)
    assert found(examination, "boxes_unaligned")[0].count == 1
    assert found(examination, "raw_frame_unknown")[0].files == (f"{TRAIN}.txt",)
    assert not found(examination, "not_prepared")


def test_objects_of_cap3d_without_clouds(rooms):
    path = rooms / "annotations" / "Cap3D_automated_Objaverse_full.csv"
    path.write_text('one,"a chair"\ntwo,"a table"\n')
    (missing,) = found(examine(rooms), "clouds_missing")
    assert (missing.count, missing.expected) == (0, 2) and "cap3d/<uid>.ply" in missing.fix
    (rooms / "cap3d").mkdir()
    factory.write_ply(rooms / "cap3d" / "one.ply", np.zeros((3, 3), np.float32))
    assert found(examine(rooms), "clouds_not_prepared")[0].count == 1


def test_what_an_interrupted_run_left_is_a_note(rooms):
    (rooms / "prepared" / f"{TRAIN}.npz.partial").write_bytes(b"")
    (partial,) = examine(rooms).findings
    assert (partial.level, partial.code) == ("note", "partial_left") and partial.fix.startswith("rm ")


def test_the_json_form_keeps_its_fields(rooms):
    (rooms / "annotations" / SCANQA.format("val")).unlink()
    content = json.loads(json.dumps(examine(rooms).to_json()))
    assert set(content) == {"root", "kind", "scenes", "datasets", "findings", "advice"}
    (finding,) = content["findings"]
    assert finding == {
        "level": "warning",
        "code": "file_missing",
        "message": "scanqa (val): annotations/ScanQA_v1.0_val.json is missing.",
        "fix": f"python main.py rooms --out {rooms} with the --train, --val and --seed of the first time",
        "dataset": "scanqa",
        "split": "val",
        "count": 0,
        "expected": None,
        "files": ["annotations/ScanQA_v1.0_val.json"],
    }
    assert set(content["datasets"][0]) == {
        *("dataset", "split", "state", "files", "missing", "records"),
        *("published", "published_source", "usable", "problems"),
    }


_SCALARS = st.none() | st.booleans() | st.integers() | st.text(max_size=5)
_NAMES = st.sampled_from(["scene_id", "scan_id", "questions", "annotations", "captions", "x"])
_JSON = st.recursive(
    _SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_NAMES, inner, max_size=4), max_leaves=15
)


@given(_JSON)
def test_any_json_is_surveyed_or_refused_in_a_sentence(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "survey.json"
    path.write_text(json.dumps(content))
    try:
        result = survey(path)
    except ValueError as error:
        assert str(error).startswith(str(path)) and str(error).endswith(".")
    else:
        assert sum(result.scenes.values()) <= result.records
        assert result.on(set(result.scenes)) == sum(result.scenes.values())


@pytest.mark.parametrize(
    ("name", "content", "records", "scenes"),
    [
        ("a.json", '[{"scene_id": "a"}, {"scan_id": "a"}, {"scene_id": "b"}, 5]', 4, {"a": 2, "b": 1}),
        ("a.json", '{"questions": [{"scene_id": "a"}]}', 1, {"a": 1}),
        ("a.json", '{"a": {"captions": ["x", "y"]}, "b": [["x", "y"], ["x", "z"]]}', 3, {"a": 1, "b": 2}),
        ("a.jsonl", '{"scene_id": "a"}\n\nnothing\n{"x": 1}\n', 3, {"a": 1}),
        ("Cap3D_automated_Objaverse_full.csv", 'u1,"a, b"\nu2,c\nu3\n', 3, {"u1": 1, "u2": 1}),
    ],
)
def test_records_are_counted_in_every_schema(tmp_path, name, content, records, scenes):
    (tmp_path / name).write_text(content)
    result = survey(tmp_path / name)
    assert result.records == records and dict(result.scenes) == scenes
