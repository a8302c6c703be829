"""Shapes of things that hang on walls, stand on furniture or stand about; conventions as in furniture.py.

Wall things have their back at x = -depth / 2 (the wall) and their front towards +x.
"""

import numpy as np

from .furniture import BLACK, METAL, WHITE, Paint, Size
from .shapes import RGB, Model, Part, box, ellipsoid, frustum

GLASS: RGB = (176, 208, 232)
SCREEN: RGB = (30, 44, 66)


def _frame(dx: float, dy: float, dz: float, edge: float, rgb: RGB) -> list[Part]:
    """Four bars around a wall panel."""
    return [
        box(0, 0, 0, dx, dy, edge, rgb, 0.02),
        box(0, 0, dz - edge, dx, dy, edge, rgb, 0.02),
        box(0, dy / 2 - edge / 2, edge, dx, edge, dz - 2 * edge, rgb, 0.02),
        box(0, -dy / 2 + edge / 2, edge, dx, edge, dz - 2 * edge, rgb, 0.02),
    ]


def door(size: Size, paint: Paint, rng: np.random.Generator) -> Model:
    """A closed leaf in a frame, two fields, a handle."""
    dx, dy, dz = size
    edge = 0.07
    parts = [
        box(0, dy / 2 - edge / 2, 0, dx, edge, dz, paint.second),
        box(0, -dy / 2 + edge / 2, 0, dx, edge, dz, paint.second),
        box(0, 0, dz - edge, dx, dy - 2 * edge, edge, paint.second),
        box(-0.01, 0, 0, dx - 0.02, dy - 2 * edge, dz - edge, paint.main),
    ]
    wide = dy - 2 * edge - 0.2
    for z, height in ((0.15, dz * 0.36), (dz * 0.5, dz * 0.38)):
        parts.append(box(dx / 2 - 0.015, 0, z, 0.01, wide, height, paint.shade(0.85)))
    side = 1 if rng.random() < 0.5 else -1
    parts.append(box(dx / 2, side * (dy / 2 - edge - 0.06), 1.0, 0.05, 0.1, 0.03, METAL))
    return Model(parts, [])


def window(size: Size, paint: Paint, rng: np.random.Generator) -> Model:
    """Panes in a frame with bars."""
    dx, dy, dz = size
    parts = [*_frame(dx, dy, dz, 0.06, paint.main), box(-dx / 4, 0, 0.06, dx / 2, dy - 0.12, dz - 0.12, GLASS, 0.03)]
    parts.append(box(0, 0, 0.06, dx * 0.9, 0.05, dz - 0.12, paint.main))
    if rng.random() < 0.5:
        parts.append(box(0, 0, dz * rng.uniform(0.45, 0.6), dx * 0.8, dy - 0.12, 0.05, paint.main))
    return Model(parts, [])


def picture(size: Size, paint: Paint, rng: np.random.Generator) -> Model:
    """A canvas mostly of the picture's colour, with a few fields of other colours, in a frame."""
    dx, dy, dz = size
    parts = [*_frame(dx, dy, dz, 0.03, paint.second), box(-dx / 4, 0, 0.03, dx / 2, dy - 0.06, dz - 0.06, paint.main)]
    for _ in range(int(rng.integers(1, 4))):
        high, wide = float(rng.uniform(0.12, 0.3) * dz), float(rng.uniform(0.12, 0.3) * dy)
        y = float(rng.uniform(-0.5, 0.5) * (dy - 0.1 - wide))
        z = float(0.05 + rng.uniform(0, 1) * (dz - 0.1 - high))
        parts.append(box(dx * 0.05, y, z, dx * 0.15, wide, high, paint.shade(rng.uniform(0.55, 1.5))))
    return Model(parts, [])


def mirror(size: Size, paint: Paint, rng: np.random.Generator) -> Model:
    """A light, bluish pane in a frame."""
    dx, dy, dz = size
    edge = rng.uniform(0.03, 0.05)
    return Model(
        [
            *_frame(dx, dy, dz, edge, paint.main),
            box(-dx / 4, 0, edge, dx / 2, dy - 2 * edge, dz - 2 * edge, (190, 205, 212), 0.02),
        ],
        [],
    )


def panel(size: Size, paint: Paint, rng: np.random.Generator) -> Model:
    """A flat board in a thin frame: whiteboards."""
    dx, dy, dz = size
    tray = box(dx / 2 + 0.02, 0, 0, 0.04, dy * rng.uniform(0.4, 0.7), 0.02, METAL)
    return Model(
        [
            *_frame(dx, dy, dz, 0.02, METAL),
            box(-dx / 4, 0, 0.02, dx / 2, dy - 0.04, dz - 0.04, paint.main, 0.01),
            tray,
        ],
        [],
    )


