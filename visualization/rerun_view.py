"""Scenes in Rerun: the cloud, true, answered and other boxes, cameras with their pictures, thought and answer.

Two timelines: `question` shows one question after the other, `time` (seconds) the boxes of each one after the other,
for recording. A scene's points stay until the next scene's. Everything stands in the world frame under `world`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..datasets.scene import Scene
from ..utils.camera import Camera
from ..utils.splat import point_radii
from .extent import room_extent
from .palette import LAYERS, Color
from .shown_boxes import ShownBoxes
from .shown_scene import QUESTION_LAYERS, ShownQuestion, ShownScene, ShownView

STEP = 0.5  # seconds between one box and the next
_FRUSTUM = 0.35  # metres from a camera to its picture
_EYE_3 = np.array([-0.45, -0.45, 1.1])
_MEDIA_TYPES = {".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".png": "image/png"}


def box_archetype(rerun: Any, boxes: ShownBoxes, color: Color) -> Any:
    """Rerun's oriented boxes, with label and score as text."""
    return rerun.Boxes3D(
        centers=boxes.centers_K3,
        half_sizes=boxes.sizes_K3 / 2,
        quaternions=boxes.quaternions_K4,
        colors=[color] * len(boxes),
        labels=boxes.texts(),
        show_labels=True,
        fill_mode=rerun.components.FillMode.MajorWireframe,
    )


def camera_archetypes(rerun: Any, camera: Camera) -> tuple[Any, Any]:
    """Pose and pinhole of a camera; Rerun's default camera axes are OpenCV's too."""
    pose = rerun.Transform3D(translation=camera.pose_44[:3, 3], mat3x3=camera.pose_44[:3, :3])
    # Rerun's pixel (0, 0) has its corner at the origin, ours its centre
    intrinsics_33 = np.array(camera.intrinsics_33, dtype=np.float64)
    intrinsics_33[:2, 2] += 0.5
    pinhole = rerun.Pinhole(
        image_from_camera=intrinsics_33, width=camera.width, height=camera.height, image_plane_distance=_FRUSTUM
    )
    return pose, pinhole


def question_text(question: ShownQuestion) -> str:
    """Question, thought, answer and references as Markdown."""
    prediction = question.prediction
    parts = [
        f"### {_plain(prediction.question)}",
        f"*{prediction.task.replace('_', ' ')}, {_plain(prediction.scene_id)}*",
        _plain(question.situation),
        f"**think** {_plain(prediction.think)}" if prediction.think else "",
        f"**answer** {_plain(question.answer)}",
        f"**reference** {_plain(question.references)}" if question.references else "",
        *(f"{_plain(name)}: {value}" for name, value in prediction.scores.items()),
    ]
    return "\n\n".join(filter(None, parts))


def _plain(text: str) -> str:
    """A text that Markdown shows as it is, pointers such as <obj3> included."""
    return "".join(f"\\{letter}" if letter in "\\`*_{}[]<>#|" else letter for letter in text)


