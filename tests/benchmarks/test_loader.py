"""The loader's benchmark: what it compares is alike, and it measures."""

import numpy as np
import pytest

from threedr1.benchmarks import loader
from threedr1.benchmarks._loader_peer import PlainDataset, write_arrays_of
from threedr1.datasets.scannet_arrays import build_scene_of_arrays
from threedr1.datasets.scene import save_scene
from threedr1.datasets.scene_store import SceneStore


def test_it_measures_rates_beside_the_peer():
    rows = loader.measure(num_scenes=2, num_batches=1, repeats=1)
    assert [row.name for row in rows] == ["loader.samples_per_s", "loader.samples_per_s_first_epoch"]
    for row in rows:
        assert row.better == "higher" and row.value > 0 and row.peer_value is not None and row.peer_value > 0
        assert row.ratio == pytest.approx(row.value / row.peer_value)


def test_other_boxes_than_the_peers_are_not_measured(tmp_path):
    scene = loader.make_scene(0)
    assert len(scene.points_N3) == 50_000 and len(scene.frames) == 100
    save_scene(scene, tmp_path / "prepared" / f"{scene.scene_id}.npz")
    write_arrays_of(scene, tmp_path)
    scenes = SceneStore(tmp_path / "prepared")
    loader.check(scenes, tmp_path)
    np.testing.assert_allclose(build_scene_of_arrays(tmp_path, scene.scene_id).boxes_K7, scene.boxes_K7, atol=1e-5)
    path = tmp_path / f"{scene.scene_id}_aligned_bbox.npy"
    np.save(path, np.load(path) + 0.1)
    with pytest.raises(ValueError, match="differ from the peer's"):
        loader.check(scenes, tmp_path)


def test_the_peer_encloses_turned_boxes(tmp_path):
    scene = loader.make_scene(1)
    write_arrays_of(scene, tmp_path)
    np.random.seed(0)
    plain = PlainDataset(tmp_path, [scene.scene_id], 1000, 6, augment=True)[0]
    assert plain["points"].shape == (1000, 3) and plain["poses"].shape == (6, 4, 4)
    assert (plain["boxes"][:, 3:5].prod(1) >= 0.8 * scene.boxes_K7[:, 3:5].prod(1)).all()
