"""Scene-30K, the cold-start data: `annotations/Scene-30K.jsonl`, chains of thought with their answers.

Record: scene_id, question, cot (`<think>…</think><answer>…</answer>`); further fields where the data engine wrote
them: question_id, task (default qa), object_ids, gold_answer, question_type, situation.

The released file covers ScanQA's train AND validation scenes. Training reads train scenes only: rows on validation
and test scenes are dropped and counted. `split="val"` reads `Scene-30K_val.jsonl`, which only data of one's own has.
"""

import logging
from collections import Counter
from pathlib import Path

import numpy as np

from ...utils.text import parse_response, resolve_boxes, strip_pointers
from ..scannet import read_split
from ..scene import Sample
from ..scene_store import SceneInfo, as_index
from .common import Row, Scenes, annotation_file, boxes_of, read_rows, scene_of

FILE = "Scene-30K.jsonl"
VAL_FILE = "Scene-30K_val.jsonl"
_log = logging.getLogger(__name__)


def held_out_scenes(root: str | Path) -> set[str]:
    """Scenes of the validation split, and of the test split where its list is there."""
    held_out = set(read_split(root, "val"))
    if (Path(root) / "scannetv2_test.txt").exists():
        held_out |= set(read_split(root, "test"))
    return held_out


def count_leaked(root: str | Path) -> tuple[int, int]:
    """Rows of Scene-30K on held-out scenes, and all rows."""
    held_out = held_out_scenes(root)
    total = leaked = 0
    for row in read_rows(annotation_file(root, FILE)):
        total += 1
        leaked += row.text("scene_id") in held_out
    return leaked, total


def load(root: str | Path, split: str, scenes: Scenes) -> list[Sample]:
    """Samples with a thought. Rows on held-out scenes and rows that break the answer grammar are dropped and logged.

    Boxes in thoughts and answers are in the model frame, as the file has them.
    """
    index = as_index(scenes)
    path = annotation_file(root, VAL_FILE if split == "val" else FILE)
    held_out = held_out_scenes(root) if split != "val" else set()
    dropped: Counter[str] = Counter()
    samples = []
    for row in read_rows(path):
        scene_id = row.text("scene_id")
        if scene_id in held_out:
            dropped["on held-out scenes"] += 1
            continue
        info = scene_of(index, scene_id, row)
        response = parse_response(row.text("cot"))
        if not response.well_formed or not response.think or not response.answer:
            dropped["outside the answer grammar"] += 1
            continue
        samples.append(_sample(row, info, response.think, response.answer, split))
    if dropped:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()))
        _log.warning("%s: %d rows kept, dropped: %s.", path.name, len(samples), reasons)
    return samples


def _sample(row: Row, info: SceneInfo, think: str, answer: str, split: str) -> Sample:
    task = row.text("task", "qa")
    object_ids = row.integers("object_ids")
    boxes_K7 = boxes_of(info, object_ids, row)
    if not object_ids:
        pointed = np.array(resolve_boxes(answer, []), dtype=np.float32).reshape(-1, 7)
        boxes_K7 = info.to_world(pointed)
    query = boxes_K7[0] if task in ("dense_caption", "object_caption") and len(boxes_K7) else None
    try:
        return Sample(
            sample_id=f"scene30k-{split}-{row.record.get('question_id', row.number)}",
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
    except ValueError as error:
        raise ValueError(f"{row.place}: {error}") from None
