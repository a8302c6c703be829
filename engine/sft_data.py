"""What supervised fine-tuning trains on: rows with their targets, batch by batch, made while the GPU computes."""

import itertools
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np

from ..datasets.prompts import build_target, training_mode
from ..datasets.scene import Sample
from ..datasets.tasks import inventory
from ..models.inputs import Row
from ..models.named_proposals import NamedProposals
from ..models.observation import Observation
from ..models.prompt_writer import PromptWriter
from ..models.scene_vlm import SceneVLM
from ..models.view_pixels import Grid
from ..models.view_pool import ViewPool
from ..utils.streams import stream
from ..utils.text import find_boxes
from ..utils.workers import start_pool
from .ahead import Ahead
from .data import ObservationCache
from .runtime import Runtime, batch_positions

Naming = Callable[[int], np.random.Generator]  # by a sample's place
BegunViews = list[tuple[Observation, Future[ViewPool]]]

_NAME_STREAM = 14  # name of a random stream
_KEPT_SCENES = 8192  # whose boxes a helper remembers


class Taught(NamedTuple):
    """A sample as a row that teaches its target."""

    sample: Sample
    observation: Observation
    row: Row
    views: list[int]


def num_tokens(taught: Sequence[Taught]) -> int:
    """Tokens of some rows."""
    return sum(len(entry.row.token_ids) for entry in taught)


class Unwritten(NamedTuple):
    """What a sample's words follow from, without a device: it may go to another process."""

    sample: Sample
    told: NamedProposals
    asked_7: list[float] | None  # the box that it asks about, model frame
    grids: list[Grid]  # patches of each of its views


class Written(NamedTuple):
    """A sample's row, what an inventory still lists, and which of the named proposals are shown (None: all)."""

    row: Row
    answer: str
    shown: list[int] | None


