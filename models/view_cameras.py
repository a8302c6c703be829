"""Where to look from: camera positions inside a scan, and which of many views to keep.

Shapes: N points, P positions, V views. World frame, metres.
"""

from collections.abc import Iterable

import numpy as np
import torch
from scipy import ndimage

from ..utils.render import NEAR_PLANE, Camera, look_at, pinhole, splat_batch, visible_points

EYE_HEIGHT = 1.5
FIELD_OF_VIEW = 75.0  # degrees, horizontal
_CELL = 0.1  # metres a cell of the floor plan
_CLEARANCE = 0.35  # metres between a camera and the nearest obstacle, where there is room
_DIRECTIONS = 8
_LOOK_AHEAD, _LOOK_HEIGHT = 2.2, 0.8  # the camera looks at this height so far ahead: 18 degrees down
_PROBE = 40  # pixels a side of the pictures that candidates are judged by
_PROBE_POINTS = 8192
_OBJECT_EXTENT = 2.0  # metres (or units, where a file has no scale); no room is as small
_OBJECT_ELEVATIONS = (-20.0, 15.0, 45.0)  # degrees above the horizon
_OBJECT_RING, _OBJECT_STEEP = 15.0, 60.0  # the same, of a ring around an object and of views from above (and below)
_LOW_HEIGHT, _LOW_TARGET = 0.2, 1.0  # metres above the floor, of cameras that look up and of what they look at
_RING_SHARE = 0.35  # radius of the ring in a room, as a share of the room's shorter side


def spread(rows_ND: np.ndarray, count: int) -> np.ndarray:
    """Indices of `count` rows spread out evenly: farthest point sampling from the row nearest to the mean."""
    if count >= len(rows_ND):
        return np.arange(len(rows_ND))
    chosen = [int(((rows_ND - rows_ND.mean(0)) ** 2).sum(1).argmin())]
    distance_N = ((rows_ND - rows_ND[chosen[0]]) ** 2).sum(1)
    while len(chosen) < count:
        chosen.append(int(distance_N.argmax()))
        distance_N = np.minimum(distance_N, ((rows_ND - rows_ND[chosen[-1]]) ** 2).sum(1))
    return np.array(chosen)


def walkable_positions(points_N3: np.ndarray, floor: float, eye_height: float) -> np.ndarray:
    """Floor positions [P, 2] where a camera at `eye_height` above the floor has free space around it.

    On a plan of 10 cm cells, obstacles are cells with points between 0.2 m above the floor and 0.2 m above the eye,
    and the inside is whatever walls and floor enclose. Kept are inside cells at least 0.35 m from an obstacle, or, in
    tight scans, at least 0.7 times as far as the freest one. Empty where no inside cell is free.
    """
    lower_2 = points_N3[:, :2].min(0) - 2 * _CELL
    size_2 = np.ceil((points_N3[:, :2].max(0) + 2 * _CELL - lower_2) / _CELL).astype(int) + 1
    cell_N2 = ((points_N3[:, :2] - lower_2) / _CELL).astype(int)
    height_N = points_N3[:, 2] - floor
    anything, obstacle = np.zeros(size_2, dtype=bool), np.zeros(size_2, dtype=bool)
    anything[cell_N2[:, 0], cell_N2[:, 1]] = True
    blocks_N = (height_N > 0.2) & (height_N < eye_height + 0.2)
    obstacle[cell_N2[blocks_N, 0], cell_N2[blocks_N, 1]] = True
    closed = np.asarray(ndimage.binary_closing(np.pad(anything, 3), iterations=3))[3:-3, 3:-3]
    closed = np.asarray(ndimage.binary_fill_holes(closed))
    inside = closed & ~obstacle
    if not inside.any():
        return np.zeros((0, 2))
    # the border of the scan bounds free space as well: a wall that was not scanned is still there
    free = np.pad(closed & ~obstacle, 1)
    clearance = np.asarray(ndimage.distance_transform_edt(free))[1:-1, 1:-1] * _CELL
    needed = min(_CLEARANCE, 0.7 * clearance[inside].max())
    return np.argwhere(inside & (clearance >= needed)) * _CELL + lower_2 + _CELL / 2


