"""metrics.jsonl: appended, cut back on resume, tolerant of a last line cut by a kill."""

import json
import resource
from pathlib import Path

import pytest

from threedr1.engine.environment import machine_name
from threedr1.engine.tracking import Tracker, append_rows, read_metrics
from threedr1.utils.files import read_log


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


def test_every_start_says_what_with(tmp_path, monkeypatch):
    monkeypatch.setenv("THREEDR1_COMMIT", "abc")
    monkeypatch.setattr("sys.argv", ["main.py", "sft", "--set", "a=b c"])
    with Tracker(tmp_path, "test", 10):
        pass
    monkeypatch.setenv("THREEDR1_TYPED", "bash script/proof.sh sft")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with Tracker(tmp_path, "test", 10, first_step=4):
        pass
    with Tracker(tmp_path, "test", 10, first_step=10), Tracker(tmp_path, "test", 10, enabled=False):
        pass  # nothing left to do, or another rank
    first, second = read_log(tmp_path / "starts.jsonl")
    assert (first["step"], second["step"]) == (0, 4) and (first["processes"], second["processes"]) == (1, 2)
    assert first["typed"] == first["command"] == "python main.py sft --set 'a=b c'"
    assert second["typed"] == "bash script/proof.sh sft" and second["commit"] == "abc"
    assert second["machine"] == machine_name() and set(second["versions"]) == {"python", "torch", "transformers"}


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


def test_rows_that_do_not_fit_are_left_out_whole(tmp_path, caplog):
    """The limit on file sizes is hit in the middle of a row; a device that is always full stops nothing either."""
    path = tmp_path / "metrics.jsonl"
    assert append_rows(path, [{"step": 0}])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 40, hard))
    try:
        written = append_rows(path, [{"step": step, "text": "x" * 9000} for step in (1, 2)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not written and read_metrics(path) == [{"step": 0}]
    assert "the file is larger than this process may write" in caplog.text
    assert append_rows(path, [{"step": 3}]) and read_metrics(path) == [{"step": 0}, {"step": 3}]
    assert not append_rows(Path("/dev/full"), [{"step": 1}]) and "the disk is full" in caplog.text
