"""Labelled instances of ScanNet's scans, handed on without the scans -> Scene.

One file `<scene_id>.npz` a scan:

| array | content |
|---|---|
| `object_ids` | [K]: objectId |
| `labels` | [K]: raw label |
| `points` | [P, 3]: metres, RAW frame, one object after the other; float16 |
| `offsets` | [K + 1]: where each object's points begin, and the end of the last |
| `point_counts` | [K]: vertices of the object in the mesh; `points` holds a part of them |
| `boxes_min_max` | [K, 6]: lowest and highest corner of all these vertices, RAW frame |

The cloud is what the instances add up to: parts that nobody labelled are absent. The axis alignment comes from
`<scene_id>.txt`, or from a table of all scans' matrices. The stored boxes are in the raw frame and cannot be turned
exactly, so boxes are made again from the aligned points; the stored ones serve as a check and say how much the
thinning of the points costs. Float16 has steps of 1 mm from 1 m on, 2 mm from 2 m, 4 mm from 4 m and 8 mm from 8 m of
the raw origin; a coordinate is off by half a step at most. There are no colours: all points are GREY.

Shapes: K objects, P points.
"""

import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import orjson

from .archive import read_arrays
from .frames import read_views
from .labelled_cloud import (
    GREY,
    LabelledCloud,
    furniture,
    instance_boxes,
    read_axis_alignment,
    rigid_matrix,
    transform,
)
from .scene import Scene

FOLDER = "scannet_instances"  # below a data root
MATRICES = "scans_axis_alignment_matrices.json"  # scene id -> 16 numbers, row-major, raw to aligned
NO_COLORS = "the source has no colours: all points are grey; train with encoder.use_color=false"
_ARRAYS = ("object_ids", "labels", "boxes_min_max", "point_counts", "points", "offsets")
_SLACK = 0.02  # metres that a point may stand out of its object's stored box


@dataclass(frozen=True)
class Instances:
    """One file, checked; coordinates in the raw frame."""

    object_ids_K: np.ndarray  # int32
    labels: list[str]
    points_P3: np.ndarray  # float32
    rows_P: np.ndarray  # int, row in object_ids_K of the object that each point belongs to
    point_counts_K: np.ndarray  # int, of the mesh
    boxes_K6: np.ndarray  # float64, lowest and highest corner of all the mesh's vertices
    rounding: float  # metres that a coordinate may be off, by the type that it is stored in


def build_scene_of_instances(
    path: str | Path,
    label_map: dict[str, int],
    matrices: str | Path,
    scan_dir: str | Path | None = None,
    *,
    max_points: int = 50_000,
    seed: int = 0,
    max_frames: int | None = None,
) -> Scene:
    """Read one scan's instances.

    Args:
        path: `<scene_id>.npz`.
        label_map: raw label -> NYU40 id.
        matrices: JSON of the axis alignments, asked where `<scene_id>.txt` is not there.
        scan_dir: the scan's own folder, with `<scene_id>.txt` and pictures, where there is one.

    Raises:
        ValueError: a file that is missing, broken or contradicts itself, a label outside the table, no axis alignment;
            one sentence.
    """
    path = Path(path)
    scene_id = path.stem
    own = read_instances(path)
    unknown = next((label for label in own.labels if label not in label_map), None)
    if unknown is not None:
        raise ValueError(f"{path}: label {unknown!r} is not in the label table; add a row for it.")
    folders = [Path(scan_dir)] if scan_dir is not None else []
    axis_align_44 = find_alignment(scene_id, [*folders, path.parent], Path(matrices))
    world_P3 = transform(own.points_P3, axis_align_44)
    instance_ids_P = own.object_ids_K[own.rows_P]
    nyu40_K = np.array([label_map[label] for label in own.labels], dtype=np.uint8)
    colors_P3 = np.full(world_P3.shape, GREY, np.uint8)
    cloud = LabelledCloud(
        scene_id, own.points_P3, world_P3, colors_P3, instance_ids_P, nyu40_K[own.rows_P], axis_align_44
    )
    labels = dict(zip(own.object_ids_K.tolist(), own.labels, strict=True))
    objects = furniture(instance_boxes(world_P3, instance_ids_P), labels, label_map)
    views = read_views(folders[0] if folders else path.parent, axis_align_44, max_frames=max_frames)
    scene = cloud.to_scene(objects, views, _notes(own), max_points=max_points, seed=seed)
    # rows of the composed cloud are no vertices of the mesh: features of vertices must not be read by them
    return replace(scene, vertex_ids_N=None, num_vertices=0)


def _notes(own: Instances) -> list[str]:
    notes = [
        "composed of labelled instances: parts that nobody labelled are absent",
        NO_COLORS,
        f"coordinates are rounded by up to {1000 * own.rounding:.1f} mm",
    ]
    kept_K = np.bincount(own.rows_P, minlength=len(own.labels))
    thinned = int((kept_K < own.point_counts_K).sum())
    if thinned:
        worst = float(shortfall(own).max())
        notes.append(
            f"{thinned} of {len(kept_K)} objects are thinned, to {kept_K.max()} points at most: in the raw frame a "
            f"side of a box made again from them is up to {100 * worst:.0f} cm inside that of all vertices"
        )
    return notes


