"""Generated rooms on disk, in ScanNet's own raw format, so that the real preparation runs on them unchanged.

    root/scans/<scene_id>/<scene_id>_vh_clean_2.ply, .segs.json, .aggregation.json, .txt
                          color/<i>.jpg  depth/<i>.png  pose/<i>.txt  intrinsic/intrinsic_{color,depth}.txt
    root/scannetv2_{train,val}.txt   root/scannetv2-labels.combined.tsv   root/rooms.json   root/annotations/

Meshes and poses are in the RAW frame: world = axis_align_44 @ raw.
"""

import contextlib
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import orjson
from PIL import Image
from tqdm import tqdm

from ...utils.files import write_whole
from ...utils.workers import start_pool
from .annotate import Map, write_annotations
from .frames import frame_intrinsics, render_frames
from .generate import Generated, generate
from .label_table import write_label_table
from .room import Room
from .version import ROOMS_VERSION, distribution_hash

MANIFEST = "generated.json"  # beside the ScanNet files; says what a scan was generated from
SEGMENT = 0.35  # metres, edge of the cells that the over-segmentation cuts objects into
FIRST_VAL = 8000  # scene numbers from here are held-out rooms
MAX_VAL = 2000


def scene_id_of(split: str, index: int) -> str:
    """Name of a generated scan: training rooms from scene0000_00, held-out ones from scene8000_00."""
    if split == "val":
        if index >= MAX_VAL:
            raise ValueError(f"There are at most {MAX_VAL} held-out rooms; ask for fewer than {index + 1}.")
        return f"scene{FIRST_VAL + index:04d}_00"
    return f"scene{index if index < FIRST_VAL else index + MAX_VAL:04d}_00"


def room_seed(seed: int, split: str, index: int) -> int:
    """Seed of a room: even for training rooms and odd for held-out ones, so the two are disjoint by construction."""
    if split not in ("train", "val"):
        raise ValueError(f"Unknown split {split!r}; splits are train and val.")
    word = int(np.random.SeedSequence([seed, index, split == "val"]).generate_state(1, np.uint64)[0])
    return (word >> 2 << 1) | (split == "val")


def write_scan(
    room: Room,
    scans_root: str | Path,
    *,
    num_frames: int = 12,
    frame_size: tuple[int, int] = (320, 240),
) -> Path:
    """Write one room as a ScanNet scan and return its folder.

    The folder appears only when it is whole. A whole scan of the same room, version and frames is left as it is; one
    of anything else is replaced. A room without triangles (points only) gets no frames.
    """
    folder = Path(scans_root) / room.scene_id
    points_only = len(room.faces_F3) == 0
    if _manifest(room.scene_id, room.seed, points_only, num_frames, frame_size) == _read_manifest(folder):
        return folder
    generated = generate(room.scene_id, room.seed, faces=not points_only)
    if len(generated.room.vertices_V3) != len(room.vertices_V3) or len(generated.room.objects) != len(room.objects):
        raise ValueError(
            f"Room {room.scene_id} is not what seed {room.seed} generates now; make it again with generate_room."
        )
    return _write_generated(generated, folder, num_frames, frame_size)


def _manifest(
    scene_id: str, seed: int, points_only: bool, num_frames: int, frame_size: tuple[int, int]
) -> dict[str, object]:
    return {
        "scene_id": scene_id,
        "version": ROOMS_VERSION,
        "hash": distribution_hash(),
        "seed": seed,
        "points_only": points_only,
        "num_frames": 0 if points_only else num_frames,
        "frame_size": list(frame_size),
    }


def _read_manifest(folder: Path) -> dict[str, object] | None:
    path = folder / MANIFEST
    return orjson.loads(path.read_bytes()) if path.is_file() else None


