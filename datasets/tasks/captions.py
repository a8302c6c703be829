"""Captions of given objects, grouped from descriptions of them: shared by all readers of object captions."""

from collections.abc import Callable, Iterable

import numpy as np

from ..prompts import CAPTION_QUESTION
from ..scene import Sample
from .common import Index, scene_of, target_box
from .problems import Report
from .scanrefer import Description


def to_captions(
    descriptions: Iterable[Description],
    split: str,
    index: Index,
    report: Report,
    *,
    task: str,
    caption: Callable[[Description], str],
) -> list[Sample]:
    """One sample per object, or per description in the training split; references are all captions of the object."""

    def find(one: Description) -> tuple[Description, np.ndarray]:
        return one, target_box(scene_of(index, one.scene_id, one.row), one.object_id, one.row)

    groups: dict[tuple[str, int], list[tuple[Description, np.ndarray]]] = {}
    for one, boxes_K7 in report.keep(descriptions, find):
        groups.setdefault((one.scene_id, one.object_id), []).append((one, boxes_K7))
    samples = []
    for (scene_id, object_id), group in groups.items():
        references = [caption(one) for one, _ in group]
        for one, boxes_K7 in group if split == "train" else group[:1]:
            suffix = f"-{one.ann_id}" if split == "train" else ""
            samples.append(
                Sample(
                    sample_id=f"{report.dataset}-{scene_id}-{object_id}{suffix}",
                    task=task,
                    dataset=report.dataset,
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


def joined_tokens(one: Description) -> str:
    """Scan2Cap's form of a caption: the tokens joined by blanks."""
    return " ".join(one.tokens)