def extents(own: Instances) -> np.ndarray:
    """Lowest and highest corner of each object's points in the raw frame, float64 [K, 6], as `boxes_min_max`."""
    starts_K = np.searchsorted(own.rows_P, np.arange(len(own.labels)))
    points_P3 = own.points_P3.astype(np.float64)
    low_K3, high_K3 = (reduce.reduceat(points_P3, starts_K, axis=0) for reduce in (np.minimum, np.maximum))
    return np.concatenate([low_K3, high_K3], axis=1)


def shortfall(own: Instances) -> np.ndarray:
    """Metres that each side of the points' extents lies inside the stored box, float64 [K, 6]; below 0: outside."""
    return (extents(own) - own.boxes_K6) * np.repeat([1.0, -1.0], 3)


def read_instances(path: str | Path) -> Instances:
    """Read and check one file; ValueError says in one sentence what is wrong with it."""
    path = Path(path)
    try:
        arrays = read_arrays(path)
    except FileNotFoundError:
        raise ValueError(f"There are no instances at {path}; copy the file from where the others came from.") from None
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a whole .npz file ({error}); copy it again from its source.") from None
    problem = _problem(arrays)
    if problem:
        raise ValueError(f"{path}: {problem}; copy it again from its source.")
    points_P3, sizes_K = arrays["points"], np.diff(arrays["offsets"])
    own = Instances(
        object_ids_K=arrays["object_ids"].astype(np.int32),
        labels=[str(label) for label in arrays["labels"]],
        points_P3=points_P3.astype(np.float32),
        rows_P=np.repeat(np.arange(len(sizes_K)), sizes_K),
        point_counts_K=arrays["point_counts"].astype(np.int64),
        boxes_K6=arrays["boxes_min_max"].astype(np.float64),
        rounding=float(np.spacing(np.abs(points_P3).max())) / 2,
    )
    outside_K = -shortfall(own).min(axis=1)
    worst = int(outside_K.argmax())
    if outside_K[worst] > _SLACK:
        raise ValueError(
            f"{path}: points of object {own.object_ids_K[worst]} lie {outside_K[worst]:.2f} m outside its stored box, "
            "so the two are not of one frame; copy the file again from its source."
        )
    return own


def _problem(arrays: dict[str, np.ndarray]) -> str:
    """What is wrong with a file's arrays, in words; "" for nothing."""
    missing = [name for name in _ARRAYS if name not in arrays]
    if missing:
        return f"the array {missing[0]} is missing"
    kinds = {"labels": "U", "points": "f", "boxes_min_max": "fiu"}
    count, total = arrays["object_ids"].size, len(arrays["points"]) if arrays["points"].ndim else 0
    shapes = {"boxes_min_max": (count, 6), "points": (total, 3), "offsets": (count + 1,)}
    for name in _ARRAYS:
        array, shape = arrays[name], shapes.get(name, (count,))
        if array.dtype.kind not in kinds.get(name, "iu") or array.shape != shape:
            return f"{name} is {array.dtype} {list(array.shape)}, which does not go with {count} objects"
    if count == 0:
        return "it holds no object"
    for name in ("points", "boxes_min_max"):
        broken = int((~np.isfinite(arrays[name]).all(axis=1)).sum())
        if broken:
            return f"{name} has {broken} rows with NaN or infinite values"
    offsets, ids_K = arrays["offsets"].astype(np.int64), arrays["object_ids"]
    if offsets[0] != 0 or offsets[-1] != total or (np.diff(offsets) < 0).any():
        return f"offsets do not run from 0 to the {total} points"
    empty = np.flatnonzero(np.diff(offsets) == 0)
    if empty.size:
        return f"object {ids_K[empty[0]]} has no points"
    if len(np.unique(ids_K)) != count or ids_K.min() < 0:
        return "object_ids names an object twice, or has one below 0"
    if (np.diff(offsets) > arrays["point_counts"]).any():
        return "an object has more points than point_counts says"
    return ""


def find_alignment(scene_id: str, folders: Sequence[Path], matrices: Path) -> np.ndarray:
    """The scan's 4x4 raw-to-aligned matrix: from the first `<scene_id>.txt` that has one, else from the table.

    Raises:
        ValueError: neither has it, or what is there is no rigid transform.
    """
    for folder in folders:
        matrix_44 = read_axis_alignment(folder / f"{scene_id}.txt")
        if matrix_44 is not None:
            return matrix_44
    table = _read_table(matrices) if matrices.exists() else {}
    if scene_id not in table:
        raise ValueError(
            f"There is no axis alignment of {scene_id}, neither in {matrices} nor in a {scene_id}.txt; copy one there."
        )
    return rigid_matrix(table[scene_id], f"The matrix of {scene_id} in {matrices}")


def _read_table(path: Path) -> dict[str, list[float]]:
    try:
        table = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        raise ValueError(f"{path} is not whole JSON ({error}); copy it again from its source.") from None
    if not isinstance(table, dict):
        raise ValueError(f"{path} does not map scene ids to matrices; copy it again from its source.")
    return table
