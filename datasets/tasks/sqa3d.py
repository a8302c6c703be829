"""SQA3D, questions asked from a pose in the scene: two files a split,
`annotations/v1_balanced_questions_{split}_scannetv2.json` and `v1_balanced_sqa_annotations_{split}_scannetv2.json`.

The pose: position x, y relative to the middle of the raw (not axis-aligned) cloud's bounding box, z the height in
the raw frame (0 in all released files), and a quaternion under which the agent looks along its own -x axis. Neither
is written in the paper; both were measured on the released test split against the scans' annotated objects (who "sits
on the toilet" is within 0.3 m of one in 139 of 139 cases; who "faces the door" looks within 60 degrees of it in all
but a few per cent).
"""

from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from ..scene import Sample
from .common import Benchmark, Index, Inputs, scene_of
from .problems import Report, RowError
from .rows import Row, annotation_file, first_time, read_json, rows_of, shown

_POSITION, _ROTATION = ("x", "y", "z"), ("_x", "_y", "_z", "_w")
_MAX_NUMBER = 1e6  # metres; also refuses infinities
_HALF_TURN = Rotation.from_euler("z", 180, degrees=True)  # the agent's -x becomes our +x


def to_world_poses(
    position_N3: np.ndarray, quaternion_N4: np.ndarray, axis_align_N44: np.ndarray, raw_middle_N3: np.ndarray
) -> np.ndarray:
    """SQA3D's positions and rotations (xyzw) as world poses [N, 7], each with its own scan's alignment and middle.

    Returns:
        position xyz (metres, world frame) and quaternion xyzw; the agent looks along the +x axis of its own frame,
        its left is +y. float64.
    """
    raw_N3 = position_N3 + raw_middle_N3 * np.array([1.0, 1.0, 0.0])
    turn_N33 = axis_align_N44[:, :3, :3]
    world_N3 = np.einsum("nij,nj->ni", turn_N33, raw_N3) + axis_align_N44[:, :3, 3]
    world = Rotation.from_matrix(turn_N33) * Rotation.from_quat(quaternion_N4) * _HALF_TURN
    return np.concatenate([world_N3, world.as_quat()], axis=1)


def to_world_pose(
    position: Mapping[str, float], rotation: Mapping[str, float], axis_align_44: np.ndarray, raw_middle_3: np.ndarray
) -> np.ndarray:
    """One position {x, y, z} and rotation {_x, _y, _z, _w} as a world pose [7]; see `to_world_poses`."""
    position_3 = np.array([position[name] for name in _POSITION])
    quaternion_4 = np.array([rotation[name] for name in _ROTATION])
    return to_world_poses(position_3[None], quaternion_4[None], axis_align_44[None], raw_middle_3[None])[0]


def from_world_pose(
    pose_7: np.ndarray, axis_align_44: np.ndarray, raw_middle_3: np.ndarray
) -> tuple[dict[str, float], dict[str, float]]:
    """The inverse of `to_world_pose`: SQA3D's position and rotation of a world pose (agent looking along its +x)."""
    raw_3 = np.linalg.inv(axis_align_44)[:3] @ np.append(pose_7[:3], 1.0)
    agent = Rotation.from_matrix(axis_align_44[:3, :3].T) * Rotation.from_quat(pose_7[3:]) * _HALF_TURN
    position = {"x": raw_3[0] - raw_middle_3[0], "y": raw_3[1] - raw_middle_3[1], "z": raw_3[2]}
    rotation = zip(_ROTATION, agent.as_quat().tolist(), strict=True)
    return _floats(position.items()), _floats(rotation)


def _floats(items: Iterable[tuple[str, Any]]) -> dict[str, float]:
    return {name: float(value) for name, value in items}


def facing(pose_7: np.ndarray) -> float:
    """Heading of a world pose: radians counter-clockwise from +x, seen from above."""
    return float(_facings(pose_7[None])[0])


def _facings(poses_N7: np.ndarray) -> np.ndarray:
    forward_N3 = Rotation.from_quat(poses_N7[:, 3:]).apply([1.0, 0.0, 0.0])
    return np.arctan2(forward_N3[:, 1], forward_N3[:, 0])


def question_type(question: str) -> str:
    """what, is, how, can, which or others, by how the question begins (as the field reports it)."""
    words = question.lower()
    return next((kind for kind in ("what", "is", "how", "can", "which") if words.startswith(kind)), "others")


def _numbers(row: Row, field: str, names: tuple[str, ...]) -> list[float]:
    """Named finite numbers of a field."""
    entry = row.get(field, dict)
    for name in names:
        value = entry.get(name)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) < _MAX_NUMBER:
            raise row.bad(
                field, f"{name!r} of {field!r} is {shown(repr(value))}, not a number; use the official file."
            )
    return [float(entry[name]) for name in names]


def _raw_pose(row: Row) -> list[float] | None:
    """Position and quaternion of an annotation, seven numbers; None where it has neither."""
    if "position" not in row.record and "rotation" not in row.record:
        return None
    position_3, quaternion_4 = _numbers(row, "position", _POSITION), _numbers(row, "rotation", _ROTATION)
    if not any(quaternion_4):
        raise row.bad("rotation", "'rotation' is four zeros, which is no rotation; use the official file.")
    return position_3 + quaternion_4


