"""Hundreds of steps leak nothing: memory, open files, threads, processes and checkpoints stay as many."""

from pathlib import Path

import numpy as np
import psutil  # comes with accelerate
import pytest

from threedr1.engine import grpo, sft, tracking
from threedr1.engine.checkpoint import list_checkpoints
from threedr1.engine.tracking import Tracker, read_metrics

from .test_pipeline import grpo_config, sft_config

pytestmark = pytest.mark.slow

REWARD = "def letters(completions, **columns):\n    return [float(len(set(text))) for text in completions]\n"
MAX_GROWTH_MB = 24.0


class WatchedTracker(Tracker):
    """Notes what the process holds after every step."""

    held: list[dict[str, float]] = []

    def advance(self, **shown: float) -> None:
        super().advance(**shown)
        process = psutil.Process()
        self.held.append(
            {
                "megabytes": process.memory_info().rss / 2**20,
                "files": process.num_fds(),
                "threads": process.num_threads(),
                "processes": len(process.children(recursive=True)),
            }
        )


@pytest.fixture
def held(monkeypatch):
    """What was held after each step; start a loop's list anew with .clear()."""
    WatchedTracker.held = []
    monkeypatch.setattr(tracking, "Tracker", WatchedTracker)
    return WatchedTracker.held


def assert_nothing_grows(held: list[dict[str, float]], steps: int) -> None:
    """Compares the middle with the end: caches and allocators have filled by the middle."""
    assert len(held) == steps
    half, end = held[steps // 2 : steps // 2 + steps // 10], held[-(steps // 10) :]
    # medians: memory comes and goes with the length of a batch, files with a checkpoint that is being written
    growth = {name: np.median([row[name] for row in end]) - np.median([row[name] for row in half]) for name in end[0]}
    megabytes = growth.pop("megabytes")
    assert megabytes < MAX_GROWTH_MB, f"{megabytes:.0f} MB more at the end than in the middle"
    assert all(value <= 0 for value in growth.values()), growth


def assert_tidy(run: Path, steps: int, keep: int) -> None:
    assert len(list_checkpoints(run)) == len(list((run / "checkpoints").iterdir())) == keep
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl")] == list(range(steps))
    assert not list(run.rglob("*.partial"))


def test_sft_and_grpo_hold_no_more_after_hundreds_of_steps(held, rooms_root, tmp_path):
    common = ("run.save_every=10", "run.keep_checkpoints=3")
    sft.train(sft_config(rooms_root, tmp_path / "sft", "run.steps=400", *common))
    assert_nothing_grows(held, 400)
    assert_tidy(tmp_path / "sft", 400, keep=3)

    held.clear()
    reward = tmp_path / "reward.py"
    reward.write_text(REWARD)
    before = len(psutil.Process().children(recursive=True))
    more = (f"reward.names=[format,semantic,{reward}:letters]", "reward.weights=[0.2,0.5,0.3]")
    grpo.train(grpo_config(rooms_root, tmp_path / "sft", tmp_path / "grpo", "run.steps=160", *common, *more))
    assert_nothing_grows(held, 160)
    assert_tidy(tmp_path / "grpo", 160, keep=3)
    assert len(psutil.Process().children(recursive=True)) == before, "the reward's process has ended"
    assert len((tmp_path / "grpo" / "completions.jsonl").read_text().splitlines()) == 160 * 2 * 3


def test_a_trained_scene_encoder_leaves_nothing_behind(held, rooms_root, tmp_path):
    """Every step samples and encodes its scenes anew, and what was made of the last ones must go."""
    more = ("run.steps=200", "run.save_every=1000", "model.train_scene_encoder=true")
    sft.train(sft_config(rooms_root, tmp_path / "sft", *more))
    assert_nothing_grows(held, 200)
