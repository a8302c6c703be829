"""Preparation: alignment, boxes, caching, and what broken scans are told."""

import json
import os
import time

import numpy as np
import pytest

from threedr1.datasets.scannet import load_label_map, prepare_scan, prepare_scans, read_axis_alignment
from threedr1.datasets.scene import load_scene
from threedr1.utils.labels import DETECTION_CLASSES

from .. import data_factory as factory


@pytest.fixture
def scan(tmp_path):
    return factory.write_mini_scan(tmp_path / "scans")


@pytest.fixture
def label_map(tmp_path):
    factory.write_label_map(tmp_path / "labels.tsv")
    return load_label_map(tmp_path / "labels.tsv")


def test_boxes_are_extents_after_alignment(scan, label_map, tmp_path):
    scene = prepare_scan(scan.folder, label_map, tmp_path / "out" / "scene0000_00.npz")
    assert scene.object_ids_K.tolist() == [factory.CHAIR, factory.TABLE]
    assert scene.object_labels == ["office chair", "table"]
    assert [DETECTION_CLASSES[i] for i in scene.class_ids_K] == ["chair", "table"]
    for row, object_id in enumerate((factory.CHAIR, factory.TABLE)):
        centre, size = factory.OBJECTS[object_id]
        np.testing.assert_allclose(scene.boxes_K7[row], [*centre, *size, 0.0], atol=2e-6)
    # the boxes before alignment are another thing: the trap this guards against
    raw_chair = scan.raw_V3[scan.objects_V == factory.CHAIR]
    assert np.abs(np.ptp(raw_chair, axis=0) - scene.boxes_K7[0, 3:6]).max() > 0.1
    np.testing.assert_allclose(scene.points_N3, scan.vertices_V3, atol=1e-5)
    np.testing.assert_allclose(scene.origin_3, [0, 0, 0], atol=1e-5)
    assert scene.instance_ids_N.tolist() == scan.objects_V.tolist()
    assert set(scene.nyu40_N[scan.objects_V == factory.TABLE]) == {7}


def test_frames_are_aligned_and_lost_poses_dropped(scan, label_map, tmp_path):
    out = tmp_path / "prepared" / "scene0000_00.npz"
    prepare_scan(scan.folder, label_map, out)
    scene = load_scene(out)
    assert len(scene.frames) == 2
    assert scene.notes == ["1 frames without a finite pose left out"]
    for index, frame in enumerate(scene.frames):
        np.testing.assert_allclose(frame.pose_44, factory.camera_pose(index), atol=1e-6)
        assert os.path.exists(frame.color_path) and frame.depth_path and os.path.exists(frame.depth_path)
    assert scene.frames[0].intrinsics_33[0].tolist() == [60.0, 0.0, 32.0]


def test_subsampling_is_seeded_and_keeps_extents_boxes_and_origin(scan, label_map, tmp_path):
    full = prepare_scan(scan.folder, label_map, tmp_path / "full.npz")
    few = prepare_scan(scan.folder, label_map, tmp_path / "few.npz", max_points=300, seed=1)
    again = prepare_scan(scan.folder, label_map, tmp_path / "again.npz", max_points=300, seed=1)
    other = prepare_scan(scan.folder, label_map, tmp_path / "other.npz", max_points=300, seed=2)
    assert len(few.points_N3) == 300
    np.testing.assert_array_equal(few.points_N3, again.points_N3)
    assert not np.array_equal(few.points_N3, other.points_N3)
    np.testing.assert_array_equal(few.boxes_K7, full.boxes_K7)
    np.testing.assert_array_equal(few.origin_3, full.origin_3)
    inverse_44 = np.linalg.inv(full.axis_align_44)
    for scene_points in (few.points_N3, few.points_N3 @ inverse_44[:3, :3].T):
        reference = full.points_N3 if scene_points is few.points_N3 else full.points_N3 @ inverse_44[:3, :3].T
        np.testing.assert_allclose(scene_points.min(0), reference.min(0), atol=1e-6)
        np.testing.assert_allclose(scene_points.max(0), reference.max(0), atol=1e-6)


def test_frames_are_thinned_evenly(scan, label_map, tmp_path):
    scene = prepare_scan(scan.folder, label_map, tmp_path / "a.npz", max_frames=1)
    assert len(scene.frames) == 1


def test_unlabelled_unaligned_scan_says_so(scan, label_map, tmp_path):
    for suffix in ("_vh_clean_2.0.010000.segs.json", ".aggregation.json", ".txt"):
        (scan.folder / f"scene0000_00{suffix}").unlink()
    scene = prepare_scan(scan.folder, label_map, tmp_path / "a.npz")
    assert scene.boxes_K7.shape == (0, 7) and scene.object_ids_K.size == 0
    assert set(scene.instance_ids_N.tolist()) == {-1}
    np.testing.assert_allclose(scene.points_N3, scan.raw_V3)
    text = " ".join(scene.notes)
    assert "unlabelled" in text and "axisAlignment" in text


