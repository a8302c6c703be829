"""The GRPO loop where rewards fail, groups teach nothing or completions are cut; evaluation; resuming."""

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from threedr1.engine import grpo, grpo_eval, sft
from threedr1.engine.checkpoint import latest_checkpoint
from threedr1.engine.data import ObservationCache, load_split
from threedr1.engine.groups import Experience
from threedr1.engine.optim import Optimizer
from threedr1.engine.rewards import RewardFailure, RewardResult
from threedr1.engine.rollout import roll_out, write_prompts
from threedr1.engine.runtime import init_runtime
from threedr1.engine.throughput import Phases
from threedr1.engine.tracking import read_metrics

from .test_pipeline import assert_same_weights, grpo_config, sft_config, weights

LENGTH = "def share(completions, **columns):\n    return [text.count('e') / (1 + len(text)) for text in completions]\n"


@pytest.fixture(scope="module")
def sft_run(rooms_root, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "sft"
    sft.train(sft_config(rooms_root, run_dir, "run.steps=2"))
    return run_dir


@pytest.fixture
def run(sft_run, rooms_root, tmp_path):
    """Runs GRPO with the function of a file as its reward; gives the run's folder."""

    def start(*more, code=LENGTH, name="run", resume=False):
        reward = tmp_path / "reward.py"
        reward.write_text(code)
        own = [f"reward.names=[{reward}:share]", "reward.weights=[1.0]", "loss.beta=0.0"]
        grpo.train(grpo_config(rooms_root, sft_run, tmp_path / name, *own, *more), resume=resume)
        return tmp_path / name

    return start


def unmoved(folder):
    """Whether the policy's adapter is as it was made: it adds nothing."""
    adapter = weights(latest_checkpoint(folder))["model/adapter/policy/adapter_model.safetensors"]
    return all(not value.any() for key, value in adapter.items() if "lora_B" in key)


def test_groups_that_teach_nothing_leave_the_policy_and_the_optimizer_alone(run):
    constant = "def share(completions, **columns):\n    return [1.0] * len(completions)\n"
    # with a KL term and weight decay, which would move it
    folder = run("loss.beta=0.1", "optim.weight_decay=0.5", "run.steps=2", code=constant)
    assert unmoved(folder)
    rows = read_metrics(folder / "metrics.jsonl")
    assert [row["frac_reward_zero_std"] for row in rows] == [1, 1]
    assert all("loss" not in row and "lr" not in row for row in rows)


def test_a_reward_that_fails_costs_its_rows_and_too_many_end_the_run(run):
    some = (
        "def share(completions, **columns):\n"
        "    if len(completions) > 1: raise RuntimeError('one by one, please')\n"
        "    if sum(map(ord, completions[0])) % 4 == 0: return [float('nan')]\n"
        "    return [float(sum(map(ord, text)) % 7) for text in completions]\n"
    )
    folder = run("run.steps=2", "rollout.group_size=8", code=some)  # so many that a group without variance is rare
    for row in read_metrics(folder / "metrics.jsonl"):
        assert math.isfinite(row["reward"]) and math.isfinite(row["grad_norm"])
    rows = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
    failed = [row for row in rows if row["reward"] is None]
    assert 0 < len(failed) < len(rows) and all(row["advantage"] == 0 for row in failed)
    assert all((sum(map(ord, row["text"])) % 4 == 0) == (row["reward"] is None) for row in rows)

    bad = "def share(completions, **columns):\n    raise RuntimeError('no')\n"
    with pytest.raises(RewardFailure, match="no"):
        run("run.steps=20", "run.batch_size=8", code=bad, name="bad")


@pytest.fixture
def trainable(sft_run, rooms_root, tmp_path):
    """A policy, two groups of three completions of it, and an update of it that gives metrics and gradients."""

    def make(*more):
        config = grpo_config(rooms_root, sft_run, tmp_path, "optim.lr=0.0", "loss.beta=0.0", *more)
        runtime = init_runtime("cpu")
        model, _ = grpo.load_policy(config, None, runtime)
        samples, store = load_split(config.data, "train", 0)
        observations = ObservationCache(store, model, seed=0).of(samples[:2])
        prompts = write_prompts(model, samples[:2], observations, ["think"] * 2)
        streams = [torch.Generator().manual_seed(row) for row in range(6)]
        rollouts = roll_out(model, prompts, max_new_tokens=7, group_size=3, temperature=1.0, generators=streams)

        def update(rows, rewards, finished):
            """Of some completions of each group."""
            chosen = [
                replace(
                    entry,
                    finished=[finished[row] for row in rows],
                    **{name: [getattr(entry, name)[row] for row in rows] for name in ("texts", "token_ids", "logps")},
                )
                for entry in rollouts
            ]
            count = len(rows)
            values_N = np.array([rewards[row] for row in rows] * 2)
            nothing = {"own": np.zeros(2 * count, dtype=bool)}
            scored = RewardResult(
                values_N, {"own": values_N}, nothing, nothing["own"], {"own": np.ones_like(values_N)}
            )
            advantages_PG = torch.tensor([[1.0, -0.5, 0.25]] * 2)[:, rows]
            experience = Experience(chosen, scored, advantages_PG, {}, 2)
            found = {}
            optimizer = Optimizer(model.trainable_parameters(), config.optim, 1, runtime)
            real = optimizer.step

            def step(*given):
                gradients = {name: value.grad for name, value in model.trainable_parameters().items()}
                found.update({name: value.clone() for name, value in gradients.items() if value is not None})
                return real(*given)

            optimizer.step = step
            metrics = grpo.update_policy(model, experience, optimizer, config, runtime, 0, Phases(torch.device("cpu")))
            return metrics, found

        return update

    return make


@pytest.mark.parametrize("left_out", ["cut", "without a reward"])
def test_what_is_left_out_is_as_if_it_had_not_been_sampled(trainable, left_out):
    update = trainable("loss.mask_truncated=true", "loss.loss_type=dapo")
    if left_out == "cut":
        part, gradients = update([0, 1, 2], [1.0, 0.0, 0.5], [True, True, False])
    else:
        part, gradients = update([0, 1, 2], [1.0, 0.0, math.nan], [True] * 3)
    alone, expected = update([0, 1], [1.0, 0.0, 0.5], [True] * 3)
    _, others = update([0, 1, 2], [1.0, 0.0, 0.5], [True] * 3)
    for name in ("loss", "entropy", "grad_norm", "mismatch/mean"):
        assert part[name] == pytest.approx(alone[name], rel=1e-5, abs=1e-7), name
    assert gradients.keys() == expected.keys() == others.keys() and gradients
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-7, rtol=1e-4, msg=name)
    assert any(not torch.allclose(gradients[name], others[name], rtol=1e-2) for name in gradients)


