"""Object captioning by CLIP: captions against pictures of their objects, with a model that the result names.

Similarity and retrieval say little without the model's name, and numbers of two models do not compare.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from ..models.image_encoder import load_text_encoder
from ..utils.json_rows import Problem, refuse
from ..utils.metrics.answer_rows import read_answers
from ..utils.metrics.files import join, load_scored_pairs
from ..utils.metrics.object_caption import clip_scores
from ..utils.metrics.rows import answer_text
from ..utils.metrics.score import result_of
from ..utils.predictions import Prediction
from .references import load_references

TASK, SCORER = "object_caption", "clip"
SUFFIXES = (".png", ".jpg", ".jpeg")
_TOGETHER = 64  # pictures held in memory at a time


def score_file(
    task: str,
    predictions: str | Path,
    *,
    model: str | None,
    images: str | Path | None,
    references: str | Path | None = None,
    root: str | Path | None = None,
    dataset: str | None = None,
    split: str | None = None,
) -> dict:
    """Score a prediction file by CLIP, as `score_captions` does.

    Args:
        model: CLIP or SigLIP model by hub name or folder.
        images: folder with a picture of each object, named by the sample.
        references: reference file that says which objects are evaluated; or `root`, `dataset` and `split` of a data
            set; without either, those that the prediction file names.
    """
    if task != TASK:
        raise ValueError(f"The scorer clip is for {TASK}, not for {task}.")
    if not model or not images:
        raise ValueError("The scorer clip needs --clip-model (a hub name or a folder) and --images (a folder).")
    if root and dataset and split:
        captions = join(load_references(task, root, dataset, split), predictions, source=f"{dataset}, {split}")
    elif references:
        captions = load_scored_pairs(task, references, predictions)
    else:
        problems: list[Problem] = []
        captions = read_answers(task, predictions, problems).entries
        refuse(problems)
    return score_captions(captions, model, images)


def score_captions(captions: Sequence[Prediction], model: str, images: str | Path) -> dict:
    """CLIP similarity and retrieval recall R@1/5/10 of captions, each against the picture `<sample id>.png` (or .jpg).

    An empty caption counts as the empty text. The result has the form of `score_predictions` and names the model.

    Raises:
        ValueError: no caption, a caption given twice, a missing or unreadable picture, or a model without pictures.
    """
    names = [entry.sample_id for entry in captions]
    name, count = next(iter(Counter(names).most_common(1)), ("", 0))
    if count > 1:
        raise ValueError(f"Sample {name} occurs {count} times; keep one caption of each object.")
    if not names:
        raise ValueError(f"There is nothing to score: no predictions of task {TASK}.")
    paths = find_images(names, images)
    encoder = load_text_encoder(model)
    if not encoder.has_images:
        raise ValueError(f"{model!r} embeds text only; name a CLIP or SigLIP model with --clip-model.")
    texts_ND = encoder.embed_texts([answer_text(entry) for entry in captions]).numpy()
    parts = [
        encoder.embed_images([read_picture(path) for path in paths[start : start + _TOGETHER]])
        for start in range(0, len(paths), _TOGETHER)
    ]
    scores = clip_scores(texts_ND, torch.cat(parts).numpy())
    return {"model": model} | result_of(TASK, SCORER, scores, captions)


def find_images(names: Sequence[str], folder: str | Path) -> list[Path]:
    """The picture of each object; ValueError names the first that is missing and counts the others."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"There is no folder of pictures {folder}; name it with --images.")
    there = {path.name: path for path in folder.iterdir()}
    found = [next((there[name + end] for end in SUFFIXES if name + end in there), None) for name in names]
    missing = [name for name, path in zip(names, found, strict=True) if path is None]
    if missing:
        more = f", and {len(missing) - 1} more are missing" if len(missing) > 1 else ""
        raise ValueError(
            f"There is no picture {folder / missing[0]}.png (or .jpg){more}; one is needed for each caption."
        )
    return [path for path in found if path is not None]


def read_picture(path: Path) -> np.ndarray:
    """A picture [H, W, 3], uint8; ValueError where it cannot be read."""
    try:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"))
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{path} is not a picture that can be read ({error}); write it again.") from None
