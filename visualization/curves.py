"""Training curves as SVG, from metrics.jsonl."""

import io
import json
from collections.abc import Sequence
from pathlib import Path


def read_curve(path: Path, name: str) -> tuple[list[float], list[float]]:
    """Steps and values of one metric; rows without it are left out."""
    steps, values = [], []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row.get(name) is not None:
            steps.append(float(row["step"]))
            values.append(float(row[name]))
    return steps, values


def plot(path: Path, names: Sequence[str], title: str) -> str:
    """One SVG with the named metrics that the file has; "" where it has none."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    curves = [(name, *read_curve(path, name)) for name in names]
    curves = [curve for curve in curves if curve[1]]
    if not curves:
        return ""
    figure, axes = pyplot.subplots(figsize=(4.2, 2.6), layout="constrained")
    for name, steps, values in curves:
        axes.plot(steps, values, label=name.removesuffix("/mean"), linewidth=1.4, marker="." if len(steps) < 3 else "")
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("step", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)
    if len(curves) > 1:
        axes.legend(fontsize=7)
    stream = io.StringIO()
    figure.savefig(stream, format="svg")
    pyplot.close(figure)
    return stream.getvalue()[stream.getvalue().index("<svg") :]
