"""Multi-view features of points: rows follow the vertices that were kept."""

import os
import pickle

import h5py
import numpy as np
import pytest

from threedr1.datasets.multiview import MultiviewFeatures
from threedr1.datasets.scannet import load_label_map, prepare_scan
from threedr1.datasets.scene import load_scene

from .. import data_factory as factory


@pytest.fixture
def scene(tmp_path):
    scan = factory.write_mini_scan(tmp_path / "scans", num_frames=0)
    factory.write_label_map(tmp_path / "labels.tsv")
    path = tmp_path / "prepared" / "scene0000_00.npz"
    prepare_scan(scan.folder, load_label_map(tmp_path / "labels.tsv"), path, max_points=200)
    return load_scene(path, mapped=True)


def write(path, **arrays):
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file.create_dataset(name, data=array)
    return MultiviewFeatures(path)


def test_each_point_gets_the_row_of_its_vertex(scene, tmp_path):
    vertices_V3, _ = factory.room_vertices()
    assert len(scene.points_N3) == 200 and scene.num_vertices == len(vertices_V3)
    features = write(tmp_path / "f.hdf5", scene0000_00=vertices_V3.astype(np.float16))
    found_N3 = features.of(scene)
    assert found_N3.dtype == np.float32
    np.testing.assert_allclose(found_N3, scene.points_N3, atol=2e-3)
    assert "scene0000_00" in features and "scene0001_00" not in features


def test_the_file_is_opened_by_each_process(scene, tmp_path, monkeypatch):
    features = write(tmp_path / "f.hdf5", scene0000_00=np.ones((scene.num_vertices, 2), np.float32))
    again = pickle.loads(pickle.dumps(features))
    np.testing.assert_array_equal(again.of(scene), np.ones((200, 2)))
    opened = features._opened()
    assert features._opened() is opened
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert features._opened() is not opened, "a forked process does not use its parent's"


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.ones((5, 2), np.float32), r"shape \[5, 2\], the scene has \d+ vertices"),
        (np.ones(5, np.float32), r"shape \[5\]"),
        ("names", "are int64, not floats"),
        (None, "no features of scene scene0000_00"),
    ],
)
def test_features_of_another_release_are_refused(scene, tmp_path, array, words):
    if isinstance(array, str):
        array = np.ones((scene.num_vertices, 2), np.int64)
    features = write(tmp_path / "f.hdf5", **({} if array is None else {"scene0000_00": array}))
    with pytest.raises(ValueError, match=words):
        features.of(scene)


def test_features_behind_a_link_into_another_file(scene, tmp_path):
    values_VW = np.random.default_rng(0).random((scene.num_vertices, 3)).astype(np.float32)
    write(tmp_path / "part.hdf5", padding=np.ones((50, 3), np.float32), scene0000_00=values_VW)
    with h5py.File(tmp_path / "index.hdf5", "w") as file:
        file["scene0000_00"] = h5py.ExternalLink("part.hdf5", "scene0000_00")
    found = MultiviewFeatures(tmp_path / "index.hdf5").of(scene)
    assert np.array_equal(found, values_VW[scene.vertex_ids_N])


def test_old_scenes_and_broken_files_are_explained(scene, tmp_path):
    features = write(tmp_path / "f.hdf5", scene0000_00=np.ones((scene.num_vertices, 2), np.float32))
    scene.vertex_ids_N = None
    with pytest.raises(ValueError, match="prepare"):
        features.of(scene)
    (tmp_path / "broken.hdf5").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a whole HDF5 file"):
        MultiviewFeatures(tmp_path / "broken.hdf5")
    with pytest.raises(ValueError, match="no feature file"):
        MultiviewFeatures(tmp_path / "absent.hdf5")
