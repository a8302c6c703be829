"""How well a dual encoder finds things in held-out rooms: views for questions, names for crops of objects.

Shapes: V views of a room, T questions, K objects, n crops, D width of the space.
"""

from collections.abc import Sequence

import numpy as np
from scipy.stats import rankdata

from ..models.image_encoder import Encoder
from .dual_data import HINTED, SHOWN, RoomPictures, crop_window, fits, known_nouns, nouns_of, shares

_CROP_PIXELS = 400  # an object's best view must show so many, of 224 x 224


def retrieval(encoder: Encoder, rooms: Sequence[RoomPictures], nouns: Sequence[str]) -> dict[str, float]:
    """Held-out accuracy, as shares.

    `view_first`: among the views of its room, the best one for `Where is the red chair?` shows a red chair; beside it
    what a random view does. `view_auc`: a view that shows it ranks above one that does not. `crop_first`, `crop_five`:
    the right name of an object's crop stands first, or among five, of all `nouns`.
    """
    known = known_nouns([entry.room for entry in rooms])
    firsts, chances, areas, crops = [], [], [], []
    nouns = list(nouns)
    nouns_ND = encoder.embed_texts(nouns).cpu().numpy()
    for entry in rooms:
        views_VD = encoder.embed_images(list(entry.images_VSS3)).cpu().numpy()
        share_VK = np.stack([shares(owner_SS, len(entry.room.objects)) for owner_SS in entry.owners_VSS])
        for score_V, truth_V in _asked(encoder, entry, known, views_VD, share_VK):
            firsts.append(truth_V[score_V.argmax()] == 1)
            chances.append(truth_V.mean())
            areas.append(area_under_curve(score_V, truth_V))
        crops += _crops(encoder, entry, known, share_VK, nouns, nouns_ND)
    ranks = np.array(crops)
    return {
        "questions": len(firsts),
        "view_first": float(np.mean(firsts)),
        "view_first_by_chance": float(np.mean(chances)),
        "view_auc": float(np.mean(areas)),
        "crops": len(ranks),
        "nouns": len(nouns),
        "crop_first": float((ranks < 1).mean()),
        "crop_five": float((ranks < 5).mean()),
    }


def area_under_curve(score_N: np.ndarray, truth_N: np.ndarray) -> float:
    """Chance that a true row scores above a false one, ties counting half; both kinds must be there."""
    true_N = truth_N.astype(bool)
    count = int(true_N.sum())
    ranks = rankdata(score_N)[true_N].sum() - count * (count + 1) / 2
    return float(ranks / (count * (len(true_N) - count)))


def _asked(encoder: Encoder, entry: RoomPictures, known: frozenset[str], views_VD: np.ndarray, share_VK: np.ndarray):
    """Scores and truth [V] of every `Where is the …?` that some view answers and some does not."""
    objects = entry.room.objects
    keys = sorted({(thing.label, thing.color) for thing in objects})
    texts_TD = encoder.embed_texts([f"Where is the {color} {label}?" for label, color in keys]).cpu().numpy()
    for text_D, key in zip(texts_TD, keys, strict=True):
        of_K = np.array([fits(thing, key, known) for thing in objects])
        most_V = share_VK[:, of_K].max(1)
        clear_V = (most_V >= SHOWN) | (most_V < HINTED)
        truth_V = most_V[clear_V] >= SHOWN
        if 0 < truth_V.sum() < len(truth_V):
            yield views_VD[clear_V] @ text_D, truth_V


def _crops(
    encoder: Encoder,
    entry: RoomPictures,
    known: frozenset[str],
    share_VK: np.ndarray,
    nouns: list[str],
    nouns_ND: np.ndarray,
) -> list[int]:
    """Rank of the best right noun of every object's crop, from the view that shows most of the object."""
    pictures, right = [], []
    for column, thing in enumerate(entry.room.objects):
        view = int(share_VK[:, column].argmax())
        owner_SS = entry.owners_VSS[view]
        if (owner_SS == column).sum() >= _CROP_PIXELS:
            rows, columns = crop_window(owner_SS == column)
            pictures.append(entry.images_VSS3[view][rows, columns])
            right.append([row for row, noun in enumerate(nouns) if noun in nouns_of(thing, known)])
    if not pictures:
        return []
    score_nN = encoder.embed_images(pictures).cpu().numpy() @ nouns_ND.T
    ranks = (-score_nN).argsort(1).argsort(1)
    return [int(rank_N[rows].min()) for rank_N, rows in zip(ranks, right, strict=True) if rows]
