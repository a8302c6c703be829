"""What is true of a room: names, distances, sides. Pure geometry, in the world frame, metres.

`RoomFacts` caches what every question needs. A relation `holds` only with a margin: it is true of the target and
clearly false of every rival, so that noise of a few centimetres or another sensible definition of distance (between
centres, between surfaces) does not change the answer.

"As seen from the middle of the room" means: standing at the origin of the model frame (`floor_centre`), facing the
anchor's centre. Angles are degrees, counter-clockwise seen from above, so that left is positive.
"""

import math
from collections.abc import Mapping, Sequence

from ...utils.labels import DETECTION_CLASSES, OTHERS
from ..scene import floor_centre
from .room import Room, RoomObject
from .words import colour_fits, colours_overlap, joined, metres, pointing

# A target is usable where at most this share of the candidate views shows it.
MAX_VISIBLE_SHARE = 0.30


def planar_distance(first_7: Sequence[float], second_7: Sequence[float]) -> float:
    """Distance between two boxes' centres on the floor plane."""
    return math.hypot(first_7[0] - second_7[0], first_7[1] - second_7[1])


def gap(first_7: Sequence[float], second_7: Sequence[float], axes: Sequence[int] = (0, 1, 2)) -> float:
    """Shortest distance between two axis-aligned boxes, over the axes given; 0 where they touch or overlap."""
    return math.hypot(
        *(max(0.0, abs(first_7[a] - second_7[a]) - (first_7[a + 3] + second_7[a + 3]) / 2) for a in axes)
    )


def wrap_degrees(angle: float) -> float:
    """An angle brought to (-180, 180]."""
    return 180.0 - (180.0 - angle) % 360.0


def bearing(origin_2: Sequence[float], heading: float, point_2: Sequence[float]) -> float:
    """Degrees from `heading` (degrees from +x) to a point, counter-clockwise, seen from `origin_2`."""
    return wrap_degrees(math.degrees(math.atan2(point_2[1] - origin_2[1], point_2[0] - origin_2[0])) - heading)