def _truncate(path, share=0.5):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def _break(folder, kind):
    ply = folder / "scene0000_00_vh_clean_2.ply"
    segs = folder / "scene0000_00_vh_clean_2.0.010000.segs.json"
    groups = folder / "scene0000_00.aggregation.json"
    if kind == "missing mesh":
        ply.unlink()
    elif kind == "truncated vertices":
        _truncate(ply)
    elif kind == "truncated faces":
        ply.write_bytes(ply.read_bytes()[:-30])
    elif kind == "no header":
        ply.write_bytes(b"nothing")
    elif kind == "empty cloud":
        factory.write_ply(ply, np.zeros((0, 3), np.float32))
    elif kind == "nan":
        factory.write_ply(ply, np.full((10, 3), np.nan, np.float32))
    elif kind == "half labelled":
        groups.unlink()
    elif kind == "truncated segs":
        _truncate(segs)
    elif kind == "other scan's segs":
        segs.write_text(json.dumps({"segIndices": [1, 2, 3]}))
    elif kind == "no groups":
        groups.write_text("{}")
    elif kind == "unknown label":
        groups.write_text(groups.read_text().replace("office chair", "flying carpet"))
    elif kind == "bad alignment":
        (folder / "scene0000_00.txt").write_text("axisAlignment = 1 2 3\n")
    elif kind == "squashing alignment":
        (folder / "scene0000_00.txt").write_text("axisAlignment = " + " ".join("2" * 16) + "\n")
    elif kind == "bad pose":
        (folder / "pose" / "0.txt").write_text("1 2 3")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing mesh", "no mesh"),
        ("truncated vertices", "not a whole PLY"),
        ("truncated faces", "not a whole PLY"),
        ("no header", "not a whole PLY"),
        ("empty cloud", "empty cloud"),
        ("nan", "NaN"),
        ("half labelled", "aggregation.json is missing"),
        ("truncated segs", "not whole JSON"),
        ("other scan's segs", "not one scan"),
        ("no groups", "lacks 'segGroups'"),
        ("unknown label", "'flying carpet'"),
        ("bad alignment", "not 16 numbers"),
        ("squashing alignment", "not a rigid"),
        ("bad pose", "4x4"),
    ],
)
def test_a_broken_scan_is_one_clear_sentence_and_writes_nothing(scan, label_map, tmp_path, kind, words):
    _break(scan.folder, kind)
    out = tmp_path / "out" / "scene0000_00.npz"
    with pytest.raises(ValueError, match=words.replace(".", r"\.")) as caught:
        prepare_scan(scan.folder, label_map, out)
    assert "\n" not in str(caught.value)
    assert not out.parent.exists() or not list(out.parent.iterdir())


@pytest.mark.parametrize("workers", [1, 2])
def test_a_broken_scan_does_not_stop_the_others(tmp_path, workers):
    root = factory.write_root(tmp_path, train=("scene0000_00", "scene0002_00"))
    _truncate(root / "scans" / "scene0002_00" / "scene0002_00_vh_clean_2.ply")
    failures = prepare_scans(root, workers=workers)
    assert [failure.scene_id for failure in failures] == ["scene0002_00"]
    assert "PLY" in failures[0].message
    assert sorted(p.name for p in (root / "prepared").glob("*.npz")) == ["scene0000_00.npz", "scene0001_00.npz"]


def test_only_what_changed_is_prepared_again(tmp_path):
    root = factory.write_root(tmp_path)
    assert prepare_scans(root, workers=1) == []
    paths = [root / "prepared" / f"scene000{i}_00.npz" for i in range(2)]
    before = [path.stat().st_mtime_ns for path in paths]
    assert prepare_scans(root, workers=1) == []
    assert [path.stat().st_mtime_ns for path in paths] == before
    later = time.time() + 10
    os.utime(root / "scans" / "scene0001_00" / "scene0001_00.aggregation.json", (later, later))
    assert prepare_scans(root, workers=1) == []
    after = [path.stat().st_mtime_ns for path in paths]
    assert after[0] == before[0] and after[1] > before[1]
    assert prepare_scans(root, workers=1, max_points=100) == []
    assert all(len(load_scene(path).points_N3) == 100 for path in paths)


def test_split_takes_its_scans_and_misses_are_failures(tmp_path):
    root = factory.write_root(tmp_path)
    with (root / "scannetv2_val.txt").open("a") as stream:
        stream.write("scene0009_00\n")
    failures = prepare_scans(root, split="val", workers=1)
    assert [(f.scene_id, "no scan folder" in f.message) for f in failures] == [("scene0009_00", True)]
    assert not (root / "prepared" / "scene0000_00.npz").exists()


def test_missing_root_split_and_label_table(tmp_path):
    with pytest.raises(ValueError, match="no folder"):
        prepare_scans(tmp_path)
    root = factory.write_root(tmp_path)
    with pytest.raises(ValueError, match="no split file"):
        prepare_scans(root, split="test")
    (root / "scannetv2-labels.combined.tsv").write_text("a\tb\n")
    with pytest.raises(ValueError, match="raw_category"):
        prepare_scans(root)


def test_alignment_file_without_the_line_is_none(tmp_path):
    (tmp_path / "a.txt").write_text("colorWidth = 640\n")
    assert read_axis_alignment(tmp_path / "a.txt") is None
    assert read_axis_alignment(tmp_path / "b.txt") is None


@pytest.mark.real
def test_real_label_table(real_data):
    table = load_label_map(real_data / "scannet" / "scannetv2-labels.combined.tsv")
    assert table["office chair"] == 5 and table["wall"] == 1 and len(table) > 500