def _write_generated(generated: Generated, folder: Path, num_frames: int, frame_size: tuple[int, int]) -> Path:
    room = generated.room
    points_only = len(room.faces_F3) == 0
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        to_raw_44 = np.linalg.inv(room.axis_align_44)
        _write_mesh(room, to_raw_44, unfinished / f"{room.scene_id}_vh_clean_2.ply")
        _write_segments(room, unfinished)
        count = 0 if points_only else num_frames
        _write_frames(generated, to_raw_44, unfinished, count, frame_size)
        _write_info(room, unfinished / f"{room.scene_id}.txt", count, frame_size)
        manifest = _manifest(room.scene_id, room.seed, points_only, num_frames, frame_size)
        (unfinished / MANIFEST).write_bytes(orjson.dumps(manifest))
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _write_mesh(room: Room, to_raw_44: np.ndarray, path: Path) -> None:
    """Binary little-endian PLY with the properties of ScanNet's `_vh_clean_2.ply`."""
    vertices = np.zeros(
        len(room.vertices_V3),
        dtype=[("xyz", "<f4", 3), ("rgba", "u1", 4)],
    )
    vertices["xyz"] = room.vertices_V3.astype(np.float64) @ to_raw_44[:3, :3].T + to_raw_44[:3, 3]
    vertices["rgba"][:, :3], vertices["rgba"][:, 3] = room.colors_V3, 255
    faces = np.zeros(len(room.faces_F3), dtype=[("count", "u1"), ("corners", "<i4", 3)])
    faces["count"], faces["corners"] = 3, room.faces_F3
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(vertices)}"]
    header += [f"property float {axis}" for axis in "xyz"]
    header += [f"property uchar {channel}" for channel in ("red", "green", "blue", "alpha")]
    header += [f"element face {len(faces)}", "property list uchar int vertex_indices", "end_header", ""]
    path.write_bytes("\n".join(header).encode() + vertices.tobytes() + faces.tobytes())


def _segments(room: Room) -> np.ndarray:
    """An over-segmentation [V]: cells of every object, wall and floor, each named by one of its vertices."""
    cell_V3 = np.floor(room.vertices_V3 / SEGMENT).astype(np.int64) + 512
    group_V = np.where(room.instance_V >= 0, room.instance_V.astype(np.int64) + 64, room.nyu40_V)
    key_V = ((group_V * 1024 + cell_V3[:, 0]) * 1024 + cell_V3[:, 1]) * 1024 + cell_V3[:, 2]
    _, first, inverse = np.unique(key_V, return_index=True, return_inverse=True)
    return first[inverse.reshape(-1)]


def _write_segments(room: Room, folder: Path) -> None:
    """`.segs.json` (segment of every vertex) and `.aggregation.json` (segments of every object, then wall, floor)."""
    segment_V = _segments(room)
    params = {"kThresh": "0.0001", "segMinVerts": "20"}
    segs = {"params": params, "sceneId": room.scene_id, "segIndices": segment_V.tolist()}
    name = f"{room.scene_id}_vh_clean_2.0.010000.segs.json"
    (folder / name).write_bytes(orjson.dumps(segs))
    members = [(thing.label, room.instance_V == thing.object_id) for thing in room.objects]
    members += [(label, room.nyu40_V == nyu40) for label, nyu40 in (("wall", 1), ("floor", 2))]
    groups = [
        {"id": number, "objectId": number, "segments": np.unique(segment_V[mask_V]).tolist(), "label": label}
        for number, (label, mask_V) in enumerate(members)
    ]
    aggregation = {
        "sceneId": f"scannet.{room.scene_id}",
        "appId": "Aggregator.v2",
        "segGroups": groups,
        "segmentsFile": f"scannet.{name}",
    }
    (folder / f"{room.scene_id}.aggregation.json").write_bytes(orjson.dumps(aggregation))


def _matrix_text(matrix_44: np.ndarray) -> str:
    return "\n".join(" ".join(f"{value:.6f}" for value in row) for row in matrix_44) + "\n"


def _write_frames(
    generated: Generated, to_raw_44: np.ndarray, folder: Path, num_frames: int, frame_size: tuple[int, int]
) -> None:
    if num_frames == 0:
        return
    for name in ("color", "depth", "pose", "intrinsic"):
        (folder / name).mkdir()
    frames = render_frames(generated, num_frames, frame_size)
    for number, frame in enumerate(frames):
        Image.fromarray(frame.color_HW3).save(folder / "color" / f"{number}.jpg", quality=92)
        # Noise hardly compresses, so more effort than level 2 buys nothing.
        Image.fromarray(frame.depth_HW).save(folder / "depth" / f"{number}.png", compress_level=2)
        (folder / "pose" / f"{number}.txt").write_text(_matrix_text(to_raw_44 @ frame.camera.pose_44))
    intrinsics_44 = np.eye(4)
    intrinsics_44[:3, :3] = frames[0].camera.intrinsics_33
    for name in ("color", "depth"):
        (folder / "intrinsic" / f"intrinsic_{name}.txt").write_text(_matrix_text(intrinsics_44))
        (folder / "intrinsic" / f"extrinsic_{name}.txt").write_text(_matrix_text(np.eye(4)))


