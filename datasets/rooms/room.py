"""A generated room: what the geometry (layout, meshes) hands to the annotations and to the raw-format writer.

Everything is in the world frame (metres, z up, axis-aligned). V mesh vertices, F triangles.
"""

from dataclasses import dataclass, field

import numpy as np


@dataclass
class RoomObject:
    """One object of a room. `object_id` is ScanNet's 0-based objectId, shared with the aggregation file."""

    object_id: int
    label: str  # raw label as an annotator would write it: "office chair", "monitor", "trash can"
    class_id: int  # index into utils.labels.DETECTION_CLASSES
    nyu40: int
    color: str  # one colour word: "red", "dark brown"
    material: str  # "wooden", "leather", "metal", "" where none is said
    size_word: str  # "small", "large", "tall", "low", ... "" for ordinary
    box_7: np.ndarray  # float32: extents of the object's FINAL mesh vertices (noise and occlusion included), heading 0
    facing: float | None = None  # heading of the object's front, radians counter-clockwise from +x; None without one
    support_id: int | None = None  # objectId that it stands on or hangs above; None for the floor
    on_wall: bool = False


@dataclass
class Room:
    """One generated room, complete: objects with boxes, labelled coloured mesh, and the frames' truth."""

    scene_id: str  # "scene0000_00", as ScanNet names scans
    seed: int
    kind: str  # "bedroom", "office", "bathroom", "kitchen", "living room", ...
    size_3: np.ndarray  # inner width (x), depth (y), height (z)
    objects: list[RoomObject]
    vertices_V3: np.ndarray  # float32, world frame
    colors_V3: np.ndarray  # uint8
    faces_F3: np.ndarray  # int32; empty for the points-only fast path
    instance_V: np.ndarray  # int32 objectId of each vertex, -1 for structure
    nyu40_V: np.ndarray  # uint8
    axis_align_44: np.ndarray  # float64, raw to world; a rotation about z and a shift, never the identity
    # share of candidate views (a fixed, documented set of cameras) that see each object, by objectId
    visible_share: dict[int, float] = field(default_factory=dict)
    floor_centre_3: np.ndarray | None = (
        None  # `datasets.scene.floor_centre` of the full cloud, also once it is dropped
    )
    candidate_poses_V44: np.ndarray | None = None  # camera-to-world poses of those candidate views
    # middle of the full cloud's bounding box in the RAW frame (SQA3D's positions are relative to it), also once the
    # cloud is dropped
    raw_middle_3: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.raw_middle_3 is None and len(self.vertices_V3):
            to_raw_44 = np.linalg.inv(self.axis_align_44)
            raw_V3 = self.vertices_V3 @ to_raw_44[:3, :3].T + to_raw_44[:3, 3]
            self.raw_middle_3 = (raw_V3.min(0) + raw_V3.max(0)) / 2

    def by_id(self, object_id: int) -> RoomObject:
        """The object with this objectId."""
        return next(thing for thing in self.objects if thing.object_id == object_id)
