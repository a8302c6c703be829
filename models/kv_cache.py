"""Keys and values of decoding: those of each prompt once, and for each row those of what it has said since.

All rows that go on from one prompt read its keys together, as one block of queries: with long prompts these are nearly
all that a step reads. Each row's own keys are read by that row. The two attentions are merged by their log-sum-exps,
which is exact (Hydragen, arXiv 2402.05099, section 3.1).

Both are plain products over padded prompts; or, on CUDA in half precision, torch's flash kernel, where nothing that a
step does depends on what the host knows, so that it can be captured as a CUDA graph. THREEDR1_DECODING=flash says so.

Shapes: N prompts, P tokens of the longest (packed: of all), R rows, S tokens that a row may say, L tokens of a packed
row; H query heads, G key and value heads, M = H / G query heads of one, E width of a head; Q rows of the prompt that
has most.
"""

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from .attention import Documents, uses_kernel
from .block_parts import compiled_on_gpu

_TILE = 128  # queries of a document that the kernel takes at once
_ROOM = 4096  # tokens: the buffer of prompts comes in multiples, so that it is seldom made again


@compiled_on_gpu
def merge_attention(first_RHE: Tensor, first_lse_RH: Tensor, second_RHE: Tensor, second_lse_RH: Tensor) -> Tensor:
    """What attention over two sets of keys together gives, from what it gave over each and their log-sum-exps."""
    lse_RH = torch.logaddexp(first_lse_RH, second_lse_RH)
    first_RH1 = torch.exp(first_lse_RH - lse_RH)[..., None]
    second_RH1 = torch.exp(second_lse_RH - lse_RH)[..., None]
    return (first_RHE * first_RH1 + second_RHE * second_RH1).to(first_RHE.dtype)


