"""Captions of given objects, grouped from ScanRefer's descriptions: shared by scan2cap and object_caption."""

from collections.abc import Callable
from pathlib import Path

from ..prompts import CAPTION_QUESTION
from ..scene import Sample
from ..scene_store import as_index
from .common import Scenes, boxes_of, scene_of
from .scanrefer import Description, read_descriptions


def load_captions(
    root: str | Path, split: str, scenes: Scenes, *, dataset: str, task: str, caption: Callable[[Description], str]
) -> list[Sample]:
    """One sample per object, or per description in the training split; references are all captions of the object."""
    index = as_index(scenes)
    groups: dict[tuple[str, int], list[Description]] = {}
    for one in read_descriptions(root, split):
        groups.setdefault((one.scene_id, one.object_id), []).append(one)
    samples = []
    for (scene_id, object_id), group in groups.items():
        row = group[0].row
        boxes_K7 = boxes_of(scene_of(index, scene_id, row), [object_id], row)
        if len(boxes_K7) == 0:
            raise ValueError(f"{row.place} describes object {object_id}, a wall, floor or ceiling without a box.")
        references = [caption(one) for one in group]
        for one in group if split == "train" else group[:1]:
            suffix = f"-{one.ann_id}" if split == "train" else ""
            samples.append(
                Sample(
                    sample_id=f"{dataset}-{scene_id}-{object_id}{suffix}",
                    task=task,
                    dataset=dataset,
                    scene_id=scene_id,
                    question=CAPTION_QUESTION,
                    answer=caption(one),
                    references=references,
                    target_object_ids=[object_id],
                    target_boxes_K7=boxes_K7,
                    query_box_7=boxes_K7[0],
                    meta={"object_id": object_id, "object_name": one.object_name},
                )
            )
    return samples