def television(size: Size, paint: Paint, rng: np.random.Generator) -> Model:
    """A dark screen in a case of the television's colour; stands on a foot."""
    dx, dy, dz = size
    foot = rng.uniform(0.05, 0.08)
    parts = [box(0, 0, 0, dx, dy * 0.4, 0.02, paint.main), box(0, 0, 0.02, dx * 0.25, dy * 0.12, foot, paint.main)]
    parts += [
        box(0, 0, foot, dx * 0.4, dy, dz - foot, paint.main),
        box(dx * 0.21, 0, foot + 0.02, 0.01, dy - 0.05, dz - foot - 0.04, SCREEN, 0.02),
    ]
    return Model(parts, [])


def laptop(size: Size, paint: Paint, rng: np.random.Generator) -> Model:
    """Keyboard half and an upright screen."""
    dx, dy, dz = size
    lid = rng.uniform(0.015, 0.025)
    parts = [box(0, 0, 0, dx, dy, 0.02, paint.main), box(0.03, 0, 0.02, dx * 0.5, dy * 0.85, 0.006, BLACK)]
    parts += [
        box(-dx / 2 + lid / 2, 0, 0.02, lid, dy, dz - 0.02, paint.main),
        box(-dx / 2 + lid + 0.003, 0, 0.04, 0.006, dy - 0.04, dz - 0.06, SCREEN),
    ]
    return Model(parts, [])


def curtain(size: Size, paint: Paint, rng: np.random.Generator) -> Model:
    """Cloth in folds: strips that stand forward and back in turn, below a rod."""
    dx, dy, dz = size
    folds = max(4, round(dy / rng.uniform(0.07, 0.1)))
    wide = dy / folds
    parts = [box(0, 0, dz - 0.03, 0.03, dy, 0.03, METAL)]
    for k in range(folds):
        x, light = (dx * 0.22, 1.05) if k % 2 else (-dx * 0.22, 0.9)
        parts.append(box(x, -dy / 2 + (k + 0.5) * wide, 0, dx * 0.5, wide, dz - 0.03, paint.shade(light)))
    return Model(parts, [])


def towel(size: Size, paint: Paint, rng: np.random.Generator) -> Model:
    """Cloth that hangs over a bar."""
    dx, dy, dz = size
    drop = dz * rng.uniform(0.85, 1.0) - 0.02
    return Model(
        [
            box(0, 0, dz - 0.02, 0.02, dy, 0.02, METAL),
            box(0, 0, dz - 0.02 - drop, dx, dy * 0.85, drop, paint.main, 0.12),
        ],
        [],
    )


def radiator(size: Size, paint: Paint, rng: np.random.Generator) -> Model:
    """A row of ribs between two bars."""
    dx, dy, dz = size
    ribs = max(4, round(dy / rng.uniform(0.08, 0.11)))
    parts = [box(0, 0, z, dx * 0.5, dy, 0.05, paint.main) for z in (0.03, dz - 0.08)]
    parts += [
        box(0, -dy / 2 + (k + 0.5) * dy / ribs, 0, dx, dy / ribs * 0.6, dz, paint.shade(0.97)) for k in range(ribs)
    ]
    return Model(parts, [])


def table_lamp(size: Size, paint: Paint, rng: np.random.Generator) -> Model:
    """Foot, stem and a shade in the lamp's colour."""
    dx, dy, dz = size
    shade = rng.uniform(0.4, 0.5) * dz
    parts = [
        frustum(0, 0, 0, dx * 0.55, dy * 0.55, 0.03, paint.second),
        frustum(0, 0, 0.03, 0.035, 0.035, dz - shade - 0.03, paint.second),
    ]
    return Model([*parts, frustum(0, 0, dz - shade, dx, dy, shade, paint.main, 0.7)], [])


def pillow(size: Size, paint: Paint, rng: np.random.Generator) -> Model:
    """A flat cushion, thicker in the middle."""
    dx, dy, dz = size
    core = rng.uniform(0.45, 0.6)
    return Model(
        [
            box(0, 0, dz * 0.2, dx * 0.94, dy * 0.94, dz * core * 0.8, paint.main),
            ellipsoid(0, 0, 0, dx, dy, dz, paint.shade(1.05)),
        ],
        [],
    )


def book(size: Size, paint: Paint, rng: np.random.Generator) -> Model:
    """Two covers around pale pages."""
    dx, dy, dz = size
    page = (226, 220, 200)
    spine = rng.uniform(0.01, 0.02)
    parts = [box(0, 0, z, dx, dy, 0.008, paint.main) for z in (0.0, dz - 0.008)]
    return Model(
        [
            *parts,
            box(0, 0, 0.008, dx - 0.02, dy - 0.02, dz - 0.016, page),
            box(-dx / 2 + spine / 2, 0, 0.008, spine, dy, dz - 0.016, paint.main),
        ],
        [],
    )


