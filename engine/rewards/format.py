"""The format reward, and the gate before the other rewards."""

import re
import unicodedata
from typing import Any

from ...utils.text import parse_response

MIN_THINK_WORDS = 3
_ANY_TAG = re.compile(r"<\s*/?\s*(?:think|answer)\s*/?\s*>")


def format_reward(completions: list[str], **columns: Any) -> list[float | None]:  # noqa: ARG001
    """1 for `<think>…</think><answer>…</answer>`, the whole text and nothing else, with both parts filled; else 0.

    The paper's R_format in {0, 1}. The thought must hold at least three different words, so that an empty or a
    filled-up one does not count; the answer a letter or a digit. A search for the pattern, or parts of a point for
    parts of it, would be learned as a way to earn it: this is one full match (utils.text). Further tags in another
    spelling (`<Answer>`, full-width letters, invisible characters between) make it no match either, since readers
    less strict than ours would take them for tags.

    >>> format_reward(["<think>The chair by the desk is red.</think><answer>red</answer>", "red"])
    [1.0, 0.0]
    """
    return [float(_is_well_formed(completion)) for completion in completions]


def _is_well_formed(completion: str) -> bool:
    response = parse_response(completion)
    words = re.findall(r"[^\W\d_]+", response.think.lower())
    return (
        response.well_formed
        and len(set(words)) >= MIN_THINK_WORDS
        and bool(re.search(r"[^\W_]", response.answer))
        and len(_ANY_TAG.findall(_plain(completion))) == 4
    )


def _plain(text: str) -> str:
    """A text in lower case, with compatible forms made one and invisible format characters (Cf) taken out."""
    if text.isascii():  # nearly all are: nothing to fold but the case
        return text.lower()
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(letter for letter in folded if unicodedata.category(letter) != "Cf")
