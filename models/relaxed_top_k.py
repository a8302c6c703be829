"""A gradient for the choice of k of V views: relaxed top-k inclusion, straight through a hard choice.

Relaxation (the LML layer of Amos, Koltun and Kolter 2019; two-class entropic optimal transport gives the same, Xie et
al. 2020): p(u) maximises <p, u> + tau * sum_v H(p_v) over 0 <= p_v <= 1, sum_v p_v = k, with H the binary entropy. So

    p_v = sigmoid((u_v - b) / tau),    b such that sum_v p_v = k,
    dp_v / du_j = (s_v [v = j] - s_v s_j / sum_i s_i) / tau,    s_v = p_v (1 - p_v).

Straight through (Bengio, Leonard and Courville 2013): the model sees the hard choice, and each chosen view's tokens x
are gated, x <- x + (g - 1) (x - c), with g = 1 + p_v - sg(p_v), sg without gradient. The value is that of x, and
dLoss/du_j = sum over chosen v of <dLoss/dx_v, x_v - c> dp_v/du_j: exactly the gradient at u' = u of the relaxed
objective Loss(g_v = 1 + p_v(u') - p_v(u)), in which a view fades to the blank c as its inclusion falls. It is a biased
estimate of how the loss of the hard choice changes: views outside of the choice are heard only through sum_v p_v = k.

c is the row's mean image token. Fading to zero would change a token's length only, which a language model's norms
divide out again: planted weights then went astray with a reader of LayerNorm blocks, though not with small Qwen2.

Shapes: V views, k chosen, T tokens of one view, D token width.
"""

from collections.abc import Sequence
from itertools import islice

import torch
from scipy.optimize import brentq
from torch import Tensor
from torch.nn import functional as F

_REGISTERS = 64  # numbers that fill registers of every kind


def soft_top_k(utility_V: Tensor, count: int, temperature: float) -> Tensor:
    """Inclusion probabilities p [V] of the relaxed top-`count`, sum `count`; first derivatives are exact.

    With no more than `count` views all are 1, without a gradient.

    Args:
        temperature: tau, in units of utility; as it goes to 0 the choice gets hard.
    """
    if temperature <= 0:
        raise ValueError(f"The temperature of the relaxed choice of views is {temperature}; it must be above 0.")
    if count >= len(utility_V):
        return torch.ones_like(utility_V)
    values_V = utility_V.detach().double().cpu() / temperature
    # at lower - shift every p is at least count / V, at upper - shift at most; a margin covers rounding
    shift = float(torch.logit(torch.tensor(count / len(values_V), dtype=torch.float64)))
    lower, upper = float(values_V.min()) - shift - 1e-6, float(values_V.max()) - shift + 1e-6
    root = float(brentq(lambda b: float(torch.sigmoid(values_V - b).sum()) - count, lower, upper, xtol=1e-13))  # type: ignore[arg-type]
    scaled_V = utility_V / temperature
    with torch.no_grad():
        p_V = torch.sigmoid(scaled_V - root)
        slope_V = p_V * (1 - p_V)
        share_V = slope_V / slope_V.sum().clamp_min(torch.finfo(slope_V.dtype).tiny)
    # implicit function theorem: b moves with the utilities as the weights `share_V` say
    threshold = root + (share_V * (scaled_V - scaled_V.detach())).sum()
    # a whole number of vector registers: what is left over another routine computes, and equals would differ in a bit
    whole = F.pad(scaled_V - threshold, (0, -len(scaled_V) % _REGISTERS))
    return torch.sigmoid(whole)[: len(scaled_V)]


def straight_through(p_V: Tensor, chosen: Sequence[int]) -> Tensor:
    """Gates [k] of the chosen views: 1 in value, the gradient of their inclusion."""
    p_k = p_V[list(chosen)]
    return 1 + (p_k - p_k.detach())


def gate_views(tokens_TD: Sequence[Tensor], gates_k: Tensor) -> list[Tensor]:
    """The tokens of one row's views, unchanged in value, with the gradient of fading each to the row's mean token.

    Args:
        tokens_TD: tokens [T, D] of each of the row's k views.
    """
    if not tokens_TD:
        return []
    exact = torch.promote_types(tokens_TD[0].dtype, torch.float32)
    blank_D = torch.cat(list(tokens_TD)).detach().to(exact).mean(0)
    gated = []
    for view_TD, gate in zip(tokens_TD, gates_k.to(exact), strict=True):
        fade_TD = (gate - 1) * (view_TD.detach().to(exact) - blank_D)
        gated.append(view_TD + fade_TD.to(view_TD.dtype))
    return gated


def gated_rows(tokens: Sequence[Tensor], gates: Sequence[Tensor] | None) -> Tensor | None:
    """The tokens of all rows' views one after the other, each view under its gate; None without views.

    Args:
        gates: [k] of each row's k views; None leaves the tokens as they are.
    """
    if not tokens:
        return None
    if gates is None:
        return torch.cat(list(tokens))
    rest = iter(tokens)
    gated = [gate_views(list(islice(rest, len(gates_k))), gates_k) for gates_k in gates]
    return torch.cat([tokens_TD for row in gated for tokens_TD in row])
