"""Which way is up, how large, and along which walls: what readers estimate for scans that do not say.

Everything here works on a subset of the points and their normals; signs of normals do not matter. N points.
"""

from dataclasses import dataclass, field

import numpy as np
from scipy.spatial import KDTree
from scipy.spatial.transform import Rotation

ROOM_HEIGHT = (1.8, 6.0)  # metres: floor to the highest point of a scanned room
LARGEST_PLAUSIBLE = 20.0  # a cloud higher than this is not in metres
UNITS = (("centimetres", 0.01), ("millimetres", 0.001), ("inches", 0.0254))
# Another axis must look so many times more like up than the assumed one. Measured with z up throughout: no generated
# room of 40 and neither of 2 whole real scans is mistaken, 7 % of 120 real scans without walls and floors are.
CLEAR_EVIDENCE = 2.0
# An axis is up where so much of the surface lies across it, at least, as a share of what lies across the axis with
# most: across the sides of a scan without walls next to nothing does, and how its things happen to stand would decide.
# (Of a hallway of 12 m by 1.2 m without a ceiling a fifth of what stands lies.)
LYING_OF_MOST = 0.15
UPSIDE_DOWN = 1.3  # so many times more points in the upper half before a scan is turned over
LEVEL_TOLERANCE = 2.0  # degrees: smaller tilts are left as they are
CEILING = 2.5  # metres: what the height of a room is taken for where nothing tells the scale
LYING = 0.05  # share of the surface that lies across up, at least; where the assumed one has less, the scan is tilted
NUM_DIRECTIONS = 6  # of flat surfaces, that are looked at as up in a tilted scan
NUM_SAMPLES = 12_000
NUM_NEIGHBORS = 24
NOISY_NEIGHBORS = 192

UPS = ("x", "-x", "y", "-y", "z", "-z")

_AXES = {"x": np.array([1.0, 0, 0]), "y": np.array([0, 1.0, 0]), "z": np.array([0, 0, 1.0])}


@dataclass(frozen=True)
class AlignOptions:
    """What is known of a scan's frame that the file does not say.

    Args:
        up: the axis that points up, roughly (one of UPS); "" for unknown.
        height: metres from the floor to the highest point of the room; None for unknown.
        from_video: a reconstruction from video, as MASt3R-SLAM, SLAM3R or VGGT write it: no axis need be up, no unit
            is known, and stray points are removed.
    """

    up: str = ""
    height: float | None = None
    from_video: bool = False

    def __post_init__(self):
        if self.up and self.up not in UPS:
            raise ValueError(f"Up is {self.up!r}; it is one of {', '.join(UPS)}, or left out.")
        if self.height is not None and not 0.1 <= self.height <= 100:
            raise ValueError(f"A room's height of {self.height} m is none; give metres from the floor to the ceiling.")

    @property
    def up_3(self) -> np.ndarray | None:
        """The direction of `up`, if it is known."""
        if not self.up:
            return None
        return _AXES[self.up[-1]] * (-1.0 if self.up.startswith("-") else 1.0)


@dataclass
class Surface:
    """Random subsets of a cloud: points on flat surfaces with unit normals (signs arbitrary), and any points."""

    points_N3: np.ndarray
    normals_N3: np.ndarray
    cloud_M3: np.ndarray


@dataclass
class Estimate:
    """A 3x3 or 4x4 transform, and what was assumed in making it, in words."""

    matrix: np.ndarray
    notes: list[str] = field(default_factory=list)


def sample_surface(points_N3: np.ndarray, rng: np.random.Generator, *, noisy: bool = False) -> Surface:
    """Normals by principal components of the nearest neighbours, where these are flat enough to have one.

    Args:
        noisy: look at more neighbours, up to NOISY_NEIGHBORS, until half of the neighbourhoods are flat.
    """
    rows = rng.permutation(len(points_N3))[: NUM_SAMPLES * 4]
    cloud_N3 = points_N3[rows].astype(np.float64)
    centres_N3 = cloud_N3[:NUM_SAMPLES]
    count = min(NUM_NEIGHBORS, len(cloud_N3))
    if count < 4:
        return Surface(centres_N3[:0], centres_N3[:0], cloud_N3)
    tree = KDTree(cloud_N3)
    while True:
        _, index_NK = tree.query(centres_N3, k=count)
        near_NK3 = cloud_N3[index_NK]
        near_NK3 = near_NK3 - near_NK3.mean(axis=1, keepdims=True)
        values_N3, vectors_N33 = np.linalg.eigh(near_NK3.transpose(0, 2, 1) @ near_NK3)
        flat_N = values_N3[:, 0] < 0.08 * values_N3[:, 1]
        if not noisy or flat_N.mean() >= 0.5 or count >= min(NOISY_NEIGHBORS, len(cloud_N3)):
            return Surface(centres_N3[flat_N], vectors_N33[flat_N, :, 0], cloud_N3)
        count = min(2 * count, NOISY_NEIGHBORS, len(cloud_N3))


