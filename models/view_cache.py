"""Candidate views and their embeddings on disk, so that a scene is rendered and embedded once for all runs.

Two files a scene, each replaced when what it was made from changes: `<scene>.pool.npz` (pictures, cameras,
visibility) and `<scene>.<encoder>.npz` (embeddings). Each holds the hash of all that it depends on: the scene's
points, colours and frames, the settings, the boxes; the cameras, the pictures, the encoder's weights. A question about
a cached scene then costs one text embedding and one product.

Shapes: V views, K boxes, N points, H rows, W columns, D width of the encoder's space.
"""

import hashlib
import logging
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..datasets.archive import read_arrays, write_arrays
from ..datasets.scene import Scene
from ..utils.camera import Camera
from .image_encoder import Encoder
from .view_kinds import kinds_of
from .view_pool import ViewPool, build_view_pool

CACHE_VERSION = 2  # raise it whenever other views or embeddings would come out of the same scene and settings
_HASHED_VALUES = 65_536  # of a weight tensor, evenly spaced
_BROKEN = (ValueError, EOFError, OSError, KeyError, zipfile.BadZipFile, zlib.error)
_log = logging.getLogger(__name__)


def digest(*parts: object) -> np.ndarray:
    """SHA-256 [32] uint8 over arrays (bytes, shape, type) and other values (their repr)."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            found.update(f"{part.shape} {part.dtype} ".encode())
            found.update(np.ascontiguousarray(part).data if part.size else b"")
        else:
            found.update(f"{part!r} ".encode())
    return np.frombuffer(found.digest(), dtype=np.uint8)


def pool_key(scene: Scene, settings: Mapping[str, Any], boxes_K7: np.ndarray | None) -> np.ndarray:
    """Hash of all that `build_view_pool` depends on; a frame's picture counts by name, size and time."""
    boxes = scene.boxes_K7 if boxes_K7 is None else np.asarray(boxes_K7, dtype=np.float32)
    frames = []
    for frame in scene.frames if "posed" in kinds_of(settings["source"]) else ():
        files = [_stamp(path) for path in (frame.color_path, frame.depth_path) if path is not None]
        frames += [files, np.asarray(frame.pose_44), np.asarray(frame.intrinsics_33)]
    geometry = (np.asarray(scene.points_N3), np.asarray(scene.colors_N3), np.asarray(scene.origin_3), boxes)
    return digest(CACHE_VERSION, sorted(settings.items()), *geometry, *frames)


