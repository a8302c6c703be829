"""Samples kept beside the prepared scenes: the same as those read, made anew when any input changes, and fast."""

import json
import logging
import os
import time
from dataclasses import fields

import numpy as np
import pytest

from threedr1.datasets.scene_store import SceneStore
from threedr1.datasets.tasks import LOADERS, Problem, cache, inputs_of, load_samples
from threedr1.datasets.tasks.common import Benchmark

from .. import data_factory as factory

SCANQA = "ScanQA_v1.0_train.json"


@pytest.fixture
def readings(monkeypatch):
    """Names of the data sets that were read from their files, in order."""
    names: list[str] = []

    def watched(name: str, benchmark: Benchmark) -> Benchmark:
        def load(*arguments):
            names.append(name)
            return benchmark.load(*arguments)

        return Benchmark(load, benchmark.inputs)

    for name, benchmark in list(LOADERS.items()):
        monkeypatch.setitem(LOADERS, name, watched(name, benchmark))
    return names


def assert_same(one, two) -> None:
    for entry in fields(one):
        first, second = getattr(one, entry.name), getattr(two, entry.name)
        if isinstance(first, np.ndarray):
            assert first.dtype == second.dtype and first.shape == second.shape, entry.name
            np.testing.assert_array_equal(first, second)
        else:
            assert first == second and type(first) is type(second), entry.name


@pytest.mark.parametrize("dataset", sorted(LOADERS))
def test_kept_samples_are_those_that_were_read(root, store, readings, dataset, caplog):
    first = load_samples(root, "train", [dataset], scenes=store)
    said = caplog.messages.copy()
    caplog.clear()
    second = load_samples(root, "train", [dataset], scenes=SceneStore(root / "prepared"))
    assert readings == [dataset] and len(first) == len(second) > 0
    assert caplog.messages == said  # what was dropped is told every time
    for one, two in zip(first, second, strict=True):
        assert_same(one, two)
    assert_same(first[0], load_samples(root, "train", [dataset], scenes=store.index)[0])


def test_problems_are_kept_as_well(root, store, readings):
    path = root / "annotations" / SCANQA
    (row,) = json.loads(path.read_text())
    path.write_text(json.dumps([{**row, "scene_id": "scene0777_00", "question_id": "a"}, row, row]))
    told: list[list[Problem]] = [[], []]
    for problems in told:
        assert len(load_samples(root, "train", ["scanqa"], scenes=store, problems=problems)) == 1
    assert readings == ["scanqa"] and told[0] == told[1] and len(told[0]) == 2
    with pytest.raises(ValueError, match="row 1 names scene scene0777_00.* and 1 more"):
        load_samples(root, "train", ["scanqa"], scenes=store)
    assert readings == ["scanqa"]


@pytest.mark.parametrize("dataset", sorted(LOADERS))
def test_touching_any_input_reads_anew(root, store, readings, dataset):
    load_samples(root, "train", [dataset], scenes=store)
    inputs = inputs_of(dataset, "train")
    present = [name for name in inputs.all if (root / name).exists()]
    assert inputs.absent(root) == [] and present
    for number, name in enumerate(present, 2):
        os.utime(root / name, ns=(number, number))
        load_samples(root, "train", [dataset], scenes=store)
        assert len(readings) == number, name
    load_samples(root, "train", [dataset], scenes=store)
    assert len(readings) == 1 + len(present)


def test_files_that_come_or_go_read_anew(root, store, readings):
    load_samples(root, "train", ["scene30k"], scenes=store)
    (root / "scannetv2_test.txt").write_text("scene0009_00\n")
    assert len(load_samples(root, "train", ["scene30k"], scenes=store)) == 2 and len(readings) == 2
    (root / "scannetv2_test.txt").unlink()
    assert len(load_samples(root, "train", ["scene30k"], scenes=store)) == 2 and len(readings) == 3
    (root / "scannetv2_test.txt").write_text("scene0000_00\n")
    assert load_samples(root, "train", ["scene30k"], scenes=store) == []


