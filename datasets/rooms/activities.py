"""What people want in a room: plans of steps on things that exist there, short dialogues, descriptions of the room."""

from collections import Counter

import numpy as np

from .descriptions import Description
from .questions import Describer, Question, choose_description, place_phrases
from .relations import RoomFacts
from .words import counted, joined, metres, number_word, sentence

# Goal -> steps in order; each names what it needs, the first label that the room has is used. "{}" is that thing.
_SEATS = ("armchair", "couch", "office chair", "chair", "stool", "bench", "bed")
_TABLES = ("dining table", "coffee table", "table", "desk", "kitchen counter", "end table")
_STORES = ("bookshelf", "cabinet", "dresser", "wardrobe", "file cabinet", "kitchen cabinet", "bathroom vanity")
ACTIVITIES: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "get some rest": (
        ("close {}", ("door",)),
        ("draw {}", ("curtain",)),
        ("turn off {}", ("lamp", "tv", "monitor")),
        ("walk to {}", ("bed", "couch", "armchair")),
        ("shake up {}", ("pillow",)),
    ),
    "work on my report": (
        ("go to {}", ("desk", "dining table", "table")),
        ("pull out {}", ("office chair", "chair", "stool")),
        ("switch on {}", ("lamp",)),
        ("look at {}", ("monitor", "laptop")),
        ("type on {}", ("keyboard", "laptop")),
        ("collect the pages from {}", ("printer",)),
    ),
    "tidy up the room": (
        ("pick up {}", ("book", "cup", "bottle", "box", "backpack", "suitcase")),
        ("put it away in {}", _STORES),
        ("straighten {}", ("picture", "pillow", "towel")),
        ("push back {}", ("chair", "office chair", "stool", "ottoman", "armchair")),
        ("empty {}", ("trash can",)),
        ("wipe {}", _TABLES),
    ),
    "cook a meal": (
        ("open {}", ("refrigerator",)),
        ("wash the vegetables in {}", ("sink",)),
        ("cut them on {}", ("kitchen counter", "dining table")),
        ("heat the food with {}", ("stove", "microwave")),
        ("take plates out of {}", ("kitchen cabinet", "cabinet")),
        ("serve the meal on {}", ("dining table", "table", "coffee table")),
    ),
    "take a bath": (
        ("close {}", ("door",)),
        ("fill {} with water", ("bathtub",)),
        ("draw {}", ("shower curtain", "curtain")),
        ("dry myself with {}", ("towel",)),
        ("comb my hair in front of {}", ("mirror",)),
    ),
    "wash my hands": (
        ("go to {}", ("sink",)),
        ("dry them with {}", ("towel",)),
        ("look into {}", ("mirror",)),
        ("leave through {}", ("door",)),
    ),
    "read for an hour": (
        ("open {}", ("curtain", "window")),
        ("take {}", ("book", "laptop")),
        ("switch on {}", ("lamp",)),
        ("sit down on {}", _SEATS),
    ),
    "have a drink": (
        ("take {}", ("cup", "bottle")),
        ("fill it at {}", ("sink", "refrigerator")),
        ("sit down on {}", _SEATS),
        ("put it down on {}", _TABLES),
    ),
    "pack for a trip": (
        ("open {}", ("suitcase", "backpack", "box")),
        ("take clothes out of {}", ("wardrobe", "dresser", "cabinet")),
        ("add {}", ("book", "laptop", "bottle", "towel")),
        ("switch off {}", ("lamp", "tv", "monitor")),
        ("leave through {}", ("door",)),
    ),
    "let in some fresh air": (
        ("turn down {}", ("radiator",)),
        ("draw back {}", ("curtain",)),
        ("open {}", ("window",)),
        ("sit down on {}", _SEATS),
    ),
    "watch a film": (
        ("draw {}", ("curtain",)),
        ("switch on {}", ("tv", "laptop", "monitor")),
        ("put a snack on {}", _TABLES),
        ("sit down on {}", ("couch", "armchair", "bed", "chair", "office chair")),
    ),
    "care for the flowers": (
        ("take {}", ("bottle", "cup", "vase")),
        ("fill it at {}", ("sink", "bathtub")),
        ("water {}", ("plant",)),
    ),
    "hold a meeting": (
        ("write the agenda on {}", ("whiteboard",)),
        ("arrange {}", ("chair", "office chair")),
        ("switch on {}", ("laptop", "monitor")),
        ("close {}", ("door",)),
    ),
}
FEWEST_STEPS = 3


