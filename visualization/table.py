"""The scores of a run as a table in Markdown, which reads well on a terminal too."""

from collections.abc import Sequence
from pathlib import Path

from .report import Evaluated, find_evaluations, shown_metrics


def results_markdown(run: str | Path) -> str:
    """Data sets and metrics as rows, models as columns, in percent with 95 % intervals; "" where nothing is evaluated.

    Args:
        run: run folder with `eval/*/results.json`, or one evaluation.
    """
    evaluations = find_evaluations(Path(run)) if Path(run).is_dir() else []
    if not evaluations:
        return ""
    rows = [["task", "data set", "metric (scorer)", "questions", *(entry.label for entry in evaluations)]]
    for dataset in dict.fromkeys(name for entry in evaluations for name in entry.results):
        first = next(entry.results[dataset] for entry in evaluations if dataset in entry.results)
        for metric in shown_metrics(first):
            cells = [_cell(entry, dataset, metric) for entry in evaluations]
            name = f"{metric} ({first['scorer']})"
            rows.append([first["task"].replace("_", " "), dataset, name, str(first["questions"]), *cells])
    return _align(rows, numbers_from=3)


def _cell(evaluated: Evaluated, dataset: str, metric: str) -> str:
    scores = evaluated.results.get(dataset)
    value = scores["metrics"].get(metric) if scores else None
    if scores is None or value is None:
        return "-"
    factor = 1.0 if scores["unit"] == "percent" else 100.0
    interval = scores["intervals"].get(metric)
    bounds = f" ({factor * interval[0]:.0f} to {factor * interval[1]:.0f})" if interval else ""
    return f"{factor * value:.1f}{bounds}"


def _align(rows: Sequence[Sequence[str]], numbers_from: int) -> str:
    """Rows as a Markdown table with padded columns; columns from `numbers_from` on are aligned to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if column >= numbers_from else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(f"| {' | '.join(cells)} |")
    rules = [
        "-" * (width + 1) + ":" if column >= numbers_from else "-" * (width + 2) for column, width in enumerate(widths)
    ]
    lines.insert(1, f"|{'|'.join(rules)}|")
    return "\n".join(lines)
