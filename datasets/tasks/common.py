"""What the benchmarks' readers share: their inputs, scenes and boxes by id, and the form of 3D-LLM's files."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..scannet import read_split
from ..scene import Sample, Scene
from ..scene_store import SceneInfo
from .problems import Report
from .rows import Row, annotation_file, read_rows

Scenes = Mapping[str, Scene] | Mapping[str, SceneInfo]
Index = Mapping[str, SceneInfo]


@dataclass(frozen=True)
class Inputs:
    """Files below the data root that a reader reads.

    `needed` must all be there; of `either` one suffices, the first that is there being read; `optional` files are
    read where they are present.
    """

    needed: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    either: tuple[str, ...] = ()

    @property
    def all(self) -> tuple[str, ...]:
        return (*self.needed, *self.either, *self.optional)

    def absent(self, root: str | Path) -> list[str]:
        """Files that are missing below a root; of `either` the last, where none is there."""
        absent = [name for name in self.needed if not (Path(root) / name).is_file()]
        if self.either and not any((Path(root) / name).is_file() for name in self.either):
            absent.append(self.either[-1])
        return absent


@dataclass(frozen=True)
class Benchmark:
    """How one data set is read.

    `load(root, split, index, report)` gives the samples of one split in file order and tells `report` what it left
    out; it raises a ValueError only where a file as a whole is missing or unreadable. `inputs(split)` names every
    file that it reads.
    """

    load: Callable[[Path, str, Index, Report], list[Sample]]
    inputs: Callable[[str], Inputs]


def scene_of(index: Index, scene_id: str, row: Row) -> SceneInfo:
    """Index entry of a row's scene; RowError names the row."""
    info = index.get(scene_id)
    if info is None:
        raise row.error(
            "missing_scene",
            "scene_id" if "scene_id" in row.record else "scan_id",
            f" names scene {scene_id}, which is not prepared; "
            "run `python main.py prepare` on its scan, or take the row out.",
            scene_id=scene_id,
        )
    return info


def of_each_scene(
    root: Path, split: str, index: Index, report: Report, make: Callable[[SceneInfo], list[Sample]]
) -> list[Sample]:
    """What is made of every scene that a split's list names; one that is not prepared is reported."""
    path = root / f"scannetv2_{split}.txt"
    rows = [Row(path, number, {"scene_id": name}) for number, name in enumerate(read_split(root, split), 1)]
    groups = report.keep(rows, lambda row: make(scene_of(index, str(row.record["scene_id"]), row)))
    return [sample for group in groups for sample in group]


def boxes_of(info: SceneInfo, object_ids: Sequence[int], row: Row) -> np.ndarray:
    """World boxes [n, 7] of objects; those of structure (walls, floors, ceilings) have none and are left out.

    Raises:
        RowError: an object that the scan does not have.
    """
    found: list[np.ndarray] = []
    for object_id in object_ids:
        number = info.row_of(object_id)
        if number is not None:
            found.append(info.boxes_K7[number])
        elif object_id not in info.structure_ids:
            raise row.error(
                "missing_object",
                next((name for name in ("object_ids", "object_id", "target_id") if name in row.record), ""),
                f" names object {object_id}, which scene {info.scene_id} does not have; "
                "check that annotations and scans belong together, or take the row out.",
                scene_id=info.scene_id,
                object_id=object_id,
            )
    return np.stack(found) if found else np.zeros((0, 7), np.float32)


def target_box(info: SceneInfo, object_id: int, row: Row) -> np.ndarray:
    """World box [1, 7] of the object that a row is about; RowError where the scan lacks it, or it has no box."""
    boxes_K7 = boxes_of(info, [object_id], row)
    if len(boxes_K7) == 0:
        raise row.error(
            "no_box",
            "target_id" if "target_id" in row.record else "object_id",
            f" describes object {object_id}, a wall, floor or ceiling without a box; take the row out.",
            scene_id=info.scene_id,
            object_id=object_id,
        )
    return boxes_K7


def benchmark_3d_llm(name: str, task: str, *, raw: bool = False) -> Benchmark:
    """One of LL3DA's 3D-LLM files, `3d_llm_<name>_<split>.json`: [{question, answers: [text], scene_id}].

    The files repeat questions about a scene on purpose, so a row number is the sample's name.

    Args:
        raw: keep references as they stand; otherwise outer white space and repeats are removed.
    """

    def load(root: Path, split: str, index: Index, report: Report) -> list[Sample]:
        def read(row: Row) -> Sample:
            scene_id = row.filled("scene_id")
            scene_of(index, scene_id, row)
            if raw:
                references = [text for text in row.strings("answers") if text.strip()]
            else:
                references = row.texts("answers")
            if not references:
                raise row.no_answer("answers")
            return Sample(
                sample_id=f"{report.dataset}-{split}-{row.number}",
                task=task,
                dataset=report.dataset,
                scene_id=scene_id,
                question=row.filled("question"),
                answer=references[0],
                references=references,
            )

        return report.keep(read_rows(annotation_file(root, f"3d_llm_{name}_{split}.json"), report), read)

    return Benchmark(load, lambda split: Inputs((f"annotations/3d_llm_{name}_{split}.json",)))
