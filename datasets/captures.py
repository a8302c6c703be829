"""Exports of phone scanners, as folders of posed RGB-D frames.

- Polycam's raw data (`keyframes/`): github.com/PolyCam/polyform, README. ARKit's frame, y up.
- ARKitScenes (`lowres_wide.traj`): github.com/apple/ARKitScenes, DATA.md and raw/README.md.
- nerfstudio's `transforms.json` with `depth_file_path`: docs.nerf.studio, "Data conventions". Many apps write it, and
  `ns-process-data` makes it of Record3D's and others' exports. Depth is in millimetres.

Frames come out camera-to-world in the capture's own frame, OpenCV axes.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from ..utils.files import read_text
from .frames import read_matrix
from .scene import Frame

_OPENGL = np.diag([1.0, -1.0, -1.0, 1.0])  # camera axes x right, y up, z back to OpenCV's
_SAME_TIME = 0.005  # seconds between a picture and its pose, at most
_PINCAM = 6  # numbers: width, height, focal lengths, principal point


@dataclass
class Capture:
    """Frames of an export. `confidence` holds, by colour path, a picture that is 0 where depth is unsure."""

    kind: str
    frames: list[Frame]
    up_3: np.ndarray | None = None  # where the format says so
    confidence: dict[str, str] = field(default_factory=dict)
    left_out: int = 0  # pictures without a pose


def read_capture(folder: Path) -> Capture | None:
    """The frames of an export in one of the layouts; None where the folder is none.

    Raises:
        ValueError: a file of the export is missing or broken; one sentence names it.
    """
    readers: tuple[tuple[Path, Callable[[Path], Capture]], ...] = (
        (folder / "keyframes", _read_polycam),
        (folder / "lowres_wide.traj", _read_arkit_scenes),
        (folder / "transforms.json", _read_transforms),
    )
    return next((read(folder) for mark, read in readers if mark.exists()), None)


def _read_polycam(folder: Path) -> Capture:
    keyframes = folder / "keyframes"
    # the corrected pair is without distortion, and globally optimised; long captures have none
    corrected = all((keyframes / f"corrected_{name}").is_dir() for name in ("images", "cameras"))
    images, cameras = (keyframes / (f"corrected_{name}" if corrected else name) for name in ("images", "cameras"))
    capture = Capture("Polycam's raw data", [], up_3=np.array([0.0, 1.0, 0.0]))
    for camera in sorted(cameras.glob("*.json")):
        color, depth = images / f"{camera.stem}.jpg", keyframes / "depth" / f"{camera.stem}.png"
        if not color.exists():
            capture.left_out += 1
            continue
        values = _read_object(camera)
        rows = [[_number(values, f"t_{row}{column}", camera) for column in range(4)] for row in range(3)]
        pose_44 = np.array([*rows, [0.0, 0.0, 0.0, 1.0]]) @ _OPENGL
        _add(capture, color, depth, pose_44, _intrinsics(values, ("fx", "fy", "cx", "cy"), camera))
        confidence = keyframes / "confidence" / f"{camera.stem}.png"
        if confidence.exists():
            capture.confidence[str(color)] = str(confidence)
    return capture


def _read_arkit_scenes(folder: Path) -> Capture:
    trajectory = folder / "lowres_wide.traj"
    lines = [line.split() for line in read_text(trajectory, f"There is no {trajectory}.").splitlines() if line.strip()]
    try:
        rows_P7 = np.array([[float(word) for word in line] for line in lines]).reshape(-1, 7)
    except ValueError:
        raise ValueError(f"{trajectory} has not seven numbers in each line; copy it again from its source.") from None
    capture = Capture("ARKitScenes", [])
    for color in sorted((folder / "lowres_wide").glob("*.png")):
        seconds = _seconds(color)
        near = np.abs(rows_P7[:, 0] - seconds)
        intrinsics = _pincam(folder / "lowres_wide_intrinsics", color.stem)
        if len(near) == 0 or near.min() > _SAME_TIME or intrinsics is None:
            capture.left_out += 1
            continue
        row_7 = rows_P7[int(near.argmin())]
        world_to_camera_44 = np.eye(4)
        world_to_camera_44[:3, :3] = Rotation.from_rotvec(row_7[1:4]).as_matrix()
        world_to_camera_44[:3, 3] = row_7[4:]
        pose_44 = np.linalg.inv(world_to_camera_44)
        _add(capture, color, folder / "lowres_depth" / color.name, pose_44, intrinsics)
        confidence = folder / "confidence" / color.name
        if confidence.exists():
            capture.confidence[str(color)] = str(confidence)
    return capture


def _seconds(picture: Path) -> float:
    """The time in a name like `47333462_1234.567.png`."""
    try:
        return float(picture.stem.rpartition("_")[2])
    except ValueError:
        raise ValueError(f"{picture} does not end in a time, as <video>_<seconds>.png; copy the scan again.") from None


def _pincam(folder: Path, stem: str) -> np.ndarray | None:
    """Intrinsics of a picture; their file's time may be a thousandth of a second off. None where there is none."""
    video, _, seconds = stem.rpartition("_")
    names = [stem, *(f"{video}_{float(seconds) + shift:.3f}" for shift in (-0.001, 0.001))]
    path = next((folder / f"{name}.pincam" for name in names if (folder / f"{name}.pincam").exists()), None)
    if path is None:
        return None
    _, _, fx, fy, cx, cy = read_matrix(path, ((1, _PINCAM),))[0]
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1.0]])


