"""ScanQA: `annotations/ScanQA_v1.0_{train,val,test_w_obj}.json`.

Record: scene_id, object_ids, object_names, question_id, question, answers. The test files have no answers.
"""

from pathlib import Path

from ..scene import Sample
from ..scene_store import as_index
from .common import Scenes, annotation_file, boxes_of, read_rows, scene_of

FILES = {"test": "test_w_obj"}


def load(root: str | Path, split: str, scenes: Scenes) -> list[Sample]:
    """QA samples of one split, targets from object_ids; walls and floors among them have no box."""
    index = as_index(scenes)
    samples = []
    for row in read_rows(annotation_file(root, f"ScanQA_v1.0_{FILES.get(split, split)}.json")):
        scene_id, object_ids = row.filled("scene_id"), row.integers("object_ids")
        # official answers are compared as they stand, so only those that are empty are left out
        answers = [answer for answer in row.get("answers", list, []) if isinstance(answer, str) and answer.strip()]
        if not answers and split != "test":
            raise ValueError(f"{row.place} has no answer; take the row out.")
        samples.append(
            Sample(
                sample_id=row.text("question_id"),
                task="qa",
                dataset="scanqa",
                scene_id=scene_id,
                question=row.filled("question"),
                answer=answers[0].strip() if answers else "",
                references=answers,
                target_object_ids=object_ids,
                target_boxes_K7=boxes_of(scene_of(index, scene_id, row), object_ids, row),
                question_type=question_type(row.text("question")),
                meta={"object_names": row.get("object_names", list, [])},
            )
        )
    return samples


def question_type(question: str) -> str:
    """ScanQA's question types by how the question begins: place, number, color, nature, object or other."""
    words = question.lower()
    for kind, starts in _TYPES:
        if words.startswith(starts):
            return kind
    return "other"


_TYPES = (
    ("place", ("where",)),
    ("number", ("how many",)),
    ("color", ("what color", "what is the color", "what are the color", "what colour")),
    ("nature", ("what type", "what shape", "what kind", "what material", "what size")),
    ("object", ("what",)),
)
