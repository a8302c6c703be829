"""What `infer` is asked: questions, boxes and clicks, checked and put as samples.

Shapes: N points.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from ..datasets.prompts import CAPTION_QUESTION, OBJECT_PLACEHOLDER, dialogue_question, task_named
from ..datasets.scene import Sample, Scene
from ..models.observation import Observation, clicked_box
from ..utils.boxes import points_in_boxes
from .runtime import log

_BESIDE = 1.0  # metres that a click may lie outside of a scan
_DESCRIPTION = "Describe this room."
CAPTION_TASKS = ("dense_caption", "object_caption")
Asked: TypeAlias = tuple[np.ndarray | None, dict[str, Any]]  # the box of an object, world frame, and a sample's `meta`


@dataclass(frozen=True)
class Request:
    """What somebody wants to know of one scan.

    Args:
        questions: one or more, or none where the task needs none. With boxes or clicks each question is asked of each
            object, which stands in it as `{object}`.
        boxes: objects, each centre, size and optional heading in metres, world frame (after alignment). They are
            answered before the clicks.
        clicks: points on objects, world frame; each means the smallest detected box around it, else the nearest.
        task: how the questions are put (datasets/prompts.py); by default `qa`, or `object_caption` for boxes and
            clicks without questions. `dense_caption` without boxes captions every detected object.
        situation: where the one who asks stands and looks, in words, for the task `situated_qa`.
    """

    questions: Sequence[str] = ()
    boxes: Sequence[Sequence[float]] = ()
    clicks: Sequence[Sequence[float]] = ()
    task: str | None = None
    situation: str = ""

    @property
    def pointing(self) -> bool:
        """Whether there is a box or a click."""
        return bool(len(self.boxes) or len(self.clicks))

    @property
    def asked_task(self) -> str:
        """The task by its name in TASKS; ValueError where it is unknown."""
        if self.task:
            return task_named(self.task)
        if self.situation:
            return "situated_qa"
        return "qa" if self.questions or not self.pointing else "object_caption"

    @property
    def all_objects(self) -> bool:
        """Whether every detected object is to be captioned."""
        return self.asked_task == "dense_caption" and not self.pointing

    def check(self) -> None:
        """ValueError where questions, task and objects do not go together."""
        task, pointing = self.asked_task, self.pointing
        if not all(question.strip() for question in self.questions):
            raise ValueError("A question is empty; write it after --ask, in quotes.")
        if (task == "situated_qa") != bool(self.situation.strip()):
            raise ValueError(
                'The task situated_qa goes with --situation, which says where you stand and look, as in "I stand '
                'by the window and facing the desk".'
            )
        if task in CAPTION_TASKS:
            self._check_caption(task)
        elif task == "scene_description":
            if self.questions or pointing:
                raise ValueError("Task scene_description describes the whole room; leave questions and boxes out.")
        elif not self.questions:
            raise ValueError('There is no question: ask one with --ask "…" or give a file with --questions.')
        elif not pointing and any(OBJECT_PLACEHOLDER in question for question in self.questions):
            raise ValueError(f"A question speaks of {OBJECT_PLACEHOLDER}; point at it with --box or --click.")
        elif pointing:
            for question in self.questions:
                if OBJECT_PLACEHOLDER not in question:
                    raise ValueError(
                        f"The question {question!r} does not say where the object stands; write {OBJECT_PLACEHOLDER} "
                        'in its place, as in "What is {object} made of?", or leave --ask out for a caption.'
                    )

    def _check_caption(self, task: str) -> None:
        if task == "object_caption" and not self.pointing:
            raise ValueError(
                f"Task {task} asks about a box, not a question; point at one with --box or --click, or caption every "
                "detected object with --task dense-caption."
            )
        if self.questions:
            raise ValueError(f"Task {task} takes no question besides the box; leave --ask out, or choose --task qa.")


def samples_of(request: Request, observation: Observation, detected: Sequence[Sequence[float]] = ()) -> list[Sample]:
    """A request as samples, objects first.

    Args:
        observation: the scan, encoded.
        detected: boxes of the objects to caption, world frame, where all are asked for.

    Raises:
        ValueError: a box without points of the scan, a click that is far from it.
    """
    task, scene = request.asked_task, observation.scene
    asked: list[Asked] = [(checked_box(box, scene), {}) for box in request.boxes]
    asked += [_clicked(click, observation) for click in request.clicks]
    if request.all_objects:
        asked = [(np.asarray(box, dtype=np.float32), {}) for box in detected]
    elif not asked:
        asked = [(None, {})]
    questions = request.questions or [CAPTION_QUESTION if task in CAPTION_TASKS else _DESCRIPTION]
    if task == "dialogue":  # each is the first of a dialogue of its own
        questions = [dialogue_question((), question) for question in questions]
    return [
        Sample(
            f"{scene.scene_id}-{index}",
            task,
            "own",
            scene.scene_id,
            question,
            "",
            query_box_7=box_7,
            situation=request.situation,
            meta=meta,
        )
        for index, ((box_7, meta), question) in enumerate(itertools.product(asked, questions))
    ]


def checked_box(box: Sequence[float], scene: Scene) -> np.ndarray:
    """A user's box [7], world frame; ValueError where it is none, or holds no point of the scan."""
    shown = ", ".join(f"{number:g}" for number in box)
    if len(box) not in (6, 7) or not np.isfinite(box).all() or min(box[3:6]) <= 0:
        raise ValueError(f"{shown} is no box; give x,y,z,dx,dy,dz, sizes above 0, and a heading where it is turned.")
    box_7 = np.array([*box, 0.0][:7], dtype=np.float32)
    if not bool(points_in_boxes(scene.points_N3, box_7[None]).any()):
        raise ValueError(f"The box {shown} holds no point of the scan, {_extent(scene)}; boxes are in that frame.")
    return box_7


def _extent(scene: Scene) -> str:
    low, high = scene.points_N3.min(0), scene.points_N3.max(0)
    return f"which lies between {_shown(low)} and {_shown(high)} m after alignment"


def _clicked(click: Sequence[float], observation: Observation) -> Asked:
    """The box that a click means, world frame; the sample keeps the click in `meta`."""
    if len(click) != 3:
        raise ValueError(f"A click has three coordinates, x,y,z, not {len(click)}.")
    assert observation.encoded is not None
    points_N3 = observation.scene.points_N3
    outside_3 = np.maximum(points_N3.min(0) - np.asarray(click), np.asarray(click) - points_N3.max(0))
    if np.isfinite(click).all() and outside_3.max() > _BESIDE:
        where = _extent(observation.scene)
        raise ValueError(f"The click {_shown(click)} is far from the scan, {where}; clicks are in that frame.")
    box_7, distance = clicked_box(click, observation.scene, observation.encoded)
    if np.isinf(distance):
        log.warning("nothing is detected in this scan; the click %s means what lies around it", _shown(click))
    elif distance > 0:
        log.warning("the click %s lies in no detected object; the nearest is %.2f m away", _shown(click), distance)
    return box_7, {"query_point": [float(number) for number in click]}


def _shown(point_3: Sequence[float] | np.ndarray) -> str:
    return "(" + ", ".join(f"{number:.2f}" for number in point_3) + ")"