def test_every_file_that_is_read_is_an_input(root, store, monkeypatch):
    """A reader that opens a file which it does not declare would be served from an old cache."""
    opened: set[str] = set()
    for name in ("open", "read_bytes", "read_text"):
        plain = getattr(factory.Path, name)

        def watched(path, *arguments, plain=plain, **options):
            opened.add(os.path.relpath(path, root))
            return plain(path, *arguments, **options)

        monkeypatch.setattr(factory.Path, name, watched)
    for dataset in LOADERS:
        opened.clear()
        load_samples(root, "train", [dataset], scenes=store.index)
        assert opened and opened <= set(inputs_of(dataset, "train").all), dataset


def test_other_scenes_or_readers_read_anew(root, store, readings, monkeypatch):
    load_samples(root, "train", ["scanqa"], scenes=store)
    store.index["scene0000_00"].boxes_K7[:, 2] += 1
    (moved,) = load_samples(root, "train", ["scanqa"], scenes=store)
    assert abs(moved.target_boxes_K7[0, 2] - factory.OBJECTS[factory.TABLE][0][2] - 1) < 1e-6
    monkeypatch.setattr(cache, "code_hash", lambda: "of other code")
    load_samples(root, "train", ["scanqa"], scenes=store)
    (root / "prepared" / "scene0001_00.npz").unlink()
    load_samples(root, "train", ["scanqa"], scenes=SceneStore(root / "prepared"))
    assert len(readings) == 4


@pytest.mark.parametrize("content", [b"", b"broken", b"PK\x05\x06" + bytes(18)])
def test_a_broken_cache_is_made_anew_and_said(root, store, readings, content, caplog):
    first = load_samples(root, "train", ["scanqa"], scenes=store)
    path = root / "prepared" / "annotations" / "scanqa-train.npz"
    whole = path.read_bytes()
    for broken in (content, whole[: len(whole) // 2], whole[:-4]):
        path.write_bytes(broken)
        caplog.clear()
        (sample,) = load_samples(root, "train", ["scanqa"], scenes=store)
        assert_same(sample, first[0])
        assert "is not readable" in caplog.text and path.read_bytes() == whole
    assert not list(path.parent.glob("*.partial"))


def test_a_folder_that_cannot_be_written_is_a_warning(root, store, caplog):
    (root / "prepared" / "annotations").write_text("in the way")
    with caplog.at_level(logging.WARNING):
        assert len(load_samples(root, "train", ["scanqa"], scenes=store)) == 1
    assert "cannot be written" in caplog.text and "read anew at each start" in caplog.text


def test_refused_data_leave_no_cache(root, store):
    path = root / "annotations" / SCANQA
    path.write_text(json.dumps(json.loads(path.read_text()) * 2))
    with pytest.raises(ValueError, match="repeats"):
        load_samples(root, "train", ["scanqa"], scenes=store)
    assert not (root / "prepared" / "annotations").exists()


def test_scenes_in_memory_leave_no_cache(root, store):
    load_samples(root, "train", ["scanqa"], scenes={"scene0000_00": store["scene0000_00"]})
    assert not (root / "prepared" / "annotations").exists()


@pytest.mark.parametrize("dataset", ["scanrefer", "scan2cap", "scanqa"])
def test_forty_thousand_records_open_in_two_seconds_the_second_time(root, store, readings, dataset):
    name = SCANQA if dataset == "scanqa" else "ScanRefer_filtered_train.json"
    path = root / "annotations" / name
    row = json.loads(path.read_text())[0]
    path.write_text(json.dumps([{**row, "question_id": f"{n}", "ann_id": f"{n}"} for n in range(40_000)]))
    assert len(load_samples(root, "train", [dataset], scenes=store)) == 40_000
    start = time.perf_counter()
    assert len(load_samples(root, "train", [dataset], scenes=store)) == 40_000
    assert time.perf_counter() - start < 2 and readings == [dataset]
