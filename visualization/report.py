"""report.html: one file with scores, curves, the chosen views, boxes drawn in the scene, thoughts and answers."""

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..datasets.scene import Scene, load_scene
from ..utils.files import read_log, write_whole
from ..utils.predictions import Prediction, read_predictions
from .completions import completions_section
from .curves import plot
from .palette import ANSWERED, ASKED, TRUE
from .pictures import data_url, scene_picture
from .shown_scene import check_frame

# Columns in the order of the pipeline; others follow in alphabetical order.
_COLUMN_ORDER = ("most-frequent", "untrained", "sft", "grpo")
# The metrics that the table shows of each scorer, where it gives them.
# EM-R is left out: by its official definition an empty answer is a hit.
_SHOWN = ("EM", "EM@1", "Acc@0.25", "Acc@0.5", "mIoU", "CIDEr@0.25", "CIDEr@0.5", "CIDEr", "ROUGE-L")
_MAX_SHOWN = 2
METRICS, SPEED = "metrics.jsonl", "speed.jsonl"
_HELD_OUT = tuple(f"eval/*/{name}" for name in ("EM", "EM@1", "Acc@0.25", "CIDEr"))
_CURVES = (
    ("detect", ("loss",), "Scene encoder: loss"),
    ("detect", ("map25", "map50"), "Scene encoder: held-out mAP"),
    ("sft", ("loss",), "SFT: cross-entropy per token"),
    ("sft", ("loss/*",), "SFT: cross-entropy by task"),
    ("sft", ("eval/loss", "eval/loss/*"), "SFT: held-out cross-entropy"),
    ("sft", _HELD_OUT, "SFT: held-out scores, percent"),
    ("sft", ("lr",), "SFT: learning rate"),
    ("sft", ("grad_norm",), "SFT: gradient norm before clipping"),
    ("sft", ("tokens_per_s",), "SFT: tokens a second"),
    ("sft", ("mfu",), "SFT: share of the hardware's peak"),
    ("grpo", ("reward",), "GRPO: reward"),
    ("grpo", ("rewards/*/mean",), "GRPO: each reward"),
    ("grpo", ("eval/reward", "eval/rewards/*"), "GRPO: rewards of held-out answers"),
    (
        "grpo",
        tuple(f"eval/*/{name}" for name in ("EM", "EM@1", "Acc@0.25", "CIDEr")),
        "GRPO: held-out scores, percent",
    ),
    ("grpo", ("frac_reward_zero_std",), "GRPO: share of groups with equal rewards"),
    ("grpo", ("kl",), "GRPO: KL to the SFT policy"),
    ("grpo", ("entropy",), "GRPO: entropy of a token, nats"),
    ("grpo", ("clip/region", "clip/low", "clip/high"), "GRPO: share of tokens that are clipped"),
    ("grpo", ("mismatch/mean",), "GRPO: sampler against trainer, nats a token"),
    ("grpo", ("length/mean", "length/max"), "GRPO: tokens per completion"),
    ("grpo", ("length/cut",), "GRPO: share of completions that the limit cut"),
    ("grpo", ("seconds/*",), "GRPO: seconds of each phase"),
    ("grpo", ("decode_tokens_per_s",), "GRPO: tokens a second while sampling"),
)
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1f2937;max-width:1180px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.7rem}h2{margin-top:2.4rem;border-bottom:1px solid #e5e7eb;padding-bottom:.3rem}
table{border-collapse:collapse;font-size:.92rem}
td,th{padding:.3rem .7rem;border-bottom:1px solid #e5e7eb;text-align:right}
td:first-child,th:first-child,td:nth-child(2),th:nth-child(2){text-align:left}
.interval{color:#6b7280;font-size:.8rem}.curves{display:flex;flex-wrap:wrap;gap:.6rem}
.example{display:grid;grid-template-columns:minmax(280px,420px) 1fr;gap:1rem;margin:1.2rem 0;padding:1rem;
border:1px solid #e5e7eb;border-radius:8px}.example img.scene{width:100%}.views img{height:112px;margin:.2rem}
.think{color:#6b7280}.answer{font-weight:600}.tag{background:#eef2ff;border-radius:4px;padding:0 .4rem;font-size:.8rem}
.key span{display:inline-block;width:1.6em;height:.35em;margin:0 .3em 0 1em;vertical-align:middle}
.completions td.text{text-align:left;white-space:pre-wrap;overflow-wrap:anywhere}
.note{color:#6b7280;font-size:.88rem}code{background:#f3f4f6;padding:0 .25em}
"""


@dataclass
class Evaluated:
    """One evaluated model: its column in the table and its predictions."""

    label: str
    folder: Path
    results: dict[str, dict]


def find_evaluations(path: Path) -> list[Evaluated]:
    """Evaluations under a run folder, or the one that a folder is."""
    files = [path / "results.json"] if (path / "results.json").exists() else sorted(path.glob("eval/*/results.json"))
    found = []
    for file in files:
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            found.append(Evaluated(content["label"], file.parent, content["results"]))
        except (json.JSONDecodeError, KeyError, TypeError):
            raise ValueError(f"{file} is not what `eval` writes; evaluate that model again.") from None
    rank = {label: index for index, label in enumerate(_COLUMN_ORDER)}
    return sorted(found, key=lambda entry: (rank.get(entry.label, len(rank)), entry.label))


def write_report(
    source: str | Path,
    out: str | Path,
    *,
    data_root: str | Path = "data/rooms",
    limit: int | None = None,
    sections: Sequence[str] = (),
    scene: Scene | None = None,
) -> Path:
    """Write the report of a run folder (with `eval/*`), of a training run, of one evaluation, or of a prediction file.

    Args:
        source: run folder, evaluation folder or predictions.jsonl.
        out: the HTML file.
        data_root: where `prepared/` lies, for the pictures.
        limit: examples of each task; default 2.
        sections: HTML to put at the end, such as contact sheets of views.
        scene: what the pictures of answers about it show, whether it is prepared or not.

    Raises:
        ValueError: there is nothing to report on, or the answers are in another frame of a scene.
    """
    source, out = Path(source), Path(out)
    evaluations = find_evaluations(source) if source.is_dir() else []
    file = source / "predictions.jsonl" if source.is_dir() else source
    if evaluations:
        file = evaluations[-1].folder / "predictions.jsonl"
    curves = curves_section(source) if source.is_dir() else ""
    if not file.exists() and not curves:
        raise ValueError(
            f"There is nothing to report on under {source}: no results.json, predictions.jsonl or metrics.jsonl."
        )
    examples = ""
    if file.exists():
        examples = examples_section(read_predictions(file), file.parent, Path(data_root), limit or 2, scene)
    parts = [results_table(evaluations) if evaluations else "", curves, examples, *sections]
    return write_page(out, "3D-R1 report", str(source), parts)


def write_page(out: str | Path, title: str, note: str, parts: Sequence[str]) -> Path:
    """Write sections of HTML as one page."""
    out = Path(out)
    page = [
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{html.escape(title)}</title>",
        f"<style>{_STYLE}</style></head><body><h1>{html.escape(title)}</h1><p class='note'>{html.escape(note)}</p>",
        *parts,
        "</body></html>",
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, "\n".join(page))
    return out


def shown_metrics(scores: dict) -> list[str]:
    """Names of the metrics that the table shows of one data set."""
    return [name for name in _SHOWN if scores["metrics"].get(name) is not None][:_MAX_SHOWN]


def results_table(evaluations: Sequence[Evaluated]) -> str:
    """Data sets and metrics as rows, models as columns."""
    head = "".join(f"<th>{html.escape(entry.label)}</th>" for entry in evaluations)
    rows = [f"<tr><th>task</th><th>metric</th><th>questions</th>{head}</tr>"]
    for dataset in dict.fromkeys(name for entry in evaluations for name in entry.results):
        first = next(entry.results[dataset] for entry in evaluations if dataset in entry.results)
        for metric in shown_metrics(first):
            cells = "".join(_cell(entry.results.get(dataset), metric) for entry in evaluations)
            name = f"{first['task'].replace('_', ' ')} <span class='tag'>{html.escape(dataset)}</span>"
            scorer = f"{metric} <span class='interval'>{html.escape(first['scorer'])}</span>"
            rows.append(f"<tr><td>{name}</td><td>{scorer}</td><td>{first['questions']}</td>{cells}</tr>")
    note = (
        "Held-out scenes. Percent; small numbers are 95 % bootstrap intervals over questions. Each scorer is named "
        "after its official source (docs/). <i>most-frequent</i> repeats the training set's most frequent answer."
    )
    return f"<h2>Scores</h2><table>{''.join(rows)}</table><p class='note'>{note}</p>"


def _cell(scores: dict | None, metric: str) -> str:
    if scores is None or scores["metrics"].get(metric) is None:
        return "<td>–</td>"
    factor = 1.0 if scores["unit"] == "percent" else 100.0
    interval = scores["intervals"].get(metric)
    bounds = (
        f" <span class='interval'>{factor * interval[0]:.0f}–{factor * interval[1]:.0f}</span>" if interval else ""
    )
    return f"<td>{factor * scores['metrics'][metric]:.1f}{bounds}</td>"


def curves_section(run: Path) -> str:
    """Training curves of a run, or of the stages under a run folder, and what GRPO sampled."""
    folders = {stage: run / stage for stage in ("detect", "sft", "grpo")}
    if (run / METRICS).exists():
        folders = {_stage(run): run}
    rows = {stage: read_log(folder / METRICS) + read_log(folder / SPEED) for stage, folder in folders.items()}
    drawn = [plot(rows[stage], names, title) for stage, names, title in _CURVES if rows.get(stage)]
    curves = f"<h2>Training</h2><div class='curves'>{''.join(drawn)}</div>" if any(drawn) else ""
    return curves + (completions_section(folders["grpo"]) if "grpo" in folders else "")


def _stage(run: Path) -> str:
    """Which loop a run's metrics are of, by what only that loop logs."""
    known = {name for row in read_log(run / METRICS) for name in row}
    return "grpo" if "reward" in known else "sft" if "sequence_tokens" in known else "detect"


def choose_examples(predictions: Sequence[Prediction], limit: int) -> list[Prediction]:
    """The first `limit` answered predictions of each task, from different scenes where there are enough.

    By order in the file and not by score, so that the examples are not a selection of successes.
    """
    chosen: list[Prediction] = []
    for task in dict.fromkeys(entry.task for entry in predictions):
        answered = [entry for entry in predictions if entry.task == task and entry.text]
        firsts = list({entry.scene_id: entry for entry in reversed(answered)}.values())[::-1]
        rest = [entry for entry in answered if entry not in firsts]
        chosen += (firsts + rest)[:limit]
    return chosen


def examples_section(
    predictions: Sequence[Prediction], folder: Path, data_root: Path, limit: int, scene: Scene | None = None
) -> str:
    """Questions with the scene's picture, the views the model was given, its thought and its answer."""

    def color(rgb: tuple[int, int, int]) -> str:
        return f"<span style='background:rgb{rgb}'></span>"

    key = f"<p class='key note'>Boxes: {color(ANSWERED)}answered {color(TRUE)}true {color(ASKED)}asked about</p>"
    shown = "".join(_example(entry, folder, data_root, scene) for entry in choose_examples(predictions, limit))
    return f"<h2>Examples</h2>{key}{shown}"


def _example(prediction: Prediction, folder: Path, data_root: Path, scene: Scene | None) -> str:
    path = data_root / "prepared" / f"{prediction.scene_id}.npz"
    asked = [prediction.meta["query_box"]] if prediction.meta.get("query_box") else []
    picture = ""
    if scene is None or scene.scene_id != prediction.scene_id:
        scene = load_scene(path) if path.exists() else None
    if scene is not None:
        check_frame(scene, [prediction])
        image_HW3 = scene_picture(
            scene,
            [(prediction.target_boxes, TRUE), (asked, ASKED), (prediction.boxes, ANSWERED)],
        )
        picture = f"<img class='scene' alt='scene with boxes' src='{data_url(image_HW3)}'>"
    else:
        picture = f"<p class='note'>no prepared scene at {html.escape(str(path))}</p>"
    views = ""
    for name in prediction.views:
        file = folder / name
        if file.exists():
            views += f"<img alt='{html.escape(name)}' src='{data_url(np.asarray(Image.open(file).convert('RGB')))}'>"
    situation = f"<p>{html.escape(prediction.meta['situation'])}</p>" if prediction.meta.get("situation") else ""
    references = " · ".join(prediction.references[:3])
    malformed = "" if prediction.well_formed or prediction.text.startswith("<answer>") else " · not well formed"
    return (
        f"<div class='example'><div>{picture}<div class='views'>{views}</div></div><div>"
        f"<span class='tag'>{prediction.task.replace('_', ' ')}</span> {html.escape(prediction.scene_id)}"
        f"{malformed}{situation}<p><b>{html.escape(prediction.question)}</b></p>"
        f"<p class='think'>{html.escape(prediction.think)}</p>"
        f"<p class='answer'>{html.escape(prediction.answer or prediction.text)}</p>"
        + (f"<p class='note'>reference: {html.escape(references)}</p>" if references else "")
        + "</div></div>"
    )
