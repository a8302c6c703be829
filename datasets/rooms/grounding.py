"""Which descriptions are asked: ScanRefer's sentences and Nr3D's short phrases, chosen over all rooms of a split.

At least half of them have two or more distractors (other objects with the target's label); all targets are seen by at
most 30 % of the candidate views.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from .descriptions import Description
from .questions import Describer
from .relations import RoomFacts
from .words import material_noun, tokenize, with_article

HARD_DISTRACTORS = 2
MOST_PER_OBJECT = 5  # as ScanRefer
MOST_TOKENS = 24  # Nr3D's readers drop longer utterances


@dataclass(frozen=True)
class Utterance:
    """One description as it is written: `phrase` is the noun phrase, `text` the sentence around it."""

    description: Description
    phrase: str
    text: str


class Chooser:
    """Picks descriptions room by room, rare kinds and labels first; keeps easy ones no more than hard ones."""

    def __init__(self, rng: np.random.Generator):
        self.rng = rng
        self.kinds: Counter[str] = Counter()
        self.labels: Counter[str] = Counter()
        self.surplus = 0  # hard ones so far minus easy ones

    def choose(self, known: Describer, number: int, fewest_distractors: int = 0) -> list[tuple[Description, str]]:
        """Up to `number` (description, wording) pairs of one room, no wording twice."""
        pool = [
            (option, wording)
            for target in sorted(known)
            for option in known[target]
            if option.distractors >= fewest_distractors
            for wording in option.wordings
        ]
        pool = [pool[k] for k in self.rng.permutation(len(pool))]
        picked: list[tuple[Description, str]] = []
        used: Counter[int] = Counter()
        while len(picked) < number:
            hard_wanted = len(picked) < 0.65 * number
            best = self._best(pool, used, hard=hard_wanted)
            if best is None:
                best = self._best(pool, used, hard=not hard_wanted)
            if best is None:
                break
            option, _wording = best
            picked.append(best)
            # Another wording of the same meaning would be the same question again.
            pool = [entry for entry in pool if entry[0] is not option]
            used[option.target] += 1
            self.kinds[option.kind] += 1
            self.labels[option.label] += 1
            self.surplus += 1 if option.distractors >= HARD_DISTRACTORS else -1
        return picked

    def _best(
        self, pool: list[tuple[Description, str]], used: Counter[int], *, hard: bool
    ) -> tuple[Description, str] | None:
        """The pool's best hard (or easy) entry; None where nothing is left or one more easy one is too many."""
        if not hard and self.surplus <= 0:
            return None
        total = sum(self.kinds.values()) + 1
        fitting = [
            entry
            for entry in pool
            if (entry[0].distractors >= HARD_DISTRACTORS) == hard and used[entry[0].target] < MOST_PER_OBJECT
        ]
        return min(fitting, key=lambda entry: self._cost(entry[0], used, total), default=None)

    def _cost(self, option: Description, used: Counter[int], total: int) -> float:
        """Low for objects not yet described in this room, and for kinds and labels that are rare so far."""
        return used[option.target] + 2 * (self.kinds[option.kind] + self.labels[option.label]) / total


def write_sentences(facts: RoomFacts, rng: np.random.Generator, option: Description, phrase: str) -> str:
    """One ScanRefer description: lower-case sentences around the phrase, with true additions."""
    thing = facts.objects[option.target]
    extras = []
    if not option.uses_color and thing.color not in phrase:
        extras.append(f"it is {thing.color}.")
    if thing.material and option.kind != "material":
        extras.append(f"it is made of {material_noun(thing.material)}.")
    if facts.supported[option.target] and "carries" not in option.kind:
        carried = facts.supported[option.target][int(rng.integers(len(facts.supported[option.target])))]
        extras.append(f"there is {with_article(facts.label(carried))} on it.")
    extra = f" {extras[rng.integers(len(extras))]}" if extras else ""
    look = f"{thing.color} {thing.label}"
    if thing.material:
        look = f"{thing.color} {thing.material} {thing.label}"
    forms = (
        f"this is {phrase}.{extra}",
        f"find {phrase}.{extra}",
        f"{phrase}.{extra}",
        f"there is {with_article(look)}. it is {phrase}.",
        f"the object to look for is {phrase}.",
        f"it is {phrase}.{extra}",
    )
    return forms[rng.integers(len(forms))]


def write_utterance(rng: np.random.Generator, phrase: str) -> str:
    """One Nr3D utterance: a short request, at most MOST_TOKENS tokens."""
    forms = (phrase, f"choose {phrase}", f"pick {phrase}", f"select {phrase}", f"it is {phrase}")
    text = forms[rng.integers(len(forms))]
    return text if len(tokenize(text)) <= MOST_TOKENS else phrase


def scanrefer_utterances(
    chooser: Chooser, facts: RoomFacts, known: Describer, rng: np.random.Generator, number: int
) -> list[Utterance]:
    """ScanRefer descriptions of one room."""
    picked = chooser.choose(known, number)
    return [Utterance(option, phrase, write_sentences(facts, rng, option, phrase)) for option, phrase in picked]


def nr3d_utterances(chooser: Chooser, known: Describer, rng: np.random.Generator, number: int) -> list[Utterance]:
    """Nr3D utterances of one room: always at least one other object with the target's label."""
    short = {
        target: kept
        for target, options in known.items()
        if (kept := [d for d in options if all(len(tokenize(w)) <= MOST_TOKENS for w in d.wordings)])
    }
    picked = chooser.choose(short, number, fewest_distractors=1)
    return [Utterance(option, phrase, write_utterance(rng, phrase)) for option, phrase in picked]