def refine_direction(normals_N3: np.ndarray, start_3: np.ndarray) -> np.ndarray:
    """The direction that most normals near `start_3` agree on (within 40, 20, then 8 degrees), same sign as it."""
    return _refined(normals_N3, start_3, (40.0, 20.0, 8.0, 8.0))


def _refined(normals_N3: np.ndarray, start_3: np.ndarray, cones: tuple[float, ...]) -> np.ndarray:
    """The mean of the normals within a cone around a direction, again and again in narrower ones (degrees)."""
    direction_3 = start_3 / np.linalg.norm(start_3)
    for degrees in cones:
        cosine_N = normals_N3 @ direction_3
        near_N = np.abs(cosine_N) > np.cos(np.radians(degrees))
        if near_N.sum() < 20:
            break
        mean_3 = (normals_N3[near_N] * np.sign(cosine_N[near_N])[:, None]).mean(axis=0)
        direction_3 = mean_3 / np.linalg.norm(mean_3)
    return direction_3


def extent(points_N3: np.ndarray, direction_3: np.ndarray) -> float:
    """Length of the cloud along a direction, without the outermost half per cent on either side."""
    low, high = np.percentile(points_N3 @ direction_3, [0.5, 99.5])
    return float(high - low)


def flat_directions(normals_N3: np.ndarray, count: int = NUM_DIRECTIONS) -> list[np.ndarray]:
    """Unit normals of the largest sets of parallel surfaces, largest first: floors and walls, whatever the frame.

    Peaks of the normals' density on the half sphere, at least 30 degrees apart, each refined.
    """
    steps = np.arange(1500) + 0.5
    height_D, angle_D = 1 - steps / 1500, np.pi * (1 + 5**0.5) * steps
    radius_D = np.sqrt(1 - height_D**2)
    grid_D3 = np.stack([radius_D * np.cos(angle_D), radius_D * np.sin(angle_D), height_D], axis=1)
    near_D = (np.abs(grid_D3 @ normals_N3.T) > np.cos(np.radians(6.0))).sum(axis=1)
    found: list[np.ndarray] = []
    for place in np.argsort(-near_D):
        if all(abs(float(grid_D3[place] @ other)) < np.cos(np.radians(30.0)) for other in found):
            found.append(_refined(normals_N3, grid_D3[place], (12.0, 8.0, 8.0)))
        if len(found) == count:
            break
    return found


def _lying_share(surface: Surface, direction_3: np.ndarray) -> float:
    """Share of the surface that lies across a direction."""
    return float((np.abs(surface.normals_N3 @ direction_3) > np.cos(np.radians(10.0))).mean())


def _level_share(surface: Surface, direction_3: np.ndarray) -> float:
    """Share of the surface that lies across a direction, per unit of the cloud's length along it.

    Floors, beds and table tops make the first large; rooms being wider than high makes the second small.
    """
    return _lying_share(surface, direction_3) / max(extent(surface.cloud_M3, direction_3), 1e-9)


def _bottom_heaviness(surface: Surface, direction_3: np.ndarray) -> float:
    """Logarithm of points in the lower over points in the upper half, floor, ceiling and walls cut off.

    Furniture stands on the floor and leaves the air above it empty: far from 0 along the vertical, positive where
    `direction_3` is up.
    """
    rotation_33 = _shortest_rotation(direction_3, _AXES["z"])
    turned = Surface(surface.points_N3 @ rotation_33.T, surface.normals_N3 @ rotation_33.T, surface.cloud_M3)
    yaw_33 = Rotation.from_euler("z", estimate_yaw(turned)[0]).as_matrix()
    cloud_M3 = surface.cloud_M3 @ (yaw_33 @ rotation_33).T
    low_3, high_3 = np.percentile(cloud_M3, [0.5, 99.5], axis=0)
    place_M3 = (cloud_M3 - low_3) / np.maximum(high_3 - low_3, 1e-9)
    inside_M = (np.abs(place_M3[:, :2] - 0.5) < 0.42).all(axis=1) & (np.abs(place_M3[:, 2] - 0.5) < 0.44)
    height_M = place_M3[inside_M, 2]
    below = int((height_M < 0.5).sum())
    return float(np.log((below + 20) / (len(height_M) - below + 20)))  # +20: a handful of points says nothing


