"""Scoring 10,000 answers with all n-gram metrics but SPICE, beside pycocoevalcap itself on the same texts.

Ours is `score_predictions("qa", …, "scanqa")`: BLEU, METEOR, ROUGE-L, CIDEr and exact match after the PTB tokenizer,
with confidence intervals and per-sample scores besides. The peer is pycocoevalcap's tokenizer and scorers in its own
order, with one METEOR process kept for all calls, as ours keeps its own; so METEOR's start is timed on neither side,
the tokenizer's on both. The scores agree, which is checked.
"""

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from ..utils.metrics.java import java_available
from ..utils.metrics.score import score_predictions
from ..utils.predictions import Prediction
from ._arguments import measuring_parser, positive
from ._measure import Load, median_seconds, report
from .results import Row

PEER = "pycocoevalcap"
COLOURS = ("black", "white", "brown", "dark blue", "grey", "wooden")
THINGS = ("chair", "office chair", "desk", "coffee table", "cabinet", "window", "monitor", "couch", "trash can")
PLACES = (
    "left of the",
    "right of the",
    "in front of the",
    "next to the",
    "under the",
    "on top of the",
    "far from the",
)


def random_predictions(count: int, seed: int = 0) -> list[Prediction]:
    """Answers of 4 to 20 words with one to three references each, made of a room's words."""
    rng = np.random.default_rng(seed)

    def choose(words: Sequence[str]) -> str:
        return words[int(rng.integers(len(words)))]

    def sentence() -> str:
        parts = [f"The {choose(COLOURS)} {choose(THINGS)}"]
        for _ in range(rng.integers(1, 4)):
            parts.append(f"{choose(PLACES)} {choose(COLOURS)} {choose(THINGS)}")
        return " ".join(parts) + "."

    rows = []
    for number in range(count):
        references = [sentence() for _ in range(rng.integers(1, 4))]
        answer = references[0] if rng.random() < 0.2 else sentence()
        rows.append(
            Prediction(
                sample_id=f"q{number}",
                task="qa",
                scene_id="scene0000_00",
                question=f"What is it? {number}",
                text=answer,
                answer=answer,
                references=references,
            )
        )
    return rows


def by_pycocoevalcap(predictions: Sequence[Prediction], meteor: Meteor) -> dict[str, float]:
    """The corpus scores, percent, by pycocoevalcap alone."""
    golden = {entry.sample_id: [{"caption": text} for text in entry.references] for entry in predictions}
    guesses = {entry.sample_id: [{"caption": entry.answer}] for entry in predictions}
    tokenizer = PTBTokenizer()
    golden, guesses = tokenizer.tokenize(golden), tokenizer.tokenize(guesses)
    bleu = Bleu(4).compute_score(golden, guesses, verbose=0)[0]
    scores = {f"BLEU-{order}": value for order, value in enumerate(bleu, 1)}
    scores["METEOR"] = meteor.compute_score(golden, guesses)[0]
    scores["ROUGE-L"] = Rouge().compute_score(golden, guesses)[0]
    scores["CIDEr"] = Cider().compute_score(golden, guesses)[0]
    return {name: 100 * float(value) for name, value in scores.items()}


@contextlib.contextmanager
def running_meteor() -> Iterator[Meteor]:
    """pycocoevalcap's METEOR, whose Java process it leaves to its caller to end."""
    meteor = Meteor()
    try:
        yield meteor
    finally:
        meteor.meteor_p.kill()
        meteor.meteor_p.communicate()  # closes the pipes


def measure(count: int, repeats: int, meteor: Meteor) -> Row:
    """Seconds for so many answers. ValueError where the scores disagree."""
    predictions = random_predictions(count)

    def ours() -> dict[str, float]:
        return score_predictions("qa", predictions, "scanqa", meteor=True)["metrics"]

    def peer() -> dict[str, float]:
        return by_pycocoevalcap(predictions, meteor)

    mine, theirs = ours(), peer()
    for name, value in theirs.items():
        if abs(mine[name] - value) > 1e-6:
            raise ValueError(f"{name} is {mine[name]}, by pycocoevalcap {value}; not measured.")
    seconds, plain = median_seconds((ours, peer), repeats)
    note = "BLEU, METEOR, ROUGE-L, CIDEr; ours adds exact match, intervals and per-sample scores"
    return Row(f"score.seconds_{count}", seconds, "s", PEER, plain, note=note)


def main(argv: Sequence[str] = ()) -> int:
    """Print a table; the exit status says whether ours is no slower."""
    parser = measuring_parser("score", __doc__, repeats=3, cuda=False)
    parser.add_argument("--predictions", type=positive, default=10_000, metavar="N", help="default: %(default)s")
    arguments = parser.parse_args(list(argv))
    if not java_available():
        raise ValueError("METEOR and the PTB tokenizer need Java (17 or later), which was not found; install it.")
    load = Load(arguments)
    with running_meteor() as meteor:
        row = measure(arguments.predictions, arguments.repeats, meteor)
    report("score", [row], arguments, load, argv=argv, packages=("pycocoevalcap", "numpy"))
    return 0 if row.ratio is not None and row.ratio >= 1 else 1
