"""The arrays that ScanRefer, ScanQA, VoteNet's successors and LL3DA pass around already prepared -> Scene.

| file | content |
|---|---|
| `<id>_aligned_vert.npy` | [V, 6 or 9]: x y z in metres after alignment, r g b in 0..255, normals |
| `<id>_ins_label.npy` | [V]: objectId + 1, 0 for none |
| `<id>_sem_label.npy` | [V]: NYU40 class, 0 for none |
| `<id>_aligned_bbox.npy` | [K, 8]: centre, size, NYU40 class, objectId (counted from 0) |

Raw labels and the axis alignment are not in them: objects carry NYU40 names, and the alignment is read from `<id>.txt`
where that is there. ScanNet's single-scan exporter, copied into many repositories, writes the boxes of the UNALIGNED
cloud into `_aligned_bbox.npy`; `check_boxes` finds that.

Shapes: V vertices, K objects.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..utils.labels import BOXLESS_NYU40_IDS, NYU40_NAMES, class_of_nyu40
from .frames import read_views
from .labelled_cloud import LabelledCloud, LabelledObject, instance_boxes, read_axis_alignment, transform
from .scene import Scene

VERTICES, INSTANCES, CLASSES, BOXES = SUFFIXES = (
    *("_aligned_vert.npy", "_ins_label.npy", "_sem_label.npy", "_aligned_bbox.npy"),
)
UNALIGNED = "the stored boxes are those of the unaligned cloud"  # begins the note of a scene that fell into the trap
SHIFTED = "the stored boxes name other objects than the vertices, their objectIds are off by one"
_SLACK = 0.02  # metres that a vertex may stand out of its stored box
_LEAST_IOU = 0.5  # of a stored box and the extents of its object's vertices, which may have been thinned


@dataclass(frozen=True)
class StoredBoxes:
    """Rows of `_aligned_bbox.npy`."""

    boxes_K7: np.ndarray  # float32
    nyu40_K: np.ndarray  # int
    object_ids_K: np.ndarray  # int, from 0


def build_scene_of_arrays(
    folder: str | Path,
    scene_id: str,
    scan_dir: str | Path | None = None,
    *,
    max_points: int = 50_000,
    seed: int = 0,
    max_frames: int | None = None,
) -> Scene:
    """Read one scene's arrays.

    Args:
        folder: where the arrays lie.
        scan_dir: the scan's own folder, with `<id>.txt` and pictures, where there is one.

    Raises:
        ValueError: an array that is missing, broken, of another shape or of another scan; one sentence.
    """
    folder = Path(folder)
    vertices_V = _read(folder / f"{scene_id}{VERTICES}")
    colors_V3 = _check_vertices(vertices_V, folder / f"{scene_id}{VERTICES}")
    world_V3 = np.ascontiguousarray(vertices_V[:, :3], dtype=np.float32)
    notes = ["made of prepared arrays: labels are NYU40 names"]
    instance_ids_V, nyu40_V = _read_labels(folder, scene_id, len(world_V3), notes)
    stored = read_stored_boxes(folder / f"{scene_id}{BOXES}")
    objects = _objects(world_V3, instance_ids_V, nyu40_V, stored, notes)

    places = [place for place in (Path(scan_dir) if scan_dir else None, folder) if place is not None]
    alignments = (read_axis_alignment(place / f"{scene_id}.txt") for place in places)
    axis_align_44 = next((matrix_44 for matrix_44 in alignments if matrix_44 is not None), None)
    known = axis_align_44 is not None
    if axis_align_44 is None:
        notes.append(f"no axisAlignment in {scene_id}.txt: the raw frame is unknown, poses given in it are left out")
        axis_align_44 = np.eye(4)
    raw_V3 = transform(world_V3, np.linalg.inv(axis_align_44))
    cloud = LabelledCloud(scene_id, raw_V3, world_V3, colors_V3, instance_ids_V, nyu40_V, axis_align_44, known)
    views = read_views(places[0], axis_align_44, max_frames=max_frames, raw_frame_known=known)
    return cloud.to_scene(objects, views, notes, max_points=max_points, seed=seed)


def _read(path: Path) -> np.ndarray:
    try:
        array = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise ValueError(f"There is no array {path}; copy it from where the others came from.") from None
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path} is not a whole .npy file ({error}); copy it again from its source.") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
        raise ValueError(f"{path} is not one array of numbers; copy it again from its source.")
    return array


def _check_vertices(vertices_V: np.ndarray, path: Path) -> np.ndarray:
    """Colours [V, 3] uint8 of a vertex array; ValueError where it is not one."""
    if vertices_V.ndim != 2 or vertices_V.shape[1] not in (6, 9):
        raise ValueError(f"{path} has shape {list(vertices_V.shape)}, not [V, 6 or 9]; it is another kind of file.")
    if len(vertices_V) == 0:
        raise ValueError(f"{path} is an empty cloud: it has 0 vertices; copy it again from its source.")
    broken = int((~np.isfinite(vertices_V[:, :6]).all(axis=1)).sum())
    if broken:
        raise ValueError(f"{path} has {broken} vertices with NaN or infinite values; copy it again from its source.")
    if vertices_V[:, 3:6].max() <= 1 and (vertices_V[:, 3:6] != np.rint(vertices_V[:, 3:6])).any():
        raise ValueError(f"{path}: columns 3 to 5 are colours in 0..1; multiply them by 255, as the field has them.")
    colors_V3 = np.rint(vertices_V[:, 3:6])
    if colors_V3.min() < 0 or colors_V3.max() > 255:
        raise ValueError(f"{path}: columns 3 to 5 are no colours in 0..255 ({colors_V3.max():.0f}); check the file.")
    return colors_V3.astype(np.uint8)


def _read_labels(folder: Path, scene_id: str, count: int, notes: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """objectId (int32, -1 for none) and NYU40 class (uint8) of every vertex."""
    paths = [folder / f"{scene_id}{suffix}" for suffix in (INSTANCES, CLASSES)]
    absent = [path for path in paths if not path.exists()]
    if len(absent) == 1:
        raise ValueError(f"{absent[0]} is missing though its partner is there; copy it, or remove both.")
    if absent:
        notes.append("the scan is unlabelled: no _ins_label and _sem_label")
        return np.full(count, -1, np.int32), np.zeros(count, np.uint8)
    labels = [_read(path) for path in paths]
    for path, values_V in zip(paths, labels, strict=True):
        if values_V.shape != (count,):
            raise ValueError(f"{path} has shape {list(values_V.shape)}, the vertices are {count}: not one scan.")
        if (values_V != np.rint(values_V)).any() or values_V.min() < 0:
            raise ValueError(f"{path} holds a label that is no whole number from 0 on; copy it again from its source.")
    if labels[1].max() >= len(NYU40_NAMES):
        raise ValueError(f"{paths[1]} holds {labels[1].max():.0f}, which is no NYU40 class (0..40); use nyu40 labels.")
    return labels[0].astype(np.int64).astype(np.int32) - 1, labels[1].astype(np.uint8)


def read_stored_boxes(path: Path) -> StoredBoxes | None:
    """The boxes of `_aligned_bbox.npy`; None where the file is absent."""
    if not path.exists():
        return None
    rows_K8 = _read(path)
    if rows_K8.size == 0:
        rows_K8 = rows_K8.reshape(0, 8)
    if rows_K8.ndim != 2 or rows_K8.shape[1] != 8:
        raise ValueError(
            f"{path} has shape {list(rows_K8.shape)}, not [K, 8]: centre, size, NYU40 class, objectId; copy it again."
        )
    if not np.isfinite(rows_K8).all() or (rows_K8[:, 3:6] < 0).any():
        raise ValueError(f"{path} has a box that is not finite or has a negative size; copy it again from its source.")
    nyu40_K, object_ids_K = (rows_K8[:, column].astype(np.int64) for column in (6, 7))
    if (nyu40_K < 0).any() or (nyu40_K >= len(NYU40_NAMES)).any():
        raise ValueError(f"{path}: column 6 is no NYU40 class (0..40); use the field's form.")
    if len(np.unique(object_ids_K)) != len(object_ids_K):
        raise ValueError(f"{path}: column 7 names an object twice; copy it again from its source.")
    boxes_K7 = np.concatenate([rows_K8[:, :6], np.zeros((len(rows_K8), 1))], axis=1).astype(np.float32)
    return StoredBoxes(boxes_K7, nyu40_K, object_ids_K)


def check_boxes(stored: StoredBoxes, extents: dict[int, np.ndarray]) -> np.ndarray:
    """Which stored boxes fit the extents of their object's vertices, bool over those that have vertices.

    Thinning a cloud shrinks extents, so a right box contains them within 2 cm, and its IoU with them is above 0.5.
    """
    fits = []
    for object_id, box_7 in zip(stored.object_ids_K.tolist(), stored.boxes_K7.astype(np.float64), strict=True):
        if object_id not in extents:
            continue
        own_7 = extents[object_id].astype(np.float64)
        low_3, high_3 = box_7[:3] - box_7[3:6] / 2, box_7[:3] + box_7[3:6] / 2
        own_low_3, own_high_3 = own_7[:3] - own_7[3:6] / 2, own_7[:3] + own_7[3:6] / 2
        inside = bool((own_low_3 >= low_3 - _SLACK).all() and (own_high_3 <= high_3 + _SLACK).all())
        # flat objects (a picture on a wall) have no volume: the slack gives them some
        overlap_3 = np.minimum(high_3, own_high_3) - np.maximum(low_3, own_low_3) + _SLACK
        shared = float(overlap_3.clip(0).prod())
        union = float((box_7[3:6] + _SLACK).prod() + (own_7[3:6] + _SLACK).prod()) - shared
        fits.append(inside and shared > _LEAST_IOU * union)
    return np.array(fits, dtype=bool)


def _objects(
    world_V3: np.ndarray,
    instance_ids_V: np.ndarray,
    nyu40_V: np.ndarray,
    stored: StoredBoxes | None,
    notes: list[str],
) -> list[LabelledObject]:
    """Objects by id. Stored boxes are taken unless most contradict the vertices; what they lack comes from these."""
    extents = instance_boxes(world_V3, instance_ids_V)
    classes: dict[int, int] = {}
    boxes: dict[int, np.ndarray] = {}
    if stored is not None:
        classes = dict(zip(stored.object_ids_K.tolist(), stored.nyu40_K.tolist(), strict=True))
        boxes = dict(zip(stored.object_ids_K.tolist(), stored.boxes_K7, strict=True))
        fits = check_boxes(stored, extents)
        wrong = int((~fits).sum())
        if len(fits) and wrong > len(fits) / 2:
            why = SHIFTED if _ids_are_shifted(stored, extents) else UNALIGNED
            notes.append(f"{why} ({wrong} of {len(fits)} contradict the vertices): made again from the vertices")
            if len(boxes) > len(fits):
                notes.append(f"{len(boxes) - len(fits)} objects with such a box and no vertices left out")
            boxes, classes = {}, {}  # rows that contradict the vertices may name other objects, too
        elif wrong:
            notes.append(f"{wrong} of {len(fits)} stored boxes contradict the vertices; kept as they are")
    added = [object_id for object_id in extents if object_id not in boxes]
    for object_id in added:
        boxes[object_id] = extents[object_id]
        if object_id not in classes:
            classes[object_id] = _class_of(object_id, instance_ids_V, nyu40_V)
    kept = {i: (classes[i], box_7) for i, box_7 in sorted(boxes.items()) if classes[i] not in BOXLESS_NYU40_IDS}
    added = [object_id for object_id in added if object_id in kept]
    if added and len(kept) > len(added):
        notes.append(f"{len(added)} labelled objects without a stored box got the extents of their vertices")
    return [
        LabelledObject(object_id, NYU40_NAMES[nyu40], class_of_nyu40(nyu40), box_7)
        for object_id, (nyu40, box_7) in kept.items()
    ]


def _ids_are_shifted(stored: StoredBoxes, extents: dict[int, np.ndarray]) -> bool:
    """Whether most boxes fit the object before or after theirs."""
    moved = (check_boxes(replace(stored, object_ids_K=stored.object_ids_K + by), extents) for by in (-1, 1))
    return any(len(fits) > 0 and 2 * int(fits.sum()) > len(fits) for fits in moved)


def _class_of(object_id: int, instance_ids_V: np.ndarray, nyu40_V: np.ndarray) -> int:
    """The class that most of an object's vertices carry."""
    return int(np.bincount(nyu40_V[instance_ids_V == object_id]).argmax())