class RoomFacts:
    """A room with what questions ask of it. Methods take and give objectIds."""

    def __init__(self, room: Room):
        self.room = room
        self.objects: dict[int, RoomObject] = {thing.object_id: thing for thing in room.objects}
        if len(self.objects) != len(room.objects):
            raise ValueError(f"Room {room.scene_id} has two objects with one objectId; make the ids unique.")
        unseen = [object_id for object_id in self.objects if object_id not in room.visible_share]
        if unseen:
            raise ValueError(
                f"Room {room.scene_id} has no visible_share for object {unseen[0]}; generate it with visibility."
            )
        boxes = {i: tuple(float(value) for value in thing.box_7) for i, thing in sorted(self.objects.items())}
        # from left to right: in what order things are named and counted must be something that can be seen
        self.boxes = dict(sorted(boxes.items(), key=lambda entry: entry[1][0]))
        self.ids = list(self.boxes)
        origin_3 = getattr(room, "floor_centre_3", None)
        if origin_3 is None:
            if len(room.vertices_V3) == 0:
                raise ValueError(f"Room {room.scene_id} has no vertices; its floor centre cannot be found.")
            origin_3 = floor_centre(room.vertices_V3)
        self.origin_3 = tuple(float(value) for value in origin_3)
        self.planar = {i: {j: planar_distance(self.boxes[i], self.boxes[j]) for j in self.ids} for i in self.ids}
        self.gaps = {i: {j: gap(self.boxes[i], self.boxes[j]) for j in self.ids} for i in self.ids}
        self.supported = {i: [j for j in self.ids if self.stands_on(j, i)] for i in self.ids}
        self._rivals = {i: self._find_rivals(i) for i in self.ids}
        self.anchors = {i: phrase for i in self.ids if (phrase := self._anchor_phrase(i))}

    # ---- names

    def label(self, object_id: int) -> str:
        return self.objects[object_id].label

    def color(self, object_id: int) -> str:
        return self.objects[object_id].color

    def _find_rivals(self, object_id: int) -> list[int]:
        """All objects that someone may call by this object's label, itself included.

        Generous on purpose: the same detection class, the same label, and labels that end with it ("armchair" for
        "chair", "table lamp" for "lamp").
        """
        thing = self.objects[object_id]
        return [
            i
            for i in self.ids
            if self.label(i).endswith(thing.label)
            or (thing.class_id != OTHERS and self.objects[i].class_id == thing.class_id)
        ]

    def rivals(self, object_id: int) -> list[int]:
        return self._rivals[object_id]

    def same_label(self, object_id: int) -> list[int]:
        """Objects with exactly this label, itself included."""
        return [i for i in self.ids if self.label(i) == self.label(object_id)]

    def is_one_kind(self, object_id: int) -> bool:
        """Whether all rivals share a label or a detection class, so that one noun is plainly true of them all."""
        members = self.rivals(object_id)
        class_ids = {self.objects[i].class_id for i in members}
        return len({self.label(i) for i in members}) == 1 or (len(class_ids) == 1 and OTHERS not in class_ids)

    def family_noun(self, object_id: int) -> str:
        """A noun that is true of all rivals: their label where they share it, else their class or shortest label."""
        if len({self.label(i) for i in self.rivals(object_id)}) == 1 or not self.is_one_kind(object_id):
            return self.label(object_id)
        return DETECTION_CLASSES[self.objects[object_id].class_id]

    def _anchor_phrase(self, object_id: int) -> str:
        """A short phrase that only this object answers to ("the bed", "the red chair"), or ""."""
        others = [i for i in self.rivals(object_id) if i != object_id]
        if not others:
            return f"the {self.label(object_id)}"
        if not any(colours_overlap(self.color(object_id), self.color(i)) for i in others):
            return f"the {self.color(object_id)} {self.label(object_id)}"
        return ""

    def pointed(self, object_id: int) -> str:
        """An anchor's phrase with the mark of its object, as thoughts name it."""
        return pointing(self.anchors[object_id], object_id)

    def measured(self, lengths: Mapping[int, float]) -> str:
        """Anchors as thoughts list them, each with a length in metres: "the bed <#3> 1.2 and the lamp <#7> 2.0"."""
        return joined([f"{self.pointed(i)} {metres(length)}" for i, length in lengths.items()])

    def by_color(self, noun: str, object_ids: Sequence[int]) -> str:
        """Objects of one noun as thoughts list them, each with its colour: "chair <#1> red and chair <#4> blue"."""
        return joined([f"{pointing(noun, i)} {self.color(i)}" for i in object_ids])

    def hidden(self, *object_ids: int) -> bool:
        """Whether some candidate view shows each object, but at most MAX_VISIBLE_SHARE of them can show all."""
        shares = [self.room.visible_share[i] for i in object_ids]
        return min(shares) > 0 and min(shares) <= MAX_VISIBLE_SHARE

    # ---- one object

    def bottom(self, object_id: int) -> float:
        return self.boxes[object_id][2] - self.boxes[object_id][5] / 2

    def top(self, object_id: int) -> float:
        return self.boxes[object_id][2] + self.boxes[object_id][5] / 2

    def volume(self, object_id: int) -> float:
        return math.prod(self.boxes[object_id][3:6])

    def from_middle(self, object_id: int) -> float:
        """Distance of an object's centre from the middle of the room, on the floor plane."""
        return math.dist(self.boxes[object_id][:2], self.origin_3[:2])

    def on_floor(self, object_id: int) -> bool:
        thing = self.objects[object_id]
        return not thing.on_wall and thing.support_id is None

    def coloured(self, object_ids: Sequence[int], color: str) -> list[int]:
        """Those of the objects that may be called by a colour word."""
        return [i for i in object_ids if colour_fits(color, self.color(i))]

    # ---- pairs

    def stands_on(self, upper: int, lower: int) -> bool:
        """Whether `upper` rests on `lower` (declared so, and its middle is over it and not below it)."""
        if self.objects[upper].support_id != lower or self.objects[upper].on_wall:
            return False
        box, base = self.boxes[upper], self.boxes[lower]
        inside = all(abs(box[a] - base[a]) <= base[a + 3] / 2 for a in (0, 1))
        return inside and self.bottom(lower) < box[2] and self.bottom(upper) <= self.top(lower) + 0.1

    def hangs_above(self, upper: int, lower: int, reach: float = 0.3) -> bool:
        """Whether `upper` is over `lower`, at most `reach` metres beside it."""
        beside = gap(self.boxes[upper], self.boxes[lower], (0, 1))
        return upper != lower and beside <= reach and self.bottom(upper) >= self.top(lower) - 0.05

    def side_of(self, object_id: int, anchor: int) -> float | None:
        """Bearing of an object from the middle of the room when facing the anchor; None too near the middle."""
        if min(math.dist(self.boxes[i][:2], self.origin_3[:2]) for i in (object_id, anchor)) < 0.5:
            return None
        heading = bearing(self.origin_3, 0.0, self.boxes[anchor])
        return bearing(self.origin_3, heading, self.boxes[object_id])

    def along(self, object_id: int, start: int, end: int) -> tuple[float, float]:
        """(share of the way from `start` to `end`, distance beside that line) of an object's centre, floor plane."""
        (ax, ay), (bx, by), (px, py) = (self.boxes[i][:2] for i in (start, end, object_id))
        line_x, line_y, offset_x, offset_y = bx - ax, by - ay, px - ax, py - ay
        length = math.hypot(line_x, line_y)
        if length < 1e-6:
            return 0.0, math.hypot(offset_x, offset_y)
        share = (line_x * offset_x + line_y * offset_y) / length**2
        return share, abs(line_x * offset_y - line_y * offset_x) / length


