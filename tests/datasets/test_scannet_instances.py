"""Labelled instances: the scene that the raw scan makes, alignment, broken files, `prepare`."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from threedr1.datasets.scan_labels import LABEL_MAP_NAME, load_label_map
from threedr1.datasets.scannet import prepare_scan, prepare_scans
from threedr1.datasets.scannet_instances import (
    FOLDER,
    MATRICES,
    NO_COLORS,
    build_scene_of_instances,
    extents,
    find_alignment,
    read_instances,
    shortfall,
)
from threedr1.datasets.scene import load_scene
from threedr1.datasets.scene_store import SceneStore
from threedr1.datasets.sources import INSTANCES, RAW, describe, find_sources
from threedr1.utils.labels import DETECTION_CLASSES

from .. import data_factory as factory

SCENE = "scene0000_00"
ROUNDING = 0.011  # metres: float16 from 8 m on is off by 4 mm a coordinate, turned about z, at both sides of a box


@pytest.fixture
def root(tmp_path):
    """A data root of one scan's instances."""
    factory.write_instances(tmp_path / FOLDER, most=10_000)
    factory.write_matrices(tmp_path / MATRICES, SCENE)
    factory.write_label_map(tmp_path / LABEL_MAP_NAME)
    return tmp_path


def build(root, **options):
    table = load_label_map(root / LABEL_MAP_NAME)
    return build_scene_of_instances(root / FOLDER / f"{SCENE}.npz", table, root / MATRICES, **options)


def test_instances_make_the_scene_that_the_raw_scan_makes(root):
    scan = factory.write_mini_scan(root / "elsewhere")
    raw = prepare_scan(scan.folder, load_label_map(root / LABEL_MAP_NAME), root / "raw.npz")
    scene = build(root)
    assert scene.scene_id == SCENE
    assert scene.object_ids_K.tolist() == raw.object_ids_K.tolist() == [factory.CHAIR, factory.TABLE]
    assert scene.object_labels == raw.object_labels == ["office chair", "table"], "raw labels"
    np.testing.assert_array_equal(scene.class_ids_K, raw.class_ids_K)
    np.testing.assert_allclose(scene.boxes_K7, raw.boxes_K7, atol=ROUNDING)
    for row, object_id in enumerate(scene.object_ids_K.tolist()):
        centre, size = factory.OBJECTS[object_id]
        np.testing.assert_allclose(scene.boxes_K7[row], [*centre, *size, 0], atol=ROUNDING)
    np.testing.assert_allclose(scene.axis_align_44, raw.axis_align_44, atol=1e-6)
    np.testing.assert_allclose(scene.origin_3, raw.origin_3, atol=ROUNDING)
    for object_id, nyu40 in {factory.CHAIR: 5, factory.TABLE: 7, factory.FLOOR: 2, factory.WALLS: 1}.items():
        own_N = scene.instance_ids_N == object_id
        assert own_N.sum() == (raw.instance_ids_N == object_id).sum(), "walls and floors stay as points"
        assert set(scene.nyu40_N[own_N].tolist()) == {nyu40}


def test_stored_boxes_are_not_taken_for_the_aligned_ones(root):
    own = read_instances(root / FOLDER / f"{SCENE}.npz")
    table = list(factory.LABELS).index(factory.TABLE)
    stored_3 = own.boxes_K6[table, 3:] - own.boxes_K6[table, :3]
    # 1.2 x 0.8 m, turned by 30 degrees
    cos, sin = math.cos(math.radians(30)), 0.5
    np.testing.assert_allclose(stored_3, [1.2 * cos + 0.8 * sin, 1.2 * sin + 0.8 * cos, 0.75], atol=1e-4)
    np.testing.assert_allclose(build(root).boxes_K7[1, 3:6], [1.2, 0.8, 0.75], atol=ROUNDING)


