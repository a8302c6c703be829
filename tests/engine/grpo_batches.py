"""Small batches for the tests of the GRPO loss, and the loss of a batch that is cut into micro-batches."""

import torch

from threedr1.engine.grpo_loss import grpo_loss, merge_metrics
from threedr1.engine.grpo_presets import PAPER, RECOMMENDED, GrpoLossConfig

LOSS_TYPES = ["grpo", "dr_grpo", "dapo", "bnpo", "cispo", "gspo"]
CONFIGS = {kind: GrpoLossConfig(loss_type=kind, beta=0.1, kl_ratio=True) for kind in LOSS_TYPES} | {
    "paper": PAPER,
    "recommended": RECOMMENDED,
    "corrected": GrpoLossConfig(sampler_correction="token_truncate", sampler_cap=1.05),
    "corrected sequences": GrpoLossConfig(loss_type="dapo", sampler_correction="sequence_mask", sampler_cap=1.05),
}
INVARIANT = [name for name in CONFIGS if name != "bnpo"]


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def without_truncated(mask_BT, finished_B):
    """The mask without the rows that the limit cut, for which training has no rows at all."""
    return mask_BT.bool() & finished_B.bool()[:, None]


def make_batch(seed=0, rows=5, width=7):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, width + 1, (rows,), generator=generator)
    mask_BT = (torch.arange(width)[None] < lengths[:, None]).double()
    logps_BT = -torch.rand(rows, width, generator=generator, dtype=torch.float64) * 3
    noise_BT = torch.randn(rows, width, generator=generator, dtype=torch.float64) * 0.3
    ref_BT = logps_BT + torch.randn(rows, width, generator=generator, dtype=torch.float64) * 0.3
    advantages_B = torch.randn(rows, generator=generator, dtype=torch.float64)
    return logps_BT, logps_BT + noise_BT, ref_BT, advantages_B, mask_BT


def enumerate_policy():
    """A categorical policy over six tokens and its reference."""
    logits_V = torch.tensor([0.3, -1.0, 0.8, 0.0, 1.5, -0.4], dtype=torch.float64, requires_grad=True)
    ref_V = torch.tensor([1.0, 0.2, -0.7, 0.5, 0.1, -1.2], dtype=torch.float64).log_softmax(0)
    return logits_V, logits_V.log_softmax(0), ref_V


def sampler_logps(old_BT):
    """Somewhat flatter than the trainer's; ratios on both sides of 1.05."""
    return 0.9 * old_BT - 0.1


def loss_and_grad(batch, config, cut, normalizer):
    """Sum of micro-batch losses, gradient at the log-probabilities, merged metrics."""
    logps_BT, old_BT, ref_BT, advantages_B, mask_BT = batch
    logps_BT = logps_BT.clone().requires_grad_()
    sampler_BT = sampler_logps(old_BT)
    parts = [
        grpo_loss(
            logps_BT[rows],
            old_BT[rows],
            ref_BT[rows],
            advantages_B[rows],
            mask_BT[rows],
            config,
            normalizer=normalizer,
            sampler_logps_BT=sampler_BT[rows],
        )
        for rows in cut
    ]
    total = torch.stack([part.loss for part in parts]).sum()
    return total, torch.autograd.grad(total, logps_BT)[0], merge_metrics(part.metrics for part in parts)
