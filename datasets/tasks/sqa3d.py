"""SQA3D, questions asked from a pose in the scene: two files a split,
`annotations/v1_balanced_questions_{split}_scannetv2.json` and `v1_balanced_sqa_annotations_{split}_scannetv2.json`.

The pose: position x, y relative to the middle of the raw (not axis-aligned) cloud's bounding box, z the height in
the raw frame (0 in all released files), and a quaternion under which the agent looks along its own -x axis. Neither
is written in the paper; both were measured on the released test split against the scans' annotated objects (who "sits
on the toilet" is within 0.3 m of one in 139 of 139 cases; who "faces the door" looks within 60 degrees of it in all
but a few per cent).
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from ..scene import Sample
from ..scene_store import SceneInfo, as_index
from .common import Row, Scenes, annotation_file, read_json, rows_of, scene_of

_HALF_TURN = Rotation.from_euler("z", 180, degrees=True)  # the agent's -x becomes our +x


def to_world_pose(
    position: Mapping[str, float], rotation: Mapping[str, float], axis_align_44: np.ndarray, raw_middle_3: np.ndarray
) -> np.ndarray:
    """SQA3D's position {x, y, z} and rotation {_x, _y, _z, _w} as a world pose [7].

    Returns:
        position xyz (metres, world frame) and quaternion xyzw; the agent looks along the +x axis of its own frame,
        its left is +y. float64.
    """
    raw_3 = np.array([position["x"] + raw_middle_3[0], position["y"] + raw_middle_3[1], position["z"]])
    world_3 = axis_align_44[:3, :3] @ raw_3 + axis_align_44[:3, 3]
    agent = Rotation.from_quat([rotation[name] for name in ("_x", "_y", "_z", "_w")])
    world = Rotation.from_matrix(axis_align_44[:3, :3]) * agent * _HALF_TURN
    return np.concatenate([world_3, world.as_quat()])


def from_world_pose(
    pose_7: np.ndarray, axis_align_44: np.ndarray, raw_middle_3: np.ndarray
) -> tuple[dict[str, float], dict[str, float]]:
    """The inverse of `to_world_pose`: SQA3D's position and rotation of a world pose (agent looking along its +x)."""
    raw_3 = np.linalg.inv(axis_align_44)[:3] @ np.append(pose_7[:3], 1.0)
    agent = Rotation.from_matrix(axis_align_44[:3, :3].T) * Rotation.from_quat(pose_7[3:]) * _HALF_TURN
    position = {"x": raw_3[0] - raw_middle_3[0], "y": raw_3[1] - raw_middle_3[1], "z": raw_3[2]}
    rotation = zip(("_x", "_y", "_z", "_w"), agent.as_quat().tolist(), strict=True)
    return _floats(position.items()), _floats(rotation)


def _floats(items: Iterable[tuple[str, Any]]) -> dict[str, float]:
    return {name: float(value) for name, value in items}


def facing(pose_7: np.ndarray) -> float:
    """Heading of a world pose: radians counter-clockwise from +x, seen from above."""
    forward_3 = Rotation.from_quat(pose_7[3:]).apply([1.0, 0.0, 0.0])
    return float(np.arctan2(forward_3[1], forward_3[0]))


def question_type(question: str) -> str:
    """what, is, how, can, which or others, by how the question begins (as the field reports it)."""
    words = question.lower()
    return next((kind for kind in ("what", "is", "how", "can", "which") if words.startswith(kind)), "others")


def _pose(row: Row, info: SceneInfo) -> np.ndarray | None:
    if "position" not in row.record:
        return None
    try:
        return to_world_pose(row.record["position"], row.record["rotation"], info.axis_align_44, info.raw_middle_3)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{row.place}: position or rotation is not SQA3D's ({error}); use the official file."
        ) from None


def _answers(row: Row) -> list[str]:
    try:
        answers = [str(entry["answer"]).strip() for entry in row.get("answers", list)]
    except (KeyError, TypeError):
        raise ValueError(f"{row.place}: 'answers' are not records with 'answer'; use the official file.") from None
    if not any(answers):
        raise ValueError(f"{row.place} has no answer; take the row out.")
    return [answer for answer in dict.fromkeys(answers) if answer]


def _records(path: Path, key: str) -> Any:
    content = read_json(path)
    if not isinstance(content, dict) or key not in content:
        raise ValueError(f"{path} lacks {key!r}; use the official file.")
    return content[key]


def load(root: str | Path, split: str, scenes: Scenes) -> list[Sample]:
    """Situated QA samples of one split, with the situation in words and as a pose in the world frame.

    Meta: alternative_situation, answer_type, facing (radians, world frame).
    """
    index = as_index(scenes)
    questions_path = annotation_file(root, f"v1_balanced_questions_{split}_scannetv2.json")
    answers_path = annotation_file(root, f"v1_balanced_sqa_annotations_{split}_scannetv2.json")
    answers = {row.integer("question_id"): row for row in rows_of(answers_path, _records(answers_path, "annotations"))}
    samples = []
    for row in rows_of(questions_path, _records(questions_path, "questions")):
        question_id, scene_id = row.integer("question_id"), row.filled("scene_id")
        if question_id not in answers:
            raise ValueError(f"{row.place}: question {question_id} has no answer in {answers_path.name}.")
        answer = answers[question_id]
        info = scene_of(index, scene_id, row)
        if answer.text("scene_id", scene_id) != scene_id:
            raise ValueError(f"{answer.place}: question {question_id} is about {scene_id}; use files of one release.")
        pose_7 = _pose(answer, info)
        references = _answers(answer)
        meta = {
            "alternative_situation": row.texts("alternative_situation"),
            "answer_type": answer.text("answer_type", "other"),
        }
        samples.append(
            Sample(
                sample_id=f"sqa3d-{question_id}",
                task="situated_qa",
                dataset="sqa3d",
                scene_id=scene_id,
                question=row.filled("question"),
                answer=references[0],
                references=references,
                situation=row.text("situation"),
                situation_pose_7=pose_7,
                question_type=question_type(row.text("question")),
                meta=meta if pose_7 is None else {**meta, "facing": facing(pose_7)},
            )
        )
    return samples
