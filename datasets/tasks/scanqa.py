"""ScanQA: `annotations/ScanQA_v1.0_{train,val,test_w_obj,test_wo_obj}.json`.

Record: scene_id, object_ids, object_names, question_id, question, answers. The test files have no answers, and
test_wo_obj no objects; the split `test` reads test_w_obj.
"""

from collections.abc import Hashable
from pathlib import Path

from ..scene import Sample
from .common import Benchmark, Index, Inputs, boxes_of, scene_of
from .problems import Report
from .rows import Row, annotation_file, first_time, read_rows


def _file(split: str) -> str:
    return f"ScanQA_v1.0_{'test_w_obj' if split == 'test' else split}.json"


def load(root: Path, split: str, index: Index, report: Report) -> list[Sample]:
    """QA samples of one split, targets from object_ids; walls and floors among them have no box."""
    seen: dict[Hashable, int] = {}

    def read(row: Row) -> Sample:
        question_id, scene_id = row.name("question_id"), row.filled("scene_id")
        first_time(seen, question_id, row, "question_id")
        object_ids = row.integers("object_ids")
        # official answers are compared as they stand, so only those that are empty are left out
        answers = [answer for answer in row.strings("answers", []) if answer.strip()]
        if not answers and not split.startswith("test"):
            raise row.no_answer("answers")
        return Sample(
            sample_id=question_id,
            task="qa",
            dataset="scanqa",
            scene_id=scene_id,
            question=row.filled("question"),
            answer=answers[0].strip() if answers else "",
            references=answers,
            target_object_ids=object_ids,
            target_boxes_K7=boxes_of(scene_of(index, scene_id, row), object_ids, row),
            question_type=question_type(row.text("question")),
            meta={"object_names": row.strings("object_names", [])},
        )

    return report.keep(read_rows(annotation_file(root, _file(split)), report), read)


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
BENCHMARK = Benchmark(load, lambda split: Inputs((f"annotations/{_file(split)}",)))
