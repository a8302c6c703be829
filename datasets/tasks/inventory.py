"""Inventories of prepared scenes: every object with its kind, out of the scenes' own labels, and with its colour.

No benchmark, and nothing to be scored on: it teaches which token of the prompt a name goes with. A description of one
object teaches that once a sample, an inventory some thirty times, in both directions: from a name to what it is, and
from a kind to the names of its objects. Without it a model of random weights reads `<obj12>` as noise for long. So it
is with numbers: a thought has one or two, an inventory every height, and all distances from one of them, in any order
or by distance.

Half of those by name list from left to right (by x), and those of one kind always are: what comes next can then be
known, and a model that lists or counts learns to go on with what it has not named yet. In any order that is learned
late: for long it names one of them again and again (docs/proof.md, finding 20).

Colours are in `annotations/object_colors.json`, which generated rooms have: by scene id, by objectId, a colour word.
"""

import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import orjson

from ...utils.text import format_box, split_at_boxes
from ..scene import Sample
from ..scene_store import SceneInfo
from .common import Benchmark, Index, Inputs, of_each_scene
from .problems import Report

NAME = "inventory"
ORDERS = 2  # samples of each direction and training scene, each in an order of its own
STARTS = 4  # objects of a training scene that distances are told from
MOST = 40  # objects of a sample
BY_NAME = "Name the objects one by one, each with its kind."
BY_KIND = "Name the objects of each kind."
COLOR_BY_NAME = "Name the objects one by one, each with its color."
BY_COLOR = "Name the objects of each color."
HEIGHTS = "Name the objects one by one, each with its height in meters."
DISTANCES = "Name the objects one by one, each with its distance in meters from the {label} {object}."
BY_DISTANCE = (
    "Name the objects from the nearest to the farthest from the {label} {object}, each with its distance in meters."
)
COLORS = "annotations/object_colors.json"


def load(root: Path, split: str, index: Index, report: Report) -> list[Sample]:
    """Samples of both directions for each scene of a split that has objects, of kinds and, where they are known, of
    colours; of heights, and of distances from one of them; one order alone of held-out scenes.

    Raises:
        ValueError: the file of colours is not a table of colours by scene and object.
    """
    colors = read_colors(root / COLORS)
    orders, starts = (ORDERS, STARTS) if split == "train" else (1, 1)

    def make(info: SceneInfo) -> list[Sample]:
        its = colors.get(info.scene_id, {})
        return _samples(info, its, report.dataset, orders, starts) if len(info.boxes_K7) else []

    return of_each_scene(root, split, index, report, make)


def leave_out(answer: str, kept: Sequence[bool]) -> str:
    """An inventory, in either direction, without some of its objects.

    Args:
        answer: of a sample of this data set, its objects as boxes.
        kept: for each of its boxes, in their order, whether it stays.
    """
    texts, boxes = split_at_boxes(answer)
    by_name = not texts[0]
    groups: list[tuple[str, list[str]]] = []  # a word as it stands before or behind its objects, and these
    for before, box, after, stays in zip(texts[:-1], boxes, texts[1:], kept, strict=True):
        if by_name or before != " " or not groups:
            groups.append((after.removesuffix(", ") if by_name else before.removeprefix(", "), []))
        if stays:
            groups[-1][1].append(box)
    order = "{1}{0}" if by_name else "{0}{1}"
    return ", ".join(order.format(word, " ".join(its)) for word, its in groups if its)


def read_colors(path: Path) -> dict[str, dict[int, str]]:
    """Colour words by scene id and objectId; none where there is no such file.

    Raises:
        ValueError: it is no such table.
    """
    if not path.exists():
        return {}
    try:
        rows = orjson.loads(path.read_bytes())
        return {scene: {int(number): str(color) for number, color in its.items()} for scene, its in rows.items()}
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a table of colors by scene and object ({error}); make it anew, or take it away."
        ) from None


def _samples(info: SceneInfo, colors: dict[int, str], dataset: str, orders: int, starts: int) -> list[Sample]:
    rng = np.random.default_rng(zlib.crc32(info.scene_id.encode()))
    pointers = [format_box(box.tolist()) for box in info.to_model(info.boxes_K7)]
    color_of = {row: colors[int(number)] for row, number in enumerate(info.object_ids_K) if int(number) in colors}
    samples = []

    def add(question: str, answer: str, rows: list[int], asked_of: int | None = None) -> None:
        samples.append(
            Sample(
                sample_id=f"{dataset}-{info.scene_id}-{len(samples)}",
                task="dialogue",
                dataset=dataset,
                scene_id=info.scene_id,
                question=question,
                answer=answer,
                references=[answer],
                target_object_ids=[int(info.object_ids_K[row]) for row in rows],
                target_boxes_K7=info.boxes_K7[rows],
                query_box_7=None if asked_of is None else info.boxes_K7[asked_of],
            )
        )

    place_K = [(x, row) for row, x in enumerate(info.boxes_K7[:, 0].tolist())]  # from left to right
    for number in range(orders):
        chosen = rng.permutation(len(pointers))[:MOST].tolist()
        if number == 0:
            chosen.sort(key=place_K.__getitem__)
        answers = {
            BY_NAME: ", ".join(f"{pointers[row]} {info.object_labels[row]}" for row in chosen),
            BY_KIND: _grouped(chosen, dict(enumerate(info.object_labels)), pointers, place_K),
            HEIGHTS: ", ".join(f"{pointers[row]} {info.boxes_K7[row, 5]:.1f}" for row in chosen),
        }
        if known := [row for row in chosen if row in color_of]:
            answers[COLOR_BY_NAME] = ", ".join(f"{pointers[row]} {color_of[row]}" for row in known)
            answers[BY_COLOR] = _grouped(known, color_of, pointers, place_K)
        for question, answer in answers.items():
            add(question, answer, chosen)
    for start in rng.permutation(len(pointers))[:starts].tolist() if len(pointers) > 1 else []:
        others = [row for row in rng.permutation(len(pointers)).tolist() if row != start]
        apart_K = np.hypot(*(info.boxes_K7[:, :2] - info.boxes_K7[start, :2]).T)
        for template, rows in ((DISTANCES, others), (BY_DISTANCE, sorted(others, key=lambda row: apart_K[row]))):
            question, rows = template.replace("{label}", info.object_labels[start]), rows[:MOST]
            add(question, ", ".join(f"{pointers[row]} {apart_K[row]:.1f}" for row in rows), rows, start)
    return samples


def _grouped(rows: list[int], words: dict[int, str], pointers: list[str], place_K: list[tuple[float, int]]) -> str:
    """`door <box> <box>, window <box>`: each word once, behind it all its objects by their places."""
    groups: dict[str, list[int]] = {}
    for row in rows:
        groups.setdefault(words[row], []).append(row)
    named = {word: [pointers[row] for row in sorted(its, key=place_K.__getitem__)] for word, its in groups.items()}
    return ", ".join(f"{word} {' '.join(its)}" for word, its in named.items())


BENCHMARK = Benchmark(load, lambda split: Inputs((f"scannetv2_{split}.txt",), (COLORS,)))
