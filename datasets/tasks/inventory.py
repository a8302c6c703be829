"""Inventories of prepared scenes: every object with its kind, out of the scenes' own labels.

No benchmark, and nothing to be scored on: it teaches which token of the prompt a name goes with. A description of one
object teaches that once a sample, an inventory some thirty times, in both directions: from a name to what it is, and
from a kind to the names of its objects. Without it a model of random weights reads `<obj12>` as noise for long.
"""

import zlib
from pathlib import Path

import numpy as np

from ...utils.text import format_box
from ..scannet import read_split
from ..scene import Sample
from ..scene_store import SceneInfo
from .common import Benchmark, Index, Inputs, scene_of
from .problems import Report
from .rows import Row

ORDERS = 2  # samples of each direction and training scene, each in an order of its own
MOST = 40  # objects of a sample
BY_NAME = "Name the objects one by one, each with its kind."
BY_KIND = "Name the objects of each kind."


def load(root: Path, split: str, index: Index, report: Report) -> list[Sample]:
    """Samples of both directions for each scene of a split that has objects; one order alone of held-out scenes."""
    path = root / f"scannetv2_{split}.txt"
    rows = [Row(path, number, {"scene_id": name}) for number, name in enumerate(read_split(root, split), 1)]

    def read(row: Row) -> list[Sample]:
        info = scene_of(index, str(row.record["scene_id"]), row)
        return _samples(info, report.dataset, ORDERS if split == "train" else 1) if len(info.boxes_K7) else []

    return [sample for group in report.keep(rows, read) for sample in group]


def _samples(info: SceneInfo, dataset: str, orders: int) -> list[Sample]:
    rng = np.random.default_rng(zlib.crc32(info.scene_id.encode()))
    pointers = [format_box(box.tolist()) for box in info.to_model(info.boxes_K7)]
    samples = []
    for _ in range(orders):
        chosen = rng.permutation(len(pointers))[:MOST].tolist()
        kinds: dict[str, list[str]] = {}
        for row in chosen:
            kinds.setdefault(info.object_labels[row], []).append(pointers[row])
        answers = {
            BY_NAME: ", ".join(f"{pointers[row]} {info.object_labels[row]}" for row in chosen),
            BY_KIND: ", ".join(f"{kind} {' '.join(named)}" for kind, named in kinds.items()),
        }
        for question, answer in answers.items():
            samples.append(
                Sample(
                    sample_id=f"{dataset}-{info.scene_id}-{len(samples)}",
                    task="dialogue",
                    dataset=dataset,
                    scene_id=info.scene_id,
                    question=question,
                    answer=answer,
                    references=[answer],
                    target_object_ids=[int(info.object_ids_K[row]) for row in chosen],
                    target_boxes_K7=info.boxes_K7[chosen],
                )
            )
    return samples


BENCHMARK = Benchmark(load, lambda split: Inputs((f"scannetv2_{split}.txt",)))
