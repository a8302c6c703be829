"""In which order samples are trained on: data sets with weights, as a function of seed and position alone.

An epoch has each sample of a data set as often as its weight says: of weight 2.5 twice, and half of them once more.
Which ones is walked through in a random order that goes on from epoch to epoch and begins anew when all have had
their turn, so that no sample is ever two further turns ahead of another of its data set.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np

from ..utils.streams import epoch_order, stream
from .runtime import Runtime, batch_positions

_EXTRA_STREAM = 12  # name of a random stream


class Mixture:
    """The order of samples in a run.

    Args:
        datasets: the data set of each sample.
        weights: turns of each sample of a data set in an epoch; 1 for a data set left out, 0 leaves one out.

    Raises:
        ValueError: the weights leave no sample.
    """

    def __init__(self, datasets: Sequence[str], weights: Mapping[str, float], seed: int):
        self.seed = seed
        rows: dict[str, list[int]] = {}
        for row, name in enumerate(datasets):
            rows.setdefault(name, []).append(row)
        whole = {name: int(weights.get(name, 1.0)) for name in rows}
        # in the samples' own order, so that without weights an epoch is the samples
        always = [row for row, name in enumerate(datasets) for _ in range(whole[name])]
        self._always = np.asarray(always, dtype=np.int64)
        self._extra = [
            (number, np.asarray(its), round((weights.get(name, 1.0) - whole[name]) * len(its)))
            for number, (name, its) in enumerate(rows.items())
        ]
        self.length = len(always) + sum(count for _, _, count in self._extra)
        if not self.length:
            raise ValueError("data.weights leaves no sample to train on; give one data set a larger weight.")
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    def epoch(self, number: int) -> np.ndarray:
        """Samples of one epoch, in order; equal on every rank."""
        return self._epoch(number)

    def rows(self, step: int, batch_size: int, runtime: Runtime) -> list[int]:
        """Samples that this rank takes at one step; `batch_size` is that of all ranks together."""
        found = []
        for position in batch_positions(step, batch_size, runtime):
            number, offset = divmod(position, self.length)
            found.append(int(self.epoch(number)[offset]))
        return found

    def _make_epoch(self, number: int) -> np.ndarray:
        parts = [self._always]
        for name, rows, count in self._extra:
            turns = np.arange(number * count, (number + 1) * count)
            for lap in range(number * count // len(rows), -(-(number + 1) * count // len(rows))):
                order = stream(self.seed, _EXTRA_STREAM, name, lap).permutation(len(rows))
                parts.append(rows[order[turns[turns // len(rows) == lap] % len(rows)]])
        return np.concatenate(parts)[epoch_order(self.length, self.seed, number)]
