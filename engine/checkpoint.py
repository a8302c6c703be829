"""Atomic checkpoints and exact resume.

A checkpoint is the folder `<run>/checkpoints/step-000100`: `config.yaml`, `model/` (what `save_pretrained` writes)
and `state.pt` (optimizer, scheduler, RNG, step). It is written under another name and renamed when whole, and renamed
again before it is deleted, so a folder of that name is always complete, whenever the process is killed.
"""

import os
import pickle
import random
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import yaml

from ..utils.files import read_text
from .config import AugmentConfig, save_config, to_dict
from .optim import Optimizer
from .runtime import Runtime, log

_STEP = re.compile(r"step-(\d+)")
_HALF = ("partial-", "deleted-")  # folders that are being written or deleted


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


def checkpoint_path(run_dir: str | Path, step: int) -> Path:
    """Where the checkpoint after `step` finished steps lies."""
    return Path(run_dir) / "checkpoints" / f"step-{step:06d}"


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
    final = checkpoint_path(run_dir, step)
    partial = final.with_name(f"partial-{step:06d}")
    _remove(partial)
    (partial / "model").mkdir(parents=True)
    save_model(partial / "model")
    save_config(config, partial / "config.yaml")
    torch.save({**state, "step": step, "rng": rng_state()}, partial / "state.pt")
    _sync(partial)
    _remove(final)
    partial.rename(final)
    for old in list_checkpoints(run_dir)[:-keep] if keep > 0 else []:
        _remove(old)
    return final


def _sync(folder: Path) -> None:
    """Wait until every file of a folder is on the disk, so that a power cut cannot leave an empty one renamed."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove(folder: Path) -> None:
    """Delete a folder, if it is there, under another name: half of it never stands under its own."""
    if folder.exists():
        doomed = folder.with_name(f"deleted-{folder.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed)


def remove_leftovers(run_dir: str | Path) -> None:
    """Delete what a kill left half-written or half-deleted among the checkpoints."""
    folder = Path(run_dir) / "checkpoints"
    for entry in folder.iterdir() if folder.is_dir() else []:
        if entry.name.startswith(_HALF):
            shutil.rmtree(entry)


class Saved(Protocol):
    """A model that writes itself into a folder."""

    def save_pretrained(self, folder: Path, /) -> None: ...


def save_run(
    runtime: Runtime,
    config: Any,
    step: int,
    model: Saved,
    optimizer: Optimizer,
    extra: dict[str, Any] | None = None,
) -> Path:
    """Checkpoint a training run after `step` finished steps; rank 0 writes, the others wait.

    Args:
        extra: more to keep in state.pt.
    """
    run = config.run
    if runtime.is_main:
        state = {"optimizer": optimizer.state_dict(), **(extra or {})}
        save_checkpoint(run.dir, step, config, model.save_pretrained, state, keep=run.keep_checkpoints)
    runtime.barrier()
    return checkpoint_path(run.dir, step)


def restore_run(checkpoint: Path | None, optimizer: Optimizer, data: str) -> dict[str, Any]:
    """Restore optimizer and RNG; returns the saved state: `step`, the number of finished steps, and what `extra` held.

    A fresh run has made 0 steps.

    Args:
        data: fingerprint of the training samples; ValueError where it is another than at the start.
    """
    if checkpoint is None:
        return {"step": 0}
    state = load_state(checkpoint)
    if state["data"] != data:
        raise ValueError(
            f"The training data has changed since {checkpoint} was written; resume with the same, or start a new run."
        )
    optimizer.load_state_dict(state["optimizer"])
    set_rng_state(state["rng"])
    log.info("resumed from %s", checkpoint)
    return state


def list_checkpoints(run_dir: str | Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    folder = Path(run_dir) / "checkpoints"
    if not folder.is_dir():
        return []
    return sorted(entry for entry in folder.iterdir() if _STEP.fullmatch(entry.name))


def latest_checkpoint(run_dir: str | Path) -> Path | None:
    """The newest complete checkpoint, if any."""
    return next(reversed(list_checkpoints(run_dir)), None)


def open_run(config: Any, resume: bool) -> Path | None:
    """The checkpoint that a run goes on from, None for a fresh start.

    Raises:
        ValueError: the folder holds another run's checkpoints, or this run's under another configuration.
    """
    newest = latest_checkpoint(config.run.dir)
    if (resume or newest is None) and os.environ.get("RANK", "0") == "0":
        remove_leftovers(config.run.dir)
    if newest is None:
        return None
    if not resume:
        raise ValueError(
            f"{config.run.dir} already holds checkpoints; pass --resume to go on, or set another run.dir."
        )
    saved = _saved_config(newest, to_dict(type(config)()))
    changed = _differences(saved, to_dict(config))
    if config.optim.schedule == "constant":  # any other schedule is stretched over the steps
        changed = [entry for entry in changed if not entry.startswith("run.steps:")]
    if changed:
        raise ValueError(
            f"{newest} was trained with another configuration ({', '.join(changed[:3])}); "
            "resume with the same one, or set another run.dir."
        )
    return newest


# Keys that came later have defaults that mean what was done before there were such keys, but for these.
_BEFORE = {"model.language.object_token": False, "model.views.redundancy": 0.0}


def _saved_config(checkpoint: Path, defaults: dict) -> dict:
    """A checkpoint's configuration; keys that it was written without take their defaults."""
    path = checkpoint / "config.yaml"
    text = read_text(path, f"{checkpoint} has no config.yaml; delete that checkpoint and resume from the one before.")
    try:
        saved = yaml.safe_load(text)
    except yaml.YAMLError:
        saved = None
    if not isinstance(saved, dict):
        raise ValueError(f"{path} is broken; delete that checkpoint and resume from the one before.")
    if isinstance(saved.get("augment"), bool):  # from before augmentation was a group; its defaults are what it was
        saved["augment"] = to_dict(AugmentConfig(enabled=saved["augment"]))
    for path, value in _BEFORE.items():
        *names, key = path.split(".")
        group = _group(saved, names)
        if isinstance(group, dict):
            group.setdefault(key, value)
    _fill(saved, defaults)
    return saved