def test_what_is_assumed_stands_in_the_notes(root):
    factory.write_instances(root / FOLDER, most=512)
    scene = build(root)
    assert set(scene.colors_N3.ravel().tolist()) == {128}
    assert NO_COLORS in scene.notes
    assert scene.vertex_ids_N is None and scene.num_vertices == 0, "rows are no vertices of the mesh"
    notes = "; ".join(scene.notes)
    assert "rounded by up to 3.9 mm" in notes, "the raw cloud reaches beyond 8 m"
    # a floor of 41 x 31 and walls of 41 x 25 + 31 x 25 points are thinned, and the table
    assert "3 of 4 objects are thinned, to 512 points at most" in notes
    factory.write_instances(root / FOLDER, most=10_000)
    assert "thinned" not in "; ".join(build(root).notes)


def test_thinned_scenes_keep_the_boxes_of_all_points(root):
    everything = build(root)
    scene = build(root, max_points=300)
    assert len(scene.points_N3) == 300 < len(everything.points_N3)
    np.testing.assert_array_equal(scene.boxes_K7, everything.boxes_K7)


def test_shortfall_by_hand(root):
    low, high = [0.0, 0.0, 0.0, 2.0, 2.0, 2.0], [1.0, 1.0, 1.0, 1.5, 1.5, 1.5]
    factory.write_instances(
        root / FOLDER,
        object_ids=np.array([3, 7], np.int32),
        labels=np.array(["table", "lamp"]),
        boxes_min_max=np.array([low, high], np.float32),
        point_counts=np.array([9, 2], np.int32),
        points=np.array([[0.5, 0, 1], [2, 1.75, 0], [1, 1, 1], [1.5, 1.5, 1.5]], np.float16),
        offsets=np.array([0, 2, 4], np.int32),
    )
    own = read_instances(root / FOLDER / f"{SCENE}.npz")
    np.testing.assert_allclose(extents(own), [[0.5, 0, 0, 2, 1.75, 1], high])
    np.testing.assert_allclose(shortfall(own), [[0.5, 0, 0, 0, 0.25, 1], [0] * 6])
    assert own.rounding == 2**-10, "float16 steps by 2 mm from 2 m on"


# ---- alignment


def test_the_scan_own_text_file_goes_before_the_table(tmp_path):
    factory.write_matrices(tmp_path / MATRICES, SCENE, degrees=10.0)
    scan = factory.write_mini_scan(tmp_path / "scans")
    for folder, degrees in ((scan.folder, 30.0), (tmp_path, 10.0)):
        matrix_44 = find_alignment(SCENE, [folder], tmp_path / MATRICES)
        np.testing.assert_allclose(matrix_44, factory.axis_alignment(degrees), atol=1e-6)
    (scan.folder / f"{SCENE}.txt").write_text("colorHeight = 48\n")  # as ScanNet's test scans: without the line
    np.testing.assert_allclose(
        find_alignment(SCENE, [scan.folder], tmp_path / MATRICES), factory.axis_alignment(10.0), atol=1e-6
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no axis alignment of scene0000_00"),
        ("{}", "no axis alignment of scene0000_00"),
        ('{"scene0000_00": [1, 2, 3]}', "is not 16 numbers"),
        ('{"scene0000_00": {"a": 1}}', "is not 16 numbers"),
        (json.dumps({SCENE: [2.0 * (i % 5 == 0) for i in range(16)]}), "is not a rigid transform"),
        ('{"scene0000_00": [', "is not whole JSON"),
        ("[1, 2]", "does not map scene ids"),
    ],
)
def test_a_scan_without_a_matrix_is_an_error(root, content, message):
    (root / MATRICES).unlink()
    if content is not None:
        (root / MATRICES).write_text(content)
    with pytest.raises(ValueError, match=message):
        build(root)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.floats(-180, 180))
