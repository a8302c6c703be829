"""The plain way of loading training samples: data and peer of `bench loader`.

The peer follows the dataset classes of VoteNet, ScanRefer, Vote2Cap-DETR and LL3DA: it reads a scene's arrays with
np.load for every sample, takes heights from a percentile of the cloud, samples, flips, turns and scales, and encloses
the turned boxes.

Shapes: N points sampled, K boxes, V views.
"""

from pathlib import Path

import numpy as np

from ..datasets.scene import Scene


def write_arrays_of(scene: Scene, folder: Path) -> None:
    """Write a scene in the field's form (datasets/scannet_arrays.py), and its frames' poses as one array."""
    folder.mkdir(parents=True, exist_ok=True)
    ids_K1 = scene.object_ids_K[:, None]
    arrays = {
        "aligned_vert": np.concatenate([scene.points_N3, scene.colors_N3], axis=1).astype(np.float32),
        "ins_label": (scene.instance_ids_N + 1).astype(np.uint32),
        "sem_label": scene.nyu40_N.astype(np.uint32),
        "aligned_bbox": np.concatenate([scene.boxes_K7[:, :6], np.full_like(ids_K1, 39), ids_K1], axis=1),
        "poses": np.stack([frame.pose_44 for frame in scene.frames]),
    }
    for name, array in arrays.items():
        np.save(folder / f"{scene.scene_id}_{name}.npy", array)


class PlainDataset:
    """Samples of scenes, each read anew."""

    def __init__(self, folder: Path, scene_ids: list[str], num_points: int, num_views: int, *, augment: bool):
        self.folder, self.scene_ids = folder, scene_ids
        self.num_points, self.num_views, self.augment = num_points, num_views, augment

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        prefix = f"{self.folder}/{self.scene_ids[row]}_"
        vertices_V6 = np.load(f"{prefix}aligned_vert.npy")
        instances_V, classes_V = np.load(f"{prefix}ins_label.npy"), np.load(f"{prefix}sem_label.npy")
        boxes_K8 = np.load(f"{prefix}aligned_bbox.npy")
        poses_F44 = np.load(f"{prefix}poses.npy")
        height_V1 = (vertices_V6[:, 2] - np.percentile(vertices_V6[:, 2], 0.99))[:, None]
        cloud_V7 = np.concatenate([vertices_V6[:, :3], vertices_V6[:, 3:6] / 255.0, height_V1], axis=1)
        chosen_N = np.random.choice(len(cloud_V7), self.num_points, replace=len(cloud_V7) < self.num_points)
        cloud_N7, boxes_K6 = cloud_V7[chosen_N], boxes_K8[:, :6].copy()
        if self.augment:
            boxes_K6 = _augment(cloud_N7, boxes_K6)
        views_V = np.random.choice(len(poses_F44), self.num_views, replace=False)
        return {
            "points": cloud_N7[:, :3].astype(np.float32),
            "features": cloud_N7[:, 3:].astype(np.float32),
            "instances": instances_V[chosen_N].astype(np.int64),
            "classes": classes_V[chosen_N].astype(np.int64),
            "boxes": boxes_K6.astype(np.float32),
            "poses": poses_F44[views_V],
        }


def _augment(cloud_N7: np.ndarray, boxes_K6: np.ndarray) -> np.ndarray:
    """Flips, a turn within 5 degrees and a scale, the points in place; returns the boxes."""
    for axis in (0, 1):
        if np.random.random() > 0.5:
            cloud_N7[:, axis] *= -1
            boxes_K6[:, axis] *= -1
    angle = np.random.random() * np.pi / 18 - np.pi / 36
    cos, sin = np.cos(angle), np.sin(angle)
    turn_33 = np.array([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]])
    cloud_N7[:, :3] = cloud_N7[:, :3] @ turn_33.T
    half_K2 = boxes_K6[:, 3:5] / 2
    signs = ((1, 1), (1, -1), (-1, 1), (-1, -1))
    corners = [np.stack([x * half_K2[:, 0], y * half_K2[:, 1]], axis=1) for x, y in signs]
    turned_4K2 = np.stack([corner_K2 @ turn_33[:2, :2].T for corner_K2 in corners])
    sizes_K2 = 2 * turned_4K2.max(axis=0)
    scale = np.random.uniform(0.9, 1.1)
    cloud_N7[:, :3] *= scale
    cloud_N7[:, 6] *= scale
    return np.concatenate([boxes_K6[:, :3] @ turn_33.T, sizes_K2, boxes_K6[:, 5:6]], axis=1) * scale
