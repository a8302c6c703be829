"""What SFT logs: loss by task, tokens a second, use of the hardware; and what is the same again after a resume."""

import json
import math
import shutil
import time

import pytest
import torch

from threedr1.engine import sft, throughput
from threedr1.engine.checkpoint import list_checkpoints
from threedr1.engine.data import ObservationCache, load_split
from threedr1.engine.runtime import Runtime, init_runtime
from threedr1.engine.sft_data import write_targets
from threedr1.engine.sft_log import TaskMeans, TaskSums
from threedr1.engine.throughput import Meter
from threedr1.engine.tracking import Tracker, read_metrics

from .test_pipeline import sft_config

CPU = Runtime(torch.device("cpu"))


def test_means_by_task_by_hand():
    means = TaskMeans(["caption", "qa"])
    means.add([4.0, 9.0], [2, 3])
    means.add([2.0, 0.0], [1, 0])
    resumed = TaskMeans(["caption", "qa"], json.loads(json.dumps(means.state())))
    for found in (means, resumed):
        assert found.read() == {"loss/caption": 2.0, "loss/qa": 3.0}
        assert found.read() == {}, "it begins anew"
    means.add([math.nan, 5.0], [1, 5])  # of a step that was skipped
    assert means.read() == {"loss/qa": 1.0}


def test_sums_by_task_equal_the_losses_of_each_row(rooms_root, tmp_path):
    config = sft_config(rooms_root, tmp_path, "data.datasets=scan2cap,scanqa,scanrefer")
    samples, store = load_split(config.data, "train", 0)
    samples = samples[:2] + samples[-2:] + samples[2:3]
    model = sft.load_model(config, None, init_runtime("cpu"))
    taught = write_targets(model, samples, ObservationCache(store, model, seed=0).of(samples), pointers="name")
    sums = TaskSums(["dense_caption", "grounding", "qa"], torch.device("cpu"))
    loss, losses_T = sft.sft_loss(model, taught)
    assert loss.requires_grad and not losses_T.requires_grad
    assert float(losses_T.sum()) == pytest.approx(loss.item(), rel=1e-6)
    sums.add(taught, losses_T)
    alone = {}
    for row in taught:
        single, tokens_T = sft.sft_loss(model, [row])
        total = alone.setdefault(row.sample.task, [0.0, 0])
        total[0] += single.item()
        total[1] += len(tokens_T)
    totals, counts = sums.over_ranks(CPU)
    assert alone.keys() == {"dense_caption", "grounding"}
    for task, (total, count) in alone.items():
        assert (totals[sums.place[task]], counts[sums.place[task]]) == (pytest.approx(total, rel=1e-5), count)
    assert (totals[2], counts[2]) == (0, 0)


def test_losses_by_task_make_up_the_loss_and_resume_between_two_rows(rooms_root, tmp_path):
    """Rows every three steps, checkpoints every two: a resumed run knows what came before its first row."""
    more = ("run.steps=6", "run.log_every=3", "data.datasets=scan2cap,scanqa,scanrefer", "run.keep_checkpoints=0")
    sft.train(sft_config(rooms_root, tmp_path / "whole", *more))
    sft.train(sft_config(rooms_root, tmp_path / "each", *more, "run.log_every=1"))
    halfway = list_checkpoints(tmp_path / "whole")[0]
    assert halfway.name == "step-000002"
    shutil.copytree(halfway, tmp_path / "resumed" / "checkpoints" / halfway.name)
    sft.train(sft_config(rooms_root, tmp_path / "resumed", *more), resume=True)
    whole, resumed, each = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "resumed", "each"))
    assert [{**row, "seconds": 0} for row in resumed] == [{**row, "seconds": 0} for row in whole]
    assert [row["step"] for row in whole] == [2, 5]
    for row in each:
        tasks = [name for name in row if name.startswith("loss/")]
        assert tasks and min(row[name] for name in tasks) <= row["loss"] + 1e-5
        assert max(row[name] for name in tasks) >= row["loss"] - 1e-5
        if len(tasks) == 1:
            assert row[tasks[0]] == pytest.approx(row["loss"], rel=1e-5)
    assert {"loss/dense_caption", "loss/grounding"} <= whole[0].keys()


def test_times_and_rates_are_in_a_file_of_their_own(rooms_root, tmp_path):
    sft.train(sft_config(rooms_root, tmp_path, "run.steps=3"))
    rows, speed = read_metrics(tmp_path / "metrics.jsonl"), read_metrics(tmp_path / "speed.jsonl")
    assert [row["step"] for row in speed] == [row["step"] for row in rows] == [0, 1, 2]
    for row, its in zip(rows, speed, strict=True):
        assert its.keys() == {"step", "seconds", "tokens_per_s"}, "a CPU has no known peak and no memory of its own"
        assert not {"tokens_per_s", "mfu", "peak_gib"} & row.keys()
        assert {"loss", "lr", "grad_norm", "skipped_steps", "tokens", "sequence_tokens"} <= row.keys()
        assert 0 < its["tokens_per_s"] < row["sequence_tokens"] / 0.001


def test_a_resumed_run_drops_the_speed_of_steps_done_again(tmp_path):
    with Tracker(tmp_path, "test", 4) as tracker:
        for step in range(4):
            tracker.log(step, {"loss": 1.0}, speed={"tokens_per_s": float(step)})
    with Tracker(tmp_path, "test", 4, first_step=2) as tracker:
        tracker.log(2, {"loss": 1.0}, speed={"tokens_per_s": 9.0})
        tracker.log(3, {"eval/loss": 1.0})
    assert [row["tokens_per_s"] for row in read_metrics(tmp_path / "speed.jsonl")] == [0, 1, 9]
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3]


def test_a_meter_counts_all_tokens_and_no_pauses(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(throughput, "peak_flops", lambda device: 1e6)
    meter = Meter(50.0, Runtime(torch.device("cpu"), world_size=2))
    meter.add(600)
    now[0] += 3
    with meter.paused():
        now[0] += 1000
    meter.add(400)
    now[0] += 1
    assert meter.rate == 250
    # 250 tokens a second of 50 operations on two devices of 1e6
    assert meter.read() == {"tokens_per_s": 250, "mfu": pytest.approx(250 * 50 / 2 / 1e6)}
    now[0] += 2
    meter.add(10)
    assert meter.read()["tokens_per_s"] == 5


def test_the_bar_shows_loss_rate_and_time_to_go(rooms_root, tmp_path, capfd):
    sft.train(sft_config(rooms_root, tmp_path, "run.steps=3"))
    shown = capfd.readouterr().err
    assert "loss=" in shown and "tok/s=" in shown and "<" in shown, "elapsed < remaining"
