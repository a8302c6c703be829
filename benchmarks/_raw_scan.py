"""A raw scan in ScanNet's format of any size, and the plain way of preparing one: data and peer of `bench prepare`.

The peer follows the steps of ScanNet's own `load_scannet_data.py` and its batch exporter, with the standard json
module, plyfile and Python loops over vertices, as copied into VoteNet, ScanRefer and their successors.

Shapes: V vertices, F triangles, K objects.
"""

import csv
import json
from pathlib import Path

import numpy as np
from plyfile import PlyData, PlyElement

from ..datasets.rooms import Room, generate_room
from ..datasets.rooms.label_table import write_label_table

SEGMENT_VERTICES = 50  # about what ScanNet's over-segmentation puts into one segment
STRUCTURE = (1, 2, 22)  # NYU40: wall, floor, ceiling


def write_raw_scan(root: Path, num_vertices: int, seed: int = 0) -> Path:
    """Write `root/scans/<id>` with exactly so many vertices, and the label table; returns the scan's folder.

    The room is generated; its vertices (a room has some 30,000 to 80,000) are repeated with a jitter of millimetres.
    """
    room = generate_room("scene0000_00", seed)
    rng = np.random.default_rng(seed)
    pick_V = np.arange(num_vertices) % len(room.vertices_V3)
    world_V3 = room.vertices_V3[pick_V] + rng.normal(0, 0.002, (num_vertices, 3))
    to_raw_44 = np.linalg.inv(room.axis_align_44)
    folder = root / "scans" / room.scene_id
    folder.mkdir(parents=True)
    _write_mesh(folder, room, world_V3 @ to_raw_44[:3, :3].T + to_raw_44[:3, 3], pick_V)
    _write_labels(folder, room, pick_V)
    numbers = " ".join(f"{value:.6f}" for value in room.axis_align_44.reshape(-1))
    (folder / f"{room.scene_id}.txt").write_text(f"axisAlignment = {numbers}\n", encoding="utf-8")
    write_label_table(root / "scannetv2-labels.combined.tsv", {thing.label: 1 for thing in room.objects})
    return folder


