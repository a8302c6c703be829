"""The official viewer's files of boxes, read and written; files that are none."""

import json
import zipfile

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from threedr1.visualization.box_files import from_world, is_box_file, read_boxes, to_world, write_boxes
from threedr1.visualization.shown_boxes import ShownBoxes

from ..odd_scene import BOX, odd_scene

ROWS = [[1.0, 2.0, 0.5, 2.0, 1.0, 1.0, 0.0], [-1.0, 0.0, 0.5, 0.6, 0.4, 0.9, 0.5]]


def same_boxes(first: ShownBoxes, second: ShownBoxes, atol: float = 1e-6) -> None:
    """Each corner of one box is a corner of the other, box by box."""
    assert len(first) == len(second)
    for a_83, b_83 in zip(first.corners_K83, second.corners_K83, strict=True):
        gaps_88 = np.linalg.norm(a_83[:, None] - b_83, axis=-1)
        assert gaps_88.min(0).max() < atol and gaps_88.min(1).max() < atol


def test_npz_of_corners_as_the_official_exporter_writes_it(tmp_path):
    corners_K83 = ShownBoxes.from_rows(ROWS).corners_K83[:, ::-1].astype(np.float32)
    np.savez_compressed(
        tmp_path / "a.npz", corners=corners_K83, labels=np.array([2, 17], np.int64), scores=np.array([0.9, 0.25])
    )
    boxes = read_boxes(tmp_path / "a.npz")
    same_boxes(boxes, ShownBoxes.from_rows(ROWS), 1e-5)
    assert boxes.texts() == ["2 0.90", "17 0.25"]


def test_npz_of_centers_sizes_and_headings(tmp_path):
    rows_K7 = np.array(ROWS, np.float32)
    np.savez(tmp_path / "a.npz", centers=rows_K7[:, :3], sizes=rows_K7[:, 3:6], headings=rows_K7[:, 6])
    boxes = read_boxes(tmp_path / "a.npz")
    same_boxes(boxes, ShownBoxes.from_rows(ROWS))
    assert boxes.labels == ["", ""] and boxes.scores == [None, None]


def test_json_list_with_and_without_the_optional_parts(tmp_path):
    cos, sin = np.cos(0.5), np.sin(0.5)
    items = [
        {"center": [1, 2, 0.5], "scale": [2, 1, 1]},
        {
            "center": [-1.0, 0.0, 0.5],
            "scale": [0.6, 0.4, 0.9],
            "rotation": [[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]],
            "label": "chair",
            "score": 0.92,
        },
        {"center": [0, 0, 0], "scale": [1, 1, 1], "rotation": None, "label": 3, "score": None},
    ]
    (tmp_path / "a.json").write_text(json.dumps(items))
    boxes = read_boxes(tmp_path / "a.json")
    same_boxes(boxes.first(2), ShownBoxes.from_rows(ROWS))
    assert boxes.texts() == ["", "chair 0.92", "3"]


@pytest.mark.parametrize("name", ["boxes.npz", "boxes.json"])
def test_what_is_written_is_read_again(tmp_path, name):
    boxes = ShownBoxes.from_rows(ROWS, ["chair", ""], [0.5, None])
    found = read_boxes(write_boxes(tmp_path / "new" / name, boxes))
    same_boxes(found, boxes)
    assert found.texts() == ["chair 0.50", ""]
    assert [path.name for path in (tmp_path / "new").iterdir()] == [name]
    assert len(read_boxes(write_boxes(tmp_path / f"none-{name}", ShownBoxes.from_rows([])))) == 0


def test_the_forms_written_are_the_official_ones(tmp_path):
    boxes = ShownBoxes.from_rows(ROWS, ["chair", "table"], [0.5, 0.25])
    with np.load(write_boxes(tmp_path / "a.npz", boxes)) as arrays:
        assert set(arrays.files) == {"centers", "sizes", "headings", "labels", "scores"}
        np.testing.assert_allclose(arrays["headings"], [0.0, 0.5], atol=1e-7)
        assert arrays["labels"].tolist() == ["chair", "table"]
    items = json.loads(write_boxes(tmp_path / "a.json", boxes).read_text())
    assert items[0] == {"center": [1.0, 2.0, 0.5], "scale": [2.0, 1.0, 1.0], "label": "chair", "score": 0.5}
    assert set(items[1]) == {"center", "scale", "rotation", "label", "score"}
    tilted = boxes.moved(np.array([[1, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 0], [0, 0, 0, 1.0]]))
    with np.load(write_boxes(tmp_path / "b.npz", tilted)) as arrays:
        assert "corners" in arrays.files and arrays["corners"].shape == (2, 8, 3)
    for name in ("b.json", "b.npz"):
        same_boxes(read_boxes(write_boxes(tmp_path / name, tilted)), tilted)


