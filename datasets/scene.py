"""Scene and Sample: the data contracts, defined once and used everywhere.

World frame: metres, z up, ScanNet's axis-aligned frame (raw points times `axis_align_44`). Boxes are
`centre xyz, size xyz, heading about z` (`boxes_K7`), heading counter-clockwise seen from above, 0 for ScanNet.
Model frame: the world frame moved so that the floor centre of the full cloud is the origin (`Scene.origin_3`).

Shapes: N points, K objects, V views.
"""

import os
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from .archive import read_arrays, write_arrays

TASKS = (
    "dense_caption",
    "object_caption",
    "grounding",
    "qa",
    "situated_qa",
    "dialogue",
    "planning",
    "scene_description",
)


@dataclass(frozen=True)
class Frame:
    """One posed picture of a scene: files on disk, camera-to-world pose in the ALIGNED world frame.

    Camera axes are OpenCV's (x right, y down, z forward). `depth_path` holds uint16 millimetres, 0 for none (an .npy
    file of floats holds metres: frames.read_depth).
    """

    color_path: str
    depth_path: str | None
    pose_44: np.ndarray
    intrinsics_33: np.ndarray


@dataclass(frozen=True)
class Picture:
    """A picture of a scene that came without a pose. `depth_path` is a .png or .npy file (frames.read_depth)."""

    color_path: str
    depth_path: str | None


def floor_centre(points_N3: np.ndarray) -> np.ndarray:
    """Origin of the model frame: x, y of the bounding box's middle, z of the floor, in the points' own frame.

    The floor is the 1st percentile of z, which a few stray points below it do not move. Call it on the full cloud,
    so that nothing depends on how points were sampled.
    """
    middle_3 = (points_N3.min(0) + points_N3.max(0)) / 2
    return np.array([middle_3[0], middle_3[1], np.percentile(points_N3[:, 2], 1.0)], dtype=np.float32)


def shifted(boxes_K7: np.ndarray, offset_3: np.ndarray) -> np.ndarray:
    """Boxes or points with their positions (first three columns) moved, float32."""
    moved = np.array(boxes_K7, dtype=np.float32, copy=True)
    moved[..., :3] += offset_3
    return moved


@dataclass
class Scene:
    """One prepared scan: points, labelled objects with boxes, posed frames."""

    scene_id: str
    points_N3: np.ndarray  # float32, metres, world frame
    colors_N3: np.ndarray  # uint8
    instance_ids_N: np.ndarray  # int32 objectId, -1 where unlabelled
    nyu40_N: np.ndarray  # uint8, 0 where unlabelled
    object_ids_K: np.ndarray  # int32, ScanNet objectId (0-based)
    object_labels: list[str]  # raw labels, K of them
    class_ids_K: np.ndarray  # int32, index into utils.labels.DETECTION_CLASSES
    boxes_K7: np.ndarray  # float32, vertex extents after alignment
    axis_align_44: np.ndarray  # float64, raw to world
    origin_3: np.ndarray  # float32, world frame: `floor_centre` of the FULL cloud
    frames: list[Frame] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what a reader assumed (up-axis, scale, colours)
    vertex_ids_N: np.ndarray | None = None  # int32, row of each point in the source's vertices; None where unknown
    num_vertices: int = 0  # of the source, 0 where unknown
    raw_frame_known: bool = True  # False: axis_align_44 is a stand-in, so nothing given in the raw frame can be placed
    pictures: list[Picture] = field(default_factory=list)  # without poses
    # float16, unit; made of the points when a model first asks (scene_encoder/inputs.py), and neither saved nor copied
    normals_N3: np.ndarray | None = field(default=None, init=False, repr=False, compare=False)

    def to_model(self, boxes_K7: np.ndarray) -> np.ndarray:
        """Boxes or points (first three columns are a position) from the world frame to the model frame."""
        return shifted(boxes_K7, -self.origin_3)

    def to_world(self, boxes_K7: np.ndarray) -> np.ndarray:
        """The inverse of `to_model`."""
        return shifted(boxes_K7, self.origin_3)

    def boxes_of(self, object_ids: list[int]) -> np.ndarray:
        """Boxes [len(object_ids), 7] of objects by objectId; ValueError names an id that the scene lacks."""
        index = {int(object_id): row for row, object_id in enumerate(self.object_ids_K)}
        unknown = [object_id for object_id in object_ids if object_id not in index]
        if unknown:
            raise ValueError(
                f"Scene {self.scene_id} has no object {unknown[0]}; it has {len(index)} objects. "
                "Check that the annotation file and the scans belong together."
            )
        return self.boxes_K7[[index[object_id] for object_id in object_ids]].reshape(-1, 7)


