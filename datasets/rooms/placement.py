"""Places furniture: every rule of a programme proposes poses, and the first that fits is kept.

World frame: metres, z up, the room's floor rectangle centred on the origin, floor at z = 0, walls axis-aligned.
Every placed object keeps an axis-aligned box; no two boxes may overlap, except that what stands on a piece of
furniture may stand inside that furniture's box (a pillow before a headboard), on a top that is free of its parts.
"""

from dataclasses import dataclass

import numpy as np

from .catalogue import CATALOGUE, PALETTE, Item
from .furniture import Paint
from .programmes import Entry, Programme
from .shapes import RGB, Model

GAP = 0.03  # metres between neighbours, so that millimetres of noise never make boxes overlap
TRIES = 48
JITTER_FREE, JITTER_WALL, JITTER_ON = np.radians(12.0), np.radians(2.5), np.radians(18.0)
SECOND_COLORS = ("dark brown", "black", "gray", "white", "brown")


@dataclass
class Look:
    """What matching objects have in common."""

    size_3: np.ndarray
    size_word: str
    color: str
    material: str


@dataclass
class Placed:
    """One object in its place. `low_3`, `high_3` bound its parts in the world frame."""

    item: Item
    model: Model
    position_3: np.ndarray
    yaw: float
    look: Look
    rgb: RGB
    low_3: np.ndarray
    high_3: np.ndarray
    rule: str
    wall: int = -1  # index into WALLS for what hangs on or stands at a wall
    support: "Placed | None" = None


# Walls by the direction that they face (into the room): heading, and the axis along the wall.
WALLS = (0.0, np.pi / 2, np.pi, -np.pi / 2)


def bounds(model: Model, position_3: np.ndarray, yaw: float) -> tuple[np.ndarray, np.ndarray]:
    """World-frame box around a model's parts at a pose."""
    low_3, high_3 = model.bounds_at(yaw)
    return low_3 + position_3, high_3 + position_3


def _vary(item: Item, rng: np.random.Generator) -> tuple[np.ndarray, str]:
    """A size around the item's usual one, and the word for it where it stands out."""
    size_3 = np.array(item.size) * rng.uniform(0.95, 1.05, 3)
    factor = float(rng.uniform(0.76, 1.26))
    small, large = item.words
    if small in ("low", "thin"):
        size_3[2] *= factor
    elif small == "narrow":
        size_3[1] *= factor
    else:
        size_3 *= factor if item.label not in ("chair", "office chair", "toilet") else 1 + (factor - 1) * 0.5
    return size_3, small if factor < 0.87 else large if factor > 1.15 else ""


def _look(item: Item, rng: np.random.Generator, used: list[str]) -> Look:
    """Size, colour and material of a new object; colours that its like already have are usually avoided."""
    size_3, word = _vary(item, rng)
    fresh = [color for color in item.colors if color not in used]
    choice = fresh if fresh and rng.random() < 0.75 else list(item.colors)
    color = choice[int(rng.integers(len(choice)))]
    material = item.materials[int(rng.integers(len(item.materials)))]
    return Look(size_3, word, color, material)