def turn(*angles: float) -> np.ndarray:
    """A scan's frame to the world: turned about x, y and z by degrees, in centimetres, far away."""
    matrix_44 = np.eye(4)
    matrix_44[:3, :3] = 0.01 * Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    matrix_44[:3, 3] = [3.0, -20.0, 1.0]
    return matrix_44


@pytest.mark.parametrize("angles", [(4.0, -7.0, 25.0), (90.0, 0.0, 20.0), (90.0, 0.0, 0.0)])
@pytest.mark.parametrize("name", ["a.npz", "a.json"])
def test_boxes_of_a_tilted_scan_and_of_one_with_y_up_are_read_again(tmp_path, angles, name):
    scene = odd_scene()
    scene.axis_align_44 = turn(*angles)
    world = ShownBoxes.from_rows(
        [*ROWS, [0.0, 0.0, 1.0, 2.0, 1.0, 0.0, 0.3]], ["chair", "", "board"], [0.5, None, 1.0]
    )
    in_scan = from_world(world, scene, "scan")
    assert in_scan.headings_K is None
    found = to_world(read_boxes(write_boxes(tmp_path / name, in_scan)), scene, "scan")
    same_boxes(found, world)
    assert found.texts() == world.texts()


def test_turned_boxes_of_the_official_exporter_are_read_in_the_camera_s_frame(tmp_path):
    """Its corners go round the other way: +z first, then -x, then down, in the axes of a camera."""
    signs_83 = np.array([(x, y, z) for y in (1, -1) for x, z in ((1, 1), (1, -1), (-1, -1), (-1, 1))], float)
    yaw = np.radians(20.0)
    about_y_33 = np.array([[np.cos(yaw), 0, np.sin(yaw)], [0, 1, 0], [-np.sin(yaw), 0, np.cos(yaw)]])
    half_3 = np.array([1.0, 0.4, 0.25])
    np.savez(tmp_path / "a.npz", corners=((signs_83 * half_3) @ about_y_33.T + [1.0, -0.5, 2.0])[None])
    found = to_world(read_boxes(tmp_path / "a.npz"), odd_scene(), "camera")
    # about the camera's y, which points down, and so counter-clockwise from below: a heading of -20 degrees
    same_boxes(found, ShownBoxes.from_rows([[1.0, 2.0, 0.5, 2.0, 0.5, 0.8, -yaw]]))
    assert found.headings_K is not None


def test_boxes_of_the_scan_s_frame_land_on_its_points(tmp_path):
    """Written in the raw frame (centimetres, turned) and read again: where the object's points are."""
    scene = odd_scene()
    world = ShownBoxes.from_rows([BOX])
    for name in ("a.npz", "a.json"):
        raw = read_boxes(write_boxes(tmp_path / name, from_world(world, scene, "scan")))
        np.testing.assert_allclose(raw.sizes_K3, [[160, 70, 90]], rtol=1e-6)
        same_boxes(to_world(raw, scene, "scan"), world, 1e-5)


def test_corners_with_a_camera_s_axes():
    """x right, y down, z forward: the room's height is -y, its depth z."""
    scene = odd_scene()
    in_camera = np.array([[BOX[0], -BOX[2], BOX[1]]])
    boxes = ShownBoxes(in_camera, np.array([[1.6, 0.9, 0.7]]), np.eye(3)[None])
    world = to_world(boxes, scene, "camera")
    same_boxes(world, ShownBoxes.from_rows([[*BOX[:6], 0.0]]))
    assert world.headings_K is not None
    same_boxes(from_world(world, scene, "camera"), boxes)


def test_frames_that_are_not_known():
    scene = odd_scene()
    scene.raw_frame_known = False
    boxes = ShownBoxes.from_rows(ROWS)
    with pytest.raises(ValueError, match="add --frame world"):
        to_world(boxes, scene, "scan")
    same_boxes(to_world(boxes, scene, "world"), boxes)
    for move in (to_world, from_world):
        with pytest.raises(ValueError, match="Unknown frame 'room' of boxes; it is one of scan, world, camera"):
            move(boxes, scene, "room")