def estimate_up(
    surface: Surface,
    *,
    assumed: str = "z",
    hint_3: np.ndarray | None = None,
    hint_name: str = "the cameras' mean up direction",
    tilted: bool = False,
) -> Estimate:
    """Rotation [3, 3] that turns the cloud's up direction to +z.

    Args:
        assumed: `x`, `y` or `z`: the file format's convention, kept unless another axis is clearly more like up.
        hint_3: up as it is known roughly, in the cloud's frame; replaces the choice among axes. `hint_name` says how.
        tilted: no axis need be near up; the directions of the flat surfaces are looked at instead. So they are where
            hardly any surface lies across the assumed axis.
    """
    if len(surface.points_N3) < 100:
        return Estimate(np.eye(3), ["too few flat surfaces to check the up-axis: +z is taken as up"])
    if hint_3 is not None:
        up_3 = refine_direction(surface.normals_N3, hint_3)
        name = hint_name
    elif tilted or _is_tilted(surface, assumed):
        up_3 = _most_like_up(surface)
        name = f"({up_3[0]:.2f}, {up_3[1]:.2f}, {up_3[2]:.2f}), found among the flat surfaces"
    else:
        directions = {axis: refine_direction(surface.normals_N3, _AXES[axis]) for axis in _AXES}
        heavy = {axis: _bottom_heaviness(surface, directions[axis]) for axis in _AXES}
        scores = {axis: np.sqrt(_level_share(surface, directions[axis])) * abs(heavy[axis]) for axis in _AXES}
        lying = {axis: _lying_share(surface, directions[axis]) for axis in _AXES}
        able = [axis for axis in _AXES if lying[axis] >= LYING_OF_MOST * max(lying.values())]
        best = max(able, key=lambda axis: scores[axis])
        kept = assumed in able and scores[best] <= CLEAR_EVIDENCE * scores[assumed]
        axis = assumed if kept else best
        up_3 = directions[axis]
        turned_over = heavy[axis] < (-np.log(UPSIDE_DOWN) if axis == assumed else 0.0)
        up_3 = -up_3 if turned_over else up_3
        name = f"{'-' if turned_over else '+'}{axis}"
    tilt = np.degrees(np.arccos(np.clip(up_3[2], -1.0, 1.0)))
    if tilt < LEVEL_TOLERANCE:
        return Estimate(np.eye(3), ["up-axis +z"])
    rotation_33 = _shortest_rotation(up_3, _AXES["z"])
    exact = np.abs(up_3).max() > np.cos(np.radians(LEVEL_TOLERANCE))
    if exact and hint_3 is None:  # a clean axis swap stays clean
        axis_3 = np.where(np.abs(up_3) == np.abs(up_3).max(), np.sign(up_3), 0.0)
        rotation_33 = _shortest_rotation(axis_3, _AXES["z"])
        return Estimate(rotation_33, [f"up-axis {name}, turned to +z"])
    return Estimate(rotation_33, [f"up-axis near {name}, levelled to +z by {tilt:.1f} degrees"])


def _is_tilted(surface: Surface, assumed: str) -> bool:
    """Whether hardly any surface lies across what should be up."""
    return _lying_share(surface, refine_direction(surface.normals_N3, _AXES[assumed])) < LYING


def _most_like_up(surface: Surface) -> np.ndarray:
    """Of the directions of flat surfaces the one that is most like up, by the evidence that chooses among axes."""
    directions = flat_directions(surface.normals_N3)
    heavy = [_bottom_heaviness(surface, direction_3) for direction_3 in directions]
    scores = [
        np.sqrt(_level_share(surface, direction_3)) * abs(weight)
        for direction_3, weight in zip(directions, heavy, strict=True)
    ]
    best = int(np.argmax(scores))
    return directions[best] if heavy[best] >= 0 else -directions[best]


def _shortest_rotation(start_3: np.ndarray, end_3: np.ndarray) -> np.ndarray:
    axis_3 = np.cross(start_3, end_3)
    sine, cosine = float(np.linalg.norm(axis_3)), float(start_3 @ end_3)
    if sine < 1e-9:
        return np.eye(3) if cosine > 0 else np.diag([1.0, -1.0, -1.0])
    return Rotation.from_rotvec(axis_3 / sine * np.arctan2(sine, cosine)).as_matrix()


def estimate_scale(points_N3: np.ndarray) -> Estimate:
    """Factor to metres (a 1x1 matrix) for a cloud with z up.

    A cloud not higher than 20 units is taken as metres. A higher one is taken as the first of centimetres,
    millimetres and inches that gives a room 1.8 to 6 m high. Otherwise nothing is changed. Heights outside 1.8 to 6 m
    are noted.
    """
    height = extent(points_N3, _AXES["z"])
    if height > LARGEST_PLAUSIBLE:
        for unit, factor in UNITS:
            if ROOM_HEIGHT[0] <= height * factor <= ROOM_HEIGHT[1]:
                note = f"the cloud is {height:.0f} units high: read as {unit} ({height * factor:.2f} m)"
                return Estimate(np.array([[factor]]), [note])
        return Estimate(np.eye(1), [f"the cloud is {height:.1f} units high, which fits no unit: taken as metres"])
    if not ROOM_HEIGHT[0] <= height <= ROOM_HEIGHT[1]:
        return Estimate(
            np.eye(1), [f"height {height:.2f}, unusual for a room in metres: taken as metres, sizes may be wrong"]
        )
    return Estimate(np.eye(1), [f"height {height:.2f} m, plausible for a room in metres"])


