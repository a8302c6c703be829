"""Shapes of furniture that stands on the floor: each function turns a size and paints into parts and tops.

Local frame: metres, x to the front, y to the left, z up, origin on the floor below the middle. A size is
(depth along x, width along y, height).
"""

from dataclasses import dataclass

import numpy as np

from .shapes import RGB, Model, Part, Top, box, frustum

METAL: RGB = (150, 152, 158)
BLACK: RGB = (38, 38, 42)
WHITE: RGB = (232, 232, 228)
BOOK_COLORS: tuple[RGB, ...] = (
    (170, 50, 45),
    (50, 85, 150),
    (60, 120, 70),
    (205, 175, 75),
    (90, 60, 110),
    (220, 215, 200),
    (60, 60, 65),
)


@dataclass(frozen=True)
class Paint:
    """Colours of one object: what its colour word names, and the colour of its lesser parts."""

    main: RGB
    second: RGB

    def shade(self, factor: float) -> RGB:
        """The main colour, darker (below 1) or lighter."""
        red, green, blue = (int(min(255, channel * factor)) for channel in self.main)
        return red, green, blue


Size = tuple[float, float, float]


def _legs(dx: float, dy: float, height: float, thick: float, rgb: RGB) -> list[Part]:
    x, y = dx / 2 - thick / 2, dy / 2 - thick / 2
    return [box(sx * x, sy * y, 0, thick, thick, height, rgb) for sx in (-1, 1) for sy in (-1, 1)]


def chair(size: Size, paint: Paint, rng: np.random.Generator) -> Model:
    """Seat, back, four legs."""
    dx, dy, dz = size
    seat = 0.5 * dz
    parts = _legs(dx, dy, seat - 0.05, 0.045, paint.second)
    parts.append(box(0, 0, seat - 0.05, dx, dy, 0.05, paint.main))
    if rng.random() < 0.5:
        parts.append(box(-dx / 2 + 0.02, 0, seat, 0.04, dy, dz - seat, paint.main))
    else:
        parts += [
            box(-dx / 2 + 0.02, side * (dy / 2 - 0.02), seat, 0.04, 0.04, dz - seat, paint.main) for side in (-1, 1)
        ]
        gap = (dz - seat) / 3
        parts += [
            box(-dx / 2 + 0.02, 0, seat + gap * (k + 0.5), 0.03, dy - 0.08, gap * 0.6, paint.main) for k in (1, 2)
        ]
    return Model(parts, [])


def office_chair(size: Size, paint: Paint, rng: np.random.Generator) -> Model:
    """Padded seat and back on a pole with a star foot, often with armrests."""
    dx, dy, dz = size
    seat = 0.46 * dz
    parts = [
        box(0, 0, 0, dx * 0.9, 0.06, 0.06, BLACK),
        box(0, 0, 0, 0.06, dy * 0.9, 0.06, BLACK),
        frustum(0, 0, 0.06, 0.06, 0.06, seat - 0.12, METAL),
        box(0.02, 0, seat - 0.06, dx - 0.08, dy - 0.12, 0.09, paint.main),
        box(-dx / 2 + 0.04, 0, seat + 0.08, 0.08, dy - 0.14, dz - seat - 0.08, paint.main),
    ]
    if rng.random() < 0.7:
        for side in (-1, 1):
            parts.append(box(0, side * (dy / 2 - 0.03), seat + 0.18, dx * 0.55, 0.05, 0.04, BLACK))
            parts.append(box(0, side * (dy / 2 - 0.03), seat - 0.03, 0.04, 0.03, 0.21, BLACK))
    return Model(parts, [])


def stool(size: Size, paint: Paint, rng: np.random.Generator) -> Model:
    """Round or square seat on four legs."""
    dx, dy, dz = size
    parts = _legs(dx * 0.75, dy * 0.75, dz - 0.05, 0.035, paint.second)
    top = (
        frustum(0, 0, dz - 0.05, dx, dy, 0.05, paint.main)
        if rng.random() < 0.6
        else box(0, 0, dz - 0.05, dx, dy, 0.05, paint.main)
    )
    return Model([*parts, top], [])


