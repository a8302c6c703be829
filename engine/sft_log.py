"""What a supervised run tells of itself: loss by task, tokens a second, use of the hardware, evaluations."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from ..models.inputs import to_device
from ..models.scene_vlm import SceneVLM
from .config import RunConfig
from .runtime import Runtime
from .sft_data import Taught
from .throughput import Meter, training_flops
from .tracking import track


class TaskSums:
    """Losses of taught tokens summed by task on the device, and their numbers, which the host knows."""

    def __init__(self, tasks: Sequence[str], device: torch.device):
        self.place = {task: place for place, task in enumerate(tasks)}
        self.sums = torch.zeros(len(tasks), dtype=torch.float64, device=device)
        self.counts = [0] * len(tasks)

    def add(self, taught: Sequence[Taught], losses_T: torch.Tensor) -> None:
        """Add a pack's losses: those of its rows one after the other. A GPU is not waited for."""
        counts = [entry.row.num_taught for entry in taught]
        places = [self.place[entry.sample.task] for entry in taught]
        for place, count in zip(places, counts, strict=True):
            self.counts[place] += count
        place_T = torch.repeat_interleave(torch.tensor(places), torch.tensor(counts))
        self.sums.index_add_(0, to_device(place_T, self.sums.device), losses_T.detach().double())

    def over_ranks(self, runtime: Runtime) -> tuple[list[float], list[float]]:
        """Sums and numbers of all ranks, by place; this waits for the device."""
        totals = runtime.total(*self.sums.tolist(), *self.counts)
        return totals[: len(self.counts)], totals[len(self.counts) :]


class TaskMeans:
    """Mean loss of each task over the steps since a row was logged; what a resumed run needs of it fits in JSON."""

    def __init__(self, tasks: Sequence[str], state: Mapping[str, Sequence[float]] | None = None):
        found = state or {}
        self.totals = {task: [*found.get(task, (0.0, 0.0))] for task in tasks}

    def add(self, sums: Sequence[float], counts: Sequence[float]) -> None:
        """Add what `TaskSums.over_ranks` gave; a task whose loss is not finite is left out, as its step is skipped."""
        for total, value, count in zip(self.totals.values(), sums, counts, strict=True):
            if math.isfinite(value):
                total[0] += value
                total[1] += count

    def state(self) -> dict[str, list[float]]:
        return {task: [*total] for task, total in self.totals.items()}

    def read(self) -> dict[str, float]:
        """`loss/<task>` of the tasks that there were; begins anew."""
        means = {f"loss/{task}": value / count for task, (value, count) in self.totals.items() if count}
        self.totals = {task: [0.0, 0.0] for task in self.totals}
        return means


class SftLog:
    """The log of one supervised run. Use as a context manager.

    Args:
        tasks: of the training samples, in any order that is the same on every rank.
        since: what `state` was at the step that the run goes on from.
    """

    def __init__(
        self,
        run: RunConfig,
        model: SceneVLM,
        tasks: Sequence[str],
        runtime: Runtime,
        *,
        first_step: int,
        since: Mapping[str, Sequence[float]] | None = None,
    ):
        self.run = run
        self.tasks = list(tasks)
        self.runtime = runtime
        self.means = TaskMeans(self.tasks, since)
        self.meter = Meter(training_flops(model), runtime)
        self.tracker = track(run, "sft", runtime, first_step=first_step)

    def __enter__(self) -> "SftLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.tracker.__exit__()

    def new_sums(self) -> TaskSums:
        """For the losses of one step."""
        return TaskSums(self.tasks, self.runtime.device)

    def step(self, step: int, metrics: Mapping[str, float], sums: TaskSums) -> None:
        """One step done.

        Args:
            metrics: of all ranks together; `sequence_tokens` among them.
            sums: this rank's.
        """
        self.means.add(*sums.over_ranks(self.runtime))
        self.meter.add(metrics["sequence_tokens"])
        self.tracker.advance(loss=metrics["loss"], lr=metrics["lr"], **{"tok/s": self.meter.rate})
        if self.run.due(step, self.run.log_every):
            self.tracker.log(step, {**metrics, **self.means.read()}, speed=self.meter.read())

    @contextmanager
    def aside(self) -> Iterator[None]:
        """For what is no training: its time does not count in tokens a second."""
        with self.meter.paused():
            yield