def test_boxes_are_the_extents_of_the_aligned_points(tmp_path_factory, seed, count, degrees):
    """Against a plain loop over objects in float64."""
    rng, folder = np.random.default_rng(seed), tmp_path_factory.mktemp("instances")
    own = [rng.uniform(-6, 6, (int(rng.integers(1, 40)), 3)).astype(np.float16) for _ in range(count)]
    ids = rng.permutation(50)[:count].astype(np.int32)
    factory.write_instances(
        folder,
        object_ids=ids,
        labels=np.array(["table"] * count),
        boxes_min_max=np.stack([np.r_[part.min(0), part.max(0)] for part in own]).astype(np.float32),
        point_counts=np.array([len(part) for part in own], np.int32),
        points=np.concatenate(own),
        offsets=np.cumsum([0, *map(len, own)]).astype(np.int32),
    )
    factory.write_matrices(folder / MATRICES, SCENE, degrees=degrees)
    scene = build_scene_of_instances(folder / f"{SCENE}.npz", {"table": 7}, folder / MATRICES)
    assert scene.object_ids_K.tolist() == sorted(ids.tolist())
    matrix_44 = factory.axis_alignment(degrees)
    for object_id, part in zip(ids.tolist(), own, strict=True):
        world = np.array([[sum(row[a] * p[a] for a in range(3)) + row[3] for row in matrix_44[:3]] for p in part])
        expected = [*(world.min(0) + world.max(0)) / 2, *(world.max(0) - world.min(0)), 0.0]
        np.testing.assert_allclose(scene.boxes_of([object_id])[0], expected, atol=1e-5)


# ---- broken files


def _bad_points(value):
    points = np.zeros((4, 3), np.float16)
    points[2, 1] = value
    return {
        "object_ids": np.array([1], np.int32),
        "labels": np.array(["table"]),
        "boxes_min_max": np.zeros((1, 6), np.float32),
        "point_counts": np.array([4], np.int32),
        "points": points,
        "offsets": np.array([0, 4], np.int32),
    }


NONE = {
    "object_ids": np.zeros(0, np.int32),
    "labels": np.array([], "U4"),
    "boxes_min_max": np.zeros((0, 6), np.float32),
    "point_counts": np.zeros(0, np.int32),
    "points": np.zeros((0, 3), np.float16),
    "offsets": np.zeros(1, np.int32),
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"offsets": None}, "the array offsets is missing"),
        ({"labels": np.array(["table"])}, "labels is <U5 .1., which does not go with 4 objects"),
        ({"labels": np.arange(4)}, "labels is int64"),
        ({"object_ids": np.zeros((2, 2), np.int32)}, "object_ids is int32 .2, 2."),
        ({"object_ids": np.array([1, 1, 2, 3])}, "names an object twice"),
        ({"object_ids": np.array([-1, 1, 2, 3])}, "one below 0"),
        ({"points": np.float16(1.0)}, "points is float16"),
        ({"points": np.zeros((9, 2), np.float16)}, "points is float16 .9, 2."),
        ({"offsets": np.array([0, 4, 2, 5, 9])}, "offsets do not run from 0"),
        ({"offsets": np.array([0, 1, 2, 3, 4])}, "offsets do not run from 0"),
        ({"point_counts": np.array([1, 1, 1, 1])}, "more points than point_counts"),
        (_bad_points(np.nan), "points has 1 rows with NaN"),
        (_bad_points(np.inf), "points has 1 rows with NaN"),
        (_bad_points(1.0), "points of object 1 lie 1.00 m outside its stored box"),
        (_bad_points(0.0) | {"boxes_min_max": np.full((1, 6), np.nan, np.float32)}, "boxes_min_max has 1 rows"),
        (_bad_points(0.0) | {"labels": np.array(["unicorn"])}, "label 'unicorn' is not in the label table"),
        (NONE, "it holds no object"),
    ],
)
def test_a_broken_file_is_one_sentence(root, changes, message):
    factory.write_instances(root / FOLDER, **changes)
    with pytest.raises(ValueError, match=message):
        build(root)


