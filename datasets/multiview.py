"""Multi-view picture features of a scan's vertices, as ScanRefer's projection writes them: `enet_feats_maxpool.hdf5`.

One data set a scene, named by its id: [V, W], one row for each vertex of the mesh or of `_aligned_vert.npy`.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from .scene import Scene


class MultiviewFeatures:
    """Features of prepared scenes' points. The file is opened by each process that reads: HDF5 must not cross a fork.

    Args:
        width: channels W that every scene must have; 0 takes any.

    Raises:
        ValueError: no file, or not HDF5.
    """

    def __init__(self, path: str | Path, width: int = 0):
        self.path = Path(path)
        self.width = width
        self._file: h5py.File | None = None
        self._process = 0
        self._opened()

    def __contains__(self, scene_id: object) -> bool:
        return scene_id in self._opened()

    def check(self, scene_ids: Sequence[str]) -> None:
        """ValueError where the file lacks some of these scenes or has them in another width; reads no features."""
        missing = [scene_id for scene_id in scene_ids if scene_id not in self]
        if missing:
            raise ValueError(
                f"{self.path} has no features of {len(missing)} of {len(scene_ids)} scenes, {missing[0]} among them; "
                "project their pictures first, or take the scenes out of the split."
            )
        for scene_id in scene_ids:
            self._content(scene_id)

    def of(self, scene: Scene, kept_N: np.ndarray | None = None) -> np.ndarray:
        """Features [N, W], float32, of a scene's points, in their order.

        Args:
            kept_N: rows of the points that are wanted, in the order that they are wanted in; None for all.

        Only those rows are read where the data set lies in the file in one piece, as h5py and ScanRefer write it; one
        in chunks, which may be compressed, is read whole every time.

        Raises:
            ValueError: the scene is not in the file, was prepared by an older version, has another number of vertices
                or another width, or features that are not finite.
        """
        if scene.vertex_ids_N is None:
            raise ValueError(
                f"Scene {scene.scene_id} does not say which vertices its points are; take a raw scan or "
                "prepared arrays, and run `python main.py prepare` again where that was done by an older version."
            )
        content = self._content(scene.scene_id)
        if content.shape[0] != scene.num_vertices:
            raise ValueError(
                f"{self.path}: features of scene {scene.scene_id} have shape {list(content.shape)}, the scene has "
                f"{scene.num_vertices} vertices; take features and scans of one release."
            )
        vertex_N = scene.vertex_ids_N if kept_N is None else scene.vertex_ids_N[kept_N]
        features_NW = self._rows(content, vertex_N).astype(np.float32, copy=False)
        if not np.isfinite(features_NW).all():
            raise ValueError(
                f"{self.path}: features of scene {scene.scene_id} have NaN or infinite values; project its pictures "
                "again."
            )
        return features_NW

    def close(self) -> None:
        """Close the file; it opens again when it is read."""
        if self._file is not None and self._process == os.getpid():
            self._file.close()
        self._file = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None, "_process": 0}

    def _content(self, scene_id: str) -> h5py.Dataset:
        content = self._opened().get(scene_id)
        if not isinstance(content, h5py.Dataset):
            raise ValueError(f"{self.path} has no features of scene {scene_id}; project its pictures first.")
        if content.ndim != 2:
            raise ValueError(
                f"{self.path}: features of scene {scene_id} have shape {list(content.shape)}, not one row a vertex; "
                "project its pictures again."
            )
        if content.dtype.kind != "f":
            raise ValueError(f"{self.path}: features of scene {scene_id} are {content.dtype}, not floats.")
        if self.width and content.shape[1] != self.width:
            raise ValueError(
                f"{self.path}: features of scene {scene_id} have {content.shape[1]} channels, but the scene encoder "
                f"takes {self.width}; set encoder.multiview_dim to what the file has, and train the encoder so."
            )
        return content

    def _rows(self, content: h5py.Dataset, vertex_N: np.ndarray) -> np.ndarray:
        offset = content.id.get_offset()  # None unless the data set lies in one piece
        own = content.file.filename == self._opened().filename  # not behind a link into another file
        if offset is None or content.external or not own:
            return content[()].take(vertex_N, axis=0)
        mapped_VW = np.memmap(self.path, content.dtype, "r", offset, content.shape)
        return np.asarray(mapped_VW).take(vertex_N, axis=0)

    def _opened(self) -> h5py.File:
        if self._file is None or self._process != os.getpid():
            try:
                self._file = h5py.File(self.path, "r")
            except FileNotFoundError:
                raise ValueError(f"There is no feature file {self.path}; check the path.") from None
            except OSError as error:
                raise ValueError(
                    f"{self.path} is not a whole HDF5 file ({error}); copy it again from its source."
                ) from None
            self._process = os.getpid()
        return self._file


def open_multiview(path: str | Path, width: int) -> MultiviewFeatures | None:
    """The features that a scene encoder with `width` channels of them takes; None for one that takes none.

    Raises:
        ValueError: a file without a width, a width without a file, or a file that cannot be read.
    """
    if not width and path:
        raise ValueError(
            f"{path} is named as the file of multi-view features, but the scene encoder takes none; leave "
            "data.multiview (--multiview) empty, or train an encoder with encoder.multiview_dim."
        )
    if width and not path:
        raise ValueError(
            f"The scene encoder takes {width} multi-view features a point, but no file of them is named; set "
            "data.multiview (for infer --multiview)."
        )
    return MultiviewFeatures(path, width) if width else None