def sofa(size: Size, paint: Paint, rng: np.random.Generator) -> Model:
    """Base, back, two arms, seat cushions; also armchairs (narrow)."""
    dx, dy, dz = size
    arm, seat = min(0.18, dy * 0.18), 0.42 * dz + 0.05
    inner = dy - 2 * arm
    cushions = max(1, round(inner / 0.7))
    width = inner / cushions
    parts = [
        box(0, 0, 0.06, dx, dy, seat - 0.18, paint.shade(0.85)),
        box(-dx / 2 + 0.1, 0, seat - 0.12, 0.2, dy, dz - seat + 0.12, paint.main),
    ]
    parts += [box(0.1, side * (dy - arm) / 2, seat - 0.12, dx - 0.2, arm, 0.3, paint.shade(0.93)) for side in (-1, 1)]
    for k in range(cushions):
        y = -inner / 2 + (k + 0.5) * width
        parts.append(box(0.1, y, seat - 0.12, dx - 0.2, width - 0.02, 0.12, paint.shade(1.06)))
    parts += [
        box(sx * (dx / 2 - 0.06), sy * (dy / 2 - 0.06), 0, 0.05, 0.05, 0.06, BLACK) for sx in (-1, 1) for sy in (-1, 1)
    ]
    edge = rng.uniform(0.18, 0.3)
    return Model(parts, [Top((-dx / 2 + 0.22, -dx / 2 + 0.24 + edge), (-inner / 2, inner / 2), seat)])


def bed(size: Size, paint: Paint, rng: np.random.Generator) -> Model:
    """Frame, mattress, headboard, a blanket in the bed's colour; pillows are objects of their own."""
    dx, dy, dz = size
    lying = 0.5 * dz
    cover = rng.uniform(0.55, 0.7)
    parts = [
        box(0, 0, 0.06, dx, dy, lying * 0.45, paint.second),
        box(-dx / 2 + 0.03, 0, 0.06, 0.06, dy, dz - 0.06, paint.second),
        box(0.03, 0, lying * 0.45 + 0.06, dx - 0.1, dy - 0.06, lying * 0.55 - 0.1, WHITE),
        box(dx / 2 - dx * cover / 2, 0, lying - 0.05, dx * cover, dy, 0.05, paint.main, 0.1),
        box(
            dx / 2 - dx * cover / 2, dy / 2 - 0.01, lying * 0.5, dx * cover, 0.02, lying * 0.5 - 0.05, paint.main, 0.1
        ),
        box(
            dx / 2 - dx * cover / 2, -dy / 2 + 0.01, lying * 0.5, dx * cover, 0.02, lying * 0.5 - 0.05, paint.main, 0.1
        ),
    ]
    parts += [
        box(sx * (dx / 2 - 0.05), sy * (dy / 2 - 0.05), 0, 0.07, 0.07, 0.06, BLACK) for sx in (-1, 1) for sy in (-1, 1)
    ]
    head = Top((-dx / 2 + 0.07, dx / 2 - dx * cover - 0.01), (-dy / 2 + 0.04, dy / 2 - 0.04), lying - 0.04)
    foot = Top((dx / 2 - dx * cover + 0.05, dx / 2 - 0.05), (-dy / 2 + 0.08, dy / 2 - 0.08), lying)
    return Model(parts, [head, foot])


def table(size: Size, paint: Paint, rng: np.random.Generator) -> Model:
    """Rectangular top on four legs."""
    dx, dy, dz = size
    thick = rng.uniform(0.035, 0.06)
    parts = _legs(dx - 0.04, dy - 0.04, dz - thick, 0.06, paint.second)
    parts.append(box(0, 0, dz - thick, dx, dy, thick, paint.main))
    return Model(parts, [Top((-dx / 2, dx / 2), (-dy / 2, dy / 2), dz)])


def round_table(size: Size, paint: Paint, rng: np.random.Generator) -> Model:
    """Round top on a column with a round foot."""
    _, dy, dz = size
    foot = rng.uniform(0.45, 0.6) * dy
    parts = [
        frustum(0, 0, 0, foot, foot, 0.04, paint.second, 0.8),
        frustum(0, 0, 0.04, 0.1, 0.1, dz - 0.08, paint.second),
        frustum(0, 0, dz - 0.04, dy, dy, 0.04, paint.main),
    ]
    reach = dy * 0.34
    return Model(parts, [Top((-reach, reach), (-reach, reach), dz)])