class _Recorder:
    """Logs scenes and questions, and keeps the time."""

    def __init__(self, rerun: Any, most_views: int):
        self.rerun, self.most_views = rerun, most_views
        self.question = self.step = 0
        self.placed: set[str] = set()

    def log(self, path: str, *parts: Any, static: bool = False) -> None:
        self.rerun.log(path, *parts, static=static)

    def advance(self) -> None:
        self.step += 1
        self._set_time()

    def _set_time(self) -> None:
        self.rerun.set_time("question", sequence=self.question)
        self.rerun.set_time("time", duration=self.step * STEP)

    def scene(self, shown: ShownScene) -> None:
        """Points, annotated objects and boxes without a question, which come one after the other."""
        self._set_time()
        scene = shown.scene
        radii_N = point_radii(torch.from_numpy(scene.points_N3 - scene.points_N3.min(0))).numpy()
        self.log("world/points", self.rerun.Points3D(scene.points_N3, colors=scene.colors_N3, radii=radii_N))
        self.boxes("objects", shown.objects)
        self.boxes("boxes", shown.boxes.first(0))
        for count in range(1, len(shown.boxes) + 1):
            self.advance()
            self.boxes("boxes", shown.boxes.first(count))

    def boxes(self, layer: str, boxes: ShownBoxes) -> None:
        self.log(f"world/{layer}", box_archetype(self.rerun, boxes, LAYERS[layer]))

    def ask(self, asked: ShownQuestion) -> None:
        """One question: what was asked about, the views, the text; then the answered boxes, one a step."""
        self._set_time()
        self.boxes("asked", asked.layers["asked"])
        self.boxes("answered", asked.layers["answered"].first(0))
        self.boxes("true", asked.layers["true"].first(0))
        for slot in range(self.most_views):
            self.view(f"world/views/{slot + 1}", asked.views[slot] if slot < len(asked.views) else None)
        self.log("dialogue", self.rerun.TextDocument(question_text(asked), media_type="text/markdown"))
        for count in range(1, len(asked.layers["answered"]) + 1):
            self.advance()
            self.boxes("answered", asked.layers["answered"].first(count))
        self.advance()
        self.boxes("true", asked.layers["true"])
        self.advance()

    def view(self, path: str, view: ShownView | None) -> None:
        """A view's picture at its camera; nothing where there is no view, or no camera of it."""
        camera = view.camera if view is not None else None
        if view is None or camera is None:
            # Rerun complains of a picture whose camera was cleared, so the camera stays, without an extent
            if path in self.placed:
                self.log(path, self.rerun.Pinhole(focal_length=1, width=1, height=1, image_plane_distance=0))
                self.log(f"{path}/picture", self.rerun.Clear(recursive=False))
            return
        media_type = _MEDIA_TYPES.get(view.file.suffix.lower())
        if media_type is None:
            raise ValueError(f"{view.file} is no JPEG or PNG picture; views are kept as one of them.")
        image = self.rerun.EncodedImage(contents=view.file.read_bytes(), media_type=media_type)
        self.log(path, *camera_archetypes(self.rerun, camera))
        self.log(f"{path}/picture", image)
        self.placed.add(path)

    def quiet(self) -> None:
        """Take a scene's questions away, before the next scene."""
        self._set_time()
        for layer in (*QUESTION_LAYERS, "boxes"):
            self.boxes(layer, ShownBoxes.from_rows([]))
        for slot in range(self.most_views):
            self.view(f"world/views/{slot + 1}", None)


def eye_of(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """A place from which a room is seen whole, above one corner and higher than its walls hide it; and its middle."""
    low_3, high_3 = room_extent(scene)
    middle_3 = (low_3 + high_3) / 2
    distance = 1.1 * float(np.linalg.norm(high_3 - low_3))
    return middle_3 + distance * _EYE_3 / np.linalg.norm(_EYE_3), middle_3


def blueprint(rerun: Any, scenes: Sequence[ShownScene]) -> Any:
    """The scene on the left, the text on the right, and a timeline: of questions, or else of boxes."""
    layout = rerun.blueprint
    questions = any(shown.questions for shown in scenes)
    eye_3, middle_3 = eye_of(scenes[0].scene)
    return layout.Blueprint(
        layout.Horizontal(
            layout.Spatial3DView(
                origin="/world",
                name="scene",
                background=[255, 255, 255],
                line_grid=False,
                eye_controls=layout.EyeControls3D(position=eye_3, look_target=middle_3, eye_up=[0, 0, 1]),
                # what is annotated would cover what is asked; a click in the list of streams shows it
                overrides={"/world/objects": layout.EntityBehavior(visible=not questions)},
            ),
            layout.TextDocumentView(origin="/dialogue", name="think and answer"),
            column_shares=[3, 1],
        ),
        layout.TimePanel(timeline="question" if questions else "time"),
        collapse_panels=True,
    )


def show(scenes: Sequence[ShownScene], *, save: str | Path | None = None) -> None:
    """Open scenes in the Rerun viewer, or write them to an .rrd file.

    Args:
        save: an .rrd file to write instead of opening the viewer.

    Raises:
        ValueError: Rerun is not installed, or the file cannot be written.
    """
    try:
        import rerun
        import rerun.blueprint
    except ImportError:
        raise ValueError('The viewer needs Rerun: pip install "rerun-sdk>=0.24".') from None
    look = blueprint(rerun, scenes)
    rerun.init("3D-R1", spawn=save is None, default_blueprint=look if save is None else None)
    if save is not None:
        Path(save).parent.mkdir(parents=True, exist_ok=True)
        try:
            rerun.save(str(save), default_blueprint=look)
        except RuntimeError as error:
            raise ValueError(f"{save} cannot be written ({error}); choose another file.") from None
    rerun.log("world", rerun.ViewCoordinates.RIGHT_HAND_Z_UP, static=True)
    questions = [question for shown in scenes for question in shown.questions]
    recorder = _Recorder(rerun, max((len(question.views) for question in questions), default=0))
    for shown in scenes:
        if recorder.question:
            recorder.quiet()
        recorder.scene(shown)
        for question in shown.questions:
            recorder.ask(question)
            recorder.question += 1
    if save is not None:
        rerun.disconnect()
