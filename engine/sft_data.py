"""What supervised fine-tuning trains on: rows with their targets, batch by batch, made while the GPU computes."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import NamedTuple

from ..datasets.prompts import build_target, training_mode
from ..datasets.scene import Sample
from ..models.inputs import Row
from ..models.observation import Observation
from ..models.scene_vlm import SceneVLM
from .data import ObservationCache
from .runtime import beside, wait_for_beside


class Taught(NamedTuple):
    """A sample as a row that teaches its target."""

    sample: Sample
    observation: Observation
    row: Row
    views: list[int]


def num_tokens(taught: Sequence[Taught]) -> int:
    """Tokens of some rows."""
    return sum(len(entry.row.token_ids) for entry in taught)


def write_targets(
    model: SceneVLM, samples: Sequence[Sample], observations: Sequence[Observation], *, pointers: str
) -> list[Taught]:
    """Rows with the targets that the samples teach.

    Args:
        observations: the samples' scenes, encoded.
        pointers: "name" teaches `<obj12>` for a box that a proposal covers; "box" always teaches numbers.
    """
    model.expect(samples)
    rows = []
    for sample, observation in zip(samples, observations, strict=True):
        mode = training_mode(sample)
        target = build_target(sample, mode)
        if pointers == "name":
            target = model.with_names(target, observation)
        rows.append(Taught(sample, observation, *model.write_row(sample, observation, mode, target)))
    return rows


class Batches:
    """This rank's batches of a run: scenes read and encoded, views chosen, rows written.

    Where a GPU trains, a thread makes the next batch meanwhile, on a stream of its own; not where a step moves what
    batches are made with. A context manager that stops it. The last batch given out must be kept until its step is
    done: the GPU reads it, and what is freed is used again at once.

    Args:
        choose: the samples of a step.
        num_steps: of the run.
        ahead: whether the thread is used; None decides.
    """

    def __init__(
        self,
        model: SceneVLM,
        choose: Callable[[int], list[Sample]],
        observations: ObservationCache,
        *,
        pointers: str,
        num_steps: int,
        ahead: bool | None = None,
    ):
        self.model = model
        self.choose = choose
        self.observations = observations
        self.pointers = pointers
        self.num_steps = num_steps
        selector = model.view_selector
        moved = model.train_scene_encoder or (selector is not None and selector.learns)
        if ahead is None:
            ahead = model.device.type == "cuda" and not moved
        self._thread = ThreadPoolExecutor(1) if ahead else None
        self._coming: tuple[int, Future[list[Taught]]] | None = None

    def make(self, step: int) -> list[Taught]:
        """The batch of a step, made here and now."""
        samples, model = self.choose(step), self.model
        if model.train_scene_encoder:
            seen = self.observations.resampled(samples, seed=step)
        else:
            seen = self.observations.of(samples)
        return write_targets(model, samples, seen, pointers=self.pointers)

    def _beside(self, step: int) -> list[Taught]:
        with beside(self.model.device):
            return self.make(step)

    def __getitem__(self, step: int) -> list[Taught]:
        """The batch of a step; steps are asked for in order."""
        if self._thread is None:
            return self.make(step)
        if self._coming is None or self._coming[0] != step:
            self._coming = step, self._thread.submit(self._beside, step)
        batch = self._coming[1].result()
        wait_for_beside(self.model.device)
        self._coming = None
        if step + 1 < self.num_steps:
            self._coming = step + 1, self._thread.submit(self._beside, step + 1)
        return batch

    def settle(self) -> None:
        """Wait until nothing is being made, so that the model may be used for something else."""
        if self._coming is not None:
            wait([self._coming[1]])

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
