"""From samples to predictions: greedy answers, boxes resolved to the world frame."""

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from ..datasets.multiview import open_multiview
from ..datasets.prompts import CAPTION_QUESTION, DEFAULT_MODE, OBJECT_PLACEHOLDER
from ..datasets.readers import read_scene
from ..datasets.scene import TASKS, Sample, Scene
from ..models.observation import Observation, clicked_box
from ..models.scene_vlm import SceneVLM
from ..utils.boxes import points_in_boxes
from ..utils.predictions import Prediction, write_predictions
from ..utils.view_cameras import write_camera
from .checkpoint import model_folder
from .data import ObservationCache
from .references import reference_of
from .rollout import Rollout, roll_out, write_prompts
from .runtime import log, pick_device

_BESIDE = 1.0  # metres that a click may lie outside of a scan
CAPTION_TASKS = ("dense_caption", "object_caption")
Asked: TypeAlias = tuple[np.ndarray | None, dict[str, Any]]  # the box of an object, world frame, and a sample's `meta`


def to_prediction(model: SceneVLM, rollout: Rollout, label: str) -> Prediction:
    """The first completion of a rollout as a prediction."""
    sample, observation = rollout.sample, rollout.observation
    said = model.read_answer(rollout.texts[0], observation)
    reference = reference_of(sample)
    return replace(
        reference,
        text=said.text,
        think=said.think,
        answer=said.answer,
        well_formed=said.well_formed,
        boxes=said.boxes,
        views=[view_path(observation, index) for index in rollout.views],
        model=label,
        truncated=not rollout.finished[0],
        meta={**reference.meta, "mode": rollout.mode},
    )


def view_path(observation: Observation, index: int) -> str:
    """Where a view's picture lies, relative to the prediction file."""
    assert observation.pool is not None
    return f"views/{observation.scene.scene_id}/{observation.pool.names[index].replace(' ', '-')}.jpg"


def save_views(rollouts: Sequence[Rollout], folder: Path) -> None:
    """Write the pictures of the views that rollouts were given, and the camera of each beside it."""
    shown = {
        view_path(rollout.observation, index): (rollout.observation, index)
        for rollout in rollouts
        for index in rollout.views
    }
    for name, (observation, index) in shown.items():
        assert observation.pool is not None
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")  # processes may share a scene
        Image.fromarray(observation.pool.images_VHW3[index]).save(partial, format="JPEG")
        os.replace(partial, path)
        write_camera(path, observation.pool.cameras[index])


def world_boxes(observation: Observation, boxes: Sequence[Sequence[float]]) -> list[list[float]]:
    """Boxes from the model frame to the scene's world frame."""
    if not boxes:
        return []
    return observation.scene.to_world(np.asarray(boxes, dtype=np.float32)).tolist()


def answer(
    model: SceneVLM,
    samples: Sequence[Sample],
    observations: ObservationCache,
    *,
    modes: Mapping[str, str] = MappingProxyType({}),
    label: str = "",
    max_new_tokens: int = 256,
    batch_size: int = 16,
    token_budget: int = 0,
    views_to: Path | None = None,
    on_batch: Callable[[int], object] | None = None,
) -> list[Prediction]:
    """Answer samples greedily, each in its task's response mode.

    Args:
        observations: where scenes are observed and kept.
        modes: response mode by task; a task left out takes its default.
        label: the model's name in the predictions.
        batch_size, token_budget, on_batch: as in `roll_out`.
        views_to: folder of predictions.jsonl, to which the chosen views' pictures are written too.
    """
    asked = [modes.get(sample.task, DEFAULT_MODE[sample.task]) for sample in samples]
    rollouts = roll_out(
        model,
        write_prompts(model, samples, observations.of(samples), asked),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        token_budget=token_budget,
        on_batch=on_batch,
    )
    if views_to is not None:
        save_views(rollouts, views_to)
    return [to_prediction(model, rollout, label) for rollout in rollouts]


@dataclass
class Answered:
    """What `infer` hands back: predictions, the scene, the detected objects and the views that were chosen."""

    scene: Scene
    predictions: list[Prediction]
    observation: Observation


