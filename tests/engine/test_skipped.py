"""A batch that gives NaN: the step is skipped on all ranks, counted, and what it saw is kept for inspection."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from threedr1.engine import detect, groups, grpo, sft
from threedr1.engine.config import OptimConfig, load_config, save_config
from threedr1.engine.data import load_split
from threedr1.engine.optim import Optimizer
from threedr1.engine.runtime import Runtime, batch_indices
from threedr1.engine.skipped import MOST_FILES, MicroBatch, save_skipped
from threedr1.engine.tracking import read_metrics
from threedr1.engine.training_state import load_state

from .processes import run_script
from .test_pipeline import ENCODER, assert_same_weights, grpo_config, sft_config

CPU = Runtime(torch.device("cpu"))


def make(folder, **changes):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    config = OptimConfig(**{"lr": 0.1, "warmup_steps": 0, **changes})
    return layers, Optimizer(dict(layers.named_parameters()), config, 10, CPU, skipped_dir=folder)


def test_what_a_skipped_step_saw_is_written(tmp_path):
    layers, optimizer = make(tmp_path)
    before = [parameter.detach().clone() for parameter in layers.parameters()]
    layers(torch.ones(1, 4)).sum().backward()
    optimizer.note(["good"], ["qa"], 1.5)
    layers[1].weight.grad.fill_(math.nan)
    optimizer.note(["bad-0", "bad-1"], ["qa", "caption"], torch.tensor(math.inf), texts=["één", "two"])
    assert optimizer.step(7)["skipped_steps"] == 1
    assert all(torch.equal(old, new) for old, new in zip(before, layers.parameters(), strict=True))
    assert json.loads((tmp_path / "step-000007-rank0.json").read_text(encoding="utf-8")) == {
        "step": 7,
        "rank": 0,
        "first_parameter": "1.weight",
        "parameters": 1,
        "micro_batches": [
            {"loss": 1.5, "sample_ids": ["good"], "tasks": ["qa"]},
            {"loss": "inf", "sample_ids": ["bad-0", "bad-1"], "tasks": ["qa", "caption"], "texts": ["één", "two"]},
        ],
    }
    layers(torch.ones(1, 4)).sum().backward()
    optimizer.note(["good"], ["qa"], 1.5)
    assert optimizer.step(8)["skipped_steps"] == 1 and optimizer.skipped_in_a_row == 0
    assert [path.name for path in tmp_path.iterdir()] == ["step-000007-rank0.json"]
    assert not torch.equal(before[0], layers[0].weight)


@pytest.mark.parametrize("loss", [math.nan, -math.inf])
def test_a_loss_that_is_not_finite_is_as_bad_as_a_gradient(tmp_path, loss):
    layers, optimizer = make(tmp_path, max_skipped_steps=1)
    before = layers[0].weight.detach().clone()
    for step in range(2):
        layers(torch.ones(1, 4)).sum().backward()
        optimizer.note(["odd"], ["qa"], loss)
        if step == 0:
            optimizer.step(step)
        else:
            with pytest.raises(
                FloatingPointError, match=rf"2 steps in a row .*; {tmp_path} says which samples they had"
            ):
                optimizer.step(step)
    assert torch.equal(layers[0].weight, before)
    content = json.loads((tmp_path / "step-000001-rank0.json").read_text())
    assert content["first_parameter"] is None and content["micro_batches"][0]["sample_ids"] == ["odd"]


def test_a_run_of_bad_batches_does_not_fill_the_disk(tmp_path):
    batch = MicroBatch(["a"], ["qa"], math.nan, [])
    written = [save_skipped(tmp_path / "skipped", step, 0, [batch], ["w"]) for step in range(MOST_FILES + 5)]
    assert [path is not None for path in written] == [True] * MOST_FILES + [False] * 5
    assert save_skipped(tmp_path / "skipped", 3, 0, [batch], ["w"]) == written[3], "done again by a resumed run"
    (tmp_path / "taken").write_text("a file is in the way")
    assert save_skipped(tmp_path / "taken", 0, 0, [batch], ["w"]) is None


POISONED = """
import copy
import dataclasses
from threedr1 import main
from threedr1.engine.data import ObservationCache

poisoned, real = sys.argv[1], ObservationCache.of

def of(self, samples):
    seen = real(self, samples)
    for place, sample in enumerate(samples):
        if sample.sample_id == poisoned:
            seen[place] = copy.copy(seen[place])
            encoded = seen[place].encoded
            seen[place].encoded = dataclasses.replace(encoded, tokens_TE=encoded.tokens_TE * float("nan"))
    return seen

