"""Scene-30K, the cold-start data: `annotations/Scene-30K.jsonl`, chains of thought with their answers.

Record: scene_id, question, cot (`<think>…</think><answer>…</answer>`); further fields where the data engine wrote
them: question_id, task (default qa), object_ids, gold_answer, question_type, situation.

The released file covers ScanQA's train AND validation scenes. Training reads train scenes only: rows on validation
and test scenes are dropped and counted. `split="val"` reads `Scene-30K_val.jsonl`, which only data of one's own has.
"""

from collections import Counter
from pathlib import Path

import numpy as np

from ...utils.text import parse_response, resolve_boxes, strip_pointers
from ..scannet import read_split
from ..scene import TASKS, Sample
from ..scene_store import SceneInfo
from .common import Benchmark, Index, Inputs, boxes_of, scene_of
from .problems import Report
from .rows import Row, annotation_file, read_rows, shown

FILE = "Scene-30K.jsonl"
VAL_FILE = "Scene-30K_val.jsonl"
HELD_OUT_FILES = ("scannetv2_val.txt", "scannetv2_test.txt")


def held_out_scenes(root: str | Path) -> set[str]:
    """Scenes of the validation split, and of the test split where its list is there."""
    held_out = set(read_split(root, "val"))
    if (Path(root) / "scannetv2_test.txt").exists():
        held_out |= set(read_split(root, "test"))
    return held_out


def load(root: Path, split: str, index: Index, report: Report) -> list[Sample]:
    """Samples with a thought. Rows on held-out scenes and rows that break the answer grammar are dropped and counted.

    Boxes in thoughts and answers are in the model frame, as the file has them.
    """
    path = annotation_file(root, _file(split))
    held_out = held_out_scenes(root) if split != "val" else set()
    dropped: Counter[str] = Counter()

    def read(row: Row) -> Sample | None:
        scene_id = row.text("scene_id")
        if scene_id in held_out:
            dropped["on held-out scenes"] += 1
            return None
        info = scene_of(index, scene_id, row)
        response = parse_response(row.text("cot"))
        if not response.well_formed or not response.think or not response.answer:
            dropped["outside the answer grammar"] += 1
            return None
        return _sample(row, info, response.think, response.answer, split)

    samples = report.keep(read_rows(path, report), read)
    report.notes += dropped_note(path, len(samples), dropped)
    return samples


def dropped_note(path: Path, kept: int, dropped: Counter[str]) -> list[str]:
    """A note for the log on rows that a reader drops by rule; none where it dropped none."""
    if not dropped:
        return []
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()))
    return [f"{path.name}: {kept} rows kept, dropped: {reasons}."]


def _sample(row: Row, info: SceneInfo, think: str, answer: str, split: str) -> Sample:
    task = row.text("task", "qa")
    object_ids = row.integers("object_ids")
    boxes_K7 = boxes_of(info, object_ids, row)
    if not object_ids:
        pointed = np.array(resolve_boxes(answer, []), dtype=np.float32).reshape(-1, 7)
        boxes_K7 = info.to_world(pointed)
    query = boxes_K7[0] if task in ("dense_caption", "object_caption") and len(boxes_K7) else None
    if task not in TASKS:
        raise row.bad("task", f"unknown task {shown(task)!r}; tasks are {', '.join(TASKS)}.")
    return Sample(
        sample_id=f"scene30k-{split}-{row.name('question_id') if 'question_id' in row.record else row.number}",
        task=task,
        dataset="scene30k",
        scene_id=info.scene_id,
        question=row.filled("question"),
        answer=answer,
        think=think,
        references=[row.text("gold_answer", "") or strip_pointers(answer)],
        target_object_ids=object_ids,
        target_boxes_K7=boxes_K7,
        query_box_7=query,
        situation=row.text("situation", ""),
        question_type=row.text("question_type", ""),
    )


def _file(split: str) -> str:
    return VAL_FILE if split == "val" else FILE


def _inputs(split: str) -> Inputs:
    if split == "val":
        return Inputs((f"annotations/{VAL_FILE}",))
    return Inputs((f"annotations/{FILE}", HELD_OUT_FILES[0]), HELD_OUT_FILES[1:])


BENCHMARK = Benchmark(load, _inputs)
