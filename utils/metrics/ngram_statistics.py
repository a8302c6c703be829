"""BLEU and METEOR of a corpus as functions of sums over its items, for their bootstrap intervals.

Both are aggregates: the counts of all items are added up first, and the score is computed from the totals. The numbers
reported come from pycocoevalcap and from the METEOR jar; these functions only have to give them again.

Shapes: N items, R resamples, and 10 (BLEU) or 23 (METEOR) counts an item.
"""

import functools

import numpy as np
from pycocoevalcap.bleu.bleu_scorer import BleuScorer

from .result import Aggregate

_ORDERS = 4
# the smoothing constants of pycocoevalcap's BleuScorer
_TINY, _SMALL = 1e-15, 1e-9

# METEOR 1.5, English, its default task: parameters and weights of exact, stem, synonym and paraphrase matches
_ALPHA, _BETA, _GAMMA, _DELTA = 0.85, 0.2, 0.6, 0.75
_MODULE_WEIGHTS = np.array([1.0, 0.6, 0.8, 0.6])
METEOR_COLUMNS = 7 + 4 * len(_MODULE_WEIGHTS)


def bleu_aggregates(scorer: BleuScorer) -> dict[str, Aggregate]:
    """BLEU-1 to BLEU-4, with the closest reference length, of the items that a scorer of order 4 holds."""
    rows = []
    for item in scorer.ctest:
        length = item["testlen"]
        closest = min((abs(other - length), other) for other in item["reflen"])[1]
        rows.append([*item["correct"], *item["guess"], length, closest])
    statistics_N10 = np.array(rows, dtype=np.float64)
    return {
        f"BLEU-{order}": Aggregate(statistics_N10, functools.partial(_bleu_of_sums, order=order))
        for order in range(1, _ORDERS + 1)
    }


def _bleu_of_sums(sums_R10: np.ndarray, order: int) -> np.ndarray:
    """Geometric mean of the n-gram precisions up to `order` times the brevity penalty [R]."""
    correct, guessed = sums_R10[:, :order], sums_R10[:, _ORDERS : _ORDERS + order]
    precision = ((correct + _TINY) / (guessed + _SMALL)).prod(1) ** (1 / order)
    ratio = (sums_R10[:, -2] + _TINY) / (sums_R10[:, -1] + _SMALL)
    return precision * np.exp(1 - 1 / np.minimum(ratio, 1))


def meteor_aggregate(statistics_N23: np.ndarray) -> Aggregate:
    """METEOR of the items whose SCORE lines these are.

    Columns: words of candidate and reference; function words of both; for each kind of match the content words matched
    in both, then the function words in both; chunks; matched words of both. An item that matches as a whole, in one
    chunk, adds no chunk to the corpus.
    """
    counts = np.array(statistics_N23)
    counts[_matches_whole(counts), -3] = 0
    return Aggregate(counts, _meteor_of_sums)


def _matches_whole(sums_R23: np.ndarray) -> np.ndarray:
    """Whether all words of both sides are matched, in one chunk [R]."""
    matched_RM22 = sums_R23[:, 4:-3].reshape(len(sums_R23), -1, 2, 2)
    return (matched_RM22.sum((1, 2)) == sums_R23[:, :2]).all(1) & (sums_R23[:, -3] == 1)


def _meteor_of_sums(sums_R23: np.ndarray) -> np.ndarray:
    """METEOR's weighted F-mean of precision and recall times its fragmentation penalty [R]."""
    words_R2, functions_R2 = sums_R23[:, :2], sums_R23[:, 2:4]
    matched_RM22 = sums_R23[:, 4:-3].reshape(len(sums_R23), -1, 2, 2)
    weighted_R2 = np.einsum("rmks,m,k->rs", matched_RM22, _MODULE_WEIGHTS, [_DELTA, 1 - _DELTA])
    length_R2 = _DELTA * (words_R2 - functions_R2) + (1 - _DELTA) * functions_R2
    with np.errstate(divide="ignore", invalid="ignore"):
        precision, recall = (weighted_R2 / length_R2).T
        f_mean = 1 / ((1 - _ALPHA) / precision + _ALPHA / recall)
        fragmentation = sums_R23[:, -3] / (sums_R23[:, -2:].sum(1) / 2)
    fragmentation[_matches_whole(sums_R23)] = 0
    score = f_mean * (1 - _GAMMA * fragmentation**_BETA)
    return np.where(np.isnan(score), 0, np.maximum(score, 0))