def test_cut_completions_count_where_they_are_not_masked(trainable):
    update = trainable()
    found = [update([0, 1, 2], [1.0, 0.0, 0.5], finished)[0] for finished in ([True] * 3, [True, False, False])]
    assert found[0] == found[1] and found[0]["loss"] != 0


def test_completions_are_all_cut(run, monkeypatch):
    """No end token: every completion is cut, and with the mask nothing is left."""
    monkeypatch.setattr("threedr1.models.language_model.LanguageModel.eos_ids", property(lambda self: [1_000_000]))
    folder = run("run.steps=1", "loss.mask_truncated=true")
    (row,) = read_metrics(folder / "metrics.jsonl")
    assert row["length/cut"] == 1 and row["length/min"] == 12 and unmoved(folder) and "loss" not in row


@pytest.mark.parametrize("budget", [1, 200, 100_000])
def test_packs_change_nothing(run, budget):
    """One completion a pack, a few, all of them: the same gradient."""
    folder = run("run.steps=1", f"token_budget={budget}", "loss.beta=0.02", "updates_per_rollout=2", name=str(budget))
    whole = run("run.steps=1", "loss.beta=0.02", "updates_per_rollout=2", "run.micro_batch_size=2", name="whole")
    (row,), (other,) = (read_metrics(it / "metrics.jsonl") for it in (folder, whole))
    for name in ("loss", "grad_norm", "kl", "entropy", "reward", "mismatch/mean", "clip/region", "ratio/max"):
        assert row[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5), name
    assert row["mismatch/mean"] < 1e-4


def test_the_best_model_is_kept_by_the_reward_of_held_out_answers(run, monkeypatch):
    evaluated = ("run.eval_every=1", "eval_samples=5", "eval_datasets=planning,scanrefer")
    folder = run("run.steps=3", "optim.lr=0.05", *evaluated)
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if "eval/reward" in row]
    assert [row["step"] for row in rows] == [0, 1, 2]
    best = json.loads((folder / "best" / "best.json").read_text())
    scores = [row["eval/reward"] for row in rows]
    assert best["metric"] == grpo_eval.METRIC and best["score"] == max(scores)
    assert best["step"] == scores.index(max(scores)) + 1
    assert "eval/scanrefer/Acc@0.25" in rows[0] and any(name.startswith("eval/planning/") for name in rows[0])
    # a run that is not evaluated trains alike
    plain = run("run.steps=3", "optim.lr=0.05", name="plain")
    assert_same_weights(latest_checkpoint(plain), latest_checkpoint(folder))


def test_a_killed_run_with_substitutes_goes_on_as_if_nothing_had_been(run, tmp_path):
    rarely = (
        "def share(completions, **columns):\n"
        "    return [float(len(text)) if len(columns['question'][0]) % 2 else 0.0 for text in completions]\n"
    )
    more = ("run.steps=3", "rollout.resample_rounds=2", "run.keep_checkpoints=0")
    whole = run(*more, code=rarely)
    shutil.copytree(whole / "checkpoints" / "step-000001", tmp_path / "again" / "checkpoints" / "step-000001")
    again = run(*more, code=rarely, name="again", resume=True)
    assert_same_weights(latest_checkpoint(again), latest_checkpoint(whole))
    rows = [read_metrics(folder / "metrics.jsonl") for folder in (whole, again)]
    for one, other in zip(rows[0][1:], rows[1], strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}


def test_what_cannot_be_evaluated_or_is_not_is_said(run):
    with pytest.raises(ValueError, match="set run.eval_every too"):
        run("run.best_metric=eval/reward")
    with pytest.raises(ValueError, match="are all dense captions; name another data set in eval_datasets"):
        run("run.eval_every=1", "eval_datasets=scan2cap")