ObservationCache.of = of
sys.exit(main.main(sys.argv[2:]))
"""


def test_a_poisoned_sample_on_one_of_two_ranks(rooms_root, tmp_path):
    """Rank 1 alone sees it, in its second micro-batch of step 2; neither rank moves in that step."""
    more = ("run.steps=4", "run.save_every=1", "run.keep_checkpoints=0", "run.micro_batch_size=1")
    config = sft_config(rooms_root, tmp_path / "run", *more)
    samples, _ = load_split(config.data, "train", config.run.seed)
    rows = batch_indices(len(samples), 2, 4, config.run.seed, Runtime(torch.device("cpu"), rank=1, world_size=2))
    own = [samples[row] for row in rows]
    save_config(config, tmp_path / "sft.yaml")
    arguments = (own[1].sample_id, "sft", "--config", str(tmp_path / "sft.yaml"))
    done = run_script(tmp_path / "poisoned.py", POISONED, *arguments, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]

    folders = [tmp_path / "run" / "checkpoints" / f"step-{step:06d}" for step in range(1, 5)]
    assert_same_weights(folders[1], folders[2])
    states = [load_state(folder)["optimizer"] for folder in folders]
    for name, value in states[1]["adam"]["exp_avg"].items():
        assert torch.equal(value, states[2]["adam"]["exp_avg"][name]) and torch.isfinite(value).all()
    with pytest.raises(AssertionError):
        assert_same_weights(folders[2], folders[3])
    assert [row["skipped_steps"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [0, 0, 1, 1]
    assert [path.name for path in (tmp_path / "run" / "skipped").iterdir()] == ["step-000002-rank1.json"]
    content = json.loads((tmp_path / "run" / "skipped" / "step-000002-rank1.json").read_text())
    good, bad = content["micro_batches"]
    assert [good["sample_ids"], bad["sample_ids"]] == [[own[0].sample_id], [own[1].sample_id]]
    assert [good["tasks"], bad["tasks"]] == [[own[0].task], [own[1].task]]
    assert math.isfinite(good["loss"]) and bad["loss"] == "nan" and content["rank"] == 1
    assert content["first_parameter"] and content["parameters"] > 10


def test_grpo_keeps_the_completions_of_a_skipped_step(rooms_root, tmp_path, monkeypatch):
    sft.train(sft_config(rooms_root, tmp_path / "sft", "run.steps=1"))
    real = groups.group_advantages
    calls: list[int] = []

    def bad_in_the_second_step(*arguments):
        calls.append(len(calls))
        return real(*arguments) * (math.nan if len(calls) == 2 else 1)

    monkeypatch.setattr(groups, "group_advantages", bad_in_the_second_step)
    last = grpo.train(grpo_config(rooms_root, tmp_path / "sft", tmp_path / "grpo"))
    assert_same_weights(last, last.with_name("step-000001"))
    content = json.loads((tmp_path / "grpo" / "skipped" / "step-000001-rank0.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "grpo" / "completions.jsonl").read_text().splitlines()]
    expected = [row for row in rows if row["step"] == 1]
    (batch,) = content["micro_batches"]
    assert batch["texts"] == [row["text"] for row in expected] and len(expected) == 6
    assert batch["sample_ids"] == [row["sample_id"] for row in expected] and batch["loss"] == "nan"
    assert "lora_" in content["first_parameter"]


def test_detect_names_the_scenes_of_a_skipped_step(rooms_root, tmp_path, monkeypatch):
    overrides = ["run.steps=3", "run.batch_size=2", "run.save_every=1", "run.keep_checkpoints=0", "run.log_every=1"]
    overrides += [f"run.dir={tmp_path / 'run'}", f"data.root={rooms_root}", "data.num_points=512", "data.eval_split="]
    config = load_config("detect", None, [*overrides, *(f"encoder.{setting}" for setting in ENCODER.split())])
    real = detect.train_step

    def bad_in_step_1(encoder, criterion, scenes, step, runtime):
        losses = real(encoder, criterion, scenes, step, runtime)
        return {**losses, "loss": losses["loss"] * (math.nan if step == 1 else 1)}

    monkeypatch.setattr(detect, "train_step", bad_in_step_1)
    detect.train(config)
    saved = [
        load_file(tmp_path / "run" / "checkpoints" / f"step-{step:06d}" / "model" / "model.safetensors")
        for step in (1, 2, 3)
    ]
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])
    assert any(not torch.equal(saved[1][name], saved[2][name]) for name in saved[0])
    content = json.loads((tmp_path / "run" / "skipped" / "step-000001-rank0.json").read_text())
    scenes = detect.SceneSamples(config, "train")
    assert content["micro_batches"][0]["sample_ids"] == scenes.training_scenes(1, CPU)
    assert len(content["micro_batches"][0]["sample_ids"]) == 2
