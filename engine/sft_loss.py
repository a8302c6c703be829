"""The loss of supervised fine-tuning: cross-entropy of the targets of one pack."""

from collections.abc import Sequence

import torch

from ..models.lm_head import summed_loss
from ..models.scene_vlm import SceneVLM
from .sft_data import Taught


def sft_loss(
    model: SceneVLM, taught: Sequence[Taught], *, length: int = 0, temperature: float = 0.5
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of the targets of one pack, summed over taught tokens, and each token's own, without a gradient.

    Args:
        length: tokens to fill the pack up to; 0: as many as it has.
        temperature: of the relaxed choice of views, where its weights learn.
    """
    observations = [entry.observation for entry in taught]
    inputs = model.embed_rows(
        [entry.row for entry in taught],
        observations,
        [entry.views for entry in taught],
        gates=model.view_gates([entry.sample for entry in taught], observations, temperature),
        packed_length=length,
    )
    return model.language.at_head(
        model.hidden(inputs).flatten(0, 1)[inputs.predicting_T],
        lambda hidden_TD, weight_VD: summed_loss(hidden_TD, weight_VD, inputs.targets_T),
    )
