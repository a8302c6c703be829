"""Scene captions that came with Scene-30K: `annotations/scene_caption.json`, {scene_id: {"captions": [text, …]}}.

The split `train` takes every scene but those of the validation and test splits, which are dropped and counted; other
splits take the scenes of their own list.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from ..prompts import TASK_TEMPLATES
from ..scannet import read_split
from ..scene import Sample
from .common import Benchmark, Index, Inputs, scene_of
from .problems import Report
from .rows import Row, annotation_file, read_json_table
from .scene30k import HELD_OUT_FILES, dropped_note, held_out_scenes

FILE = "scene_caption.json"
_TASK = "scene_description"


def load(root: Path, split: str, index: Index, report: Report) -> list[Sample]:
    """One sample per scene, or per caption in the training split; references are all captions of the scene."""
    path = annotation_file(root, FILE)
    held_out = held_out_scenes(root) if split == "train" else set()
    own = set(read_split(root, split)) if split != "train" else None
    dropped: Counter[str] = Counter()

    def read(row: Row) -> list[Sample]:
        scene_id = str(row.record["scene_id"])
        if scene_id in held_out:
            dropped["on held-out scenes"] += 1
            return []
        if own is not None and scene_id not in own:
            return []
        captions = row.texts("captions")
        if not captions:
            raise row.bad("captions", "'captions' holds no text; write one, or take the scene out.")
        scene_of(index, scene_id, row)
        return [
            Sample(
                sample_id=f"{report.dataset}-{scene_id}-{number}",
                task=_TASK,
                dataset=report.dataset,
                scene_id=scene_id,
                question=TASK_TEMPLATES[_TASK],
                answer=caption,
                references=captions,
            )
            for number, caption in enumerate(captions if split == "train" else captions[:1])
        ]

    rows = []
    for number, (scene_id, entry) in enumerate(read_json_table(path).items(), 1):
        record = {**entry, "scene_id": scene_id} if isinstance(entry, Mapping) else {"scene_id": scene_id}
        rows.append(Row(path, number, record))
    groups = report.keep(rows, read)
    report.notes += dropped_note(path, sum(1 for group in groups if group), dropped)
    return [sample for group in groups for sample in group]


def _inputs(split: str) -> Inputs:
    if split == "train":
        return Inputs((f"annotations/{FILE}", HELD_OUT_FILES[0]), HELD_OUT_FILES[1:])
    return Inputs((f"annotations/{FILE}", f"scannetv2_{split}.txt"))


BENCHMARK = Benchmark(load, _inputs)
