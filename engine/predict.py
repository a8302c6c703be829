"""From samples to predictions: greedy answers, boxes resolved to the world frame."""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from PIL import Image

from ..datasets.alignment import AlignOptions
from ..datasets.multiview import open_multiview
from ..datasets.prompts import DEFAULT_MODE, MODES, dialogue_question
from ..datasets.readers import check_there, read_scene
from ..datasets.scene import TASKS, Sample, Scene
from ..models.observation import Observation
from ..models.scene_vlm import SceneVLM
from ..utils.files import replacing
from ..utils.metrics.dense_caption import filter_proposals
from ..utils.predictions import Prediction, write_predictions
from ..utils.view_cameras import write_camera
from .build import prepare_to_answer
from .checkpoint import model_folder
from .data import ObservationCache
from .questions import Request, checked_box, samples_of
from .references import reference_of
from .rollout import Prompt, Rollout, roll_out, write_prompts
from .runtime import pick_device

_TINY = 1e-30  # a probability whose logarithm is finite
_MOST_OBJECTS = 256  # captioned of one scan
_TOGETHER = 16  # captions decoded at a time


def check_modes(modes: Mapping[str, str], key: str) -> None:
    """ValueError where response modes by task name no task or no mode; `key` is what the configuration calls them."""
    for task, mode in modes.items():
        if task not in TASKS or mode not in MODES:
            raise ValueError(f"{key} has {task}: {mode}; tasks are {', '.join(TASKS)}, modes are {', '.join(MODES)}.")


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
        meta={**reference.meta, "mode": rollout.mode, **({"named": said.named} if said.named else {})},
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
        with replacing(path) as partial:  # processes may share a scene
            Image.fromarray(observation.pool.images_VHW3[index]).save(partial, format="JPEG")
        write_camera(path, observation.pool.cameras[index])


def world_boxes(observation: Observation, boxes: Sequence[Sequence[float]]) -> list[list[float]]:
    """Boxes from the model frame to the scene's world frame."""
    if not boxes:
        return []
    return observation.scene.to_world(np.asarray(boxes, dtype=np.float32)).tolist()


def detected_objects(model: SceneVLM, observation: Observation) -> list[list[float]]:
    """World boxes of the proposals that are captioned officially, by falling objectness.

    Which count as detected is Vote2Cap-DETR's and LL3DA's rule: not empty, best of their class where they overlap,
    and not background.
    """
    (encoded,) = model.encode([observation])
    boxes_K7 = encoded.proposals
    objectness_K1 = encoded.objectness_K[encoded.valid_K, None]
    probs_KC1 = torch.cat([encoded.class_probs_KC[encoded.valid_K], 1 - objectness_K1], dim=1).double()
    kept = filter_proposals(
        boxes_K7,
        probs_KC1.clamp(min=_TINY).log().cpu().numpy(),
        observation.points_N3.numpy(),
        assignment="ll3da",
    )
    kept = kept[np.argsort(-objectness_K1[kept, 0].cpu().numpy(), kind="stable")]
    return world_boxes(observation, boxes_K7[kept].tolist())


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


class Session:
    """One scan before one model, ready to be asked again and again; the scan is looked at once.

    Args:
        model: loaded, in evaluation mode.
        scene: the scan.
        label: the model's name in predictions.
    """

    def __init__(self, model: SceneVLM, scene: Scene, *, label: str = "", max_new_tokens: int = 256):
        self.model, self.scene, self.label = model, scene, label
        self.max_new_tokens = max_new_tokens
        self.observation = model.observe(scene)
        self.turns: list[tuple[str, str]] = []  # of a dialogue: questions and answers
        self._asked = 0
        with torch.no_grad():
            model.encode([self.observation])

    def samples(self, request: Request) -> list[Sample]:
        """What a request asks for; ValueError where it makes no sense of this scan."""
        request.check()
        detected = detected_objects(self.model, self.observation)[:_MOST_OBJECTS] if request.all_objects else []
        if request.all_objects and not detected:
            raise ValueError("Nothing is detected in this scan, so there is nothing to caption; point with --box.")
        return samples_of(request, self.observation, detected)

    def as_prompts(self, samples: Sequence[Sample]) -> list[Prompt]:
        """Samples as they are put to the model, each in its task's usual mode, their views chosen."""
        modes = [DEFAULT_MODE[sample.task] for sample in samples]
        return write_prompts(self.model, samples, [self.observation] * len(samples), modes)

    def answers(
        self, samples: Sequence[Sample], on_text: Callable[[str], object] | None = None
    ) -> Iterator[tuple[Prediction, Rollout]]:
        """Answers in the samples' order; `meta.axis_align` says which frame of the scan they are in.

        Args:
            on_text: called with each answer piece by piece as it is written; they are then decoded one by one, not
                together.
        """
        together = _TOGETHER if on_text is None else 1
        for start in range(0, len(samples), together):
            prompts = self.as_prompts(samples[start : start + together])
            with self.model.telling(on_text) as on_token:
                rollouts = roll_out(self.model, prompts, max_new_tokens=self.max_new_tokens, on_token=on_token)
            for rollout in rollouts:
                prediction = to_prediction(self.model, rollout, self.label)
                prediction.meta["axis_align"] = self.scene.axis_align_44.tolist()
                yield prediction, rollout

    def reply(self, question: str, on_text: Callable[[str], object] | None = None) -> tuple[Prediction, Rollout]:
        """The answer to the next question of a dialogue, which is asked with all that was said before."""
        if not question.strip():
            raise ValueError("The question is empty; say what you want to know about the scene.")
        put, scene_id = dialogue_question(self.turns, question), self.scene.scene_id
        sample = Sample(f"{scene_id}-turn-{self._asked}", "dialogue", "own", scene_id, put, "")
        ((prediction, rollout),) = self.answers([sample], on_text)
        self._asked += 1
        self.turns.append((question.strip(), prediction.answer))
        return prediction, rollout

    def forget(self) -> None:
        """Begin a new dialogue."""
        self.turns.clear()


