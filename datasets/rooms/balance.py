"""Choosing questions so that no answer is right too often, and what is asked about does not give it away.

A question's accepted answers all count: the answer "brown" is right for every question that accepts it. In every
group (the question type) no answer may be right for more than `max_share` of the questions; a group that cannot
reach this, such as one with two possible answers, ends up empty.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from .questions import Question

MAX_SHARE = 1 / 3
MAX_KNOWN = (
    2 / 5
)  # of questions of a type that name the same kinds of things; a third would leave hardly any of some types
LET_BE = 2  # questions that such a group may always have of one answer: too few to tell


Key = tuple[str, frozenset[str]]  # type and answers, by which a question is weighed


def key_of(question: Question) -> Key:
    """What balance goes by: questions of the same key weigh the same."""
    return question.question_type, frozenset(answer.lower() for answer in question.answers)


class Pool:
    """Questions in an order, taken by the cheapest key; among equals the first in the order."""

    def __init__(self, questions: Iterable[Question]):
        self._by_key: dict[Key, list[tuple[int, Question]]] = defaultdict(list)
        for place, question in enumerate(questions):
            self._by_key[key_of(question)].append((place, question))
        for places in self._by_key.values():
            places.reverse()  # the first is popped at once

    def __bool__(self) -> bool:
        return bool(self._by_key)

    def __iter__(self) -> Iterator[Key]:
        """The keys that there are questions of."""
        return iter(self._by_key)

    def take(self, keys: Iterable[Key], cost: Callable[[Key], float]) -> Question:
        """Take the first question of the cheapest of some keys."""
        best = min(keys, key=lambda key: (cost(key), self._by_key[key][-1][0]))
        _, question = self._by_key[best].pop()
        if not self._by_key[best]:
            del self._by_key[best]
        return question


class _Tally:
    """Counts of questions and of right answers in each group."""

    def __init__(self) -> None:
        self.sizes: Counter[str] = Counter()
        self.answers: dict[str, Counter[str]] = defaultdict(Counter)

    def add(self, question: Question, step: int = 1) -> None:
        group, answers = key_of(question)
        self.sizes[group] += step
        for answer in answers:
            self.answers[group][answer] += step

    def excess_with(self, key: Key, max_share: float) -> float:
        """By how many questions the most frequent of a key's answers would exceed its share with one more."""
        group, answers = key
        counts = self.answers[group]
        allowed = max_share * (self.sizes[group] + 1)
        return max(0.0, max(counts[answer] + 1 for answer in answers) - allowed)

    def share_with(self, key: Key) -> float:
        """The largest share that one of a key's answers would have with one more."""
        group, answers = key
        counts = self.answers[group]
        return max(counts[answer] + 1 for answer in answers) / (self.sizes[group] + 1)

    def worst(self, max_share: float) -> tuple[str, str] | None:
        """(group, answer) that exceeds its share most, or None."""
        over = [
            (count / self.sizes[group], group, answer)
            for group, counts in self.answers.items()
            if self.sizes[group] > 0
            for answer, count in counts.most_common(1)
            if count > max_share * self.sizes[group] + 1e-9
        ]
        if not over:
            return None
        _share, group, answer = max(over)
        return group, answer


