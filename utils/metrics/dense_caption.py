"""Dense captioning (Scan2Cap): captions of detected objects, scored by n-grams where the box is right (m@kIoU).

Two published ways to say which object a proposal describes, which give different numbers:
- `ll3da`: Open3DA/LL3DA and ch3cook-fdu/Vote2Cap-DETR. The object with the largest IoU, kept where IoU > k; of several
  proposals of one object the best IoU wins.
- `scan2cap`: daveredrum/Scan2Cap lib/eval_helper.py. The object with the nearest centre, kept where IoU > k; of
  several proposals of one object the LAST one wins.
Both: annotated objects without a caption count with the empty caption, objects without annotation are ignored, no
tokenizer, no lower-casing. Captions should be lower-case with tokens set apart by spaces, as the references are.

Shapes: K proposals, G objects of one scene.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

from ..boxes import ArrayLike, as_boxes, box3d_iou, extents, nms_3d
from .caption import MeteorChoice, ngram_scores
from .detection import nonempty_boxes
from .result import Scores

Assignment = Literal["ll3da", "scan2cap"]

EMPTY_CAPTION = "sos eos"
MAX_REFERENCE_TOKENS = 30
# Scan2Cap pads its list of centres to this length with the origin
_SCAN2CAP_SLOTS = 128
_OFFICIAL_EPSILON = 1e-8


@dataclass
class CaptionedScene:
    """Captions of one scene's proposals, and ALL its objects, annotated or not."""

    scene_id: str
    boxes_K7: ArrayLike
    captions: list[str]
    object_boxes_G7: ArrayLike
    object_ids: list[str]


@dataclass
class CaptionCorpus:
    """Reference captions by (scene_id, object_id), already wrapped in sos and eos."""

    references: dict[tuple[str, str], list[str]] = field(default_factory=dict)

    def add(self, scene_id: str, object_id: str | int, description: str) -> None:
        """Add one description: cut to 30 tokens, as the official corpus is."""
        self.references.setdefault((scene_id, str(object_id)), []).append(wrap_reference(description))


def wrap_reference(description: str) -> str:
    """`sos … eos` around the first 30 tokens."""
    return " ".join(["sos", *description.split()[:MAX_REFERENCE_TOKENS], "eos"])


def wrap_caption(caption: str) -> str:
    """`sos … eos` around a generated caption of any length; an empty one gives `sos eos`."""
    return f"sos {caption} eos" if caption.strip() else EMPTY_CAPTION


def filter_proposals(
    boxes_K7: ArrayLike,
    logits_KC1: np.ndarray,
    points_P3: np.ndarray,
    *,
    assignment: Assignment,
    nms_iou: float = 0.25,
    min_points: int = 5,
) -> np.ndarray:
    """Indices of the proposals that are captioned officially, in their own order.

    Boxes with fewer than `min_points` points strictly inside go first, then suppression within each class by
    objectness (background proposals take part), then background: `ll3da` drops proposals whose most probable class
    is background, `scan2cap` those of objectness 0.5 or less. Logits hold the background last.
    """
    boxes = as_boxes(boxes_K7).double()
    logits = np.asarray(logits_KC1, dtype=np.float64)
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    objectness = 1 - shifted[:, -1] / shifted.sum(-1)
    filled = np.flatnonzero(nonempty_boxes(points_P3, boxes, min_points).numpy())
    classes = logits[:, :-1].argmax(-1)
    kept = np.zeros(len(boxes), dtype=bool)
    kept[filled[nms_3d(boxes[filled], objectness[filled], nms_iou, classes[filled]).numpy()]] = True
    foreground = logits.argmax(-1) < logits.shape[1] - 1 if assignment == "ll3da" else objectness > 0.5
    return np.flatnonzero(kept & foreground)