def candidate_poses(points_N3: np.ndarray, floor: float, num_positions: int) -> list[np.ndarray]:
    """Poses [4, 4] at eye height from positions spread over the free floor, in eight directions each.

    A scan without free floor (a table top) and a single object are looked at from around (`object_poses`).
    """
    ceiling = float(np.percentile(points_N3[:, 2], 99.5))
    eye_height = min(EYE_HEIGHT, 0.65 * max(ceiling - floor, 1e-3))
    free_P2 = np.zeros((0, 2)) if is_object(points_N3) else walkable_positions(points_N3, floor, eye_height)
    if not len(free_P2):
        return object_poses(points_N3)
    down = eye_height * (_LOOK_HEIGHT / EYE_HEIGHT - 1)
    turned = [
        look_at(np.zeros(3), np.array([_LOOK_AHEAD * np.cos(angle), _LOOK_AHEAD * np.sin(angle), down]))
        for angle in np.arange(_DIRECTIONS) * 2 * np.pi / _DIRECTIONS
    ]
    poses = []
    for x, y in free_P2[spread(free_P2, num_positions)]:
        for pose_44 in turned:
            poses.append(pose_44.copy())
            poses[-1][:3, 3] = x, y, floor + eye_height
    return poses


def is_object(points_N3: np.ndarray) -> bool:
    """Whether a cloud is one object, not a room: smaller than any room is."""
    return float(np.ptp(points_N3, axis=0).max()) < _OBJECT_EXTENT


def poses_around(points_N3: np.ndarray, azimuths: Iterable[float], elevation: float) -> list[np.ndarray]:
    """Poses [4, 4] that look at the middle of a cloud, far enough away that all of it fits into a square picture.

    Azimuths in radians from +x, elevation in degrees above the horizon.
    """
    lower_3, upper_3 = _walls(points_N3)
    middle_3, radius = (lower_3 + upper_3) / 2, float(np.linalg.norm(upper_3 - lower_3)) / 2
    distance = max(1.05 * radius / np.sin(np.radians(FIELD_OF_VIEW) / 2), radius + 2 * NEAR_PLANE)
    height = np.radians(elevation)
    directions = [np.array([np.cos(a) * np.cos(height), np.sin(a) * np.cos(height), np.sin(height)]) for a in azimuths]
    return [look_at(middle_3 + distance * direction_3, middle_3) for direction_3 in directions]


def object_poses(points_N3: np.ndarray) -> list[np.ndarray]:
    """Poses [4, 4] around a whole cloud: eight directions at each of three elevations, from above and from below."""
    poses = []
    for row, elevation in enumerate(_OBJECT_ELEVATIONS):
        poses += poses_around(
            points_N3, (np.arange(_DIRECTIONS) + 0.5 * (row % 2)) * 2 * np.pi / _DIRECTIONS, elevation
        )
    return poses + poses_around(points_N3, [0.0], 90) + poses_around(points_N3, [0.0], -90)


def ring_poses(points_N3: np.ndarray, floor: float, count: int, *, low: bool = False) -> list[np.ndarray]:
    """Poses [4, 4] on a circle in a room that look at its middle: at eye height and downwards, or, `low`, from just
    above the floor and upwards. A single object is looked at from around it, from above or from below the horizon."""
    angles = np.arange(count) * 2 * np.pi / count
    if is_object(points_N3):
        return poses_around(points_N3, angles, -_OBJECT_STEEP if low else _OBJECT_RING)
    lower_3, upper_3 = _walls(points_N3)
    scale = min(1.0, 0.65 * max(upper_3[2] - floor, 1e-3) / EYE_HEIGHT)
    eye, target = (_LOW_HEIGHT, _LOW_TARGET) if low else (EYE_HEIGHT, _LOOK_HEIGHT)
    middle_3 = np.array([*(lower_3 + upper_3)[:2] / 2, floor + scale * target])
    reach = max(_RING_SHARE * float((upper_3 - lower_3)[:2].min()), 4 * NEAR_PLANE)
    eyes = [
        np.array([*(middle_3[:2] + reach * np.array([np.cos(a), np.sin(a)])), floor + scale * eye]) for a in angles
    ]
    return [look_at(eye_3, middle_3) for eye_3 in eyes]