def _write_mesh(folder: Path, room: Room, raw_V3: np.ndarray, pick_V: np.ndarray) -> None:
    types = [(axis, "<f4") for axis in "xyz"] + [(name, "u1") for name in ("red", "green", "blue", "alpha")]
    vertices = np.zeros(len(raw_V3), dtype=types)
    for column, axis in enumerate("xyz"):
        vertices[axis] = raw_V3[:, column]
    for column, name in enumerate(("red", "green", "blue")):
        vertices[name] = room.colors_V3[pick_V, column]
    copies = -(-len(raw_V3) // len(room.vertices_V3))
    corners_F3 = np.concatenate([room.faces_F3 + copy * len(room.vertices_V3) for copy in range(copies)])
    corners_F3 = corners_F3[(corners_F3 < len(raw_V3)).all(1)]
    faces = np.zeros(len(corners_F3), dtype=[("vertex_indices", "<i4", (3,))])
    faces["vertex_indices"] = corners_F3
    elements = [PlyElement.describe(vertices, "vertex")]
    elements.append(PlyElement.describe(faces, "face", len_types={"vertex_indices": "u1"}))
    PlyData(elements, byte_order="<").write(str(folder / f"{room.scene_id}_vh_clean_2.ply"))


def _write_labels(folder: Path, room: Room, pick_V: np.ndarray) -> None:
    """Segments of neighbouring vertices of one object, and the objects made of them."""
    instance_V = room.instance_V[pick_V]
    order_V = np.argsort(instance_V, kind="stable")
    sorted_V = instance_V[order_V]
    starts = np.flatnonzero(np.diff(sorted_V, prepend=sorted_V[0] - 1))
    rank_V = np.arange(len(sorted_V)) - np.repeat(starts, np.diff(starts, append=len(sorted_V)))
    new_V = rank_V % SEGMENT_VERTICES == 0
    segment_V = np.empty(len(pick_V), dtype=np.int64)
    segment_V[order_V] = order_V[new_V][np.cumsum(new_V) - 1]  # named by one of its vertices, as ScanNet's are
    groups = [
        {
            "id": number,
            "objectId": thing.object_id,
            "segments": np.unique(segment_V[instance_V == thing.object_id]).tolist(),
            "label": thing.label,
        }
        for number, thing in enumerate(room.objects)
    ]
    name = f"{room.scene_id}_vh_clean_2.0.010000.segs.json"
    contents = {
        name: {"sceneId": room.scene_id, "segIndices": segment_V.tolist()},
        f"{room.scene_id}.aggregation.json": {"sceneId": f"scannet.{room.scene_id}", "segGroups": groups},
    }
    for file, content in contents.items():
        (folder / file).write_text(json.dumps(content), encoding="utf-8")


def prepare_plainly(folder: Path, table: Path, out: Path, max_points: int) -> dict[int, np.ndarray]:
    """Prepare one scan step by step and save four arrays; returns each object's box (centre, size) after alignment."""
    scene_id = folder.name
    with table.open(encoding="utf-8") as file:
        label_map = {row["raw_category"]: int(row["nyu40id"]) for row in csv.DictReader(file, delimiter="\t")}
    with (folder / f"{scene_id}.aggregation.json").open(encoding="utf-8") as file:
        groups = json.load(file)["segGroups"]
    with (folder / f"{scene_id}_vh_clean_2.0.010000.segs.json").open(encoding="utf-8") as file:
        segments = json.load(file)["segIndices"]
    vertices_of: dict[int, list[int]] = {}
    for vertex, segment in enumerate(segments):
        vertices_of.setdefault(segment, []).append(vertex)
    points_V6 = _read_mesh(folder)
    ones_V1 = np.ones((len(points_V6), 1))
    points_V6[:, :3] = (np.concatenate([points_V6[:, :3], ones_V1], 1) @ _read_alignment(folder).T)[:, :3]
    instance_V, nyu40_V = np.zeros(len(points_V6), np.uint32), np.zeros(len(points_V6), np.uint32)
    label_of: dict[int, int] = {}
    for group in groups:
        label_of[group["objectId"]] = label_map[group["label"]]
        for segment in group["segments"]:
            instance_V[vertices_of[segment]] = group["objectId"] + 1
            nyu40_V[vertices_of[segment]] = label_map[group["label"]]
    boxes: dict[int, np.ndarray] = {}
    for object_id, nyu40 in label_of.items():
        object_P3 = points_V6[instance_V == object_id + 1, :3]
        if len(object_P3) and nyu40 not in (*STRUCTURE, 0):
            low_3, high_3 = object_P3.min(0), object_P3.max(0)
            boxes[object_id] = np.concatenate([(low_3 + high_3) / 2, high_3 - low_3])
    if len(points_V6) > max_points:
        kept = np.random.default_rng(0).choice(len(points_V6), max_points, replace=False)
        points_V6, instance_V, nyu40_V = points_V6[kept], instance_V[kept], nyu40_V[kept]
    arrays = {"vert": points_V6, "ins_label": instance_V, "sem_label": nyu40_V, "bbox": np.array(list(boxes.values()))}
    for name, array in arrays.items():
        np.save(out / f"{scene_id}_{name}.npy", array)
    return boxes


def _read_mesh(folder: Path) -> np.ndarray:
    """Coordinates and colours [V, 6]; plyfile reads the triangles too."""
    vertices = PlyData.read(str(folder / f"{folder.name}_vh_clean_2.ply"))["vertex"]
    columns = [vertices[name] for name in ("x", "y", "z", "red", "green", "blue")]
    return np.stack([np.asarray(column, dtype=np.float32) for column in columns], axis=1)


def _read_alignment(folder: Path) -> np.ndarray:
    for line in (folder / f"{folder.name}.txt").read_text(encoding="utf-8").splitlines():
        if "axisAlignment" in line:
            return np.array([float(word) for word in line.partition("= ")[2].split()]).reshape(4, 4)
    raise ValueError(f"{folder} has no axisAlignment; it was not written by this benchmark.")
