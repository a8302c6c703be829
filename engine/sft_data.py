"""What supervised fine-tuning trains on: rows with their targets, batch by batch, made while the GPU computes."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from ..datasets.prompts import build_target, training_mode
from ..datasets.scene import Sample
from ..models.inputs import Row
from ..models.observation import Observation
from ..models.scene_vlm import SceneVLM
from ..utils.streams import stream
from .ahead import Ahead
from .data import ObservationCache
from .runtime import Runtime, batch_positions

_NAME_STREAM = 14  # name of a random stream


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
    model: SceneVLM,
    samples: Sequence[Sample],
    observations: Sequence[Observation],
    *,
    pointers: str,
    naming: Callable[[int], np.random.Generator] | None = None,
) -> list[Taught]:
    """Rows with the targets that the samples teach.

    Args:
        observations: the samples' scenes, encoded.
        pointers: "name" teaches `<obj12>` for a box that a proposal covers; "box" always teaches numbers.
        naming: gives, by a sample's place, the generator that draws the names of its proposals, where the model has a
            pool of them; None: 0, 1, 2 …
    """
    model.expect(samples)
    rows = []
    for place, (sample, observation) in enumerate(zip(samples, observations, strict=True)):
        mode = training_mode(sample)
        target = build_target(sample, mode)
        names = None if naming is None else model.draw_names(observation, naming(place))
        if pointers == "name":
            target = model.with_names(target, observation, names)
        rows.append(Taught(sample, observation, *model.write_row(sample, observation, mode, target, names)))
    return rows


def name_streams(seed: int, batch_size: int, runtime: Runtime) -> Callable[[int, int], np.random.Generator]:
    """The generator that draws the names of a sample, by step and place in this rank's batch: ranks change nothing."""
    return lambda step, place: stream(seed, _NAME_STREAM, batch_positions(step, batch_size, runtime)[place])


class Batches(Ahead[list[Taught]]):
    """This rank's batches of a run: scenes read and encoded, views chosen, rows written.

    Where a GPU trains, the next batch is made meanwhile; not where a step moves what batches are made with.

    Args:
        choose: the samples of a step.
        num_steps: of the run.
        naming: as in `write_targets`, by step and place; None: proposals are called in order.
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
        naming: Callable[[int, int], np.random.Generator] | None = None,
        ahead: bool | None = None,
    ):
        self.model = model
        self.choose = choose
        self.observations = observations
        self.pointers = pointers
        self.naming = naming
        selector = model.view_selector
        moved = model.train_scene_encoder or (selector is not None and selector.learns)
        if ahead is None:
            ahead = model.device.type == "cuda" and not moved
        super().__init__(self._make, model.device, num_steps=num_steps, on=ahead)

    def _make(self, step: int) -> list[Taught]:
        """The batch of a step."""
        samples, model = self.choose(step), self.model
        if model.train_scene_encoder:
            seen = self.observations.resampled(samples, seed=step)
        else:
            seen = self.observations.of(samples)
        naming = None if self.naming is None else partial(self.naming, step)
        return write_targets(model, samples, seen, pointers=self.pointers, naming=naming)
