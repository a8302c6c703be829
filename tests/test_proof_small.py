"""script/proof.sh itself, sized for a CPU: every stage on a few rooms and the page, then again with nothing to do."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import threedr1
from threedr1.benchmarks import proof

pytestmark = pytest.mark.slow

ROOT = Path(threedr1.__file__).resolve().parent
# The overrides of every training stage: keys that detect, sft and grpo all have.
SET = "run.steps=2 run.batch_size=4 run.eval_every=2 data.num_points=1024 run.save_every=1 data.workers=0"
# What the recipes have besides those, made small: a value for each key of a file. A key that a recipe lacks is new.
ENCODER = {
    "num_tokens": 64,
    "num_neighbors": 8,
    "radius": 0.4,
    "width": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "num_heads": 2,
    "num_queries": 64,
}
SMALL = {
    "detect.yaml": {"data.workers": 0, "encoder": ENCODER, "precision": "float32"},
    "sft.yaml": {
        "model.encoder": ENCODER,
        "model.language.dtype": "float32",
        "eval_samples": 8,
        "eval_answers": 4,
        "eval_new_tokens": 4,
    },
    "grpo.yaml": {"rollout.max_new_tokens": 4, "rollout.group_size": 2, "eval_samples": 8},
}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the checkout without data and runs, its recipes made small."""
    copy = tmp_path_factory.mktemp("proof") / "checkout"

    def left_out(folder: str, names: list[str]) -> set[str]:
        top = {"runs", "data", "build", "dist", "tests"} if Path(folder) == ROOT else set()
        return {name for name in names if name in top or name.startswith(".") or name == "__pycache__"}

    shutil.copytree(ROOT, copy, ignore=left_out)
    recipes = copy / "script" / "recipes" / "proof"
    for name, values in SMALL.items():
        recipe = yaml.safe_load((recipes / name).read_text())
        for key, value in values.items():
            *sections, last = key.split(".")
            section = recipe
            for part in sections:
                section = section[part]
            section[last] = value
        (recipes / name).write_text(yaml.safe_dump(recipe, sort_keys=False))
    shutil.rmtree(copy / "docs" / "proof", ignore_errors=True)
    return copy


def run(checkout: Path, *stages: str, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("THREEDR1_")}
    kept |= {"THREEDR1_PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "ROOMS": "3", "HELD_OUT": "3", "SET": SET}
    kept |= {
        "PICTURED": "2",
        "PICTURE_STEPS": "4",
        "SEEDS": "0",
        "SHAPE": "tiny",
        "EVAL_SET": "data.max_samples=2 max_new_tokens=4 run.batch_size=8",
    }
    done = subprocess.run(
        ["bash", str(checkout / "script" / "proof.sh"), *stages],
        env=kept | variables,
        cwd=checkout,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-2500:] + done.stderr[-2500:]
    return done


def test_the_whole_proof_in_small(checkout):
    run(checkout, "data", "detect", "align", "sft,blind,views.ring,views.ours", "grpo,lora.4")
    printed = run(checkout, "page").stdout
    docs = checkout / "docs"
    kept = {path.stem for path in (docs / "proof" / "runs").glob("*.json")}
    assert kept == {"detect-0", "align-0", "sft-0", "blind-0", "grpo-0", "views.ring-0", "views.ours-0", "lora.4-0"}
    scores = json.loads((docs / "proof" / "runs" / "sft-0.json").read_text())["scores"]
    assert {"scanrefer/Acc@0.25", "nr3d/Acc@0.25", "scanqa/EM", "sqa3d/EM", "planning/CIDEr"} <= set(scores)
    page = (docs / "proof.md").read_text()
    assert page == proof.page(docs)
    assert all(f"| {row} | 1 |" in page for row in ("SFT + GRPO", "ring", "selected", "rank 4"))
    pictures = {path.stem for path in (docs / "proof").glob("*.png")}
    assert pictures == {"detect", "align", "sft", "grpo", "views", "ranks"}
    assert "| SFT | 1 |" in printed and "| SFT | 1 |" in (checkout / "README.md").read_text()
    assert "SET='run.steps=2" in page


def test_a_second_start_does_nothing(checkout):
    again = run(checkout, "data", "detect", "align", "sft", "blind", "grpo")
    assert again.stdout.count("complete:") == 12
