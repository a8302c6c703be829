"""What the view selector makes of a scene and a question: every candidate view, its scores, and the choice.

Shapes: V views, K boxes, C classes, H rows, W columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from ..datasets.alignment import AlignOptions
from ..datasets.multiview import open_multiview
from ..datasets.readers import read_scene
from ..datasets.scene import Scene
from ..models.image_encoder import load_text_encoder
from ..models.scene_vlm import SceneVLM
from ..models.view_kinds import kinds_of
from ..models.view_pool import ViewPool, build_view_pool
from ..models.view_selector import ViewSelector
from ..utils.labels import NUM_CLASSES
from .checkpoint import model_folder
from .config import ViewsConfig
from .runtime import pick_device

SENTENCE_ENCODER = "all-MiniLM-L6-v2"  # comes with a package, so that it works offline; it reads text only


@dataclass(frozen=True, eq=False)
class ScoredViews:
    """All candidate views for one question, as arrays that a picture can be made of.

    `scores` are those of the selector (text_to_3d, image_to_3d, clip, utility), each [V]; clip is left out where the
    encoder has no picture side. `taken_off_V` is what redundancy took off the utility; `chosen` are indices, best
    first; `assumed` is what reading the scan assumed.
    """

    question: str
    images_VHW3: np.ndarray  # uint8
    names: list[str]
    scores: dict[str, np.ndarray]
    taken_off_V: np.ndarray
    chosen: list[int]
    notes: list[str]
    assumed: list[str]


def score_views(
    scene_path: str | Path,
    questions: Sequence[str],
    *,
    model_path: str | Path | None = None,
    language_model: str | None = None,
    multiview: str = "",
    encoder: str = SENTENCE_ENCODER,
    source: str | None = None,
    num_candidates: int | None = None,
    align: str | AlignOptions = "auto",
    seed: int = 0,
    device: str = "auto",
) -> list[ScoredViews]:
    """Score the candidate views of one scan for each question.

    Args:
        scene_path: anything that `datasets.readers.read_scene` reads.
        model_path: a trained model, whose scene encoder detects and whose selector chooses. Without one, the scan's
            own labelled boxes stand for detections, and the selector has the fixed weights of `ViewsConfig`.
        encoder: without a model, the encoder of questions and pictures.
        source: kinds of candidate views (models/view_kinds.py); None takes the model's, else `mixed`.
        num_candidates: None takes the model's, else 16.
        seed: everything random follows from it.

    Raises:
        ValueError: no question or an empty one, an unreadable scan, model or encoder, a source of no views.
    """
    if not questions:
        raise ValueError('There is no question for the views; ask one with --ask "…".')
    if not all(question.strip() for question in questions):
        raise ValueError("A question is empty; write it after --ask, in quotes.")
    if source is not None and not kinds_of(source):
        raise ValueError(f"Source {source!r} makes no views to look at; choose another.")
    scene = read_scene(scene_path, align=align)
    if model_path is not None:
        model = SceneVLM.from_pretrained(
            model_folder(model_path), device=pick_device(device), language_model=language_model
        )
        model.multiview = open_multiview(multiview, model.settings.multiview_dim)
        selector, pool, probs_KC, notes = _by_model(model, scene, source, num_candidates, seed)
    else:
        candidates = num_candidates or ViewsConfig().num_candidates
        selector, pool, probs_KC, notes = _by_encoder(
            scene, encoder, source or "mixed", candidates, seed, pick_device(device)
        )
    notes = [f"{scene.scene_id}, {len(pool)} candidate views, {len(probs_KC)} {notes[0]}", *notes[1:]]
    return [replace(_scored(selector, question, pool, probs_KC, notes), assumed=scene.notes) for question in questions]


def _by_model(
    model: SceneVLM, scene: Scene, source: str | None, num_candidates: int | None, seed: int
) -> tuple[ViewSelector, ViewPool, torch.Tensor, list[str]]:
    """A model's selector, its candidate views of the scene and its detections' class probabilities [K, C]."""
    if model.view_selector is None:
        raise ValueError("This model takes no views, so it chooses none; name another, or an encoder with --encoder.")
    model.settings = replace(
        model.settings,
        view_source=source or model.settings.view_source,
        num_candidates=num_candidates or model.settings.num_candidates,
    )
    observation = model.observe(scene, seed)
    with torch.no_grad():
        (encoded,) = model.encode([observation])
        pool = model.view_pool(observation)
    probs_KC = encoded.host_probs_nC
    return model.view_selector, pool, probs_KC, ["detected objects"]


def _by_encoder(
    scene: Scene, encoder_name: str, source: str, num_candidates: int, seed: int, device: torch.device
) -> tuple[ViewSelector, ViewPool, torch.Tensor, list[str]]:
    """The selector with fixed weights, the scene's candidate views and its own boxes' classes, one-hot [K, C]."""
    config = ViewsConfig()
    encoder = load_text_encoder(encoder_name)
    w_image, w_clip = (config.w_image, config.w_clip) if encoder.has_images else (1.0, 0.0)
    selector = ViewSelector(
        encoder,
        encoder_name=encoder_name,
        num_views=config.num_views,
        w_text=config.w_text,
        w_image=w_image,
        w_clip=w_clip,
        redundancy=config.redundancy,
    ).to(device)
    size = (config.image_size, config.image_size)
    pool = build_view_pool(
        scene, source=source, num_candidates=num_candidates, image_size=size, seed=seed, device=device
    )
    classes_K = torch.from_numpy(np.asarray(scene.class_ids_K)).long()
    notes = ["labelled objects"]
    if not len(classes_K):
        notes.append("No objects are known, so the question is not compared with what views show of the 3D scene")
    return selector, pool, torch.nn.functional.one_hot(classes_K, NUM_CLASSES).float(), notes


@torch.no_grad()
def _scored(
    selector: ViewSelector, question: str, pool: ViewPool, probs_KC: torch.Tensor, notes: list[str]
) -> ScoredViews:
    """One question's scores and choice as arrays."""
    selection = selector.select(question, pool, probs_KC)
    scores = {name: value.cpu().numpy() for name, value in selection.scores.items()}
    weights = f"weights: text {float(selector.w_text):.2f}, image {float(selector.w_image):.2f}"
    if selector.encoder.has_images:
        weights += f", CLIP {1 - float(selector.w_image):.2f}"
    else:
        scores.pop("clip")
        weights += " (the encoder reads text only: no CLIP score)"
    how = f"{len(selection.indices)} chosen by {Path(selector.encoder_name).name}, {weights}"
    taken_off_V = scores["utility"] - selection.marginal_V.cpu().numpy()
    return ScoredViews(
        question=question,
        images_VHW3=pool.images_VHW3,
        names=pool.names,
        scores=scores,
        taken_off_V=taken_off_V,
        chosen=selection.indices,
        notes=[notes[0], how, *notes[1:]],
        assumed=[],
    )