def _write_info(room: Room, path: Path, num_frames: int, frame_size: tuple[int, int]) -> None:
    """`<scene_id>.txt` with the keys of ScanNet's; without frames, those of the cameras are left out."""
    fields: dict[str, object] = {
        "axisAlignment": " ".join(f"{value:.6f}" for value in room.axis_align_44.reshape(-1)),
    }
    if num_frames:
        width, height = frame_size
        intrinsics_33 = frame_intrinsics(width, height)
        fields["colorToDepthExtrinsics"] = " ".join(f"{value:.6f}" for value in np.eye(4).reshape(-1))
        for kind in ("color", "depth"):
            fields[f"{kind}Height"], fields[f"{kind}Width"] = height, width
            fields[f"fx_{kind}"], fields[f"fy_{kind}"] = (f"{intrinsics_33[k, k]:.6f}" for k in (0, 1))
            fields[f"mx_{kind}"], fields[f"my_{kind}"] = (f"{intrinsics_33[k, 2]:.6f}" for k in (0, 1))
        fields["numColorFrames"] = fields["numDepthFrames"] = num_frames
    fields["sceneType"] = room.kind
    path.write_text("".join(f"{key} = {fields[key]}\n" for key in sorted(fields)))


def _make_scan(
    task: tuple[str, int], scans_root: Path, points_only: bool, num_frames: int, frame_size: tuple[int, int]
) -> Room:
    """Write one scan (unless it is there) and return its room without the points."""
    scene_id, seed = task
    folder = scans_root / scene_id
    current = _read_manifest(folder) == _manifest(scene_id, seed, points_only, num_frames, frame_size)
    generated = generate(scene_id, seed, faces=not points_only and not current)
    if not current:
        _write_generated(generated, folder, num_frames, frame_size)
    return replace(
        generated.room,
        vertices_V3=np.zeros((0, 3), np.float32),
        colors_V3=np.zeros((0, 3), np.uint8),
        faces_F3=np.zeros((0, 3), np.int32),
        instance_V=np.zeros(0, np.int32),
        nyu40_V=np.zeros(0, np.uint8),
    )


def write_rooms(
    root: str | Path,
    *,
    num_train: int,
    num_val: int,
    seed: int = 0,
    points_only: bool = False,
    workers: int | None = None,
    num_frames: int = 12,
    frame_size: tuple[int, int] = (320, 240),
    annotations: bool = True,
) -> dict[str, object]:
    """Write training and held-out rooms with their splits, label table and annotations; returns rooms.json's content.

    Restartable: whole scans of the same version are kept. `workers` processes, by default one per core, make rooms
    and what is said of each; one of them chooses what is asked.
    """
    if num_train < 0 or num_val < 0 or num_train + num_val == 0:
        raise ValueError(f"Ask for at least one room, not {num_train} for training and {num_val} held out.")
    root = Path(root)
    if not annotations and (root / "annotations").exists():
        raise ValueError(f"{root} has annotations, which might be of other rooms; take another folder, or write them.")
    (root / "scans").mkdir(parents=True, exist_ok=True)
    counts = {"train": num_train, "val": num_val}
    tasks = [
        (scene_id_of(split, index), room_seed(seed, split, index))
        for split in counts
        for index in range(counts[split])
    ]
    make = partial(
        _make_scan, scans_root=root / "scans", points_only=points_only, num_frames=num_frames, frame_size=frame_size
    )
    with _processes(min(workers or os.cpu_count() or 1, len(tasks))) as spread:
        rooms: list[Room] = list(tqdm(spread(make, tasks), total=len(tasks), desc="rooms", unit="room"))
        by_split = {"train": rooms[:num_train], "val": rooms[num_train:]}
        labels = Counter(thing.label for room in rooms for thing in room.objects)
        write_label_table(root / "scannetv2-labels.combined.tsv", labels)
        for split, members in by_split.items():
            listing = "".join(f"{room.scene_id}\n" for room in members)
            write_whole(root / f"scannetv2_{split}.txt", listing.encode())
        written = write_annotations(root, by_split, seed, spread) if annotations else {}
    summary: dict[str, object] = {
        "version": ROOMS_VERSION,
        "hash": distribution_hash(),
        "seed": seed,
        "num_train": num_train,
        "num_val": num_val,
        "points_only": points_only,
        "num_objects": sum(len(room.objects) for room in rooms),
        "annotations": written,
    }
    write_whole(root / "rooms.json", orjson.dumps(summary, option=orjson.OPT_INDENT_2))
    return summary


@contextlib.contextmanager
def _processes(number: int) -> Iterator[Map]:
    """`map`, spread over so many processes where there are more than one."""
    if number == 1:
        yield map
        return
    with start_pool(number) as pool:
        try:
            yield pool.map
        except BrokenProcessPool:
            raise ValueError(
                "A process that makes rooms was killed, most often for want of memory; "
                "start again with fewer workers (whole rooms are kept)."
            ) from None