def _thing(facts: RoomFacts, rng: np.random.Generator, known: Describer, labels: tuple[str, ...]) -> tuple[int, str]:
    """An object of the first label that the room has and can name, and its name; (-1, "") without one."""
    for label in labels:
        named = []
        for i in facts.ids:
            if facts.label(i) != label:
                continue
            if i in facts.anchors:
                named.append((i, facts.anchors[i]))
            elif (chosen := choose_description(rng, [d for d in known.get(i, []) if _is_short(d)])) is not None:
                named.append((i, chosen.phrase))
        if named:
            return named[rng.integers(len(named))]
    return -1, ""


def _is_short(description: Description) -> bool:
    """Whether a description can stand in a list of steps."""
    return len(description.phrase.split()) <= 8


def planning_questions(facts: RoomFacts, rng: np.random.Generator, known: Describer) -> list[Question]:
    """What to do next, for every activity that the room allows; the targets are the next step's thing."""
    asked = []
    for goal, template in ACTIVITIES.items():
        steps: list[tuple[str, int, str]] = []
        for verb, labels in template:
            # "it" is what the first step took, so without that step there is nothing to fill or to put away.
            if " it " in verb and not steps:
                continue
            target, name = _thing(facts, rng, known, labels)
            if target >= 0 and target not in [used for _, used, _ in steps]:
                steps.append((verb.format(name), target, name))
        if len(steps) < FEWEST_STEPS:
            continue
        for done in range(1, len(steps)):
            history = " ".join(f"{k + 1}. {text}" for k, (text, _, _) in enumerate(steps[:done]))
            text, target, name = steps[done]
            thought = (
                f"to {goal} I need {steps[done - 1][2]}, {name} and other things, all of which this room has",
                f"{number_word(done)} of {number_word(len(steps))} steps are done and {name} has not been used yet",
                f"the next step is to {text}",
            )
            question = f"### human: i want to {goal}. i have done these things: {history}. what should i do next?"
            scene_id = facts.room.scene_id
            asked.append(Question(scene_id, "planning", "planning", question, (text,), (target,), thought))
    return asked


def dialogue_questions(facts: RoomFacts, rng: np.random.Generator, known: Describer) -> list[Question]:
    """Two or three turns about one thing: which one is meant, then what it is like or where it is."""
    asked = []
    for target, options in known.items():
        noun = facts.label(target)
        rivals = facts.rivals(target)
        for topic in ("color", "place"):
            places = place_phrases(facts, target)
            leaning = [anchor for _, anchor in places if anchor is not None]
            chosen = choose_description(rng, options, without_color=True, avoid=leaning)
            facts_told = _told(facts, target, places)
            if chosen is None or topic not in facts_told or len(rivals) < 2:
                continue
            request, reply = facts_told[topic]
            opening = (
                f"### human: Can you help me with the {noun}? ### assistant: Sure, which {noun} do you mean? "
                f"### human: I mean {chosen.phrase}. "
            )
            other = next((name for name in facts_told if name != topic), None)
            if other is not None and rng.random() < 0.5:
                earlier = facts_told[other]
                opening += f"{sentence(earlier[0])} ### assistant: {earlier[1]} ### human: "
            question = f"{opening}{sentence(request)} ### assistant:"
            thought = (*chosen.steps, f"{chosen.this} is the one, and {reply[0].lower()}{reply[1:].rstrip('.')}")
            scene_id = facts.room.scene_id
            asked.append(Question(scene_id, "dialogue", "dialogue", question, (reply,), (target,), thought))
    return asked


def _told(facts: RoomFacts, target: int, places: list[tuple[str, int | None]]) -> dict[str, tuple[str, str]]:
    """Topic -> (request, reply) of what can be said about an object."""
    told = {"color": ("what color is it?", f"It is {facts.color(target)}.")}
    if places:
        told["place"] = ("where is it?", f"It is {places[0][0]}.")
    return told


def describe_room(facts: RoomFacts, rng: np.random.Generator, num_places: int = 5) -> str:
    """A paragraph about the whole room: its kind and size, what it holds, and where some of it is."""
    room = facts.room
    width, depth, height = (float(value) for value in room.size_3)
    counts = Counter(facts.label(i) for i in facts.ids)
    listed = joined([counted(count, label) for label, count in sorted(counts.items(), key=lambda x: (-x[1], x[0]))])
    parts = [
        f"This {room.kind} is {metres(max(width, depth))} meters long, {metres(min(width, depth))} meters wide and "
        f"{metres(height)} meters high.",
        f"It holds {counted(len(facts.ids), 'object')}: {listed}.",
    ]
    named = [i for i in facts.anchors if place_phrases(facts, i)]
    for k in rng.permutation(len(named))[:num_places]:
        target = named[k]
        parts.append(f"{sentence(facts.anchors[target])} is {place_phrases(facts, target)[0][0]}.")
    return " ".join(parts)