def _read_transforms(folder: Path) -> Capture:
    path = folder / "transforms.json"
    document = _read_object(path)
    rows = document.get("frames")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} has no list of frames; export it again.")
    unit = document.get("depth_unit_scale_factor", 0.001)
    if unit != 0.001:
        raise ValueError(f"{path}: depth in units of {unit} m is not read; export it in millimetres (0.001).")
    capture = Capture("nerfstudio's transforms.json", [])
    for row in rows:
        try:
            pose_44 = np.array(row["transform_matrix"], dtype=np.float64).reshape(4, 4) @ _OPENGL
        except (KeyError, ValueError, TypeError):
            raise ValueError(f"{path} has a frame without a 4x4 transform_matrix; export it again.") from None
        color = _inside(folder, row.get("file_path"), path)
        depth = _inside(folder, row["depth_file_path"], path) if "depth_file_path" in row else folder / "none"
        values = {**document, **row}
        _add(capture, color, depth, pose_44, _intrinsics(values, ("fl_x", "fl_y", "cx", "cy"), path))
    return capture


def _add(capture: Capture, color: Path, depth: Path, pose_44: np.ndarray, intrinsics_33: np.ndarray) -> None:
    """One more frame, unless its pose is not finite."""
    if not np.isfinite(pose_44).all():
        capture.left_out += 1
        return
    capture.frames.append(Frame(str(color), str(depth) if depth.exists() else None, pose_44, intrinsics_33))


def _inside(folder: Path, name: Any, where: Path) -> Path:
    """A picture that a file names, which must lie in the export's own folder."""
    path = folder / str(name)
    if not isinstance(name, str) or not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{where} names the picture {name!r}, which is not in its folder; export it again.")
    return path


def _read_object(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(read_text(path, f"There is no {path}; copy the export again."))
    except json.JSONDecodeError:
        values = None
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not one JSON object; copy the export again.")
    return values


def _number(values: Mapping[str, Any], name: str, where: Path) -> float:
    value = values.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{where} has no number {name!r}; export it again.")
    return float(value)


def _intrinsics(values: Mapping[str, Any], names: tuple[str, str, str, str], where: Path) -> np.ndarray:
    fx, fy, cx, cy = (_number(values, name, where) for name in names)
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1.0]])