def coffee_table(size: Size, paint: Paint, rng: np.random.Generator) -> Model:
    """A low table, often with a lower shelf."""
    model = table(size, paint, rng)
    dx, dy, _ = size
    if rng.random() < 0.5:
        model.parts.append(box(0, 0, 0.1, dx - 0.14, dy - 0.14, 0.03, paint.shade(0.9)))
    return model


def desk(size: Size, paint: Paint, rng: np.random.Generator) -> Model:
    """Top, side panel, modesty panel at the back and a block of drawers on one side."""
    dx, dy, dz = size
    side = 1 if rng.random() < 0.5 else -1
    block = min(0.42, dy * 0.32)
    parts = [
        box(0, 0, dz - 0.04, dx, dy, 0.04, paint.main),
        box(0, -side * (dy / 2 - 0.02), 0, dx - 0.04, 0.04, dz - 0.04, paint.shade(0.9)),
        box(-dx / 2 + 0.05, 0, dz * 0.4, 0.02, dy - 0.1, dz * 0.6 - 0.04, paint.shade(0.85)),
        box(-0.01, side * (dy / 2 - block / 2), 0, dx - 0.06, block, dz - 0.04, paint.shade(0.9)),
    ]
    for k in range(3):
        height = (dz - 0.1) / 3
        y, z = side * (dy / 2 - block / 2), 0.03 + k * height
        parts.append(box(dx / 2 - 0.03, y, z + 0.01, 0.02, block - 0.04, height - 0.02, paint.main))
        parts.append(box(dx / 2 - 0.01, y, z + height / 2, 0.02, 0.1, 0.02, METAL))
    return Model(parts, [Top((-dx / 2, dx / 2), (-dy / 2, dy / 2), dz)])


def _fronts(size: Size, rows: int, columns: int, paint: Paint, handle: RGB) -> list[Part]:
    """Doors or drawers as panels with handles on the front of a body."""
    dx, dy, dz = size
    parts, high, wide = [], (dz - 0.1) / rows, dy / columns
    for row in range(rows):
        for column in range(columns):
            y, z = -dy / 2 + (column + 0.5) * wide, 0.08 + row * high
            parts.append(box(dx / 2 - 0.03, y, z + 0.008, 0.02, wide - 0.02, high - 0.016, paint.shade(1.08)))
            flat = wide > high  # a drawer: the handle lies; a door: it stands beside the middle of the body
            reach = 0.0 if flat else (0.35 * wide if column < columns / 2 else -0.35 * wide)
            parts.append(
                box(dx / 2 - 0.01, y + reach, z + high / 2, 0.02, *((0.12, 0.02) if flat else (0.02, 0.12)), handle)
            )
    return parts


def cabinet(size: Size, paint: Paint, rng: np.random.Generator) -> Model:
    """A closed body with doors; also wardrobes and kitchen cabinets."""
    dx, dy, dz = size
    rows = 1 if dz > 1.2 or rng.random() < 0.7 else 2
    parts = [box(-0.02, 0, 0, dx - 0.04, dy, dz, paint.main)]
    parts += _fronts(size, rows, max(1, round(dy / 0.5)), paint, METAL if rng.random() < 0.6 else BLACK)
    return Model(parts, [Top((-dx / 2, dx / 2 - 0.04), (-dy / 2, dy / 2), dz)])


def drawers(size: Size, paint: Paint, rng: np.random.Generator) -> Model:
    """A body with drawers: dressers, nightstands, file cabinets."""
    dx, dy, dz = size
    parts = [box(-0.02, 0, 0, dx - 0.04, dy, dz, paint.main)]
    parts += _fronts(
        size, max(2, round(dz / 0.24)), 2 if dy > 0.9 else 1, paint, METAL if rng.random() < 0.6 else BLACK
    )
    return Model(parts, [Top((-dx / 2, dx / 2 - 0.04), (-dy / 2, dy / 2), dz)])


