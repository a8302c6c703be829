"""Pictures of a scan on disk, in the layouts in use.

- ScanNet's exported sensor data: `color/0.jpg`, `depth/0.png`, `pose/0.txt`, `intrinsic/intrinsic_color.txt`.
- A picture tree: `images/` and `depth/` (.png or .npy), usually without poses; with `pose/` and `intrinsic/` as above.
- One flat folder: `000000.color.jpg`, `000000.depth.png`, `000000.pose.txt` beside `intrinsics.txt` (7-Scenes).

Poses are camera-to-world 4x4, OpenCV axes. Frames whose pose is not finite (tracking lost) are left out.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from .scene import Frame, Picture

_PICTURES = (".jpg", ".jpeg", ".png")
NO_DEPTH = 65535  # what sensors write where they measured nothing
_INTRINSICS = ("intrinsics.txt", "intrinsic.txt", "camera-intrinsics.txt", "intrinsic_color.txt")
_COLOR_FOLDERS = ("color", "images")


@dataclass
class Views:
    """Pictures of a scan: posed ones (world frame), those without a pose, and what was noted on the way."""

    frames: list[Frame] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_views(
    folder: Path, axis_align_44: np.ndarray, *, max_frames: int | None = None, raw_frame_known: bool = True
) -> Views:
    """Pictures of a scan folder in any layout; none where it has none.

    Args:
        axis_align_44: raw to world.
        max_frames: keep at most so many, evenly spaced; None keeps all.
        raw_frame_known: without it poses, which are in the raw frame, cannot be placed and are not read.
    """
    if raw_frame_known and has_frames(folder):
        frames, lost = list_frames(folder, axis_align_44, max_frames=max_frames)
        return Views(frames, notes=[f"{lost} frames without a finite pose left out"] if lost else [])
    pictures = list_pictures(folder)
    if not pictures:
        return Views()
    why = "have no poses" if raw_frame_known else "cannot be placed without the axis alignment"
    notes = [f"{len(pictures)} pictures {why}: listed, but views are rendered from the points"]
    return Views(pictures=evenly(pictures, max_frames), notes=notes)


def list_pictures(folder: Path) -> list[Picture]:
    """Pictures below `images/` (or `color/`) by name, each with the file of the same name below `depth/`, if any."""
    color_folder = next((folder / name for name in reversed(_COLOR_FOLDERS) if (folder / name).is_dir()), None)
    if color_folder is None:
        return []
    pictures = []
    for color in _color_files(color_folder):
        depth = _depth_file(folder, color.stem)
        pictures.append(Picture(str(color), str(depth) if depth else None))
    return pictures


def read_depth(path: str | Path) -> np.ndarray:
    """Depth [H, W] in metres, float32, 0 for none, of a picture in millimetres (.png) or an array (.npy).

    An array of whole numbers is in millimetres, one of floating point in metres. ValueError: not a whole file of one
    channel.
    """
    try:
        if Path(path).suffix.lower() == ".npy":
            raw_HW = np.load(path, allow_pickle=False)
        else:
            with Image.open(path) as picture:
                raw_HW = np.asarray(picture)
    except (OSError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is not a whole picture ({error}); copy it again from its source.") from None
    if raw_HW.ndim == 3 and raw_HW.shape[2] == 1:
        raw_HW = raw_HW[:, :, 0]
    if raw_HW.ndim != 2 or raw_HW.dtype.kind not in "fiu":
        raise ValueError(f"{path} is not a one-channel depth picture (uint16 millimetres).")
    if raw_HW.dtype.kind == "f":
        return np.where(np.isfinite(raw_HW) & (raw_HW > 0), raw_HW, 0).astype(np.float32)
    return np.where((raw_HW > 0) & (raw_HW < NO_DEPTH), raw_HW, 0).astype(np.float32) / 1000


def evenly(rows: list, count: int | None) -> list:
    """At most `count` rows, evenly spaced."""
    if count is None or len(rows) <= count:
        return rows
    return [rows[index] for index in np.linspace(0, len(rows) - 1, count).round().astype(int)]


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
    if _posed_folder(folder) is not None:
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
    return evenly(frames, max_frames), lost


def has_frames(folder: Path) -> bool:
    """Whether a folder holds posed pictures in one of the layouts."""
    return _posed_folder(folder) is not None or any(folder.glob("*.pose.txt"))


def _posed_folder(folder: Path) -> Path | None:
    """The folder of pictures beside `pose/`."""
    if not (folder / "pose").is_dir():
        return None
    return next((folder / name for name in _COLOR_FOLDERS if (folder / name).is_dir()), None)


def _color_files(folder: Path) -> list[Path]:
    return sorted((path for path in folder.iterdir() if path.suffix.lower() in _PICTURES), key=_number)


def _depth_file(folder: Path, stem: str) -> Path | None:
    paths = (folder / "depth" / f"{stem}{suffix}" for suffix in (".png", ".npy"))
    return next((path for path in paths if path.exists()), None)


def _number(path: Path) -> tuple[int, str]:
    stem = path.name.split(".")[0]
    digits = "".join(letter for letter in stem if letter.isdigit())
    return (int(digits) if digits else -1, stem)


def _scannet_rows(folder: Path) -> list[tuple[Path, Path | None, Path]]:
    color_folder = _posed_folder(folder)
    assert color_folder is not None
    return [
        (color, _depth_file(folder, color.stem), folder / "pose" / f"{color.stem}.txt")
        for color in _color_files(color_folder)
    ]


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
