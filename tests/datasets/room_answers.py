"""Answers to generated questions, worked out again from the room: the truth that annotations are compared with."""

import math
import re

import numpy as np

from threedr1.datasets.rooms.words import plural

from .room_reader import ground_distance, meant, named, one, raw_middle, surface_distance


def answer_scanqa(room, question):
    """The answers that follow from the room, read from the question alone; None for a question read elsewhere."""
    if match := re.fullmatch(r"What color is (the .+)\?", question):
        (target,) = meant(room, match[1])
        return {room.by_id(target).color}
    if match := re.fullmatch(r"What is (the .+) standing on\?", question):
        (target,) = meant(room, match[1])
        return {room.by_id(room.by_id(target).support_id).label}
    if match := re.fullmatch(r"What is on (the .+)\?", question):
        base = one(room, match[1]).object_id
        return {thing.label for thing in room.objects if thing.support_id == base and not thing.on_wall}
    if match := re.fullmatch(r"How many (.+) (?:are in the room|are there)\?", question):
        return {str(len(counted_ids(room, match[1])))}
    if match := re.fullmatch(r"Which is closest to (the .+), (the .+), (the .+) or (the .+)\?", question):
        anchor, *three = (one(room, phrase) for phrase in match.groups())
        return {
            min(three, key=lambda thing: distance(thing.box_7, anchor.box_7)).label
            for distance in (ground_distance, surface_distance)
        }
    if match := re.fullmatch(r"Which is the tallest, (the .+), (the .+) or (the .+)\?", question):
        return {max((one(room, phrase) for phrase in match.groups()), key=lambda thing: thing.box_7[5]).label}
    if match := re.fullmatch(r"Are there more (.+) than (.+), fewer, or the same number\?", question):
        first, second = (len(counted_ids(room, word)) for word in match.groups())
        return {"more" if first > second else "fewer" if first < second else "the same"}
    return _answer_on_floor(room, question)


def _answer_on_floor(room, question):
    floor = [thing for thing in room.objects if thing.support_id is None and not thing.on_wall]
    if match := re.fullmatch(r"What on the floor is closest to (the .+)\?", question):
        anchor = one(room, match[1])
        rest = [thing for thing in floor if thing is not anchor]
        return {min(rest, key=lambda thing: ground_distance(thing.box_7, anchor.box_7)).label}
    if match := re.fullmatch(r"What on the floor is between (the .+) and (the .+)\?", question):
        a, b = (one(room, phrase).box_7[:2] for phrase in match.groups())
        found = set()
        for thing in floor:
            share = (thing.box_7[:2] - a) @ (b - a) / ((b - a) @ (b - a))
            if 0.1 < share < 0.9 and np.linalg.norm(thing.box_7[:2] - a - share * (b - a)) < 0.6:
                found.add(thing.label)
        return found
    return None


def counted_ids(room, words):
    """Ids of "chairs" or "red chairs"."""
    nouns = {thing.label for thing in room.objects} | {"chair", "table", "cabinet", "sofa", "sink", "counter"}
    for noun in sorted(nouns, key=len, reverse=True):
        if words == plural(noun):
            return named(room, noun)
        if words.endswith(" " + plural(noun)):
            color = words[: -len(plural(noun)) - 1]
            return {i for i in named(room, noun) if (" " + room.by_id(i).color).endswith(" " + color)}
    raise AssertionError(f"cannot count {words!r}")


def agent_pose(room, told):
    """World position and forward direction, from the raw frame of SQA3D's files."""
    to_world, corner_3 = room.axis_align_44, raw_middle(room)
    position = told["position"]
    raw_4 = np.array([position["x"] + corner_3[0], position["y"] + corner_3[1], position["z"], 1.0])
    angle = 2 * math.atan2(told["rotation"]["_z"], told["rotation"]["_w"]) + math.pi
    return (to_world @ raw_4)[:3], to_world[:2, :2] @ np.array([math.cos(angle), math.sin(angle)])


def angle_to(pose, thing):
    """Degrees from straight ahead, left positive."""
    position, ahead = pose
    offset = thing.box_7[:2] - position[:2]
    return math.degrees(math.atan2(ahead[0] * offset[1] - ahead[1] * offset[0], ahead @ offset))


def place_of(angle):
    if abs(angle) <= 45:
        return "in front of me"
    if abs(angle) >= 135:
        return "behind me"
    return "on my left" if angle > 0 else "on my right"


def answer_sqa3d(room, pose, question):
    words = {"forward": "in front of me", "front": "in front of me", "backward": "behind me", "behind": "behind me"}
    floor = [thing for thing in room.objects if thing.support_id is None and not thing.on_wall]

    def distance(thing):
        return np.linalg.norm(thing.box_7[:2] - pose[0][:2])

    where = (
        r"Is (the .+) in front of me, on my left, on my right or behind me\?",
        r"Which direction should I go to reach (the .+)\?",
        r"Where is (the .+) from here\?",
        r"Can I get to (the .+) by going forward, left, right or backward\?",
    )
    for pattern in where:
        if match := re.fullmatch(pattern, question):
            place = place_of(angle_to(pose, one(room, match[1])))
            return {place, *(word for word, meaning in words.items() if meaning == place), place.split()[-1]}
    if match := re.fullmatch(r"What (color )?is the nearest thing standing on the floor (.+)\?", question):
        there = [thing for thing in floor if place_of(angle_to(pose, thing)) == match[2]]
        nearest = min(there, key=distance)
        return {nearest.color if match[1] else nearest.label}
    if match := re.fullmatch(r"How many (.+) are (in front of me|on my left|on my right|behind me)\?", question):
        there = [i for i in counted_ids(room, match[1]) if place_of(angle_to(pose, room.by_id(i))) == match[2]]
        return {str(len(there))}
    if match := re.fullmatch(r"Are there more (.+) on my left, on my right, or the same number .*", question):
        places = [place_of(angle_to(pose, room.by_id(i))) for i in counted_ids(room, match[1])]
        left, right = places.count("on my left"), places.count("on my right")
        return {"left" if left > right else "right" if right > left else "same"}
    match = re.fullmatch(r"Which is closest to me, (the .+), (the .+) or (the .+)\?", question)
    return {min((one(room, phrase) for phrase in match.groups()), key=distance).label}


def candidates(room, think):
    """Ids of those whose distances a thought lists: of the First step's name and, where it narrows, of one colour.

    The name is what the colours stand behind: "by color, the room has chair red and chair blue".
    """
    narrowed = re.search(r"those that are ([a-z ]+?) are ", think)
    listed = re.match(r"First, by color, the room has ([^.]+)\.", think)
    first = re.split(r", | and ", listed[1])[0]
    colors = sorted({thing.color for thing in room.objects}, key=len, reverse=True)
    noun = next(first.removesuffix(f" {color}") for color in colors if first.endswith(f" {color}"))
    ids = counted_ids(room, plural(noun))
    return {i for i in ids if not narrowed or (" " + room.by_id(i).color).endswith(" " + narrowed[1])}
