"""What every scorer returns, and the 95 % intervals of its metrics.

Intervals come from the percentile bootstrap over items. Each resample draws as many items as there are, and all
metrics are computed on the same resamples. A metric is therefore described as a function of sums over items: a mean,
a mean over a group, or a corpus value such as BLEU whose sufficient statistics add up. CIDEr is resampled as the mean
of its per-item values, which keep the n-gram rarities (idf) of the full sample.

Shapes: N items, S statistics an item, R resamples.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# metrics whose per-item values do not average to the corpus value
_NO_MEANS = ("BLEU", "METEOR")
_BOOTSTRAP_CHUNK = 1 << 20
# a recomputed value may differ this much from the reported one, as fractions
_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Aggregate:
    """A metric as a function of sums over items.

    `of_sums` turns sums [R, S] of `statistics_NS` into R values, as fractions; NaN where a sample has no value.
    """

    statistics_NS: np.ndarray
    of_sums: Callable[[np.ndarray], np.ndarray]

    def value(self) -> float:
        """The metric on the sample itself."""
        return float(self.of_sums(self.statistics_NS.sum(0, keepdims=True))[0])


@dataclass
class Scores:
    """One scorer's outcome; `per_item` values are fractions in the order of the items.

    `aggregates` says, by the names of `metrics`, how those that are not means over all items come from the items.
    """

    unit: str  # of `metrics`: "percent" or "fraction"
    items: int
    metrics: dict[str, float | None]
    per_item: dict[str, list[float]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    aggregates: dict[str, Aggregate] = field(default_factory=dict, compare=False)


def mean(values: Sequence[float]) -> float:
    """Mean of at least one value."""
    return float(np.mean(values))


def grouped_percent(per_item: dict[str, list[float]], groups: Sequence[str]) -> Scores:
    """Percent of each measure over all items (`EM`) and over each named group of them (`EM/what`)."""
    metrics: dict[str, float | None] = {name: 100 * mean(values) for name, values in per_item.items()}
    masks = {group: [other == group for other in groups] for group in sorted(set(groups) - {""})}
    counts = {group: sum(mask) for group, mask in masks.items()}
    for group, mask in masks.items():
        for name, values in per_item.items():
            metrics[f"{name}/{group}"] = 100 * mean(
                [value for value, inside in zip(values, mask, strict=True) if inside]
            )
    return Scores("percent", len(groups), metrics, per_item, counts, aggregates=group_means(per_item, masks))


def group_means(
    per_item: Mapping[str, Sequence[float]], masks: Mapping[str, Sequence[bool] | np.ndarray]
) -> dict[str, Aggregate]:
    """The mean of each measure over each group, named `measure/group`, for the intervals of grouped metrics."""
    return {
        f"{name}/{group}": _masked_mean(values, mask)
        for group, mask in masks.items()
        for name, values in per_item.items()
    }


def _masked_mean(values: Sequence[float], mask: Sequence[bool] | np.ndarray | None = None) -> Aggregate:
    """Mean over the items of a mask, or over all; NaN for a sample without any of them."""
    array = np.asarray(values, dtype=np.float64)
    inside = np.ones(len(array)) if mask is None else np.asarray(mask, dtype=np.float64)
    return Aggregate(np.stack([array * inside, inside], axis=1), _ratio)


def _ratio(sums_R2: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return sums_R2[:, 0] / sums_R2[:, 1]


def metric_intervals(scores: Scores, seed: int) -> tuple[dict[str, list[float]], list[str]]:
    """95 % intervals [low, high] of all metrics that have a value, in their unit, and notes on those without one.

    A metric gets an interval only if its description gives the reported value again on the sample itself. Groups
    without items have no interval.
    """
    factor = 100.0 if scores.unit == "percent" else 1.0
    means = {name: _masked_mean(v) for name, v in scores.per_item.items() if v and not name.startswith(_NO_MEANS)}
    aggregates = means | scores.aggregates
    chosen: dict[str, Aggregate] = {}
    missing: list[str] = []
    for name, metric in scores.metrics.items():
        if metric is None:
            continue
        value = aggregates[name].value() if name in aggregates else None
        if value is not None and math.isnan(value):
            continue
        if value is None or abs(value - metric / factor) > _TOLERANCE:
            missing.append(name)
        else:
            chosen[name] = aggregates[name]
    notes = [f"No interval is given for {', '.join(missing)}: it does not follow from values per item."]
    intervals = bootstrap_intervals(chosen, seed)
    scaled = {name: [factor * low, factor * high] for name, (low, high) in intervals.items()}
    return scaled, notes if missing else []


def bootstrap_intervals(
    aggregates: Mapping[str, Aggregate], seed: int, *, resamples: int = 1000
) -> dict[str, tuple[float, float]]:
    """95 % interval of each aggregate by the percentile bootstrap over items.

    Aggregates over equally many items share their resamples. Resamples in which a metric has no value are left out.
    """
    by_size: dict[int, list[str]] = {}
    for name, aggregate in aggregates.items():
        by_size.setdefault(len(aggregate.statistics_NS), []).append(name)
    intervals: dict[str, tuple[float, float]] = {}
    for names in by_size.values():
        tables = {id(aggregates[name].statistics_NS): aggregates[name].statistics_NS for name in names}
        sums_RS = _resampled_sums(np.concatenate(list(tables.values()), axis=1), seed, resamples)
        ends = np.cumsum([table.shape[1] for table in tables.values()])
        parts = dict(zip(tables, np.split(sums_RS, ends[:-1], axis=1), strict=True))
        for name in names:
            values_R = aggregates[name].of_sums(parts[id(aggregates[name].statistics_NS)])
            low, high = np.quantile(values_R[~np.isnan(values_R)], (0.025, 0.975))
            intervals[name] = (float(low), float(high))
    return {name: intervals[name] for name in aggregates}


def _resampled_sums(statistics_NS: np.ndarray, seed: int, resamples: int) -> np.ndarray:
    """Sums [R, S] over N items drawn with replacement."""
    num_items = len(statistics_NS)
    rng = np.random.default_rng(seed)
    sums_RS = np.empty((resamples, statistics_NS.shape[1]))
    step = max(1, _BOOTSTRAP_CHUNK // num_items)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        drawn = rng.integers(0, num_items, (rows, num_items)) + num_items * np.arange(rows)[:, None]
        times_drawn = np.bincount(drawn.ravel(), minlength=rows * num_items).reshape(rows, num_items)
        sums_RS[start : start + rows] = times_drawn.astype(np.float64) @ statistics_NS
    return sums_RS


def bootstrap_interval(values: Sequence[float], seed: int, *, resamples: int = 1000) -> tuple[float, float]:
    """95 % interval of the mean by the percentile bootstrap over items; one item gives a point."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError("A bootstrap interval needs a flat list of at least one value.")
    return bootstrap_intervals({"mean": _masked_mean(values)}, seed, resamples=resamples)["mean"]
