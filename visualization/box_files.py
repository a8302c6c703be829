"""Boxes in the two forms of the official 3D-R1 viewer, .npz and a JSON list, read and written. docs/viewer.md.

Shapes: K boxes. Metres, in the frame that the file's user names (FRAMES).
"""

import json
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from ..datasets.scene import Scene
from ..utils.files import replacing, write_whole
from ..utils.json_rows import MAX_METRES, Problem, is_length, read_document, refuse, shown
from .shown_boxes import ShownBoxes, boxes_from_corners

SUFFIXES = (".npz", ".json")
FRAMES = ("scan", "world", "camera")
_ARRAYS = {"corners": (8, 3), "centers": (3,), "sizes": (3,), "headings": ()}
_MAX_BYTES = 64 << 20  # unpacked: a million boxes
_LOOKED_AT = 1 << 16  # bytes
# x right, y down, z forward -> x right, y forward, z up
_FROM_CAMERA_44 = np.array([[1, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1]], dtype=np.float64)
_KEYS = {"center", "scale", "rotation", "label", "score"}


def is_box_file(path: str | Path) -> bool:
    """Whether a file is one of boxes, by its name: .npz, or .json that does not hold rows of predictions."""
    path = Path(path)
    if path.suffix.lower() != ".json" or not path.is_file():
        return path.suffix.lower() in SUFFIXES
    with path.open("rb") as stream:
        return b'"sample_id"' not in stream.read(_LOOKED_AT)


def to_world(boxes: ShownBoxes, scene: Scene, frame: str) -> ShownBoxes:
    """Boxes of a file in the scene's world frame, by the transform that its points went through.

    Args:
        frame: `scan` for the frame of the scan file, `world` for the aligned one, `camera` for the aligned one with
            the axes of a camera (x right, y down, z forward), which the corners of the official exporter have.
    """
    if frame not in FRAMES:
        raise ValueError(f"Unknown frame {frame!r} of boxes; it is one of {', '.join(FRAMES)}.")
    if frame == "world":
        return boxes
    if frame == "scan":
        return boxes.moved(_raw_to_world(scene))
    moved = boxes.moved(_FROM_CAMERA_44)
    return ShownBoxes(*boxes_from_corners(moved.corners_K83), boxes.labels, boxes.scores)


def from_world(boxes: ShownBoxes, scene: Scene, frame: str) -> ShownBoxes:
    """The inverse of `to_world`."""
    if frame not in FRAMES:
        raise ValueError(f"Unknown frame {frame!r} of boxes; it is one of {', '.join(FRAMES)}.")
    if frame == "world":
        return boxes
    return boxes.moved(np.linalg.inv(_raw_to_world(scene) if frame == "scan" else _FROM_CAMERA_44))


def _raw_to_world(scene: Scene) -> np.ndarray:
    if not scene.raw_frame_known:
        raise ValueError(
            f"How scene {scene.scene_id} was aligned is not known, so its boxes can only be in the aligned frame; "
            "add --frame world."
        )
    return scene.axis_align_44


