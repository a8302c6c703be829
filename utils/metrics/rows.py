"""From predictions to the arguments of the scorers: what a row of a prediction file says about an answer.

`score` documents which fields and which parts of `meta` are read.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..predictions import Prediction
from ..text import find_pointers, parse_response, strip_pointers
from . import dense_caption, dense_oracle, grounding

_TAGS = re.compile(r"</?(?:think|answer)>")


def answer_text(prediction: Prediction) -> str:
    """The words of an answer that scorers compare: pointers removed.

    A text without pointers is left as it is, to the last blank: official scorers see what the model wrote.
    """
    text = prediction.answer
    if not text:
        text = parse_response(prediction.text).answer if _TAGS.search(prediction.text) else prediction.text
    return strip_pointers(text) if find_pointers(text) else text


def caption_box(prediction: Prediction) -> list[float] | None:
    """The box whose object a dense caption describes."""
    return prediction.meta.get("query_box") or (prediction.boxes[0] if prediction.boxes else None)


def grounding_item(prediction: Prediction) -> grounding.GroundingItem:
    """ScanRefer's view of a row; ValueError unless it has exactly one target."""
    if len(prediction.target_boxes) != 1:
        raise ValueError(
            f"Sample {prediction.sample_id} has {len(prediction.target_boxes)} target boxes; ScanRefer and Nr3D "
            "score exactly one. Use the scorer `matched` for several."
        )
    multiple = prediction.meta.get("multiple")
    if multiple is None and prediction.question_type in ("unique", "multiple"):
        multiple = prediction.question_type == "multiple"
    first = prediction.boxes[0] if prediction.boxes else None
    return grounding.GroundingItem(first, prediction.target_boxes[0], multiple, prediction.meta.get("others"))


def nr3d_groups(predictions: Sequence[Prediction]) -> dict[str, list[bool]]:
    """Masks of Nr3D's groups that every row knows: easy / hard, view-dependent / -independent."""
    groups: dict[str, list[bool]] = {}
    if all(entry.question_type in ("easy", "hard") for entry in predictions):
        for name in ("easy", "hard"):
            groups[name] = [entry.question_type == name for entry in predictions]
    if all(entry.meta.get("view_dependent") is not None for entry in predictions):
        groups["view_dependent"] = [bool(entry.meta["view_dependent"]) for entry in predictions]
        groups["view_independent"] = [not inside for inside in groups["view_dependent"]]
    return groups


@dataclass
class _SceneRows:
    """One scene's part of a prediction file: captioned boxes, and objects."""

    boxes: list[list[float]] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    objects: dict[str, list[float]] = field(default_factory=dict)


def captioned_scenes(
    predictions: Sequence[Prediction],
) -> tuple[list[dense_caption.CaptionedScene], dict[tuple[str, str], list[str]]]:
    """Scenes with their captioned boxes and objects, and reference captions by (scene_id, object_id)."""
    scenes: dict[str, _SceneRows] = {}
    references: dict[tuple[str, str], list[str]] = {}
    for prediction in predictions:
        scene = scenes.setdefault(prediction.scene_id, _SceneRows())
        box = caption_box(prediction)
        if box is not None:
            scene.boxes.append(box)
            scene.captions.append(spaced_caption(prediction))
        _check_target(prediction)
        if prediction.target_boxes:
            object_id = _object_id(prediction)
            scene.objects.setdefault(object_id, prediction.target_boxes[0])
            if prediction.references:
                references[(prediction.scene_id, object_id)] = [
                    text if text.startswith("sos ") else dense_caption.wrap_reference(text)
                    for text in prediction.references
                ]
    # rows of objects alone are a detector that found nothing, which scores as it should
    if any(map(answer_text, predictions)) and not any(scene.captions for scene in scenes.values()):
        raise ValueError(
            "No prediction says which box its caption describes; record the box in `boxes` or in meta['query_box']."
        )
    captioned = [
        dense_caption.CaptionedScene(
            scene_id, rows.boxes, rows.captions, list(rows.objects.values()), list(rows.objects)
        )
        for scene_id, rows in scenes.items()
    ]
    return captioned, references


def oracle_captions(predictions: Sequence[Prediction]) -> list[dense_oracle.OracleCaption]:
    """One entry for each annotated object, in the order of the rows; objects without references are left out."""
    items = []
    for prediction in predictions:
        _check_target(prediction)
        box = caption_box(prediction)
        if box is not None and not prediction.target_boxes:
            raise ValueError(
                f"Sample {prediction.sample_id} captions a proposal of no object; the oracle forms need one row for "
                "each annotated object, with target_boxes and meta['query_box']. Use `detect` for all proposals."
            )
        if not prediction.references:
            continue
        iou = 0.0 if box is None else float(grounding.official_iou([box], prediction.target_boxes[:1])[0])
        items.append(
            dense_oracle.OracleCaption(
                f"{prediction.scene_id}|{_object_id(prediction)}",
                None if box is None else answer_text(prediction),
                tuple(prediction.references),
                iou,
            )
        )
    return items


def _check_target(prediction: Prediction) -> None:
    if prediction.references and not prediction.target_boxes:
        raise ValueError(
            f"Sample {prediction.sample_id} has reference captions but no target box; dense captioning needs both."
        )


def _object_id(prediction: Prediction) -> str:
    """The object that a row's target box belongs to; without an id the box stands for it."""
    object_id = prediction.meta.get("object_id")
    return str(prediction.target_boxes[0] if object_id is None else object_id)


def spaced_caption(prediction: Prediction) -> str:
    """The caption; where pointers were cut out of it, punctuation is set apart again as Scan2Cap's tokens are."""
    text = answer_text(prediction)
    return re.sub(r" *([.,]) *", r" \1 ", text).strip() if find_pointers(prediction.answer) else text
