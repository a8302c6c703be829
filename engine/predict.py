"""From samples to predictions: greedy answers, boxes resolved to the world frame."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
from PIL import Image
from tqdm import tqdm

from ..datasets.multiview import open_multiview
from ..datasets.prompts import DEFAULT_MODE
from ..datasets.readers import read_scene
from ..datasets.scene import TASKS, Sample, Scene
from ..models.observation import Observation
from ..models.scene_vlm import SceneVLM
from ..utils.predictions import Prediction, write_predictions
from .checkpoint import model_folder
from .data import ObservationCache
from .references import reference_of
from .rollout import Rollout, roll_out
from .runtime import pick_device


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
    """Write the pictures of the views that rollouts were given."""
    shown = {
        view_path(rollout.observation, index): (rollout.observation, index)
        for rollout in rollouts
        for index in rollout.views
    }
    for name, (observation, index) in shown.items():
        assert observation.pool is not None
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        Image.fromarray(observation.pool.images_VHW3[index]).save(partial, format="JPEG")
        os.replace(partial, path)


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
    views_to: Path | None = None,
    progress: str = "",
) -> list[Prediction]:
    """Answer samples greedily, each in its task's response mode.

    Args:
        observations: where scenes are observed and kept.
        modes: response mode by task; a task left out takes its default.
        label: the model's name in the predictions.
        views_to: folder of predictions.jsonl, to which the chosen views' pictures are written too.
        progress: title of a progress bar; none without.
    """
    predictions = []
    with tqdm(total=len(samples), desc=progress, disable=not progress, dynamic_ncols=True, mininterval=1.0) as bar:
        block = 8 * batch_size
        for start in range(0, len(samples), block):
            part = samples[start : start + block]
            rollouts = roll_out(
                model,
                part,
                observations.of(part),
                [modes.get(sample.task, DEFAULT_MODE[sample.task]) for sample in part],
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                on_batch=bar.update,
            )
            if views_to is not None:
                save_views(rollouts, views_to)
            predictions += [to_prediction(model, rollout, label) for rollout in rollouts]
    return predictions


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
    task: str = "qa",
    align: str = "auto",
    out: str | Path | None = None,
    device: str = "auto",
    max_new_tokens: int = 256,
    language_model: str | None = None,
    multiview: str = "",
) -> Answered:
    """Answer questions about one scan, labelled or not.

    Args:
        scene_path: anything that `datasets.readers.read_scene` reads.
        model_path: model folder, checkpoint or run.
        questions: one or more.
        task: how the questions are put (datasets/prompts.py).
        align: "auto" checks up-axis, scale and walls; "none" takes the scan as it is.
        out: folder for predictions.jsonl.
        multiview: HDF5 file of multi-view features, for a model that takes them.

    Raises:
        ValueError: no question, an empty one, an unknown task, unreadable scan, unreadable model.
    """
    if not questions:
        raise ValueError('There is no question: ask one with --ask "…" or give a file with --questions.')
    if not all(question.strip() for question in questions):
        raise ValueError("A question is empty; write it after --ask, in quotes.")
    if task not in TASKS:
        raise ValueError(f"Unknown task {task!r}; choose one of {', '.join(TASKS)}.")
    if task in ("dense_caption", "object_caption"):
        raise ValueError(f"Task {task} asks about a box, not a question; use eval, or ask for it in words with qa.")
    if out and Path(out).exists() and not Path(out).is_dir():
        raise ValueError(f"{out} is a file; name a folder to write the answers to.")
    scene = read_scene(scene_path, align=align)  # type: ignore[arg-type]
    model = SceneVLM.from_pretrained(
        model_folder(model_path), device=pick_device(device), language_model=language_model
    )
    model.multiview = open_multiview(multiview, model.settings.multiview_dim)
    observation = model.observe(scene)
    model.encode([observation])
    samples = [
        Sample(f"{scene.scene_id}-{index}", task, "own", scene.scene_id, question, answer="")
        for index, question in enumerate(questions)
    ]
    rollouts = roll_out(
        model,
        samples,
        [observation] * len(samples),
        [DEFAULT_MODE[task]] * len(samples),
        max_new_tokens=max_new_tokens,
    )
    predictions = [to_prediction(model, rollout, Path(model_path).name) for rollout in rollouts]
    if out:
        save_views(rollouts, Path(out))
        write_predictions(Path(out) / "predictions.jsonl", predictions)
    return Answered(scene, predictions, observation)
