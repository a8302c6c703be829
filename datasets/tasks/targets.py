"""ScanRefer and Nr3D as some projects re-package them: `annotations/{scanrefer,nr3d}_{split}_targets.json`.

Record: scan_id, target_id, caption; Nr3D's also easy and view_dep. Records have no id of their own, so row numbers
name the samples, and objects are called by their labels in the scan. The files hold fewer questions than the official
ones: scores on them are not the benchmarks'.
"""

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ...utils.labels import OTHERS
from ...utils.text import format_box
from ..scene import Sample
from .common import Benchmark, Index, Inputs, scene_of, target_box
from .problems import Report
from .rows import Row, annotation_file, read_rows

Describe = Callable[[Row], tuple[str, dict[str, bool]]]


def _read_targets(path: Path, split: str, index: Index, report: Report, describe: Describe) -> list[Sample]:
    """Grounding samples; `describe(row)` gives question_type and meta of a record."""

    def read(row: Row) -> Sample:
        scene_id, object_id, caption = row.filled("scan_id"), row.integer("target_id"), row.filled("caption")
        question_type, meta = describe(row)
        info = scene_of(index, scene_id, row)
        boxes_K7 = target_box(info, object_id, row)
        name = info.object_labels[int(np.flatnonzero(info.object_ids_K == object_id)[0])]
        return Sample(
            sample_id=f"{report.dataset}-{split}-{row.number}",
            task="grounding",
            dataset=report.dataset,
            scene_id=scene_id,
            question=caption,
            answer=f"{name} {format_box(info.to_model(boxes_K7)[0].tolist())}",
            references=[name],
            target_object_ids=[object_id],
            target_boxes_K7=boxes_K7,
            question_type=question_type,
            meta={"object_name": name, **meta},
        )

    return report.keep(read_rows(path, report), read)


def load_scanrefer(root: Path, split: str, index: Index, report: Report) -> list[Sample]:
    """ScanRefer's sentences; `unique` means that the file describes no other object of its class in the scene.

    The class is the scan's (nyu40 id), where ScanRefer's own rule goes by the object's name.
    """
    path = annotation_file(root, _file("scanrefer", split))
    samples = _read_targets(path, split, index, report, lambda _row: ("", {}))
    members: dict[tuple[str, int], set[int]] = defaultdict(set)
    for sample in samples:
        members[sample.scene_id, _class_of(sample, index)].update(sample.target_object_ids)
    for sample in samples:
        number = _class_of(sample, index)
        multiple = len(members[sample.scene_id, number]) > 1
        sample.question_type = "multiple" if multiple else "unique"
        sample.meta |= {"multiple": multiple, "others": number == OTHERS}
    if report.problems:
        report.notes.append(
            f"{report.dataset} ({split}): unique and multiple go by the {len(samples):,} sentences that can be used "
            f"alone, without {len(report.problems):,} others; they are not ScanRefer's groups."
        )
    return samples


def _class_of(sample: Sample, index: Index) -> int:
    info = index[sample.scene_id]
    number = info.row_of(sample.target_object_ids[0])
    assert number is not None  # it has a box
    return int(info.class_ids_K[number])


def load_nr3d(root: Path, split: str, index: Index, report: Report) -> list[Sample]:
    """Nr3D's sentences, easy or hard as the file says. It names no distractors: selection cannot be scored on it."""

    def describe(row: Row) -> tuple[str, dict[str, bool]]:
        return "easy" if row.get("easy", bool) else "hard", {"view_dependent": row.get("view_dep", bool)}

    return _read_targets(annotation_file(root, _file("nr3d", split)), split, index, report, describe)


def _file(name: str, split: str) -> str:
    return f"{name}_{split}_targets.json"


SCANREFER = Benchmark(load_scanrefer, lambda split: Inputs((f"annotations/{_file('scanrefer', split)}",)))
NR3D = Benchmark(load_nr3d, lambda split: Inputs((f"annotations/{_file('nr3d', split)}",)))
