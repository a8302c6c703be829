"""Whether words name a thing: whole words, plurals and the last word of a longer name."""

import re
from collections.abc import Iterable

from ...utils.text import strip_pointers
from ..rooms.words import plural


def contains_words(text: str, phrase: str) -> bool:
    """Whether a phrase occurs in a text as whole words; case does not matter."""
    return bool(phrase) and re.search(rf"(?<!\w){re.escape(phrase.lower())}(?!\w)", text.lower()) is not None


def names_target(step: str, names: Iterable[str]) -> bool:
    """Whether a step names the target by one of its names, a plural, or a name's last word ("chair" of two)."""
    words = strip_pointers(step)
    for name in names:
        head = name.split()[-1] if name.split() else ""
        if any(contains_words(words, form) for noun in (name, head) if noun for form in (noun, plural(noun))):
            return True
    return False
