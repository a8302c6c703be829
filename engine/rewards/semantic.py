"""The semantic reward: how close the words of an answer are in meaning to a reference answer.

Shapes: N texts, D width of an embedding.
"""

import re
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from rapidfuzz import fuzz
from torch import Tensor

from ...utils.text import parse_response, strip_pointers

MIN_QUESTION_WORDS = 3
COPY_SIMILARITY = 95.0  # percent of equal characters
CACHE_SIZE = 65536
_GRAMMAR = frozenset(
    re.findall(
        r"\w+",
        "a an the this that these those it its there here is are was were be been do does did has have had can could "
        "will would of in on at to from by for with and or but so then not no what which who where when why how you i",
    )
)


class TextEncoder(Protocol):
    """A text encoder, for instance CLIP's text tower or a sentence encoder."""

    def embed_texts(self, texts: list[str]) -> Tensor:
        """L2-normalised embeddings [N, D]; texts beyond the encoder's length are truncated."""
        ...


class SemanticReward:
    """Cosine of the embeddings of answer and reference, the best over references, clipped to [0, 1].

    The paper's R_sim, on the words of `<answer>` (pointers taken out). 0 for an answer without words, and for one that
    repeats the question or says nothing but its words (they would be near the reference's for nothing). None where no
    reference has words.

    Encoders truncate (CLIP after 77 tokens), so whatever stands behind the right words is free: an answer longer than
    `length_slack` words plus four times the longest reference is paid by the share that this is of its length, twelve
    characters without a space counting as a word. `length_slack=None` takes the plain cosine.

    What the definition pays all the same: a cosine is seldom near 0, so any answer of the right kind earns something
    (measured with all-MiniLM-L6-v2 on ScanQA's questions: another question's answer 0.30, a list of frequent answers
    0.34, the right answer in a sentence 0.86). Within a group only the differences count.
    """

    def __init__(self, encoder: TextEncoder, length_slack: int | None = 20):
        self.encoder = encoder
        self.length_slack = length_slack
        self._cache: OrderedDict[str, Tensor] = OrderedDict()  # embeddings of references, the latest used last

    def __call__(
        self,
        completions: list[str],
        *,
        references: Sequence[Sequence[str]],
        question: Sequence[str],
        **columns: Any,  # noqa: ARG002
    ) -> list[float | None]:
        answers = [strip_pointers(parse_response(completion).answer) for completion in completions]
        targets = [[text for text in map(strip_pointers, texts) if _words(text)] for texts in references]
        paid = [
            bool(texts)
            and bool(_words(answer))
            and not repeats_question(answer, asked, texts)
            and not says_nothing_new(answer, asked, texts)
            for answer, texts, asked in zip(answers, targets, question, strict=True)
        ]
        rows = [row for row, keep in enumerate(paid) if keep]
        rewards: list[float | None] = [0.0 if texts else None for texts in targets]
        if not rows:
            return rewards
        self._remember([text for row in rows for text in targets[row]])
        distinct = list(dict.fromkeys(answers[row] for row in rows))
        answers_ND = dict(zip(distinct, self._embed(distinct), strict=True))
        for row in rows:
            references_ND = torch.stack([self._cache[text] for text in targets[row]])
            cosine = float((references_ND @ answers_ND[answers[row]]).max())
            rewards[row] = min(max(cosine, 0.0), 1.0) * self._length_factor(answers[row], targets[row])
        self._forget()
        return rewards

    def _length_factor(self, answer: str, references: list[str]) -> float:
        if self.length_slack is None:
            return 1.0
        allowed = self.length_slack + 4 * max(map(_length, references))
        return min(1.0, allowed / _length(answer))

    def _embed(self, texts: list[str]) -> Tensor:
        with torch.no_grad():
            return self.encoder.embed_texts(texts).detach().float().cpu()

    def _remember(self, texts: list[str]) -> None:
        new = [text for text in dict.fromkeys(texts) if text not in self._cache]
        if new:
            self._cache.update(zip(new, self._embed(new), strict=True))
        for text in texts:
            self._cache.move_to_end(text)

    def _forget(self) -> None:
        while len(self._cache) > CACHE_SIZE:
            self._cache.popitem(last=False)


def repeats_question(answer: str, question: str, references: Sequence[str] = ()) -> bool:
    """Whether an answer holds the question, word for word or nearly so, and no reference does.

    Short questions (fewer than three words) are not looked for, since any answer may hold their words.
    """
    asked = _words(question)
    if len(asked) < MIN_QUESTION_WORDS:
        return False
    question_text = " ".join(asked)
    return _holds(answer, question_text) and not any(_holds(text, question_text) for text in references)


def says_nothing_new(answer: str, question: str, references: Sequence[str] = ()) -> bool:
    """Whether an answer is made of the question's words alone, in whatever order, and no reference is.

    Words of grammar do not count. An answer with fewer than three other words is not looked at: "red" may well answer
    "is it red or brown?".
    """
    asked = set(_words(question))
    own = _content_words(answer)
    if len(own) < MIN_QUESTION_WORDS or not own <= asked:
        return False
    return not any(set(_words(text)) <= asked for text in references)


def _content_words(text: str) -> set[str]:
    return set(_words(text)) - _GRAMMAR


def _length(text: str) -> float:
    """Words of a text; long runs without a space count by their characters."""
    return max(len(text.split()), len(text) / 12)


def _holds(text: str, question_text: str) -> bool:
    said = " ".join(_words(text))
    if len(said) < 0.9 * len(question_text):  # partial_ratio would look for the text in the question instead
        return False
    return fuzz.partial_ratio(question_text, said) >= COPY_SIMILARITY


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
