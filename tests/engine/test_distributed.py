"""SFT and GRPO on two processes equal one process with the same global batch (the scene encoder: test_detect.py)."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from threedr1.engine import grpo, sft
from threedr1.engine.checkpoint import latest_checkpoint
from threedr1.engine.config import save_config
from threedr1.engine.tracking import read_metrics

from .test_pipeline import assert_same_weights, grpo_config, sft_config, weights

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


def run_on_two_ranks(kind: str, config, recipe: Path, *more: str) -> None:
    done = started_on_two_ranks(kind, config, recipe, *more)
    assert done.returncode == 0, done.stderr[:6000] + "\n[…]\n" + done.stderr[-2000:]


def started_on_two_ranks(kind: str, config, recipe: Path, *more: str) -> subprocess.CompletedProcess[str]:
    save_config(config, recipe)
    arguments = ["--standalone", "--nproc-per-node=2", str(ROOT / "main.py"), kind, "--config", str(recipe), *more]
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
    )


def assert_equal_up_to_rounding(start: Path, alone: Path, pair: Path) -> None:
    """The two runs' weights lie much closer to each other than to where they started."""
    before, one, two = (weights(latest_checkpoint(run)) for run in (start, alone, pair))
    moved = apart = 0.0
    for name, tensors in one.items():
        for key, value in tensors.items():
            begun = before.get(name, {}).get(key, torch.zeros_like(value))
            moved += float((value - begun).double().square().sum())
            apart += float((value - two[name][key]).double().square().sum())
    assert moved > 0 and apart < 1e-4 * moved, (moved, apart)


def column(run: Path, name: str) -> list[float]:
    return [row[name] for row in read_metrics(run / "metrics.jsonl")]


def test_sft(rooms_root, tmp_path):
    sft.train(sft_config(rooms_root, tmp_path / "start", "run.steps=0"))
    sft.train(sft_config(rooms_root, tmp_path / "alone", "run.batch_size=4"))
    run_on_two_ranks("sft", sft_config(rooms_root, tmp_path / "pair", "run.batch_size=4"), tmp_path / "sft.yaml")
    for name, tolerance in (("loss", 1e-4), ("grad_norm", 1e-3), ("tokens", 0), ("lr", 0)):
        np.testing.assert_allclose(column(tmp_path / "pair", name), column(tmp_path / "alone", name), rtol=tolerance)
    assert_equal_up_to_rounding(tmp_path / "start", tmp_path / "alone", tmp_path / "pair")


def test_sft_with_learned_view_weights(rooms_root, tmp_path):
    """Both ranks hold the same weights, those of one process."""
    more = ("model.views.weights=learned", "model.views.num_candidates=5", "model.views.num_views=2")
    sft.train(sft_config(rooms_root, tmp_path / "alone", *more))
    run_on_two_ranks("sft", sft_config(rooms_root, tmp_path / "pair", *more), tmp_path / "sft.yaml")
    weights_alone = column(tmp_path / "alone", "view_w_text")
    np.testing.assert_allclose(column(tmp_path / "pair", "view_w_text"), weights_alone, atol=1e-3)
    assert max(abs(weight - 0.3) for weight in weights_alone) > 3e-3


@pytest.mark.parametrize("scale", ["group", "batch"])
def test_grpo(scale, rooms_root, tmp_path):
    """The same completions are sampled, and every logged number is that of both ranks together."""
    sft.train(sft_config(rooms_root, tmp_path / "sft", "run.steps=10"))
    more = ("run.steps=3", "run.save_every=3", "optim.warmup_steps=0", "optim.lr=1e-3", f"loss.scale={scale}")
    more += ("loss.loss_type=dapo", "updates_per_rollout=2", "rollout.resample_rounds=1", "run.eval_every=2")
    more += ("eval_samples=3", "eval_datasets=scanrefer,planning")
    grpo.train(grpo_config(rooms_root, tmp_path / "sft", tmp_path / "start", *more, "run.steps=0"))
    grpo.train(grpo_config(rooms_root, tmp_path / "sft", tmp_path / "alone", *more, "run.batch_size=4"))
    pair = grpo_config(rooms_root, tmp_path / "sft", tmp_path / "pair", *more, "run.batch_size=4")
    run_on_two_ranks("grpo", pair, tmp_path / "grpo.yaml")

    rows = [
        [json.loads(line) for line in (tmp_path / name / "completions.jsonl").read_text().splitlines()]
        for name in ("alone", "pair")
    ]
    assert rows[0] == rows[1] and len(rows[0]) == 3 * 4 * 3
    logs = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("alone", "pair")]
    for one, two in zip(*logs, strict=True):
        assert one.keys() == two.keys()
        for name in one.keys() - {"seconds", "mismatch/mean", "mismatch/max"}:
            assert two[name] == pytest.approx(one[name], rel=2e-3, abs=2e-5), name
    assert_equal_up_to_rounding(tmp_path / "start", tmp_path / "alone", tmp_path / "pair")


# Once, in the third step, the second rank is killed while its reward is computed. (Two processes take turns.)
DEADLY = """
import os, signal, time
from pathlib import Path

died = Path(__file__).with_name("died")
calls = []

def reward(completions, **columns):
    calls.append(1)
    if os.environ.get("RANK") == "1" and len(calls) == 2 and not died.exists():
        # checkpoints are written beside the loop; what is killed half-way through one goes on from the one before
        until = time.monotonic() + 20
        while not died.with_name("pair").joinpath("checkpoints", "step-000002").exists() and time.monotonic() < until:
            time.sleep(0.05)
        died.touch()
        os.kill(os.getppid(), signal.SIGKILL)
    return [text.count("e") / (1 + len(text)) for text in completions]
"""


def test_grpo_goes_on_after_a_rank_has_died(rooms_root, tmp_path):
    """The other rank ends with it, at once; resumed, the run is what it would have been: only the step was lost."""
    sft.train(sft_config(rooms_root, tmp_path / "sft", "run.steps=10"))
    (tmp_path / "deadly.py").write_text(DEADLY)
    more = ("run.steps=4", "run.save_every=1", "run.keep_checkpoints=0", "loss.beta=0.0")
    more += (f"reward.names=[{tmp_path / 'deadly.py'}:reward]", "reward.weights=[1.0]")
    pair = grpo_config(rooms_root, tmp_path / "sft", tmp_path / "pair", *more)
    begun = time.monotonic()
    done = started_on_two_ranks("grpo", pair, tmp_path / "grpo.yaml")
    assert done.returncode != 0 and time.monotonic() - begun < 120
    assert (tmp_path / "died").exists() and latest_checkpoint(tmp_path / "pair").name == "step-000002"
    run_on_two_ranks("grpo", pair, tmp_path / "grpo.yaml", "--resume")
    whole = grpo_config(rooms_root, tmp_path / "sft", tmp_path / "whole", *more)
    run_on_two_ranks("grpo", whole, tmp_path / "whole.yaml")
    assert_same_weights(latest_checkpoint(tmp_path / "pair"), latest_checkpoint(tmp_path / "whole"))
    assert column(tmp_path / "pair", "reward") == column(tmp_path / "whole", "reward")
    rows = [(tmp_path / name / "completions.jsonl").read_text() for name in ("pair", "whole")]
    assert rows[0] == rows[1]
