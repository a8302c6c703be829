"""What goes beside the records: a datasheet with counts, filters and pictures, and the captions of their scenes.

Everything is made from the files that a run wrote (records, rejects, report), row by row, so that it takes no more
memory for more records, and can be made again at any time.
"""

import importlib.metadata
import platform
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import orjson

from ...utils.files import write_whole
from ...utils.text import parse_response
from ..scene_store import SceneInfo
from .description import CAPTION_FILE, inventory
from .filters import FILTERS, count_words, step_starts
from .histograms import bars, histogram

SHEET = ".sheet"  # ending of the folder beside the records that all of it goes to
_PACKAGES = ("google-genai", "rapidfuzz", "orjson", "pillow")
_THRESHOLDS = {
    "think_short": "min_think_words",
    "answer_short": "min_answer_words",
    "few_steps": "min_steps",
    "inconsistent": "min_consistency",
    "gold": "min_box_iou",
    "box_unknown": "min_box_iou",
    "near_duplicate": "duplicate_similarity",
}
_MEANING = {
    "format": "one thought, then one answer, and nothing else",
    "think_short": "words of thought, boxes not counted",
    "answer_short": "words of answer, boxes not counted; 0 is off",
    "few_steps": "steps that open with a cue (Step 1, First, Next, Last, …)",
    "target_unnamed": "the last step names what the question is about",
    "inconsistent": "answered again from the thought alone: similarity of the two answers (Levenshtein, characters)",
    "gold": "the answer agrees with the benchmark's own; boxes by IoU",
    "box_unknown": "every box that is mentioned is an object's of the scene (IoU)",
    "near_duplicate": "similarity of question and answer to an earlier record about the same objects",
}
_NOTE = """\
The questions come from the benchmarks named above, the scenes from the scans they are about, and the thoughts from the
teacher. Each keeps its own terms: those of the scans (ScanNet's terms of use, where they are ScanNet's), the licences
of the benchmarks, and what the teacher's provider says about its output. Look at all three before passing these
records on. Only scenes of the training split are in them.
"""