def read_boxes(path: str | Path) -> ShownBoxes:
    """Read a file of boxes in the frame it is in; ValueError, one sentence, where it is none.

    .npz: `corners` [K, 8, 3] in any order, or `centers` [K, 3], `sizes` [K, 3] and `headings` [K]; `labels` and
    `scores` [K] if there are any. .json: a list of {center, scale, rotation?, label?, score?}.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path} is no file of boxes; these are .npz, or .json with a list of boxes.")
    if path.is_dir():
        raise ValueError(f"{path} is a folder where a file is expected; name the file itself.")
    if not path.exists():
        raise ValueError(f"There is no file of boxes at {path}; check the path.")
    return _read_npz(path) if path.suffix.lower() == ".npz" else _read_json(path)


def _read_npz(path: Path) -> ShownBoxes:
    arrays = _arrays(path)
    names = set(arrays)
    if "corners" not in names and not {"centers", "sizes", "headings"} <= names:
        found = ", ".join(sorted(names)) or "nothing"
        raise ValueError(f"{path} has neither corners nor centers, sizes and headings; it holds {found}.")
    used = ["corners"] if "corners" in names else ["centers", "sizes", "headings"]
    count = len(np.atleast_1d(arrays[used[0]]))
    numbers = {name: _numbers(path, name, arrays[name], count) for name in used}
    labels = [str(label) for label in _beside(path, "labels", arrays, count)]
    scores = _scores(path, _beside(path, "scores", arrays, count))
    if used == ["corners"]:
        try:
            return ShownBoxes(*boxes_from_corners(numbers["corners"]), labels, scores)
        except ValueError as error:
            raise ValueError(f"{path}, {error}; give tilted boxes as JSON, with their rotation.") from None
    if (numbers["sizes"] < 0).any():
        raise ValueError(f"{path}: sizes of boxes must not be negative; write them again.")
    columns = (numbers["centers"], numbers["sizes"], numbers["headings"][:, None])
    return ShownBoxes.from_rows(np.concatenate(columns, axis=1).tolist(), labels, scores)


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of boxes in an .npz file, unpacked only where they are small."""
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > _MAX_BYTES:
            raise _TooLarge
        with np.load(path, allow_pickle=False) as archive:
            # a member that is no array comes as bytes
            return {name: np.asarray(archive[name]) for name in archive.files}
    except _TooLarge:
        raise ValueError(f"{path} unpacks to more than 64 MB, which no file of boxes does; check it.") from None
    except ValueError as error:
        if "pickle" not in str(error):
            raise ValueError(f"{path} is not a whole .npz file ({error}); write it again.") from None
        raise ValueError(
            f"{path} holds arrays of Python objects, which are not read; write labels as texts: np.array(labels, str)."
        ) from None
    except (EOFError, OSError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a whole .npz file ({error}); write it again.") from None


class _TooLarge(Exception):
    """An archive that unpacks to more than any file of boxes."""


def _numbers(path: Path, name: str, array: np.ndarray, count: int) -> np.ndarray:
    wanted = (count, *_ARRAYS[name])
    if array.dtype.kind not in "fiu" or array.shape != wanted:
        expected = "[" + ", ".join(["K", *map(str, _ARRAYS[name])]) + "]"
        raise ValueError(f"{path}: {name} must be numbers {expected}, not {array.dtype} {list(array.shape)}.")
    if not (np.isfinite(array) & (np.abs(array) <= MAX_METRES)).all():
        raise ValueError(f"{path}: {name} must be finite numbers in metres; leave broken boxes out.")
    return array.astype(np.float64)


def _beside(path: Path, name: str, arrays: dict[str, np.ndarray], count: int) -> list[Any]:
    """One value a box of an array that may be absent."""
    if name not in arrays:
        return []
    array = arrays[name]
    if array.shape != (count,):
        raise ValueError(f"{path}: there are {count} boxes, but {name} has shape {list(array.shape)}; give one each.")
    return array.tolist()


def _scores(path: Path, values: list[Any]) -> list[float | None]:
    """Scores as numbers; NaN stands for none."""
    if not all(isinstance(value, (int, float)) for value in values):
        raise ValueError(f"{path}: scores must be numbers.")
    return [None if np.isnan(value) else float(value) for value in values]


def _read_json(path: Path) -> ShownBoxes:
    problems: list[Problem] = []
    document = read_document(path, problems, f"There is no file of boxes at {path}; check the path.")
    rows = document.rows()
    if rows is None:
        raise ValueError(f"{path} must hold a list of boxes, each {{center, scale, rotation?, label?, score?}}.")
    for place, row in rows:
        fault = _fault(row)
        if fault:
            problems.append(Problem(place, fault))
    refuse(problems)
    items = [row for _, row in rows]
    identity = np.eye(3).tolist()
    rotations = [row.get("rotation") or identity for row in items]
    labels = ["" if row.get("label") is None else str(row["label"]) for row in items]
    scores = [None if row.get("score") is None else float(row["score"]) for row in items]
    parts = ([row["center"] for row in items], [row["scale"] for row in items])
    centers_K3, sizes_K3 = (np.array(part, dtype=np.float64).reshape(-1, 3) for part in parts)
    return ShownBoxes(centers_K3, sizes_K3, np.array(rotations, dtype=np.float64).reshape(-1, 3, 3), labels, scores)


def _fault(row: Any) -> str | None:
    """Why a value is no box of a JSON list, or None."""
    if not isinstance(row, dict):
        return f"a box is an object with center and scale, not {shown(row)}"
    unknown = sorted(set(row) - _KEYS)
    if unknown:
        return f"unknown {', '.join(unknown[:8])}; a box has center, scale, rotation, label and score"
    for name in ("center", "scale"):
        if not _is_triple(row.get(name)):
            return f"{name} must be three finite numbers in metres, not {shown(row.get(name))}"
    if min(row["scale"]) < 0:
        return f"scale must not be negative, not {shown(row['scale'])}"
    score, label = row.get("score"), row.get("label")
    if score is not None and not is_length(score):
        return f"score must be a number, not {shown(score)}"
    if label is not None and (isinstance(label, bool) or not isinstance(label, (str, int))):
        return f"label must be a text or a whole number, not {shown(label)}"
    return _rotation_fault(row.get("rotation"))


def _rotation_fault(rotation: Any) -> str | None:
    if rotation is None:
        return None
    if not isinstance(rotation, list) or len(rotation) != 3 or not all(map(_is_triple, rotation)):
        return f"rotation must be three rows of three numbers, not {shown(rotation)}"
    matrix_33 = np.array(rotation, dtype=np.float64)
    if np.abs(matrix_33 @ matrix_33.T - np.eye(3)).max() > 1e-3 or np.linalg.det(matrix_33) < 0:
        return "rotation must be a rotation: rows of length 1 at right angles, determinant +1"
    return None


def _is_triple(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(map(is_length, value))


def write_boxes(path: str | Path, boxes: ShownBoxes) -> Path:
    """Write boxes as .npz (centers, sizes, headings; corners where one is tilted) or as a JSON list, atomically."""
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path}: boxes are written as .npz or .json; name the file so.")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() == ".npz":
        with replacing(path) as partial, partial.open("wb") as stream:  # NumPy would add .npz to a name in capitals
            np.savez(stream, **_to_arrays(boxes))
    else:
        write_whole(path, json.dumps(_to_items(boxes), ensure_ascii=False, indent=1) + "\n")
    return path


def _to_arrays(boxes: ShownBoxes) -> dict[str, Any]:
    headings_K = boxes.headings_K
    if headings_K is None:
        arrays = {"corners": boxes.corners_K83}
    else:
        arrays = {"centers": boxes.centers_K3, "sizes": boxes.sizes_K3, "headings": headings_K}
    if any(boxes.labels):
        arrays["labels"] = np.array(boxes.labels, dtype=str)
    if any(score is not None for score in boxes.scores):
        arrays["scores"] = np.array([np.nan if score is None else score for score in boxes.scores], np.float32)
    return arrays


def _to_items(boxes: ShownBoxes) -> list[dict[str, Any]]:
    items = []
    for row in range(len(boxes)):
        item: dict[str, Any] = {"center": boxes.centers_K3[row].tolist(), "scale": boxes.sizes_K3[row].tolist()}
        if not np.allclose(boxes.rotations_K33[row], np.eye(3), atol=1e-9):
            item["rotation"] = boxes.rotations_K33[row].tolist()
        if boxes.labels[row]:
            item["label"] = boxes.labels[row]
        if boxes.scores[row] is not None:
            item["score"] = boxes.scores[row]
        items.append(item)
    return items
