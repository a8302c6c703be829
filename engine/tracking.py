"""Progress bar, metrics.jsonl, speed.jsonl, starts.jsonl, always; other trackers behind the same small interface."""

import contextlib
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from ..utils.files import read_log, write_whole
from .background import advice
from .config import RunConfig
from .environment import describe_start
from .runtime import Runtime, log

SPEED = "speed.jsonl"
STARTS = "starts.jsonl"


class Sink(Protocol):
    """Anything that takes metrics."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorboardSink:
    """Scalars to `<run>/tensorboard`."""

    def __init__(self, run_dir: Path):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError("The tensorboard tracker needs the package: pip install tensorboard.") from None
        self.writer = SummaryWriter(str(run_dir / "tensorboard"))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


SINKS = {"tensorboard": TensorboardSink}


class Tracker:
    """Logs one run. Use as a context manager.

    Args:
        run_dir: folder of metrics.jsonl.
        title: name on the progress bar.
        total_steps: for the bar's ETA.
        first_step: step that the run (re)starts at; rows of metrics.jsonl from there on are dropped first, so that a
            resumed run leaves the same file as one that was not interrupted.
        sinks: names out of SINKS.
        device: what the run computes on, for starts.jsonl.
        enabled: False on ranks other than 0.
    """

    def __init__(
        self,
        run_dir: str | Path,
        title: str,
        total_steps: int,
        *,
        first_step: int = 0,
        sinks: Sequence[str] = (),
        device: str = "cpu",
        enabled: bool = True,
    ):
        self.path = Path(run_dir) / "metrics.jsonl"
        self.speed_path = Path(run_dir) / SPEED
        self.enabled = enabled
        self.started = time.perf_counter()
        self.sinks: list[Sink] = []
        if enabled:
            for name in sinks:
                if name not in SINKS:
                    raise ValueError(f"Unknown tracker {name!r}; known: {', '.join(SINKS)}.")
                self.sinks.append(SINKS[name](Path(run_dir)))
            self.path.parent.mkdir(parents=True, exist_ok=True)
            for path in (self.path, self.speed_path):
                if path == self.path or path.exists():
                    drop_steps_from(path, first_step)
            if first_step < total_steps:
                note_start(run_dir, device, step=first_step)
        self.bar = tqdm(
            total=total_steps, initial=first_step, desc=title, disable=not enabled, dynamic_ncols=True, mininterval=1.0
        )

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()
        for sink in self.sinks:
            sink.close()

    @property
    def seconds(self) -> float:
        """Since this tracker was made."""
        return time.perf_counter() - self.started

    def advance(self, **shown: float) -> None:
        """One step done; `shown` stands beside the bar."""
        if shown:
            self.bar.set_postfix({name: _short(value) for name, value in shown.items()}, refresh=False)
        self.bar.update(1)

    def log(self, step: int, metrics: Mapping[str, float], *, speed: Mapping[str, float] | None = None) -> None:
        """Append one row to metrics.jsonl. Non-finite values are written as null, which JSON has.

        Args:
            speed: what the machine's clock and memory say: a row of speed.jsonl, so that, `seconds` aside,
                metrics.jsonl has nothing that is not the same again when a run is repeated.
        """
        if not self.enabled:
            return
        for path, values in ((self.path, metrics), (self.speed_path, speed)):
            if values:
                row = {"step": step, "seconds": round(self.seconds, 3)}
                row |= {name: float(value) if math.isfinite(value) else None for name, value in values.items()}
                append_rows(path, [row])
        for sink in self.sinks:
            everything = {**metrics, **(speed or {})}
            sink.log(step, {name: value for name, value in everything.items() if math.isfinite(value)})


def track(run: RunConfig, title: str, runtime: Runtime, *, first_step: int) -> Tracker:
    """The tracker of a training run, which goes on at `first_step`."""
    return Tracker(
        run.dir,
        title,
        run.steps,
        first_step=first_step,
        sinks=run.trackers,
        device=str(runtime.device),
        enabled=runtime.is_main,
    )


def _short(value: float) -> str:
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.3g}"


def append_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Append JSON objects, one a line, all or none; where the disk takes none, say so and return False.

    Training is worth more than a row of its log.
    """
    begun = path.stat().st_size if path.exists() else 0
    try:
        with path.open("a", encoding="utf-8") as stream:
            stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    except OSError as error:
        with contextlib.suppress(OSError):  # half a row would make the file unreadable
            os.truncate(path, begun)
        log.warning("could not write to %s: %s; training goes on, these rows are left out", path, advice(error))
        return False
    return True


def note_start(run_dir: str | Path, device: str, **facts: Any) -> None:
    """Append to `<run_dir>/starts.jsonl` when, where, with what code and by what command this process was started."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    append_rows(Path(run_dir) / STARTS, [{**facts, **describe_start(device, processes)}])


def drop_steps_from(path: str | Path, first_step: int) -> None:
    """Drop the rows of steps that will be done again from a file of one JSON object a line, each with its `step`.

    Whole or not at all: a kill in between leaves the file as it was.
    """
    path = Path(path)
    kept = [row for row in read_metrics(path) if row["step"] < first_step]
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))


def read_metrics(path: str | Path) -> list[dict]:
    """Rows of a metrics.jsonl; a last line cut short by a kill is left out."""
    return read_log(path)
