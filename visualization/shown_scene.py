"""What the viewers show of one scene: its points, its boxes, and the questions with answers, boxes and views.

World frame, metres. Paths of views are relative to the prediction file.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..datasets.scene import Scene, load_scene
from ..utils.boxes import box3d_iou
from ..utils.camera import Camera
from ..utils.predictions import Prediction, read_predictions
from ..utils.view_cameras import read_camera
from .shown_boxes import ShownBoxes

QUESTION_LAYERS = ("true", "asked", "answered")
_SAME = 0.5  # IoU at which a true box takes the label of the scene's object
_REFERENCES = 3
_SAME_FRAME = 1e-3  # metres, and parts of a matrix without unit


@dataclass(frozen=True, eq=False)
class ShownView:
    """A view that the model was given: its name, its picture's file, and where its camera stood, if that is known."""

    name: str
    file: Path
    camera: Camera | None


@dataclass(frozen=True, eq=False)
class ShownQuestion:
    """One question with what came of it; `layers` holds boxes by layer (QUESTION_LAYERS)."""

    prediction: Prediction
    layers: dict[str, ShownBoxes]
    views: list[ShownView]

    @property
    def answer(self) -> str:
        """The answer, or all that the model said where it gave none in form."""
        return self.prediction.answer or self.prediction.text

    @property
    def references(self) -> str:
        return " · ".join(self.prediction.references[:_REFERENCES])

    @property
    def situation(self) -> str:
        return str(self.prediction.meta.get("situation") or "")


@dataclass(eq=False)
class ShownScene:
    """A scene, its questions, and boxes that belong to no question: `boxes` of a file or of the detector."""

    scene: Scene
    questions: list[ShownQuestion] = field(default_factory=list)
    boxes: ShownBoxes = field(default_factory=lambda: ShownBoxes.from_rows([]))

    @property
    def objects(self) -> ShownBoxes:
        """The scene's annotated objects."""
        return ShownBoxes.from_rows(self.scene.boxes_K7.tolist(), self.scene.object_labels)

    @property
    def predicted(self) -> ShownBoxes:
        """What was predicted of the scene: `boxes`, then those of every answer, each labelled with its sample.

        A dense caption is of the box in `boxes`, or else of the one that it was asked for.
        """
        rows = [
            (box, prediction.sample_id)
            for prediction in (question.prediction for question in self.questions)
            for box in prediction.boxes or _captioned(prediction)
        ]
        return joined([self.boxes, ShownBoxes.from_rows([box for box, _ in rows], [name for _, name in rows])])


def _captioned(prediction: Prediction) -> list[list[float]]:
    return (
        [prediction.meta["query_box"]] if prediction.task == "dense_caption" and "query_box" in prediction.meta else []
    )


def joined(parts: Sequence[ShownBoxes]) -> ShownBoxes:
    """Boxes of several layers as one."""
    return ShownBoxes(
        np.concatenate([part.centers_K3 for part in parts]),
        np.concatenate([part.sizes_K3 for part in parts]),
        np.concatenate([part.rotations_K33 for part in parts]),
        [label for part in parts for label in part.labels],
        [score for part in parts for score in part.scores],
    )


def shown_question(prediction: Prediction, scene: Scene | None, folder: Path) -> ShownQuestion:
    """A prediction as the viewers show it.

    An answered box's score is its IoU with the true box that it covers best, where there are true ones. A true box
    is labelled like the object of the scene that it is.
    """
    asked = [prediction.meta["query_box"]] if prediction.meta.get("query_box") else []
    answered, true = prediction.boxes, prediction.target_boxes
    scores: list[float | None] = []
    if answered and true:
        scores = box3d_iou(_seven(answered), _seven(true)).amax(1).tolist()
    names = ["answer"] if len(answered) == 1 else [f"answer {number}" for number in range(1, len(answered) + 1)]
    layers = {
        "true": ShownBoxes.from_rows(true, [object_label(box, scene) or "true" for box in true]),
        "asked": ShownBoxes.from_rows(asked, ["asked about"] * len(asked)),
        "answered": ShownBoxes.from_rows(answered, [f"{name} IoU" for name in names] if scores else names, scores),
    }
    files = [(name, folder / name) for name in prediction.views]
    views = [ShownView(Path(name).stem, file, read_camera(file)) for name, file in files if file.is_file()]
    return ShownQuestion(prediction, layers, views)


