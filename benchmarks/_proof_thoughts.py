"""What thoughts about generated rooms say, against the boxes of what they name: are lists lists, are metres true.

A thought is the model's own reasoning, so the numbers in it need not be what its answer follows from; but a list that
names one thing three times, or metres that have nothing to do with the room, cannot be what makes an answer right.
"""

import math
import re
from collections.abc import Iterator, Sequence

import numpy as np

from ..utils.predictions import Prediction

_NAME = r"<obj\d+>"
# as datasets/rooms writes them (words.numbered, relations.by_color, questions.compare_questions)
_LIST = re.compile(r"(?:one by one, that is|by color, the room has|I count) ([^.;]*)")
_DISTANCES = re.compile(rf"in meters from [^<,]*({_NAME}), from the (?:nearest|farthest) on, (.*?)(?:\. |$)")
_SAID = re.compile(rf"({_NAME}) (\d+\.\d)")
_FEWEST = 3  # pairs that a correlation is taken of


def lists(think: str) -> Iterator[list[str]]:
    """The names in each list of a thought that counts things or tells their colours, where it names several."""
    for found in _LIST.finditer(think):
        names = re.findall(_NAME, found[1])
        if len(names) > 1:
            yield names


def distances(think: str, named: dict[str, list[float]]) -> Iterator[tuple[float, float]]:
    """Said and true metres, between middles on the floor, of each distance that a thought tells of named things.

    Args:
        named: boxes by name, `meta.named` of a prediction.
    """
    for start, told in _DISTANCES.findall(think):
        if start not in named:
            continue
        for name, metres in _SAID.findall(told):
            if name in named:
                yield float(metres), math.dist(named[name][:2], named[start][:2])


def told(predictions: Sequence[Prediction]) -> dict[str, float]:
    """`lists`: how many there are, `repeated`: the share of them with a name twice; `metres`: how many distances are
    told, `correlation`: of these with the true ones, of three on, where both vary. What cannot be told is left out."""
    named_twice = [len(set(names)) < len(names) for entry in predictions for names in lists(entry.think)]
    pairs = [pair for entry in predictions for pair in distances(entry.think, entry.meta.get("named") or {})]
    found: dict[str, float] = {"lists": len(named_twice), "metres": len(pairs)}
    if named_twice:
        found["repeated"] = sum(named_twice) / len(named_twice)
    if len(pairs) >= _FEWEST:
        said, true = np.array(pairs).T
        if said.std() > 0 and true.std() > 0:
            found["correlation"] = float(np.corrcoef(said, true)[0, 1])
    return {name: round(value, 4) for name, value in found.items()}
