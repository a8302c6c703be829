"""Opening a run's folder: where a run goes on, and refusing to go on under another configuration or beside another."""

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from ..utils.files import read_text
from .checkpoint import BEST, latest_checkpoint, remove_leftovers
from .config import AugmentConfig, to_dict
from .runtime import log


@contextmanager
def run_folder(path: str | Path) -> Iterator[Path]:
    """A run's folder, made where there is none and held by this run alone; one that stays empty goes again.

    The first process of a run holds it, by a lock on the folder that ends with the process.

    Raises:
        ValueError: another run is going on in it.
    """
    folder = Path(path)
    if os.environ.get("RANK", "0") != "0":
        yield folder
        return
    folder.mkdir(parents=True, exist_ok=True)
    held = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"Another run is going on in {folder}; wait for it, or set another run.dir.") from None
        except OSError as error:  # some network file systems lock no folders
            log.warning("%s cannot be held against other runs (%s): start no other one in it.", folder, error)
        try:
            yield folder
        finally:
            with suppress(OSError):
                folder.rmdir()
    finally:
        os.close(held)


def open_run(config: Any, resume: bool) -> Path | None:
    """The checkpoint that a run goes on from, None for a fresh start.

    Raises:
        ValueError: the folder holds another run's checkpoints, or this run's under another configuration.
    """
    newest = latest_checkpoint(config.run.dir)
    if (resume or newest is None) and os.environ.get("RANK", "0") == "0":
        remove_leftovers(config.run.dir)
    if newest is None:
        if not resume and (Path(config.run.dir) / BEST).exists():
            raise ValueError(
                f"{config.run.dir} holds the model of an earlier run in {BEST}/; set another run.dir, or remove it."
            )
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
_BEFORE = {
    "model.language.object_token": False,
    "model.language.object_color": False,
    "model.views.redundancy": 0.0,
}


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
_FREE_TO_CHANGE |= {"run.eval_every", "eval_datasets", "eval_samples", "eval_answers", "eval_new_tokens"}
_FREE_TO_CHANGE |= {"eval_modes", "run.device", "run.dir", "data.cached_scenes", "data.cache_views", "data.workers"}
_FREE_TO_CHANGE |= {"model.language.sharding"}
_FREE_TO_CHANGE |= {"reward.timeout_s", "reward.workers", "reward.max_failure_share"}
# How a step is cut up and carried out changes its result by rounding alone: after running out of memory one wants to.
_FREE_TO_CHANGE |= {"token_budget", "blocks", "run.micro_batch_size", "model.language.gradient_checkpointing"}
_FREE_TO_CHANGE |= {"model.language.attention", "gradient_checkpointing", "attention"}
# These say which samples there are, which a run that is resumed compares one by one.
_FREE_TO_CHANGE |= {"data.eval_splits", "data.missing"}


def _differences(saved: dict, now: dict, prefix: str = "") -> list[str]:
    names = []
    for key in sorted(set(saved) | set(now)):
        old, new = saved.get(key), now.get(key)
        if prefix + key in _FREE_TO_CHANGE:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            names += _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            names.append(f"{prefix}{key}: {old} -> {new}")
    return names
