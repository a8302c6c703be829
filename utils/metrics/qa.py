"""Question answering: exact match as ScanQA, SQA3D and their successors define it, and n-gram scores.

- `scanqa`: ATR-DBI/ScanQA scripts/score.py. EM@1 and EM@10 on raw strings, n-grams after the PTB tokenizer; percent.
- `scanqa_ll3da`: Open3DA/LL3DA eval_utils/evaluate_qa.py. N-grams on the strings as they are, no EM; fractions.
- `sqa3d`: LaVi-Lab/Video-3D-LLM llava/eval/eval_sqa3d.py for EM, 3D-LLaVA (after LEO) for EM-R; percent.
- `exact`: EM on raw strings, after `clean_answer`, and EM-R; no n-grams, no Java; percent.

`qa_variants` has the ways in which other papers score the same files.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .caption import MeteorChoice, Tokenizer, ngram_scores
from .result import Scores, grouped_percent, mean


@dataclass(frozen=True)
class QaItem:
    """One answered question. `answers` holds the predictions, best first; more than one only for EM@10."""

    key: str
    question: str
    answers: tuple[str, ...]
    references: tuple[str, ...]
    question_type: str = ""


# LEO's answer cleaning.
_TYPOS = {
    "letf": "left",
    "let": "left",
    "tehre": "there",
    "rigth": "right",
    "rght": "right",
    "behine": "behind",
    "tv": "TV",
    "chai": "chair",
    "wasing": "washing",
    "waslked": "walked",
    "oclock": "o'clock",
}
_NUMBER_WORDS = {
    "0": "zero",
    "none": "zero",
    "1": "one",
    "2": "two",
    "3": "three",
    "4": "four",
    "5": "five",
    "6": "six",
    "7": "seven",
    "8": "eight",
    "9": "nine",
    "10": "ten",
    "11": "eleven",
    "12": "twelve",
    "13": "thirteen",
    "14": "fourteen",
    "15": "fifteen",
    "16": "sixteen",
    "17": "seventeen",
    "18": "eighteen",
    "19": "nineteen",
    "20": "twenty",
    "23": "twenty-three",
}


# No replacement is itself a word that is replaced, so that one pass over both tables does what LEO's chain does.
_WORDS = _TYPOS | _NUMBER_WORDS
_WORD = re.compile(rf"\b(?:{'|'.join(_WORDS)})\b")
_DROPPED = re.compile(r"[^a-zA-Z0-9,'\s\-:]+")
_LAST_RULES: list[tuple[re.Pattern[str], str]] = [
    (re.compile(r"\bo' +clock\b"), "o'clock"),
    (re.compile(r"\b([a-zA-Z]+)[0-9]\b"), r"\1"),  # chair2
    *((re.compile(rf"\b{article}\b ([a-zA-Z]+)"), r"\1") for article in ("a", "an", "the")),
    (re.compile(r"\bbackwards\b"), "backward"),
]


@functools.lru_cache(maxsize=1 << 16)
def clean_answer(text: str) -> str:
    """An answer in the normal form that SQA3D's generative evaluations compare (LEO's rules)."""
    # blanks at the ends go first and once: those that the later rules leave there stay, as published
    text = re.sub(" {2,}", " ", _trim(text.lower()))
    text = _WORD.sub(lambda match: _WORDS[match[0]], _DROPPED.sub("", text))
    for pattern, replacement in _LAST_RULES:
        text = pattern.sub(replacement, text)
    return text


def _trim(text: str) -> str:
    """A text without the blanks at its ends, which for LEO's `$` are also those before a final line break."""
    end = "\n" if text.endswith("\n") else ""
    return (text.removesuffix("\n").rstrip(" ") + end).lstrip(" ")


def qa_exact(prediction: str, references: Sequence[str]) -> float:
    """1.0 where the cleaned prediction equals a cleaned reference, else 0.0; an empty prediction earns 0.

    The per-sample score of rewards and evaluation: unlike `qa_refined` it cannot be met by a fragment.
    """
    cleaned = clean_answer(prediction).strip()
    return float(bool(cleaned) and any(cleaned == clean_answer(reference).strip() for reference in references))


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """EM on cleaned strings, as eval_sqa3d.py does it."""
    cleaned = clean_answer(prediction)
    return float(any(cleaned == clean_answer(reference) for reference in references))


def qa_refined(prediction: str, references: Sequence[str]) -> float:
    """EM-R: cleaned strings are equal, or one holds the other after all white space is removed.

    As published, an empty prediction is part of everything and counts as a hit; do not use it as a reward.
    """
    squeezed = "".join(clean_answer(prediction).split())
    for reference in references:
        golden = "".join(clean_answer(reference).split())
        if squeezed in golden or golden in squeezed:
            return 1.0
    return 0.0


def sqa3d_question_type(question: str) -> str:
    """what, is, how, can, which or others, by how the question begins (process_sqa3d.py)."""
    lowered = question.lower()
    return next((kind for kind in ("what", "is", "how", "can", "which") if lowered.startswith(kind)), "others")


