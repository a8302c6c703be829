"""Raw ScanNet-format scans -> aligned, labelled, boxed, cached scenes (`<scene_id>.npz`, see datasets/scene.py).

Boxes are the extents of an object's vertices AFTER the axis alignment, over all vertices of the mesh. (ScanNet's
single-scan exporter, copied into many repositories, writes the extents before it.) Walls, floors, ceilings and
unlabelled parts get no box.

Shapes: V mesh vertices, N points kept, K objects.
"""

import hashlib
import multiprocessing
import os
import re
import sys
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from tqdm import tqdm

from ..utils.files import read_text
from ..utils.labels import STRUCTURE_NYU40_IDS, class_of_nyu40
from .frames import has_frames, list_frames
from .ply import read_ply
from .scan_labels import LABEL_MAP_NAME, Annotation, load_label_map, read_annotation
from .scene import Scene, floor_centre, load_scene, save_scene

PREPARE_VERSION = 1  # raise it when prepared files made by older code must be made again
GREY = 128
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Failure:
    """A scan that could not be prepared, and why in one sentence."""

    scene_id: str
    message: str


@dataclass(frozen=True)
class PrepareOptions:
    """What a prepared file depends on besides the scan itself."""

    max_points: int = 50_000
    seed: int = 0
    max_frames: int | None = None
    version: int = PREPARE_VERSION