@dataclass
class Counts:
    """What a run's files hold, counted; lengths as value -> how many records have it."""

    kept: int = 0
    by: dict[str, Counter[str]] = field(default_factory=lambda: {name: Counter() for name in ("source", "task")})
    scenes: Counter[str] = field(default_factory=Counter)
    think_words: Counter[int] = field(default_factory=Counter)
    answer_words: Counter[int] = field(default_factory=Counter)
    steps: Counter[int] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a file that a run wrote; ValueError names a row that is not one."""
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            try:
                row = orjson.loads(line)
            except orjson.JSONDecodeError:
                raise ValueError(f"{path}, row {number}: not JSON; run the same command again.") from None
            yield row


def count_files(records: Path, rejects: Path) -> Counts:
    """Count the records and the rejects of a run."""
    counts = Counts()
    for row in read_lines(records):
        response = parse_response(row["cot"])
        counts.kept += 1
        for name, counter in counts.by.items():
            counter[row[name]] += 1
        counts.scenes[row["scene_id"]] += 1
        counts.think_words[count_words(response.think)] += 1
        counts.answer_words[count_words(response.answer)] += 1
        counts.steps[len(step_starts(response.think))] += 1
    counts.reasons.update(row["reason"] for row in read_lines(rejects))
    return counts


def filter_of(reason: str) -> str:
    """The filter that gives a reason code; "" for what the teacher itself gave (cannot_tell, truncated, …)."""
    if reason.startswith("gold_"):
        return "gold"
    return reason if reason in FILTERS else ""


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table."""
    lines = [list(head), *([str(cell).replace("|", "\\|") for cell in row] for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def funnel(counts: Counts, options: Mapping[str, Any]) -> list[tuple[str, str, str, int, int]]:
    """Rows (filter, what it asks for, threshold, rejected, left) in the order that replies pass them."""
    left = counts.kept + sum(counts.reasons.values())
    rows = []
    given = {reason: count for reason, count in sorted(counts.reasons.items()) if not filter_of(reason)}
    for reason, count in given.items():
        left -= count
        rows.append((f"`{reason}`", "the teacher gave no usable reply", "", count, left))
    for name in FILTERS:
        count = sum(number for reason, number in counts.reasons.items() if filter_of(reason) == name)
        left -= count
        threshold = (
            "skipped" if name in options.get("skipped", ()) else str(options.get(_THRESHOLDS.get(name, ""), ""))
        )
        codes = sorted(reason for reason in counts.reasons if filter_of(reason) == name) or [name]
        rows.append((", ".join(f"`{code}`" for code in codes), _MEANING[name], threshold, count, left))
    return rows


def scalars(report: Mapping[str, Any]) -> list[tuple[str, object]]:
    """Numbers and texts of a report, nested ones under dotted names, in the report's order."""
    found: list[tuple[str, object]] = []
    for name, value in report.items():
        if isinstance(value, Mapping):
            found += [(f"{name}.{inner}", number) for inner, number in scalars(value)]
        elif isinstance(value, (str, int, float)):
            found.append((name, value))
        elif isinstance(value, list):
            found.append((name, ", ".join(map(str, value)) or "–"))
    return found


def versions() -> str:
    """Python and the packages that shape records."""
    found = [f"Python {platform.python_version()}"]
    for name in _PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue  # google-genai is optional
    return ", ".join(found)


def draw_pictures(counts: Counts, folder: Path) -> list[str]:
    """Write the pictures that there is something to show in; their names."""
    pictures = {}
    asked = [("kept", counts.kept), *counts.reasons.most_common()]
    if sum(count for _, count in asked):
        pictures["reasons.png"] = bars(asked, "What became of the questions")
    if counts.kept:
        scenes: Counter[int] = Counter(counts.scenes.values())
        pictures["think_words.png"] = histogram(counts.think_words, "Length of the thought", "words")
        pictures["answer_words.png"] = histogram(counts.answer_words, "Length of the answer", "words")
        pictures["steps.png"] = histogram(counts.steps, "Steps of the thought", "steps")
        pictures["scenes.png"] = histogram(scenes, "Records by scene", "records")
    for name, picture in pictures.items():
        picture.save(folder / name)
    return list(pictures)


def write_captions(
    path: Path, scene_ids: Iterable[str], captions: Mapping[str, list[str]], index: Mapping[str, SceneInfo]
):
    """Captions of scenes, {scene_id: {"captions": [text, …]}}; what it holds stands for a scene without one."""
    content = {
        scene_id: {"captions": captions.get(scene_id) or [inventory(index[scene_id])]}
        for scene_id in sorted(scene_ids)
    }
    write_whole(path, orjson.dumps(content, option=orjson.OPT_INDENT_2) + b"\n")


def sheet_text(name: str, counts: Counts, report: Mapping[str, Any], pictures: Iterable[str], made: str) -> str:
    """The datasheet as Markdown."""
    settings = report.get("settings", {})
    # the counts stand above, and where the data lay is nobody's business
    elsewhere = ("rejected", "kept_by_source", "settings.root", "settings.filters", "settings.inputs.views_by")
    run = [(key, value) for key, value in scalars(report) if not key.startswith(elsewhere)]
    by = [table((title, "records"), counter.most_common()) for title, counter in counts.by.items()]
    scenes = counts.scenes.most_common()
    most = ", ".join(f"{scene_id} ({count})" for scene_id, count in scenes[:5])
    return "\n".join(
        [
            f"# {name}\n",
            f"{counts.kept} records about {len(scenes)} scenes, written by `{settings.get('identity', '?')}` and "
            f"filtered; {sum(counts.reasons.values())} questions gave none. Made on {made} with {versions()}.\n",
            "One JSON object a line: `scene_id`, `question`, `cot` (`<think>…</think><answer>…</answer>`), and our "
            "own `question_id`, `task`, `object_ids`, `gold_answer`, `source`, `teacher`. Boxes are centre and size "
            "in metres, in the scene's model frame: the origin lies on the floor in the middle of the room.\n",
            "## Counts\n",
            *by,
            f"Scenes with most records: {most or '–'}.\n",
            "## Filters, in order\n",
            table(
                ("reason", "asks for", "threshold", "rejected", "left"), funnel(counts, settings.get("filters", {}))
            ),
            "## Pictures\n",
            *(f"![{picture.removesuffix('.png')}]({picture})\n" for picture in pictures),
            "## The run\n",
            table(("", "value"), run),
            "## Terms\n",
            _NOTE,
        ]
    )


def sheet_folder(out: str | Path) -> Path:
    """The folder of a file of records that datasheet, captions and samples go to: `x.sheet` for `x.jsonl`."""
    return Path(out).with_name(Path(out).stem + SHEET)


def write_datasheet(out: str | Path, index: Mapping[str, SceneInfo], captions: Mapping[str, list[str]]) -> Path:
    """Write README.md, its pictures and scene_caption.json to `sheet_folder(out)`, from the files that a run wrote.

    Args:
        out: the file of records; `<out>.rejects.jsonl` and `<out>.report.json` lie beside it.
        index: labels of the scenes.
        captions: of scenes, by scene id.

    Returns:
        The folder.

    Raises:
        ValueError: one of the files is missing or broken.
    """
    out = Path(out)
    rejects, report = (out.with_name(out.name + ending) for ending in (".rejects.jsonl", ".report.json"))
    for path in (out, rejects, report):
        if not path.is_file():
            raise ValueError(f"There is no {path} to make a datasheet of; run `synthesize` first.")
    counts = count_files(out, rejects)
    folder = sheet_folder(out)
    folder.mkdir(parents=True, exist_ok=True)
    pictures = draw_pictures(counts, folder)
    made = datetime.now(timezone.utc).date().isoformat()
    text = sheet_text(out.name, counts, orjson.loads(report.read_bytes()), pictures, made)
    write_captions(folder / CAPTION_FILE, counts.scenes, captions, index)
    write_whole(folder / "README.md", text.encode())
    return folder
