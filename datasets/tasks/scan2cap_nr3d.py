"""Scan2Cap's form of Nr3D, dense captioning: `annotations/nr3d_{train,val}.json` in ScanRefer's schema.

Scan2Cap makes these files from nr3d.csv by its script organize_referit3d.py. Where a split's file is absent, the same
is made of `annotations/nr3d.csv` here: every utterance, whether it mentions the class or not, in lower case, split by
ScanNet's list of scenes.
"""

from collections.abc import Hashable
from pathlib import Path

from ..scannet import read_split
from ..scene import Sample
from .captions import joined_tokens, to_captions
from .common import Benchmark, Index, Inputs
from .nr3d import FILE, read_nr3d, tokens_of
from .problems import Report
from .rows import Row, first_time
from .scanrefer import Description, read_descriptions


def load(root: Path, split: str, index: Index, report: Report) -> list[Sample]:
    """One sample per described object (per utterance in the training split), with the object's box as query."""
    path = root / "annotations" / _file(split)
    descriptions = read_descriptions(path, report) if path.is_file() else _from_csv(root, split, report)
    return to_captions(descriptions, split, index, report, task="dense_caption", caption=joined_tokens)


def _from_csv(root: Path, split: str, report: Report) -> list[Description]:
    scene_ids = set(read_split(root, split))
    seen: dict[Hashable, int] = {}

    def read(row: Row) -> Description | None:
        scene_id = row.text("scan_id")
        if scene_id not in scene_ids:
            return None
        assignment_id = row.name("assignmentid")
        first_time(seen, assignment_id, row, "assignmentid")
        return Description(
            row=row,
            scene_id=scene_id,
            object_id=row.integer("target_id"),
            object_name=row.text("instance_type").replace("_", " "),
            ann_id=assignment_id,
            text=row.filled("utterance").lower(),
            tokens=[token.lower() for token in tokens_of(row)],
        )

    return report.keep(read_nr3d(root, report), read)


def _file(split: str) -> str:
    return f"nr3d_{split}.json"


def _inputs(split: str) -> Inputs:
    return Inputs(either=(f"annotations/{_file(split)}", f"annotations/{FILE}"), optional=(f"scannetv2_{split}.txt",))


BENCHMARK = Benchmark(load, _inputs)
