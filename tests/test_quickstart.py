"""script/quickstart.sh itself, in miniature: every stage on a few rooms, then again with nothing left to do."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import threedr1
from threedr1.utils.predictions import read_predictions

pytestmark = pytest.mark.slow

ROOT = Path(threedr1.__file__).resolve().parent
LABELS = ("most-frequent", "untrained", "sft", "grpo")
# What makes the recipes small; all else in them stays as it is shipped.
SMALLER = {
    "tiny.detect.yaml": {"run": {"steps": 6, "save_every": 3, "batch_size": 2}, "data": {"num_points": 1024}},
    "tiny.sft.yaml": {"run": {"steps": 4, "save_every": 2, "batch_size": 4}, "data": {"num_points": 1024}},
    "tiny.grpo.yaml": {
        "run": {"steps": 2, "save_every": 1, "batch_size": 2},
        "data": {"num_points": 1024},
        "rollout": {"group_size": 2, "max_new_tokens": 8},
    },
    "tiny.eval.yaml": {
        "run": {"batch_size": 8},
        "data": {"num_points": 1024, "max_samples": 2},
        "max_new_tokens": 8,
        "dense_caption_proposals": 2,
    },
}


def merged(recipe: dict, changes: dict) -> dict:
    return recipe | {
        key: merged(recipe[key], value) if isinstance(value, dict) else value for key, value in changes.items()
    }


def small_checkout(copy: Path) -> Path:
    """A copy of the checkout without tests, data and runs, its recipes made small."""

    def left_out(folder: str, names: list[str]) -> set[str]:
        top = {"runs", "data", "build", "dist", "tests"} if Path(folder) == ROOT else set()
        return {name for name in names if name in top or name.startswith(".") or name == "__pycache__"}

    shutil.copytree(ROOT, copy, ignore=left_out)
    (copy / "data").mkdir()
    shutil.copy(ROOT / "data" / "README.md", copy / "data")
    for name, changes in SMALLER.items():
        path = copy / "script" / "recipes" / name
        path.write_text(yaml.safe_dump(merged(yaml.safe_load(path.read_text()), changes)))
    return copy


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    return small_checkout(tmp_path_factory.mktemp("quickstart") / "checkout")


def quickstart(checkout: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("THREEDR1_")}
    # with fewer than three held-out rooms, balancing the answers leaves no question of some data sets
    kept |= {"THREEDR1_PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "ROOMS": "3", "HELD_OUT": "3"}
    return subprocess.run(
        ["bash", str(checkout / "script" / "quickstart.sh")],
        env=kept | variables,
        cwd=checkout,
        capture_output=True,
        text=True,
        timeout=900,
    )


@pytest.fixture(scope="module")
def first_start(checkout) -> subprocess.CompletedProcess[str]:
    done = quickstart(checkout)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    return done


def contents(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_it_trains_evaluates_and_reports(first_start, checkout):
    run = checkout / "runs" / "quickstart"
    assert "complete:" not in first_start.stdout
    for stage, steps in (("detect", 6), ("sft", 4), ("grpo", 2)):
        assert (run / stage / "checkpoints" / f"step-{steps:06d}" / "state.safetensors").exists()
        assert (run / stage / "metrics.jsonl").stat().st_size > 0
    assert (run / "untrained" / "checkpoints" / "step-000000" / "model").is_dir()
    for label in LABELS:
        results = json.loads((run / "eval" / label / "results.json").read_text())
        assert results["label"] == label and len(results["results"]) == 9
        assert all(scores["questions"] > 0 and scores["metrics"] for scores in results["results"].values())
        predictions = read_predictions(run / "eval" / label / "predictions.jsonl")
        held_out = set((checkout / "data" / "rooms" / "scannetv2_val.txt").read_text().split())
        assert len(held_out) == 3 and {entry.scene_id for entry in predictions} <= held_out
    page = (run / "report.html").read_text()
    assert all(f"<th>{label}</th>" in page for label in LABELS)
    assert "<svg" in page and "data:image/jpeg;base64" in page
    assert not list(run.rglob("*.partial")) and not list(run.rglob("partial-*"))


def test_the_table_of_all_models_is_printed(first_start):
    head = next(line for line in first_start.stdout.splitlines() if "untrained" in line and "|" in line)
    assert all(label in head for label in LABELS)


def test_a_second_start_does_nothing(first_start, checkout):
    before = contents(checkout / "runs"), contents(checkout / "data")
    again = quickstart(checkout)
    assert again.returncode == 0, again.stderr[-2000:]
    assert again.stdout.count("complete:") == first_start.stdout.count("== ") - 1  # the last line is the summary
    assert (contents(checkout / "runs"), contents(checkout / "data")) == before


def test_a_lost_result_is_made_again_and_what_follows_it(first_start, checkout):
    """Only what lies behind the stage whose result was lost is made again; models stay what they were."""
    shutil.rmtree(checkout / "runs" / "quickstart" / "eval" / "grpo")
    weights = contents(checkout / "runs" / "quickstart" / "grpo")
    again = quickstart(checkout)
    assert again.returncode == 0, again.stderr[-2000:]
    assert again.stdout.count("complete:") == 10  # all but the evaluation and the report
    assert contents(checkout / "runs" / "quickstart" / "grpo") == weights
    assert (checkout / "runs" / "quickstart" / "eval" / "grpo" / "results.json").exists()