def encoder_fingerprint(encoder: Encoder) -> str:
    """Hash of an encoder: its weights (up to 65,536 values a tensor) and how it prepares pictures."""
    parts: list[object] = [type(encoder).__name__, str(getattr(encoder, "image_processor", ""))]
    for name, value in encoder.state_dict().items():
        flat = value.detach().reshape(-1)
        step = max(1, -(-flat.numel() // _HASHED_VALUES))
        parts += [name, tuple(value.shape), str(value.dtype), flat[::step].float().cpu().numpy()]
    return bytes(digest(*parts)).hex()


def _stamp(path: str) -> tuple[str, int, int]:
    try:
        status = os.stat(path)
    except OSError:
        return path, -1, -1  # building the pool names the file that is missing
    return path, status.st_size, status.st_mtime_ns


class ViewCache:
    """A folder of pools and embeddings.

    A file that cannot be read is made anew, with one warning. A folder that cannot be written is said once, and
    nothing is kept.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._known: tuple[Encoder, str] | None = None  # the last encoder and its fingerprint
        self._writable = True

    def __reduce__(self) -> tuple[Callable[[Path], "ViewCache"], tuple[Path]]:
        """Another process has one of its own for the folder: encoders stay here, and what is said is said once."""
        return _of_folder, (self.folder,)

    def pool(
        self,
        scene: Scene,
        *,
        source: str,
        num_candidates: int = 16,
        image_size: tuple[int, int] = (224, 224),
        seed: int = 0,
        boxes_K7: np.ndarray | None = None,
        device: str | torch.device = "cpu",
    ) -> ViewPool:
        """As `build_view_pool`, from disk where the same pool was made before."""
        settings = {
            "source": source,
            "num_candidates": num_candidates,
            "image_size": tuple(image_size),
            "seed": seed,
        }  # not the device: a kind of its own rounds otherwise, and views made on another show the same
        key = pool_key(scene, settings, boxes_K7)
        path = self._path(scene.scene_id, "pool")
        arrays = self._read(path, key, _POOL_ARRAYS)
        if arrays is not None:
            return _unpack(arrays)
        made = build_view_pool(
            scene,
            source=source,
            num_candidates=num_candidates,
            image_size=image_size,
            seed=seed,
            boxes_K7=boxes_K7,
            device=device,
        )
        if len(made):
            self._write(path, key, _pack(made))
        return made

    def embed(self, scene_id: str, pool: ViewPool, encoder: Encoder, encoder_name: str) -> Tensor:
        """Embeddings [V, D] of a pool's pictures, put into `pool.embeddings`, where the view selector looks."""
        if encoder_name in pool.embeddings:
            return pool.embeddings[encoder_name]
        if self._known is None or self._known[0] is not encoder:
            self._known = (encoder, encoder_fingerprint(encoder))
        device = next(encoder.parameters()).device.type
        cameras = [part for camera in pool.cameras for part in (camera.pose_44, camera.intrinsics_33)]
        key = digest(CACHE_VERSION, self._known[1], device, np.asarray(pool.images_VHW3), *cameras)
        path = self._path(scene_id, bytes(digest(encoder_name))[:6].hex())
        arrays = self._read(path, key, {"embeddings"})
        if arrays is not None:
            found_VD = torch.from_numpy(arrays["embeddings"]).clone()
        else:
            found_VD = encoder.embed_images(list(pool.images_VHW3)).cpu()
            if len(pool):
                self._write(path, key, {"embeddings": found_VD.numpy()})
        pool.embeddings[encoder_name] = found_VD
        return found_VD

    def _path(self, scene_id: str, kind: str) -> Path:
        plain = re.fullmatch(r"[\w-][\w.-]{0,150}", scene_id, re.ASCII)
        return self.folder / f"{scene_id if plain else bytes(digest(scene_id)).hex()}.{kind}.npz"

    def _read(self, path: Path, key: np.ndarray, names: set[str]) -> dict[str, np.ndarray] | None:
        """The arrays of a file made from the same things; None where there is no such file."""
        try:
            arrays = read_arrays(path)
        except FileNotFoundError:
            return None
        except _BROKEN as error:
            _log.warning("%s is not readable (%s) and is made anew.", path, error)
            return None
        if set(arrays) != names | {"key"}:
            _log.warning("%s is not a file of the view cache and is made anew.", path)
            return None
        return arrays if np.array_equal(arrays["key"], key) else None

    def _write(self, path: Path, key: np.ndarray, arrays: Mapping[str, np.ndarray]) -> None:
        if not self._writable:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_arrays(path, {"key": key, **arrays})
        except OSError as error:
            self._writable = False
            _log.warning("%s cannot be written (%s): views are rendered and embedded at each start.", path, error)


@cache
def _of_folder(folder: Path) -> ViewCache:
    return ViewCache(folder)


_POOL_ARRAYS = {"images", "poses", "intrinsics", "names", "visible", "coverage", "points", "seen"}


def _pack(pool: ViewPool) -> dict[str, np.ndarray]:
    return {
        "images": pool.images_VHW3,
        "poses": np.stack([np.asarray(camera.pose_44, dtype=np.float64) for camera in pool.cameras]),
        "intrinsics": np.stack([np.asarray(camera.intrinsics_33, dtype=np.float64) for camera in pool.cameras]),
        "names": np.array(pool.names),
        "visible": pool.visible_VK,
        "coverage": pool.coverage_VS,
        "points": pool.points_N3,
        "seen": np.packbits(pool.seen_VN, axis=1),
    }


def _unpack(arrays: Mapping[str, np.ndarray]) -> ViewPool:
    height, width = arrays["images"].shape[1:3]
    return ViewPool(
        images_VHW3=arrays["images"],
        cameras=[
            Camera(pose_44, matrix_33, width, height)
            for pose_44, matrix_33 in zip(arrays["poses"], arrays["intrinsics"], strict=True)
        ],
        names=arrays["names"].tolist(),
        visible_VK=arrays["visible"],
        coverage_VS=arrays["coverage"],
        points_N3=arrays["points"],
        seen_VN=np.unpackbits(arrays["seen"], axis=1, count=len(arrays["points"])).astype(bool),
    )
