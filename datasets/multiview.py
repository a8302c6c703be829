"""Multi-view picture features of a scan's vertices, as ScanRefer's projection writes them: `enet_feats_maxpool.hdf5`.

One data set a scene, named by its id: [V, F], one row for each vertex of the mesh or of `_aligned_vert.npy`.
"""

import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from .scene import Scene


class MultiviewFeatures:
    """Features of prepared scenes' points. The file is opened by each process that reads: HDF5 must not cross a fork.

    Raises:
        ValueError: no file, or not HDF5.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._file: h5py.File | None = None
        self._process = 0
        self._opened()

    def __contains__(self, scene_id: object) -> bool:
        return scene_id in self._opened()

    def of(self, scene: Scene) -> np.ndarray:
        """Features [N, F], float32, of a scene's points, in their order.

        Raises:
            ValueError: the scene is not in the file, was prepared by an older version, or has another number of
                vertices.
        """
        if scene.vertex_ids_N is None:
            raise ValueError(
                f"Scene {scene.scene_id} does not say which vertices its points are; run `python main.py prepare`."
            )
        content = self._opened().get(scene.scene_id)
        if not isinstance(content, h5py.Dataset):
            raise ValueError(f"{self.path} has no features of scene {scene.scene_id}; project its pictures first.")
        if content.ndim != 2 or content.shape[0] != scene.num_vertices:
            raise ValueError(
                f"{self.path}: features of scene {scene.scene_id} have shape {list(content.shape)}, the scene has "
                f"{scene.num_vertices} vertices; take features and scans of one release."
            )
        if content.dtype.kind != "f":
            raise ValueError(f"{self.path}: features of scene {scene.scene_id} are {content.dtype}, not floats.")
        return content[()][scene.vertex_ids_N].astype(np.float32, copy=False)

    def close(self) -> None:
        """Close the file; it opens again when it is read."""
        if self._file is not None and self._process == os.getpid():
            self._file.close()
        self._file = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None, "_process": 0}

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
