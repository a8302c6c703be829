"""Object captioning by CLIP: how near a caption is to its object's picture, and whether it is found by it.

The embeddings come by argument; name the CLIP model beside the numbers, which are worth little without it.
Shapes: N objects, D embedding.
"""

from collections.abc import Sequence

import numpy as np

from .result import Scores, mean

RECALL_AT = (1, 5, 10)
_TIE = 1e-9  # two equal captions may differ by rounding
_CHUNK = 1024


def clip_scores(captions_ND: np.ndarray, images_ND: np.ndarray, *, recall_at: Sequence[int] = RECALL_AT) -> Scores:
    """CLIP similarity and retrieval recall in percent.

    `CLIP` is the mean of 100 x the cosine of row i with row i. `R@k` is the share of images whose own caption is among
    the k nearest of the N captions of the evaluated set; captions that are as near count against it. R@k is null
    where k > N, since it could not be missed.

    Raises:
        ValueError: shapes that differ, no row, or a row that has no direction (zero or not finite).
    """
    captions, images = np.asarray(captions_ND, dtype=np.float64), np.asarray(images_ND, dtype=np.float64)
    if captions.ndim != 2 or captions.shape != images.shape or not len(captions):
        raise ValueError(
            f"CLIP scores need captions and images of one shape [N, D] with N of at least 1, got "
            f"{list(captions.shape)} and {list(images.shape)}."
        )
    captions, images = _directions(captions, "caption"), _directions(images, "image")
    similarity_N = (captions * images).sum(1)
    rank_N = _ranks(captions, images, similarity_N)
    per_item = {"CLIP": similarity_N.tolist()}
    metrics: dict[str, float | None] = {"CLIP": 100 * mean(per_item["CLIP"])}
    notes = []
    for k in recall_at:
        name = f"R@{k}"
        if k > len(captions):
            metrics[name] = None
            notes.append(f"{name} is null: there are only {len(captions)} objects.")
            continue
        per_item[name] = (rank_N <= k).astype(float).tolist()
        metrics[name] = 100 * mean(per_item[name])
    return Scores("percent", len(captions), metrics, per_item, {"objects": len(captions)}, notes)


def _directions(rows_ND: np.ndarray, name: str) -> np.ndarray:
    length_N = np.linalg.norm(rows_ND, axis=1)
    wrong = np.flatnonzero(~np.isfinite(length_N) | (length_N == 0))
    if len(wrong):
        raise ValueError(f"The embedding of {name} {wrong[0]} is zero or not finite; embed it again.")
    return rows_ND / length_N[:, None]


def _ranks(captions_ND: np.ndarray, images_ND: np.ndarray, similarity_N: np.ndarray) -> np.ndarray:
    """Rank [N], from 1, of each image's own caption among all captions; ties come before it."""
    ranks = []
    for start in range(0, len(captions_ND), _CHUNK):
        part = slice(start, start + _CHUNK)
        # the own caption is among those counted, so that ranks begin with 1
        near_MN = images_ND[part] @ captions_ND.T >= similarity_N[part, None] - _TIE
        ranks.append(near_MN.sum(1))
    return np.concatenate(ranks)
