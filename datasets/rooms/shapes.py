"""The three primitives that furniture is made of, cut into fine vertices: box, frustum (vertical), ellipsoid.

Local frame of a piece of furniture: metres, x to its front, y to its left, z up, origin on the floor below its middle.
V vertices, F triangles.
"""

from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np

RGB = tuple[int, int, int]


@dataclass(frozen=True)
class Part:
    """One convex primitive of a piece of furniture, axis-aligned in the local frame of the furniture."""

    shape: str  # "box", "frustum", "ellipsoid"
    center_3: tuple[float, float, float]
    size_3: tuple[float, float, float]
    rgb: RGB
    taper: float = 1.0  # frustum: radius at the top over radius at the bottom
    grain: float = 0.05  # relative contrast of the texture


@dataclass(frozen=True)
class Top:
    """A free level rectangle (local frame) that things can stand on, with the height that is free above it."""

    x: tuple[float, float]
    y: tuple[float, float]
    z: float
    clear: float = 2.0


@dataclass
class Model:
    """The parts of one piece of furniture and the tops it offers."""

    parts: list[Part]
    tops: list[Top]
    _bounds: dict[float, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)  # placing asks often

    @cached_property
    def _extents(self) -> tuple[np.ndarray, np.ndarray]:
        """Centres and half sizes of the parts, [P, 3] each."""
        centers_P3 = np.array([part.center_3 for part in self.parts])
        return centers_P3, np.array([part.size_3 for part in self.parts]) / 2

    def bounds_at(self, yaw: float) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest corner around the parts, turned by `yaw` about z."""
        if yaw not in self._bounds:
            centers_P3, halves_P3 = self._extents
            c, s = np.cos(yaw), np.sin(yaw)
            turn_22 = np.array([[c, -s], [s, c]])
            xy_P2 = centers_P3[:, :2] @ turn_22.T
            half_P2 = halves_P3[:, :2] @ np.abs(turn_22).T
            low_3 = np.append((xy_P2 - half_P2).min(0), (centers_P3 - halves_P3)[:, 2].min())
            high_3 = np.append((xy_P2 + half_P2).max(0), (centers_P3 + halves_P3)[:, 2].max())
            self._bounds[yaw] = (low_3, high_3)
        return self._bounds[yaw]


@dataclass
class Patch:
    """Vertices with outward normals, and triangles (empty where none were asked for)."""

    vertices_V3: np.ndarray
    normals_V3: np.ndarray
    faces_F3: np.ndarray


NO_FACES = np.zeros((0, 3), np.int32)


def box(x: float, y: float, z: float, dx: float, dy: float, dz: float, rgb: RGB, grain: float = 0.05) -> Part:
    """A box with its middle at x, y and its underside at z."""
    return Part("box", (x, y, z + dz / 2), (dx, dy, dz), rgb, grain=grain)


def frustum(x: float, y: float, z: float, dx: float, dy: float, dz: float, rgb: RGB, taper: float = 1.0) -> Part:
    """A vertical frustum or cylinder; dx, dy are the larger of its two diameters."""
    return Part("frustum", (x, y, z + dz / 2), (dx, dy, dz), rgb, taper)


def ellipsoid(x: float, y: float, z: float, dx: float, dy: float, dz: float, rgb: RGB) -> Part:
    """An ellipsoid with its lowest point at z."""
    return Part("ellipsoid", (x, y, z + dz / 2), (dx, dy, dz), rgb)


@lru_cache(maxsize=4096)
def _grid(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit square as a grid: coordinates [rows * columns, 2] in [-0.5, 0.5] and triangles."""
    u, v = np.meshgrid(np.linspace(-0.5, 0.5, rows), np.linspace(-0.5, 0.5, columns), indexing="ij")
    corner = (np.arange(rows - 1)[:, None] * columns + np.arange(columns - 1)).reshape(-1)
    faces_F3 = np.concatenate(
        [
            np.stack([corner, corner + columns, corner + columns + 1], 1),
            np.stack([corner, corner + columns + 1, corner + 1], 1),
        ]
    )
    return np.stack([u.reshape(-1), v.reshape(-1)], 1), faces_F3.astype(np.int32)


def _steps(length: float, spacing: float) -> int:
    return max(2, int(np.ceil(length / spacing)) + 1)


# Faces of a box: normal axis, sign, and the two axes that span it, ordered so that triangles wind outwards.
_BOX_FACES = ((0, 1, 1, 2), (0, -1, 2, 1), (1, 1, 2, 0), (1, -1, 0, 2), (2, 1, 0, 1), (2, -1, 1, 0))


