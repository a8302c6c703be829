"""Batches of a training loop: what each is made of, read once a scene, made here or by worker processes.

A loop states for every step which samples it takes and from which random stream each is drawn (`Draw`); the loader
reads each scene of the batch once and calls the loop's own function for every sample. What comes out is a function of
the step alone: not of the steps before it, the number of workers, or which of them was faster. Workers are started
afresh (spawn: CUDA and threads do not survive a fork) and map the same prepared files, so that scenes are in memory
once.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from ..utils.streams import epoch_order, stream
from ..utils.workers import start_pool
from .scene import Scene
from .scene_store import SceneStore

T = TypeVar("T")
Make = Callable[[int, Scene, np.random.Generator], T]
_AHEAD = 2  # batches under way for each worker


class Draw(NamedTuple):
    """One sample of a batch: its row in the data set, and the name of its random stream (utils.streams)."""

    row: int
    keys: tuple[int, ...]


def epoch_draws(num_samples: int, batch_size: int, seed: int, step: int) -> list[Draw]:
    """The draws of one step: every epoch a new order of all samples, and streams named (seed, epoch, sample)."""
    draws = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, offset = divmod(position, num_samples)
        row = int(epoch_order(num_samples, seed, epoch)[offset])
        draws.append(Draw(row, (seed, epoch, row)))
    return draws


class Loader(Generic[T]):
    """Batches of one data set; a context manager that stops its workers.

    Args:
        scenes: the prepared scenes.
        scene_ids: the scene of each row of the data set.
        make: makes one sample of (row, scene, random stream). With workers, it and what it returns are pickled, so
            it is a function of a module or a method of an object that pickles.
        workers: processes; with 0 batches are made when they are asked for.
        collate: makes one thing of a batch's samples, where they are made; without it a batch is their list.
    """

    def __init__(
        self,
        scenes: SceneStore,
        scene_ids: Sequence[str],
        make: Make[T],
        *,
        workers: int = 0,
        collate: Callable[[list[T]], Any] = list,
    ):
        if workers < 0:
            raise ValueError(f"A loader has {workers} workers; give a number from 0 on.")
        self.scenes = scenes
        self.scene_ids = list(scene_ids)
        self.make = make
        self.workers = workers
        self.collate = collate
        self._pool: ProcessPoolExecutor | None = None

    def batch(self, draws: Sequence[Draw]) -> list[T]:
        """Samples of one batch in the order of its draws, made in this process."""
        by_scene: dict[str, list[int]] = {}
        for place, draw in enumerate(draws):
            by_scene.setdefault(self.scene_ids[draw.row], []).append(place)
        made: dict[int, T] = {}
        for scene_id, places in by_scene.items():
            scene = self.scenes[scene_id]
            for place in places:
                made[place] = self.make(draws[place].row, scene, stream(*draws[place].keys))
        return [made[place] for place in range(len(draws))]

    def batches(self, plan: Callable[[int], Sequence[Draw]], first: int, last: int) -> Iterator[Any]:
        """Collated batches of the steps from `first` up to `last` (left out), in order.

        Args:
            plan: the draws of a step, as `epoch_draws`.

        Raises:
            ValueError: what `make` raised, or a worker was killed.
        """
        if not self.workers:
            for step in range(first, last):
                yield self.collate(self.batch(plan(step)))
            return
        under_way: deque[Future[Any]] = deque()
        try:
            for step in range(first, last):
                under_way.append(self._started().submit(_make_batch, list(plan(step))))
                if len(under_way) > _AHEAD * self.workers:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        except BrokenProcessPool:
            raise ValueError("A loading process was killed (memory?) or did not start; take fewer workers.") from None
        finally:
            for future in under_way:
                future.cancel()

    def close(self) -> None:
        """Stop the workers; a later `batches` starts new ones."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def __enter__(self) -> "Loader[T]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pool": None}

    def _started(self) -> ProcessPoolExecutor:
        if self._pool is None:
            self._pool = start_pool(self.workers, adopt, self)
        return self._pool


_adopted: list[Loader] = []  # in a worker: the loader it works for


def adopt(loader: Loader) -> None:
    """In a worker: work for a loader."""
    _adopted[:] = [loader]


def _make_batch(draws: list[Draw]) -> Any:
    return _adopted[0].collate(_adopted[0].batch(draws))