def scale_to_height(points_N3: np.ndarray, height: float | None, *, from_video: bool) -> Estimate:
    """Factor to metres (a 1x1 matrix) for a cloud with z up whose room is `height` metres high.

    Without a height the unit is guessed (estimate_scale), and a reconstruction from video, which has none, is taken
    to be CEILING high: an assumption, and said as one.
    """
    if height is None and not from_video:
        return estimate_scale(points_N3)
    measured = max(extent(points_N3, _AXES["z"]), 1e-9)
    factor = (height or CEILING) / measured
    if height is not None:
        note = (
            f"scaled by {factor:.4g}, so that floor to highest point, without the outermost half per cent of points, "
            f"are the {height:g} m that were given"
        )
    else:
        note = (
            f"scaled by {factor:.4g}: a reconstruction from video has no unit, and floor to highest point were taken "
            f"for a usual room height of {CEILING} m; sizes are as wrong as that is (--height METRES says better)"
        )
    return Estimate(np.array([[factor]]), [note])


def estimate_yaw(surface: Surface) -> tuple[float, float]:
    """Angle (radians, within 45 degrees) that turns the walls along x and y, and the share of walls that agree.

    The surface must have z up. The peak of the wall normals' headings modulo 90 degrees, each normal weighted by how
    upright its surface is; 0 and 0 where there are no walls.
    """
    upright_N = np.abs(surface.normals_N3[:, 2]) < np.sin(np.radians(15.0))
    if upright_N.sum() < 50:
        return 0.0, 0.0
    normals_W3 = surface.normals_N3[upright_N]
    heading_W = np.arctan2(normals_W3[:, 1], normals_W3[:, 0])
    quarter = np.pi / 2
    bins = np.bincount((np.mod(heading_W, quarter) / quarter * 90).astype(int) % 90, minlength=90).astype(float)
    smooth = sum(np.roll(bins, shift) for shift in range(-2, 3))
    peak = (int(np.argmax(smooth)) + 0.5) / 90 * quarter
    for degrees in (8.0, 4.0, 4.0):
        offset_W = np.mod(heading_W - peak + quarter / 2, quarter) - quarter / 2
        near_W = np.abs(offset_W) < np.radians(degrees)
        peak += float(offset_W[near_W].mean()) if near_W.any() else 0.0
    offset_W = np.mod(heading_W - peak + quarter / 2, quarter) - quarter / 2
    share = float((np.abs(offset_W) < np.radians(5.0)).mean())
    yaw = np.mod(-peak + quarter / 2, quarter) - quarter / 2
    return float(yaw), share


def align(
    points_N3: np.ndarray,
    rng: np.random.Generator,
    *,
    assumed_up: str = "z",
    up_hint_3: np.ndarray | None = None,
    up_hint_name: str = "the cameras' mean up direction",
    options: AlignOptions = AlignOptions(),  # noqa: B008 - frozen
) -> Estimate:
    """Transform [4, 4] from a scan's own frame to metres, z up, walls along x and y, with what it assumed.

    Args:
        assumed_up: the file format's convention.
        up_hint_3: up as the scan's cameras or its format say; what `options` know goes before.
    """
    surface = sample_surface(points_N3, rng, noisy=options.from_video)
    if options.up:
        up_hint_3, up_hint_name = options.up_3, f"{options.up}, as was said"
    up = estimate_up(surface, assumed=assumed_up, hint_3=up_hint_3, hint_name=up_hint_name, tilted=options.from_video)
    levelled = Surface(*(array @ up.matrix.T for array in (surface.points_N3, surface.normals_N3, surface.cloud_M3)))
    scale = scale_to_height(levelled.cloud_M3, options.height, from_video=options.from_video)
    yaw, share = estimate_yaw(levelled)
    notes = [*up.notes, *scale.notes]
    if share < 0.2:  # 5 degrees around four headings cover 11 % of the circle by chance
        yaw = 0.0
        notes.append("no clear wall directions: not turned about z")
    elif abs(yaw) < np.radians(0.5):
        yaw = 0.0
    else:
        notes.append(f"walls turned along x and y by {np.degrees(yaw):.1f} degrees")
    matrix_44 = np.eye(4)
    matrix_44[:3, :3] = Rotation.from_euler("z", yaw).as_matrix() @ up.matrix * float(scale.matrix[0, 0])
    return Estimate(matrix_44, notes)
