"""What a GRPO update runs through the model: packs in which the completions of a prompt share it.

A prompt stands in a pack once, with all that was sampled from it behind it, so a group of G completions of R tokens
costs P + G R tokens instead of G (P + R). Values and gradients are those of separate rows (models/attention.py).

Shapes: B completions of a pack, T tokens of the longest of them.
"""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch

from ..models.inputs import ModelInputs
from ..models.lm_head import token_logprobs
from ..models.packs import filled_length, plan_packs
from ..models.scene_vlm import SceneVLM
from .rollout import Rollout

Piece = tuple[int, list[int]]  # a prompt, and which of its completions


class Pack(NamedTuple):
    """Some groups, or pieces of groups, ready for the language model."""

    rows: list[tuple[int, int]]  # B: (prompt, completion)
    inputs: ModelInputs
    mask_BT: torch.Tensor  # bool: tokens of completions


def plan_groups(
    prompts: Sequence[int], completions: Sequence[Mapping[int, int]], budget: int, max_rows: int = 0
) -> list[list[Piece]]:
    """Which groups go into one pack of at most `budget` tokens; a group that is longer goes in pieces.

    Each piece has the prompt again. A completion that does not fit even alone has a pack of its own.

    Args:
        prompts: lengths.
        completions: of each prompt the lengths of those that are wanted, by number.
        max_rows: completions of a pack at most; 0: any number.
    """
    pieces: list[Piece] = []
    for prompt, lengths in enumerate(completions):
        room, its = 0, []
        for row, length in lengths.items():
            if not its or length > room or len(its) == max_rows:
                its, room = [], budget - prompts[prompt]
                pieces.append((prompt, its))
            its.append(row)
            room -= length
    lengths = [prompts[prompt] + sum(completions[prompt][row] for row in its) for prompt, its in pieces]
    packs = plan_packs(lengths, budget, max_rows, [len(its) for _, its in pieces])
    return [[pieces[piece] for piece in pack] for pack in packs]


@torch.no_grad()
def make_packs(
    model: SceneVLM, rollouts: Sequence[Rollout], kept: Sequence[Sequence[int]], budget: int, max_rows: int = 0
) -> list[Pack]:
    """Groups in packs, embedded: what lies before the language model is frozen, so once is enough for a step.

    Args:
        kept: which of each group's completions are wanted.
        budget, max_rows: of `plan_groups`.
    """
    plan = plan_groups(
        [len(rollout.row.token_ids) for rollout in rollouts],
        [{row: len(rollout.token_ids[row]) for row in its} for rollout, its in zip(rollouts, kept, strict=True)],
        budget,
        max_rows,
    )
    packs = []
    for pieces in plan:
        chosen = [rollouts[prompt] for prompt, _ in pieces]
        texts = [[rollouts[prompt].token_ids[row] for row in its] for prompt, its in pieces]
        length = sum(len(rollout.row.token_ids) for rollout in chosen) + sum(len(ids) for its in texts for ids in its)
        inputs = model.embed_rows(
            [rollout.row for rollout in chosen],
            [rollout.observation for rollout in chosen],
            [rollout.views for rollout in chosen],
            packed_length=filled_length(length, model.device),
            completions=texts,
        )
        mask_BT = completion_mask([ids for its in texts for ids in its], model.device)
        packs.append(Pack([(prompt, row) for prompt, its in pieces for row in its], inputs, mask_BT))
    return packs


def pack_logprobs(model: SceneVLM, pack: Pack, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of sampled tokens under the active adapter, and their entropies: [B, T], 0 where padded.

    Args:
        temperature: the sampling temperature; both sides of the ratio must use the same.
    """
    inputs, mask_BT = pack.inputs, pack.mask_BT
    result = model.language.at_head(
        model.hidden(inputs).flatten(0, 1)[inputs.predicting_T],
        lambda hidden_TD, weight_VD: token_logprobs(hidden_TD, weight_VD, inputs.targets_T, temperature=temperature),
    )
    assert result.entropy_T is not None
    empty_BT = torch.zeros(mask_BT.shape, device=mask_BT.device)
    return (
        empty_BT.masked_scatter(mask_BT, result.logps_T.float()),
        empty_BT.masked_scatter(mask_BT, result.entropy_T.detach().float()),
    )


def completion_mask(completions: Sequence[Sequence[float]], device: torch.device | str = "cpu") -> torch.Tensor:
    """True on the tokens of each completion: bool [B, T]."""
    lengths_B = torch.tensor([len(its) for its in completions])
    return (torch.arange(int(lengths_B.max())) < lengths_B[:, None]).to(device)


def filled(values: Sequence[Sequence[float]], device: torch.device | str = "cpu") -> torch.Tensor:
    """A number for each token of each completion, 0 behind its end: [B, T]."""
    mask_BT = completion_mask(values)
    # torch.tensor of a list takes seven times as long
    numbers_N = torch.from_numpy(np.fromiter(chain.from_iterable(values), dtype=np.float32, count=int(mask_BT.sum())))
    return torch.zeros(mask_BT.shape).masked_scatter(mask_BT, numbers_N).to(device)
