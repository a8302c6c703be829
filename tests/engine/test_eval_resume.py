"""An evaluation that was killed goes on where it was; processes share the questions and change nothing."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from threedr1.engine import evaluate, predict, sft
from threedr1.engine.answer_journal import AnswerJournal, fingerprint
from threedr1.engine.config import save_config
from threedr1.engine.rollout import cut_batches
from threedr1.utils.predictions import Prediction, read_predictions

from .test_distributed import run_on_two_ranks
from .test_pipeline import eval_config, sft_config

SMALL = ("data.datasets=scanrefer,planning,scan2cap", "block_size=3", "max_new_tokens=8", "dense_caption_proposals=2")


def test_batches_by_hand():
    assert cut_batches([5, 5, 5, 5, 5], 2) == [range(0, 2), range(2, 4), range(4, 5)]
    assert cut_batches([5, 5, 20, 5], 10, 12) == [range(0, 2), range(2, 3), range(3, 4)]
    assert cut_batches([], 3) == []


def prediction(name):
    return Prediction(name, "qa", "scene", "Why?", "<answer>so</answer>", answer="so", boxes=[[0.0] * 7])


def test_a_journal_gives_back_whole_blocks_of_the_same_evaluation(tmp_path):
    key, other = fingerprint("model", 1), fingerprint("model", 2)
    assert key != other
    first = AnswerJournal(tmp_path, key)
    first.add("scanqa", 0, [prediction("a"), prediction("b")])
    first.add("scanqa", 2, [prediction("c")])
    AnswerJournal(tmp_path, key, rank=1).add("sqa3d", 0, [prediction("d")])
    (file,) = (tmp_path / "answers").glob("*-0.jsonl")
    with file.open("a") as stream:
        stream.write('{"dataset": "scanqa", "block": 1, "pred')  # killed while writing
    again = AnswerJournal(tmp_path, key)
    assert {place: [entry.sample_id for entry in its] for place, its in again.done.items()} == {
        ("scanqa", 0): ["a", "b"],
        ("scanqa", 2): ["c"],
        ("sqa3d", 0): ["d"],
    }
    assert again.done["scanqa", 0][0] == prediction("a") and again.stale == 0
    again.add("scanqa", 1, [prediction("e")])  # into a file of its own, not behind half a line
    assert ("scanqa", 1) in AnswerJournal(tmp_path, key).done
    changed = AnswerJournal(tmp_path, other)
    assert not changed.done and changed.stale == 3
    changed.remove()
    assert not (tmp_path / "answers").exists()


@pytest.fixture(scope="module")
def model(rooms_root, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "sft"
    sft.train(sft_config(rooms_root, run_dir, "run.steps=1"))
    return run_dir


def outcome(run_dir):
    results = json.loads((run_dir / "results.json").read_text())["results"]
    return [vars(entry) for entry in read_predictions(run_dir / "predictions.jsonl")], results


@pytest.fixture(scope="module")
def whole(model, rooms_root, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    evaluate.evaluate(eval_config(model, rooms_root, run_dir, *SMALL))
    assert not (run_dir / "answers").exists()
    return outcome(run_dir)


def test_only_what_was_not_answered_is_asked_again(model, whole, rooms_root, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    asked: list[str] = []
    real = predict.answer

    def answer(given, samples, *rest, **options):
        if len(asked) >= 5:
            raise KeyboardInterrupt
        asked.extend(sample.sample_id for sample in samples)
        return real(given, samples, *rest, **options)

    monkeypatch.setattr(evaluate, "answer", answer)
    config = eval_config(model, rooms_root, tmp_path, *SMALL)
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate(config)
    assert not (tmp_path / "results.json").exists() and len(asked) >= 5
    before, asked[:] = set(asked), []
    monkeypatch.setattr(evaluate, "answer", lambda *a, **k: asked.extend(s.sample_id for s in a[1]) or real(*a, **k))
    evaluate.evaluate(config)
    assert asked and not before & set(asked) and f"{len(before)} questions were answered before" in caplog.text
    assert outcome(tmp_path) == whole


def test_answers_of_other_settings_are_not_taken(model, rooms_root, tmp_path, caplog):
    config = eval_config(model, rooms_root, tmp_path, "data.datasets=planning", "max_new_tokens=4")
    key = fingerprint("of something else")
    AnswerJournal(tmp_path, key).add("planning", 0, [prediction("x")])
    evaluate.evaluate(config)
    assert "answers of another model, other questions or other settings" in caplog.text
    assert all(entry.sample_id != "x" for entry in read_predictions(tmp_path / "predictions.jsonl"))


@pytest.mark.slow
def test_two_processes_give_what_one_does(model, whole, rooms_root, tmp_path):
    config = eval_config(model, rooms_root, tmp_path / "pair", *SMALL)
    run_on_two_ranks("eval", config, tmp_path / "eval.yaml")
    assert outcome(tmp_path / "pair") == whole


@pytest.mark.slow
def test_killed_in_the_middle_it_ends_the_same(model, whole, rooms_root, tmp_path):
    config = eval_config(model, rooms_root, tmp_path / "run", *SMALL)
    save_config(config, tmp_path / "eval.yaml")
    main = Path(evaluate.__file__).parents[1] / "main.py"
    arguments = [sys.executable, str(main), "eval", "--config", str(tmp_path / "eval.yaml")]
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "run" / "answers").glob("*.jsonl")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "run" / "results.json").exists()
    assert subprocess.run(arguments, capture_output=True, timeout=300).returncode == 0
    assert outcome(tmp_path / "run") == whole


def test_results_of_another_model_are_not_replaced(model, rooms_root, tmp_path):
    config = eval_config(model, rooms_root, tmp_path, "data.datasets=planning", "max_new_tokens=4")
    evaluate.evaluate(config)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    other = tmp_path / "other"
    (other / "model").mkdir(parents=True)
    for more in (f"model={other}", "answers=most-frequent"):
        with pytest.raises(ValueError, match=r"holds the results of .*sft \(answers: model\); set another run.dir"):
            evaluate.evaluate(eval_config(model, rooms_root, tmp_path, "data.datasets=planning", more))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    evaluate.evaluate(config)  # its own are
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(ValueError, match=r"results.json is not one of eval's results; remove it"):
        evaluate.evaluate(config)