def _group(config: dict, names: Sequence[str]) -> Any:
    """What stands in nested dictionaries under these names, None where nothing does."""
    group: Any = config
    for name in names:
        group = group.get(name) if isinstance(group, dict) else None
    return group


def _fill(saved: dict, defaults: dict) -> None:
    """Add the keys that are missing, at every depth."""
    for key, value in defaults.items():
        if isinstance(value, dict) and isinstance(saved.get(key), dict):
            _fill(saved[key], value)
        else:
            saved.setdefault(key, value)


# Settings that change how a run is carried out, not what it computes.
_FREE_TO_CHANGE = {"run.log_every", "run.save_every", "run.keep_checkpoints", "run.trackers"}
_FREE_TO_CHANGE |= {"run.eval_every", "run.device", "run.dir", "data.cached_scenes", "data.workers"}
# These say which samples there are, which a run that is resumed compares one by one.
_FREE_TO_CHANGE |= {"data.eval_splits", "data.missing"}


def _differences(saved: dict, now: dict, prefix: str = "") -> list[str]:
    names = []
    for key in sorted(set(saved) | set(now)):
        old, new = saved.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            names += _differences(old, new, f"{prefix}{key}.")
        elif old != new and prefix + key not in _FREE_TO_CHANGE:
            names.append(f"{prefix}{key}: {old} -> {new}")
    return names


def load_state(checkpoint: str | Path) -> dict[str, Any]:
    """Training state of a checkpoint; ValueError where it is broken.

    It is our own file and holds Python RNG tuples, hence not weights-only.
    """
    path = Path(checkpoint) / "state.pt"
    try:
        return torch.load(path, map_location="cpu", weights_only=False)
    except (FileNotFoundError, RuntimeError, EOFError, pickle.UnpicklingError):
        raise ValueError(
            f"{path} is missing or broken; delete that checkpoint and resume from the one before."
        ) from None


def model_folder(path: str | Path) -> Path:
    """The model folder meant by a path: the folder itself, a checkpoint's `model`, or a run's newest checkpoint."""
    path = Path(path)
    if not path.exists():
        raise ValueError(f"There is no model at {path}; train one, or name a folder written by save_pretrained.")
    if not path.is_dir():
        raise ValueError(f"{path} is a file; name the folder of a model, a checkpoint or a run.")
    if (path / "model").is_dir():
        return path / "model"
    newest = latest_checkpoint(path)
    return newest / "model" if newest else path