def infer(
    scene_path: str | Path,
    model_path: str | Path,
    questions: Sequence[str],
    *,
    boxes: Sequence[Sequence[float]] = (),
    clicks: Sequence[Sequence[float]] = (),
    task: str | None = None,
    align: str = "auto",
    out: str | Path | None = None,
    device: str = "auto",
    max_new_tokens: int = 256,
    language_model: str | None = None,
    multiview: str = "",
) -> Answered:
    """Answer questions about one scan, labelled or not; caption what a box or a click points at.

    Args:
        scene_path: anything that `datasets.readers.read_scene` reads.
        model_path: model folder, checkpoint or run.
        questions: one or more, or none where objects are to be captioned. With boxes or clicks each question is asked
            of each object, which stands in it as `{object}`.
        boxes: objects, each centre, size and optional heading in metres, world frame (after alignment). They are
            answered before the clicks.
        clicks: points on objects, world frame; each means the smallest detected box around it, else the nearest.
        task: how the questions are put (datasets/prompts.py); by default `qa`, or `object_caption` without questions.
        align: "auto" checks up-axis, scale and walls; "none" takes the scan as it is.
        out: folder for predictions.jsonl.
        multiview: HDF5 file of multi-view features, for a model that takes them.

    Raises:
        ValueError: nothing to ask, an empty question, a box without points of the scan, an unknown task, unreadable
            scan, unreadable model.
    """
    pointing = bool(len(boxes) or len(clicks))
    task = task or ("qa" if questions or not pointing else "object_caption")
    _check_questions(questions, task, pointing)
    if out and Path(out).exists() and not Path(out).is_dir():
        raise ValueError(f"{out} is a file; name a folder to write the answers to.")
    scene = read_scene(scene_path, align=align)  # type: ignore[arg-type]
    asked: list[Asked] = [(_checked_box(box, scene), {}) for box in boxes]
    model = SceneVLM.from_pretrained(
        model_folder(model_path), device=pick_device(device), language_model=language_model
    )
    model.multiview = open_multiview(multiview, model.settings.multiview_dim)
    observation = model.observe(scene)
    model.encode([observation])
    asked += [_clicked(click, observation) for click in clicks]
    pairs = itertools.product(asked or [(None, {})], questions or [CAPTION_QUESTION])
    samples = [
        Sample(f"{scene.scene_id}-{index}", task, "own", scene.scene_id, question, "", query_box_7=box_7, meta=meta)
        for index, ((box_7, meta), question) in enumerate(pairs)
    ]
    prompts = write_prompts(model, samples, [observation] * len(samples), [DEFAULT_MODE[task]] * len(samples))
    rollouts = roll_out(model, prompts, max_new_tokens=max_new_tokens)
    predictions = [to_prediction(model, rollout, Path(model_path).name) for rollout in rollouts]
    if out:
        save_views(rollouts, Path(out))
        write_predictions(Path(out) / "predictions.jsonl", predictions)
    return Answered(scene, predictions, observation)


def _check_questions(questions: Sequence[str], task: str, pointing: bool) -> None:
    """ValueError where questions, task and objects (`pointing`: there are some) do not go together."""
    if task not in TASKS:
        raise ValueError(f"Unknown task {task!r}; choose one of {', '.join(TASKS)}.")
    if not all(question.strip() for question in questions):
        raise ValueError("A question is empty; write it after --ask, in quotes.")
    if task in CAPTION_TASKS:
        if not pointing:
            raise ValueError(f"Task {task} asks about a box, not a question; point at one with --box or --click.")
        if questions:
            raise ValueError(f"Task {task} takes no question besides the box; leave --ask out, or choose --task qa.")
    elif not questions:
        raise ValueError('There is no question: ask one with --ask "…" or give a file with --questions.')
    elif not pointing and any(OBJECT_PLACEHOLDER in question for question in questions):
        raise ValueError(f"A question speaks of {OBJECT_PLACEHOLDER}; point at it with --box or --click.")
    elif pointing:
        for question in questions:
            if OBJECT_PLACEHOLDER not in question:
                raise ValueError(
                    f"The question {question!r} does not say where the object stands; write {OBJECT_PLACEHOLDER} in "
                    'its place, as in "What is {object} made of?", or leave --ask out for a caption.'
                )


def _checked_box(box: Sequence[float], scene: Scene) -> np.ndarray:
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
