"""The field's prepared arrays: the scene that the raw scan makes, the unaligned-box trap, broken ones."""

import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from threedr1.datasets.scannet import load_label_map, prepare_scan, prepare_scans
from threedr1.datasets.scannet_arrays import SHIFTED, UNALIGNED, StoredBoxes, build_scene_of_arrays, check_boxes
from threedr1.datasets.scene import load_scene
from threedr1.datasets.scene_store import SceneStore
from threedr1.datasets.sources import ARRAYS, PICTURES, RAW, describe, find_sources

from .. import data_factory as factory

SCENE = "scene0000_00"


def notes_of(scene) -> str:
    return "; ".join(scene.notes)


def test_arrays_make_the_scene_that_the_raw_scan_makes(tmp_path):
    scan = factory.write_mini_scan(tmp_path / "scans")
    factory.write_label_map(tmp_path / "labels.tsv")
    raw = prepare_scan(scan.folder, load_label_map(tmp_path / "labels.tsv"), tmp_path / "raw.npz")
    factory.write_arrays(tmp_path / "arrays")
    scene = build_scene_of_arrays(tmp_path / "arrays", SCENE, scan.folder)
    assert scene.object_ids_K.tolist() == raw.object_ids_K.tolist() == [factory.CHAIR, factory.TABLE]
    assert scene.object_labels == ["chair", "table"], "NYU40 names: raw labels are not in the arrays"
    np.testing.assert_array_equal(scene.class_ids_K, raw.class_ids_K)
    np.testing.assert_allclose(scene.boxes_K7, raw.boxes_K7, atol=1e-5)
    np.testing.assert_allclose(scene.points_N3, raw.points_N3, atol=1e-5)
    np.testing.assert_array_equal(scene.instance_ids_N, raw.instance_ids_N)
    np.testing.assert_array_equal(scene.nyu40_N, raw.nyu40_N)
    np.testing.assert_allclose(scene.axis_align_44, raw.axis_align_44)
    assert scene.colors_N3[7].tolist() == [7, 14, 21]
    assert scene.raw_frame_known and len(scene.frames) == len(raw.frames) == 2
    np.testing.assert_allclose(scene.frames[1].pose_44, raw.frames[1].pose_44)


def test_normals_are_left_out(tmp_path):
    factory.write_arrays(tmp_path)
    path = tmp_path / f"{SCENE}_aligned_vert.npy"
    vertices_V6 = np.load(path)
    np.save(path, np.concatenate([vertices_V6, np.full((len(vertices_V6), 3), np.nan, np.float32)], axis=1))
    assert build_scene_of_arrays(tmp_path, SCENE).points_N3.shape == (len(vertices_V6), 3)


@pytest.mark.parametrize("keep", [1, 3])
def test_unaligned_boxes_are_found_and_made_again(tmp_path, keep):
    vertices_V3, objects_V = factory.write_arrays(tmp_path, unaligned_boxes=True, keep=keep)
    scene = build_scene_of_arrays(tmp_path, SCENE)
    assert f"{UNALIGNED} (4 of 4 contradict the vertices)" in notes_of(scene)
    chair_P3 = vertices_V3[objects_V == factory.CHAIR]
    np.testing.assert_allclose(scene.boxes_K7[0, 3:6], np.ptp(chair_P3, axis=0), atol=1e-5)
    np.testing.assert_allclose(scene.boxes_K7[0, :3], (chair_P3.min(0) + chair_P3.max(0)) / 2, atol=1e-5)


def test_boxes_of_all_vertices_are_right_for_a_thinned_cloud(tmp_path):
    factory.write_arrays(tmp_path, keep=3)
    scene = build_scene_of_arrays(tmp_path, SCENE)
    assert UNALIGNED not in notes_of(scene) and "contradict" not in notes_of(scene)
    centre, size = factory.OBJECTS[factory.CHAIR]
    np.testing.assert_allclose(scene.boxes_K7[0], [*centre, *size, 0], atol=1e-5)