def scanqa(items: Sequence[QaItem], *, meteor: MeteorChoice = "auto") -> Scores:
    """ScanQA's official score.py; percent. EM@10 is given where every item has ten answers."""
    check_items(items)
    exact_measures = {"EM@1": [float(first_answer(item) in item.references) for item in items]}
    if all(len(item.answers) >= 10 for item in items):
        exact_measures["EM@10"] = [
            float(any(answer in item.references for answer in item.answers[:10])) for item in items
        ]
    references = {item.key: list(item.references) for item in items}
    candidates = {item.key: first_answer(item) for item in items}
    return percent_scores(exact_measures, references, candidates, tokenizer="ptb", meteor=meteor)


def scanqa_ll3da(items: Sequence[QaItem], *, meteor: MeteorChoice = "auto") -> Scores:
    """LL3DA's evaluate_qa.py: n-grams without tokenizer, case and punctuation kept; fractions.

    Its corpus key is question id and question together, which only matters where ids repeat.
    """
    check_items(items)
    references = {f"{item.key}-{item.question}": list(item.references) for item in items}
    candidates = {f"{item.key}-{item.question}": [collapse_spaces(first_answer(item))] for item in items}
    ngrams = ngram_scores(references, candidates, tokenizer="none", meteor=meteor)
    scores = Scores("fraction", len(references), dict(ngrams.corpus), ngrams.per_item, notes=ngrams.notes)
    scores.aggregates = ngrams.aggregates
    return scores


def sqa3d(items: Sequence[QaItem]) -> Scores:
    """EM and EM-R after `clean_answer` on both sides, overall and by question type; percent."""
    check_items(items)
    per_item = {
        "EM": [exact_match(first_answer(item), item.references) for item in items],
        "EM-R": [qa_refined(first_answer(item), item.references) for item in items],
    }
    kinds = [sqa3d_question_type(item.question) if item.question else "" for item in items]
    scores = grouped_percent(per_item, kinds)
    scores.notes += _empty_hits(items)
    unknown = sum(not item.question for item in items)
    if unknown:
        scores.notes.append(
            f"{unknown} of {len(items)} questions are not known and in no group: keep v1_balanced_questions_… beside "
            "the annotation file."
        )
    return scores


def exact(items: Sequence[QaItem]) -> Scores:
    """EM on raw strings, EM after `clean_answer`, and EM-R; by question type where items name one; percent."""
    check_items(items)
    per_item = {
        "EM": [exact_match(first_answer(item), item.references) for item in items],
        "EM-raw": [float(first_answer(item) in item.references) for item in items],
        "EM-R": [qa_refined(first_answer(item), item.references) for item in items],
    }
    scores = grouped_percent(per_item, [item.question_type for item in items])
    scores.notes += _empty_hits(items)
    return scores


def _empty_hits(items: Sequence[QaItem]) -> list[str]:
    """What is to be said of answers that say nothing, where EM-R is given (`qa_refined`)."""
    empty = sum(not "".join(clean_answer(first_answer(item)).split()) for item in items)
    if not empty:
        return []
    return [f"{empty} of {len(items)} answers are empty, and EM-R, as published, counts them as hits: go by EM."]


def percent_scores(
    exact_measures: Mapping[str, list[float]],
    references: Mapping[str, Sequence[str]],
    candidates: Mapping[str, str],
    *,
    tokenizer: Tokenizer,
    meteor: MeteorChoice,
) -> Scores:
    """Exact-match measures (1 or 0 an item, in the order of the keys) and n-gram scores side by side; percent."""
    ngrams = ngram_scores(
        references, {key: [text] for key, text in candidates.items()}, tokenizer=tokenizer, meteor=meteor
    )
    metrics: dict[str, float | None] = {name: 100 * mean(values) for name, values in exact_measures.items()}
    metrics |= {name: None if value is None else 100 * value for name, value in ngrams.corpus.items()}
    per_item = {**exact_measures, **ngrams.per_item}
    return Scores("percent", len(references), metrics, per_item, notes=ngrams.notes, aggregates=ngrams.aggregates)


def collapse_spaces(text: str) -> str:
    """Runs of spaces become one, none is left at the ends; other characters stay."""
    return " ".join(filter(None, text.split(" ")))


def first_answer(item: QaItem) -> str:
    """The best answer of an item."""
    return item.answers[0]


def check_items(items: Sequence[QaItem]) -> None:
    """ValueError for no items, for an item without an answer or a reference, and for a key that comes twice."""
    if not items:
        raise ValueError("There is nothing to score: the list of answers is empty.")
    seen: set[str] = set()
    for item in items:
        if not item.answers:
            raise ValueError(f"Question {item.key!r} has no answer; give at least one (it may be an empty string).")
        if not item.references:
            raise ValueError(
                f"Question {item.key!r} has no reference answer; give one in the file, or by --references or "
                "--data of `main.py score`."
            )
        if item.key in seen:
            raise ValueError(f"Question {item.key!r} is answered twice; keep one answer a question.")
        seen.add(item.key)
