"""What every scorer returns, and the interval of a mean."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

_BOOTSTRAP_CHUNK = 1 << 22


@dataclass
class Scores:
    """One scorer's outcome; `per_item` values are fractions in the order of the items."""

    unit: str  # of `metrics`: "percent" or "fraction"
    items: int
    metrics: dict[str, float | None]
    per_item: dict[str, list[float]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)


def mean(values: Sequence[float]) -> float:
    """Mean of at least one value."""
    return float(np.mean(values))


def grouped_percent(per_item: dict[str, list[float]], groups: Sequence[str]) -> Scores:
    """Percent of each measure over all items (`EM`) and over each named group of them (`EM/what`)."""
    metrics: dict[str, float | None] = {name: 100 * mean(values) for name, values in per_item.items()}
    counts: dict[str, int] = {}
    for group in sorted(set(groups) - {""}):
        chosen = [index for index, other in enumerate(groups) if other == group]
        counts[group] = len(chosen)
        for name, values in per_item.items():
            metrics[f"{name}/{group}"] = 100 * mean([values[index] for index in chosen])
    return Scores("percent", len(groups), metrics, per_item, counts)


def bootstrap_interval(values: Sequence[float], seed: int, *, resamples: int = 1000) -> tuple[float, float]:
    """95 % interval of the mean by the percentile bootstrap over items; one item gives a point."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError("A bootstrap interval needs a flat list of at least one value.")
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    step = max(1, _BOOTSTRAP_CHUNK // array.size)
    for start in range(0, resamples, step):
        stop = min(resamples, start + step)
        means[start:stop] = array[rng.integers(0, array.size, (stop - start, array.size))].mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)