def test_a_box_fits_by_two_centimetres_and_half_its_volume():
    stored = StoredBoxes(np.array([[0, 0, 0, 1, 1, 1, 0]], np.float32), np.array([5]), np.array([4]))
    for own, fits in {
        (0.0, 0.0, 0.0, 1.0, 1.0, 1.0): True,
        (0.01, 0.0, 0.0, 1.0, 1.0, 1.0): True,  # 1 cm out of the box
        (0.03, 0.0, 0.0, 1.0, 1.0, 1.0): False,  # 3 cm
        (0.0, 0.0, 0.0, 0.8, 0.9, 0.9): True,  # IoU 0.65
        (0.0, 0.0, 0.0, 0.7, 0.8, 0.8): False,  # IoU 0.45
    }.items():
        assert check_boxes(stored, {4: np.array([*own, 0.0], np.float32)}).tolist() == [fits], own
    assert check_boxes(stored, {5: np.zeros(7, np.float32)}).size == 0, "an object without vertices cannot be judged"
    flat = StoredBoxes(np.array([[0, 0, 0, 1, 0, 1, 0]], np.float32), np.array([11]), np.array([0]))
    assert check_boxes(flat, {0: np.array([0, 0, 0, 1, 0, 1, 0], np.float32)}).all(), "pictures on walls have no depth"


def test_one_wrong_box_is_noted_and_kept(tmp_path):
    factory.write_arrays(tmp_path)
    path = tmp_path / f"{SCENE}_aligned_bbox.npy"
    rows_K8 = np.load(path)
    rows_K8[0, :3] += 1.0
    np.save(path, rows_K8)
    scene = build_scene_of_arrays(tmp_path, SCENE)
    assert "1 of 4 stored boxes contradict the vertices; kept as they are" in notes_of(scene)
    np.testing.assert_allclose(scene.boxes_K7[0, :3], np.array(factory.OBJECTS[factory.CHAIR][0]) + 1, atol=1e-5)


def test_objects_without_a_stored_box_get_one(tmp_path):
    factory.write_arrays(tmp_path)
    path = tmp_path / f"{SCENE}_aligned_bbox.npy"
    rows_K8 = np.load(path)
    np.save(path, rows_K8[rows_K8[:, 7] == factory.CHAIR])  # some copies keep the 18 classes alone
    scene = build_scene_of_arrays(tmp_path, SCENE)
    assert scene.object_ids_K.tolist() == [factory.CHAIR, factory.TABLE]
    assert "1 labelled objects without a stored box" in notes_of(scene)
    path.unlink()
    again = build_scene_of_arrays(tmp_path, SCENE)
    np.testing.assert_allclose(again.boxes_K7, scene.boxes_K7, atol=1e-5)


def test_boxes_of_shifted_ids_give_no_labels(tmp_path):
    factory.write_arrays(tmp_path)
    right = build_scene_of_arrays(tmp_path, SCENE)
    path = tmp_path / f"{SCENE}_aligned_bbox.npy"
    rows_K8 = np.load(path)
    rows_K8[:, 7] += 1
    np.save(path, rows_K8)
    scene = build_scene_of_arrays(tmp_path, SCENE)
    assert SHIFTED in notes_of(scene) and UNALIGNED not in notes_of(scene)
    assert scene.object_ids_K.tolist() == right.object_ids_K.tolist()
    assert scene.object_labels == right.object_labels
    np.testing.assert_allclose(scene.boxes_K7, right.boxes_K7, atol=1e-5)


def test_vertices_alone_are_an_unlabelled_scene_of_unknown_raw_frame(tmp_path):
    factory.write_arrays(tmp_path)
    for name in ("ins_label", "sem_label", "aligned_bbox"):
        (tmp_path / f"{SCENE}_{name}.npy").unlink()
    scene = build_scene_of_arrays(tmp_path, SCENE)
    assert scene.boxes_K7.shape == (0, 7) and set(scene.instance_ids_N.tolist()) == {-1}
    assert "unlabelled" in notes_of(scene) and "raw frame is unknown" in notes_of(scene)
    assert not scene.raw_frame_known
    np.testing.assert_array_equal(scene.axis_align_44, np.eye(4))


