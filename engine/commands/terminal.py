"""What commands write on standard output."""

import os
import sys
from typing import Any


def say(text: str) -> None:
    """One line, or several, on standard output."""
    sys.stdout.write(text + "\n")


def show_table(values: dict[str, Any], prefix: str = "") -> None:
    """Nested results, one number, interval or note a line; n/a for what could not be computed."""
    for name, value in values.items():
        if isinstance(value, dict):
            show_table(value, f"{prefix}{name}.")
        elif isinstance(value, list) and not all(isinstance(part, float) for part in value):
            for part in value:
                say(f"{prefix + name:28} {part}")
        elif value != []:
            say(f"{prefix + name:28} {_shown(value)}")


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return f"{_shown(value[0])} to {_shown(value[-1])}"
    return "n/a" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def show_piece(text: str) -> None:
    """Text on standard output, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def in_colour() -> bool:
    """Whether standard output is a terminal that may be written to in colour (no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")
