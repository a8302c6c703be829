"""metrics.jsonl: appended, cut back on resume, tolerant of a last line cut by a kill."""

import json

import pytest

from threedr1.engine.tracking import Tracker, read_metrics


def test_a_resumed_run_leaves_the_rows_of_an_uninterrupted_one(tmp_path):
    with Tracker(tmp_path, "test", 10) as tracker:
        for step in range(6):
            tracker.log(step, {"loss": float(step)})
            tracker.advance(loss=1.0)
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 6, "lo')
    with Tracker(tmp_path, "test", 10, first_step=4) as tracker:
        for step in range(4, 8):
            tracker.log(step, {"loss": float(step)})
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == list(range(8))


def test_non_finite_values_are_null(tmp_path):
    with Tracker(tmp_path, "test", 1) as tracker:
        tracker.log(0, {"loss": float("nan"), "lr": 0.5})
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert row["loss"] is None and row["lr"] == 0.5


def test_unknown_tracker_and_broken_file_are_named(tmp_path):
    with pytest.raises(ValueError, match="Unknown tracker 'wand'"):
        Tracker(tmp_path, "test", 1, sinks=("wand",))
    (tmp_path / "metrics.jsonl").write_text('oops\n{"step": 1}\n')
    with pytest.raises(ValueError, match="line 1: not JSON"):
        read_metrics(tmp_path / "metrics.jsonl")