def _break(folder, kind):
    def change(name, function):
        path = folder / f"{SCENE}_{name}.npy"
        np.save(path, function(np.load(path)))

    def put(row, column, value):
        def function(array):
            array = array.astype(np.float64)
            array[row, column] = value
            return array

        return function

    if kind == "no vertices":
        (folder / f"{SCENE}_aligned_vert.npy").unlink()
    elif kind == "truncated":
        path = folder / f"{SCENE}_aligned_vert.npy"
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "pickle":
        np.save(folder / f"{SCENE}_ins_label.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    elif kind == "columns":
        change("aligned_vert", lambda array: array[:, :4])
    elif kind == "empty":
        change("aligned_vert", lambda array: array[:0])
    elif kind == "nan":
        change("aligned_vert", put(3, 1, np.nan))
    elif kind == "colours":
        change("aligned_vert", put(3, 4, 300))
    elif kind == "colours to 1":
        change("aligned_vert", lambda array: array / ([1, 1, 1, 255, 255, 255]))
    elif kind == "half labelled":
        (folder / f"{SCENE}_sem_label.npy").unlink()
    elif kind == "other scan":
        change("ins_label", lambda array: array[:-1])
    elif kind == "fraction":
        change("ins_label", lambda array: array + 0.5)
    elif kind == "raw label ids":
        change("sem_label", lambda array: array + 1000)
    elif kind == "seven columns":
        change("aligned_bbox", lambda array: array[:, :7])
    elif kind == "negative size":
        change("aligned_bbox", put(0, 3, -1))
    elif kind == "box class":
        change("aligned_bbox", put(0, 6, 41))
    elif kind == "twice":
        change("aligned_bbox", lambda array: np.concatenate([array, array[:1]]))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("no vertices", "no array"),
        ("colours to 1", "multiply them by 255"),
        ("truncated", "not a whole .npy"),
        ("pickle", "not a whole .npy"),
        ("columns", r"shape \[\d+, 4\], not \[V, 6 or 9\]"),
        ("empty", "empty cloud"),
        ("nan", "1 vertices with NaN"),
        ("colours", "no colours in 0..255"),
        ("half labelled", "sem_label.npy is missing though its partner"),
        ("other scan", "not one scan"),
        ("fraction", "no whole number"),
        ("raw label ids", "no NYU40 class"),
        ("seven columns", r"not \[K, 8\]"),
        ("negative size", "negative size"),
        ("box class", "column 6 is no NYU40 class"),
        ("twice", "names an object twice"),
    ],
)
def test_broken_arrays_are_one_clear_sentence(tmp_path, kind, words):
    factory.write_arrays(tmp_path)
    _break(tmp_path, kind)
    with pytest.raises(ValueError, match=words) as caught:
        build_scene_of_arrays(tmp_path, SCENE)
    assert SCENE in str(caught.value) and "\n" not in str(caught.value)


@settings(max_examples=50, deadline=None)
@given(
    shape=st.lists(st.integers(0, 9), min_size=0, max_size=3),
    kind=st.sampled_from(["f4", "f8", "i8", "u1", "U3", "?"]),
    name=st.sampled_from(["aligned_vert", "ins_label", "sem_label", "aligned_bbox"]),
    seed=st.integers(0, 10),
)
def test_any_array_is_a_scene_or_one_sentence(tmp_path_factory, shape, kind, name, seed):
    folder = tmp_path_factory.mktemp("fuzz")
    factory.write_arrays(folder)
    values = np.random.default_rng(seed).normal(0, 20, shape)
    np.save(folder / f"{SCENE}_{name}.npy", np.asarray(values).astype(kind))
    try:
        scene = build_scene_of_arrays(folder, SCENE)
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert np.isfinite(scene.boxes_K7).all() and len(scene.object_labels) == len(scene.boxes_K7)


