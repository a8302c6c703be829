"""Prepared scenes on demand, and a light index of all of them.

Tens of thousands of annotation records need boxes and origins, not clouds: `SceneStore.index` holds those for every
scene and is cached in one file beside the scenes; `SceneStore[scene_id]` reads a whole scene and keeps the latest.
"""

import logging
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from ..utils.files import write_whole
from .scene import Scene, load_scene, shifted

INDEX_NAME = "index.json"
INDEX_VERSION = 2
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SceneInfo:
    """What annotations need to know of a scene. Boxes are in the world frame, metres; K objects.

    `structure_ids` are annotated objects without a box: walls, floors, ceilings. `raw_middle_3` is the middle of the
    raw cloud's bounding box, in the raw frame; with `raw_frame_known` false it and `axis_align_44` are stand-ins.
    """

    scene_id: str
    object_ids_K: np.ndarray  # int32
    object_labels: list[str]
    class_ids_K: np.ndarray  # int32
    boxes_K7: np.ndarray  # float32
    structure_ids: frozenset[int]
    axis_align_44: np.ndarray  # float64, raw to world
    origin_3: np.ndarray  # float32, world frame
    raw_middle_3: np.ndarray  # float64, raw frame
    raw_frame_known: bool = True
    notes: tuple[str, ...] = ()  # what was assumed when the scene was prepared

    @classmethod
    def of(cls, scene: Scene) -> "SceneInfo":
        """The index entry of a scene."""
        inverse_44 = np.linalg.inv(scene.axis_align_44)
        raw_N3 = scene.points_N3 @ inverse_44[:3, :3].T + inverse_44[:3, 3]
        present = set(np.unique(scene.instance_ids_N).tolist()) - {-1}
        return cls(
            scene_id=scene.scene_id,
            object_ids_K=scene.object_ids_K,
            object_labels=list(scene.object_labels),
            class_ids_K=scene.class_ids_K,
            boxes_K7=scene.boxes_K7,
            structure_ids=frozenset(present - set(scene.object_ids_K.tolist())),
            axis_align_44=scene.axis_align_44,
            origin_3=scene.origin_3,
            raw_middle_3=(raw_N3.min(0) + raw_N3.max(0)) / 2,
            raw_frame_known=scene.raw_frame_known,
            notes=tuple(scene.notes),
        )

    def row_of(self, object_id: int) -> int | None:
        """Row of an object in the arrays; None for one without a box."""
        rows = np.flatnonzero(self.object_ids_K == object_id)
        return int(rows[0]) if rows.size else None

    def to_model(self, boxes_K7: np.ndarray) -> np.ndarray:
        """See `Scene.to_model`."""
        return shifted(boxes_K7, -self.origin_3)

    def to_world(self, boxes_K7: np.ndarray) -> np.ndarray:
        """The inverse of `to_model`."""
        return shifted(boxes_K7, self.origin_3)


def _pack(info: SceneInfo, stamp: list[int]) -> dict[str, Any]:
    return {
        "stamp": stamp,
        "object_ids": info.object_ids_K.tolist(),
        "labels": info.object_labels,
        "class_ids": info.class_ids_K.tolist(),
        "boxes": info.boxes_K7.tolist(),
        "structure_ids": sorted(info.structure_ids),
        "axis_align": info.axis_align_44.tolist(),
        "origin": info.origin_3.tolist(),
        "raw_middle": info.raw_middle_3.tolist(),
        "raw_frame_known": info.raw_frame_known,
        "notes": list(info.notes),
    }


def _unpack(scene_id: str, row: dict[str, Any]) -> SceneInfo:
    return SceneInfo(
        scene_id=scene_id,
        object_ids_K=np.array(row["object_ids"], dtype=np.int32),
        object_labels=row["labels"],
        class_ids_K=np.array(row["class_ids"], dtype=np.int32),
        boxes_K7=np.array(row["boxes"], dtype=np.float32).reshape(-1, 7),
        structure_ids=frozenset(row["structure_ids"]),
        axis_align_44=np.array(row["axis_align"], dtype=np.float64),
        origin_3=np.array(row["origin"], dtype=np.float32),
        raw_middle_3=np.array(row["raw_middle"], dtype=np.float64),
        raw_frame_known=row["raw_frame_known"],
        notes=tuple(row["notes"]),
    )