class KVCache:
    """Keys and values of one batch of prompts and rows. Its buffers stay where they are while they are large enough.

    Use: `start` a batch, run its prompts with what `prefill` gives as how they attend, say by `set_rows` which prompt
    each row goes on from; then for each token `advance`, and run the rows' tokens with the cache as how they attend.

    Args:
        layers, heads, kv_heads, width: of the decoder: its blocks, H, G and E.
    """

    def __init__(
        self, layers: int, heads: int, kv_heads: int, width: int, *, dtype: torch.dtype, device: torch.device
    ):
        self.layers, self.heads, self.kv_heads, self.width = layers, heads, kv_heads, width
        self.dtype, self.device = dtype, device
        self.lengths: list[int] = []  # of the batch's prompts
        self.prompt_of: list[int] = []  # of each row
        self.room = (0, 0)  # rows, and tokens that a row may say
        self.prompts = self.empty(0, kv_heads)  # keys and values, of each layer, packed: [2, layers, P, G, E]
        self._steps = _FlashSteps(self) if _takes_flash(self.prompts) else _PlainSteps(self)
        self.said = self._steps.empty_said(0, 0)

    def empty(self, *shape: int) -> Tensor:
        """An empty buffer [2, layers, …, E] of keys and values."""
        return torch.empty(2, self.layers, *shape, self.width, dtype=self.dtype, device=self.device)

    @property
    def fits_graphs(self) -> bool:
        """Whether steps may be captured as CUDA graphs."""
        return self._steps.fits_graphs

    @property
    def fixed(self) -> tuple[int, ...]:
        """What a graph of a step knows of the batch besides the number of rows."""
        return self._steps.fixed

    def start(self, prompt_lengths: Sequence[int], num_rows: int, num_tokens: int) -> bool:
        """Make room for a batch: prompts of these lengths, and rows of so many tokens at most.

        Returns:
            whether buffers moved, so that graphs are of no more use.
        """
        self.lengths = list(prompt_lengths)
        have_P, (have_R, have_S) = self.prompts.shape[2], self.room
        need_P = _ROOM * -(-sum(self.lengths) // _ROOM) if self.fits_graphs else sum(self.lengths)
        moved = need_P > have_P or num_rows > have_R or num_tokens > have_S
        if need_P > have_P:
            self.prompts = self.empty(0, self.kv_heads)  # the old is gone before the new is made
            self.prompts = self.empty(need_P, self.kv_heads)
        if num_rows > have_R or num_tokens > have_S:
            self.room = max(num_rows, have_R), max(num_tokens, have_S)
            self.said = self._steps.empty_said(0, 0)
            self.said = self._steps.empty_said(*self.room)
        if moved:
            self._steps.reserve()
        return moved

    def prefill(self, documents: Documents, start: int) -> "Prefill":
        """How some of the prompts attend; `start`: where their tokens begin among those of all prompts."""
        return Prefill(self, documents, start)

    def set_rows(self, prompt_of_R: Sequence[int]) -> None:
        """The rows, those of a prompt one after the other, once all prompts have been run."""
        self.prompt_of = list(prompt_of_R)
        self._steps.take_prompts()
        self._steps.take_rows()

    def keep(self, rows: Sequence[int]) -> None:
        """Only these rows go on; they keep their order."""
        at = torch.tensor(rows, device=self.device)
        for said in self.said.flatten(0, 1):  # one by one, for the copy to be small
            said[: len(rows)] = said.index_select(0, at)
        self.prompt_of = [self.prompt_of[row] for row in rows]
        self._steps.take_rows()

    def advance(self, place: int) -> None:
        """Each row's next token is its number `place`, counted from 0."""
        self._steps.advance(place)

    def attend(self, layer: int, query_RHE: Tensor, key_RGE: Tensor, value_RGE: Tensor, scale: float) -> Tensor:
        """Keep each row's key and value; its attention to its prompt, to what it has said, and to itself."""
        return self._steps.attend(layer, query_RHE, key_RGE, value_RGE, scale)


class Prefill:
    """Prompts that attend each to itself, their keys and values kept."""

    def __init__(self, cache: KVCache, documents: Documents, start: int):
        self.cache, self.documents, self.start = cache, documents, start

    def attend(self, layer: int, query_LHE: Tensor, key_LGE: Tensor, value_LGE: Tensor, scale: float) -> Tensor:
        here = slice(self.start, self.start + len(key_LGE))
        self.cache.prompts[0, layer, here] = key_LGE
        self.cache.prompts[1, layer, here] = value_LGE
        return self.documents.attend(layer, query_LHE, key_LGE, value_LGE, scale)


class _PlainSteps:
    """Steps by plain products. Prompts are padded to the longest; their rows stand in slots, as many for each."""

    fits_graphs = False
    fixed = ()

    def __init__(self, cache: KVCache):
        self.cache = cache
        self.place = 0

    def empty_said(self, rows: int, tokens: int) -> Tensor:
        """What rows have said: [2, layers, R, G, S, E], as the products take it."""
        return self.cache.empty(rows, self.cache.kv_heads, tokens)

    def reserve(self) -> None:
        pass

    def take_prompts(self) -> None:
        cache = self.cache
        lengths = cache.lengths
        starts_N1 = torch.tensor([0, *lengths[:-1]], device=cache.device).cumsum(0)[:, None]
        place_P = torch.arange(max(lengths), device=cache.device)
        outside_NP = place_P >= torch.tensor(lengths, device=cache.device)[:, None]
        at_NP = (starts_N1 + place_P).masked_fill(outside_NP, 0)
        self.padded = cache.prompts[:, :, at_NP].transpose(3, 4).contiguous()  # [2, layers, N, G, P, E]
        self.mask_N11P = torch.zeros_like(outside_NP, dtype=torch.float32).masked_fill(outside_NP, float("-inf"))
        self.mask_N11P = self.mask_N11P[:, None, None]

    def take_rows(self) -> None:
        rows_of: list[list[int]] = [[] for _ in self.cache.lengths]
        for row, its in enumerate(self.cache.prompt_of):
            rows_of[its].append(row)
        most = max(map(len, rows_of))
        filled = [[*rows, *[0] * (most - len(rows))] for rows in rows_of]
        slots = [(prompt, slot) for prompt, rows in enumerate(rows_of) for slot in range(len(rows))]
        self.row_in_NQ = torch.tensor(filled, device=self.cache.device)
        self.slot_of_2R = torch.tensor(slots, device=self.cache.device).T

    def advance(self, place: int) -> None:
        self.place = place

    def attend(self, layer: int, query_RHE: Tensor, key_RGE: Tensor, value_RGE: Tensor, scale: float) -> Tensor:
        rows, said = len(query_RHE), self.cache.said[:, layer]
        said[0, :rows, :, self.place] = key_RGE
        said[1, :rows, :, self.place] = value_RGE
        query_RGME = query_RHE.unflatten(1, (key_RGE.shape[1], -1))

        query_NGQME = query_RGME[self.row_in_NQ].transpose(1, 2)
        shape = query_NGQME.shape[2:4]
        keys, values = self.padded[:, layer]
        prompt, prompt_lse = _attention(query_NGQME.flatten(2, 3), keys, values, scale, self.mask_N11P)
        prompt_NGQME, prompt_lse_NGQM = prompt.unflatten(2, shape), prompt_lse.unflatten(2, shape)
        prompt, slot = self.slot_of_2R
        keys, values = said[:, :rows, :, : self.place + 1]
        own_RGME, own_lse_RGM = _attention(query_RGME, keys, values, scale)
        return merge_attention(
            prompt_NGQME[prompt, :, slot].flatten(1, 2),
            prompt_lse_NGQM[prompt, :, slot].flatten(1, 2),
            own_RGME.flatten(1, 2),
            own_lse_RGM.flatten(1, 2),
        )


def _attention(
    query_BGQE: Tensor, keys_BGKE: Tensor, values_BGKE: Tensor, scale: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention [B, G, Q, E] and its log-sum-exps [B, G, Q], in float32 or better."""
    scores_BGQK = query_BGQE @ keys_BGKE.transpose(2, 3)
    scores_BGQK = scores_BGQK.to(torch.promote_types(scores_BGQK.dtype, torch.float32)) * scale
    if mask is not None:
        scores_BGQK = scores_BGQK + mask
    out_BGQE = torch.softmax(scores_BGQK, -1).to(values_BGKE.dtype) @ values_BGKE
    return out_BGQE, torch.logsumexp(scores_BGQK, -1)


class _FlashSteps:
    """Steps by torch's flash kernel over packed keys, the query heads of one key head folded into the queries.

    What differs between batches of one size, and between steps, is in buffers on the device that stay where they are.
    """

    fits_graphs = True

    def __init__(self, cache: KVCache):
        self.cache = cache
        self.fold = cache.heads // cache.kv_heads
        self.most = 0

    @property
    def fixed(self) -> tuple[int, ...]:
        return (self.most,)

    def empty_said(self, rows: int, tokens: int) -> Tensor:
        """What rows have said: [2, layers, R, S, G, E], as the kernel takes it."""
        return self.cache.empty(rows, tokens, self.cache.kv_heads)

    def reserve(self) -> None:
        rows, tokens = self.cache.room
        device = self.cache.device
        self.place = torch.zeros((), dtype=torch.long, device=device)
        self.used_R = torch.zeros(rows, dtype=torch.int32, device=device)
        # of rows, each a document; of prompts, of which there are as many as rows at most, those left over being empty
        self.first_R = torch.arange(rows, device=device) * tokens
        counted = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self.row_starts, self.said_starts = counted * self.fold, counted * tokens
        self.group_starts, self.prompt_starts = torch.zeros_like(counted), torch.zeros_like(counted)

    def take_prompts(self) -> None:
        lengths, prompt_of = self.cache.lengths, self.cache.prompt_of
        self.prompt_starts.copy_(_starts(lengths, len(self.prompt_starts) - 1))
        # What the host tells the kernel is coarse, and stays as it is when rows leave: a graph knows it.
        most = self.fold * max(prompt_of.count(prompt) for prompt in range(len(lengths)))
        self.most = _TILE * -(-most // _TILE)

    def take_rows(self) -> None:
        prompt_of = self.cache.prompt_of
        counts = [self.fold * prompt_of.count(prompt) for prompt in range(len(self.cache.lengths))]
        self.group_starts.copy_(_starts(counts, len(self.group_starts) - 1))

    def advance(self, place: int) -> None:
        self.place.fill_(place)
        self.used_R.fill_(place + 1)

    def attend(self, layer: int, query_RHE: Tensor, key_RGE: Tensor, value_RGE: Tensor, scale: float) -> Tensor:
        rows, (keys, values) = len(query_RHE), self.cache.prompts[:, layer]
        own_keys, own_values = self.cache.said[:, layer].flatten(1, 2)
        at_R = self.first_R[:rows] + self.place
        own_keys.index_copy_(0, at_R, key_RGE)
        own_values.index_copy_(0, at_R, value_RGE)
        # [R M, G, E]
        query = query_RHE.unflatten(1, (-1, self.fold)).transpose(1, 2).flatten(0, 1)
        prompt, prompt_lse = self._flash(
            query, keys, values, self.group_starts, self.prompt_starts, self.most, len(keys), scale, None
        )
        own, own_lse = self._flash(
            query,
            own_keys,
            own_values,
            self.row_starts[: rows + 1],
            self.said_starts[: rows + 1],
            self.fold,
            self.cache.room[1],
            scale,
            self.used_R[:rows],
        )
        merged = merge_attention(prompt, prompt_lse.T, own, own_lse.T)
        return merged.unflatten(0, (rows, self.fold)).transpose(1, 2).flatten(1, 2)

    @staticmethod
    def _flash(
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        query_starts: Tensor,
        key_starts: Tensor,
        most: int,
        longest: int,
        scale: float,
        used: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Attention of documents to other documents, none of it causal: [R M, G, E] and log-sum-exps [G, R M]."""
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            query,
            keys,
            values,
            query_starts,
            key_starts,
            most,
            longest,
            0.0,  # no dropout
            False,  # not causal
            False,  # no mask for debugging
            scale=scale,
            seqused_k=used,
        )
        return out, lse


def _takes_flash(like: Tensor) -> bool:
    choice = os.environ.get("THREEDR1_DECODING", "plain")
    if choice not in ("plain", "flash"):
        raise ValueError(f"THREEDR1_DECODING={choice} is not known; set it to plain or flash, or unset it.")
    return choice == "flash" and uses_kernel(like)


def _starts(lengths: Sequence[int], room: int) -> Tensor:
    """Where documents of these lengths begin, and empty ones behind them: int32 [room + 1]."""
    filled = torch.tensor([0, *lengths, *[0] * (room - len(lengths))])
    return filled.cumsum(0).to(torch.int32)