@pytest.mark.parametrize("place", ["scannet_data", ".", "scans", f"scans/{SCENE}"])
def test_a_root_of_arrays_is_prepared_without_label_table(tmp_path, capsys, place):
    factory.write_arrays(tmp_path / place)
    assert prepare_scans(tmp_path, workers=1) == []
    assert f"found 1 scenes as prepared arrays in {tmp_path / place}" in capsys.readouterr().err
    path = tmp_path / "prepared" / f"{SCENE}.npz"
    assert load_scene(path).object_labels == ["chair", "table"]
    before = path.stat().st_mtime_ns
    assert prepare_scans(tmp_path, workers=1) == []
    assert path.stat().st_mtime_ns == before, "current: not made again"
    scan = factory.write_mini_scan(tmp_path / "made")
    (tmp_path / "scans" / SCENE).mkdir(parents=True, exist_ok=True)
    shutil.copy(scan.folder / f"{SCENE}.txt", tmp_path / "scans" / SCENE)
    assert prepare_scans(tmp_path, workers=1) == []
    assert load_scene(path).raw_frame_known, "an alignment that came later is taken up"


def test_each_scene_is_read_in_its_best_form(tmp_path):
    root = factory.write_root(tmp_path / "root")
    for scene_id in ("scene0001_00", "scene0005_00"):
        factory.write_arrays(root / "scannet_data", scene_id)
    (root / "scene0006_00" / "images").mkdir(parents=True)
    (root / "scene0006_00" / "images" / "0.jpg").write_bytes(b"")
    sources = find_sources(root)
    assert {source.scene_id: source.kind for source in sources} == {
        "scene0000_00": RAW,
        "scene0001_00": RAW,
        "scene0005_00": ARRAYS,
        "scene0006_00": PICTURES,
    }
    assert describe(sources) == (
        f"2 raw scans; 1 scenes as prepared arrays in {root / 'scannet_data'}; 1 scenes of pictures alone"
    )
    failures = prepare_scans(root, workers=1)
    assert [(failure.scene_id, "pictures but no geometry" in failure.message) for failure in failures] == [
        ("scene0006_00", True)
    ]
    store = SceneStore(root / "prepared")
    assert [info.raw_frame_known for info in store.index.values()] == [True, True, False]
    cached = SceneStore(root / "prepared").index["scene0005_00"]
    assert not cached.raw_frame_known and any("raw frame is unknown" in note for note in cached.notes)


def test_a_root_of_nothing_says_what_it_may_hold(tmp_path):
    with pytest.raises(
        ValueError, match=r"no folder .*scans; .* prepared arrays \(<scene_id>_aligned_vert.npy\) into"
    ):
        prepare_scans(tmp_path)


@pytest.mark.real
def test_the_trap_is_found_in_real_boxes(real_data, tmp_path):
    """Real objects, their raw extents as the stored boxes: what the single-scan exporter writes."""
    import orjson

    alignments = orjson.loads((real_data / "scannet" / "scans_axis_alignment_matrices.json").read_bytes())
    checked = 0
    for path in sorted((real_data / "scannet_instances").glob("*.npz"))[:40]:
        matrix_44 = np.array(alignments[path.stem], dtype=np.float64).reshape(4, 4)
        turned = abs(np.degrees(np.arctan2(matrix_44[1, 0], matrix_44[0, 0])))
        with np.load(path) as content:
            ids_K, offsets = content["object_ids"], content["offsets"]
            raw_P3, corners = content["points"].astype(np.float64), content["boxes_min_max"].astype(np.float64)
        world_P3 = raw_P3 @ matrix_44[:3, :3].T + matrix_44[:3, 3]
        counts = np.diff(offsets, append=len(raw_P3))[: len(ids_K)]
        instance_P = np.repeat(ids_K, counts)
        rows = [
            [*(row[:3] + row[3:]) / 2, *(row[3:] - row[:3]), 39, object_id]
            for row, object_id in zip(corners.reshape(-1, 6), ids_K, strict=True)
        ]
        folder = tmp_path / path.stem
        folder.mkdir()
        np.save(folder / f"{path.stem}_aligned_vert.npy", np.c_[world_P3, np.zeros_like(world_P3)].astype(np.float32))
        np.save(folder / f"{path.stem}_ins_label.npy", instance_P + 1)
        np.save(folder / f"{path.stem}_sem_label.npy", np.full(len(instance_P), 39))
        np.save(folder / f"{path.stem}_aligned_bbox.npy", np.array(rows))
        scene = build_scene_of_arrays(folder, path.stem)
        if turned > 1:
            checked += 1
            assert UNALIGNED in notes_of(scene), (path.stem, turned)
    assert checked > 20