class Furnisher:
    """Grows one room; placing an object either succeeds or leaves the room as it was."""

    def __init__(self, programme: Programme, rng: np.random.Generator):
        self.rng = rng
        short, long = rng.uniform(*programme.short), rng.uniform(*programme.long)
        width, depth = (short, long) if rng.random() < 0.5 else (long, short)
        self.size_3 = np.array([width, depth, rng.uniform(2.4, 2.9)])
        self.placed: list[Placed] = []
        self.lows_P3 = np.zeros((0, 3))
        self.highs_P3 = np.zeros((0, 3))
        self.shake = 0.0  # how far the object being placed is turned out of square, in [-1, 1]
        self.kept_free: list[tuple[np.ndarray, np.ndarray, bool]] = []  # low, high, whether nothing at all may enter

    def furnish(self, entries: tuple[Entry, ...]) -> None:
        for entry in entries:
            count = int(self.rng.integers(entry.low, entry.high + 1))
            item = CATALOGUE[entry.item]
            matching = self.rng.random() < entry.matching
            look: Look | None = None
            for _ in range(count):
                used = [other.look.color for other in self.placed if other.item.label == item.label]
                if look is None or not matching:
                    look = _look(item, self.rng, used)
                self._place(entry, item, look)

    def _place(self, entry: Entry, item: Item, look: Look) -> None:
        anchors = [other for other in self.placed if other.item.label in entry.anchors]
        if entry.anchors and not anchors:
            return
        model, rgb = self._build(item, look)
        # Drawn once an object, not once a try: the half that stands square does so wherever it ends up.
        self.shake = float(self.rng.uniform(-1, 1)) if self.rng.random() < 0.5 else 0.0
        for _ in range(TRIES):
            anchor = anchors[int(self.rng.integers(len(anchors)))] if anchors else None
            pose = self._propose(entry.rule, item, model, anchor)
            if pose is None:
                continue
            position_3, yaw, wall = pose
            low_3, high_3 = bounds(model, position_3, yaw)
            if not self._fits(low_3, high_3, entry.rule, anchor):
                continue
            zone = self._zone(item, entry.rule, low_3, high_3, yaw)
            if zone is not None and not self._zone_is_free(zone):
                continue
            support = anchor if entry.rule == "on" else None
            self._keep(Placed(item, model, position_3, yaw, look, rgb, low_3, high_3, entry.rule, wall, support), zone)
            return

    def _build(self, item: Item, look: Look) -> tuple[Model, RGB]:
        """The model of an object and the shade of its colour word that it really has."""
        rng = self.rng
        second = PALETTE[SECOND_COLORS[int(rng.integers(len(SECOND_COLORS)))]]
        tint = rng.normal(0, 6) + rng.normal(0, 1.5, 3)  # brightness varies more than hue
        red, green, blue = (
            int(np.clip(channel + shift, 8, 247)) for channel, shift in zip(PALETTE[look.color], tint, strict=True)
        )
        build = item.build[int(rng.integers(len(item.build)))]
        sx, sy, sz = (float(side) for side in look.size_3)
        return build((sx, sy, sz), Paint((red, green, blue), second), rng), (red, green, blue)

    def _keep(self, thing: Placed, zone: tuple[np.ndarray, np.ndarray] | None) -> None:
        self.placed.append(thing)
        self.lows_P3 = np.vstack([self.lows_P3, thing.low_3])
        self.highs_P3 = np.vstack([self.highs_P3, thing.high_3])
        if zone is not None:
            self.kept_free.append((*zone, thing.item.label == "door"))

    # Where a rule would put a model: position, heading, wall index (-1 for none).

    def _propose(
        self, rule: str, item: Item, model: Model, anchor: Placed | None
    ) -> tuple[np.ndarray, float, int] | None:
        if rule in ("wall", "hang"):
            return self._at_wall(rule, item, model, int(self.rng.integers(4)), None)
        if rule == "free":
            yaw = float(self.rng.integers(4)) * np.pi / 2 + self.shake * JITTER_FREE
            low_3, high_3 = bounds(model, np.zeros(3), yaw)
            spare_2 = self.size_3[:2] / 2 - 0.35
            return (
                np.append(
                    self.rng.uniform(-spare_2 - low_3[:2], np.maximum(spare_2 - high_3[:2], -spare_2 - low_3[:2])), 0.0
                ),
                yaw,
                -1,
            )
        assert anchor is not None, rule
        if rule == "on":
            return self._on(item, model, anchor)
        if rule == "flank":
            reach = (anchor.high_3 - anchor.low_3)[:2].max() / 2 + item.size[1] / 2 * 1.3 + GAP
            offset = reach if self.rng.random() < 0.5 else -reach
            along = anchor.position_3[:2] @ self._axis(anchor.wall)
            return self._at_wall("hang", item, model, anchor.wall, float(along + offset))
        return self._beside(rule, model, anchor)

    @staticmethod
    def _axis(wall: int) -> np.ndarray:
        """Unit vector along a wall."""
        return np.array([-np.sin(WALLS[wall]), np.cos(WALLS[wall])])

    def _at_wall(
        self, rule: str, item: Item, model: Model, wall: int, along: float | None
    ) -> tuple[np.ndarray, float, int] | None:
        yaw = WALLS[wall]
        inward_2 = np.array([np.cos(yaw), np.sin(yaw)])
        turn = 0.0 if rule == "hang" else self.shake * JITTER_WALL
        low_3, high_3 = bounds(model, np.zeros(3), turn)
        gap = 0.012 if rule == "hang" else float(self.rng.uniform(0.03, 0.08))
        from_wall = abs(self.size_3[:2] @ inward_2) / 2
        half = abs(self.size_3[:2] @ self._axis(wall)) / 2
        room_along = (-half - low_3[1] + 0.05, half - high_3[1] - 0.05)
        if room_along[0] >= room_along[1]:
            return None
        if along is None:
            along = float(self.rng.uniform(*room_along))
        elif not room_along[0] <= along <= room_along[1]:
            return None
        middle_2 = -inward_2 * (from_wall - gap + low_3[0]) + self._axis(wall) * along
        top = self.size_3[2] - 0.05 - high_3[2]
        z = min(float(self.rng.uniform(*item.bottom)), top) if item.bottom[1] > 0 else 0.0
        return (np.append(middle_2, z), yaw + turn, wall) if z >= 0 else None

    def _beside(self, rule: str, model: Model, anchor: Placed) -> tuple[np.ndarray, float, int]:
        """In front of an anchor, around it, next to it at its wall, or along its front (a shower curtain)."""
        rng = self.rng
        own_low_3, own_high_3 = bounds(model, np.zeros(3), 0.0)
        far_low_3, far_high_3 = bounds(anchor.model, np.zeros(3), 0.0)
        z = 0.0
        if rule == "front":
            turned = anchor.item.label == "desk"
            gap = rng.uniform(0.06, 0.3) if turned else rng.uniform(0.3, 0.5)
            spread = (far_high_3[1] - own_high_3[1]) * 0.7
            x = far_high_3[0] + gap + (own_high_3[0] if turned else -own_low_3[0])
            local_2 = np.array([x, rng.uniform(-max(spread, 0.05), max(spread, 0.05))])
            turn = np.pi + self.shake * JITTER_FREE if turned else 0.0
        elif rule == "around":
            side = int(rng.integers(4))
            reach = far_high_3[side % 2] + rng.uniform(0.05, 0.18) + own_high_3[0]
            slide = rng.uniform(-1, 1) * max(far_high_3[1 - side % 2] - own_high_3[1] - 0.05, 0.02)
            direction = side * np.pi / 2
            out_2, across_2 = (
                np.array([np.cos(direction), np.sin(direction)]),
                np.array([-np.sin(direction), np.cos(direction)]),
            )
            local_2 = out_2 * reach + across_2 * slide
            turn = direction + np.pi + self.shake * JITTER_FREE
        elif rule == "beside":
            side = 1 if rng.random() < 0.5 else -1
            x = far_low_3[0] - own_low_3[0] + rng.uniform(0.0, 0.06)
            local_2 = np.array([x, side * (far_high_3[1] + own_high_3[1] + rng.uniform(0.05, 0.15))])
            turn = 0.0
        else:
            spare = max(far_high_3[1] - own_high_3[1], 0.02)
            local_2, turn = np.array([far_high_3[0] - own_low_3[0] + 0.04, rng.choice([-1.0, 1.0]) * spare]), 0.0
            z = float(rng.uniform(0.18, 0.26))
        c, s = np.cos(anchor.yaw), np.sin(anchor.yaw)
        world_2 = np.array([[c, -s], [s, c]]) @ local_2 + anchor.position_3[:2]
        return np.append(world_2, z), float(anchor.yaw + turn), anchor.wall if rule in ("beside", "along") else -1

    def _on(self, item: Item, model: Model, anchor: Placed) -> tuple[np.ndarray, float, int] | None:
        if not anchor.model.tops:
            return None
        tops = anchor.model.tops
        top = tops[0] if item.label == "pillow" else tops[-1 - int(self.rng.integers(len(tops))) % len(tops)]
        turn = self.shake * JITTER_ON * (0.35 if item.has_front else 1.0)
        if item.label in ("book", "box") and self.rng.random() < 0.5:
            turn += np.pi / 2
        low_3, high_3 = bounds(model, np.zeros(3), turn)
        x = (top.x[0] - low_3[0] + 0.01, top.x[1] - high_3[0] - 0.01)
        y = (top.y[0] - low_3[1] + 0.01, top.y[1] - high_3[1] - 0.01)
        if x[0] > x[1] or y[0] > y[1] or high_3[2] > top.clear:
            return None
        # Screens and lamps stand towards the back of a desk.
        share = (
            self.rng.uniform(0, 0.35)
            if item.label in ("monitor", "tv", "lamp", "counter sink")
            else self.rng.uniform(0, 1)
        )
        local_2 = np.array([x[0] + share * (x[1] - x[0]), self.rng.uniform(*y)])
        c, s = np.cos(anchor.yaw), np.sin(anchor.yaw)
        world_2 = np.array([[c, -s], [s, c]]) @ local_2 + anchor.position_3[:2]
        return np.append(world_2, anchor.position_3[2] + top.z + 0.002), float(anchor.yaw + turn), -1

    # Whether a box may stand there.

    def _fits(self, low_3: np.ndarray, high_3: np.ndarray, rule: str, anchor: Placed | None) -> bool:
        limit_2 = self.size_3[:2] / 2 - 0.008
        if (low_3[:2] < -limit_2).any() or (high_3[:2] > limit_2).any() or high_3[2] > self.size_3[2] - 0.02:
            return False
        meets_P = ((low_3 < self.highs_P3 + GAP) & (high_3 > self.lows_P3 - GAP)).all(1)
        if rule == "on":
            assert anchor is not None
            meets_P &= np.array([other is not anchor for other in self.placed])
        if meets_P.any():
            return False
        if rule == "on":
            return True
        for free_low_3, free_high_3, always in self.kept_free:
            # A chair may stand in the space before its desk, a lamp in no doorway.
            if rule in ("front", "around", "along", "free") and not always and anchor is not None:
                continue
            if ((low_3 < free_high_3) & (high_3 > free_low_3)).all():
                return False
        return True

    def _zone(
        self, item: Item, rule: str, low_3: np.ndarray, high_3: np.ndarray, yaw: float
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Space kept free in front: to walk to furniture, and so that no wardrobe hides a picture or a window."""
        deep = item.clear if item.clear > 0 else (0.45 if rule in ("hang", "flank") else 0.0)
        if deep == 0.0:
            return None
        quarter = int(np.round(yaw / (np.pi / 2))) % 4
        low_3, high_3 = low_3.copy(), high_3.copy()
        axis = quarter % 2
        if quarter < 2:
            low_3[axis], high_3[axis] = high_3[axis], high_3[axis] + deep
        else:
            low_3[axis], high_3[axis] = low_3[axis] - deep, low_3[axis]
        if rule not in ("hang", "flank") or item.label == "door":
            low_3[2], high_3[2] = 0.0, 1.9
        return low_3 + 1e-3, high_3 - 1e-3

    def _zone_is_free(self, zone: tuple[np.ndarray, np.ndarray]) -> bool:
        low_3, high_3 = zone
        return not ((low_3 < self.highs_P3) & (high_3 > self.lows_P3)).all(1).any()