# ---- relations that single one object out of a pool; each is true of the target and clearly false of all rivals


def is_closest(facts: RoomFacts, target: int, rivals: Sequence[int], anchor: int) -> bool:
    return all(
        facts.planar[i][anchor] >= facts.planar[target][anchor] + 0.3
        and facts.gaps[i][anchor] >= facts.gaps[target][anchor] + 0.1
        for i in rivals
    )


def is_farthest(facts: RoomFacts, target: int, rivals: Sequence[int], anchor: int) -> bool:
    return all(
        facts.planar[i][anchor] <= facts.planar[target][anchor] - 0.3
        and facts.gaps[i][anchor] <= facts.gaps[target][anchor] - 0.1
        for i in rivals
    )


def is_beside(facts: RoomFacts, target: int, rivals: Sequence[int], anchor: int) -> bool:
    """Next to: at most 0.35 m from the anchor and level with it, all rivals at least 0.9 m away."""
    carried = anchor in facts.supported[target] or target in facts.supported[anchor]
    level = gap(facts.boxes[target], facts.boxes[anchor], (2,)) == 0
    if carried or not level:
        return False
    return facts.gaps[target][anchor] <= 0.35 and all(facts.gaps[i][anchor] >= 0.9 for i in rivals)


def is_on_side(facts: RoomFacts, target: int, rivals: Sequence[int], anchor: int, sign: int) -> bool:
    """Left of (sign 1) or right of (sign -1) the anchor, as seen from the middle of the room."""
    own = facts.side_of(target, anchor)
    if own is None or not 12 <= sign * own <= 90:
        return False
    sides = [facts.side_of(i, anchor) for i in rivals]
    return all(side is not None and not 0 <= sign * side <= 115 for side in sides)


def is_between(facts: RoomFacts, target: int, rivals: Sequence[int], start: int, end: int) -> bool:
    if facts.planar[start][end] < 1.0:
        return False
    share, beside = facts.along(target, start, end)
    if not (0.2 <= share <= 0.8 and beside <= 0.4):
        return False
    places = [facts.along(i, start, end) for i in rivals]
    return all(not 0 <= share <= 1 or beside >= 0.9 for share, beside in places)


def is_on(facts: RoomFacts, target: int, rivals: Sequence[int], anchor: int) -> bool:
    return facts.stands_on(target, anchor) and not any(
        facts.objects[i].support_id == anchor or facts.gaps[i][anchor] <= 0.02 for i in rivals
    )


def is_above(facts: RoomFacts, target: int, rivals: Sequence[int], anchor: int) -> bool:
    """Above, without touching: for things on walls."""
    return (
        facts.objects[target].on_wall
        and facts.hangs_above(target, anchor)
        and not any(facts.hangs_above(i, anchor, reach=0.9) for i in rivals)
    )


def is_biggest(facts: RoomFacts, target: int, rivals: Sequence[int]) -> bool:
    return all(facts.volume(target) >= 1.4 * facts.volume(i) for i in rivals)


def is_smallest(facts: RoomFacts, target: int, rivals: Sequence[int]) -> bool:
    return all(facts.volume(i) >= 1.4 * facts.volume(target) for i in rivals)


def is_tallest(facts: RoomFacts, target: int, rivals: Sequence[int]) -> bool:
    return all(facts.boxes[target][5] >= 1.15 * facts.boxes[i][5] for i in rivals)


def is_shortest(facts: RoomFacts, target: int, rivals: Sequence[int]) -> bool:
    return all(facts.boxes[i][5] >= 1.15 * facts.boxes[target][5] for i in rivals)


def order_from_left(facts: RoomFacts, pool: Sequence[int], anchor: int) -> list[int] | None:
    """The pool from left to right, facing the anchor from the middle of the room.

    None where the order is not plain: an object beside or behind the viewer, or two less than 8 degrees apart.
    """
    bearings = {i: facts.side_of(i, anchor) for i in pool}
    known = {i: side for i, side in bearings.items() if side is not None and abs(side) <= 85}
    if len(known) != len(pool):
        return None
    order = sorted(pool, key=lambda i: -known[i])
    if any(known[left] - known[right] < 8 for left, right in zip(order, order[1:], strict=False)):
        return None
    return order
