"""Predictions in Rerun: the cloud, true, answered and detected boxes, the views, thought and answer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..datasets.scene import Scene, load_scene
from ..utils.predictions import Prediction, read_predictions
from .pictures import DETECTED, PREDICTED, TARGET


def box_archetype(rerun: Any, boxes: Sequence[Sequence[float]], color: tuple[int, int, int], labels: Sequence[str]):
    """Rerun's oriented boxes from [x, y, z, dx, dy, dz, heading] rows."""
    rows_K7 = np.asarray(boxes, dtype=np.float32).reshape(-1, 7)
    half_K = rows_K7[:, 6] / 2
    zeros_K = np.zeros_like(half_K)
    return rerun.Boxes3D(
        centers=rows_K7[:, :3],
        half_sizes=rows_K7[:, 3:6] / 2,
        quaternions=np.stack([zeros_K, zeros_K, np.sin(half_K), np.cos(half_K)], axis=1),
        colors=[color] * len(rows_K7),
        labels=list(labels),
    )


def log_scene(rerun: Any, scene: Scene) -> None:
    """The cloud and the annotated objects of one scene."""
    root = f"scenes/{scene.scene_id}"
    rerun.log(root, rerun.ViewCoordinates.RIGHT_HAND_Z_UP, static=True)
    rerun.log(f"{root}/points", rerun.Points3D(scene.points_N3, colors=scene.colors_N3, radii=0.01), static=True)
    if len(scene.boxes_K7):
        boxes = box_archetype(rerun, scene.boxes_K7.tolist(), (148, 163, 184), scene.object_labels)
        rerun.log(f"{root}/objects", boxes, static=True)


def log_prediction(rerun: Any, prediction: Prediction, number: int) -> None:
    """One question on the timeline `question`, its boxes in the frame of its scene."""
    rerun.set_time("question", sequence=number)
    root = f"scenes/{prediction.scene_id}"
    rerun.log(
        f"{root}/answered", box_archetype(rerun, prediction.boxes, PREDICTED, ["answer"] * len(prediction.boxes))
    )
    rerun.log(
        f"{root}/true", box_archetype(rerun, prediction.target_boxes, TARGET, ["true"] * len(prediction.target_boxes))
    )
    asked = [prediction.meta["query_box"]] if prediction.meta.get("query_box") else []
    rerun.log(f"{root}/asked", box_archetype(rerun, asked, DETECTED, ["asked about"] * len(asked)))
    text = (
        f"**{prediction.question}**\n\n{prediction.think}\n\n**{prediction.answer or prediction.text}**\n\n"
        f"reference: {'; '.join(prediction.references[:3])}"
    )
    rerun.log("dialogue", rerun.TextDocument(text, media_type="text/markdown"))


def show(
    source: str | Path,
    *,
    data_root: str | Path = "data/rooms",
    save: str | Path | None = None,
    limit: int | None = None,
) -> None:
    """Open predictions in the Rerun viewer, or write them to an .rrd file.

    Args:
        source: predictions.jsonl, or a folder that holds it.
        data_root: where `prepared/` lies.
        save: an .rrd file to write instead of opening the viewer.
        limit: how many predictions; default all.

    Raises:
        ValueError: Rerun is not installed, or there is nothing to show.
    """
    try:
        import rerun
    except ImportError:
        raise ValueError('The viewer needs Rerun: pip install "rerun-sdk>=0.24".') from None
    file = Path(source) / "predictions.jsonl" if Path(source).is_dir() else Path(source)
    predictions = [entry for entry in read_predictions(file) if entry.text][:limit]
    if not predictions:
        raise ValueError(f"{file} holds no answers to show.")
    rerun.init("3D-R1", spawn=save is None)
    if save is not None:
        Path(save).parent.mkdir(parents=True, exist_ok=True)
        rerun.save(str(save))
    for scene_id in dict.fromkeys(entry.scene_id for entry in predictions):
        path = Path(data_root) / "prepared" / f"{scene_id}.npz"
        if path.exists():
            log_scene(rerun, load_scene(path))
    for number, prediction in enumerate(predictions):
        log_prediction(rerun, prediction, number)
    if save is not None:
        rerun.disconnect()
