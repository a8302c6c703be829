"""The table of scores: units, intervals, missing entries, column order."""

import json
from pathlib import Path

import pytest

from threedr1 import main as cli
from threedr1.visualization.table import results_markdown


def write_results(folder: Path, label: str, unit: str, value: float, interval: list[float] | None) -> None:
    scores = {
        "task": "situated_qa",
        "scorer": "sqa3d",
        "unit": unit,
        "metrics": {"EM": value, "EM-R": None},
        "intervals": {"EM": interval} if interval else {},
        "questions": 24,
    }
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps({"label": label, "results": {"sqa3d": scores}}))


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_percent_and_fractions_stand_side_by_side(tmp_path: Path):
    write_results(tmp_path / "eval" / "grpo", "grpo", "percent", 41.7, [20.8, 62.5])
    write_results(tmp_path / "eval" / "sft", "sft", "fraction", 0.375, None)
    header, rule, row = results_markdown(tmp_path).splitlines()
    assert cells(header) == ["task", "data set", "metric (scorer)", "questions", "sft", "grpo"]
    assert cells(row) == ["situated qa", "sqa3d", "EM (sqa3d)", "24", "37.5", "41.7 (21 to 62)"]
    assert len(header) == len(rule) == len(row)


def test_a_data_set_that_one_model_lacks(tmp_path: Path):
    write_results(tmp_path / "eval" / "sft", "sft", "percent", 10.0, None)
    (tmp_path / "eval" / "other").mkdir()
    (tmp_path / "eval" / "other" / "results.json").write_text(json.dumps({"label": "other", "results": {}}))
    *_, row = results_markdown(tmp_path).splitlines()
    assert cells(row)[-2:] == ["10.0", "-"]


def test_nothing_evaluated_is_no_table(tmp_path: Path):
    assert results_markdown(tmp_path) == ""
    assert results_markdown(tmp_path / "predictions.jsonl") == ""


def test_view_prints_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    write_results(tmp_path / "eval" / "sft", "sft", "percent", 10.0, None)
    (tmp_path / "eval" / "sft" / "predictions.jsonl").write_text("")
    assert cli.main(["view", str(tmp_path), "--html", str(tmp_path / "report.html")]) == 0
    assert "situated qa" in capsys.readouterr().out
    assert (tmp_path / "report.html").exists()