def bookshelf(size: Size, paint: Paint, rng: np.random.Generator) -> Model:
    """Sides, back, boards, and rows of books on most boards."""
    dx, dy, dz = size
    boards = max(2, round(dz / 0.38))
    step = (dz - 0.03) / boards
    parts = [
        box(0, -dy / 2 + 0.015, 0, dx, 0.03, dz, paint.main),
        box(0, dy / 2 - 0.015, 0, dx, 0.03, dz, paint.main),
        box(-dx / 2 + 0.01, 0, 0, 0.02, dy - 0.06, dz, paint.shade(0.8)),
    ]
    for k in range(boards + 1):
        parts.append(box(0.01, 0, k * step, dx - 0.02, dy - 0.06, 0.03, paint.main))
    for k in range(boards):
        y, end = -dy / 2 + 0.04, dy / 2 - 0.05 - rng.uniform(0, 0.5) * dy
        while y < end - 0.06:
            width = float(min(rng.uniform(0.06, 0.18), end - y))
            rgb = BOOK_COLORS[int(rng.integers(len(BOOK_COLORS)))]
            deep = dx - rng.uniform(0.08, 0.12)
            parts.append(
                box(
                    -dx / 2 + 0.02 + deep / 2,
                    y + width / 2,
                    k * step + 0.03,
                    deep,
                    width,
                    step * rng.uniform(0.55, 0.8),
                    rgb,
                    0.15,
                )
            )
            y += width
    return Model(parts, [Top((-dx / 2, dx / 2), (-dy / 2, dy / 2), dz)])


def counter(size: Size, paint: Paint, rng: np.random.Generator) -> Model:
    """Kitchen unit with doors and a worktop in the counter's colour that stands over."""
    dx, dy, dz = size
    parts = [box(-0.03, 0, 0.08, dx - 0.06, dy, dz - 0.13, paint.second), box(-0.06, 0, 0, dx - 0.12, dy, 0.08, BLACK)]
    parts += _fronts((dx - 0.01, dy, dz - 0.06), 1, max(1, round(dy / 0.5)), Paint(paint.second, BLACK), METAL)
    parts.append(box(0, 0, dz - 0.05, dx, dy, 0.05, paint.main, rng.uniform(0.05, 0.15)))
    return Model(parts, [Top((-dx / 2, dx / 2), (-dy / 2, dy / 2), dz)])


def refrigerator(size: Size, paint: Paint, rng: np.random.Generator) -> Model:
    """A tall body with two doors above each other and long handles."""
    dx, dy, dz = size
    split = rng.uniform(0.55, 0.68) * dz
    parts = [box(-0.03, 0, 0, dx - 0.06, dy, dz, paint.shade(0.9))]
    for z, height in ((0.03, split - 0.04), (split, dz - split - 0.01)):
        parts.append(box(dx / 2 - 0.045, 0, z, 0.05, dy - 0.01, height, paint.main, 0.02))
        parts.append(box(dx / 2 - 0.01, dy * 0.38, z + height * 0.3, 0.02, 0.03, height * 0.4, METAL))
    return Model(parts, [Top((-dx / 2, dx / 2 - 0.08), (-dy / 2, dy / 2), dz)])


def stove(size: Size, paint: Paint, rng: np.random.Generator) -> Model:
    """Oven door with a window, four plates, a strip of knobs."""
    dx, dy, dz = size
    parts = [
        box(-0.02, 0, 0, dx - 0.04, dy, dz, paint.main),
        box(dx / 2 - 0.03, 0, 0.15, 0.02, dy - 0.1, dz * 0.5, BLACK, 0.02),
    ]
    parts += [box(dx / 2 - 0.01, y * dy, dz - 0.1, 0.02, 0.04, 0.04, METAL) for y in (-0.35, -0.12, 0.12, 0.35)]
    plate = rng.uniform(0.16, 0.2)
    parts += [
        frustum(sx * dx / 4 - 0.02, sy * dy / 4, dz, plate, plate, 0.01, BLACK) for sx in (-1, 1) for sy in (-1, 1)
    ]
    return Model(parts, [])