_ARRAYS = (
    "points_N3",
    "colors_N3",
    "instance_ids_N",
    "nyu40_N",
    "object_ids_K",
    "class_ids_K",
    "boxes_K7",
    "axis_align_44",
    "origin_3",
)


_VERTEX_IDS = "vertex_ids_N"  # absent where the source has no vertices to count


class BrokenScene(ValueError):
    """A prepared scene that cannot be read."""


def save_scene(scene: Scene, path: str | Path) -> None:
    """Write a prepared scene (`<scene_id>.npz`) atomically. Paths of pictures are stored relative to the file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)

    def files(picture: Frame | Picture) -> dict[str, str | None]:
        depth = os.path.relpath(picture.depth_path, path.parent) if picture.depth_path else None
        return {"color": os.path.relpath(picture.color_path, path.parent), "depth": depth}

    header = {
        "scene_id": scene.scene_id,
        "object_labels": scene.object_labels,
        "notes": scene.notes,
        "frames": [
            {**files(frame), "pose": frame.pose_44.tolist(), "intrinsics": frame.intrinsics_33.tolist()}
            for frame in scene.frames
        ],
        "pictures": [files(picture) for picture in scene.pictures],
        "num_vertices": scene.num_vertices,
        "raw_frame_known": scene.raw_frame_known,
    }
    arrays = {"header": np.frombuffer(orjson.dumps(header), dtype=np.uint8)}
    arrays |= {name: getattr(scene, name) for name in _ARRAYS}
    if scene.vertex_ids_N is not None:
        arrays[_VERTEX_IDS] = scene.vertex_ids_N
    write_arrays(path, arrays)


def load_scene(path: str | Path, *, mapped: bool = False) -> Scene:
    """Read a prepared scene; ValueError says what to run where the file is missing or broken.

    Args:
        mapped: map the arrays, copy-on-write, instead of reading them (archive.read_arrays).
    """
    path = Path(path)
    try:
        arrays = read_arrays(path, mapped=mapped)
        header = orjson.loads(arrays["header"].tobytes())
        own = {name: arrays[name] for name in _ARRAYS}
        missing = {"scene_id", "object_labels", "notes", "frames"} - set(header)
        if missing:
            raise ValueError(f"its header lacks {min(missing)}")
    except FileNotFoundError:
        raise ValueError(f"There is no prepared scene at {path}; run `python main.py prepare` first.") from None
    except (ValueError, KeyError, TypeError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise BrokenScene(
            f"{path} is not a whole prepared scene ({error}); delete it and run `python main.py prepare` again."
        ) from None

    folder = str(path.parent)

    def files(row: dict[str, Any]) -> tuple[str, str | None]:
        depth = row["depth"]
        return os.path.join(folder, row["color"]), os.path.join(folder, depth) if depth else None

    rows = header["frames"]
    poses_F44 = np.array([row["pose"] for row in rows], np.float64).reshape(-1, 4, 4)
    intrinsics_F33 = np.array([row["intrinsics"] for row in rows], np.float64).reshape(-1, 3, 3)
    return Scene(
        scene_id=header["scene_id"],
        object_labels=header["object_labels"],
        notes=header["notes"],
        frames=[
            Frame(*files(row), pose_44, intrinsics_33)
            for row, pose_44, intrinsics_33 in zip(rows, poses_F44, intrinsics_F33, strict=True)
        ],
        pictures=[Picture(*files(row)) for row in header.get("pictures", [])],  # files of older versions have none
        num_vertices=header.get("num_vertices", 0),
        raw_frame_known=header.get("raw_frame_known", True),
        vertex_ids_N=arrays.get(_VERTEX_IDS),
        **own,
    )


@dataclass
class Sample:
    """One question to the model about one scene, with what is needed to train on it and to score it.

    `question` and `think`/`answer` are text in the answer grammar (utils/text.py): boxes inside them are in the MODEL
    frame. `think` is "" where the data has no thought. `references` are the texts that scorers compare with.
    """

    sample_id: str
    task: str  # one of TASKS
    dataset: str  # scanrefer, nr3d, scanqa, sqa3d, dialogue, planning, scene_description, scene30k, ...
    scene_id: str
    question: str
    answer: str
    think: str = ""
    references: list[str] = field(default_factory=list)
    target_object_ids: list[int] = field(default_factory=list)
    target_boxes_K7: np.ndarray = field(default_factory=lambda: np.zeros((0, 7), np.float32))  # world frame
    query_box_7: np.ndarray | None = None  # world frame: the object that a caption is asked for
    situation: str = ""
    situation_pose_7: np.ndarray | None = None  # position xyz and quaternion xyzw, world frame
    question_type: str = ""
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.task not in TASKS:
            raise ValueError(f"Unknown task {self.task!r} of sample {self.sample_id}; tasks are {', '.join(TASKS)}.")
