"""Means of several training runs that differ by their seed alone, with intervals that know of both kinds of chance:
which questions were asked, and which seed was drawn.

The bootstrap is crossed: all runs answer the same questions, so a resample draws runs and questions, and takes the
mean over all pairs. Questions about one scene are not independent; told of scenes, it draws these, each with all of
its questions (Field and Welsh 2007, Bootstrapping clustered data).

The variance of means of S runs drawn out of S is (S - 1) / S of that of means of S new runs, so what comes of the runs
is widened by the root of S / (S - 1), and by Student's t of S - 1 degrees of freedom over the normal quantile, since S
runs say little of how much runs differ; what comes of C scenes likewise. One run has an interval of its questions
alone, and of one scene the questions are drawn.

Shapes: S runs, Q questions, C clusters of questions, R resamples.
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


def over_seeds(
    values_SQ: Sequence[Sequence[float]],
    clusters_Q: Sequence[int] | None = None,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Estimate:
    """Mean and 95 % interval of what runs score, each on the same questions in the same order.

    Args:
        clusters_Q: what is drawn with all its questions: the number of each question's scene. Without it questions are
            drawn one by one, as they are where all are about one scene.

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
    if clusters_Q is None:
        clusters_Q = range(questions)
    if len(clusters_Q) != questions:
        raise ValueError(f"{len(clusters_Q)} questions have a scene, {questions} have a score; give one for each.")
    numbers_Q = np.unique(np.asarray(clusters_Q), return_inverse=True)[1]
    if numbers_Q.max() == 0:
        numbers_Q = np.arange(questions)
    counts_C = np.bincount(numbers_Q)
    sums_CS = np.stack([np.bincount(numbers_Q, weights=row_Q) for row_Q in array_SQ], 1)
    rng = np.random.default_rng(seed)
    times_RC = rng.multinomial(len(counts_C), np.full(len(counts_C), 1 / len(counts_C)), size=resamples)
    share_RS = rng.multinomial(runs, np.full(runs, 1 / runs), size=resamples) / runs
    means_RS = (times_RC @ sums_CS) / (times_RC @ counts_C)[:, None]
    mean, centre_R = array_SQ.mean(), means_RS.mean(1)
    means_R = mean + _widening(len(counts_C)) * (centre_R - mean)
    if runs > 1:
        means_R += _widening(runs) * ((share_RS * means_RS).sum(1) - centre_R)
    low, high = np.quantile(means_R, (0.025, 0.975))
    return Estimate(float(mean), float(low), float(high), runs, questions)


def _widening(number: int) -> float:
    """By what a deviation of means of resamples is multiplied when so few were drawn; 1 for a single one."""
    if number == 1:
        return 1.0
    return float(np.sqrt(number / (number - 1)) * t.ppf(0.975, number - 1) / norm.ppf(0.975))


def difference_over_seeds(
    ours_SQ: Sequence[Sequence[float]],
    others_SQ: Sequence[Sequence[float]],
    clusters_Q: Sequence[int] | None = None,
    *,
    seed: int = 0,
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
        clusters_Q,
        seed=seed,
    )
