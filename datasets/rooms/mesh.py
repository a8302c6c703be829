"""From a layout to surfaces, and from surfaces to what a hand-held depth sensor would have scanned of them.

World frame, metres. V vertices, F triangles, P placed objects, S stations of the sensor.
"""

from dataclasses import dataclass

import numpy as np

from .cameras import seen_from
from .layout import Layout
from .placement import Placed
from .shapes import NO_FACES, RGB, Part, rectangle, tessellate

STRUCTURE_SPACING = 0.07  # metres between the vertices of walls and floor
MIN_SPACING, MAX_SPACING = 0.014, 0.055
NOISE_ALONG, NOISE_ACROSS = 0.003, 0.001  # metres, standard deviation along the normal and in every direction
LOST_SINGLE = 0.002  # share of vertices lost one by one
HOLES = (8, 20)  # number of round holes in a scan
HOLE_RADIUS = (0.06, 0.22)  # metres
HOLE_LIMIT = 0.4  # no object loses more than this share of its seen vertices to holes
MIN_SEEN_VERTICES, MIN_SEEN_SHARE = 45, 0.06  # what is seen less than this was not scanned: it is no object
STRUCTURE = -1
WALL_COLORS = ((226, 220, 206), (214, 222, 226), (236, 234, 228), (222, 208, 190), (206, 216, 200), (228, 212, 212))
_WAVES_32 = np.array([[23, 3], [5, 29], [7, 11]], dtype=np.float32)  # radians a metre: the grain of surfaces
FLOOR_KINDS = ("planks", "tiles", "carpet")
FLOOR_COLORS = {
    "planks": ((150, 108, 68), (118, 82, 52), (186, 150, 106)),
    "tiles": ((200, 198, 192), (176, 182, 188), (206, 190, 168)),
    "carpet": ((138, 134, 130), (120, 126, 140), (160, 146, 126)),
}


@dataclass
class Surface:
    """A triangle mesh with what every vertex belongs to."""

    vertices_V3: np.ndarray  # float64
    normals_V3: np.ndarray
    colors_V3: np.ndarray  # uint8
    faces_F3: np.ndarray  # int32; empty for points only
    owner_V: np.ndarray  # int32: index into Layout.placed, STRUCTURE for walls and floor
    nyu40_V: np.ndarray  # uint8

    def subset(self, keep_V: np.ndarray) -> "Surface":
        """The vertices of a mask, and the triangles that keep all three corners."""
        faces_F3 = self.faces_F3
        if len(faces_F3):
            new_V = np.cumsum(keep_V, dtype=np.int32) - 1
            faces_F3 = new_V[faces_F3[keep_V[faces_F3].all(1)]]
        return Surface(
            self.vertices_V3[keep_V],
            self.normals_V3[keep_V],
            self.colors_V3[keep_V],
            faces_F3,
            self.owner_V[keep_V],
            self.nyu40_V[keep_V],
        )


def _spacing(part: Part) -> float:
    """Small parts get finer vertices, so that a cup is still round and has enough points."""
    large, middle, _ = sorted(part.size_3, reverse=True)
    return float(np.clip(0.13 * np.sqrt(large * middle), MIN_SPACING, MAX_SPACING))


class _Pile:
    """Collects patches and joins them once."""

    def __init__(self) -> None:
        self.vertices: list[np.ndarray] = []
        self.normals: list[np.ndarray] = []
        self.faces: list[np.ndarray] = []
        self.per_patch: list[tuple[int, int, int, RGB, float]] = []
        self.count = 0

    def add(
        self,
        vertices_V3: np.ndarray,
        normals_V3: np.ndarray,
        faces_F3: np.ndarray,
        owner: int,
        nyu40: int,
        rgb: RGB,
        grain: float,
    ) -> None:
        self.vertices.append(vertices_V3)
        self.normals.append(normals_V3)
        if len(faces_F3):
            self.faces.append(faces_F3 + self.count)
        self.per_patch.append((len(vertices_V3), owner, nyu40, rgb, grain))
        self.count += len(vertices_V3)

    def per_vertex(self, column: int, dtype: type) -> np.ndarray:
        lengths = [row[0] for row in self.per_patch]
        return np.repeat(np.array([row[column] for row in self.per_patch], dtype=dtype), lengths, axis=0)