def _answers(row: Row) -> list[str]:
    """Texts of the answers, outer white space, repeats and empty ones removed."""
    answers: list[str] = []
    for entry in row.get("answers", list):
        answer = entry.get("answer") if isinstance(entry, dict) else None
        if not isinstance(answer, str):
            raise row.bad("answers", "'answers' are not records with a text 'answer'; use the official file.")
        answers.append(answer.strip())
    if not any(answers):
        raise row.no_answer("answers")
    return [answer for answer in dict.fromkeys(answers) if answer]


def _by_id(path: Path, key: str, report: Report) -> dict[int, Row]:
    """Records of one of the two files by question id."""
    content = read_json(path)
    if not isinstance(content, dict) or key not in content:
        raise ValueError(f"{path} lacks {key!r}; use the official file.")
    seen: dict[Hashable, int] = {}

    def read(row: Row) -> tuple[int, Row]:
        question_id = row.integer("question_id")
        first_time(seen, question_id, row, "question_id")
        return question_id, row

    return dict(report.keep(rows_of(path, content[key], report), read))


def _orphan(row: Row, other: Path, what: str) -> RowError:
    question_id = row.record["question_id"]
    return row.error(
        "unpaired", "question_id", f": question {question_id} has no {what} in {other.name}; use files of one release."
    )


def _sample(row: Row, answer: Row, index: Index) -> tuple[Sample, list[float] | None]:
    """A question with its annotation; the pose as the file has it."""
    question_id, scene_id = row.integer("question_id"), row.filled("scene_id")
    scene_of(index, scene_id, row)
    if answer.text("scene_id", scene_id) != scene_id:
        raise answer.bad("scene_id", f"question {question_id} is about {scene_id}; use files of one release.")
    references = _answers(answer)
    sample = Sample(
        sample_id=f"sqa3d-{question_id}",
        task="situated_qa",
        dataset="sqa3d",
        scene_id=scene_id,
        question=row.filled("question"),
        answer=references[0],
        references=references,
        situation=row.text("situation"),
        question_type=question_type(row.text("question")),
        meta={
            "alternative_situation": row.texts("alternative_situation"),
            "answer_type": answer.text("answer_type", "other"),
        },
    )
    return sample, _raw_pose(answer)


def _add_poses(found: list[tuple[Sample, list[float] | None]], index: Index, report: Report) -> None:
    """Set world poses and headings of the samples that have one, all at once.

    Poses are in the raw frame; where a scene's is not known they are left out, with a note that counts them.
    """
    given = [(sample, pose_7) for sample, pose_7 in found if pose_7 is not None]
    posed = [(sample, pose_7) for sample, pose_7 in given if index[sample.scene_id].raw_frame_known]
    if len(posed) < len(given):
        lost = sorted({sample.scene_id for sample, _ in given if not index[sample.scene_id].raw_frame_known})
        report.notes.append(
            f"sqa3d, {report.split}: {len(given) - len(posed)} of {len(given)} poses are left out, since the raw "
            f"frame of {len(lost)} scenes is not known, as {lost[0]}; put their <scene_id>.txt (axisAlignment) beside "
            "them and prepare them again. Questions and situations stay."
        )
    if not posed:
        return
    raw_N7 = np.array([pose_7 for _, pose_7 in posed])
    infos = [index[sample.scene_id] for sample, _ in posed]
    poses_N7 = to_world_poses(
        raw_N7[:, :3],
        raw_N7[:, 3:],
        np.stack([info.axis_align_44 for info in infos]),
        np.stack([info.raw_middle_3 for info in infos]),
    )
    for (sample, _), pose_7, heading in zip(posed, poses_N7, _facings(poses_N7).tolist(), strict=True):
        sample.situation_pose_7 = pose_7
        sample.meta["facing"] = heading


def _files(split: str) -> tuple[str, str]:
    return f"v1_balanced_questions_{split}_scannetv2.json", f"v1_balanced_sqa_annotations_{split}_scannetv2.json"


def load(root: Path, split: str, index: Index, report: Report) -> list[Sample]:
    """Situated QA samples of one split, with the situation in words and as a pose in the world frame.

    The pose is None where the annotation has none or the scene's raw frame is not known. Meta: alternative_situation,
    answer_type, and with a pose facing (radians, world frame).
    """
    questions_path, answers_path = (annotation_file(root, name) for name in _files(split))
    questions = _by_id(questions_path, "questions", report)
    answers = _by_id(answers_path, "annotations", report)
    for question_id, row in answers.items():
        if question_id not in questions:
            report.add(_orphan(row, questions_path, "question"))

    def read(row: Row) -> tuple[Sample, list[float] | None]:
        answer = answers.get(row.integer("question_id"))
        if answer is None:
            raise _orphan(row, answers_path, "answer")
        return _sample(row, answer, index)

    found = report.keep(questions.values(), read)
    _add_poses(found, index, report)
    return [sample for sample, _ in found]


BENCHMARK = Benchmark(load, lambda split: Inputs(tuple(f"annotations/{name}" for name in _files(split))))
