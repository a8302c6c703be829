"""Posed depth pictures fused into a cloud: unprojected, then one point per voxel.

Shapes: N points, M occupied voxels, H rows, W columns.
"""

import numpy as np
from PIL import Image

from .frames import read_depth
from .labelled_cloud import transform
from .scene import Frame

MAX_DEPTH = 6.0  # metres: depth cameras are noise beyond


def _open_picture(path: str) -> np.ndarray:
    try:
        with Image.open(path) as picture:
            return np.asarray(picture)
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is not a whole picture ({error}); copy it again from its source.") from None


def unproject(frame: Frame, *, stride: int = 1, confidence_path: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Points [N, 3] (float32, the pose's frame, metres) and colours [N, 3] (uint8) of one frame's depth.

    Depth is as `frames.read_depth` reads it. Intrinsics are those of the colour picture; a depth picture of
    another size is taken to see the same field of view. Depth counts where the picture at `confidence_path`, as large
    as that of depth, is above 0.
    """
    assert frame.depth_path is not None
    depth_HW = read_depth(frame.depth_path)
    color_HW3 = _open_picture(frame.color_path)
    color_HW3 = np.repeat(color_HW3[:, :, None], 3, axis=2) if color_HW3.ndim == 2 else color_HW3[:, :, :3]
    scale_x, scale_y = color_HW3.shape[1] / depth_HW.shape[1], color_HW3.shape[0] / depth_HW.shape[0]
    row_N, column_N = np.mgrid[0 : depth_HW.shape[0] : stride, 0 : depth_HW.shape[1] : stride].reshape(2, -1)
    depth_N = depth_HW[row_N, column_N].astype(np.float64)
    valid_N = (depth_N > 0) & (depth_N <= MAX_DEPTH)
    if confidence_path is not None:
        confidence_HW = _open_picture(confidence_path)
        if confidence_HW.shape != depth_HW.shape:
            raise ValueError(f"{confidence_path} is not as large as {frame.depth_path}; copy both again.")
        valid_N &= confidence_HW[row_N, column_N] > 0
    row_N, column_N, depth_N = row_N[valid_N], column_N[valid_N], depth_N[valid_N]
    # pixel centres: column c of the depth picture stands over (c + 0.5) * scale - 0.5 of the colour picture
    u_N, v_N = (column_N + 0.5) * scale_x - 0.5, (row_N + 0.5) * scale_y - 0.5
    fx, fy, cx, cy = (frame.intrinsics_33[index] for index in ((0, 0), (1, 1), (0, 2), (1, 2)))
    camera_N3 = np.stack([(u_N - cx) / fx * depth_N, (v_N - cy) / fy * depth_N, depth_N], axis=1)
    colors_N3 = color_HW3[np.rint(v_N).astype(int).clip(0), np.rint(u_N).astype(int).clip(0)]
    return transform(camera_N3, frame.pose_44), colors_N3


def voxel_mean(points_N3: np.ndarray, colors_N3: np.ndarray, size: float) -> tuple[np.ndarray, np.ndarray]:
    """One point per occupied voxel: mean position (float32) and mean colour (uint8), in voxel order."""
    cells_N3 = np.floor(points_N3 / size).astype(np.int64)
    cells_N3 -= cells_N3.min(axis=0, initial=0)
    spans_3 = cells_N3.max(axis=0, initial=0) + 1
    keys_N = (cells_N3[:, 0] * spans_3[1] + cells_N3[:, 1]) * spans_3[2] + cells_N3[:, 2]
    _, inverse_N, counts_M = np.unique(keys_N, return_inverse=True, return_counts=True)

    def mean(values_N: np.ndarray) -> np.ndarray:
        return np.bincount(inverse_N, weights=values_N, minlength=len(counts_M)) / counts_M

    points_M3 = np.stack([mean(points_N3[:, axis]) for axis in range(3)], axis=1)
    colors_M3 = np.stack([mean(colors_N3[:, axis]) for axis in range(3)], axis=1)
    return points_M3.astype(np.float32), np.rint(colors_M3).astype(np.uint8)