@dataclass
class Answered:
    """What `infer` hands back: predictions, the scene, the detected objects and the views that were chosen."""

    scene: Scene
    predictions: list[Prediction]
    observation: Observation


def open_model(
    folder: Path, *, device: str = "auto", language_model: str | None = None, multiview: str = ""
) -> SceneVLM:
    """A model to ask, from its folder; ValueError where it takes multi-view features and no file is named."""
    model = prepare_to_answer(
        SceneVLM.from_pretrained(folder, device=pick_device(device), language_model=language_model)
    )
    model.multiview = open_multiview(multiview, model.settings.multiview_dim)
    return model


def open_session(
    scene_path: str | Path,
    model_path: str | Path,
    request: Request | None = None,
    *,
    align: str | AlignOptions = "auto",
    device: str = "auto",
    max_new_tokens: int = 256,
    language_model: str | None = None,
    multiview: str = "",
) -> Session:
    """A scan and a model, read and loaded; what is cheap to check of `request` is checked before.

    Args:
        scene_path: anything that `datasets.readers.read_scene` reads.
        model_path: model folder, checkpoint, run, or name on the hub.
        multiview: HDF5 file of multi-view features, for a model that takes them.
    """
    if request is not None:
        request.check()
    check_there(scene_path)
    folder = model_folder(model_path)
    scene = read_scene(scene_path, align=align)
    for box in request.boxes if request is not None else ():
        checked_box(box, scene)
    model = open_model(folder, device=device, language_model=language_model, multiview=multiview)
    return Session(model, scene, label=Path(model_path).name, max_new_tokens=max_new_tokens)


def check_out(out: str | Path | None) -> None:
    """ValueError where answers cannot go to a folder, before hours of answering."""
    if not out:
        return
    there = next(path for path in (Path(out), *Path(out).absolute().parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"{there} is a file; name a folder to write the answers to.")
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise ValueError(f"Nothing can be written to {out} ({error.strerror}); name another folder.") from None


def infer(
    scene_path: str | Path,
    model_path: str | Path,
    questions: Sequence[str] = (),
    *,
    boxes: Sequence[Sequence[float]] = (),
    clicks: Sequence[Sequence[float]] = (),
    task: str | None = None,
    align: str | AlignOptions = "auto",
    out: str | Path | None = None,
    device: str = "auto",
    max_new_tokens: int = 256,
    language_model: str | None = None,
    multiview: str = "",
) -> Answered:
    """Answer questions about one scan, labelled or not; caption what a box or a click points at, or every object.

    `open_session` gives what this uses: a session that is asked again, streams, and keeps a dialogue.

    Args:
        scene_path, model_path, multiview: as `open_session` takes them.
        questions, boxes, clicks, task: as `Request` takes them.
        align: "auto" checks up-axis, scale and walls; "none" takes the scan as it is; or what is known of its frame.
        out: folder for predictions.jsonl.

    Raises:
        ValueError: nothing to ask, an empty question, a box without points of the scan, an unknown task, unreadable
            scan, unreadable model.
    """
    request = Request(questions, boxes, clicks, task)
    request.check()
    check_out(out)
    session = open_session(
        scene_path,
        model_path,
        request,
        align=align,
        device=device,
        max_new_tokens=max_new_tokens,
        language_model=language_model,
        multiview=multiview,
    )
    answers = list(session.answers(session.samples(request)))
    predictions = [prediction for prediction, _ in answers]
    if out:
        save_views([rollout for _, rollout in answers], Path(out))
        write_predictions(Path(out) / "predictions.jsonl", predictions)
    return Answered(session.scene, predictions, session.observation)
