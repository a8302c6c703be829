"""Autoregressive decoding over assembled inputs: shared prefill, sampling, kept log-probabilities.

Shapes: P prompts, G completions of each, R = P * G rows, L prompt tokens (left-padded), V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import DynamicCache

from .inputs import ModelInputs


@dataclass
class Decoded:
    """Completions in row order (the G completions of prompt 0 first), token ids without padding.

    `logps` are log-probabilities under the sampling distribution (temperature applied). A finished completion ends
    with an end token, which is included.
    """

    token_ids: list[list[int]]
    logps: list[list[float]]
    finished: list[bool]


def pick_tokens(
    logits_RV: torch.Tensor, temperature: float, uniform_R: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Next token of each row and its log-probability: greedy at temperature 0, else by inverse CDF.

    The draws come in as numbers, so that a row's sample depends on its own stream alone, not on its neighbours.
    """
    logits_RV = logits_RV.float()
    if temperature == 0:
        logps_RV = torch.log_softmax(logits_RV, dim=-1)
        token_R = logits_RV.argmax(-1)
    else:
        assert uniform_R is not None
        logps_RV = torch.log_softmax(logits_RV / temperature, dim=-1)
        # float64: in float32 the running sum over 150,000 tokens loses the small probabilities
        cdf_RV = logps_RV.double().exp().cumsum(-1)
        threshold_R1 = uniform_R.to(cdf_RV)[:, None] * cdf_RV[:, -1:]
        token_R = torch.searchsorted(cdf_RV, threshold_R1, right=True).squeeze(1).clamp(max=logits_RV.shape[-1] - 1)
    return token_R, logps_RV.gather(1, token_R[:, None]).squeeze(1)


@torch.no_grad()
def decode(
    decoder: torch.nn.Module,
    lm_head: torch.nn.Module,
    embed_tokens: torch.nn.Module,
    prompts: ModelInputs,
    *,
    eos_ids: Sequence[int],
    max_new_tokens: int,
    group_size: int = 1,
    temperature: float = 0.0,
    generators: Sequence[torch.Generator] | None = None,
    on_token: Callable[[int, int], None] | None = None,
) -> Decoded:
    """Decode `group_size` completions of every prompt.

    Each prompt is encoded once, its cache is shared out to the group, and finished rows leave the batch.

    Args:
        decoder: Qwen's text decoder.
        prompts: left-padded.
        temperature: 0 is greedy.
        generators: CPU generators, one for each of the R rows; needed where temperature > 0.
        on_token: called with (row, token id) as tokens come, for streaming.
    """
    device = prompts.inputs_embeds_BLD.device
    mask = prompts.attention_mask_BL
    if mask is None:
        raise ValueError("Packed rows cannot be decoded; assemble them padded on the left.")
    num_rows = len(prompts.inputs_embeds_BLD) * group_size
    if temperature > 0 and (generators is None or len(generators) != num_rows):
        raise ValueError(f"Sampling {num_rows} rows needs as many generators.")
    uniform_RT = (
        torch.stack([torch.rand(max_new_tokens, generator=generator, dtype=torch.float64) for generator in generators])
        if temperature > 0 and generators
        else None
    )
    cache = DynamicCache()
    hidden = decoder(
        inputs_embeds=prompts.inputs_embeds_BLD,
        attention_mask=mask,
        position_ids=prompts.position_ids_4BL,
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    logits = lm_head(hidden[:, -1]).repeat_interleave(group_size, dim=0)
    cache.batch_repeat_interleave(group_size)
    mask = mask.repeat_interleave(group_size, dim=0)
    text_position = prompts.position_ids_4BL[0].amax(-1).repeat_interleave(group_size) + 1
    rope_position = prompts.position_ids_4BL[1:].amax((0, 2)).repeat_interleave(group_size) + 1

    eos = torch.tensor(list(eos_ids), device=device)
    result = Decoded([[] for _ in range(num_rows)], [[] for _ in range(num_rows)], [False] * num_rows)
    alive = torch.arange(num_rows)
    for step in range(max_new_tokens):
        draws = uniform_RT[alive, step].to(device) if uniform_RT is not None else None
        token, logp = pick_tokens(logits, temperature, draws)
        ended = torch.isin(token, eos)
        for row, token_id, value, end in zip(
            alive.tolist(), token.tolist(), logp.tolist(), ended.tolist(), strict=True
        ):
            result.token_ids[row].append(token_id)
            result.logps[row].append(value)
            result.finished[row] = end
            if on_token:
                on_token(row, token_id)
        if bool(ended.all()) or step + 1 == max_new_tokens:
            break
        if bool(ended.any()):
            keep = torch.nonzero(~ended).squeeze(1)
            cache.batch_select_indices(keep)
            mask, token = mask[keep], token[keep]
            text_position, rope_position = text_position[keep], rope_position[keep]
            alive = alive[keep.cpu()]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        position_ids = torch.stack([text_position, rope_position, rope_position, rope_position])[..., None]
        hidden = decoder(
            inputs_embeds=embed_tokens(token)[:, None],
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        logits = lm_head(hidden[:, -1])
        text_position, rope_position = text_position + 1, rope_position + 1
    return result
