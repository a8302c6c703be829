"""Raw ScanNet-format scans -> aligned, labelled, boxed, cached scenes (`<scene_id>.npz`, see datasets/scene.py).

Boxes are the extents of an object's vertices AFTER the axis alignment, over all vertices of the mesh. (ScanNet's
single-scan exporter, copied into many repositories, writes the extents before it.) Walls, floors, ceilings and
unlabelled parts get no box.

Shapes: V mesh vertices, N points kept, K objects.
"""

import hashlib
import multiprocessing
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from tqdm import tqdm

from ..utils.files import read_text, write_whole
from .frames import read_views
from .labelled_cloud import GREY, LabelledCloud, furniture, instance_boxes, read_axis_alignment, transform
from .ply import read_ply
from .scan_labels import LABEL_MAP_NAME, Annotation, load_label_map, read_annotation
from .scannet_arrays import build_scene_of_arrays
from .scannet_instances import build_scene_of_instances
from .scene import Scene, load_scene, save_scene
from .sources import ARRAYS, INSTANCES, PICTURES, RAW, Source, describe, find_sources, raw_source

PREPARE_VERSION = 2  # raise it when prepared files made by older code must be made again
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
    cloud = LabelledCloud(
        scene_id,
        mesh.vertices_V3,
        world_V3,
        colors_V3,
        annotation.instance_ids_V,
        annotation.nyu40_V,
        axis_align_44,
    )
    objects = furniture(instance_boxes(world_V3, annotation.instance_ids_V), annotation.labels, label_map)
    views = read_views(scan_dir, axis_align_44, max_frames=options.max_frames)
    return cloud.to_scene(objects, views, notes, max_points=options.max_points, seed=options.seed)


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
    options = PrepareOptions(max_points=max_points, seed=seed, max_frames=max_frames)
    return prepare_source(raw_source(Path(scan_dir)), label_map, Path(out_path), options)


def prepare_source(source: Source, label_map: dict[str, int], out_path: Path, options: PrepareOptions) -> Scene:
    """`prepare_scan` for a scene in any form."""
    stamp = _stamp(source, label_map, options)
    if _is_current(out_path, stamp):
        return load_scene(out_path)
    if source.kind == PICTURES:
        raise ValueError(
            f"{source.folder} holds pictures but no geometry; add {source.scene_id}_vh_clean_2.ply or the prepared "
            "arrays, or ask about posed RGB-D frames with `python main.py infer --scene`."
        )
    if source.instances is not None:
        scene = build_scene_of_instances(
            source.instances,
            label_map,
            source.matrices,
            source.folder,
            max_points=options.max_points,
            seed=options.seed,
            max_frames=options.max_frames,
        )
    elif source.arrays is None:
        scene = build_scene(source.folder, label_map, options=options)
    else:
        scene = build_scene_of_arrays(
            source.arrays,
            source.scene_id,
            source.folder,
            max_points=options.max_points,
            seed=options.seed,
            max_frames=options.max_frames,
        )
    save_scene(scene, out_path)
    write_whole(_stamp_path(out_path), orjson.dumps(stamp, option=orjson.OPT_INDENT_2))
    return scene


def _stamp_path(out_path: Path) -> Path:
    return out_path.with_name(out_path.stem + ".inputs.json")


def _stamp(source: Source, label_map: dict[str, int], options: PrepareOptions) -> dict[str, Any]:
    """What a prepared file was made from: sizes and times of the scene's files, label table, parameters."""
    table = hashlib.sha256(orjson.dumps(label_map, option=orjson.OPT_SORT_KEYS)).hexdigest()[:16]
    return {
        "kind": source.kind,
        "inputs": source.inputs(),
        "label_table": "" if source.kind == ARRAYS else table,
        "options": asdict(options),
    }


def _is_current(out_path: Path, stamp: dict[str, Any]) -> bool:
    stamp_path = _stamp_path(out_path)
    if not out_path.exists() or not stamp_path.exists():
        return False
    try:
        return orjson.loads(stamp_path.read_bytes()) == stamp
    except orjson.JSONDecodeError:
        return False  # a stamp we cannot read says nothing, so the scan is prepared again


