"""Training curves, from metrics.jsonl: as SVG, or several runs in one picture."""

import fnmatch
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Curve = tuple[list[float], list[float]]  # steps, values
_STYLES = ("-", "--", ":")  # for more curves than there are colours
_FEW = 10  # points, each of which gets a dot


@dataclass(frozen=True)
class Panel:
    """Axes of a picture: by label the curves of one kind, one of each run, which share a colour."""

    title: str
    curves: Mapping[str, Sequence[Curve]]
    unit: str = ""  # of the values


def draw_panels(panels: Sequence[Panel], path: str | Path) -> Path:
    """Panels side by side as a PNG: runs of one label in thin lines, and their mean in a thick one.

    A panel of the same labels as the one before has its colours, and no legend of its own.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(4.2 * len(panels), 2.8), layout="constrained", squeeze=False
    )
    explained: list[str] = []
    for axis, panel in zip(axes[0], panels, strict=True):
        for number, (label, runs) in enumerate(panel.curves.items()):
            color = f"C{number % 10}"
            for steps, values in runs if len(runs) > 1 else []:
                axis.plot(steps, values, color=color, linewidth=0.7, alpha=0.35)
            mean = mean_curve(runs)
            marker = "o" if len(mean[0]) <= _FEW else ""
            axis.plot(*mean, color=color, linewidth=1.6, label=label, marker=marker, markersize=3)
        axis.set_title(panel.title, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.set_ylabel(panel.unit, fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
        if len(panel.curves) > 1 and list(panel.curves) != explained:
            explained = list(panel.curves)
            axis.legend(fontsize=7)
    figure.savefig(path, format="png", dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return Path(path)


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """The mean of some curves at the steps that all of them have, in order."""
    values_of = [dict(zip(*curve, strict=True)) for curve in curves]
    shared = sorted(set.intersection(*(set(values) for values in values_of))) if values_of else []
    return shared, [sum(values[step] for values in values_of) / len(values_of) for step in shared]


def read_curve(rows: Sequence[Mapping[str, Any]], name: str) -> Curve:
    """Steps and values of one metric; rows without it are left out."""
    found = [(float(row["step"]), float(row[name])) for row in rows if row.get(name) is not None]
    return [step for step, _ in found], [value for _, value in found]


def matching(rows: Sequence[Mapping[str, Any]], pattern: str) -> list[str]:
    """Metrics of some rows that a pattern (`loss/*`) names, in alphabetical order."""
    return fnmatch.filter(sorted({name for row in rows for name in row}), pattern)


def plot(rows: Sequence[dict], patterns: Sequence[str], title: str) -> str:
    """One SVG with the metrics of some rows that the patterns name (`loss/*`), in their order; "" without any.

    In the legend they stand without what all of a pattern's have in common.
    """
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    names = {name: _label(name, pattern) for pattern in patterns for name in matching(rows, pattern)}
    curves = [(label, *read_curve(rows, name)) for name, label in names.items()]
    curves = [curve for curve in curves if curve[1]]
    if not curves:
        return ""
    figure, axes = pyplot.subplots(figsize=(4.2, 2.6), layout="constrained")
    for number, (label, steps, values) in enumerate(curves):
        marker, style = "." if len(steps) < 3 else "", _STYLES[number // 10 % len(_STYLES)]
        axes.plot(steps, values, label=label, linewidth=1.4, marker=marker, linestyle=style)
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("step", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)
    if len(curves) > 1:
        axes.legend(fontsize=7 if len(curves) < 6 else 5.5, ncols=1 if len(curves) < 6 else 2)
    stream = io.StringIO()
    figure.savefig(stream, format="svg")
    pyplot.close(figure)
    return stream.getvalue()[stream.getvalue().index("<svg") :]


def _label(name: str, pattern: str) -> str:
    """A metric's name without what its pattern says already."""
    before, star, _ = pattern.partition("*")
    label = name.removeprefix(before) if star else name
    return label.removesuffix("/mean").replace("_", " ")
