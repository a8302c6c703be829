"""Batches of supervised fine-tuning: the same with and without the thread that makes them ahead."""

import threading

import pytest
import torch

from threedr1.engine.build import build_model
from threedr1.engine.data import ObservationCache, load_split
from threedr1.engine.sft_data import Batches

from .test_pipeline import sft_config


@pytest.fixture(scope="module")
def parts(rooms_root, tmp_path_factory):
    config = sft_config(rooms_root, tmp_path_factory.mktemp("batches"))
    samples, store = load_split(config.data, "train", 0)
    return config, build_model(config.model, config.data).eval(), samples, store


def batches(parts, *, ahead, capacity=8, fail_at=-1):
    _, model, samples, store = parts
    asked = []

    def choose(step):
        asked.append(step)
        if step == fail_at:
            raise ValueError("this one cannot be made")
        return [samples[(3 * step + place) % len(samples)] for place in range(3)]

    observations = ObservationCache(store, model, seed=0, capacity=capacity)
    return Batches(model, choose, observations, pointers="name", num_steps=5, ahead=ahead), asked


@pytest.mark.parametrize("capacity", [1, 8])
def test_a_thread_makes_the_same_batches(parts, capacity):
    plain, _ = batches(parts, ahead=False)
    ahead, asked = batches(parts, ahead=True, capacity=capacity)
    with plain, ahead:
        for step in range(5):
            for ours, theirs in zip(ahead[step], plain[step], strict=True):
                assert ours.row == theirs.row and ours.views == theirs.views and ours.sample is theirs.sample
                assert torch.equal(ours.observation.encoded.boxes_K7, theirs.observation.encoded.boxes_K7)
            assert len(asked) <= step + 2, "it is one batch ahead and no more"
    assert asked == list(range(5)), "none is made twice, and none after the last step"


def test_new_scenes_of_a_batch_are_what_each_alone_is_and_the_oldest_go(parts):
    _, model, samples, store = parts
    several = [
        next(its for its in samples if its.scene_id == scene) for scene in dict.fromkeys(s.scene_id for s in samples)
    ]
    assert len(several) > 2
    cache = ObservationCache(store, model, seed=0, capacity=len(several) - 1)
    together = cache.of([*several, several[0]])
    assert together[-1] is together[0]
    for sample, seen in zip(several, together, strict=False):
        alone = ObservationCache(store, model, seed=0)[sample.scene_id]
        assert torch.equal(seen.points_N3, alone.points_N3) and torch.equal(seen.features_NF, alone.features_NF)
    assert cache[several[-1].scene_id] is together[-2] and cache[several[0].scene_id] is not together[0]


def test_a_resumed_run_begins_anywhere(parts):
    plain, _ = batches(parts, ahead=False)
    ahead, asked = batches(parts, ahead=True)
    with ahead:
        assert [entry.row for entry in ahead[3]] == [entry.row for entry in plain[3]]
    assert asked in ([3], [3, 4])


def test_what_fails_in_the_thread_is_raised_where_the_batch_is_asked_for(parts):
    ahead, _ = batches(parts, ahead=True, fail_at=1)
    with ahead:
        assert len(ahead[0]) == 3
        with pytest.raises(ValueError, match="this one cannot be made"):
            ahead[1]


def test_without_a_gpu_there_is_no_thread(parts):
    decided, asked = batches(parts, ahead=None)
    with decided:
        assert len(decided[0]) == 3 and asked == [0]


def test_settled_batches_leave_the_model_alone(parts, monkeypatch):
    """Before an evaluation: what is being made is finished first, and is the batch that comes next."""
    ahead, _ = batches(parts, ahead=True)
    begun, go_on = threading.Event(), threading.Event()
    made, make = [], ahead.make

    def slow(step):
        begun.set()
        assert step == 0 or go_on.wait(30)
        result = make(step)
        made.append(step)
        return result

    monkeypatch.setattr(ahead, "make", slow)
    with ahead:
        ahead.settle()  # nothing is under way yet
        assert len(ahead[0]) == 3 and made == [0]
        threading.Timer(0.2, go_on.set).start()
        ahead.settle()
        assert made == [0, 1]
        assert len(ahead[1]) == 3