def read_split(root: str | Path, split: str) -> list[str]:
    """Scene ids of `scannetv2_<split>.txt`."""
    path = Path(root) / f"scannetv2_{split}.txt"
    return read_text(
        path, f"There is no split file {path}; copy ScanNet's own, or list the scene ids one a line."
    ).split()


def is_prepared(source: Source, label_map: dict[str, int], out_path: Path, options: PrepareOptions) -> bool:
    """Whether a scene's prepared file is there and current."""
    return _is_current(out_path, _stamp(source, label_map, options))


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
    """Prepare a root's scenes into `out` (default `root/prepared`), in parallel, restartable.

    They are raw scans, the field's prepared arrays or labelled instances (datasets/sources.py): what else than raw
    scans was found is said on standard error. A broken one does not stop the others: it is returned, with one
    sentence, and its prepared file is not written.

    Args:
        split: `train`, `val` or `test` takes the scans of `root/scannetv2_<split>.txt`; None takes all. A root of
            instances alone holds a part of a split: the others are counted on standard error.
        workers: processes; None takes the CPU cores of this process.
    """
    root = Path(root)
    out_dir = Path(out) if out is not None else root / "prepared"
    options = PrepareOptions(max_points=max_points, seed=seed, max_frames=max_frames)
    if max_points < 1:
        raise ValueError(f"max_points is {max_points}; a scene keeps at least one point.")
    sources = _announce(root, split)
    raw_labels = any(source.kind in (RAW, INSTANCES) for source in sources)
    label_map = load_label_map(root / LABEL_MAP_NAME) if raw_labels else {}
    out_dir.mkdir(parents=True, exist_ok=True)
    jobs = [(source, label_map, out_dir / f"{source.scene_id}.npz", options) for source in sources]
    jobs = [job for job in jobs if not _is_current(job[2], _stamp(job[0], label_map, options))]
    failures: list[Failure] = []
    workers = min(workers or len(_cpus()), max(1, len(jobs)))
    done = len(sources) - len(jobs)
    with tqdm(total=len(sources), initial=done, desc="prepare", unit="scan", disable=not jobs) as bar:
        for failure in _run(jobs, workers):
            if failure is not None:
                failures.append(failure)
                bar.write(f"{failure.scene_id}: {failure.message}", file=sys.stderr)
            bar.update()
    return sorted(failures, key=lambda failure: failure.scene_id)


def _announce(root: Path, split: str | None) -> list[Source]:
    """The scenes to prepare, with what is worth knowing of them said on standard error."""
    wanted = read_split(root, split) if split is not None else None
    sources = find_sources(root, wanted)
    if wanted is not None and len(sources) < len(wanted):
        missing = len(wanted) - len(sources)
        tqdm.write(f"{missing:,} of {len(wanted):,} scans of split {split} are not there: left out", file=sys.stderr)
    if not sources:
        raise ValueError(f"There are no scans to prepare below {root}; put raw scans into {root / 'scans'}.")
    if any(source.kind != RAW for source in sources):
        tqdm.write(f"found {describe(sources)}", file=sys.stderr)
    return sources


def _cpus() -> set[int] | range:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)


_Job = tuple[Source, dict[str, int], Path, PrepareOptions]


def _run(jobs: list[_Job], workers: int) -> Iterator[Failure | None]:
    if workers <= 1:
        yield from map(_prepare_job, jobs)
        return
    # Workers read and write files with numpy alone, so forking is safe and needs no installed package.
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context(method)) as pool:
        pending = {pool.submit(_prepare_job, job): job[0].scene_id for job in jobs}
        for future in as_completed(pending):
            try:
                yield future.result()
            except BrokenProcessPool:
                yield Failure(pending[future], "a worker was killed (memory?); run again with fewer workers.")


def _prepare_job(job: _Job) -> Failure | None:
    source, label_map, out_path, options = job
    if source.kind == RAW and not source.folder.is_dir():
        return Failure(source.scene_id, f"There is no scan folder {source.folder}; copy it, or take it off the split.")
    try:
        prepare_source(source, label_map, out_path, options)
    except (ValueError, OSError) as error:
        return Failure(source.scene_id, str(error))
    return None