def thin(pools: dict[str, list[Question]], rng: np.random.Generator) -> dict[str, list[Question]]:
    """The pools of rooms (by scene_id) without questions whose answer is usual for what they are about.

    Of all questions of a type that name the same kind of thing, or all the same kinds, no answer is right for more
    than the share `MAX_KNOWN`, or `LET_BE` of them: where nearly every desk is made of wood, most of the questions
    about wooden desks go.
    """
    kept = dict(enumerate(question for pool in pools.values() for question in pool))
    sizes: Counter[_About] = Counter()
    counts: dict[_About, Counter[str]] = defaultdict(Counter)
    holders: dict[tuple[_About, str], list[int]] = defaultdict(list)
    for number in rng.permutation(len(kept)).tolist():
        for about in _abouts(kept[number]):
            sizes[about] += 1
            for answer in key_of(kept[number])[1]:
                counts[about][answer] += 1
                holders[about, answer].append(number)
    changed = True
    while changed:  # what goes from one group goes from others too, where another answer may now be too many
        changed = False
        for about in sorted(counts):
            while True:
                answer, count = max(counts[about].items(), key=lambda entry: (entry[1], entry[0]))
                if count <= max(LET_BE, MAX_KNOWN * sizes[about]):
                    break
                while (number := holders[about, answer].pop()) not in kept:
                    pass
                question, changed = kept.pop(number), True
                for other in _abouts(question):
                    sizes[other] -= 1
                    counts[other].subtract(key_of(question)[1])
    thinned: dict[str, list[Question]] = {scene_id: [] for scene_id in pools}
    for question in kept.values():
        thinned[question.scene_id].append(question)
    return thinned


_About = tuple[str, ...]  # a question type, and kinds of things


def _abouts(question: Question) -> list[_About]:
    """The groups in which an answer should not be known beforehand."""
    groups: list[_About] = [(question.question_type, kind) for kind in question.about]
    if len(groups) > 1:
        groups.append((question.question_type, *sorted(question.about)))
    return groups


def trim(questions: Sequence[Question], rng: np.random.Generator, max_share: float = MAX_SHARE) -> list[Question]:
    """The questions without as many as must go to keep every answer's share; the order of the rest is kept."""
    tally = _Tally()
    kept = dict(enumerate(questions))
    holders: dict[tuple[str, str], list[int]] = defaultdict(list)
    for index in rng.permutation(len(questions)):
        question = questions[index]
        tally.add(question)
        group, answers = key_of(question)
        for answer in answers:
            holders[group, answer].append(int(index))
    while (excess := tally.worst(max_share)) is not None:
        index = holders[excess].pop()
        if index in kept:
            tally.add(kept.pop(index), -1)
    return list(kept.values())


def choose(
    pools: dict[str, list[Question]], per_room: int, rng: np.random.Generator, max_share: float = MAX_SHARE
) -> list[Question]:
    """About `per_room` questions from the pool of each room (by scene_id), balanced over all rooms together.

    First every room takes turns picking the question whose type it has least and whose answer is rarest; then the
    excess is trimmed, and what room is left is filled with questions that break no share.
    """
    order = {scene_id: Pool(pool[k] for k in rng.permutation(len(pool))) for scene_id, pool in pools.items()}
    tally = _Tally()
    chosen: dict[str, list[Question]] = {scene_id: [] for scene_id in pools}
    types: dict[str, Counter[str]] = {scene_id: Counter() for scene_id in pools}
    for _ in range(per_room):
        for scene_id, pool in order.items():
            if not pool:
                continue
            # An answer in excess counts like another question of the same type: it may have to go again.
            costs = {key: types[scene_id][key[0]] + 0.7 * tally.excess_with(key, max_share) for key in pool}
            question = pool.take(costs, costs.__getitem__)
            chosen[scene_id].append(question)
            types[scene_id][question.question_type] += 1
            tally.add(question)
    kept = trim([question for picked in chosen.values() for question in picked], rng, max_share)
    return _fill(kept, order, per_room, max_share)


def _fill(kept: list[Question], spare: dict[str, Pool], per_room: int, max_share: float) -> list[Question]:
    """Add spare questions to rooms below their number wherever no share is broken."""
    tally = _Tally()
    by_room: dict[str, list[Question]] = {scene_id: [] for scene_id in spare}
    for question in kept:
        tally.add(question)
        by_room[question.scene_id].append(question)
    added = True
    while added:
        added = False
        for scene_id, pool in spare.items():
            if len(by_room[scene_id]) >= per_room:
                continue
            fitting = [key for key in pool if tally.share_with(key) <= max_share + 1e-9]
            if fitting:
                question = pool.take(fitting, tally.share_with)
                tally.add(question)
                by_room[scene_id].append(question)
                added = True
    return [question for picked in by_room.values() for question in picked]