def _add_object(pile: _Pile, index: int, thing: Placed, faces: bool) -> None:
    c, s = np.cos(thing.yaw), np.sin(thing.yaw)
    turn_33 = np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])
    for part in thing.model.parts:
        high_up = thing.position_3[2] + part.center_3[2] - part.size_3[2] / 2 > 1.2
        patch = tessellate(part, _spacing(part), bottom=high_up, faces=faces)
        pile.add(
            patch.vertices_V3 @ turn_33.T + thing.position_3,
            patch.normals_V3 @ turn_33.T,
            patch.faces_F3,
            index,
            thing.item.nyu40,
            part.rgb,
            part.grain,
        )


def _add_structure(pile: _Pile, size_3: np.ndarray, rng: np.random.Generator, faces: bool) -> str:
    """Floor and four walls, facing into the room; rooms are scanned without their ceilings, as most of ScanNet is."""
    x, y, z = size_3
    kind = FLOOR_KINDS[int(rng.integers(len(FLOOR_KINDS)))]
    floor_rgb = FLOOR_COLORS[kind][int(rng.integers(3))]
    wall_rgb = WALL_COLORS[int(rng.integers(len(WALL_COLORS)))]
    along_x, along_y, up = np.array([x, 0, 0]), np.array([0, y, 0]), np.array([0, 0, z])
    corner = np.array([-x / 2, -y / 2, 0.0])
    for nyu40, rgb, origin, u, v in (
        (2, floor_rgb, corner, along_x, along_y),
        (1, wall_rgb, corner, along_y, up),
        (1, wall_rgb, corner + along_x, up, along_y),
        (1, wall_rgb, corner, up, along_x),
        (1, wall_rgb, corner + along_y, along_x, up),
    ):
        patch = rectangle(origin, u, v, STRUCTURE_SPACING, faces=faces)
        pile.add(patch.vertices_V3, patch.normals_V3, patch.faces_F3, STRUCTURE, nyu40, rgb, 0.03)
    return kind


def _floor_pattern(kind: str, vertices_V3: np.ndarray) -> np.ndarray:
    """Brightness of a floor's pattern, [V]."""
    x, y = vertices_V3[:, 0], vertices_V3[:, 1]
    if kind == "planks":
        plank = np.floor(y / 0.14)
        return 1 + 0.09 * np.sin(plank * 12.9898 + np.floor(x / 1.1 + plank * 0.37) * 78.233)
    if kind == "tiles":
        return 1 + 0.06 * (((np.floor(x / 0.33) + np.floor(y / 0.33)) % 2) * 2 - 1)
    return 1 + 0.04 * np.sin(37 * x) * np.sin(41 * y)


def _paint(pile: _Pile, surface: Surface, layout: Layout, floor_kind: str, rng: np.random.Generator) -> np.ndarray:
    """Vertex colours: the part's colour, its grain, light from above and from one side, shadow below furniture."""
    points_V3, normals_V3 = surface.vertices_V3, surface.normals_V3
    points_V3, normals_V3 = points_V3.astype(np.float32), normals_V3.astype(np.float32)
    base_V3, grain_V = pile.per_vertex(3, np.float32), pile.per_vertex(4, np.float32)
    wave_V = np.sin(points_V3 @ _WAVES_32[:, 0]) * np.sin(points_V3 @ _WAVES_32[:, 1])
    texture_V = 1 + grain_V * (0.6 * wave_V + 0.5 * rng.standard_normal(len(points_V3), dtype=np.float32))
    heading = rng.uniform(0, 2 * np.pi)
    side_V = normals_V3 @ np.array([np.cos(heading), np.sin(heading), 0.0], np.float32)
    light_V = 0.8 + 0.17 * normals_V3[:, 2] + 0.1 * side_V
    floor_V = surface.nyu40_V == 2
    light_V[floor_V] *= _floor_pattern(floor_kind, points_V3[floor_V])
    wall_V = surface.nyu40_V == 1
    light_V[wall_V] *= np.where(points_V3[wall_V, 2] < 0.09, 0.72, 1.0)  # skirting board
    xy_V2 = points_V3[floor_V, :2]
    shaded_V = np.zeros(len(xy_V2), dtype=bool)
    for low_3, high_3 in zip(layout.lows_P3, layout.highs_P3, strict=True):
        if low_3[2] < 0.3:
            shaded_V |= ((xy_V2 > low_3[:2] - 0.06) & (xy_V2 < high_3[:2] + 0.06)).all(1)
    light_V[floor_V] *= np.where(shaded_V, 0.62, 1.0)
    return np.clip(base_V3 * (texture_V * light_V)[:, None] * rng.uniform(0.94, 1.06), 0, 255).astype(np.uint8)


