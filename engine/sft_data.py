"""What supervised fine-tuning trains on: rows with their targets, batch by batch, made while the GPU computes."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np

from ..datasets.prompts import build_target, training_mode
from ..datasets.scene import Sample
from ..datasets.tasks import inventory
from ..models.inputs import Row
from ..models.observation import Observation
from ..models.scene_vlm import SceneVLM
from ..utils.streams import stream
from ..utils.text import find_boxes
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
    shown: "ShownPart | None" = None,
) -> list[Taught]:
    """Rows with the targets that the samples teach.

    By name, an inventory teaches what proposals cover, and a thought points at nothing else: a box in numbers costs it
    some forty tokens, of which nothing follows.

    Args:
        observations: the samples' scenes, encoded.
        pointers: "name" teaches `<obj12>` for a box that a proposal covers; "box" always teaches numbers.
        naming: gives, by a sample's place, the generator that draws the names of its proposals, where the model has a
            pool of them; None: 0, 1, 2 …
        shown: how many proposals a sample is shown, drawn by the same generator; None: all.
    """
    model.expect(samples)
    rows = []
    for place, (sample, observation) in enumerate(zip(samples, observations, strict=True)):
        mode, rng = training_mode(sample), None if naming is None else naming(place)
        if shown is not None and rng is not None:
            observation = show_part(model, sample, observation, shown, rng)
        if pointers == "name" and sample.dataset == inventory.NAME:
            sample = listing_named(model, sample, observation)
        names = None if rng is None else model.draw_names(observation, rng)
        if pointers == "name":
            think = model.with_names(sample.think, observation, names, only=True)
            told = replace(sample, think=think or sample.think)
            target = model.with_names(build_target(told, mode), observation, names)
        else:
            target = build_target(sample, mode)
        rows.append(Taught(sample, observation, *model.write_row(sample, observation, mode, target, names)))
    return rows


class ShownPart(NamedTuple):
    """How many of its proposals a sample is shown, a number drawn anew each time.

    To tell few things apart is learned sooner than to tell fifty, and what was learned of few holds for more.
    """

    fewest: int
    most: float  # of those above `fewest` the share that may be shown besides

    @classmethod
    def at(cls, step: int, fewest: int, until: int) -> "ShownPart | None":
        """At a step of a run: as many as all from step `until` on, before it ever more; None where `fewest` is 0."""
        return cls(fewest, min(1.0, step / until) if until else 1.0) if fewest else None

    def draw(self, count: int, rng: np.random.Generator) -> int:
        """How many of `count`."""
        fewest = min(self.fewest, count)
        return int(rng.integers(fewest, fewest + round(self.most * (count - fewest)) + 1))


def show_part(
    model: SceneVLM, sample: Sample, observation: Observation, shown: ShownPart, rng: np.random.Generator
) -> Observation:
    """A scene as a sample is shown it, with a part of its proposals drawn by `rng`.

    What the sample points at stays, of the objects that an inventory lists one; what it only speaks of may be missing.
    """
    (encoded,) = model.encode([observation])
    count = len(encoded.named)
    if not count:
        return observation
    model.choose_views(sample, observation)  # of the whole scene, where they are kept
    asked, listed = _boxes_of(sample, observation)
    pointed, named = ({row for row in encoded.covering(boxes) if row is not None} for boxes in (asked, listed))
    pointed |= set(rng.permutation(sorted(named))[:1].tolist()) if sample.dataset == inventory.NAME else named
    others = [row for row in rng.permutation(count).tolist() if row not in pointed]
    rows = sorted([*pointed, *others[: max(shown.draw(count, rng) - len(pointed), 0)]])
    return replace(observation, encoded=encoded.showing(rows))


def _boxes_of(sample: Sample, observation: Observation) -> tuple[list[list[float]], list[list[float]]]:
    """What a sample's question points at, and its thought and answer, model frame."""
    asked, listed = find_boxes(sample.question), find_boxes(f"{sample.think} {sample.answer}")
    if sample.query_box_7 is not None:
        asked.append(observation.scene.to_model(sample.query_box_7).tolist())
    return asked, listed


def listing_named(model: SceneVLM, sample: Sample, observation: Observation) -> Sample:
    """An inventory without the objects that no proposal covers: nothing in the prompt tells of them.

    One of which nothing would be left stays as it is.
    """
    (encoded,) = model.encode([observation])
    kept = [row is not None for row in encoded.covering(find_boxes(sample.answer))]
    if all(kept) or not any(kept):
        return sample
    return replace(sample, answer=inventory.leave_out(sample.answer, kept))


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
        shown: as in `write_targets`, by step.
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
        shown: Callable[[int], ShownPart | None] | None = None,
        ahead: bool | None = None,
    ):
        self.model = model
        self.choose = choose
        self.observations = observations
        self.pointers = pointers
        self.naming = naming
        self.shown = shown
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
        return write_targets(
            model, samples, seen, pointers=self.pointers, naming=naming, shown=self.shown(step) if self.shown else None
        )
