"""What the arguments of several commands have in common: the parser, types of values, a model, the tasks' names."""

import argparse
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

TASKS = "dense_caption, object_caption, grounding, qa, situated_qa, dialogue, planning, scene_description"
DEFAULT_MODEL = os.environ.get("THREEDR1_MODEL", "runs/quickstart/grpo")
AddCommand = Callable[..., argparse.ArgumentParser]
_POINTING = ("--box", "--click", "--up")
_MINUS = re.compile(r"-[\d.xyz]")


class Parser(argparse.ArgumentParser):
    """A parser that answers a wrong command line with one sentence instead of the whole usage.

    It takes `--click -1,0.5,0.4` and `--up -y` as they are meant; argparse alone reads the values as options for
    their minus sign.
    """

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        joined: list[str] = []
        for word in sys.argv[1:] if args is None else args:
            if joined and joined[-1] in _POINTING and _MINUS.match(word):
                joined[-1] += f"={word}"
            else:
                joined.append(word)
        return super().parse_known_args(joined, namespace)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help.\n")


def at_least(bound: int) -> Callable[[str], int]:
    """A whole number that is not below a bound, as an argument's type."""

    def read(text: str) -> int:
        number = int(text) if text.lstrip("-").isdigit() else None
        if number is None or number < bound:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least {bound}")
        return number

    return read


def seconds(text: str) -> float:
    """A number of seconds above zero, as an argument's type."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0")
    return value


def metres(text: str) -> float:
    """A room's height in metres, as an argument's type."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.1 <= value <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} is no height of a room in metres")
    return value


def amount(text: str) -> float:
    """A number that is not negative, as an argument's type."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no amount of dollars")
    return value


def numbers(*counts: int) -> Callable[[str], list[float]]:
    """Numbers between commas, as many as one of `counts`, as an argument's type."""

    def read(text: str) -> list[float]:
        try:
            values = [float(part) for part in text.split(",")]
        except ValueError:
            values = []
        if len(values) not in counts or not all(map(math.isfinite, values)):
            wanted = " or ".join(map(str, counts))
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted} numbers with commas between, without blanks")
        return values

    return read
