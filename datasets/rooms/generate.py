"""One room from one seed: layout, surface, scan, cameras, put together as a `Room`."""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from ...utils.camera import Camera
from ...utils.labels import class_of_nyu40
from ..scene import floor_centre
from .cameras import NUM_STATIONS, SENSOR_STATIONS, candidate_poses, stations, view_camera, visible_shares
from .catalogue import raw_label
from .layout import Layout, sample_layout
from .mesh import Scan, Surface, add_noise, build_surface, scan_surface
from .placement import Placed
from .room import Room, RoomObject

MIN_OBJECTS = 12
MAX_TARGET_SHARE = 0.30  # questions are asked about objects visible in at most this share of candidate views
MIN_TARGETS = 6  # objects of a room that are visible in a view, but in no more than that share
MIN_DISTRACTED = 8  # such objects that at least two others of the room share their label with
MAX_DRAWS = 60
_STREAM = 0x3D61  # keeps these random numbers apart from others drawn from the same seed


@dataclass
class Generated:
    """A room with the whole surface behind its scan (objects numbered as in the room), for rendering frames."""

    room: Room
    surface: Surface
    layout: Layout


def generate_room(scene_id: str, seed: int, *, points_only: bool = False) -> Room:
    """A furnished room, the same for the same seed.

    Args:
        scene_id: name of the scan, "scene0000_00".
        seed: non-negative integer; the only source of chance.
        points_only: leave out the triangles. Points, boxes and everything else stay exactly the same.
    """
    return generate(scene_id, seed, faces=not points_only).room


def generate(scene_id: str, seed: int, *, faces: bool) -> Generated:
    """As `generate_room`, together with the whole surface; draws again until a room has what questions need."""
    if seed < 0:
        raise ValueError(f"The seed of a room must not be negative, but it is {seed}.")
    for draw in range(MAX_DRAWS):
        rng = np.random.default_rng([_STREAM, seed, draw])
        layout = sample_layout(rng)
        if layout is None:
            continue
        stations_S3 = stations(layout, SENSOR_STATIONS)
        if len(stations_S3) < NUM_STATIONS:
            continue
        surface = build_surface(layout, rng, faces=faces)
        scan = scan_surface(surface, layout, stations_S3, rng)
        if len(scan.kept_objects) < MIN_OBJECTS:
            continue
        generated = _assemble(scene_id, seed, layout, surface, scan, stations_S3, rng)
        if _can_be_asked_about(generated.room):
            return generated
    raise RuntimeError(f"No usable room came out of {MAX_DRAWS} draws from seed {seed}; the programmes are too full.")


def _can_be_asked_about(room: Room) -> bool:
    """Whether enough objects are hard to find: seen from few places, and alike to others."""
    labels = Counter(thing.label for thing in room.objects)
    targets = [thing for thing in room.objects if 0 < room.visible_share[thing.object_id] <= MAX_TARGET_SHARE]
    distracted = sum(labels[thing.label] >= 3 for thing in targets)
    return len(targets) >= MIN_TARGETS and distracted >= MIN_DISTRACTED


def _assemble(
    scene_id: str,
    seed: int,
    layout: Layout,
    surface: Surface,
    scan: Scan,
    stations_S3: np.ndarray,
    rng: np.random.Generator,
) -> Generated:
    # Shuffled, so that an objectId says nothing about what the object is.
    order = [scan.kept_objects[int(index)] for index in rng.permutation(len(scan.kept_objects))]
    new_id_P = np.full(len(layout.placed) + 1, -1, dtype=np.int32)
    new_id_P[order] = np.arange(len(order))
    unscanned_V = (surface.owner_V >= 0) & (new_id_P[surface.owner_V] < 0)
    surface.owner_V = new_id_P[surface.owner_V]
    scanned = surface.subset(scan.keep_V)
    vertices_V3 = add_noise(surface, rng)[scan.keep_V]
    axis_align_44 = _axis_alignment(rng)
    poses_444 = candidate_poses(stations_S3)
    shares_K = visible_shares(
        scanned.vertices_V3, scanned.owner_V, scan.seen_SV[:NUM_STATIONS, scan.keep_V], poses_444, len(order)
    )
    ids = {id(layout.placed[index]): object_id for object_id, index in enumerate(order)}
    boxes_K7 = _boxes(vertices_V3, scanned.owner_V, len(order))
    objects = [_describe(layout.placed[index], ids, boxes_K7[ids[id(layout.placed[index])]]) for index in order]
    room = Room(
        scene_id=scene_id,
        seed=seed,
        kind=layout.kind,
        size_3=layout.size_3,
        objects=objects,
        vertices_V3=vertices_V3,
        colors_V3=scanned.colors_V3,
        faces_F3=scanned.faces_F3,
        instance_V=scanned.owner_V,
        nyu40_V=scanned.nyu40_V,
        axis_align_44=axis_align_44,
        visible_share={object_id: float(share) for object_id, share in enumerate(shares_K)},
        floor_centre_3=floor_centre(vertices_V3),
        candidate_poses_V44=poses_444,
    )
    return Generated(room, surface.subset(~unscanned_V), layout)


def _boxes(vertices_V3: np.ndarray, owner_V: np.ndarray, count: int) -> np.ndarray:
    """Extents [count, 7] of every object's vertices."""
    boxes_K7 = np.zeros((count, 7), dtype=np.float32)
    by_owner = np.argsort(owner_V, kind="stable")
    starts = np.searchsorted(owner_V[by_owner], np.arange(count + 1))
    for object_id in range(count):
        points_N3 = vertices_V3[by_owner[starts[object_id] : starts[object_id + 1]]]
        low_3, high_3 = points_N3.min(0), points_N3.max(0)
        boxes_K7[object_id, :3], boxes_K7[object_id, 3:6] = (low_3 + high_3) / 2, high_3 - low_3
    return boxes_K7


def _describe(thing: Placed, ids: dict[int, int], box_7: np.ndarray) -> RoomObject:
    facing = float(np.arctan2(np.sin(thing.yaw), np.cos(thing.yaw))) if thing.item.has_front else None
    return RoomObject(
        object_id=ids[id(thing)],
        label=raw_label(thing.item),
        class_id=class_of_nyu40(thing.item.nyu40),
        nyu40=thing.item.nyu40,
        color=thing.look.color,
        material=thing.look.material,
        size_word=thing.look.size_word,
        box_7=box_7,
        facing=facing,
        support_id=ids[id(thing.support)] if thing.support is not None else None,
        on_wall=thing.rule in ("hang", "flank"),
    )


def _axis_alignment(rng: np.random.Generator) -> np.ndarray:
    """Raw to world: a turn about z, at least 5 degrees away from every multiple of 90, and a shift.

    Rounded to the six decimals of ScanNet's text files, so that what is read back is what was meant.
    """
    angle = np.radians(90.0 * rng.integers(4) + rng.uniform(5, 85))
    matrix_44 = np.eye(4)
    matrix_44[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    matrix_44[:3, 3] = [*rng.uniform(-6, 6, 2), rng.uniform(-0.15, 0.15)]
    return np.round(matrix_44, 6)


def candidate_cameras(room: Room) -> list[Camera]:
    """The 16 candidate views of a room (see cameras.py), in the order that `visible_share` counts them."""
    if room.candidate_poses_V44 is None:
        raise ValueError(f"Room {room.scene_id} was not made by generate_room, so it has no candidate views.")
    return [view_camera(pose_44) for pose_44 in room.candidate_poses_V44]
