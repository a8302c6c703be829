"""The order of samples: data sets by weight, a function of seed and position alone."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import threedr1
from threedr1.engine import sft
from threedr1.engine.config import load_config
from threedr1.engine.data import load_split
from threedr1.engine.mixture import Mixture
from threedr1.engine.runtime import Runtime, batch_indices
from threedr1.engine.tracking import read_metrics

from .test_pipeline import sft_config

CPU = torch.device("cpu")
NAMES = ["a"] * 4 + ["b"] * 6 + ["c"] * 2  # samples 0-3, 4-9, 10-11


def test_without_weights_the_order_is_that_of_the_samples_alone():
    for weights in ({}, {"a": 1.0, "c": 1.0}):
        mixture = Mixture(NAMES, weights, seed=5)
        for step in range(20):
            assert mixture.rows(step, 4, Runtime(CPU)) == batch_indices(len(NAMES), step, 4, 5, Runtime(CPU))


def test_an_epoch_by_hand():
    """Weight 2.5 of four samples: 8 turns and 2 more; 0.5 of six: 3; 0 of two: none."""
    mixture = Mixture(NAMES, {"a": 2.5, "b": 0.5, "c": 0.0}, seed=0)
    assert mixture.length == 13
    first, second = (Counter(mixture.epoch(number).tolist()) for number in (0, 1))
    for counts in (first, second):
        assert sorted(counts[row] for row in range(4)) == [2, 2, 3, 3]
        assert sorted(counts[row] for row in range(4, 10)) == [0, 0, 0, 1, 1, 1]
        assert not counts[10] and not counts[11]
    both = first + second  # the other half had its turn in the second epoch
    assert [both[row] for row in range(10)] == [5] * 4 + [1] * 6
    assert mixture.epoch(0).tolist() != mixture.epoch(1).tolist() != Mixture(NAMES, {}, 1).epoch(1).tolist()


names = st.lists(st.sampled_from("abc"), min_size=1, max_size=30)
weight = st.floats(0, 4, allow_nan=False)


@given(names, st.fixed_dictionaries({}, optional={"a": weight, "b": weight, "c": weight}), st.integers(0, 5))
def test_each_sample_has_the_turns_that_its_weight_says(datasets, weights, seed):
    sizes = Counter(datasets)
    turns = {name: int(weights.get(name, 1.0)) for name in sizes}
    extra = {name: round((weights.get(name, 1.0) - turns[name]) * size) for name, size in sizes.items()}
    if not sum(turns[name] * size + extra[name] for name, size in sizes.items()):
        with pytest.raises(ValueError, match="leaves no sample"):
            Mixture(datasets, weights, seed)
        return
    mixture = Mixture(datasets, weights, seed)
    seen: Counter[int] = Counter()
    for number in range(4):
        epoch = Counter(mixture.epoch(number).tolist())
        seen += epoch
        by_name: Counter[str] = Counter()
        for row, count in epoch.items():
            by_name[datasets[row]] += count
        assert by_name == Counter({name: turns[name] * size + extra[name] for name, size in sizes.items()})
        for name in sizes:  # nobody is two turns ahead
            counts = [seen[row] for row, its in enumerate(datasets) if its == name]
            assert max(counts) - min(counts) <= 1


@given(st.sampled_from([1, 2, 3, 4, 6]), st.integers(0, 40), st.integers(0, 3))
def test_ranks_share_the_batch_of_one_process(world_size, step, seed):
    weights = {"a": 1.3, "b": 0.4}
    alone = Mixture(NAMES, weights, seed).rows(step, 12, Runtime(CPU))
    ranks = [
        Mixture(NAMES, weights, seed).rows(step, 12, Runtime(CPU, rank, world_size)) for rank in range(world_size)
    ]
    assert [row for rows in ranks for row in rows] == alone and len({len(rows) for rows in ranks}) == 1


def test_batches_walk_through_the_epochs_without_a_gap():
    mixture = Mixture(NAMES, {"b": 1.5}, seed=2)
    walked = [row for step in range(9) for row in mixture.rows(step, 5, Runtime(CPU))]
    whole = np.concatenate([mixture.epoch(number) for number in range(3)])
    assert mixture.length == 15 and walked == whole.tolist()


def test_weights_are_checked(rooms_root):
    with pytest.raises(ValueError, match=r"data.weights.scanqa is -1.0; it must not be below 0"):
        load_config("sft", None, ["data.weights.scanqa=-1"])
    config = load_config("sft", None, [f"data.root={rooms_root}", "data.weights.scanqq=2"])
    with pytest.raises(ValueError, match="Unknown data set 'scanqq'; did you mean 'scanqa'"):
        load_split(config.data, "train", 0)


def test_samples_carry_the_names_that_weights_go_by(rooms_root):
    names = "scene30k,scanrefer,nr3d,scan2cap,object_caption,scanqa,sqa3d,dialogue,planning,scene_description"
    config = load_config("sft", None, [f"data.root={rooms_root}", f"data.datasets={names}"])
    samples, _ = load_split(config.data, "train", 0)
    assert {sample.dataset for sample in samples} == set(config.data.datasets)


def test_the_recipes_of_two_stages_follow_each_other(rooms_root, tmp_path):
    """At the size of the tests; of the recipes the data sets, weights, LoRA, evaluation and token budget."""
    recipes = Path(threedr1.__file__).parent / "script" / "recipes"
    small = ("run.steps=2", "model.language.train=lora", "model.encoder.pretrained=")
    stages = {}
    for name, more in (
        ("sft.cold_start", ()),
        ("sft_tasks", (f"init={tmp_path / 'sft.cold_start'}", "run.batch_size=12", "eval_samples=6")),
    ):
        recipe = load_config("sft", recipes / f"{name}.yaml")
        names = f"data.datasets={','.join(recipe.data.datasets)}"
        config = sft_config(rooms_root, tmp_path / name, names, *small, *more, recipe=recipes / f"{name}.yaml")
        sft.train(config)
        stages[name] = (recipe, read_metrics(tmp_path / name / "metrics.jsonl"))
    first, second = stages["sft.cold_start"][0], stages["sft_tasks"][0]
    assert first.data.datasets == ("scene30k",) and second.init == first.run.dir
    assert set(second.data.weights) == set(second.data.datasets) and second.data.weights["scene_description"] == 4
    assert first.token_budget == second.token_budget == 8192 and first.run.micro_batch_size == 0
    assert not any("eval/loss" in row for row in stages["sft.cold_start"][1])
    assert "eval/loss" in stages["sft_tasks"][1][-1] and (tmp_path / "sft_tasks" / "best" / "adapter").is_dir()