def test_an_object_without_points_is_named(root):
    arrays = factory.write_instances(root / FOLDER)
    offsets = arrays["offsets"].copy()
    offsets[1] = 0
    factory.write_instances(root / FOLDER, offsets=offsets, point_counts=np.full(4, 10_000))
    with pytest.raises(ValueError, match="object 0 has no points"):
        build(root)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_damaged_file_is_read_or_refused_in_one_sentence(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damaged")
    factory.write_instances(folder)
    path = folder / f"{SCENE}.npz"
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content)))]
    else:
        for _ in range(data.draw(st.integers(1, 20))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        own = read_instances(path)
    except ValueError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        assert len(own.labels) == len(own.object_ids_K) == 4


def test_a_missing_file_is_one_sentence(root):
    (root / FOLDER / f"{SCENE}.npz").unlink()
    with pytest.raises(ValueError, match="There are no instances at"):
        build(root)


# ---- `prepare`


def test_prepare_says_what_it_found_and_what_a_split_lacks(root, capsys):
    factory.write_instances(root / FOLDER, "scene0001_00")
    factory.write_matrices(root / MATRICES, SCENE, "scene0001_00")
    (root / "scannetv2_train.txt").write_text("scene0009_00\nscene0000_00\nscene0008_00\n")
    assert prepare_scans(root, split="train", workers=1) == []
    told = capsys.readouterr().err
    assert "2 of 3 scans of split train are not there: left out" in told
    assert f"found 1 scenes as labelled instances in {root / FOLDER}" in told
    assert SceneStore(root / "prepared").scene_ids == [SCENE]
    assert prepare_scans(root, workers=1) == []
    assert "found 2 scenes as labelled instances" in capsys.readouterr().err
    assert SceneStore(root / "prepared").scene_ids == [SCENE, "scene0001_00"]


def test_scans_without_matrix_and_broken_ones_are_reported(root, capsys):
    factory.write_instances(root / FOLDER, "scene0001_00")
    factory.write_instances(root / FOLDER, "scene0002_00", offsets=None)
    factory.write_matrices(root / MATRICES, SCENE, "scene0002_00")
    failures = prepare_scans(root, workers=1)
    assert [failure.scene_id for failure in failures] == ["scene0001_00", "scene0002_00"]
    assert "no axis alignment of scene0001_00" in failures[0].message
    assert "offsets is missing" in failures[1].message
    told = capsys.readouterr().err
    assert all(f"{failure.scene_id}: {failure.message}" in told for failure in failures)
    assert SceneStore(root / "prepared").scene_ids == [SCENE], "the whole one is prepared"


def test_a_changed_matrix_or_label_table_prepares_again(root):
    path = root / "prepared" / f"{SCENE}.npz"
    assert prepare_scans(root, workers=1) == []
    first, stamp = load_scene(path), path.stat().st_mtime_ns
    assert prepare_scans(root, workers=1) == []
    assert path.stat().st_mtime_ns == stamp, "nothing changed"
    factory.write_matrices(root / MATRICES, SCENE, "scene0001_00", degrees=31.0)
    assert prepare_scans(root, workers=1) == []
    assert not np.allclose(load_scene(path).boxes_K7, first.boxes_K7, atol=1e-3)
    table = root / LABEL_MAP_NAME
    table.write_text(table.read_text().replace("\t5\t1\t", "\t6\t1\t"))
    assert prepare_scans(root, workers=1) == []
    assert load_scene(path).class_ids_K[0] == DETECTION_CLASSES.index("sofa")


def test_a_mesh_goes_before_instances(root):
    factory.write_instances(root / FOLDER, "scene0001_00")
    factory.write_mini_scan(root / "scans")
    sources = find_sources(root)
    assert [(source.scene_id, source.kind) for source in sources] == [(SCENE, RAW), ("scene0001_00", INSTANCES)]
    assert describe(sources) == f"1 raw scans; 1 scenes as labelled instances in {root / FOLDER}"
    wanted = find_sources(root, ["scene0007_00"])
    assert [source.kind for source in wanted] == [RAW], "beside raw scans, a missing one is a missing scan"
