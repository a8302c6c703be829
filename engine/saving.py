"""Saving during training: checkpoints and the best model, copied at once and written in the background."""

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import nn

from ..utils.files import write_whole
from .background import Writer, advice
from .checkpoint import BEST, checkpoint_path, save_checkpoint, write_folder
from .config import CONFIGS, to_dict
from .model_card import RunFacts, write_card
from .optim import Optimizer
from .runtime import Runtime, log
from .shards import is_sharded
from .snapshot import host_state, join_copies, twin
from .training_state import rng_state

BEST_JSON = "best.json"


class Checkpoints:
    """The checkpoints and the best model of one training run. A context manager around the training loop.

    Rank 0 copies what is to be written to host memory and hands it to a writer thread; the other ranks go on at once.
    Sharded parameters (sharding.py) are gathered one by one, in which all ranks take part.
    A full disk does not stop the run: one sentence is logged, and the next save tries again. Leaving the context waits
    for what is being written.

    Args:
        config: the command's configuration; `run` says where, how many are kept and which metric makes a model best.
        samples: number of training samples by data set, for the model's card.
        fresh: the run starts from its first step: what an earlier life left of a best model goes.
        metric: of the best model where run.best_metric names none; it then goes by `mode`, max or min.

    Raises:
        OSError: on leaving: the last checkpoint, or the best model, could not be written.
    """

    def __init__(
        self,
        runtime: Runtime,
        config: Any,
        *,
        samples: Mapping[str, int],
        fresh: bool = False,
        metric: str = "",
        mode: str = "",
    ):
        self.runtime = runtime
        self.config = config
        self.run_dir = Path(config.run.dir)
        self.metric = config.run.best_metric or metric
        self.mode = config.run.best_mode if config.run.best_metric or not mode else mode
        self.samples = dict(samples)
        self.failures: dict[str, str] = {}  # what could not be written last, by job
        self._writer = Writer()
        if fresh and runtime.is_main:
            shutil.rmtree(self.best_folder, ignore_errors=True)
        self._best, self._best_step = self._best_on_disk() if runtime.is_main else (None, -1)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
            return
        for late in self._writer.close():  # the error under way is the one to tell
            log.error("while writing in the background: %s", late)

    @property
    def best_folder(self) -> Path:
        """Where the best model is kept."""
        return self.run_dir / BEST

    # -- saving ----------------------------------------------------------------------------------------------------

    def save(self, step: int, model: nn.Module, optimizer: Optimizer, extra: Mapping[str, Any] | None = None) -> Path:
        """Checkpoint the run after `step` finished steps.

        It waits for the checkpoint before, and returns as soon as everything is copied.

        Args:
            extra: more to keep: nested dictionaries of tensors and of what JSON takes.
        """
        path = checkpoint_path(self.run_dir, step)
        sharded = is_sharded(model)
        if not (self.runtime.is_main or sharded):
            return path
        state = {**(extra or {}), "optimizer": optimizer.state_dict(), "step": step, "rng": rng_state()}
        if not self.runtime.is_main:
            join_copies(model, state)
            return path
        self._writer.wait("checkpoint")
        copied = twin(model)
        state = host_state(state)
        save_model = self._with_card(copied, step)
        keep = self.config.run.keep_checkpoints

        def write() -> None:
            save_checkpoint(self.run_dir, step, self.config, save_model, state, keep=keep)

        self._writer.submit("checkpoint", lambda: self._guarded("checkpoint", path, write))
        return path

    def offer_best(
        self,
        step: int,
        metrics: Mapping[str, float] | None,
        model: nn.Module,
        *,
        beside: Mapping[str, Any] | None = None,
    ) -> bool:
        """Keep a model as `<run>/best` where its metric is better than that of the one there.

        Args:
            step: number of finished steps.
            metrics: with the one that run.best_metric names; None keeps the model whatever the one there is.
            beside: more for the run's folder, JSON by name of file, written with the model.

        Returns:
            Whether it is kept; on rank 0 alone.

        Raises:
            ValueError: no such metric.
        """
        if metrics is not None and self.metric not in metrics:
            raise ValueError(
                f"run.best_metric is {self.metric!r}, which is not measured; choose {', '.join(sorted(metrics))}."
            )
        sharded = is_sharded(model)
        if not (self.runtime.is_main or sharded):
            return False
        if self.runtime.is_main:
            self._writer.wait(BEST)
        score = None if metrics is None else float(metrics[self.metric])
        better = score is None or self._better(score, step)
        if sharded:
            better = self.runtime.gather(better)[0]
        if not better:
            return False
        if not self.runtime.is_main:
            join_copies(model, {})
            return False
        save_model = self._with_card(twin(model), step, {} if score is None else {self.metric: score})
        facts = {"step": step, "metric": self.metric, "score": score}

        def fill(folder: Path) -> None:
            save_model(folder)
            (folder / BEST_JSON).write_text(json.dumps(facts) + "\n", encoding="utf-8")

        def write() -> None:
            write_folder(self.best_folder, fill)
            self._best, self._best_step = score, step
            for name, content in (beside or {}).items():
                write_whole(self.run_dir / name, json.dumps(content, indent=2) + "\n")

        self._writer.submit(BEST, lambda: self._guarded(BEST, self.best_folder, write))
        return True

    def wait(self) -> None:
        """Until everything is written, or was found not to be possible."""
        self._writer.wait()

    def finish(self) -> None:
        """Wait until everything is written, on all ranks.

        Raises:
            OSError: the newest checkpoint or best model could not be written; the same on every rank.
        """
        errors = self._writer.close()
        said = "; ".join([*self.failures.values(), *(str(error) for error in errors)])
        everyone = "; ".join(filter(None, self.runtime.gather(said)))
        if errors:
            raise errors[0]
        if everyone:
            raise OSError(f"{everyone}; the checkpoints from before are whole, so that --resume goes on from there.")

    # -- within ----------------------------------------------------------------------------------------------------

    def _guarded(self, name: str, folder: Path, write: Callable[[], None]) -> None:
        """Write; what the disk refuses is told and remembered, and stops nothing."""
        try:
            write()
        except OSError as error:
            self.failures[name] = f"Could not write {folder}: {advice(error)}"
            log.error("%s; training goes on, and the next save tries again", self.failures[name])
        else:
            self.failures.pop(name, None)

    def _with_card(
        self, model: nn.Module, step: int, scores: Mapping[str, float] | None = None
    ) -> Callable[[Path], None]:
        """Writes a model with its card."""
        kind = next(name for name, cls in CONFIGS.items() if isinstance(self.config, cls))
        facts = RunFacts(kind, to_dict(self.config), step, self.samples, dict(scores or {}))

        def save_model(folder: Path) -> None:
            model.save_pretrained(folder)  # type: ignore[operator]  # every model of a loop has it
            write_card(folder, facts, self.run_dir / "results.json")

        return save_model

    def _better(self, score: float, step: int) -> bool:
        if self._best is None or step == self._best_step:  # done again after a kill, which may have come in between
            return math.isfinite(score)
        return score > self._best if self.mode == "max" else score < self._best

    def _best_on_disk(self) -> tuple[float | None, int]:
        """Score and step of the model in `<run>/best`; None and -1 where none is there that this metric chose."""
        path = self.best_folder / BEST_JSON
        facts = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if facts.get("metric") != self.metric:
            return None, -1
        return facts["score"], facts["step"]
