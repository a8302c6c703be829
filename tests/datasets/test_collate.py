"""The loader: batches are functions of their step, scenes are read once a batch, workers change nothing."""

import collections
import shutil

import numpy as np
import pytest

from threedr1.datasets import scene_store
from threedr1.datasets.collate import Draw, Loader, epoch_draws
from threedr1.datasets.scannet import prepare_scans
from threedr1.datasets.scene_store import SceneStore
from threedr1.engine.config import DataConfig, DetectConfig
from threedr1.engine.detection_data import CloudSampler

from .. import data_factory as factory

IDS = ["scene0000_00", "scene0001_00", "scene0000_00", "scene0002_00", "scene0001_00"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = factory.write_root(
        tmp_path_factory.mktemp("loader"), train=("scene0000_00", "scene0002_00"), val=("scene0001_00",)
    )
    assert prepare_scans(root, workers=1) == []
    return root / "prepared"


def make(row, scene, rng):
    """A sample that tells its row, its scene and its stream."""
    return row, scene.scene_id, rng.random(2), scene.points_N3[:2].copy()


def plan(step):
    return epoch_draws(len(IDS), 2, seed=3, step=step)


def same(first, second):
    for one, other in zip(first, second, strict=True):
        assert one[:2] == other[:2]
        np.testing.assert_array_equal(one[2], other[2])
        np.testing.assert_array_equal(one[3], other[3])


def test_an_epoch_takes_every_sample_once_and_names_its_stream():
    draws = [draw for step in range(5) for draw in plan(step)]
    for epoch in range(2):
        own = draws[epoch * 5 : epoch * 5 + 5]
        assert sorted(draw.row for draw in own) == [0, 1, 2, 3, 4]
        assert all(draw.keys == (3, epoch, draw.row) for draw in own)
    assert [draw.row for draw in draws[:5]] != [draw.row for draw in draws[5:]]


def test_a_batch_reads_each_scene_once_and_keeps_the_order(prepared, monkeypatch):
    reads = collections.Counter()
    real = scene_store.load_scene

    def counting(path, **options):
        reads[path.stem] += 1
        return real(path, **options)

    store = SceneStore(prepared, capacity=1)
    monkeypatch.setattr(scene_store, "load_scene", counting)
    made = Loader(store, IDS, make).batch([Draw(row, (row,)) for row in (0, 1, 2, 4, 0)])
    assert [(row, scene_id) for row, scene_id, *_ in made] == [(row, IDS[row]) for row in (0, 1, 2, 4, 0)]
    assert reads == {"scene0000_00": 1, "scene0001_00": 1}, "though the store keeps one scene"


def test_a_sample_depends_on_its_stream_and_not_on_the_batch(prepared):
    loader = Loader(SceneStore(prepared), IDS, make)
    together = loader.batch([Draw(3, (7, 1)), Draw(1, (7, 2))])
    same(together[1:], loader.batch([Draw(1, (7, 2))]))
    later = list(loader.batches(plan, 3, 5))
    same(later[1], list(loader.batches(plan, 0, 5))[4])


def sampler(num_points=64):
    return CloudSampler(DetectConfig(data=DataConfig(num_points=num_points)), augment=True)


def assert_equal_batches(batches, expected):
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        for one, two in zip(batch, other, strict=True):
            np.testing.assert_array_equal(one.inputs.points_N3, two.inputs.points_N3)
            np.testing.assert_array_equal(one.inputs.features_NF, two.inputs.features_NF)
            np.testing.assert_array_equal(one.boxes_K7, two.boxes_K7)


def test_workers_make_the_same_batches_in_the_same_order(prepared):
    store = SceneStore(prepared)
    expected = list(Loader(store, IDS, sampler()).batches(plan, 0, 7))
    with Loader(store, IDS, sampler(), workers=2) as loader:
        for _ in range(2):  # the workers stay
            assert_equal_batches(list(loader.batches(plan, 0, 7)), expected)
        begun = loader.batches(plan, 0, 7)
        assert_equal_batches([next(begun)], expected[:1])
        begun.close()  # a loop that stops half-way
        assert_equal_batches(list(loader.batches(plan, 4, 7)), expected[4:])


def test_what_a_worker_finds_wrong_reaches_the_loop(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "prepared")
    store = SceneStore(tmp_path / "prepared")
    (tmp_path / "prepared" / "scene0002_00.npz").write_bytes(b"PK")
    with (
        Loader(store, IDS, sampler(), workers=1) as loader,
        pytest.raises(ValueError, match="scene0002_00.npz is not a whole prepared scene"),
    ):
        list(loader.batches(plan, 0, 5))


def test_a_killed_worker_is_explained(prepared):
    with Loader(SceneStore(prepared), IDS, sampler(), workers=1) as loader:
        batches = loader.batches(plan, 0, 50)
        next(batches)
        assert loader._pool is not None
        for process in loader._pool._processes.values():
            process.kill()
        with pytest.raises(ValueError, match="loading process was killed"):
            list(batches)


def test_workers_are_counted_from_nought(prepared):
    with pytest.raises(ValueError, match="-1 workers"):
        Loader(SceneStore(prepared), IDS, make, workers=-1)
