"""Ratios of policies, the correction between sampler and trainer, and the mask of cut completions, by hand."""

import math

import pytest
import torch

from threedr1.engine.ratios import correct_sampler, log_ratios, ratios


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def test_ratio_levels_by_hand():
    """Log-ratios ln 2 and ln 8 (and padding): 2 and 8; geometric mean 4; product 16."""
    logps_BT = tensor([2, 8, 1]).log()
    mask_BT = torch.tensor([[1, 1, 0]])
    old_BT = torch.zeros_like(logps_BT)
    torch.testing.assert_close(ratios(logps_BT, old_BT, mask_BT, "token"), tensor([2, 8, 1]))
    torch.testing.assert_close(ratios(logps_BT, old_BT, mask_BT, "sequence"), tensor([4, 4, 1]))
    torch.testing.assert_close(ratios(logps_BT, old_BT, mask_BT, "response"), tensor([16, 16, 1]))


def test_log_ratios_are_bounded():
    logps_BT = tensor([1000.0, -1000.0])
    assert log_ratios(logps_BT, torch.zeros_like(logps_BT), torch.ones(1, 2)).tolist() == [[20.0, -20.0]]


# --- sampler and trainer -------------------------------------------------------------------------------------------

# trainer / sampler: 0.5 and 1.2 (and padding), product 0.6; 4 and 1 and 2, product 8
RATIOS = tensor([0.5, 1.2, 99.0], [4.0, 1.0, 2.0])
MASK = torch.tensor([[1, 1, 0], [1, 1, 1]])


@pytest.mark.parametrize(
    ("kind", "factors", "capped"),
    [
        ("none", [[1, 1, 1], [1, 1, 1]], 0),
        ("token_truncate", [[0.5, 1.2, 1], [3, 1, 2]], 1),
        ("token_mask", [[0.5, 1.2, 1], [0, 1, 2]], 1),
        ("sequence_truncate", [[0.6, 0.6, 1], [3, 3, 3]], 3),
        ("sequence_mask", [[0.6, 0.6, 1], [0, 0, 0]], 3),
    ],
)
def test_correction_by_hand(kind, factors, capped):
    sampler_BT = tensor([-1.0, -2.0, -3.0], [-0.5, -0.7, -2.0])
    trainer_BT = (sampler_BT + RATIOS.log()).requires_grad_()
    with torch.no_grad():
        sampler_BT[0, 2] = float("nan")  # padding may hold anything
    got = correct_sampler(trainer_BT, sampler_BT, MASK, kind, cap=3.0)
    torch.testing.assert_close(got.factors_BT, tensor(*factors))
    assert got.capped_BT.sum() == capped and not got.factors_BT.requires_grad


def test_a_ratio_at_the_cap_stays():
    sampler_BT, trainer_BT = tensor([0.0]), tensor([math.log(2.0)])
    for kind in ("token_truncate", "token_mask", "sequence_mask"):
        assert correct_sampler(trainer_BT, sampler_BT, torch.ones(1, 1), kind, cap=trainer_BT.exp().item()) == (
            2.0,
            False,
        )


def test_corrected_samples_are_unbiased_on_six_tokens():
    """Tokens drawn from one policy and weighted by the ratio have the other's expectation, if nothing is capped."""
    trainer_V = torch.tensor([0.3, -1.0, 0.8, 0.0, 1.5, -0.4], dtype=torch.float64).log_softmax(0)
    sampler_V = torch.tensor([0.1, -0.8, 0.9, 0.2, 1.2, -0.6], dtype=torch.float64).log_softmax(0)
    values_V = torch.arange(6, dtype=torch.float64)
    for kind in ("token_truncate", "sequence_mask"):
        factors_V = correct_sampler(trainer_V[:, None], sampler_V[:, None], torch.ones(6, 1), kind, 100.0).factors_BT[
            :, 0
        ]
        torch.testing.assert_close((sampler_V.exp() * factors_V * values_V).sum(), (trainer_V.exp() * values_V).sum())


def test_unknown_correction_is_one_clear_sentence():
    with pytest.raises(ValueError, match="sampler_correction is 'off'; choose one of none, token_truncate"):
        correct_sampler(tensor([0.0]), tensor([0.0]), torch.ones(1, 1), "off", 3.0)
