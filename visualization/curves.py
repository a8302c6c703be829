"""Training curves as SVG, from metrics.jsonl."""

import fnmatch
import io
from collections.abc import Sequence

_STYLES = ("-", "--", ":")  # for more curves than there are colours


def read_curve(rows: Sequence[dict], name: str) -> tuple[list[float], list[float]]:
    """Steps and values of one metric; rows without it are left out."""
    found = [(float(row["step"]), float(row[name])) for row in rows if row.get(name) is not None]
    return [step for step, _ in found], [value for _, value in found]


def plot(rows: Sequence[dict], patterns: Sequence[str], title: str) -> str:
    """One SVG with the metrics of some rows that the patterns name (`loss/*`), in their order; "" without any.

    In the legend they stand without what all of a pattern's have in common.
    """
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    known = sorted({name for row in rows for name in row})
    names = {name: _label(name, pattern) for pattern in patterns for name in fnmatch.filter(known, pattern)}
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
