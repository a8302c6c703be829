"""Where pictures of a room are taken from, and what is visible from there.

Candidate views (fixed, so that shares of views mean the same everywhere): four stations in the room's free space at
eye height (1.5 m), spread by farthest-point sampling from the free cell nearest to the middle; at each station four
pictures 90 degrees apart, 64 x 48 pixels, 58 degrees wide (ScanNet's colour camera), pitched 12 degrees down. The
first picture of station k looks 22.5 k degrees away from the room's middle, so that headings differ between stations.

An object is visible in a view when it covers at least 1 % of the pixels, or when at least 15 % of its scanned points,
on at least 6 pixels, are in the picture and not hidden.

World frame, metres. V vertices, S stations, M free cells.
"""

import numpy as np

from ...utils.camera import Camera, look_at, pinhole
from .layout import Layout, cell_centres, free_cells

EYE_HEIGHT = 1.5
NUM_STATIONS, VIEWS_PER_STATION = 4, 4
SENSOR_STATIONS = 12  # the scan is made from the candidate stations and eight more
STAND_OFF = 0.3  # metres between an eye and furniture or walls
VIEW_WIDTH, VIEW_HEIGHT, VIEW_FOV, VIEW_PITCH = 64, 48, 58.0, 12.0
MIN_PIXEL_SHARE, MIN_POINT_SHARE, MIN_PIXELS = 0.01, 0.15, 6
_BIN = np.radians(2.0)  # size of a direction bin of the spherical depth buffer
_AZIMUTHS, _ELEVATIONS = 180, 91
_NEAR = 1.6  # metres; closer than this, vertices are farther apart than bins and are drawn 3 x 3


def seen_from(eye_3: np.ndarray, vertices_V3: np.ndarray, normals_V3: np.ndarray) -> np.ndarray:
    """Which vertices [V] face an eye and are not hidden by nearer ones, by a spherical depth buffer of 2 degree bins.

    A vertex may lie behind the nearest one of its bin by as much as its own slanted surface covers within the bin.
    """
    # Single precision halves the time, and is a hundredth of a bin.
    ray_V3 = (vertices_V3 - eye_3).astype(np.float32)
    far_V = np.sqrt(np.einsum("vi,vi->v", ray_V3, ray_V3))
    cosine_V = -np.einsum("vi,vi->v", ray_V3, normals_V3.astype(np.float32)) / np.maximum(far_V, 1e-6)
    facing_V = np.flatnonzero(cosine_V > 0.02)
    ray_W3, far_W, cosine_W = ray_V3[facing_V], far_V[facing_V], cosine_V[facing_V]
    azimuth_W = ((np.arctan2(ray_W3[:, 1], ray_W3[:, 0]) + np.pi) / _BIN).astype(np.int32) % _AZIMUTHS
    elevation_W = ((np.arcsin(np.clip(ray_W3[:, 2] / far_W, -1, 1)) + np.pi / 2) / _BIN).astype(np.int32)
    nearest = np.full(_AZIMUTHS * _ELEVATIONS, np.inf, dtype=np.float32)
    np.minimum.at(nearest, elevation_W * _AZIMUTHS + azimuth_W, far_W)
    near_W = np.flatnonzero(far_W < _NEAR)
    for up in (-1, 0, 1):
        for left in (-1, 0, 1):
            row = np.clip(elevation_W[near_W] + up, 0, _ELEVATIONS - 1)
            np.minimum.at(nearest, row * _AZIMUTHS + (azimuth_W[near_W] + left) % _AZIMUTHS, far_W[near_W])
    slack_W = 0.03 + 1.2 * _BIN * far_W / np.maximum(cosine_W, 0.1)
    seen_V = np.zeros(len(vertices_V3), dtype=bool)
    seen_V[facing_V] = far_W <= nearest[elevation_W * _AZIMUTHS + azimuth_W] + slack_W
    return seen_V