def box_arrays(**changes):
    rows_K7 = np.array(ROWS)
    arrays = {"centers": rows_K7[:, :3], "sizes": rows_K7[:, 3:6], "headings": rows_K7[:, 6]} | changes
    return {name: array for name, array in arrays.items() if array is not None}


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"points": np.zeros((4, 3))}, "neither corners nor centers, sizes and headings; it holds points"),
        (box_arrays(headings=None), "neither corners nor centers, sizes and headings; it holds centers, sizes"),
        ({"corners": np.zeros((2, 8, 2))}, r"corners must be numbers \[K, 8, 3\], not float64 \[2, 8, 2\]"),
        ({"corners": np.zeros(())}, r"corners must be numbers \[K, 8, 3\]"),
        ({"corners": np.random.default_rng(0).normal(size=(1, 8, 3))}, "give tilted boxes as JSON"),
        (box_arrays(sizes=np.ones((3, 3))), r"sizes must be numbers \[K, 3\], not float64 \[3, 3\]"),
        (box_arrays(sizes=-np.ones((2, 3))), "sizes of boxes must not be negative"),
        (box_arrays(centers=np.full((2, 3), np.nan)), "centers must be finite numbers"),
        (box_arrays(centers=np.array([["a"] * 3] * 2)), "centers must be numbers"),
        (box_arrays(labels=np.array(["a"])), r"there are 2 boxes, but labels has shape \[1\]"),
        (box_arrays(scores=np.array(["a", "b"])), "scores must be numbers"),
        (box_arrays(labels=np.array(["a", None], dtype=object)), "write labels as texts"),
        ({"corners": np.zeros((1 << 20, 8, 3))}, "unpacks to more than 64 MB"),
    ],
)
def test_arrays_that_are_no_boxes(tmp_path, arrays, words):
    np.savez_compressed(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=words) as caught:
        read_boxes(tmp_path / "a.npz")
    assert "a.npz" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is not whole JSON"),
        ('{"center": [0, 0, 0], "scale": [1, 1, 1]}', "must hold a list of boxes"),
        ("[5]", "a.json, row 1: a box is an object with center and scale, not 5"),
        ('[{"center": [0, 0, 0]}]', "row 1: scale must be three finite numbers"),
        ('[{"center": [0, 0], "scale": [1, 1, 1]}]', "row 1: center must be three finite numbers"),
        ('[{"center": [0, NaN, 0], "scale": [1, 1, 1]}]', "row 1: center must be three finite numbers"),
        ('[{"center": [0, 0, 0], "scale": [1, -1, 1]}]', "row 1: scale must not be negative"),
        ('[{"center": [0, 0, 0], "scale": [1, 1, 1], "size": 1}]', "row 1: unknown size"),
        ('[{"center": [0, 0, 0], "scale": [1, 1, 1], "score": "a"}]', "row 1: score must be a number"),
        ('[{"center": [0, 0, 0], "scale": [1, 1, 1], "label": [1]}]', "row 1: label must be a text"),
        ('[{"center": [0, 0, 0], "scale": [1, 1, 1], "rotation": [1]}]', "row 1: rotation must be three rows"),
        (
            '[{"center": [0, 0, 0], "scale": [1, 1, 1], "rotation": [[2, 0, 0], [0, 1, 0], [0, 0, 1]]}]',
            "row 1: rotation must be a rotation",
        ),
        (
            '[{"center": [0, 0, 0], "scale": [1, 1, 1], "rotation": [[-1, 0, 0], [0, 1, 0], [0, 0, 1]]}]',
            "row 1: rotation must be a rotation",
        ),
        ('[{"a": 1}, {"b": 2}]', "2 problems"),
    ],
)
def test_json_that_is_no_list_of_boxes(tmp_path, content, words):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=words):
        read_boxes(tmp_path / "a.json")


def test_files_that_are_none(tmp_path):
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04 and no more")
    (tmp_path / "folder.npz").mkdir()
    with zipfile.ZipFile(tmp_path / "text.npz", "w") as archive:
        archive.writestr("corners.npy", b"not an array")
    for name, words in (
        ("cut.npz", "is not a whole .npz file"),
        ("text.npz", "corners must be numbers"),
        ("folder.npz", "is a folder where a file is expected"),
        ("gone.json", "There is no file of boxes at"),
        ("a.txt", "is no file of boxes; these are .npz, or .json"),
    ):
        with pytest.raises(ValueError, match=words):
            read_boxes(tmp_path / name)
    with pytest.raises(ValueError, match=r"boxes are written as \.npz or \.json"):
        write_boxes(tmp_path / "a.txt", ShownBoxes.from_rows([]))


def test_predictions_in_json_are_told_from_boxes(tmp_path):
    (tmp_path / "rows.json").write_text('[{"sample_id": "a"}]')
    (tmp_path / "boxes.json").write_text("[]")
    assert is_box_file(tmp_path / "boxes.json") and is_box_file("gone.npz")
    assert not is_box_file(tmp_path / "rows.json") and not is_box_file("runs/eval") and not is_box_file("a.jsonl")