def write_targets(
    model: SceneVLM,
    samples: Sequence[Sample],
    observations: Sequence[Observation],
    *,
    pointers: str,
    naming: Naming | None = None,
    shown: "ShownPart | None" = None,
    helpers: "Helpers | None" = None,
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
        helpers: processes that write; None: this one.
    """
    model.expect(samples)
    views = [model.choose_views(*pair) for pair in zip(samples, observations, strict=True)]
    unwritten = [
        Unwritten(sample, encoded.told, model.asked_box(sample, seen), model.view_grids(seen, chosen))
        for sample, seen, encoded, chosen in zip(samples, observations, model.encode(observations), views, strict=True)
    ]
    if helpers is not None:
        written = helpers.write(unwritten, pointers, naming, shown)
    else:
        prompts, rngs = model.prompts, [None if naming is None else naming(place) for place in range(len(samples))]
        written = [write_target(prompts, *pair, pointers, shown) for pair in zip(unwritten, rngs, strict=True)]
    return [
        Taught(
            sample if its.answer == sample.answer else replace(sample, answer=its.answer),
            seen if its.shown is None else show_part(seen, its.shown),
            its.row,
            chosen,
        )
        for sample, seen, chosen, its in zip(samples, observations, views, written, strict=True)
    ]


def write_target(
    prompts: PromptWriter, its: Unwritten, rng: np.random.Generator | None, pointers: str, shown: "ShownPart | None"
) -> Written:
    """One sample of `write_targets`, in words."""
    sample, told, rows = its.sample, its.told, None
    if shown is not None and rng is not None and len(told):
        rows = shown_rows(sample, told, its.asked_7, shown, rng)
        told = told.showing(rows)
    if pointers == "name" and sample.dataset == inventory.NAME:
        sample = listing_named(sample, told)
    names = None if rng is None else prompts.draw_names(told, rng)
    mode = training_mode(sample)
    if pointers == "name":
        think = told.pointed(sample.think, names, only=True)
        target = told.pointed(build_target(replace(sample, think=think or sample.think), mode), names)
    else:
        target = build_target(sample, mode)
    row = prompts.write(sample, told, mode, target, names, asked_7=its.asked_7, grids=its.grids)
    return Written(row, sample.answer, rows)


class Helpers:
    """Processes that write the rows of batches, and make the candidate views of their scenes, on a CPU.

    Each writes about scenes of its own, whose boxes it covers once; views are made in turn.

    Args:
        prompts: the model's.
        workers: how many processes.
    """

    def __init__(self, prompts: PromptWriter, workers: int):
        self._pools = [start_pool(1, _adopt, prompts) for _ in range(workers)]
        self._turns = itertools.cycle(self._pools)

    def start(self) -> None:
        """Start the processes now: a pool starts its own with its first task, and that takes seconds."""
        for pool in self._pools:
            pool.submit(os.getpid)

    def begin_views(self, model: SceneVLM, observations: Sequence[Observation]) -> BegunViews:
        """Begin to make the candidate views of scenes that have none yet.

        Raises:
            ValueError: a process was killed, or did not start.
        """
        new = {id(seen): seen for seen in observations if seen.pool is None}.values()
        with _all_alive():
            return [(seen, next(self._turns).submit(model.pool_maker(seen), device="cpu")) for seen in new]

    @staticmethod
    def give_views(model: SceneVLM, begun: BegunViews) -> None:
        """Wait for views that were begun, and give them to their scenes.

        Raises:
            ValueError: a scene of which none can be made; a process was killed.
        """
        with _all_alive():
            for seen, under_way in begun:
                model.give_pool(seen, under_way.result())

    def write(
        self, unwritten: Sequence[Unwritten], pointers: str, naming: Naming | None, shown: "ShownPart | None"
    ) -> list[Written]:
        """The rows of a batch, as `write_target` writes them; `naming` is pickled.

        Raises:
            ValueError: a process was killed, or did not start.
        """
        parts: list[list[int]] = [[] for _ in self._pools]
        for place, its in enumerate(unwritten):
            parts[zlib.crc32(its.sample.scene_id.encode()) % len(parts)].append(place)
        written: dict[int, Written] = {}
        with _all_alive():
            under_way = [
                pool.submit(_write_part, [unwritten[place] for place in places], places, pointers, naming, shown)
                for pool, places in zip(self._pools, parts, strict=True)
            ]
            for places, future in zip(parts, under_way, strict=True):
                written.update(zip(places, future.result(), strict=True))
        return [written[place] for place in range(len(unwritten))]

    def close(self) -> None:
        """Stop the processes, all at the same time: to wait for one after the other takes a second each."""
        with ThreadPoolExecutor(len(self._pools)) as closing:
            list(closing.map(lambda pool: pool.shutdown(cancel_futures=True), self._pools))


@contextmanager
def _all_alive() -> Iterator[None]:
    """Say what a killed process means: ValueError, whether it is noticed when it is asked or when it should answer."""
    try:
        yield
    except BrokenProcessPool:
        raise ValueError(
            "A process that makes batches was killed (memory?) or did not start; lower data.workers."
        ) from None


_adopted: list[PromptWriter] = []  # in a helper: what it writes with


def _adopt(prompts: PromptWriter) -> None:
    _adopted[:] = [prompts]


@lru_cache(maxsize=_KEPT_SCENES)
def _kept(boxes: bytes) -> NamedProposals:
    """In a helper: the named proposals of a scene, with what is known of them."""
    return NamedProposals(np.frombuffer(boxes, dtype=np.float32).reshape(-1, 7).copy())


def _write_part(
    unwritten: list[Unwritten], places: list[int], pointers: str, naming: Naming | None, shown: "ShownPart | None"
) -> list[Written]:
    known = [its._replace(told=_kept(its.told.boxes_n7.tobytes())) for its in unwritten]
    rngs = [None if naming is None else naming(place) for place in places]
    return [write_target(_adopted[0], *pair, pointers, shown) for pair in zip(known, rngs, strict=True)]


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


def shown_rows(
    sample: Sample, told: NamedProposals, asked_7: list[float] | None, shown: ShownPart, rng: np.random.Generator
) -> list[int]:
    """Which named proposals a sample is shown, in order, drawn by `rng`.

    What the sample points at stays, of the objects that an inventory lists one; what it only speaks of may be missing.
    """
    asked, listed = find_boxes(sample.question), find_boxes(f"{sample.think} {sample.answer}")
    if asked_7 is not None:
        asked.append(asked_7)
    pointed, named = ({row for row in told.covering(boxes) if row is not None} for boxes in (asked, listed))
    pointed |= set(rng.permutation(sorted(named))[:1].tolist()) if sample.dataset == inventory.NAME else named
    others = [row for row in rng.permutation(len(told)).tolist() if row not in pointed]
    return sorted([*pointed, *others[: max(shown.draw(len(told), rng) - len(pointed), 0)]])


def show_part(observation: Observation, rows: Sequence[int]) -> Observation:
    """A scene of which these of its named proposals alone are shown. Views are chosen of the whole scene."""
    assert observation.encoded is not None
    return replace(observation, encoded=observation.encoded.showing(rows))


def listing_named(sample: Sample, told: NamedProposals) -> Sample:
    """An inventory without the objects that no proposal covers: nothing in the prompt tells of them.

    One of which nothing would be left stays as it is.
    """
    kept = [row is not None for row in told.covering(find_boxes(sample.answer))]
    if all(kept) or not any(kept):
        return sample
    return replace(sample, answer=inventory.leave_out(sample.answer, kept))


@dataclass(frozen=True)
class NameStreams:
    """The generator that draws the names of a sample, by step and place in this rank's batch: ranks change nothing."""

    seed: int
    batch_size: int
    runtime: Runtime

    def __call__(self, step: int, place: int) -> np.random.Generator:
        return stream(self.seed, _NAME_STREAM, batch_positions(step, self.batch_size, self.runtime)[place])


class _Begun(NamedTuple):
    """What a step's batch is made of, while its views are under way."""

    step: int
    samples: list[Sample]
    seen: list[Observation]  # encoded
    views: BegunViews


class Batches(Ahead[list[Taught]]):
    """This rank's batches of a run: scenes read and encoded, views chosen, rows written.

    Where a GPU trains, the next batch is made meanwhile; not where a step moves what batches are made with. Processes
    begin the views of a batch's scenes a batch before, so that they do not wait while views are chosen.

    Args:
        choose: the samples of a step.
        num_steps: of the run.
        naming: as in `write_targets`, by step and place; None: proposals are called in order.
        shown: as in `write_targets`, by step.
        workers: processes that write and make views; 0: this one.
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
        workers: int = 0,
        ahead: bool | None = None,
    ):
        self.model = model
        self.choose = choose
        self.observations = observations
        self.pointers = pointers
        self.naming = naming
        self.shown = shown
        self._helpers = Helpers(model.prompts, workers) if workers else None
        selector = model.view_selector
        # not for an encoder that trains: it would see the next scenes before it has learned from these
        self._view_makers = self._helpers if selector is not None and not model.train_scene_encoder else None
        self._next: _Begun | None = None
        moved = model.train_scene_encoder or (selector is not None and selector.learns)
        if ahead is None:
            ahead = model.device.type == "cuda" and not moved
        super().__init__(self._make, model.device, num_steps=num_steps, on=ahead)

    def _begin(self, step: int) -> _Begun:
        """Read and encode the scenes of a step, and let the processes begin their views."""
        samples = self.choose(step)
        if self.model.train_scene_encoder:
            return _Begun(step, samples, self.observations.resampled(samples, seed=step), [])
        seen = self.observations.of(samples)
        makers = self._view_makers
        return _Begun(step, samples, seen, makers.begin_views(self.model, seen) if makers is not None else [])

    def _make(self, step: int) -> list[Taught]:
        """The batch of a step; where processes make views, the next step's scenes are read with it."""
        begun, self._next = self._next, None
        its = begun if begun is not None and begun.step == step else self._begin(step)
        if self._view_makers is not None:
            self._view_makers.give_views(self.model, its.views)
            if step + 1 < self.num_steps:
                # before this step's views are chosen, or the processes would wait for that
                self._next = self._begin(step + 1)
        return write_targets(
            self.model,
            its.samples,
            its.seen,
            pointers=self.pointers,
            naming=None if self.naming is None else partial(self.naming, step),
            shown=self.shown(step) if self.shown else None,
            helpers=self._helpers,
        )

    def __enter__(self) -> "Batches":
        super().__enter__()
        if self._helpers is not None:
            self._helpers.start()
        return self

    def __exit__(self, *reason: object) -> None:
        super().__exit__(*reason)
        self._next = None
        if self._helpers is not None:
            self._helpers.close()
