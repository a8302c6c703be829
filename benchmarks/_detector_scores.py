"""How well pre-trained scene encoders detect, out of their run folders."""

import argparse
import json
import re
from pathlib import Path

from ..engine.checkpoint import latest_checkpoint
from ..engine.config import DetectConfig, load_config
from ..utils.files import read_text
from ..utils.labels import DETECTION_CLASSES
from .results import Row


def named_run(text: str) -> tuple[str, Path]:
    """NAME=RUN_DIR of the command line."""
    name, equals, folder = text.partition("=")
    if not equals or not folder or not re.fullmatch(r"[a-z0-9_]+", name):
        raise argparse.ArgumentTypeError(f"{text} is not NAME=RUN_DIR, as rooms=runs/detect (a-z, 0-9 and _ in NAME)")
    return name, Path(folder)


def score_rows(name: str, run_dir: Path) -> list[Row]:
    """mAP@0.25 and mAP@0.5 of a run's best encoder, fractions. ValueError: the folder is not such a run."""
    scores = read_scores(run_dir / "detection.json")
    config = run_config(run_dir)
    classes = [
        f"{label} {round(100 * scores['0.25']['AP'][label])}/{round(100 * scores['0.5']['AP'][label])}"
        for label in DETECTION_CLASSES
        if label in scores["0.25"]["AP"]
    ]
    run = config.run
    note = (
        f"best of {run.steps} steps after {scores['step']} and {scores['seconds']:.0f} s of training, "
        f"{scores['scenes']} held-out scenes, seed {run.seed}, batches of {run.batch_size}, "
        f"{config.data.num_points} points, {config.encoder.backbone}, {config.precision}; "
        f"AP@0.25/AP@0.5 in %: {', '.join(classes)}"
    )
    return [
        Row(f"detector.{name}_map{suffix}", scores[threshold]["mAP"], "mAP", better="higher", note=note)
        for suffix, threshold in (("25", "0.25"), ("50", "0.5"))
    ]


def read_scores(path: Path) -> dict:
    """What `detect` wrote. ValueError: not there, or not that."""
    text = read_text(
        path,
        f"There is no {path}; name the folder of a `python main.py detect` run that had held-out scenes to score on.",
    )
    try:
        scores = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error.msg}, line {error.lineno}); run `detect` again.") from None
    needed = {"step", "seconds", "scenes", "0.25", "0.5"}
    if not isinstance(scores, dict) or not needed <= set(scores):
        raise ValueError(f"{path} lacks {', '.join(sorted(needed - set(scores)))}; `detect` writes it whole.")
    return scores


def run_config(run_dir: Path) -> DetectConfig:
    """The configuration of a run, out of its newest checkpoint. ValueError: it has none."""
    newest = latest_checkpoint(run_dir)
    if newest is None:
        raise ValueError(f"There is no checkpoint under {run_dir}/checkpoints; keep one, it says how the run trained.")
    return load_config("detect", newest / "config.yaml")
