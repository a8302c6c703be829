"""The benchmarks' own file formats: ScanRefer, Nr3D, ScanQA, SQA3D, 3D-LLM; and atomic writing.

SQA3D's pose, as the released files hold it: `position` x, y is relative to the middle of the RAW (not axis-aligned)
cloud's bounding box, z is the floor's height in the raw frame; under `rotation` (a quaternion about z) the agent looks
along its own -x axis. `datasets.tasks.sqa3d` reads it so and tells how that was found.
"""

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...utils.files import replacing, write_whole
from .grounding import Utterance
from .questions import Pose, Question
from .relations import RoomFacts
from .words import tokenize

NR3D_COLUMNS = (
    "assignmentid",
    "stimulus_id",
    "utterance",
    "correct_guess",
    "speaker_id",
    "listener_id",
    "scan_id",
    "instance_type",
    "target_id",
    "tokens",
    "dataset",
    "mentions_target_class",
    "uses_object_lang",
    "uses_spatial_lang",
    "uses_color_lang",
    "uses_shape_lang",
)
_SPATIAL_KINDS = ("closest", "farthest", "next to", "left of", "right of", "on", "above", "between", "ordinal")


def write_text(path: Path, text: str) -> None:
    """Write a whole file or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_csv(path: Path, rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, partial.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, columns)
        writer.writeheader()
        writer.writerows(rows)


def scanrefer_records(facts: RoomFacts, utterances: Sequence[Utterance]) -> list[dict[str, Any]]:
    """ScanRefer: ids are strings, names have underscores, `ann_id` counts the descriptions of one object."""
    seen: dict[int, int] = {}
    records = []
    for utterance in utterances:
        target = utterance.description.target
        seen[target] = seen.get(target, -1) + 1
        records.append(
            {
                "scene_id": facts.room.scene_id,
                "object_id": str(target),
                "object_name": facts.label(target).replace(" ", "_"),
                "ann_id": str(seen[target]),
                "description": utterance.text,
                "token": tokenize(utterance.text),
            }
        )
    return records


def nr3d_rows(facts: RoomFacts, utterances: Sequence[Utterance], first_id: int) -> list[dict[str, Any]]:
    """Nr3D: `stimulus_id` is scene-label-count-target-distractors; all of them share the target's label."""
    rows = []
    for number, utterance in enumerate(utterances):
        option = utterance.description
        target, label = option.target, facts.label(option.target)
        distractors = [i for i in facts.same_label(target) if i != target]
        stimulus = [facts.room.scene_id, label, len(distractors) + 1, target, *distractors]
        rows.append(
            {
                "assignmentid": first_id + number,
                "stimulus_id": "-".join(map(str, stimulus)),
                "utterance": utterance.text,
                "correct_guess": True,
                "speaker_id": 0,
                "listener_id": 0,
                "scan_id": facts.room.scene_id,
                "instance_type": label,
                "target_id": target,
                "tokens": str(tokenize(utterance.text)),
                "dataset": "nr3d",
                "mentions_target_class": True,
                "uses_object_lang": bool(option.anchors),
                "uses_spatial_lang": option.kind.removeprefix("color+") in _SPATIAL_KINDS,
                "uses_color_lang": option.uses_color,
                "uses_shape_lang": option.uses_size,
            }
        )
    return rows


def scanqa_records(facts: RoomFacts, questions: Sequence[Question], split: str) -> list[dict[str, Any]]:
    """ScanQA: `question_id` is split-scene-number within the scene."""
    scene_id = facts.room.scene_id
    return [
        {
            "scene_id": scene_id,
            "object_ids": list(question.targets),
            "object_names": [facts.label(i) for i in question.targets],
            "question_id": f"{split}-{scene_id.split('_')[0]}-{number}",
            "question": question.question,
            "answers": list(question.answers),
        }
        for number, question in enumerate(questions)
    ]


def raw_pose(facts: RoomFacts, pose: Pose) -> tuple[dict[str, float], dict[str, float]]:
    """(position, rotation) of a pose as SQA3D's files hold them."""
    if facts.room.raw_middle_3 is None:
        raise ValueError(
            f"Room {facts.room.scene_id} has neither vertices nor raw_middle_3; SQA3D's poses need one of them."
        )
    to_raw_44 = np.linalg.inv(facts.room.axis_align_44)
    point_3 = (to_raw_44 @ np.array([pose.x, pose.y, facts.origin_3[2], 1.0]))[:3]
    point_3[:2] -= facts.room.raw_middle_3[:2]
    heading = math.radians(pose.heading)
    ahead_3 = to_raw_44[:3, :3] @ np.array([math.cos(heading), math.sin(heading), 0.0])
    # At no rotation the agent looks along -x, so that the turn is half a circle more than the heading.
    turn = math.atan2(ahead_3[1], ahead_3[0]) - math.pi
    position = {name: float(value) for name, value in zip("xyz", point_3, strict=True)}
    rotation = {"_x": 0, "_y": 0, "_z": math.sin(turn / 2), "_w": math.cos(turn / 2)}
    return position, rotation


def sqa3d_records(
    facts: RoomFacts, questions: Sequence[Question], first_id: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """SQA3D: (questions, annotations) of one room; `question_id` ties them together."""
    asked, annotated = [], []
    for question_id, question in enumerate(questions, first_id):
        if question.pose is None:
            raise ValueError(f"The situated question {question.question!r} has no pose; give it one.")
        position, rotation = raw_pose(facts, question.pose)
        asked.append(
            {
                "scene_id": facts.room.scene_id,
                "situation": question.situation,
                "alternative_situation": list(question.alternatives),
                "question": question.question,
                "question_id": question_id,
            }
        )
        annotated.append(
            {
                "scene_id": facts.room.scene_id,
                "question_type": "N/A",
                "answer_type": "other",
                "question_id": question_id,
                "answers": [
                    {"answer": answer, "answer_confidence": "yes", "answer_id": number}
                    for number, answer in enumerate(question.answers, 1)
                ],
                "rotation": rotation,
                "position": position,
            }
        )
    return asked, annotated


def sqa3d_file(key: str, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The outer object of SQA3D's files; `key` is questions or annotations."""
    return {
        "info": {"description": "Generated rooms in the format of SQA3D.", "version": "1.0"},
        "license": {"name": "MIT"},
        "data_type": "scannet",
        "data_subtype": "v2",
        **({"task_type": "Situated question answering"} if key == "questions" else {}),
        key: list(records),
    }


def text_records(questions: Sequence[Question]) -> list[dict[str, Any]]:
    """3D-LLM's files: the whole history in `question`, one answer."""
    return [{"question": q.question, "answers": [q.answers[0]], "scene_id": q.scene_id} for q in questions]
