"""Kinds of rooms and what is put into each, in order; with catalogue.py this is the distribution `rooms-v1`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """One line of a programme: between `low` and `high` objects of an item, placed by a rule at an anchor."""

    item: str
    low: int
    high: int
    rule: str  # "wall", "free", "hang", "front", "around", "beside", "flank", "along", "on"
    anchors: tuple[str, ...] = ()
    matching: float = 0.4  # chance that all of them have the same colour and size


@dataclass(frozen=True)
class Programme:
    """A kind of room: its size range in metres (shorter and longer side) and what is put into it, in this order."""

    kind: str
    short: tuple[float, float]
    long: tuple[float, float]
    entries: tuple[Entry, ...]


def _e(item: str, low: int, high: int, rule: str, *anchors: str, matching: float = 0.4) -> Entry:
    return Entry(item, low, high, rule, anchors, matching)


_STORE = ("cabinet", "dresser", "file cabinet", "wardrobe", "bookshelf", "refrigerator")
_SURFACES = ("desk", "table", "dining table", "coffee table", "dresser", "cabinet", "end table")
_OPENINGS = (
    _e("door", 1, 2, "hang"),
    _e("window", 1, 2, "hang"),
    _e("curtain", 2, 4, "flank", "window", matching=0.4),
)

PROGRAMMES: tuple[Programme, ...] = (
    Programme(
        "bedroom",
        (3.3, 4.4),
        (3.9, 5.4),
        (
            *_OPENINGS,
            _e("bed", 1, 2, "wall"),
            _e("nightstand", 1, 2, "beside", "bed"),
            _e("wardrobe", 0, 1, "wall"),
            _e("dresser", 0, 2, "wall"),
            _e("desk", 0, 1, "wall"),
            _e("cabinet", 2, 4, "wall"),
            _e("bookshelf", 0, 2, "wall"),
            _e("chair", 0, 1, "front", "desk"),
            _e("picture", 3, 5, "hang"),
            _e("mirror", 0, 1, "hang"),
            _e("radiator", 0, 1, "hang"),
            _e("armchair", 0, 2, "free"),
            _e("chair", 0, 2, "free"),
            _e("ottoman", 0, 1, "free"),
            _e("floor lamp", 0, 1, "wall"),
            _e("trash can", 0, 1, "wall"),
            _e("suitcase", 0, 2, "wall"),
            _e("pillow", 3, 5, "on", "bed"),
            _e("lamp", 1, 2, "on", "nightstand", "dresser", "desk"),
            _e("monitor", 0, 1, "on", "desk"),
            _e("laptop", 0, 1, "on", "desk", "bed"),
            _e("book", 3, 5, "on", *_SURFACES, "nightstand"),
            _e("box", 1, 4, "on", *_STORE),
            _e("vase", 0, 2, "on", *_SURFACES),
            _e("plant", 0, 1, "wall"),
        ),
    ),
    Programme(
        "living room",
        (3.8, 5.0),
        (4.6, 6.4),
        (
            *_OPENINGS,
            _e("couch", 1, 2, "wall"),
            _e("cabinet", 2, 4, "wall"),
            _e("bookshelf", 0, 2, "wall"),
            _e("coffee table", 1, 1, "front", "couch"),
            _e("end table", 0, 2, "beside", "couch"),
            _e("armchair", 1, 3, "free"),
            _e("dining table", 0, 1, "free"),
            _e("chair", 3, 4, "around", "dining table"),
            _e("picture", 3, 5, "hang"),
            _e("radiator", 0, 1, "hang"),
            _e("ottoman", 0, 2, "free"),
            _e("floor lamp", 0, 2, "wall"),
            _e("plant", 0, 2, "wall"),
            _e("bench", 0, 1, "wall"),
            _e("tv", 0, 1, "on", "cabinet"),
            _e("pillow", 3, 5, "on", "couch"),
            _e("lamp", 0, 2, "on", "end table", "cabinet"),
            _e("book", 3, 5, "on", *_SURFACES),
            _e("cup", 1, 3, "on", *_SURFACES),
            _e("vase", 0, 2, "on", *_SURFACES),
            _e("potted plant", 0, 2, "on", *_SURFACES),
            _e("box", 0, 2, "on", *_STORE),
        ),
    ),
    Programme(
        "office",
        (3.4, 4.8),
        (4.2, 6.2),
        (
            *_OPENINGS,
            _e("desk", 3, 4, "wall", matching=0.4),
            _e("file cabinet", 1, 3, "wall"),
            _e("bookshelf", 1, 2, "wall"),
            _e("cabinet", 0, 2, "wall"),
            _e("office chair", 2, 4, "front", "desk", matching=0.3),
            _e("whiteboard", 0, 1, "hang"),
            _e("picture", 3, 5, "hang"),
            _e("radiator", 0, 1, "hang"),
            _e("table", 0, 1, "free"),
            _e("chair", 1, 4, "around", "table"),
            _e("chair", 0, 1, "free"),
            _e("trash can", 1, 2, "wall"),
            _e("plant", 0, 2, "wall"),
            _e("monitor", 3, 4, "on", "desk"),
            _e("keyboard", 0, 3, "on", "desk"),
            _e("laptop", 0, 2, "on", "desk", "table"),
            _e("lamp", 0, 2, "on", "desk"),
            _e("printer", 0, 1, "on", "table", "file cabinet", "cabinet"),
            _e("book", 3, 5, "on", "desk", "table", "cabinet"),
            _e("box", 1, 4, "on", *_STORE),
            _e("backpack", 0, 2, "wall"),
            _e("cup", 1, 3, "on", "desk", "table"),
        ),
    ),
    Programme(
        "kitchen",
        (3.2, 4.4),
        (3.9, 5.4),
        (
            *_OPENINGS,
            _e("kitchen counter", 1, 3, "wall", matching=0.7),
            _e("refrigerator", 1, 1, "wall"),
            _e("stove", 0, 1, "wall"),
            _e("kitchen cabinet", 1, 3, "wall"),
            _e("wall cabinet", 1, 3, "hang", matching=0.6),
            _e("counter sink", 1, 1, "on", "kitchen counter"),
            _e("dining table", 1, 1, "free"),
            _e("chair", 3, 4, "around", "dining table", matching=0.4),
            _e("stool", 0, 2, "free"),
            _e("picture", 3, 5, "hang"),
            _e("trash can", 0, 2, "wall"),
            _e("microwave", 0, 1, "on", "kitchen counter"),
            _e("bottle", 0, 3, "on", "kitchen counter", "dining table"),
            _e("cup", 1, 4, "on", "kitchen counter", "dining table"),
            _e("vase", 0, 1, "on", "dining table"),
            _e("potted plant", 0, 2, "on", "dining table", "kitchen counter"),
            _e("box", 1, 4, "on", "kitchen cabinet", "refrigerator"),
            _e("towel", 0, 2, "hang"),
        ),
    ),
    Programme(
        "bathroom",
        (2.6, 3.4),
        (3.1, 4.4),
        (
            _e("door", 1, 1, "hang"),
            _e("window", 1, 1, "hang"),
            _e("bathtub", 1, 1, "wall"),
            _e("shower curtain", 1, 1, "along", "bathtub"),
            _e("toilet", 1, 1, "wall"),
            _e("bathroom vanity", 0, 1, "wall"),
            _e("sink", 1, 2, "wall", matching=0.3),
            _e("counter sink", 0, 1, "on", "bathroom vanity"),
            _e("cabinet", 1, 2, "wall"),
            _e("curtain", 0, 2, "flank", "window"),
            _e("mirror", 1, 2, "hang"),
            _e("towel", 3, 4, "hang"),
            _e("picture", 3, 5, "hang"),
            _e("radiator", 0, 1, "hang"),
            _e("stool", 0, 1, "free"),
            _e("trash can", 0, 2, "wall"),
            _e("bottle", 1, 3, "on", "cabinet", "bathroom vanity"),
            _e("cup", 1, 3, "on", "bathroom vanity", "cabinet"),
            _e("potted plant", 0, 1, "on", "cabinet"),
            _e("box", 0, 2, "on", "cabinet"),
        ),
    ),
    Programme(
        "studio",
        (4.4, 5.4),
        (5.4, 7.0),
        (
            *_OPENINGS,
            _e("bed", 1, 1, "wall"),
            _e("nightstand", 0, 2, "beside", "bed"),
            _e("kitchen counter", 1, 2, "wall", matching=0.7),
            _e("refrigerator", 1, 1, "wall"),
            _e("sink", 0, 1, "wall"),
            _e("couch", 0, 1, "wall"),
            _e("desk", 0, 2, "wall"),
            _e("cabinet", 2, 4, "wall"),
            _e("bookshelf", 0, 2, "wall"),
            _e("office chair", 1, 2, "front", "desk"),
            _e("coffee table", 0, 1, "front", "couch"),
            _e("dining table", 1, 1, "free"),
            _e("chair", 3, 4, "around", "dining table"),
            _e("picture", 3, 5, "hang"),
            _e("radiator", 0, 1, "hang"),
            _e("armchair", 0, 2, "free"),
            _e("trash can", 0, 2, "wall"),
            _e("floor lamp", 0, 1, "wall"),
            _e("plant", 0, 1, "wall"),
            _e("counter sink", 0, 1, "on", "kitchen counter"),
            _e("microwave", 0, 1, "on", "kitchen counter"),
            _e("monitor", 0, 2, "on", "desk"),
            _e("laptop", 0, 1, "on", "desk", "dining table"),
            _e("pillow", 3, 5, "on", "bed", "couch"),
            _e("lamp", 0, 2, "on", "nightstand", "desk", "cabinet"),
            _e("book", 3, 5, "on", *_SURFACES),
            _e("cup", 1, 3, "on", "kitchen counter", *_SURFACES),
            _e("box", 1, 4, "on", *_STORE),
        ),
    ),
)
# Bathrooms are small and alike, so they are fewer; studios hold the most classes.
KIND_WEIGHTS = {"bedroom": 0.2, "living room": 0.2, "office": 0.2, "kitchen": 0.16, "bathroom": 0.1, "studio": 0.14}
