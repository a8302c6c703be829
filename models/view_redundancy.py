"""Greedy choice of views that counts what the chosen ones already show.

Plain top-k picks near-copies: the views of highest utility show the same objects. Here views are chosen one after the
other, each by its marginal utility, as in maximal marginal relevance (Carbonell and Goldstein 1998):

    U(v | S) = U(v) - redundancy * std(U) * r(v | S)
    r(v | S) = sum_k q_k min(visible_vk, max_{s in S} visible_sk) / sum_k q_k visible_vk

r is the share, in [0, 1], of what v shows that the chosen views S show already, objects weighted by how well they fit
the question. Counted in the spread of the utilities, one setting serves encoders whose cosines spread differently.

Shapes: V views, K objects, C classes, D width of the encoder's space.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

# An object that fits the question worst counts exp(-2) of one that fits it best. On 862 targets of 45 generated rooms
# (seeds 700 to 744) the best of 0, 2, 3, 5, 8, if by little: at equal share of targets found, more views show them.
_SHARPNESS = 2.0


def question_weights(text_D: Tensor, class_probs_KC: Tensor, classes_CD: Tensor) -> np.ndarray:
    """Weight q [K] of each object, in (0, 1], by the cosine of its class embedding with the question's, float64."""
    if not len(class_probs_KC):
        return np.zeros(0)
    fit_K = F.cosine_similarity(class_probs_KC @ classes_CD, text_D[None], dim=1).double()
    spread = (fit_K.max() - fit_K.min()).clamp_min(1e-9)
    return torch.exp(_SHARPNESS * ((fit_K - fit_K.max()) / spread)).detach().cpu().numpy()


def already_shown(visible_VK: np.ndarray, weight_K: np.ndarray, chosen: list[int]) -> np.ndarray:
    """r [V] in [0, 1]; 0 for a view that shows nothing, and for all views before the first is chosen."""
    if not chosen:
        return np.zeros(len(visible_VK))
    shown_K = visible_VK[chosen].max(0)
    repeated_V, whole_V = np.minimum(visible_VK, shown_K) @ weight_K, visible_VK @ weight_K
    return np.where(whole_V > 0, repeated_V / np.where(whole_V > 0, whole_V, 1), 0.0)


def choose_spread(
    utility_V: np.ndarray, visible_VK: np.ndarray, weight_K: np.ndarray, *, count: int, redundancy: float
) -> tuple[list[int], np.ndarray]:
    """Choose `count` views greedily; ties in six decimals go to the lower index.

    Returns:
        The chosen views in the order of choice, and what redundancy took off each view's utility [V]: when a chosen
        view was chosen, at the end for the others. Utilities less this order the chosen views before all others,
        since what is shown only grows.
    """
    utility_V, visible_VK = np.asarray(utility_V, np.float64), np.asarray(visible_VK, np.float64)
    scale = redundancy * utility_V.std()
    chosen: list[int] = []
    left_V, taken_off_V = np.ones(len(utility_V), dtype=bool), np.zeros(len(utility_V))
    for _ in range(min(count, len(utility_V))):
        marginal_V = np.round((utility_V - taken_off_V) * 1e6)
        chosen.append(int(np.argmax(np.where(left_V, marginal_V, -np.inf))))
        left_V[chosen[-1]] = False
        taken_off_V[left_V] = scale * already_shown(visible_VK, weight_K, chosen)[left_V]
    return chosen, taken_off_V
