"""Means of several training runs that differ by their seed alone, with intervals that know of both kinds of chance:
which questions were asked, and which seed was drawn.

The bootstrap is crossed: all runs answer the same questions, so a resample draws runs and questions, and takes the
mean over all pairs. The variance of means of S runs drawn out of S is (S - 1) / S of that of means of S new runs, so
what comes of the runs is widened by the root of S / (S - 1), and by Student's t of S - 1 degrees of freedom over the
normal quantile, since S runs say little of how much runs differ. One run has an interval of its questions alone.

Shapes: S runs, Q questions, R resamples.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm, t

RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A mean over runs and questions with its 95 % interval."""

    mean: float
    low: float
    high: float
    runs: int
    questions: int

    def scaled(self, factor: float) -> "Estimate":
        """The same in another unit."""
        return Estimate(factor * self.mean, factor * self.low, factor * self.high, self.runs, self.questions)

    @property
    def certain(self) -> bool:
        """Whether 0 lies outside the interval."""
        return self.low > 0 or self.high < 0


def over_seeds(values_SQ: Sequence[Sequence[float]], *, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """Mean and 95 % interval of what runs score, each on the same questions in the same order.

    Raises:
        ValueError: no run, no question, or runs of unequal lengths.
    """
    lengths = sorted({len(row) for row in values_SQ})
    if not values_SQ or lengths[0] == 0:
        raise ValueError("There is nothing to take a mean of: give at least one run with at least one question.")
    if len(lengths) > 1:
        raise ValueError(f"The runs answer {lengths[0]} and {lengths[-1]} questions; compare runs on the same ones.")
    array_SQ = np.asarray(values_SQ, dtype=np.float64)
    runs, questions = array_SQ.shape
    rng = np.random.default_rng(seed)
    times_RQ = rng.multinomial(questions, np.full(questions, 1 / questions), size=resamples) / questions
    share_RS = rng.multinomial(runs, np.full(runs, 1 / runs), size=resamples) / runs
    means_RS = times_RQ @ array_SQ.T
    centre_R = means_RS.mean(1)
    widened = np.sqrt(runs / (runs - 1)) * t.ppf(0.975, runs - 1) / norm.ppf(0.975) if runs > 1 else 0.0
    means_R = centre_R + widened * ((share_RS * means_RS).sum(1) - centre_R)
    low, high = np.quantile(means_R, (0.025, 0.975))
    return Estimate(float(array_SQ.mean()), float(low), float(high), runs, questions)


def difference_over_seeds(
    ours_SQ: Sequence[Sequence[float]], others_SQ: Sequence[Sequence[float]], *, seed: int = 0
) -> Estimate:
    """Ours minus the others', run by run and question by question: run s of both has the same seed.

    Raises:
        ValueError: as `over_seeds`, or not as many runs or questions on both sides.
    """
    shapes = [(len(rows), sorted({len(row) for row in rows})) for rows in (ours_SQ, others_SQ)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            "The two sides have other numbers of runs or questions; compare the same seeds and questions."
        )
    return over_seeds(
        [
            [ours - other for ours, other in zip(first, second, strict=True)]
            for first, second in zip(ours_SQ, others_SQ, strict=True)
        ],
        seed=seed,
    )
