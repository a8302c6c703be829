"""Random streams named by integers, for everything that must repeat."""

import functools

import numpy as np


def stream(*keys: int) -> np.random.Generator:
    """A random stream named by integers, as (seed, step, row): the same keys give the same numbers.

    Streams instead of one long-lived generator make a resumed run equal to one that was not interrupted.
    """
    return np.random.default_rng(np.random.SeedSequence([int(key) & 0xFFFFFFFF for key in keys]))


@functools.lru_cache(maxsize=4)
def epoch_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """Permutation of the data set in one epoch; equal on every rank."""
    return stream(seed, 7, epoch).permutation(num_samples)