def _walls(points_N3: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper corner of a room, a few stray points aside."""
    lower_3, upper_3 = np.percentile(points_N3, [0.5, 99.5], axis=0)
    return lower_3, upper_3


def top_poses(points_N3: np.ndarray, count: int) -> list[np.ndarray]:
    """Poses [4, 4] in rows below the ceiling of a room, straight down; a single object is seen steeply from around."""
    if is_object(points_N3):
        return poses_around(points_N3, np.arange(count) * 2 * np.pi / count, _OBJECT_STEEP)
    lower_3, upper_3 = _walls(points_N3)
    along, across = (0, 1) if (upper_3 - lower_3)[0] >= (upper_3 - lower_3)[1] else (1, 0)
    rows = 1 if count < 4 else 2
    columns = -(-count // rows)
    poses = []
    for number in range(count):
        eye_3 = np.array([0.0, 0.0, upper_3[2] - NEAR_PLANE])
        for axis, share in ((along, (number % columns + 0.5) / columns), (across, (number // columns + 0.5) / rows)):
            eye_3[axis] = lower_3[axis] + share * (upper_3 - lower_3)[axis]
        poses.append(look_at(eye_3, eye_3 - [0, 0, 1.0]))
    return poses


def splat_tolerance(points_N3: np.ndarray) -> float:
    """Metres that a point may lie behind a splatted depth map and count as seen: discs overhang their surface."""
    extent = float(np.ptp(points_N3, axis=0).max()) if len(points_N3) else 0.0
    return min(0.15, 0.1 * max(extent, 1e-3))


def most_telling(seen_VN: np.ndarray, weight_N: np.ndarray, count: int) -> list[int]:
    """Views chosen one after another by the weight of what they show, each point counting half as much every time.

    Ties go to the lower index; result in the order of choice.
    """
    value_N = weight_N.astype(np.float64).copy()
    seen = torch.from_numpy(seen_VN).double()  # for products by PyTorch, whose threads can be limited
    chosen: list[int] = []
    left = np.ones(len(seen_VN), dtype=bool)
    for _ in range(min(count, len(seen_VN))):
        gain_V = np.where(left, (seen @ torch.from_numpy(value_N)).numpy(), -1.0)
        best = int(gain_V.argmax())
        chosen.append(best)
        left[best] = False
        value_N[seen_VN[best]] /= 2
    return chosen


def place_cameras(
    points_N3: np.ndarray,
    floor: float,
    count: int,
    image_size: tuple[int, int],
    *,
    weight_N: np.ndarray | None = None,
    around: bool = False,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> list[Camera]:
    """Cameras inside a scan (or around a single object) that together show it well, best first.

    Candidates (positions on the free floor times eight directions) are judged by small splats of up to 8,192 points:
    greedily, by how much they show that earlier ones did not.

    Args:
        floor: height of the floor.
        image_size: H, W of the pictures.
        weight_N: how much showing each point is worth. None takes all alike.
        around: look at the whole cloud from around it, room or not.
        seed: of the subsample of points.
    """
    height, width = image_size
    pick = np.arange(len(points_N3))
    if len(points_N3) > _PROBE_POINTS:
        pick = np.sort(np.random.default_rng(seed).choice(len(points_N3), _PROBE_POINTS, replace=False))
    some_S3 = points_N3[pick]
    poses = object_poses(points_N3) if around else candidate_poses(points_N3, floor, max(8, count // 2))
    matrix_33 = pinhole(_PROBE, _PROBE, FIELD_OF_VIEW)
    probes = [Camera(pose_44, matrix_33, _PROBE, _PROBE) for pose_44 in poses]
    renders = splat_batch(some_S3, np.zeros_like(some_S3, dtype=np.uint8), probes, smooth=False, device=device)
    seen_VS = visible_points(
        some_S3, probes, [render.depth_HW for render in renders], tolerance=splat_tolerance(some_S3), device=device
    )
    weight_S = np.ones(len(pick)) if weight_N is None else weight_N[pick]
    matrix_33 = pinhole(width, height, FIELD_OF_VIEW)
    return [Camera(poses[row], matrix_33, width, height) for row in most_telling(seen_VS, weight_S, count)]