class SceneStore(Mapping[str, Scene]):
    """Prepared scenes of a folder as a mapping scene_id -> Scene, read when asked for.

    Args:
        prepared_dir: folder of `<scene_id>.npz` files.
        capacity: how many scenes stay open. They are mapped, so that the memory is the file cache's and is
            shared with other processes; each takes one file descriptor.

    Raises:
        ValueError: the folder is missing or holds no prepared scene.
    """

    def __init__(self, prepared_dir: str | Path, capacity: int = 64):
        self.prepared_dir = Path(prepared_dir)
        if capacity < 1:
            raise ValueError(f"A SceneStore keeps at least one scene, not {capacity}.")
        self.capacity = capacity
        stamps = _stamps(self.prepared_dir)
        if not stamps:
            raise ValueError(
                f"There are no prepared scenes in {self.prepared_dir}; run `python main.py prepare --root …` first."
            )
        self.index: dict[str, SceneInfo] = _load_index(self.prepared_dir, stamps)
        self._recent: OrderedDict[str, Scene] = OrderedDict()

    @property
    def scene_ids(self) -> list[str]:
        """All scene ids, sorted."""
        return list(self.index)

    def __getitem__(self, scene_id: str) -> Scene:
        if scene_id in self._recent:
            self._recent.move_to_end(scene_id)
            return self._recent[scene_id]
        if scene_id not in self.index:
            raise KeyError(scene_id)
        scene = load_scene(self.prepared_dir / f"{scene_id}.npz", mapped=True)
        self._recent[scene_id] = scene
        while len(self._recent) > self.capacity:
            self._recent.popitem(last=False)
        return scene

    def __iter__(self) -> Iterator[str]:
        return iter(self.index)

    def __len__(self) -> int:
        return len(self.index)

    def __contains__(self, scene_id: object) -> bool:
        return scene_id in self.index

    def __getstate__(self) -> dict[str, Any]:
        # data-loading workers get the index, not the scenes read so far
        return {**self.__dict__, "_recent": OrderedDict()}


def as_index(scenes: Mapping[str, Scene] | Mapping[str, SceneInfo]) -> Mapping[str, SceneInfo]:
    """The light index of a store or of scenes held in memory."""
    if isinstance(scenes, SceneStore):
        return scenes.index
    return {
        scene_id: scene if isinstance(scene, SceneInfo) else SceneInfo.of(scene) for scene_id, scene in scenes.items()
    }


def _stamps(folder: Path) -> dict[str, list[int]]:
    """Size and time of every prepared file, by scene id, sorted."""
    if not folder.is_dir():
        return {}
    stamps = {}
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.endswith(".npz"):
            status = entry.stat()
            stamps[entry.name[: -len(".npz")]] = [status.st_size, status.st_mtime_ns]
    return stamps


def _load_index(folder: Path, stamps: dict[str, list[int]]) -> dict[str, SceneInfo]:
    """Index entries, from the cache where it is current and from the scenes themselves where not."""
    path = folder / INDEX_NAME
    cached: dict[str, Any] = {}
    known: dict[str, SceneInfo] = {}
    if path.exists():
        try:
            content = orjson.loads(path.read_bytes())
            cached = content["scenes"] if content["version"] == INDEX_VERSION else {}
            known = {
                scene_id: _unpack(scene_id, row)
                for scene_id, row in cached.items()
                if row["stamp"] == stamps.get(scene_id)
            }
        except (orjson.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError):
            _log.warning("%s is not readable and is written anew.", path)
            cached, known = {}, {}
    rows: dict[str, Any] = {}
    index: dict[str, SceneInfo] = {}
    for scene_id, stamp in stamps.items():
        if scene_id in known:
            index[scene_id], rows[scene_id] = known[scene_id], cached[scene_id]
        else:
            index[scene_id] = SceneInfo.of(load_scene(folder / f"{scene_id}.npz"))
            rows[scene_id] = _pack(index[scene_id], stamp)
    if rows != cached:
        try:
            write_whole(path, orjson.dumps({"version": INDEX_VERSION, "scenes": rows}))
        except PermissionError:
            _log.warning("%s cannot be written: the scenes' index is built anew at each start.", path)
    return index
