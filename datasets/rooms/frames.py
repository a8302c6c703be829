"""Posed RGB-D frames of a generated room, as a hand-held camera would record them.

World frame, metres; cameras as in utils/camera.py. V vertices, F triangles, C candidate poses.
"""

from dataclasses import dataclass

import numpy as np

from ...utils.camera import Camera, pinhole
from .cameras import SENSOR_STATIONS, VIEW_FOV, VIEW_HEIGHT, VIEW_WIDTH, pixels_of, seen_from, stations, view_pose
from .generate import Generated
from .mesh import Surface

HEADINGS = 12  # candidate headings at each station
PITCHES = (6.0, 24.0)  # degrees down
MAX_DEPTH = 8.0  # metres; structured-light sensors see no farther
DEPTH_NOISE, DEPTH_NOISE_SQUARED = 0.001, 0.0015  # metres, and metres per square metre
COLOR_NOISE = 3.0  # grey levels
MARGIN = 0.25  # metres; longer than any triangle
_STREAM = 0xF4A3


def frame_intrinsics(width: int, height: int) -> np.ndarray:
    """Intrinsics [3, 3] of frames of a size in pixels, colour and depth alike."""
    return pinhole(width, height, VIEW_FOV)


@dataclass
class RgbdFrame:
    """One picture: colour uint8, depth in millimetres (0 for none), and its camera (world frame)."""

    color_HW3: np.ndarray
    depth_HW: np.ndarray  # uint16
    camera: Camera


def _candidates(generated: Generated, rng: np.random.Generator) -> list[tuple[int, np.ndarray]]:
    """Station index and pose of every picture that could be taken; eyes and headings are shaken a little."""
    result = []
    for index, eye_3 in enumerate(stations(generated.layout, SENSOR_STATIONS)):
        for turn in range(HEADINGS):
            heading = 2 * np.pi * turn / HEADINGS + rng.uniform(-0.1, 0.1)
            shaken_3 = eye_3 + np.array([*rng.uniform(-0.06, 0.06, 2), rng.uniform(-0.12, 0.05)])
            pitch = PITCHES[turn % len(PITCHES)] + rng.uniform(-4, 4)
            result.append((index, view_pose(shaken_3, float(heading), float(pitch))))
    return result


def sensor_path(generated: Generated, num_frames: int) -> list[np.ndarray]:
    """Camera poses of the frames, chosen one after the other to see what has not been seen yet.

    Each pose adds the most to a sum over objects of the square root of the share of their points seen so far, so that
    all objects come into some picture before any is seen from everywhere. Returned station by station.
    """
    rng = np.random.default_rng([_STREAM, generated.room.seed])
    surface, count = generated.surface, len(generated.room.objects)
    candidates = _candidates(generated, rng)
    owned_V = np.flatnonzero(surface.owner_V >= 0)[::3]  # a third of the points is plenty for counting
    points_V3, owner_V = surface.vertices_V3[owned_V], surface.owner_V[owned_V]
    totals_K = np.maximum(np.bincount(owner_V, minlength=count), 1)
    eyes_S3 = stations(generated.layout, SENSOR_STATIONS)
    seen_SV = np.stack([seen_from(eye_3, surface.vertices_V3, surface.normals_V3)[owned_V] for eye_3 in eyes_S3])
    intrinsics_33 = pinhole(VIEW_WIDTH, VIEW_HEIGHT, VIEW_FOV)
    in_view_CV = np.stack(
        [
            seen_SV[index] & (pixels_of(Camera(pose_44, intrinsics_33, VIEW_WIDTH, VIEW_HEIGHT), points_V3) >= 0)
            for index, pose_44 in candidates
        ]
    )
    seen_V = np.zeros(len(owned_V), dtype=bool)
    chosen: list[int] = []
    for _ in range(min(num_frames, len(candidates))):
        gains = [
            np.sqrt(np.bincount(owner_V[seen_V | view_V], minlength=count) / totals_K).sum() + 1e-5 * view_V.sum()
            for view_V in in_view_CV
        ]
        for taken in chosen:
            gains[taken] = -np.inf
        best = int(np.argmax(gains))
        chosen.append(best)
        seen_V |= in_view_CV[best]
    return [candidates[index][1] for index in sorted(chosen)]


