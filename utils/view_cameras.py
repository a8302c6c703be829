"""The camera of a view's picture, in a JSON file beside it: what `eval` and `infer` write and the viewers read."""

import json
from pathlib import Path

import numpy as np

from .camera import Camera
from .files import read_text, write_whole


def camera_path(picture: str | Path) -> Path:
    """Where the camera of a picture is written: `views/x/frame-3.jpg` has `views/x/frame-3.json`."""
    return Path(picture).with_suffix(".json")


def write_camera(picture: str | Path, camera: Camera) -> None:
    """Write the camera of a picture atomically: pose (camera to world, OpenCV's axes), intrinsics, width, height."""
    path = camera_path(picture)
    content = {
        "pose": np.asarray(camera.pose_44, dtype=np.float64).tolist(),
        "intrinsics": np.asarray(camera.intrinsics_33, dtype=np.float64).tolist(),
        "width": camera.width,
        "height": camera.height,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(content))


def read_camera(picture: str | Path) -> Camera | None:
    """The camera of a picture; None where none was written, ValueError where the file is broken."""
    path = camera_path(picture)
    if not path.is_file():
        return None
    try:
        content = json.loads(read_text(path, f"There is no camera at {path}."))
        pose_44, intrinsics_33 = (np.array(content[name], dtype=np.float64) for name in ("pose", "intrinsics"))
        return Camera(pose_44, intrinsics_33, int(content["width"]), int(content["height"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not the camera of a view ({error}); delete it, or run eval or infer again."
        ) from None
