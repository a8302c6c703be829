"""Posed pictures on disk, in the two layouts in use.

- ScanNet's exported sensor data: `color/0.jpg`, `depth/0.png`, `pose/0.txt`, `intrinsic/intrinsic_color.txt`.
- One flat folder: `000000.color.jpg`, `000000.depth.png`, `000000.pose.txt` beside `intrinsics.txt` (7-Scenes).

Poses are camera-to-world 4x4, OpenCV axes. Frames whose pose is not finite (tracking lost) are left out.
"""

from pathlib import Path

import numpy as np

from .scene import Frame

_PICTURES = (".jpg", ".jpeg", ".png")
_INTRINSICS = ("intrinsics.txt", "intrinsic.txt", "camera-intrinsics.txt", "intrinsic_color.txt")


def read_matrix(path: Path, shapes: tuple[tuple[int, int], ...]) -> np.ndarray:
    """A text file of numbers as a float64 matrix of one of `shapes`; ValueError otherwise."""
    try:
        values = np.array([float(word) for word in path.read_text(encoding="ascii", errors="replace").split()])
    except FileNotFoundError:
        raise ValueError(f"There is no file {path}; the frames' poses and intrinsics belong to the scan.") from None
    except ValueError:
        raise ValueError(f"{path} holds something that is not a number; copy it again from its source.") from None
    for rows, columns in shapes:
        if values.size == rows * columns:
            return values.reshape(rows, columns)
    wanted = " or ".join(f"{rows}x{columns}" for rows, columns in shapes)
    raise ValueError(f"{path} holds {values.size} numbers where a {wanted} matrix is expected.")


def list_frames(folder: Path, axis_align_44: np.ndarray, *, max_frames: int | None = None) -> tuple[list[Frame], int]:
    """Frames of a folder in either layout, poses moved to the world frame, and how many had no finite pose.

    Args:
        axis_align_44: raw to world.
        max_frames: keep at most so many, evenly spaced; None keeps all.
    """
    if (folder / "color").is_dir() and (folder / "pose").is_dir():
        rows, intrinsics_33 = _scannet_rows(folder), _scannet_intrinsics(folder)
    else:
        rows, intrinsics_33 = _flat_rows(folder), _flat_intrinsics(folder)
    frames: list[Frame] = []
    lost = 0
    for color, depth, pose in rows:
        pose_44 = read_matrix(pose, ((4, 4),))
        if not np.isfinite(pose_44).all():
            lost += 1
            continue
        frames.append(Frame(str(color), str(depth) if depth else None, axis_align_44 @ pose_44, intrinsics_33))
    if max_frames is not None and len(frames) > max_frames:
        frames = [frames[index] for index in np.linspace(0, len(frames) - 1, max_frames).round().astype(int)]
    return frames, lost


def has_frames(folder: Path) -> bool:
    """Whether a folder holds posed pictures in one of the two layouts."""
    return (folder / "color").is_dir() and (folder / "pose").is_dir() or any(folder.glob("*.pose.txt"))


def _number(path: Path) -> tuple[int, str]:
    stem = path.name.split(".")[0]
    digits = "".join(letter for letter in stem if letter.isdigit())
    return (int(digits) if digits else -1, stem)


def _scannet_rows(folder: Path) -> list[tuple[Path, Path | None, Path]]:
    rows = []
    for color in sorted((p for p in (folder / "color").iterdir() if p.suffix.lower() in _PICTURES), key=_number):
        depth = folder / "depth" / f"{color.stem}.png"
        rows.append((color, depth if depth.exists() else None, folder / "pose" / f"{color.stem}.txt"))
    return rows


def _scannet_intrinsics(folder: Path) -> np.ndarray:
    path = folder / "intrinsic" / "intrinsic_color.txt"
    return read_matrix(path if path.exists() else folder / "intrinsic_color.txt", ((4, 4), (3, 3)))[:3, :3]


def _flat_rows(folder: Path) -> list[tuple[Path, Path | None, Path]]:
    rows = []
    for pose in sorted(folder.glob("*.pose.txt"), key=_number):
        stem = pose.name[: -len(".pose.txt")]
        pictures = [folder / f"{stem}.color{suffix}" for suffix in _PICTURES]
        color = next((picture for picture in pictures if picture.exists()), None)
        if color is None:
            raise ValueError(f"{pose} has no picture {stem}.color.jpg or .png beside it; copy the frame again.")
        depth = folder / f"{stem}.depth.png"
        rows.append((color, depth if depth.exists() else None, pose))
    return rows


def _flat_intrinsics(folder: Path) -> np.ndarray:
    for name in _INTRINSICS:
        if (folder / name).exists():
            return read_matrix(folder / name, ((3, 3), (4, 4)))[:3, :3]
    raise ValueError(f"{folder} has frames but no intrinsics.txt; write the camera's 3x3 matrix there.")
