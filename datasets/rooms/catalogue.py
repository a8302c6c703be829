"""What rooms are furnished with: every item's label, class, usual size, colours, materials; and class names.

With programmes.py this is the distribution `rooms-v1`: a change is a new version.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from . import furniture as f
from . import small_items as s
from .furniture import Paint, Size
from .shapes import RGB, Model

PALETTE: dict[str, RGB] = {
    "white": (234, 234, 230),
    "black": (40, 40, 44),
    "gray": (135, 137, 140),
    "brown": (134, 90, 52),
    "dark brown": (78, 50, 32),
    "beige": (214, 194, 158),
    "red": (190, 42, 40),
    "blue": (42, 82, 172),
    "light blue": (140, 186, 224),
    "green": (58, 132, 66),
    "yellow": (228, 196, 58),
    "orange": (226, 126, 40),
    "purple": (116, 62, 146),
    "pink": (226, 142, 168),
}
WOODS = ("brown", "dark brown", "beige", "white", "black", "gray")
CLOTHS = (
    "gray",
    "blue",
    "red",
    "green",
    "beige",
    "black",
    "brown",
    "purple",
    "orange",
    "light blue",
    "yellow",
    "pink",
)
BRIGHT = (
    "red",
    "blue",
    "green",
    "yellow",
    "orange",
    "purple",
    "pink",
    "white",
    "black",
    "light blue",
    "gray",
    "beige",
)
PALE = ("white", "beige", "light blue", "gray", "pink")

Builder = Callable[[Size, Paint, np.random.Generator], Model]


@dataclass(frozen=True)
class Item:
    """One kind of object. `size` is (depth, width, height) in metres; `words` say that it came out small or big."""

    label: str
    nyu40: int
    build: tuple[Builder, ...]
    size: Size
    colors: tuple[str, ...]
    materials: tuple[str, ...] = ("",)
    words: tuple[str, str] = ("small", "large")
    clear: float = 0.0  # metres kept free in front of it
    bottom: tuple[float, float] = (0.0, 0.0)  # hanging things: range of the height of their underside
    has_front: bool = True


def _item(
    label: str, nyu40: int, build: Builder | tuple[Builder, ...], size: Size, colors: tuple[str, ...], **more
) -> Item:
    return Item(label, nyu40, build if isinstance(build, tuple) else (build,), size, colors, **more)


_WOOD = ("wooden",)
_ITEMS = (
    _item(
        "chair",
        5,
        f.chair,
        (0.48, 0.46, 0.9),
        (*WOODS, "red", "blue", "green"),
        materials=("wooden", "plastic", "wooden"),
    ),
    _item(
        "office chair",
        5,
        f.office_chair,
        (0.6, 0.62, 1.0),
        ("black", "gray", "blue", "red", "green", "white"),
        materials=("leather", "fabric"),
    ),
    _item("armchair", 5, f.sofa, (0.82, 0.84, 0.86), CLOTHS, materials=("leather", "fabric")),
    _item(
        "stool",
        40,
        f.stool,
        (0.38, 0.38, 0.55),
        (*WOODS, "red", "blue"),
        materials=("wooden", "metal"),
        has_front=False,
        words=("low", "tall"),
    ),
    _item("table", 7, (f.table, f.round_table), (0.85, 1.2, 0.74), WOODS, materials=_WOOD, has_front=False),
    _item("dining table", 7, (f.table, f.round_table), (0.9, 1.35, 0.75), WOODS, materials=_WOOD, has_front=False),
    _item("coffee table", 7, f.coffee_table, (0.55, 1.0, 0.42), WOODS, materials=("wooden", "glass"), has_front=False),
    _item(
        "end table",
        7,
        (f.table, f.round_table),
        (0.45, 0.45, 0.55),
        WOODS,
        materials=("wooden", "metal"),
        has_front=False,
    ),
    _item("desk", 14, f.desk, (0.68, 1.35, 0.74), WOODS, materials=_WOOD, words=("narrow", "wide"), clear=0.75),
    _item("couch", 6, f.sofa, (0.9, 1.9, 0.82), CLOTHS, materials=("leather", "fabric"), clear=0.5),
    _item("bed", 4, f.bed, (2.05, 1.5, 0.95), CLOTHS, clear=0.4),
    _item(
        "cabinet",
        3,
        f.cabinet,
        (0.45, 0.9, 0.95),
        WOODS,
        materials=("wooden", "metal"),
        words=("low", "tall"),
        clear=0.5,
    ),
    _item("wardrobe", 39, f.cabinet, (0.6, 1.2, 1.95), WOODS, materials=_WOOD, clear=0.5),
    _item(
        "file cabinet",
        3,
        f.drawers,
        (0.55, 0.45, 1.0),
        ("gray", "black", "beige", "white", "brown"),
        materials=("metal",),
        words=("low", "tall"),
        clear=0.5,
    ),
    _item("kitchen cabinet", 3, f.cabinet, (0.58, 0.8, 1.3), WOODS, materials=_WOOD, words=("low", "tall"), clear=0.5),
    _item(
        "wall cabinet",
        3,
        f.cabinet,
        (0.34, 0.75, 0.62),
        WOODS,
        materials=_WOOD,
        words=("narrow", "wide"),
        bottom=(1.42, 1.5),
    ),
    _item(
        "bathroom vanity",
        3,
        f.cabinet,
        (0.5, 0.85, 0.8),
        ("white", "brown", "gray", "dark brown"),
        materials=_WOOD,
        words=("narrow", "wide"),
        clear=0.5,
    ),
    _item("dresser", 17, f.drawers, (0.48, 1.15, 0.85), WOODS, materials=_WOOD, words=("low", "tall"), clear=0.5),
    _item("nightstand", 32, f.drawers, (0.42, 0.46, 0.55), WOODS, materials=_WOOD),
    _item("bookshelf", 10, f.bookshelf, (0.32, 0.9, 1.6), WOODS, materials=_WOOD, words=("low", "tall"), clear=0.5),
    _item(
        "kitchen counter",
        12,
        f.counter,
        (0.62, 1.5, 0.9),
        ("gray", "black", "white", "beige", "brown"),
        materials=("stone", "wooden"),
        words=("narrow", "wide"),
        clear=0.6,
    ),
    _item(
        "refrigerator",
        24,
        f.refrigerator,
        (0.7, 0.7, 1.7),
        ("white", "gray", "black", "red"),
        materials=("metal",),
        words=("low", "tall"),
        clear=0.6,
    ),
    _item("stove", 38, f.stove, (0.6, 0.6, 0.9), ("white", "gray", "black"), materials=("metal",), clear=0.6),
    _item(
        "toilet", 33, f.toilet, (0.68, 0.42, 0.78), ("white", "beige", "light blue"), materials=("ceramic",), clear=0.5
    ),
    _item("sink", 34, f.pedestal_sink, (0.46, 0.56, 1.0), PALE, materials=("ceramic",), clear=0.5),
    _item(
        "counter sink",
        34,
        f.counter_sink,
        (0.42, 0.5, 0.3),
        ("white", "gray", "beige"),
        materials=("ceramic", "metal"),
    ),
    _item("bathtub", 36, f.bathtub, (0.75, 1.6, 0.55), PALE, materials=("ceramic",), clear=0.45),
    _item("ottoman", 39, f.ottoman, (0.5, 0.55, 0.42), CLOTHS, materials=("leather", "fabric"), has_front=False),
    _item("bench", 39, f.bench, (0.38, 1.1, 0.45), WOODS, materials=_WOOD, has_front=False),
    _item("trash can", 39, s.trash_can, (0.3, 0.3, 0.38), BRIGHT, materials=("plastic", "metal"), has_front=False),
    _item("plant", 40, s.plant, (0.45, 0.45, 0.95), ("green",), has_front=False, words=("small", "tall")),
    _item("potted plant", 40, s.plant, (0.24, 0.24, 0.36), ("green",), has_front=False),
    _item("floor lamp", 35, s.floor_lamp, (0.38, 0.38, 1.55), BRIGHT, has_front=False, words=("low", "tall")),
    _item("suitcase", 40, s.suitcase, (0.26, 0.42, 0.62), BRIGHT, materials=("plastic", "fabric")),
    _item("backpack", 40, s.suitcase, (0.22, 0.34, 0.48), BRIGHT, materials=("fabric",)),
    _item(
        "door",
        8,
        s.door,
        (0.07, 0.95, 2.05),
        (*WOODS, "red", "green", "blue"),
        materials=_WOOD,
        words=("narrow", "wide"),
        clear=0.85,
    ),
    _item(
        "window",
        9,
        s.window,
        (0.06, 1.2, 1.15),
        ("white", "brown", "black", "gray"),
        words=("small", "large"),
        bottom=(0.9, 1.05),
    ),
    _item("picture", 11, s.picture, (0.035, 0.6, 0.5), BRIGHT, bottom=(1.35, 1.6)),
    _item("mirror", 19, s.mirror, (0.04, 0.6, 0.75), ("white", "black", "brown", "gray"), bottom=(1.15, 1.3)),
    _item("whiteboard", 30, s.panel, (0.04, 1.4, 0.9), ("white",), bottom=(1.1, 1.25), words=("small", "large")),
    _item(
        "curtain",
        16,
        s.curtain,
        (0.12, 0.5, 2.1),
        CLOTHS,
        materials=("fabric",),
        words=("narrow", "wide"),
        bottom=(0.12, 0.2),
    ),
    _item(
        "shower curtain",
        28,
        s.curtain,
        (0.1, 0.8, 1.75),
        BRIGHT,
        materials=("plastic", "fabric"),
        words=("narrow", "wide"),
        bottom=(0.22, 0.3),
    ),
    _item("towel", 27, s.towel, (0.05, 0.42, 0.6), BRIGHT, materials=("fabric",), bottom=(0.95, 1.2)),
    _item(
        "radiator",
        39,
        s.radiator,
        (0.12, 0.8, 0.55),
        ("white", "gray", "beige"),
        materials=("metal",),
        words=("narrow", "wide"),
        bottom=(0.1, 0.15),
    ),
    _item("monitor", 40, s.television, (0.2, 0.54, 0.42), ("black", "gray", "white"), materials=("plastic",)),
    _item("tv", 25, s.television, (0.24, 1.0, 0.65), ("black", "gray"), materials=("plastic",)),
    _item(
        "laptop",
        40,
        s.laptop,
        (0.26, 0.36, 0.25),
        ("gray", "black", "white", "red", "blue"),
        materials=("metal", "plastic"),
    ),
    _item("keyboard", 40, s.keyboard, (0.16, 0.44, 0.03), ("black", "white", "gray"), materials=("plastic",)),
    _item("printer", 40, s.microwave, (0.38, 0.42, 0.28), ("white", "gray", "black"), materials=("plastic",)),
    _item("lamp", 35, s.table_lamp, (0.28, 0.28, 0.45), BRIGHT, has_front=False, words=("small", "tall")),
    _item("pillow", 18, s.pillow, (0.34, 0.5, 0.15), BRIGHT, materials=("fabric",), has_front=False),
    _item("book", 23, s.book, (0.19, 0.26, 0.05), BRIGHT, has_front=False, words=("thin", "thick")),
    _item(
        "box",
        29,
        s.carton,
        (0.32, 0.38, 0.28),
        ("brown", "white", "beige", "blue", "green", "red"),
        materials=("cardboard",),
        has_front=False,
    ),
    _item("vase", 40, s.vessel, (0.16, 0.16, 0.3), BRIGHT, materials=("ceramic", "glass"), has_front=False),
    _item("cup", 40, s.vessel, (0.1, 0.1, 0.12), BRIGHT, materials=("ceramic",), has_front=False),
    _item("bottle", 40, s.vessel, (0.1, 0.1, 0.27), BRIGHT, materials=("plastic", "glass"), has_front=False),
    _item("microwave", 40, s.microwave, (0.36, 0.5, 0.3), ("white", "black", "gray", "red"), materials=("metal",)),
)
CATALOGUE: dict[str, Item] = {item.label: item for item in _ITEMS}

# An annotator writes the plain name of these; the catalogue needs two entries because they are built differently.
RAW_LABELS = {"counter sink": "sink", "wall cabinet": "kitchen cabinet", "potted plant": "plant", "floor lamp": "lamp"}


NYU40_NAMES = {
    1: "wall",
    2: "floor",
    3: "cabinet",
    4: "bed",
    5: "chair",
    6: "sofa",
    7: "table",
    8: "door",
    9: "window",
    10: "bookshelf",
    11: "picture",
    12: "counter",
    14: "desk",
    16: "curtain",
    17: "dresser",
    18: "pillow",
    19: "mirror",
    23: "books",
    24: "refridgerator",
    25: "television",
    27: "towel",
    28: "shower curtain",
    29: "box",
    30: "whiteboard",
    32: "night stand",
    33: "toilet",
    34: "sink",
    35: "lamp",
    36: "bathtub",
    38: "otherstructure",
    39: "otherfurniture",
    40: "otherprop",
}


def raw_label(item: Item) -> str:
    """The label an annotator writes for an item."""
    return RAW_LABELS.get(item.label, item.label)