def _seven(boxes: Sequence[Sequence[float]]) -> np.ndarray:
    return np.array([[*box, 0.0][:7] for box in boxes], dtype=np.float32)


def object_label(box: Sequence[float], scene: Scene | None) -> str:
    """Label of the scene's object that a box is; "" where it is none."""
    if scene is None or not len(scene.boxes_K7):
        return ""
    overlaps_K = box3d_iou(_seven([box]), scene.boxes_K7)[0]
    best = int(overlaps_K.argmax())
    return scene.object_labels[best] if float(overlaps_K[best]) >= _SAME else ""


def prediction_file(source: str | Path) -> Path:
    """predictions.jsonl of a folder, or the file itself."""
    source = Path(source)
    return source / "predictions.jsonl" if source.is_dir() else source


def load_shown(
    source: str | Path | None,
    *,
    data_root: str | Path,
    scene: Scene | None = None,
    limit: int | None = None,
) -> list[ShownScene]:
    """The scenes of a prediction file with their questions, in the order of the file.

    Args:
        source: predictions.jsonl or its folder; None for `scene` alone.
        data_root: where `prepared/` lies; scenes that are not there are left out.
        scene: show this one only, whether it is prepared or not.
        limit: questions to show; default all.

    Raises:
        ValueError: no answers, none about `scene`, answers in another frame of it, or no prepared scene at all.
    """
    if source is None:
        assert scene is not None
        return [ShownScene(scene)]
    file = prediction_file(source)
    answered = [entry for entry in read_predictions(file) if entry.text]
    if not answered:
        raise ValueError(f"{file} holds no answers to show.")
    predictions = [entry for entry in answered if scene is None or entry.scene_id == scene.scene_id][: limit or None]
    ids = list(dict.fromkeys(entry.scene_id for entry in predictions))
    if scene is not None:
        if not predictions:
            ids = list(dict.fromkeys(entry.scene_id for entry in answered))
            known = ", ".join(ids[:8]) + (", …" if len(ids) > 8 else "")
            raise ValueError(f"{file} has no answers about {scene.scene_id}; its scenes are {known}.")
        scenes = [scene]
    else:
        paths = [Path(data_root) / "prepared" / f"{scene_id}.npz" for scene_id in ids]
        scenes = [load_scene(path) for path in paths if path.exists()]
        if not scenes:
            raise ValueError(
                f"There is no prepared scene {paths[0]}; name the data root with --data, or --scene SCAN."
            )
    for one in scenes:
        check_frame(one, [entry for entry in predictions if entry.scene_id == one.scene_id])
    return [
        ShownScene(
            one,
            [shown_question(entry, one, file.parent) for entry in predictions if entry.scene_id == one.scene_id],
        )
        for one in scenes
    ]


def check_frame(scene: Scene, predictions: Sequence[Prediction]) -> None:
    """ValueError where predictions say that the scan was aligned in another way."""
    from_world_44 = np.linalg.inv(scene.axis_align_44)
    for entry in predictions:
        if entry.meta.get("axis_align") is None:
            continue
        # compared in the world frame: the matrices themselves hardly differ for a scan in millimetres
        moved_44 = np.array(entry.meta["axis_align"], dtype=np.float64) @ from_world_44
        if np.abs(moved_44 - np.eye(4)).max() > _SAME_FRAME:
            raise ValueError(
                "The answers were made in another frame of this scan; give view the --align, --up, --height, "
                "--from-video that infer had."
            )