def select_captions(scene: CaptionedScene, *, min_iou: float, assignment: Assignment) -> dict[str, str]:
    """The caption of each object that got one, by object id."""
    boxes, objects = as_boxes(scene.boxes_K7).double(), as_boxes(scene.object_boxes_G7).double()
    if len(scene.captions) != len(boxes) or len(scene.object_ids) != len(objects):
        raise ValueError(
            f"Scene {scene.scene_id}: {len(boxes)} boxes with {len(scene.captions)} captions and {len(objects)} "
            f"objects with {len(scene.object_ids)} ids; give one caption a box and one id an object."
        )
    if not len(boxes) or not len(objects):
        return {}
    iou_KG = _official_iou(boxes, objects)
    if assignment == "ll3da":
        object_K = iou_KG.argmax(1)
        value_K = iou_KG[np.arange(len(boxes)), object_K]
        # ascending IoU, so that the best proposal of an object is written last; of equal ones the first wins
        order = np.lexsort((-np.arange(len(boxes)), value_K))
    elif assignment == "scan2cap":
        object_K = _nearest_slot(boxes[:, :3].numpy(), objects[:, :3].numpy())
        inside = object_K < len(objects)
        value_K = np.where(inside, iou_KG[np.arange(len(boxes)), np.where(inside, object_K, 0)], -1.0)
        order = np.arange(len(boxes))
    else:
        raise ValueError(f'assignment must be "ll3da" or "scan2cap", not {assignment!r}.')
    return {scene.object_ids[object_K[row]]: scene.captions[row] for row in order if value_K[row] > min_iou}


def _official_iou(boxes: torch.Tensor, objects: torch.Tensor) -> np.ndarray:
    """IoU [K, G] with the official 1e-8 in the denominator where nothing is rotated; exact oriented IoU elsewhere."""
    if bool((boxes[:, 6] != 0).any()) or bool((objects[:, 6] != 0).any()):
        return box3d_iou(boxes, objects).numpy()
    (lower, upper), (object_lower, object_upper) = extents(boxes), extents(objects)
    sides_KG3 = torch.minimum(upper[:, None], object_upper) - torch.maximum(lower[:, None], object_lower)
    intersection = sides_KG3.clamp(min=0).prod(-1)
    union = boxes[:, None, 3:6].prod(-1) + objects[:, 3:6].prod(-1) - intersection
    return (intersection / (union + _OFFICIAL_EPSILON)).numpy()


def _nearest_slot(centres_K3: np.ndarray, object_centres_G3: np.ndarray) -> np.ndarray:
    """Index of the nearest object centre; padding slots at the origin lie behind the objects, as officially."""
    num_slots = max(_SCAN2CAP_SLOTS, len(object_centres_G3))
    slots_S3 = np.zeros((num_slots, 3))
    slots_S3[: len(object_centres_G3)] = object_centres_G3
    return ((centres_K3[:, None] - slots_S3) ** 2).sum(-1).argmin(1)


def scan2cap(
    scenes: Sequence[CaptionedScene],
    corpus: CaptionCorpus | Mapping[tuple[str, str], list[str]],
    *,
    min_iou: float = 0.5,
    assignment: Assignment = "ll3da",
    meteor: MeteorChoice = "auto",
) -> Scores:
    """N-gram scores m@kIoU of dense captions, as fractions over all annotated objects.

    `details["candidates"]` holds the scored caption of each object, `counts` how many objects got a caption.
    """
    references = corpus.references if isinstance(corpus, CaptionCorpus) else dict(corpus)
    if not references:
        raise ValueError("There is nothing to score: no object has a reference caption.")
    candidates = dict.fromkeys(references, EMPTY_CAPTION)
    matched = 0
    for scene in scenes:
        for object_id, caption in select_captions(scene, min_iou=min_iou, assignment=assignment).items():
            key = (scene.scene_id, object_id)
            if key in candidates:
                candidates[key] = wrap_caption(caption)
                matched += 1
    keys = {key: f"{key[0]}|{key[1]}" for key in references}
    ngrams = ngram_scores(
        {keys[key]: texts for key, texts in references.items()},
        {keys[key]: [caption] for key, caption in candidates.items()},
        tokenizer="none",
        meteor=meteor,
    )
    captioned = sum(caption != EMPTY_CAPTION for caption in candidates.values())
    return Scores(
        "fraction",
        len(references),
        {f"{name}@{min_iou}": value for name, value in ngrams.corpus.items()},
        ngrams.per_item,
        {"objects": len(references), "objects_matched": matched, "objects_captioned": captioned},
        ngrams.notes,
        {"candidates": {keys[key]: caption for key, caption in candidates.items()}},
        {f"{name}@{min_iou}": aggregate for name, aggregate in ngrams.aggregates.items()},
    )
