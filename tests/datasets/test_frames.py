"""Picture trees and depth files."""

import numpy as np
import pytest
from PIL import Image

from threedr1.datasets.frames import list_pictures, read_depth
from threedr1.datasets.readers import read_scene, unproject
from threedr1.datasets.scannet import load_label_map, prepare_scan
from threedr1.datasets.scene import Frame, load_scene

from .. import data_factory as factory


@pytest.fixture
def scan(tmp_path):
    """A raw scan whose pictures are a tree of images/ and depth/ without poses."""
    scan = factory.write_mini_scan(tmp_path / "scans")
    (scan.folder / "color").rename(scan.folder / "images")
    (scan.folder / "pose").rename(tmp_path / "pose")
    factory.write_label_map(tmp_path / "labels.tsv")
    return scan


def prepared(scan, tmp_path):
    prepare_scan(scan.folder, load_label_map(tmp_path / "labels.tsv"), tmp_path / "prepared" / "scene0000_00.npz")
    return load_scene(tmp_path / "prepared" / "scene0000_00.npz")


def test_pictures_without_poses_are_listed_by_name_and_noted(scan, tmp_path):
    for name in ("10.jpg", "2.PNG"):
        (scan.folder / "images" / name).write_bytes((scan.folder / "images" / "0.jpg").read_bytes())
    (scan.folder / "images" / "notes.txt").write_text("no picture")
    np.save(scan.folder / "depth" / "10.npy", np.ones((4, 4)))
    scene = prepared(scan, tmp_path)
    names = [picture.color_path.rpartition("/")[2] for picture in scene.pictures]
    depths = [picture.depth_path and picture.depth_path.rpartition("/")[2] for picture in scene.pictures]
    assert names == ["0.jpg", "1.jpg", "2.PNG", "2.jpg", "10.jpg"]
    assert depths == ["0.png", "1.png", "2.png", "2.png", "10.npy"]
    assert read_depth(scene.pictures[-1].depth_path or "").tolist() == np.ones((4, 4)).tolist()
    assert scene.frames == []
    assert scene.notes == ["5 pictures have no poses: listed, but views are rendered from the points"]


def test_a_tree_with_poses_is_posed(scan, tmp_path):
    (tmp_path / "pose").rename(scan.folder / "pose")
    scene = prepared(scan, tmp_path)
    assert len(scene.frames) == 2 and scene.pictures == []
    np.testing.assert_allclose(scene.frames[0].pose_44, factory.camera_pose(0), atol=1e-6)


def test_poses_of_an_unknown_raw_frame_are_not_used(tmp_path):
    scan = factory.write_mini_scan(tmp_path / "scans")
    (scan.folder / "scene0000_00.txt").unlink()
    from threedr1.datasets.scannet_arrays import build_scene_of_arrays

    factory.write_arrays(tmp_path / "arrays")
    scene = build_scene_of_arrays(tmp_path / "arrays", "scene0000_00", scan.folder, max_frames=2)
    assert scene.frames == [] and len(scene.pictures) == 2
    assert any("3 pictures cannot be placed without the axis alignment" in note for note in scene.notes)


def test_a_folder_of_pictures_alone_is_explained(scan):
    for path in scan.folder.glob("scene*"):
        path.unlink()
    assert len(list_pictures(scan.folder)) == 3
    with pytest.raises(ValueError, match="pictures without poses"):
        read_scene(scan.folder)


def test_depth_in_millimetres_and_metres(tmp_path):
    raw_HW = np.array([[0, 1500, 65535]], np.uint16)
    Image.fromarray(raw_HW).save(tmp_path / "a.png")
    np.save(tmp_path / "b.npy", raw_HW)
    np.save(tmp_path / "c.npy", np.array([[[np.nan], [1.5], [-1.0]]], np.float64))
    assert read_depth(tmp_path / "a.png").tolist() == read_depth(tmp_path / "b.npy").tolist() == [[0, 1.5, 0]]
    assert read_depth(tmp_path / "c.npy").tolist() == [[0, 1.5, 0]]
    assert read_depth(tmp_path / "a.png").dtype == np.float32


def test_depth_arrays_are_fused_as_pictures_are(tmp_path):
    Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(tmp_path / "a.png")
    raw_HW = np.arange(1000, 1024, dtype=np.uint16).reshape(4, 6)
    Image.fromarray(raw_HW).save(tmp_path / "d.png")
    np.save(tmp_path / "d.npy", (raw_HW / 1000).astype(np.float32))
    intrinsics_33 = np.array([[5.0, 0, 2.5], [0, 5.0, 1.5], [0, 0, 1]])
    clouds = [
        unproject(Frame(str(tmp_path / "a.png"), str(tmp_path / name), np.eye(4), intrinsics_33))[0]
        for name in ("d.png", "d.npy")
    ]
    np.testing.assert_array_equal(*clouds)
    np.testing.assert_allclose(clouds[0][:, 2], raw_HW.ravel() / 1000, atol=1e-6)


@pytest.mark.parametrize("kind", ["cut", "colour", "words", "missing"])
def test_broken_depth_is_one_sentence(tmp_path, kind):
    path = tmp_path / "d.npy"
    if kind == "cut":
        np.save(path, np.zeros((4, 4)))
        path.write_bytes(path.read_bytes()[:-9])
    elif kind == "colour":
        np.save(path, np.zeros((4, 4, 3)))
    elif kind == "words":
        np.save(path, np.array([["a"]]))
    with pytest.raises(ValueError, match=r"d\.npy is not a"):
        read_depth(path)
