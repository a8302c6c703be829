"""The GRPO loop where rewards fail, groups teach nothing or completions are cut; evaluation; resuming."""

import json
import math
import shutil

import pytest

from threedr1.engine import grpo, grpo_eval, sft
from threedr1.engine.checkpoint import latest_checkpoint
from threedr1.engine.rewards import RewardFailure
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
    folder = run("run.steps=2", code=some)
    for row in read_metrics(folder / "metrics.jsonl"):
        assert math.isfinite(row["reward"]) and math.isfinite(row["grad_norm"])
    rows = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
    failed = [row for row in rows if row["reward"] is None]
    assert 0 < len(failed) < len(rows) and all(row["advantage"] == 0 for row in failed)
    assert all((sum(map(ord, row["text"])) % 4 == 0) == (row["reward"] is None) for row in rows)

    bad = "def share(completions, **columns):\n    raise RuntimeError('no')\n"
    with pytest.raises(RewardFailure, match="no"):
        run("run.steps=20", "run.batch_size=8", code=bad, name="bad")


def test_cut_completions_leave_the_loss_and_their_rewards_count(run):
    common = ("run.steps=1", "rollout.max_new_tokens=6", "optim.lr=1e-2")
    plain, masked = run(*common, name="plain"), run(*common, "loss.mask_truncated=true", name="masked")
    (one,), (other,) = (read_metrics(folder / "metrics.jsonl") for folder in (plain, masked))
    assert one["reward"] == other["reward"] and one["length/cut"] == other["length/cut"] > 0
    if one["length/cut"] == 1:  # nothing is left to learn from
        assert unmoved(masked) and "loss" not in other
    assert not unmoved(plain)


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
