"""Cameras and rendered pictures: the types that the renderers share.

Pixel convention: pixel (row i, column j) has its centre at image coordinates (u, v) = (j, i), as in ScanNet's
intrinsics. Shapes: N points, H rows, W columns.
"""

from dataclasses import dataclass

import numpy as np

NEAR_PLANE = 0.05  # metres; nothing closer to the camera plane is drawn


@dataclass(frozen=True, eq=False)
class Camera:
    """A pinhole camera: camera-to-world pose with OpenCV axes (x right, y down, z forward), intrinsics in pixels."""

    pose_44: np.ndarray
    intrinsics_33: np.ndarray
    width: int
    height: int

    def __post_init__(self):
        if np.shape(self.pose_44) != (4, 4) or np.shape(self.intrinsics_33) != (3, 3):
            raise ValueError(
                f"A camera needs a 4 x 4 pose and 3 x 3 intrinsics, not {np.shape(self.pose_44)} and "
                f"{np.shape(self.intrinsics_33)}."
            )
        if not (np.isfinite(self.pose_44).all() and np.isfinite(self.intrinsics_33).all()):
            raise ValueError("A camera's pose and intrinsics must be finite; drop frames whose tracking was lost.")
        if self.width < 1 or self.height < 1:
            raise ValueError(f"A picture needs at least one pixel, not {self.width} x {self.height}.")

    @property
    def position_3(self) -> np.ndarray:
        """Where the camera stands, world frame, metres."""
        return np.asarray(self.pose_44, dtype=np.float64)[:3, 3]

    def world_to_camera_44(self) -> np.ndarray:
        """The inverse of the pose, float64."""
        return np.linalg.inv(np.asarray(self.pose_44, dtype=np.float64))

    def to_camera(self, points_N3: np.ndarray) -> np.ndarray:
        """Points from the world frame to the camera frame, float64, metres."""
        matrix_44 = self.world_to_camera_44()
        return np.asarray(points_N3, dtype=np.float64) @ matrix_44[:3, :3].T + matrix_44[:3, 3]

    def project(self, points_N3: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Image coordinates uv_N2 (pixels) and depth_N (metres along z) of world points, float64.

        Coordinates of points at or behind the camera plane (depth <= 0) mean nothing: look at the depth first.
        """
        camera_N3 = self.to_camera(points_N3)
        depth_N = camera_N3[:, 2]
        divisor_N = np.where(np.abs(depth_N) < 1e-9, 1e-9, depth_N)
        matrix_33 = np.asarray(self.intrinsics_33, dtype=np.float64)
        return (camera_N3 / divisor_N[:, None] @ matrix_33.T)[:, :2], depth_N

    def resized(self, width: int, height: int) -> "Camera":
        """The same camera with its picture resized to `width` x `height` pixels."""
        scale_x, scale_y = width / self.width, height / self.height
        matrix_33 = np.array(self.intrinsics_33, dtype=np.float64)
        matrix_33[0] *= scale_x
        matrix_33[1] *= scale_y
        # pixel centres lie at integers, so the half-pixel border scales too
        matrix_33[0, 2] += (scale_x - 1) / 2
        matrix_33[1, 2] += (scale_y - 1) / 2
        return Camera(self.pose_44, matrix_33, width, height)


@dataclass(frozen=True, eq=False)
class Render:
    """One rendered picture: colour uint8, depth in metres along z (0 for none), index of what is seen (-1 none)."""

    color_HW3: np.ndarray
    depth_HW: np.ndarray
    index_HW: np.ndarray


def look_at(eye_3: np.ndarray, target_3: np.ndarray, up_3: tuple[float, float, float] = (0.0, 0.0, 1.0)) -> np.ndarray:
    """Camera-to-world pose [4, 4] of a camera at `eye_3` that looks at `target_3`, `up_3` upwards in the picture.

    Looking along `up_3` itself (straight down), world +y is upwards in the picture (+x where up is along y).
    """
    eye_3, target_3 = np.asarray(eye_3, dtype=np.float64), np.asarray(target_3, dtype=np.float64)
    forward_3 = target_3 - eye_3
    distance = float(np.linalg.norm(forward_3))
    if not np.isfinite(distance) or distance < 1e-9:
        raise ValueError(f"A camera at {eye_3.tolist()} cannot look at {target_3.tolist()}; give two distinct points.")
    forward_3 = forward_3 / distance
    for candidate_3 in (np.asarray(up_3, dtype=np.float64), np.array([0.0, 1.0, 0.0]), np.array([1.0, 0.0, 0.0])):
        right_3 = np.cross(forward_3, candidate_3)
        length = float(np.linalg.norm(right_3))
        if length > 1e-6 * float(np.linalg.norm(candidate_3)):
            break
    right_3 = right_3 / length
    pose_44 = np.eye(4)
    pose_44[:3, 0] = right_3
    pose_44[:3, 1] = np.cross(forward_3, right_3)
    pose_44[:3, 2] = forward_3
    pose_44[:3, 3] = eye_3
    return pose_44


def pinhole(width: int, height: int, fov_degrees: float) -> np.ndarray:
    """Intrinsics [3, 3] of a camera with square pixels and this horizontal field of view."""
    if not 0 < fov_degrees < 180:
        raise ValueError(f"The field of view must lie between 0 and 180 degrees, not {fov_degrees}.")
    focal = width / (2 * np.tan(np.radians(fov_degrees) / 2))
    return np.array([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1]], dtype=np.float64)
