"""Keys and values of decoding on a CPU, of rows that share no prompt: what a row says stands right behind its prompt.

The answers to questions are such rows. All prompts end at one column, so that one call of torch's attention a layer
reads every key where it is; what stands before a shorter prompt is masked. For rows that share prompts, and on a GPU,
there is `kv_cache.py`, whose results these are to rounding.

Shapes: R rows, K tokens of the longest prompt and of what a row may say behind it, L tokens of packed prompts; H query
heads, G key and value heads, M = H / G query heads of one, E width of a head.
"""

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import Documents
from .kv_cache import Prefill


class RowCache:
    """Used as a `KVCache` is. Its buffer serves batches of any shape that it is large enough for.

    Args:
        layers, heads, kv_heads, width: of the decoder: its blocks, H, G and E.
    """

    fits_graphs = False  # whether steps may be captured as CUDA graphs
    fixed: tuple[int, ...] = ()  # what such a graph would know of the batch

    def __init__(
        self, layers: int, heads: int, kv_heads: int, width: int, *, dtype: torch.dtype, device: torch.device
    ):
        assert heads % kv_heads == 0
        self.layers, self.kv_heads, self.width = layers, kv_heads, width
        self.dtype, self.device = dtype, device
        self.room = (0, 0)  # rows, and tokens that a row may say
        self._buffer = torch.empty(0, dtype=dtype, device=device)
        self._starts: list[int] = []  # of each prompt among the tokens of all, and where the last ends
        self._longest = 0  # tokens of a prompt: the column where all of them end
        self._num_rows = 0
        self._place = -1  # of the token that came last
        self._kept = self._buffer  # keys and values: [2, layers, R, G, K, E]
        self._mask_R11K: Tensor | None = None  # None where prompts are of one length
        self._here: Sequence[Tensor] = ()  # where the next token goes, [R, G, E]: keys of each layer, then values
        self._seen: Sequence[Tensor] = ()  # all up to there, [R, G, K, E], likewise

    def start(self, prompt_lengths: Sequence[int], num_rows: int, num_tokens: int) -> bool:
        """Make room for a batch: prompts of these lengths, a row of each, and so many tokens at most that it says.

        Returns:
            whether `room` grew.
        """
        assert num_rows == len(prompt_lengths)
        self._starts = [0, *accumulate(prompt_lengths)]
        self._longest, self._num_rows, self._place = max(prompt_lengths), num_rows, -1
        shape = (2, self.layers, num_rows, self.kv_heads, self._longest + num_tokens, self.width)
        size = math.prod(shape)
        if size > len(self._buffer):
            self._kept = self._buffer = self._buffer.new_empty(0)  # the old is gone before the new is made
            self._here = self._seen = ()
            self._buffer = self._buffer.new_empty(size)
        self._kept = self._buffer[:size].view(shape)
        self._mask_R11K = None
        if min(prompt_lengths) < self._longest:
            self._mask_R11K = self._kept.new_zeros(num_rows, 1, 1, shape[4])
            for row, length in enumerate(prompt_lengths):
                before = self._longest - length
                self._mask_R11K[row, ..., :before] = float("-inf")
                self._kept[:, :, row, :, :before] = 0  # a weight of 0 does not make 0 of what is no number
        had = self.room
        self.room = max(num_rows, had[0]), max(num_tokens, had[1])
        return self.room != had

    def prefill(self, documents: Documents, start: int) -> Prefill:
        """How some of the prompts attend; `start`: where their tokens begin among those of all prompts."""
        return Prefill(self.keep_prompts, documents, start)

    def keep_prompts(self, layer: int, start: int, key_LGE: Tensor, value_LGE: Tensor) -> None:
        """Put the keys and values of some of the prompts where they belong."""
        for row, (first, last) in enumerate(pairwise(self._starts)):
            if start <= first and last <= start + len(key_LGE):
                here, there = slice(first - start, last - start), slice(self._longest - last + first, self._longest)
                self._kept[0, layer, row, :, there] = key_LGE[here].transpose(0, 1)
                self._kept[1, layer, row, :, there] = value_LGE[here].transpose(0, 1)

    def set_rows(self, prompt_of_R: Sequence[int]) -> None:
        """The rows: one of each prompt, in their order."""
        assert list(prompt_of_R) == list(range(self._num_rows))

    def keep(self, rows: Sequence[int]) -> None:
        """Only these rows go on; they keep their order."""
        first = next((place for place, row in enumerate(rows) if place != row), len(rows))  # that moves
        at = torch.tensor(rows[first:], dtype=torch.long, device=self.device)
        moved = slice(first, len(rows))
        end = self._longest + self._place + 1
        for kept_RGKE in self._kept[:, :, :, :, :end].flatten(0, 1):  # one by one, for the copy to be small
            kept_RGKE[moved] = kept_RGKE.index_select(0, at)
        if self._mask_R11K is not None:
            self._mask_R11K[moved] = self._mask_R11K.index_select(0, at)
        self._num_rows = len(rows)

    def advance(self, place: int) -> None:
        """Each row's next token is its number `place`, counted from 0."""
        self._place = place
        rows = self._kept[:, :, : self._num_rows]
        end = self._longest + place + 1
        self._here = rows[:, :, :, :, end - 1].flatten(0, 1).unbind()
        self._seen = rows[:, :, :, :, :end].flatten(0, 1).unbind()

    def attend(self, layer: int, query_RHE: Tensor, key_RGE: Tensor, value_RGE: Tensor, scale: float) -> Tensor:
        """Keep each row's key and value; its attention to its prompt, to what it has said, and to itself."""
        self._here[layer].copy_(key_RGE)
        self._here[self.layers + layer].copy_(value_RGE)
        keys_RGKE, values_RGKE = self._seen[layer], self._seen[self.layers + layer]
        mask = self._mask_R11K
        if mask is not None:
            mask = mask[: self._num_rows, :, :, : keys_RGKE.shape[2]]
        # the query heads of one key head are queries of one attention: told of groups, torch would copy their keys
        query_RGME = query_RHE.unflatten(1, (self.kv_heads, -1))
        out_RGME = F.scaled_dot_product_attention(query_RGME, keys_RGKE, values_RGKE, attn_mask=mask, scale=scale)
        return out_RGME.flatten(1, 2)
