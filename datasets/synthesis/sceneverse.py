"""Questions in the form of SceneVerse: every `.json` (a list) or `.jsonl` file below `annotations/sceneverse/`.

Two kinds of rows, which may stand in one file:

- a description of one object, as SceneVerse's `refer/ssg_ref_*.json` files have them: scan_id (or scene_id),
  target_id, utterance (or description), and where they are there item_id and instance_type;
- a question, our own addition: scene_id (or scan_id), question, answers (texts; or answer, one text), and where they
  are there object_ids and question_id.

The files are not divided by split, so rows about scenes outside the split's list are left out and counted, as are
descriptions of walls, floors and ceilings, which have no box.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from ...utils.text import format_box
from ..scannet import read_split
from ..scene import Sample
from ..scene_store import SceneInfo
from ..tasks.common import boxes_of, scene_of
from ..tasks.problems import Report, in_one_sentence
from ..tasks.rows import Row, read_rows

FOLDER = "sceneverse"


def sceneverse_files(root: str | Path) -> list[Path]:
    """The files of the source, by name; empty where there is none."""
    folder = Path(root) / "annotations" / FOLDER
    return sorted(path for path in folder.glob("*.json*") if path.suffix in (".json", ".jsonl"))


def load_sceneverse(
    root: str | Path, split: str, index: Mapping[str, SceneInfo], left_out: Counter[str]
) -> list[Sample]:
    """Samples of the split's scenes, tasks grounding and qa; `left_out` takes the counts of what is not read.

    Raises:
        ValueError: a file that is not JSON, or a row that names no scene, text, answer or object that is there.
    """
    listed = set(read_split(root, split))
    report = Report(FOLDER, split)

    def read(row: Row) -> Sample | None:
        scene_id = row.filled("scan_id" if "scan_id" in row.record else "scene_id")
        if scene_id not in listed:
            left_out["other_split"] += 1
            return None
        info = scene_of(index, scene_id, row)
        if "question" in row.record:
            return _asked(row, info)
        sample = _described(row, info)
        left_out["no_box"] += sample is None
        return sample

    samples = []
    for path in sceneverse_files(root):
        samples += report.keep(read_rows(path, report), read)
    if report.problems:
        raise ValueError(in_one_sentence(report.problems))
    return samples


def _name(row: Row, field: str) -> str:
    own = row.name(field) if field in row.record else str(row.number)
    return f"{row.path.stem}-{own}"


def _asked(row: Row, info: SceneInfo) -> Sample:
    answers = [row.filled("answer")] if "answer" in row.record else row.texts("answers")
    if not answers:
        raise row.no_answer("answers")
    object_ids = row.integers("object_ids")
    return Sample(
        sample_id=_name(row, "question_id"),
        task="qa",
        dataset=FOLDER,
        scene_id=info.scene_id,
        question=row.filled("question"),
        answer=answers[0],
        references=answers,
        target_object_ids=object_ids,
        target_boxes_K7=boxes_of(info, object_ids, row),
    )


def _described(row: Row, info: SceneInfo) -> Sample | None:
    object_id = row.integer("target_id")
    boxes_17 = boxes_of(info, [object_id], row)
    if not len(boxes_17):
        return None
    number = info.row_of(object_id)
    assert number is not None
    label = info.object_labels[number]
    name = row.text("instance_type", label).replace("_", " ")
    return Sample(
        sample_id=_name(row, "item_id"),
        task="grounding",
        dataset=FOLDER,
        scene_id=info.scene_id,
        question=row.filled("utterance" if "utterance" in row.record else "description"),
        answer=f"{name} {format_box(info.to_model(boxes_17)[0].tolist())}",
        references=[name],
        target_object_ids=[object_id],
        target_boxes_K7=boxes_17,
        meta={"instance_type": name},
    )
