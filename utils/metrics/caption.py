"""N-gram scores of captions and answers: BLEU-1..4, METEOR, ROUGE-L and CIDEr by pycocoevalcap's own scorers.

BLEU and METEOR of a corpus are aggregates: they are not the mean of the per-item values, and are resampled by their
sufficient statistics. CIDEr weighs n-grams by how rare they are among the references that are scored together, so
that a value belongs to its set of items; one item alone always gives 0.
"""

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

from pycocoevalcap.bleu.bleu_scorer import BleuScorer
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from .java import MeteorScores, java_available, meteor_scores, ptb_tokenize
from .ngram_statistics import METEOR_COLUMNS, bleu_aggregates, meteor_aggregate
from .result import Aggregate

Tokenizer = Literal["ptb", "none"]
# True: METEOR or an error; False: not asked for; "auto": METEOR where Java is, else null with a note
MeteorChoice = bool | Literal["auto"]

NO_JAVA_NOTE = "METEOR is n/a: it needs Java (17 or later), which was not found."
NO_TOKENIZER_NOTE = "{names} are n/a: this scorer's PTB tokenizer needs Java (17 or later), which was not found."
BLEU_NAMES = tuple(f"BLEU-{order}" for order in range(1, 5))
_WORDS = re.compile(r"[\w']+")


@dataclass
class NgramScores:
    """Scores as fractions (CIDEr 1.5 is what papers print as 150); per-item values in the order of the keys."""

    corpus: dict[str, float | None]
    per_item: dict[str, list[float]]
    notes: list[str] = field(default_factory=list)
    aggregates: dict[str, Aggregate] = field(default_factory=dict, compare=False)


def ngram_scores(
    references: Mapping[str, Sequence[str]],
    candidates: Mapping[str, Sequence[str]],
    *,
    tokenizer: Tokenizer,
    meteor: MeteorChoice,
) -> NgramScores:
    """Score one candidate a key against one or more references a key.

    `tokenizer="ptb"` lower-cases, splits and drops punctuation on both sides (needs Java); `"none"` takes the strings
    as they are, split at spaces. Without Java all scores after the PTB tokenizer are None, with one note. ValueError
    where keys differ, where a key has no reference or not exactly one candidate, and where METEOR is demanded
    but Java is missing.
    """
    keys = _checked_keys(references, candidates)
    if tokenizer not in ("ptb", "none"):
        raise ValueError(f'tokenizer must be "ptb" or "none", not {tokenizer!r}.')
    if meteor is True and not java_available():
        raise ValueError(
            "METEOR needs Java (17 or later), which was not found; install it, or ask for meteor=False "
            '(or "auto", which reports METEOR as null with a note).'
        )
    if tokenizer == "ptb" and not java_available():
        names = [*BLEU_NAMES, *(["METEOR"] if meteor else []), "ROUGE-L", "CIDEr"]
        note = NO_TOKENIZER_NOTE.format(names=f"{', '.join(names[:-1])} and {names[-1]}")
        return NgramScores(dict.fromkeys(names), {}, [note])
    golden = {key: list(references[key]) for key in keys}
    guesses = {key: list(candidates[key]) for key in keys}
    if tokenizer == "ptb":
        golden, guesses = _tokenize_both(golden, guesses)
    return _score(golden, guesses, meteor)


def _checked_keys(references: Mapping[str, Sequence[str]], candidates: Mapping[str, Sequence[str]]) -> list[str]:
    if not references:
        raise ValueError("There is nothing to score: no references were given.")
    if references.keys() != candidates.keys():
        odd = sorted(references.keys() ^ candidates.keys())
        raise ValueError(
            f"References and candidates differ in {len(odd)} keys, for instance {odd[0]!r}; give one candidate a key."
        )
    for key in references:
        for name, texts in (("reference", references[key]), ("candidate", candidates[key])):
            if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
                raise ValueError(f"The {name}s of {key!r} must be a list of strings.")
        if not references[key]:
            raise ValueError(f"Item {key!r} has no reference; leave it out of the evaluation or add one.")
        if len(candidates[key]) != 1:
            raise ValueError(f"Item {key!r} has {len(candidates[key])} candidates; give exactly one.")
    if not any(text.strip() for texts in references.values() for text in texts):
        raise ValueError("All references are empty strings; check the annotation file.")
    return list(references)


def _tokenize_both(
    golden: dict[str, list[str]], guesses: dict[str, list[str]]
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Both sides in one run of the tokenizer, whose start-up costs more than its work."""
    texts = [text for side in (golden, guesses) for entries in side.values() for text in entries]
    tokens = iter(ptb_tokenize(texts))
    tokenized = [{key: [next(tokens) for _ in entries] for key, entries in side.items()} for side in (golden, guesses)]
    if not any(text for texts in tokenized[0].values() for text in texts):
        raise ValueError("All references are empty after tokenization; check the annotation file.")
    return tokenized[0], tokenized[1]


def _score(golden: dict[str, list[str]], guesses: dict[str, list[str]], meteor: MeteorChoice) -> NgramScores:
    notes: list[str] = []
    pending: Future[MeteorScores] | None = None
    bleu = BleuScorer(n=len(BLEU_NAMES))
    with ThreadPoolExecutor(max_workers=1) as pool:
        # METEOR runs in its own process: start it first, and score the rest meanwhile
        if meteor is True or (meteor == "auto" and java_available()):
            pending = pool.submit(meteor_scores, golden, guesses)
        for key in golden:
            bleu += (guesses[key][0], golden[key])
        bleu_corpus, bleu_items = bleu.compute_score(option="closest")
        rouge, rouge_items = Rouge().compute_score(golden, guesses)
        cider, cider_items = Cider().compute_score(golden, guesses)
    corpus: dict[str, float | None] = dict(zip(BLEU_NAMES, map(float, bleu_corpus), strict=True))
    per_item = {name: [float(value) for value in values] for name, values in zip(BLEU_NAMES, bleu_items, strict=True)}
    aggregates = bleu_aggregates(bleu)
    if pending is not None:
        corpus["METEOR"], per_item["METEOR"], counts_NS = pending.result()
        if counts_NS.shape[1] == METEOR_COLUMNS:
            aggregates["METEOR"] = meteor_aggregate(counts_NS)
    elif meteor == "auto":
        corpus["METEOR"] = None
        notes.append(NO_JAVA_NOTE)
    corpus["ROUGE-L"], per_item["ROUGE-L"] = float(rouge), [float(value) for value in rouge_items]
    corpus["CIDEr"], per_item["CIDEr"] = float(cider), [float(value) for value in cider_items]
    return NgramScores(corpus, per_item, notes, aggregates)


def simple_words(text: str) -> list[str]:
    """Lower-case words of a text without punctuation: the tokens of the cheap per-sample scores."""
    return _WORDS.findall(text.lower())


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """ROUGE-L in [0, 1] of one text against its best references, over `simple_words`; 0 for an empty text."""
    words = " ".join(simple_words(prediction))
    golden = [" ".join(simple_words(reference)) for reference in references]
    golden = [reference for reference in golden if reference]
    if not words or not golden:
        return 0.0
    return float(Rouge().calc_score([words], golden))
