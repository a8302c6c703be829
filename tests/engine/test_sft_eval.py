"""Evaluation while SFT goes on: the run is the same with it, its numbers are the model's, the best is kept."""

import json
import math
import shutil

import pytest
import torch

from threedr1.engine import sft
from threedr1.engine.checkpoint import latest_checkpoint
from threedr1.engine.config import load_config
from threedr1.engine.data import load_held_out
from threedr1.engine.runtime import init_runtime
from threedr1.engine.sft_data import write_targets
from threedr1.engine.sft_eval import SftHeldOut
from threedr1.engine.sft_loss import sft_loss
from threedr1.engine.tracking import read_metrics
from threedr1.engine.training_state import load_state, rng_state
from threedr1.models.scene_vlm import SceneVLM

from .test_distributed import run_on_two_ranks
from .test_pipeline import assert_same_weights, sft_config, weights

EVALUATED = ("run.eval_every=1", "eval_samples=7", "data.datasets=scan2cap,planning,scanrefer")


def evaluations(run_dir) -> list[dict]:
    return [row for row in read_metrics(run_dir / "metrics.jsonl") if "eval/loss" in row]


def trained_rows(run_dir) -> list[dict]:
    rows = [row for row in read_metrics(run_dir / "metrics.jsonl") if "eval/loss" not in row]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