def toilet(size: Size, paint: Paint, rng: np.random.Generator) -> Model:
    """Bowl, seat, tank with a lid."""
    dx, dy, dz = size
    seat, tank = 0.52 * dz, rng.uniform(0.18, 0.22)
    bowl = dx - tank
    middle = dx / 2 - bowl / 2
    parts = [
        frustum(middle, 0, 0, bowl, dy * 0.85, seat - 0.03, paint.main, 1.45),
        frustum(middle, 0, seat - 0.03, bowl, dy * 0.9, 0.05, paint.shade(0.92)),
        box(-dx / 2 + tank / 2, 0, seat * 0.75, tank, dy, dz - seat * 0.75 - 0.03, paint.main, 0.02),
        box(-dx / 2 + tank / 2, 0, dz - 0.03, tank, dy, 0.03, paint.shade(0.94), 0.02),
        frustum(-dx / 2 + tank / 2, 0, 0, tank, dy * 0.5, seat * 0.75, paint.main),
    ]
    return Model(parts, [])


def _basin(dx: float, dy: float, z: float, height: float, rim: float, rgb: RGB) -> list[Part]:
    """Four walls and a bottom."""
    return [
        box(0, 0, z, dx, dy, 0.04, rgb, 0.02),
        box(dx / 2 - rim / 2, 0, z, rim, dy, height, rgb, 0.02),
        box(-dx / 2 + rim / 2, 0, z, rim, dy, height, rgb, 0.02),
        box(0, dy / 2 - rim / 2, z, dx - 2 * rim, rim, height, rgb, 0.02),
        box(0, -dy / 2 + rim / 2, z, dx - 2 * rim, rim, height, rgb, 0.02),
    ]


def _tap(x: float, z: float) -> list[Part]:
    return [box(x, 0, z, 0.03, 0.03, 0.15, METAL), box(x + 0.05, 0, z + 0.12, 0.1, 0.03, 0.03, METAL)]


def pedestal_sink(size: Size, paint: Paint, rng: np.random.Generator) -> Model:
    """A basin with a tap on a column."""
    dx, dy, dz = size
    rim = rng.uniform(0.04, 0.06)
    column = frustum(-dx * 0.15, 0, 0, 0.2, 0.2, dz - 0.31, paint.main, 0.8)
    return Model([column, *_basin(dx, dy, dz - 0.31, 0.16, rim, paint.main), *_tap(-dx / 2 + 0.03, dz - 0.15)], [])


def counter_sink(size: Size, paint: Paint, rng: np.random.Generator) -> Model:
    """A basin that stands on a counter, with a tap."""
    dx, dy, dz = size
    rim = rng.uniform(0.02, 0.04)
    return Model([*_basin(dx, dy, 0, dz - 0.15, rim, paint.main), *_tap(-dx / 2 + rim / 2 + 0.01, dz - 0.15)], [])


def bathtub(size: Size, paint: Paint, rng: np.random.Generator) -> Model:
    """A hollow tub with broad rims and a tap."""
    dx, dy, dz = size
    return Model(_basin(dx, dy, 0, dz, rng.uniform(0.07, 0.1), paint.main), [])


def ottoman(size: Size, paint: Paint, rng: np.random.Generator) -> Model:
    """A padded cube or drum on short feet."""
    dx, dy, dz = size
    if rng.random() < 0.4:
        return Model([frustum(0, 0, 0, dx, dx, dz, paint.main)], [])
    return Model(
        [*_legs(dx - 0.06, dy - 0.06, 0.07, 0.05, BLACK), box(0, 0, 0.07, dx, dy, dz - 0.07, paint.main, 0.1)], []
    )


def bench(size: Size, paint: Paint, rng: np.random.Generator) -> Model:
    """A plank on two side panels."""
    dx, dy, dz = size
    thick = rng.uniform(0.04, 0.07)
    sides = [box(0, side * (dy / 2 - 0.06), 0, dx - 0.04, 0.05, dz - thick, paint.second) for side in (-1, 1)]
    return Model(
        [*sides, box(0, 0, dz - thick, dx, dy, thick, paint.main)], [Top((-dx / 2, dx / 2), (-dy / 2, dy / 2), dz)]
    )
