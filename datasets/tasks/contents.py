"""What prepared scenes hold, in words alone: kinds and how many there are of each, colours of each kind and back.

No benchmark, and nothing to be scored on. It is for models that are shown pictures and no objects to point at: what
a chair looks like is hard to learn from one word a question, and all that a room holds is some sixty words
(docs/proof.md, findings 29 and 30). Kinds and colours stand in the order of the alphabet, so that what comes next
can be known. Half of the questions are about some of the kinds, so that views chosen by the question differ.

Labels are those of the prepared scenes, colours those of `annotations/object_colors.json` (inventory.py).
"""

import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from ..scene import Sample
from ..scene_store import SceneInfo
from .common import Benchmark, Index, Inputs, of_each_scene
from .inventory import COLORS, read_colors
from .problems import Report

PARTS = 3  # questions about some of the kinds, of a training scene
COUNTS = "List the kinds of objects in the room, each with how many there are."
COLORS_BY_KIND = "List the kinds of objects in the room, each with their colors."
KINDS_BY_COLOR = "List the colors of the objects in the room, each with their kinds."
COLORS_OF = "List these kinds of objects, each with their colors: {kinds}."


def load(root: Path, split: str, index: Index, report: Report) -> list[Sample]:
    """Samples of each scene of a split that has objects: whole rooms, and where colours are known parts of them.

    Raises:
        ValueError: the file of colours is not a table of colours by scene and object.
    """
    colors = read_colors(root / COLORS)

    def make(info: SceneInfo) -> list[Sample]:
        texts = _texts(info, colors.get(info.scene_id, {}), PARTS if split == "train" else 1)
        return [
            Sample(
                sample_id=f"{report.dataset}-{info.scene_id}-{number}",
                task="dialogue",
                dataset=report.dataset,
                scene_id=info.scene_id,
                question=question,
                answer=answer,
                references=[answer],
            )
            for number, (question, answer) in enumerate(texts)
        ]

    return of_each_scene(root, split, index, report, make)


def _texts(info: SceneInfo, color_of: dict[int, str], parts: int) -> list[tuple[str, str]]:
    """Questions and their answers."""
    if not info.object_labels:
        return []
    counts = [(label, str(info.object_labels.count(label))) for label in set(info.object_labels)]
    texts = [(COUNTS, _listed(counts))]
    pairs = [
        (label, color_of[int(number)])
        for label, number in zip(info.object_labels, info.object_ids_K, strict=True)
        if int(number) in color_of
    ]
    if not pairs:
        return texts
    texts.append((COLORS_BY_KIND, _listed(pairs)))
    texts.append((KINDS_BY_COLOR, _listed((color, label) for label, color in pairs)))
    rng = np.random.default_rng(zlib.crc32(info.scene_id.encode()))
    kinds = sorted({label for label, _ in pairs})
    for _ in range(parts):
        some = _half(kinds, rng)
        answer = _listed(pair for pair in pairs if pair[0] in some)
        texts.append((COLORS_OF.replace("{kinds}", ", ".join(some)), answer))
    return texts


def _half(kinds: Sequence[str], rng: np.random.Generator) -> list[str]:
    """Half of some words, at least one, in their order."""
    return [kinds[int(row)] for row in np.sort(rng.permutation(len(kinds))[: (len(kinds) + 1) // 2])]


def _listed(pairs: Iterable[tuple[str, str]]) -> str:
    """`bed red, chair black black white`: each first word once, behind it all its second ones."""
    groups: dict[str, list[str]] = {}
    for first, second in sorted(pairs):
        groups.setdefault(first, []).append(second)
    return ", ".join(f"{first} {' '.join(its)}" for first, its in groups.items())


BENCHMARK = Benchmark(load, lambda split: Inputs((f"scannetv2_{split}.txt",), (COLORS,)))