def stations(layout: Layout, count: int) -> np.ndarray:
    """Eye positions [count, 3] in free space; the first ones do not depend on `count`. Fewer where space is short."""
    free_M2 = cell_centres(
        layout.size_3, free_cells(layout.size_3, layout.lows_P3, layout.highs_P3, STAND_OFF, EYE_HEIGHT + 0.1)
    )
    if len(free_M2) == 0:
        return np.zeros((0, 3))
    chosen = [int(np.linalg.norm(free_M2, axis=1).argmin())]
    far_M = np.linalg.norm(free_M2 - free_M2[chosen[0]], axis=1)
    while len(chosen) < count and far_M.max() > 0:
        chosen.append(int(far_M.argmax()))
        far_M = np.minimum(far_M, np.linalg.norm(free_M2 - free_M2[chosen[-1]], axis=1))
    return np.column_stack([free_M2[chosen], np.full(len(chosen), EYE_HEIGHT)])


def view_pose(eye_3: np.ndarray, heading: float, pitch_degrees: float) -> np.ndarray:
    """Camera-to-world pose of an upright camera that looks along a heading, pitched down."""
    pitch = np.radians(pitch_degrees)
    forward_3 = np.array([np.cos(heading) * np.cos(pitch), np.sin(heading) * np.cos(pitch), -np.sin(pitch)])
    return look_at(eye_3, eye_3 + forward_3)


def candidate_poses(stations_S3: np.ndarray) -> np.ndarray:
    """Poses [16, 4, 4] of the candidate views from the four candidate stations."""
    poses = []
    for k, eye_3 in enumerate(stations_S3[:NUM_STATIONS]):
        middle = np.arctan2(-eye_3[1], -eye_3[0]) if np.linalg.norm(eye_3[:2]) > 1e-6 else 0.0
        for turn in range(VIEWS_PER_STATION):
            heading = middle + np.radians(22.5) * k + turn * 2 * np.pi / VIEWS_PER_STATION
            poses.append(view_pose(eye_3, float(heading), VIEW_PITCH))
    return np.stack(poses)


def view_camera(pose_44: np.ndarray) -> Camera:
    """The candidate views' camera at a pose."""
    return Camera(pose_44, pinhole(VIEW_WIDTH, VIEW_HEIGHT, VIEW_FOV), VIEW_WIDTH, VIEW_HEIGHT)


def pixels_of(camera: Camera, vertices_V3: np.ndarray) -> np.ndarray:
    """Pixel (row * width + column) of every vertex [V], -1 outside the picture."""
    uv_V2, depth_V = camera.project(vertices_V3)
    column_V, row_V = np.floor(uv_V2 + 0.5).astype(np.int64).T
    inside_V = (depth_V > 0.05) & (column_V >= 0) & (column_V < camera.width) & (row_V >= 0) & (row_V < camera.height)
    return np.where(inside_V, row_V * camera.width + column_V, -1)


def visible_shares(
    vertices_V3: np.ndarray, owner_V: np.ndarray, seen_SV: np.ndarray, poses_444: np.ndarray, count: int
) -> np.ndarray:
    """Share [count] of the candidate views in which each object is visible.

    `seen_SV` says which vertices are seen from each candidate station (in all directions); objects are 0..count-1.
    """
    totals_K = np.maximum(np.bincount(owner_V[owner_V >= 0], minlength=count), 1)
    views_K = np.zeros(count)
    pixels = VIEW_WIDTH * VIEW_HEIGHT
    for view, pose_44 in enumerate(poses_444):
        seen_V = np.flatnonzero(seen_SV[view // VIEWS_PER_STATION] & (owner_V >= 0))
        pixel_W = pixels_of(view_camera(pose_44), vertices_V3[seen_V])
        inside_W = pixel_W >= 0
        owner_W, pixel_W = owner_V[seen_V][inside_W], pixel_W[inside_W]
        points_K = np.bincount(owner_W, minlength=count)
        covered_K = np.bincount(np.unique(owner_W.astype(np.int64) * pixels + pixel_W) // pixels, minlength=count)
        views_K += (covered_K >= MIN_PIXEL_SHARE * pixels) | (
            (points_K >= MIN_POINT_SHARE * totals_K) & (covered_K >= MIN_PIXELS)
        )
    return views_K / len(poses_444)
