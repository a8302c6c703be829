"""What GRPO sampled: groups of completions side by side, with what each earned and how it compares."""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..utils.files import read_log

COMPLETIONS = "completions.jsonl"
_GROUPS = 2  # shown of a step


def completions_section(run: Path) -> str:
    """Tables of the first groups of a run's first and last logged steps, the best completion first; "" without any."""
    rows = [row for row in read_log(run / COMPLETIONS) if "group" in row]
    if not rows:
        return ""
    first, last = rows[0]["step"], rows[-1]["step"]
    tables = "".join(_group(group) for step in dict.fromkeys((first, last)) for group in _groups(rows, step)[:_GROUPS])
    note = (
        "The first groups of the first and the last logged step, not chosen by what they earn. Advantage: the reward "
        "relative to the group."
    )
    return f"<h2>Sampled completions</h2><p class='note'>{note}</p>{tables}"


def _groups(rows: Sequence[dict[str, Any]], step: int) -> list[list[dict[str, Any]]]:
    """A step's rows, one list for each group."""
    groups: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        if row["step"] == step:
            groups.setdefault(row["group"], []).append(row)
    return list(groups.values())


def _group(rows: Sequence[dict[str, Any]]) -> str:
    names = list(rows[0]["rewards"])
    head = "".join(f"<th>{html.escape(name.rpartition(':')[2])}</th>" for name in names)
    ordered = sorted(rows, key=lambda row: -(row["reward"] if row["reward"] is not None else float("-inf")))
    body = "".join(
        f"<tr><td>{_number(row['reward'])}</td><td>{_number(row['advantage'])}</td>"
        + "".join(f"<td>{_number(row['rewards'][name])}</td>" for name in names)
        + f"<td class='text'>{html.escape(row['text'])}</td></tr>"
        for row in ordered
    )
    return (
        f"<p><span class='tag'>step {rows[0]['step']}</span> {html.escape(rows[0]['sample_id'])}<br>"
        f"<b>{html.escape(rows[0]['question'])}</b></p>"
        f"<table class='completions'><tr><th>reward</th><th>advantage</th>{head}<th>completion</th></tr>{body}</table>"
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