def _drawable(surface: Surface, camera: Camera) -> np.ndarray:
    """Triangles that face a camera and may be in its picture, judged by their first corners.

    The others are the backs of closed parts, or lie outside. No triangle is longer than the margin.
    """
    first_F = surface.faces_F3[:, 0]
    points_F3 = surface.vertices_V3[first_F]
    ray_F3 = points_F3 - camera.position_3
    facing_F = np.flatnonzero(np.einsum("fi,fi->f", ray_F3, surface.normals_V3[first_F]) < 0.02)
    x, y, z = (ray_F3[facing_F] @ camera.pose_44[:3, :3]).T
    reach_x, reach_y = (camera.width / 2, camera.height / 2) / np.diag(camera.intrinsics_33)[:2]
    depth = np.maximum(z, 0) + MARGIN
    inside = (z > -MARGIN) & (np.abs(x) < reach_x * depth + MARGIN) & (np.abs(y) < reach_y * depth + MARGIN)
    return surface.faces_F3[facing_F[inside]]


def render_frames(generated: Generated, num_frames: int, frame_size: tuple[int, int]) -> list[RgbdFrame]:
    """Render the frames of a room made with faces; `frame_size` is (width, height) in pixels.

    Pictures show the whole surface (a camera sees what the reconstruction lost); depth has the noise, the range and
    the missing rims of a structured-light sensor.
    """
    width, height = frame_size
    if num_frames < 0 or width < 16 or height < 16:
        raise ValueError(
            f"Frames need a count of at least 0 and 16 x 16 pixels, not {num_frames} of {width} x {height}."
        )
    from ...utils.render import rasterize  # brings torch, which points-only workers do without

    rng = np.random.default_rng([_STREAM, generated.room.seed, 1])
    intrinsics_33 = frame_intrinsics(width, height)
    frames = []
    for pose_44 in sensor_path(generated, num_frames) if num_frames else []:
        camera = Camera(pose_44, intrinsics_33, width, height)
        surface = generated.surface
        faces_F3 = _drawable(surface, camera)
        used_U, corners = np.unique(faces_F3, return_inverse=True)
        render = rasterize(
            surface.vertices_V3[used_U],
            corners.reshape(-1, 3),
            surface.colors_V3[used_U],
            camera,
            background=(196, 196, 192),
        )
        noisy_HW3 = render.color_HW3 + COLOR_NOISE * rng.standard_normal(render.color_HW3.shape, dtype=np.float32)
        frames.append(
            RgbdFrame(np.clip(noisy_HW3, 0, 255).astype(np.uint8), _sensor_depth(render.depth_HW, rng), camera)
        )
    return frames


def _sensor_depth(depth_HW: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Depth in millimetres, uint16, 0 for none: noise grows with the square of the distance, rims are lost."""
    noise_HW = rng.normal(0, 1, depth_HW.shape) * (DEPTH_NOISE + DEPTH_NOISE_SQUARED * depth_HW**2)
    step_HW = np.zeros_like(depth_HW)
    step_HW[:, 1:] = np.abs(np.diff(depth_HW, axis=1))
    step_HW[1:] = np.maximum(step_HW[1:], np.abs(np.diff(depth_HW, axis=0)))
    rim_HW = (step_HW > 0.15) & (rng.random(depth_HW.shape) < 0.7)
    lost_HW = (depth_HW <= 0) | (depth_HW > MAX_DEPTH) | rim_HW | (rng.random(depth_HW.shape) < 0.002)
    return np.where(lost_HW, 0, np.rint(np.maximum(depth_HW + noise_HW, 0) * 1000)).astype(np.uint16)
