"""Which descriptions are asked: ScanRefer's sentences and Nr3D's short phrases, chosen over all rooms of a split.

At least half of them have two or more distractors (other objects with the target's label); all targets are seen by at
most 30 % of the candidate views.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .descriptions import Description
from .questions import Describer
from .relations import RoomFacts
from .words import material_noun, tokenize, with_article

HARD_DISTRACTORS = 2
MOST_PER_OBJECT = 5  # as ScanRefer
MOST_TOKENS = 24  # Nr3D's readers drop longer utterances

Picked = tuple[Description, str]  # a description and one of its wordings
Kind = tuple[bool, int, str, str]  # hard, target, kind, label: what a choice goes by
Pool = dict[Kind, list[tuple[int, Description, str]]]  # with their places in the order


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

    def choose(self, known: Describer, number: int, fewest_distractors: int = 0) -> list[Picked]:
        """Up to `number` (description, wording) pairs of one room, no wording twice."""
        entries = [
            (option, wording)
            for target in sorted(known)
            for option in known[target]
            if option.distractors >= fewest_distractors
            for wording in option.wordings
        ]
        # those of a kind cost the same
        pool: Pool = defaultdict(list)
        for place, k in enumerate(self.rng.permutation(len(entries))):
            option, wording = entries[k]
            kind = (option.distractors >= HARD_DISTRACTORS, option.target, option.kind, option.label)
            pool[kind].append((place, option, wording))
        picked: list[Picked] = []
        used: Counter[int] = Counter()
        while len(picked) < number:
            hard_wanted = len(picked) < 0.65 * number
            kind = self._best(pool, used, hard=hard_wanted) or self._best(pool, used, hard=not hard_wanted)
            if kind is None:
                break
            _, option, wording = pool[kind][0]
            picked.append((option, wording))
            # Another wording of the same meaning would be the same question again.
            pool[kind] = [entry for entry in pool[kind] if entry[1] is not option]
            if not pool[kind]:
                del pool[kind]
            used[option.target] += 1
            self.kinds[option.kind] += 1
            self.labels[option.label] += 1
            self.surplus += 1 if option.distractors >= HARD_DISTRACTORS else -1
        return picked

    def _best(self, pool: Pool, used: Counter[int], *, hard: bool) -> Kind | None:
        """The kind of the best hard (or easy) entry, the first of those that cost the same.

        None where nothing is left, or one more easy one is too many.
        """
        if not hard and self.surplus <= 0:
            return None
        total = sum(self.kinds.values()) + 1

        def cost(kind: Kind) -> tuple[float, int]:
            """Low for objects not yet described in this room, and for kinds and labels that are rare so far."""
            _, target, name, label = kind
            return used[target] + 2 * (self.kinds[name] + self.labels[label]) / total, pool[kind][0][0]

        fitting = [kind for kind in pool if kind[0] == hard and used[kind[1]] < MOST_PER_OBJECT]
        return min(fitting, key=cost, default=None)


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


def short_enough(known: Describer) -> Describer:
    """The descriptions that Nr3D has room for."""
    return {
        target: kept
        for target, options in known.items()
        if (kept := [d for d in options if all(len(tokenize(w)) <= MOST_TOKENS for w in d.wordings)])
    }


def scanrefer_utterances(facts: RoomFacts, rng: np.random.Generator, picked: Sequence[Picked]) -> list[Utterance]:
    """ScanRefer descriptions of one room."""
    return [Utterance(option, phrase, write_sentences(facts, rng, option, phrase)) for option, phrase in picked]


def nr3d_utterances(rng: np.random.Generator, picked: Sequence[Picked]) -> list[Utterance]:
    """Nr3D utterances of one room."""
    return [Utterance(option, phrase, write_utterance(rng, phrase)) for option, phrase in picked]
