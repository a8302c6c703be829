"""Rollouts: completions of prompts, in batches, with every row's own random stream.

One path serves GRPO's sampling (a group of completions for each prompt) and evaluation's greedy answers.

Shapes: G completions of a prompt.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from ..datasets.scene import Sample
from ..models.inputs import TEXT, Row
from ..models.observation import Observation
from ..models.scene_vlm import SceneVLM


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
def roll_out(
    model: SceneVLM,
    samples: Sequence[Sample],
    observations: Sequence[Observation],
    modes: Sequence[str],
    *,
    max_new_tokens: int,
    group_size: int = 1,
    temperature: float = 0.0,
    generators: Sequence[torch.Generator] | None = None,
    batch_size: int = 64,
    on_batch: Callable[[int], object] | None = None,
) -> list[Rollout]:
    """Decode `group_size` completions for every sample.

    Args:
        observations: the samples' scenes, encoded.
        modes: response mode of each sample, "think" or "direct".
        generators: one for each completion, group by group; a row's tokens depend on its own stream alone, so the
            result is the same however rows are batched.
        batch_size: completions decoded together.
        on_batch: called with the number of prompts done in each batch.
    """
    was_training = model.training
    model.eval()
    language = model.language
    model.expect(samples)
    written = [
        model.write_row(sample, observation, mode, None)
        for sample, observation, mode in zip(samples, observations, modes, strict=True)
    ]
    # Prompts of like length share a batch: where they are padded, it is less.
    order = sorted(range(len(samples)), key=lambda index: len(written[index][0].token_ids))
    results: list[Rollout | None] = [None] * len(samples)
    prompts_per_batch = max(1, batch_size // group_size)
    for start in range(0, len(order), prompts_per_batch):
        batch = order[start : start + prompts_per_batch]
        prompts = model.embed_rows(
            [written[index][0] for index in batch],
            [observations[index] for index in batch],
            [written[index][1] for index in batch],
            packed_length=0,
        )
        decoded = model.decoder(
            prompts,
            [len(written[index][0].token_ids) for index in batch],
            max_new_tokens=max_new_tokens,
            group_size=group_size,
            temperature=temperature,
            generators=[generators[index * group_size + g] for index in batch for g in range(group_size)]
            if generators
            else None,
        )
        texts = [language.decode(token_ids) for token_ids in decoded.token_ids]
        for place, index in enumerate(batch):
            rows = slice(place * group_size, (place + 1) * group_size)
            results[index] = Rollout(
                samples[index],
                observations[index],
                *written[index],
                mode=modes[index],
                texts=texts[rows],
                token_ids=decoded.token_ids[rows],
                logps=decoded.logps[rows],
                finished=decoded.finished[rows],
            )
        if on_batch:
            on_batch(len(batch))
    model.train(was_training)
    return [result for result in results if result is not None]


def completion_row(prompt: Row, token_ids: Sequence[int]) -> Row:
    """The prompt followed by a completion, taught in full: a row for log-probabilities."""
    return replace(
        prompt,
        token_ids=[*prompt.token_ids, *token_ids],
        kinds=[*prompt.kinds, *[TEXT] * len(token_ids)],
        labels=[*prompt.labels, *token_ids],
    )
