"""samples.html: random records of a Scene-30K run with pictures of their scenes, to judge their quality by eye.

One file, pictures inside. Some rejects stand below, so that the filters can be judged as well.
"""

import html
import io
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..datasets.scene import Scene, load_scene
from ..utils.text import parse_response, resolve_boxes
from .palette import ANSWERED, TRUE
from .pictures import data_url, scene_picture
from .report import write_page

ViewsOf = Callable[[str, str], Sequence[bytes]]
_STYLE = """<style>.think p{margin:.35rem 0}.answer{font-size:1.05rem}.box{color:#6b7280;font-size:.78rem;
white-space:nowrap}.example p{margin:.5rem 0}.rejected td,.rejected th{text-align:left!important;vertical-align:top}
.rejected td:nth-child(3){max-width:34rem;overflow-wrap:anywhere}</style>"""
_BOX = re.compile(r"&lt;box&gt;\s*([^&]*?)\s*&lt;/box&gt;")
# where a step begins: shown on a line of its own
_STEP = re.compile(r"(?<=[.!?])\s+(?=(?:\W*)(?:Step\s+\d|First|Second|Third|Next|Then|Last|Finally|Conclusion)\b)")
_VIEWS, _VIEW_HEIGHT, _REPLY_LETTERS = 4, 180, 400


def draw_sample(rows: Iterable[dict[str, Any]], count: int, rng: random.Random) -> list[dict[str, Any]]:
    """`count` rows, each set of them as likely as any other (reservoir sampling), in the order they came."""
    kept: list[tuple[int, dict[str, Any]]] = []
    for number, row in enumerate(rows):
        if len(kept) < count:
            kept.append((number, row))
            continue
        place = rng.randrange(number + 1)
        if place < count:
            kept[place] = (number, row)
    return [row for _, row in sorted(kept, key=lambda entry: entry[0])]


def one_of_each_reason(rows: Iterable[dict[str, Any]], rng: random.Random) -> list[tuple[dict[str, Any], int]]:
    """A random reject for every reason, and how many have it; most frequent first."""
    chosen: dict[str, dict[str, Any]] = {}
    counts: dict[str, int] = {}
    for row in rows:
        reason = row["reason"]
        counts[reason] = counts.get(reason, 0) + 1
        if rng.randrange(counts[reason]) == 0:
            chosen[reason] = row
    return [(chosen[reason], count) for reason, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, 1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                raise ValueError(f"{path}, row {number}: not JSON; run `synthesize` again.") from None
            yield row


def marked(text: str) -> str:
    """A text as HTML, its boxes small."""
    return _BOX.sub(r"<span class='box'>[\1]</span>", html.escape(text))


def _thumbnail(view: bytes) -> str:
    with Image.open(io.BytesIO(view)) as picture:
        image = picture.convert("RGB")
    image.thumbnail((4 * _VIEW_HEIGHT, _VIEW_HEIGHT))
    return data_url(np.asarray(image))


def frames_of(scene: Scene, count: int = _VIEWS) -> list[bytes]:
    """At most `count` of a scene's pictures that are there, evenly spaced."""
    pictures = scene.frames or scene.pictures
    rows = np.linspace(0, len(pictures) - 1, min(count, len(pictures))).round().astype(int)
    files = [Path(pictures[row].color_path) for row in rows]
    return [file.read_bytes() for file in files if file.is_file()]


def _example(row: dict[str, Any], prepared: Path, views_of: ViewsOf | None) -> str:
    response = parse_response(row["cot"])
    scene = load_scene(prepared / f"{row['scene_id']}.npz")
    targets = scene.boxes_of([number for number in row.get("object_ids", []) if number in scene.object_ids_K.tolist()])
    answered = np.array(resolve_boxes(response.answer, []), np.float32).reshape(-1, 7)
    # the true boxes on top: where both agree, as they should, only the green one is seen
    image_HW3 = scene_picture(scene, [(scene.to_world(answered).tolist(), ANSWERED), (targets.tolist(), TRUE)])
    views = views_of(row["scene_id"], row["question"]) if views_of else frames_of(scene)
    pictures = "".join(f"<img alt='view {number}' src='{_thumbnail(view)}'>" for number, view in enumerate(views, 1))
    steps = "".join(f"<p>{marked(step)}</p>" for step in _STEP.split(response.think))
    tags = " ".join(
        f"<span class='tag'>{html.escape(str(row[name]))}</span>" for name in ("task", "source") if name in row
    )
    gold = (
        f"<p class='note'>benchmark's answer: {html.escape(row['gold_answer'])}</p>" if row.get("gold_answer") else ""
    )
    return (
        f"<div class='example'><div><img class='scene' alt='scene with boxes' src='{data_url(image_HW3)}'>"
        f"</div><div>{tags} {html.escape(row['scene_id'])}"
        f"<p><b>{html.escape(row['question'])}</b></p><div class='think'>{steps}</div>"
        f"<p class='answer'>{marked(response.answer)}</p>{gold}<div class='views'>{pictures}</div></div></div>"
    )


def _rejected(rejects: Sequence[tuple[dict[str, Any], int]]) -> str:
    if not rejects:
        return ""
    lines = [
        f"<tr><td><code>{html.escape(row['reason'])}</code></td><td>{count}</td>"
        f"<td>{html.escape(row['question'])}<br>"
        f"<span class='note'>{marked(_cut(row.get('reply', '')))}</span></td></tr>"
        for row, count in rejects
    ]
    head = "<tr><th>reason</th><th>how many</th><th>one of them, and the reply</th></tr>"
    return f"<h2>Rejected: one of each kind</h2><table class='rejected'>{head}{''.join(lines)}</table>"


def _cut(text: str) -> str:
    return text if len(text) <= _REPLY_LETTERS else f"{text[: _REPLY_LETTERS - 1]}…"


def write_samples(
    records: str | Path,
    page: str | Path,
    *,
    data_root: str | Path,
    count: int = 12,
    seed: int = 0,
    views_of: ViewsOf | None = None,
) -> Path:
    """Write the page about a run's records, and about `<records>.rejects.jsonl` where it is there.

    Args:
        records: JSON lines that `synthesize` wrote.
        page: the HTML file.
        data_root: where `prepared/` lies.
        count: records to show.
        seed: which ones.
        views_of: the pictures that the teacher was shown (scene id, question -> JPEG or PNG files); the scene's own
            frames by default.

    Raises:
        ValueError: a file is missing or broken.
    """
    records, prepared = Path(records), Path(data_root) / "prepared"
    if not records.is_file():
        raise ValueError(f"There is no {records} to show samples of; run `synthesize` first.")
    rng = random.Random(seed)
    total = sum(1 for _ in _rows(records))
    sample = draw_sample(_rows(records), count, rng)
    rejects = records.with_name(records.name + ".rejects.jsonl")
    refused = one_of_each_reason(_rows(rejects), rng) if rejects.is_file() else []
    swatches = "".join(
        f"<span style='background:rgb{color}'></span>{name}"
        for color, name in ((TRUE, "true"), (ANSWERED, "answered"))
    )
    parts = [_STYLE, f"<p class='key note'>Boxes: {swatches}</p>" if sample else "<p>No record was kept.</p>"]
    parts += [_example(row, prepared, views_of) for row in sample]
    parts.append(_rejected(refused))
    return write_page(page, f"{len(sample)} of {total} records", records.name, parts)
