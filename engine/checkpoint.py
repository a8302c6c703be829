"""Atomic checkpoints and exact resume.

A checkpoint is the folder `<run>/checkpoints/step-000100`: `config.yaml`, `model/` (what `save_pretrained` writes)
and `state.pt` (optimizer, scheduler, RNG, step). It is written under another name and renamed when whole, so a folder
of that name is always complete.
"""

import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .config import save_config

_STEP = re.compile(r"step-(\d+)")


def rng_state() -> dict[str, Any]:
    """State of the global generators."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore what `rng_state` gave."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def save_checkpoint(
    run_dir: str | Path,
    step: int,
    config: Any,
    save_model: Callable[[Path], None],
    state: dict[str, Any],
    *,
    keep: int = 2,
) -> Path:
    """Write one checkpoint and delete all but the newest `keep`.

    Args:
        step: number of finished steps.
        save_model: writes the model into the folder it is given.
        state: anything torch.save takes; `step` and the RNG are added.
    """
    folder = Path(run_dir) / "checkpoints"
    final = folder / f"step-{step:06d}"
    partial = folder / f"partial-{step:06d}"
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "model").mkdir(parents=True)
    save_model(partial / "model")
    save_config(config, partial / "config.yaml")
    torch.save({**state, "step": step, "rng": rng_state()}, partial / "state.pt")
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    for old in list_checkpoints(run_dir)[:-keep] if keep > 0 else []:
        shutil.rmtree(old)
    return final


def list_checkpoints(run_dir: str | Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    folder = Path(run_dir) / "checkpoints"
    if not folder.is_dir():
        return []
    return sorted(entry for entry in folder.iterdir() if _STEP.fullmatch(entry.name))


def latest_checkpoint(run_dir: str | Path) -> Path | None:
    """The newest complete checkpoint, if any."""
    return next(reversed(list_checkpoints(run_dir)), None)


def load_state(checkpoint: str | Path) -> dict[str, Any]:
    """Training state of a checkpoint. It is our own file and holds Python RNG tuples, hence not weights-only."""
    return torch.load(Path(checkpoint) / "state.pt", map_location="cpu", weights_only=False)


def model_folder(path: str | Path) -> Path:
    """The model folder meant by a path: the folder itself, a checkpoint's `model`, or a run's newest checkpoint."""
    path = Path(path)
    if not path.exists():
        raise ValueError(f"There is no model at {path}; train one, or name a folder written by save_pretrained.")
    if (path / "model").is_dir():
        return path / "model"
    newest = latest_checkpoint(path)
    return newest / "model" if newest else path