@pytest.fixture(scope="module")
def evaluated_run(rooms_root, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "evaluated"
    sft.train(sft_config(rooms_root, run_dir, *EVALUATED, "eval_answers=4", "eval_new_tokens=6"))
    return run_dir


def test_a_run_with_evaluation_ends_as_one_without(evaluated_run, rooms_root, tmp_path):
    plain = sft.train(sft_config(rooms_root, tmp_path, EVALUATED[2]))
    whole = latest_checkpoint(evaluated_run)
    assert_same_weights(whole, plain)
    assert trained_rows(evaluated_run) == trained_rows(tmp_path) and evaluations(tmp_path) == []
    states = [load_state(folder) for folder in (whole, plain)]
    assert torch.equal(states[0]["rng"]["torch"], states[1]["rng"]["torch"])
    assert states[0]["rng"]["numpy"] == states[1]["rng"]["numpy"]
    for name, value in states[0]["optimizer"]["adam"]["exp_avg"].items():
        assert torch.equal(value, states[1]["optimizer"]["adam"]["exp_avg"][name])


@pytest.mark.parametrize("more", [["model.train_scene_encoder=true"], ["model.views.weights=learned"]])
def test_nor_does_it_where_the_scenes_side_learns(rooms_root, tmp_path, more):
    for name, evaluated in (("plain", []), ("evaluated", EVALUATED[:2])):
        sft.train(sft_config(rooms_root, tmp_path / name, *evaluated, *more, EVALUATED[2], "run.steps=3"))
    assert_same_weights(latest_checkpoint(tmp_path / "evaluated"), latest_checkpoint(tmp_path / "plain"))
    losses = [row["eval/loss"] for row in evaluations(tmp_path / "evaluated")]
    assert len(set(losses)) == 3


def test_resumed_it_logs_the_same(evaluated_run, rooms_root, tmp_path):
    shutil.copytree(evaluated_run / "checkpoints" / "step-000002", tmp_path / "checkpoints" / "step-000002")
    more = (*EVALUATED, "eval_answers=4", "eval_new_tokens=6")
    sft.train(sft_config(rooms_root, tmp_path, *more), resume=True)
    ours, theirs = evaluations(tmp_path), evaluations(evaluated_run)[2:]
    assert [{**row, "seconds": 0} for row in ours] == [{**row, "seconds": 0} for row in theirs] and len(ours) == 2


def test_its_loss_is_the_mean_over_held_out_tokens(evaluated_run, rooms_root, tmp_path):
    """Against each sample by itself, through the saved model; by task and overall."""
    config = sft_config(rooms_root, tmp_path, *EVALUATED)
    model = SceneVLM.from_pretrained(latest_checkpoint(evaluated_run) / "model")
    held_out = SftHeldOut(config, model, init_runtime("cpu"))
    row = evaluations(evaluated_run)[-1]
    assert {sample.scene_id for sample in held_out.samples} <= set(
        (rooms_root / "scannetv2_val.txt").read_text().split()
    )
    sums: dict[str, list[float]] = {}
    for sample in held_out.samples:
        taught = write_targets(model, [sample], held_out.observations.of([sample]), pointers="name")
        with torch.no_grad():
            loss, losses_T = sft_loss(model, taught)
        total = sums.setdefault(sample.task, [0.0, 0.0])
        total[0] += float(loss)
        total[1] += len(losses_T)
    assert set(sums) == {"dense_caption", "planning", "grounding"}
    for task, (total, count) in sums.items():
        assert row[f"eval/loss/{task}"] == pytest.approx(total / count, rel=1e-5)
    overall = sum(total for total, _ in sums.values()) / sum(count for _, count in sums.values())
    assert row["eval/loss"] == pytest.approx(overall, rel=1e-5)
    packed = SftHeldOut(sft_config(rooms_root, tmp_path, *EVALUATED, "token_budget=1"), model, init_runtime("cpu"))
    assert packed.evaluate()["eval/loss"] == pytest.approx(overall, rel=1e-5)


def test_answers_are_scored_by_data_set(evaluated_run):
    row = evaluations(evaluated_run)[-1]
    assert {"eval/scanrefer/Acc@0.25", "eval/planning/CIDEr"} <= row.keys()
    assert not any(name.startswith("eval/scan2cap") for name in row), "dense captions are asked of detected objects"
    assert all(value is None or math.isfinite(value) for value in row.values())


def test_answers_are_asked_for_in_the_configured_modes(evaluated_run, rooms_root, tmp_path, monkeypatch):
    model = SceneVLM.from_pretrained(latest_checkpoint(evaluated_run) / "model")
    asked = []
    monkeypatch.setattr("threedr1.engine.sft_eval.answer", lambda *_, modes, **__: asked.append(modes) or [])
    more = (*EVALUATED, "eval_answers=4", "eval_modes.grounding=direct")
    SftHeldOut(sft_config(rooms_root, tmp_path, *more), model, init_runtime("cpu")).evaluate()
    assert asked == [{"grounding": "direct"}]
    for wrong in ("eval_modes.grounding=loud", "eval_modes.cooking=think"):
        with pytest.raises(ValueError, match="eval_modes has .*; tasks are .*, modes are think, direct"):
            SftHeldOut(sft_config(rooms_root, tmp_path, *more, wrong), model, init_runtime("cpu"))


def test_the_model_of_the_lowest_loss_is_the_best(evaluated_run, rooms_root, tmp_path):
    rows = evaluations(evaluated_run)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    lowest = min(rows, key=lambda row: row["eval/loss"])
    kept = json.loads((evaluated_run / "best" / "best.json").read_text())
    assert kept == {"step": lowest["step"] + 1, "metric": "eval/loss", "score": lowest["eval/loss"]}
    SceneVLM.from_pretrained(evaluated_run / "best")
    more = (*EVALUATED, "run.best_metric=eval/loss/planning", "run.best_mode=min", "run.steps=3", "optim.lr=1.0")
    sft.train(sft_config(rooms_root, tmp_path, *more))
    losses = [row["eval/loss/planning"] for row in evaluations(tmp_path)]
    kept = json.loads((tmp_path / "best" / "best.json").read_text())
    assert kept["score"] == min(losses) and kept["step"] == losses.index(min(losses)) + 1


def test_random_generators_and_modes_are_left_alone(evaluated_run, rooms_root, tmp_path):
    model = SceneVLM.from_pretrained(latest_checkpoint(evaluated_run) / "model").train()
    held_out = SftHeldOut(sft_config(rooms_root, tmp_path, *EVALUATED), model, init_runtime("cpu"))
    before = rng_state()
    held_out.evaluate()
    after = rng_state()
    assert torch.equal(before["torch"], after["torch"]) and before["numpy"] == after["numpy"]
    assert model.training and before["python"] == after["python"]


def test_every_data_set_has_its_share(rooms_root):
    settings = ["data.datasets=scan2cap,scanqa,scanrefer", "data.eval_splits.scanqa=train"]
    config = load_config("sft", None, [f"data.root={rooms_root}", *settings])
    samples, _ = load_held_out(config.data, 0, 8)
    assert [sample.dataset for sample in samples][:6] == ["scan2cap", "scanqa", "scanrefer"] * 2
    assert len({sample.sample_id for sample in samples}) == 8
    again, _ = load_held_out(config.data, 0, 8)
    other, _ = load_held_out(config.data, 1, 8)
    ids = [[sample.sample_id for sample in found] for found in (samples, again, other)]
    assert ids[0] == ids[1] != ids[2]
    trained = set((rooms_root / "scannetv2_train.txt").read_text().split())
    assert {sample.dataset for sample in samples if sample.scene_id in trained} == {"scanqa"}


def test_data_sets_without_held_out_files_are_left_out(rooms_root, tmp_path, caplog):
    config = load_config("sft", None, [f"data.root={rooms_root}", "data.datasets=scene30k,planning"])
    samples, _ = load_held_out(config.data, 0, 9)
    assert {sample.dataset for sample in samples} == {"planning"}
    assert "scene30k is not among the held-out samples" in caplog.text
    config = load_config("sft", None, [f"data.root={rooms_root}", "data.datasets=scene30k"])
    with pytest.raises(ValueError, match="No samples of scene30k in split val"):
        load_held_out(config.data, 0, 9)
    other = ("data.datasets=scene30k", "eval_datasets=scanrefer", "run.eval_every=1", "run.steps=1")
    sft.train(sft_config(rooms_root, tmp_path, *other))
    (row,) = evaluations(tmp_path)
    assert [name for name in row if name.startswith("eval/")] == ["eval/loss", "eval/loss/grounding"]


def test_what_cannot_be_is_refused(rooms_root, tmp_path):
    for setting, sentence in (
        (("run.best_metric=eval/loss", "run.eval_every=2"), "best where low; set run.best_mode=min"),
        (("eval_samples=0",), "must be at least 1"),
    ):
        with pytest.raises(ValueError, match=sentence):
            sft_config(rooms_root, tmp_path, *setting)
    with pytest.raises(ValueError, match="nothing is evaluated; set run.eval_every"):
        sft.train(sft_config(rooms_root, tmp_path, "run.best_metric=eval/scanqa/EM@1"))
    named = ("run.eval_every=1", "run.best_metric=eval/accuracy", "run.steps=1", "eval_samples=2")
    with pytest.raises(ValueError, match="is 'eval/accuracy', which is not measured; choose eval/loss"):
        sft.train(sft_config(rooms_root, tmp_path, *named))


@pytest.mark.slow
def test_two_ranks_measure_what_one_does(evaluated_run, rooms_root, tmp_path):
    more = (*EVALUATED, "eval_answers=4", "eval_new_tokens=6")
    run_on_two_ranks("sft", sft_config(rooms_root, tmp_path / "pair", *more), tmp_path / "sft.yaml")
    ours, theirs = evaluations(tmp_path / "pair"), evaluations(evaluated_run)
    for one, two in zip(theirs, ours, strict=True):
        assert one.keys() == two.keys()
        for name in one.keys() - {"seconds"}:
            if "loss" in name:
                assert two[name] == pytest.approx(one[name], rel=1e-3), name
    rows = [trained_rows(run) for run in (evaluated_run, tmp_path / "pair")]
    for one, two in zip(*rows, strict=True):
        assert one.keys() == two.keys()
        for name in one:
            assert two[name] == pytest.approx(one[name], rel=1e-3), name
    assert weights(tmp_path / "pair" / "checkpoints" / "step-000004").keys() and (tmp_path / "pair" / "best").exists()


@pytest.mark.slow
def test_a_rank_without_a_held_out_sample_runs_along(rooms_root, tmp_path):
    more = ("run.eval_every=1", "eval_samples=1", "run.steps=1", "data.datasets=planning,scanrefer", "eval_answers=1")
    run_on_two_ranks("sft", sft_config(rooms_root, tmp_path / "pair", *more), tmp_path / "sft.yaml")
    sft.train(sft_config(rooms_root, tmp_path / "alone", *more))
    ours, theirs = (evaluations(tmp_path / name)[0] for name in ("pair", "alone"))
    assert ours["eval/loss"] == pytest.approx(theirs["eval/loss"], rel=1e-3)
    assert ours.keys() == theirs.keys() and "eval/loss/planning" in ours
