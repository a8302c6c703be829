"""Rollouts: completions of prompts, in batches, with every row's own random stream.

One path serves GRPO's sampling (a group of completions for each prompt) and evaluation's greedy answers.

Shapes: G completions of a prompt.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..datasets.scene import Sample
from ..models.inputs import Row
from ..models.observation import Observation
from ..models.scene_vlm import SceneVLM


class Prompt(NamedTuple):
    """A question as the model is asked it."""

    sample: Sample
    observation: Observation
    row: Row
    views: list[int]
    mode: str  # response mode that is asked for, "think" or "direct"


@dataclass
class Rollout:
    """One prompt with its completions."""

    sample: Sample
    observation: Observation
    row: Row  # the prompt's tokens
    views: list[int]
    mode: str  # response mode that was asked for
    texts: list[str]  # G, end tokens left out
    token_ids: list[list[int]]  # G, the end token of finished completions included
    logps: list[list[float]]  # G, under the sampling distribution
    finished: list[bool]  # G, False where max_new_tokens cut it


@torch.no_grad()
def write_prompts(
    model: SceneVLM, samples: Sequence[Sample], observations: Sequence[Observation], modes: Sequence[str]
) -> list[Prompt]:
    """Samples as prompts, their views chosen.

    Args:
        observations: the samples' scenes, encoded.
        modes: response mode of each sample, "think" or "direct".
    """
    model.expect(samples)
    return [
        Prompt(sample, observation, *model.write_row(sample, observation, mode, None), mode)
        for sample, observation, mode in zip(samples, observations, modes, strict=True)
    ]


@torch.no_grad()
def roll_out(
    model: SceneVLM,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    group_size: int = 1,
    temperature: float = 0.0,
    generators: Sequence[torch.Generator] | None = None,
    batch_size: int = 64,
    token_budget: int = 0,
    on_batch: Callable[[int], object] | None = None,
    on_token: Callable[[int, int], None] | None = None,
) -> list[Rollout]:
    """Decode `group_size` completions of every prompt.

    Args:
        generators: one for each completion, group by group; a row's tokens depend on its own stream alone, so but for
            rounding the result is the same however rows are batched.
        batch_size: completions decoded together at most, in whole groups, at least one.
        token_budget: tokens at most whose keys and values are kept together: of prompts and of their completions at
            their longest; 0: any number. A prompt that has more is decoded by itself.
        on_batch: called with the number of prompts done in each batch.
        on_token: called with (number of the completion, token id) as tokens come; completions are numbered group by
            group.
    """
    was_training = model.training
    if was_training or model.language.training:  # to tell thousands of modules again takes some tokens' time
        model.eval()
    # Prompts of like length share a batch: where they are padded, it is less.
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index].row.token_ids))
    results: dict[int, Rollout] = {}
    needs = [len(prompts[index].row.token_ids) + group_size * max_new_tokens for index in order]
    for places in cut_batches(needs, max(1, batch_size // group_size), token_budget):
        batch = [order[place] for place in places]
        chosen = [prompts[index] for index in batch]
        inputs = model.embed_rows(
            [prompt.row for prompt in chosen],
            [prompt.observation for prompt in chosen],
            [prompt.views for prompt in chosen],
            packed_length=0,
        )
        numbers = [index * group_size + g for index in batch for g in range(group_size)]
        tell = None if on_token is None else _by_number(on_token, numbers)
        decoded = model.decoder(
            inputs,
            [len(prompt.row.token_ids) for prompt in chosen],
            max_new_tokens=max_new_tokens,
            group_size=group_size,
            temperature=temperature,
            generators=[generators[number] for number in numbers] if generators else None,
            on_token=tell,
        )
        texts = [model.language.decode(token_ids) for token_ids in decoded.token_ids]
        for place, index in enumerate(batch):
            rows = slice(place * group_size, (place + 1) * group_size)
            results[index] = Rollout(
                *prompts[index],
                texts=texts[rows],
                token_ids=decoded.token_ids[rows],
                logps=decoded.logps[rows],
                finished=decoded.finished[rows],
            )
        if on_batch:
            on_batch(len(batch))
    if was_training:
        model.train()
    return [results[index] for index in range(len(prompts))]


def cut_batches(needs: Sequence[int], most: int, budget: int = 0) -> list[range]:
    """Neighbours in batches of at most `most`, that need at most `budget` together (0: any number) or are alone."""
    batches, start, total = [], 0, 0
    for place, need in enumerate(needs):
        if place > start and (place - start == most or (budget and total + need > budget)):
            batches.append(range(start, place))
            start, total = place, 0
        total += need
    return [*batches, range(start, len(needs))] if len(needs) else []


def _by_number(on_token: Callable[[int, int], None], numbers: Sequence[int]) -> Callable[[int, int], None]:
    """`on_token` for the rows of one batch, which have these numbers among all completions."""
    return lambda row, token: on_token(numbers[row], token)
