"""Atomic checkpoints and exact resume; saving.py writes them in the background (docs/checkpoints.md: a run's layout).

A checkpoint is the folder `<run>/checkpoints/step-000100`: `config.yaml`, `model/` (what `save_pretrained` writes),
`state.safetensors` and `state.json` (optimizer, random state, step). It is written under another name and renamed when
whole, and renamed again before it is deleted, so a folder of that name is always complete, whenever the process is
killed. `<run>/best` is a model's folder that is replaced in the same way.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..models.model_files import checkpoints_of, local_folder
from ..utils.files import readable_as_its_folder
from .background import advice, disk_error
from .config import save_config
from .optim import Optimizer
from .runtime import log
from .training_state import load_state, save_state, set_rng_state

_PARTIAL, _DELETED = "partial-", "deleted-"  # folders that are being written or deleted
BEST = "best"  # the folder of a run's best model


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
        state: nested dictionaries of tensors and of what JSON takes.

    Raises:
        OSError: it could not be written; the older checkpoints are all there.
    """

    def fill(partial: Path) -> None:
        (partial / "model").mkdir()
        save_model(partial / "model")
        save_config(config, partial / "config.yaml")
        save_state(state, partial)

    final = write_folder(checkpoint_path(run_dir, step), fill)
    for old in list_checkpoints(run_dir)[:-keep] if keep > 0 else []:
        try:
            _remove(old)
        except OSError as error:
            log.warning("%s is written, but %s could not be deleted: %s", final, old, advice(error))
    return final


def new_folder(path: str | Path) -> Path:
    """The path of a folder that somebody asks to have written; ValueError where something is there already."""
    if Path(path).exists():
        raise ValueError(f"{path} is there already; name a new folder.")
    return Path(path)


def write_folder(final: Path, fill: Callable[[Path], None]) -> Path:
    """Put a folder that `fill` writes in the place of `final`, whole or not at all.

    Raises:
        OSError: it could not be written; what was at `final` is still there, and nothing half-written stays.
    """
    partial, replaced = (final.with_name(prefix + final.name) for prefix in (_PARTIAL, _DELETED))
    try:
        shutil.rmtree(replaced, ignore_errors=True)
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        fill(partial)
        readable_as_its_folder(partial)
        _sync(partial)
        if final.exists():
            final.rename(replaced)
        partial.rename(final)
    except (OSError, SafetensorError) as error:
        if replaced.exists() and not final.exists():
            replaced.rename(final)
        shutil.rmtree(partial, ignore_errors=True)
        found = disk_error(error)
        if found is None:
            raise
        raise found from error
    shutil.rmtree(replaced, ignore_errors=True)
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
        doomed = folder.with_name(_DELETED + folder.name)
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed)


def remove_leftovers(run_dir: str | Path) -> None:
    """Delete what a kill left half-written or half-deleted; a folder whose successor never came gets its name back."""
    for folder in (Path(run_dir), Path(run_dir) / "checkpoints"):
        for entry in sorted(folder.iterdir()) if folder.is_dir() else []:
            final = folder / entry.name.removeprefix(_DELETED)
            if entry.name == _DELETED + BEST and not final.exists():  # the old best is deleted last of all
                entry.rename(final)
            elif entry.is_dir() and entry.name.startswith((_PARTIAL, _DELETED)):
                shutil.rmtree(entry)


def restore_run(checkpoint: Path | None, optimizer: Optimizer, data: str) -> dict[str, Any]:
    """Restore optimizer and RNG; returns the saved state: `step`, the number of finished steps, and what `extra` held.

    A fresh run has made 0 steps.

    Args:
        data: fingerprint of the training samples; ValueError where it is another than at the start.
    """
    if checkpoint is None:
        return {"step": 0}
    state = load_state(checkpoint, mapped=any(optimizer.sharded))
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
    return checkpoints_of(Path(run_dir))


def latest_checkpoint(run_dir: str | Path) -> Path | None:
    """The newest complete checkpoint, if any."""
    return next(reversed(list_checkpoints(run_dir)), None)


def model_folder(path: str | Path) -> Path:
    """The folder meant by a model, a checkpoint, a run or a name on the hub (model_files.local_folder)."""
    return local_folder(path)