def build_surface(layout: Layout, rng: np.random.Generator, *, faces: bool) -> Surface:
    """The whole surface of a room, as if it could be seen from everywhere.

    What `rng` draws does not depend on `faces`, so that the points-only path yields the same points.
    """
    pile = _Pile()
    floor_kind = _add_structure(pile, layout.size_3, rng, faces)
    for index, thing in enumerate(layout.placed):
        _add_object(pile, index, thing, faces)
    surface = Surface(
        np.concatenate(pile.vertices),
        np.concatenate(pile.normals),
        np.zeros((0, 3), np.uint8),
        np.concatenate(pile.faces).astype(np.int32) if faces else NO_FACES,
        pile.per_vertex(1, np.int32),
        pile.per_vertex(2, np.uint8),
    )
    surface.colors_V3 = _paint(pile, surface, layout, floor_kind, rng)
    return surface


def _covered(surface: Surface, layout: Layout) -> np.ndarray:
    """Vertices of walls behind hanging things, and of tops below what stands on them: nobody can see those."""
    covered_V = np.zeros(len(surface.owner_V), dtype=bool)
    order = {id(thing): index for index, thing in enumerate(layout.placed)}
    wall_V = np.flatnonzero(surface.nyu40_V == 1)
    for thing, low_3, high_3 in zip(layout.placed, layout.lows_P3, layout.highs_P3, strict=True):
        if thing.rule in ("hang", "flank"):
            candidates_V, margin_3 = wall_V, np.full(3, 0.015)
        elif thing.support is not None:
            candidates_V = np.flatnonzero(surface.owner_V == order[id(thing.support)])
            margin_3 = np.array([-0.01, -0.01, 0.01])
        else:
            continue
        points_V3 = surface.vertices_V3[candidates_V]
        covered_V[candidates_V] |= ((points_V3 > low_3 - margin_3) & (points_V3 < high_3 + margin_3)).all(1)
    return covered_V


@dataclass
class Scan:
    """What the sensor saw of a surface: the mask of its vertices, from where each was seen, and which objects."""

    keep_V: np.ndarray  # bool
    seen_SV: np.ndarray  # bool, by station
    kept_objects: list[int]  # indices into Layout.placed


def scan_surface(surface: Surface, layout: Layout, stations_S3: np.ndarray, rng: np.random.Generator) -> Scan:
    """Which vertices a sensor at these stations sees and records (undersides, backs and holes are missing).

    As many numbers are drawn from `rng` whatever is seen, so that a vertex on the edge of being seen, which another
    processor may judge otherwise, changes nothing else.
    """
    seen_SV = np.stack([seen_from(eye_3, surface.vertices_V3, surface.normals_V3) for eye_3 in stations_S3])
    seen_V = seen_SV.any(0)
    seen_V &= ~_covered(surface, layout)
    keep_V = seen_V & (rng.random(len(seen_V)) >= LOST_SINGLE)
    for _ in range(int(rng.integers(*HOLES))):
        centre_3 = surface.vertices_V3[int(rng.integers(len(seen_V)))]
        radius = rng.uniform(*HOLE_RADIUS)
        keep_V &= ((surface.vertices_V3 - centre_3) ** 2).sum(1) > radius**2
    count = len(layout.placed)
    owned_V = surface.owner_V >= 0
    seen_P = np.bincount(surface.owner_V[seen_V & owned_V], minlength=count)
    kept_P = np.bincount(surface.owner_V[keep_V & owned_V], minlength=count)
    spared_P = kept_P < (1 - HOLE_LIMIT) * seen_P
    keep_V |= seen_V & owned_V & spared_P[surface.owner_V]
    total_P = np.bincount(surface.owner_V[owned_V], minlength=count)
    kept_objects = [
        index
        for index in range(count)
        if seen_P[index] >= MIN_SEEN_VERTICES and seen_P[index] >= MIN_SEEN_SHARE * total_P[index]
    ]
    # What stands on something that was not scanned goes with it.
    kept_objects = [
        index
        for index in kept_objects
        if (support := layout.placed[index].support) is None
        or any(layout.placed[other] is support for other in kept_objects)
    ]
    scanned_P = np.zeros(count + 1, dtype=bool)  # the last place is for structure (-1)
    scanned_P[[*kept_objects, count]] = True
    return Scan(keep_V & scanned_P[surface.owner_V], seen_SV, kept_objects)


def add_noise(surface: Surface, rng: np.random.Generator) -> np.ndarray:
    """Vertices with millimetres of sensor noise, float32."""
    along_V1 = rng.normal(0, NOISE_ALONG, (len(surface.vertices_V3), 1))
    across_V3 = rng.normal(0, NOISE_ACROSS, surface.vertices_V3.shape)
    return (surface.vertices_V3 + surface.normals_V3 * along_V1 + across_V3).astype(np.float32)
