"""What `view` shows of a scan: answers of a prediction file, boxes of a file, or what a model detects in it."""

from collections.abc import Callable, Sequence
from pathlib import Path

from ..datasets.alignment import AlignOptions
from ..datasets.readers import read_scene
from ..datasets.scene import Scene
from ..visualization.box_files import SUFFIXES, from_world, is_box_file, read_boxes, to_world, write_boxes
from ..visualization.palette import LAYERS
from ..visualization.pictures import save_picture
from ..visualization.scene_page import write_scene_page
from ..visualization.shown_boxes import ShownBoxes
from ..visualization.shown_scene import ShownScene, load_shown
from ..visualization.top_view import top_view
from .scans import find_scene

_PICTURES = (".png", ".jpg", ".jpeg")


def read_scan(scan: str | Path, data_root: str | Path, align: str | AlignOptions) -> Scene:
    """Anything that `read_scene` reads, or a prepared scene of the data root by its name."""
    return read_scene(find_scene(scan, data_root), align=align)


def scenes_to_show(
    source: str | Path | None,
    scan: str | Path | None,
    *,
    data_root: str | Path,
    align: str | AlignOptions = "auto",
    frame: str = "scan",
    limit: int | None = None,
    detect: Callable[[Scene], ShownBoxes] | None = None,
) -> list[ShownScene]:
    """Read what is to be shown.

    Args:
        source: run folder, prediction file, or a file of boxes (visualization/box_files.py); None for the scan alone.
        scan: anything that `read_scene` reads, or a prepared scene of the data root; None for the scenes that the
            predictions are about.
        align: how a scan is read (`read_scene`).
        frame: the frame of a file of boxes.
        limit: questions to show; default all.
        detect: finds further boxes in the scan.

    Raises:
        ValueError: a file that cannot be read, boxes without a scan, boxes of a file and a detector, a scan that the
            predictions are not about, or that is in another frame than theirs.
    """
    boxes_alone = source is not None and is_box_file(source)
    if boxes_alone and detect is not None:
        raise ValueError(f"--model detects boxes, and {source} holds some; leave one of them out.")
    scene = read_scan(scan, data_root, align) if scan is not None else None
    if source is not None and boxes_alone:
        if scene is None:
            raise ValueError(f"{source} holds boxes alone; name the scan that they are in with --scene.")
        return [ShownScene(scene, boxes=to_world(read_boxes(source), scene, frame))]
    found = load_shown(source, data_root=data_root, scene=scene, limit=limit)
    if detect is not None:
        for shown in found:
            shown.boxes = detect(shown.scene)
    return found


def check_names(top: str | Path | None, export: str | Path | None) -> None:
    """ValueError where a file that is to be written has a name of no form that there is."""
    if top is not None and Path(top).suffix.lower() not in _PICTURES:
        raise ValueError(f"{top} is no name of a picture; end it in {', '.join(_PICTURES)}.")
    if export is not None and Path(export).suffix.lower() not in SUFFIXES:
        raise ValueError(f"{export}: boxes are written as {' or '.join(SUFFIXES)}; name the file so.")


def the_scene(scenes: Sequence[ShownScene]) -> ShownScene:
    """The only scene of several, or one sentence."""
    if len(scenes) > 1:
        names = ", ".join(shown.scene.scene_id for shown in scenes[:8]) + (", …" if len(scenes) > 8 else "")
        raise ValueError(f"This shows one scene, and there are {len(scenes)}; choose with --scene one of {names}.")
    return scenes[0]


def save_scene(
    shown: ShownScene,
    *,
    room: str | Path | None = None,
    top: str | Path | None = None,
    export: str | Path | None = None,
    frame: str = "scan",
) -> list[Path]:
    """Write a scene as a page to walk around in (`room`), a plan (`top`), and its boxes (`export`, in `frame`)."""
    written = []
    if room is not None:
        written.append(write_scene_page(shown, room))
    if top is not None:
        layers = [("boxes", shown.boxes)] + [
            (name, question.layers[name]) for question in shown.questions for name in ("true", "asked", "answered")
        ]
        if not any(len(boxes) for _, boxes in layers):
            layers = [("objects", shown.objects)]
        written.append(save_picture(top_view(shown.scene, [(boxes, LAYERS[name]) for name, boxes in layers]), top))
    if export is not None:
        written.append(write_boxes(export, from_world(shown.predicted, shown.scene, frame)))
    return written