@lru_cache(maxsize=8192)
def _unit_box(counts: tuple[int, int, int], bottom: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Vertices in [-0.5, 0.5], normals and triangles of a box with so many vertices along each axis."""
    vertices, normals, faces, start = [], [], [], 0
    for axis, sign, first, second in _BOX_FACES if bottom else _BOX_FACES[:5]:
        grid_V2, grid_faces_F3 = _grid(counts[first], counts[second])
        face_V3 = np.empty((len(grid_V2), 3))
        face_V3[:, axis], face_V3[:, first], face_V3[:, second] = sign * 0.5, grid_V2[:, 0], grid_V2[:, 1]
        normal_3 = np.zeros(3)
        normal_3[axis] = sign
        vertices.append(face_V3)
        normals.append(np.broadcast_to(normal_3, face_V3.shape))
        faces.append(grid_faces_F3 + start)
        start += len(face_V3)
    return np.concatenate(vertices), np.concatenate(normals), np.concatenate(faces)


def _closed_grid_faces(rings: int, around: int) -> np.ndarray:
    """Triangles of a grid of rings (bottom to top) that closes around, winding outwards."""
    ring, step = np.meshgrid(np.arange(rings - 1), np.arange(around), indexing="ij")
    a = (ring * around + step).reshape(-1)
    b = (ring * around + (step + 1) % around).reshape(-1)
    faces = [np.stack([a, b, b + around], 1), np.stack([a, b + around, a + around], 1)]
    return np.concatenate(faces).astype(np.int32)


@lru_cache(maxsize=4096)
def _unit_frustum(rings: int, around: int, cap: int, taper: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Side and top cap of a frustum in the unit cube; the larger of the two radii is 0.5."""
    bottom, top = (0.5, 0.5 * taper) if taper <= 1 else (0.5 / taper, 0.5)
    angle = np.arange(around) * (2 * np.pi / around)
    circle_A2 = np.stack([np.cos(angle), np.sin(angle)], 1)
    level = np.linspace(-0.5, 0.5, rings)
    radius = bottom + (top - bottom) * (level + 0.5)
    side_V3 = np.concatenate(
        [(radius[:, None, None] * circle_A2), np.broadcast_to(level[:, None, None], (rings, around, 1))], 2
    ).reshape(-1, 3)
    slope = np.full((around, 1), bottom - top)
    side_normal_A3 = np.concatenate([circle_A2, slope], 1)
    shares = np.linspace(1.0, 0.0, cap)
    cap_V3 = np.concatenate([shares[:, None, None] * top * circle_A2, np.full((cap, around, 1), 0.5)], 2).reshape(
        -1, 3
    )
    normals_V3 = np.concatenate([np.tile(side_normal_A3, (rings, 1)), np.tile([0.0, 0.0, 1.0], (len(cap_V3), 1))])
    faces_F3 = np.concatenate([_closed_grid_faces(rings, around), _closed_grid_faces(cap, around) + rings * around])
    return np.concatenate([side_V3, cap_V3]), normals_V3, faces_F3


@lru_cache(maxsize=512)
def _unit_ellipsoid(rings: int, around: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A sphere of radius 0.5, rings from the lowest to the highest point."""
    latitude = np.linspace(-np.pi / 2, np.pi / 2, rings)[:, None]
    angle = (np.arange(around) * (2 * np.pi / around))[None]
    unit_V3 = np.stack(
        [
            np.cos(latitude) * np.cos(angle),
            np.cos(latitude) * np.sin(angle),
            np.broadcast_to(np.sin(latitude), (rings, around)),
        ],
        2,
    ).reshape(-1, 3)
    return unit_V3 * 0.5, unit_V3, _closed_grid_faces(rings, around)


def tessellate(part: Part, spacing: float, *, bottom: bool, faces: bool) -> Patch:
    """Vertices about `spacing` metres apart on the surface of a part, in the local frame.

    Undersides cost points and are seen only from below, so boxes get theirs only when `bottom` is set; frustums have
    none.
    """
    dx, dy, dz = part.size_3
    if part.shape == "box":
        counts = (_steps(dx, spacing), _steps(dy, spacing), _steps(dz, spacing))
        unit_V3, normals_V3, faces_F3 = _unit_box(counts, bottom)
    elif part.shape == "frustum":
        around = max(6, int(np.ceil(np.pi * max(dx, dy) / spacing)))
        cap = _steps(max(dx, dy) / 2 * min(part.taper, 1.0), spacing * 1.3)
        unit_V3, normals_V3, faces_F3 = _unit_frustum(_steps(dz, spacing), around, cap, round(part.taper, 2))
    elif part.shape == "ellipsoid":
        around = max(6, int(np.ceil(np.pi * max(dx, dy) / spacing)))
        unit_V3, normals_V3, faces_F3 = _unit_ellipsoid(
            max(4, int(np.ceil(np.pi * max(part.size_3) / 2 / spacing))), around
        )
    else:
        raise ValueError(f"Unknown shape {part.shape!r} of a part; shapes are box, frustum, ellipsoid.")
    size_3 = np.asarray(part.size_3)
    # Normals of a stretched surface are stretched by the inverse.
    normals_V3 = normals_V3 / size_3 if part.shape != "box" else normals_V3
    if part.shape != "box":
        normals_V3 = normals_V3 / (np.linalg.norm(normals_V3, axis=1, keepdims=True) + 1e-12)
    return Patch(unit_V3 * size_3 + np.asarray(part.center_3), normals_V3, faces_F3 if faces else NO_FACES)


def rectangle(
    origin_3: np.ndarray, side_u_3: np.ndarray, side_v_3: np.ndarray, spacing: float, *, faces: bool
) -> Patch:
    """A flat rectangle from a corner and its two sides; the normal is u x v."""
    length_u, length_v = float(np.linalg.norm(side_u_3)), float(np.linalg.norm(side_v_3))
    grid_V2, grid_faces_F3 = _grid(_steps(length_u, spacing), _steps(length_v, spacing))
    vertices_V3 = origin_3 + (grid_V2[:, :1] + 0.5) * side_u_3 + (grid_V2[:, 1:] + 0.5) * side_v_3
    normal_3 = np.cross(side_u_3, side_v_3) / (length_u * length_v)
    return Patch(vertices_V3, np.tile(normal_3, (len(vertices_V3), 1)), grid_faces_F3 if faces else NO_FACES)