def carton(size: Size, paint: Paint, rng: np.random.Generator) -> Model:
    """A box with a strip of tape across its top."""
    dx, dy, dz = size
    return Model(
        [
            box(0, 0, 0, dx, dy, dz - 0.004, paint.main),
            box(0, 0, dz - 0.004, rng.uniform(0.04, 0.07), dy, 0.004, paint.shade(0.75)),
        ],
        [],
    )


def keyboard(size: Size, paint: Paint, rng: np.random.Generator) -> Model:
    """A flat slab with rows of keys."""
    dx, dy, dz = size
    rows = int(rng.integers(4, 6))
    keys = [
        box(-dx / 2 + (k + 0.5) * dx / rows, 0, dz * 0.6, dx / rows * 0.6, dy * 0.94, dz * 0.4, paint.shade(0.7))
        for k in range(rows)
    ]
    return Model([box(0, 0, 0, dx, dy, dz * 0.6, paint.main), *keys], [])


def vessel(size: Size, paint: Paint, rng: np.random.Generator) -> Model:
    """Cups, bottles and vases: a body with a neck, a collar or none."""
    dx, dy, dz = size
    neck = rng.uniform(0.2, 0.35) * dz if dz > 0.16 else 0.0
    parts = [frustum(0, 0, 0, dx, dy, dz - neck, paint.main, 0.9 if neck else 1.1)]
    if neck:
        parts.append(frustum(0, 0, dz - neck, dx * 0.5, dy * 0.5, neck, paint.shade(0.85), 1.1))
    return Model(parts, [])


def microwave(size: Size, paint: Paint, rng: np.random.Generator) -> Model:
    """A case with a dark door and a strip of buttons; also printers."""
    dx, dy, dz = size
    wide = rng.uniform(0.65, 0.75) * dy
    parts = [
        box(-0.01, 0, 0, dx - 0.02, dy, dz, paint.main),
        box(dx / 2 - 0.01, (dy - wide) / 2 - 0.02, 0.03, 0.02, wide, dz - 0.06, BLACK, 0.02),
    ]
    parts += [
        box(dx / 2 - 0.01, -dy / 2 + (dy - wide) / 2 - 0.02, dz * z, 0.02, 0.05, 0.03, WHITE)
        for z in (0.25, 0.5, 0.75)
    ]
    return Model(parts, [])


def trash_can(size: Size, paint: Paint, rng: np.random.Generator) -> Model:
    """A bin that widens upwards, or a square one."""
    dx, dy, dz = size
    if rng.random() < 0.3:
        return Model([box(0, 0, 0, dx, dy, dz - 0.03, paint.main), box(0, 0, dz - 0.03, dx, dy, 0.03, BLACK)], [])
    return Model([frustum(0, 0, 0, dx, dx, dz, paint.main, 1.3)], [])


def plant(size: Size, paint: Paint, rng: np.random.Generator) -> Model:
    """Foliage in a pot that has the second colour."""
    dx, dy, dz = size
    pot = 0.3 * dz
    parts = [
        frustum(0, 0, 0, dx * 0.6, dy * 0.6, pot, paint.second, 1.25),
        frustum(0, 0, pot, 0.05, 0.05, dz * 0.2, (90, 70, 45)),
    ]
    for _ in range(3):
        x, y = rng.uniform(-0.12, 0.12, 2) * dx
        parts.append(
            ellipsoid(
                float(x),
                float(y),
                pot + dz * rng.uniform(0.02, 0.2),
                dx * 0.7,
                dy * 0.7,
                dz * 0.5,
                paint.shade(rng.uniform(0.8, 1.15)),
            )
        )
    return Model(parts, [])


def floor_lamp(size: Size, paint: Paint, rng: np.random.Generator) -> Model:
    """Foot, pole, shade in the lamp's colour."""
    dx, dy, dz = size
    shade = rng.uniform(0.16, 0.22) * dz
    return Model(
        [
            frustum(0, 0, 0, dx * 0.7, dy * 0.7, 0.03, BLACK),
            frustum(0, 0, 0.03, 0.035, 0.035, dz - shade - 0.03, METAL),
            frustum(0, 0, dz - shade, dx, dy, shade, paint.main, 0.65),
        ],
        [],
    )


def suitcase(size: Size, paint: Paint, rng: np.random.Generator) -> Model:
    """An upright case with wheels and a handle; also backpacks and bags."""
    dx, dy, dz = size
    grip = rng.uniform(0.06, 0.1)
    parts = [box(0, 0, 0.03, dx, dy, dz - grip - 0.03, paint.main), box(0, 0, dz - 0.02, 0.03, dy * 0.5, 0.02, BLACK)]
    parts += [box(0, side * dy * 0.23, dz - grip, 0.02, 0.02, grip - 0.02, BLACK) for side in (-1, 1)]
    parts += [box(0, side * dy * 0.4, 0, dx * 0.8, 0.04, 0.03, BLACK) for side in (-1, 1)]
    return Model(parts, [])