def read_axis_alignment(path: Path) -> np.ndarray | None:
    """The 4x4 `axisAlignment` of `<scene_id>.txt`; None where the file or the line is absent."""
    if not path.exists():
        return None
    match = re.search(r"^\s*axisAlignment\s*=(.*)$", path.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    if match is None:
        return None
    try:
        matrix_44 = np.array([float(word) for word in match[1].split()]).reshape(4, 4)
    except ValueError:
        raise ValueError(f"axisAlignment in {path} is not 16 numbers; copy the file again.") from None
    rotation_33 = matrix_44[:3, :3]
    if not np.isfinite(matrix_44).all() or np.abs(rotation_33 @ rotation_33.T - np.eye(3)).max() > 1e-2:
        raise ValueError(f"axisAlignment in {path} is not a rigid transform; copy the file again.")
    return matrix_44


def transform(points_N3: np.ndarray, matrix_44: np.ndarray) -> np.ndarray:
    """Points moved by a 4x4 transform, computed in float64, float32 out."""
    moved_N3 = points_N3.astype(np.float64) @ matrix_44[:3, :3].T + matrix_44[:3, 3]
    return moved_N3.astype(np.float32)


def instance_boxes(points_V3: np.ndarray, instance_ids_V: np.ndarray) -> dict[int, np.ndarray]:
    """Box (centre, size, heading 0; float32 [7]) of every instance id >= 0 from the extents of its points."""
    order = np.argsort(instance_ids_V, kind="stable")
    order = order[np.searchsorted(instance_ids_V[order], 0) :]
    if order.size == 0:
        return {}
    ids, starts = np.unique(instance_ids_V[order], return_index=True)
    low_K3 = np.minimum.reduceat(points_V3[order], starts, axis=0)
    high_K3 = np.maximum.reduceat(points_V3[order], starts, axis=0)
    boxes_K7 = np.concatenate([(low_K3 + high_K3) / 2, high_K3 - low_K3, np.zeros((len(ids), 1))], axis=1)
    return {int(number): box_7 for number, box_7 in zip(ids, boxes_K7.astype(np.float32), strict=True)}


def keep_points(raw_V3: np.ndarray, world_V3: np.ndarray, max_points: int, rng: np.random.Generator) -> np.ndarray:
    """Indices of at most `max_points` points, in order, by a uniform choice.

    The outermost points along each axis of both frames are always kept, so that the extents of the cached cloud are
    those of the full one in either frame.
    """
    count = len(raw_V3)
    if count <= max_points:
        return np.arange(count)
    outermost = np.unique(np.concatenate([end(cloud, axis=0) for cloud in (raw_V3, world_V3) for end in _ENDS]))
    rest = np.setdiff1d(np.arange(count), outermost, assume_unique=True)
    chosen = rng.choice(rest, size=max(0, max_points - len(outermost)), replace=False)
    return np.sort(np.concatenate([outermost, chosen]))


_ENDS = (np.argmin, np.argmax)


def build_scene(
    scan_dir: str | Path,
    label_map: dict[str, int] | None,
    *,
    options: PrepareOptions = PrepareOptions(),  # noqa: B008 - frozen
) -> Scene:
    """Read one raw scan folder into a Scene; without a label table (None) objects are not read.

    Raises:
        ValueError: missing, truncated or empty mesh, coordinates that are not finite, files that do not belong
            together; one sentence that says what to do.
    """
    scan_dir = Path(scan_dir)
    scene_id = scan_dir.name
    mesh = read_ply(scan_dir / f"{scene_id}_vh_clean_2.ply", with_faces=False)
    broken = int((~np.isfinite(mesh.vertices_V3).all(axis=1)).sum())
    if broken:
        raise ValueError(
            f"The mesh of {scene_id} has {broken} vertices with NaN or infinite coordinates; copy it again."
        )
    notes: list[str] = []
    axis_align_44 = read_axis_alignment(scan_dir / f"{scene_id}.txt")
    if axis_align_44 is None:
        notes.append(f"no axisAlignment in {scene_id}.txt: the raw frame is taken as aligned")
        axis_align_44 = np.eye(4)
    colors_V3 = mesh.colors_V3
    if colors_V3 is None:
        notes.append("the mesh has no colours: grey")
        colors_V3 = np.full(mesh.vertices_V3.shape, GREY, np.uint8)
    world_V3 = transform(mesh.vertices_V3, axis_align_44)
    annotation = read_annotation(scan_dir, len(world_V3), label_map) if label_map is not None else None
    if annotation is None:
        notes.append("the scan is unlabelled: no segmentation, aggregation or label table")
        count = len(world_V3)
        annotation = Annotation(np.full(count, -1, np.int32), np.zeros(count, np.uint8), {})
    label_map = label_map or {}
    frames, lost = (
        list_frames(scan_dir, axis_align_44, max_frames=options.max_frames) if has_frames(scan_dir) else ([], 0)
    )
    if lost:
        notes.append(f"{lost} frames without a finite pose left out")

    boxes = _furniture(instance_boxes(world_V3, annotation.instance_ids_V), annotation.labels, label_map)
    rng = np.random.default_rng([options.seed, zlib.crc32(scene_id.encode())])
    kept_N = keep_points(mesh.vertices_V3, world_V3, options.max_points, rng)
    return Scene(
        scene_id=scene_id,
        points_N3=world_V3[kept_N],
        colors_N3=colors_V3[kept_N],
        instance_ids_N=annotation.instance_ids_V[kept_N],
        nyu40_N=annotation.nyu40_V[kept_N],
        object_ids_K=np.array(list(boxes), dtype=np.int32),
        object_labels=[annotation.labels[object_id] for object_id in boxes],
        class_ids_K=np.array([class_of_nyu40(label_map[annotation.labels[i]]) for i in boxes], dtype=np.int32),
        boxes_K7=np.stack(list(boxes.values())) if boxes else np.zeros((0, 7), np.float32),
        axis_align_44=axis_align_44,
        origin_3=floor_centre(world_V3),
        frames=frames,
        notes=notes,
    )


def _furniture(
    boxes: dict[int, np.ndarray], labels: dict[int, str], label_map: dict[str, int]
) -> dict[int, np.ndarray]:
    """Boxes without those of structure and of labels that stand for nothing (NYU40 id 0)."""
    dropped = STRUCTURE_NYU40_IDS | {0}
    return {object_id: box_7 for object_id, box_7 in boxes.items() if label_map[labels[object_id]] not in dropped}


def prepare_scan(
    scan_dir: str | Path,
    label_map: dict[str, int],
    out_path: str | Path,
    *,
    max_points: int = 50_000,
    seed: int = 0,
    max_frames: int | None = None,
) -> Scene:
    """Prepare one scan and write it to `out_path`, or read it back where that file is current.

    It is current when the scan's files, the label table and the parameters are those it was made from.
    """
    scan_dir, out_path = Path(scan_dir), Path(out_path)
    options = PrepareOptions(max_points=max_points, seed=seed, max_frames=max_frames)
    stamp = _stamp(scan_dir, label_map, options)
    if _is_current(out_path, stamp):
        return load_scene(out_path)
    scene = build_scene(scan_dir, label_map, options=options)
    save_scene(scene, out_path)
    _write(_stamp_path(out_path), orjson.dumps(stamp, option=orjson.OPT_INDENT_2))
    return scene


def _stamp_path(out_path: Path) -> Path:
    return out_path.with_name(out_path.stem + ".inputs.json")


def _stamp(scan_dir: Path, label_map: dict[str, int], options: PrepareOptions) -> dict[str, Any]:
    """What a prepared file was made from: sizes and times of the scan's files, label table, parameters."""
    scene_id = scan_dir.name
    inputs: dict[str, list[int]] = {}
    suffixes = ("_vh_clean_2.ply", "_vh_clean_2.0.010000.segs.json", ".aggregation.json", ".txt")
    for path in [scan_dir / f"{scene_id}{suffix}" for suffix in suffixes] + [scan_dir / "color", scan_dir / "pose"]:
        if path.exists():
            status = path.stat()
            inputs[path.name] = [status.st_size if path.is_file() else 0, status.st_mtime_ns]
    table = hashlib.sha256(orjson.dumps(label_map, option=orjson.OPT_SORT_KEYS)).hexdigest()[:16]
    return {"inputs": inputs, "label_table": table, "options": asdict(options)}


def _is_current(out_path: Path, stamp: dict[str, Any]) -> bool:
    stamp_path = _stamp_path(out_path)
    if not out_path.exists() or not stamp_path.exists():
        return False
    try:
        return orjson.loads(stamp_path.read_bytes()) == stamp
    except orjson.JSONDecodeError:
        return False  # a stamp we cannot read says nothing, so the scan is prepared again


def _write(path: Path, content: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    os.replace(partial, path)


def read_split(root: str | Path, split: str) -> list[str]:
    """Scene ids of `scannetv2_<split>.txt`."""
    path = Path(root) / f"scannetv2_{split}.txt"
    return read_text(
        path, f"There is no split file {path}; copy ScanNet's own, or list the scene ids one a line."
    ).split()


def list_scans(root: str | Path, split: str | None = None) -> list[Path]:
    """Scan folders of a data root: those of a split (present or not), or every folder below scans/."""
    folder = Path(root) / "scans"
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}; put the raw scans there, or run `python main.py rooms` first.")
    if split is not None:
        return [folder / scene_id for scene_id in read_split(root, split)]
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def is_prepared(scan_dir: Path, label_map: dict[str, int], out_path: Path, options: PrepareOptions) -> bool:
    """Whether a scan's prepared file is there and current."""
    return _is_current(out_path, _stamp(scan_dir, label_map, options))


def prepare_scans(
    root: str | Path,
    out: str | Path | None = None,
    *,
    split: str | None = None,
    workers: int | None = None,
    max_points: int = 50_000,
    seed: int = 0,
    max_frames: int | None = None,
) -> list[Failure]:
    """Prepare the scans below `root/scans` into `out` (default `root/prepared`), in parallel, restartable.

    A broken scan does not stop the others: it is returned, with one sentence, and its prepared file is not written.

    Args:
        split: `train`, `val` or `test` takes the scans of `root/scannetv2_<split>.txt`; None takes all.
        workers: processes; None takes the CPU cores of this process.
    """
    root = Path(root)
    out_dir = Path(out) if out is not None else root / "prepared"
    options = PrepareOptions(max_points=max_points, seed=seed, max_frames=max_frames)
    if max_points < 1:
        raise ValueError(f"max_points is {max_points}; a scene keeps at least one point.")
    scans = list_scans(root, split)
    if not scans:
        raise ValueError(f"There are no scans below {root / 'scans'}; nothing to prepare.")
    label_map = load_label_map(root / LABEL_MAP_NAME)
    out_dir.mkdir(parents=True, exist_ok=True)
    todo = [scan for scan in scans if not is_prepared(scan, label_map, out_dir / f"{scan.name}.npz", options)]
    jobs = [(scan, label_map, out_dir / f"{scan.name}.npz", options) for scan in todo]
    failures: list[Failure] = []
    workers = min(workers or len(_cpus()), max(1, len(jobs)))
    bar = tqdm(total=len(scans), initial=len(scans) - len(todo), desc="prepare", unit="scan", disable=not jobs)
    with bar:
        for failure in _run(jobs, workers):
            if failure is not None:
                failures.append(failure)
                bar.write(f"{failure.scene_id}: {failure.message}", file=sys.stderr)
            bar.update()
    return sorted(failures, key=lambda failure: failure.scene_id)


def _cpus() -> set[int] | range:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)


_Job = tuple[Path, dict[str, int], Path, PrepareOptions]


def _run(jobs: list[_Job], workers: int) -> Iterator[Failure | None]:
    if workers <= 1:
        yield from map(_prepare_job, jobs)
        return
    # Workers read and write files with numpy alone, so forking is safe and needs no installed package.
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context(method)) as pool:
        pending = {pool.submit(_prepare_job, job): job[0].name for job in jobs}
        for future in as_completed(pending):
            try:
                yield future.result()
            except BrokenProcessPool:
                yield Failure(pending[future], "a worker was killed (memory?); run again with fewer workers.")


def _prepare_job(job: _Job) -> Failure | None:
    scan_dir, label_map, out_path, options = job
    if not scan_dir.is_dir():
        return Failure(scan_dir.name, f"There is no scan folder {scan_dir}; copy it, or take it off the split.")
    try:
        prepare_scan(
            scan_dir,
            label_map,
            out_path,
            max_points=options.max_points,
            seed=options.seed,
            max_frames=options.max_frames,
        )
    except (ValueError, OSError) as error:
        return Failure(scan_dir.name, str(error))
    return None
