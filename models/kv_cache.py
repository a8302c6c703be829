"""Keys and values of decoding: those of each prompt once, and for each row those of what it has said since.

All rows that go on from one prompt read its keys together, as one block of queries: with long prompts these are nearly
all that a step reads. Each row's own keys are read by that row. The two attentions are merged by their log-sum-exps,
which is exact (Hydragen, arXiv 2402.05099, section 3.1).

Both are plain products over padded prompts; or, on a GPU in half precision, the kernels of
`decode_attention_triton.py`: nothing that a step does depends on what the host knows then, so that it can be captured
as a CUDA graph. The environment variable THREEDR1_DECODING chooses: `torch` takes the products everywhere, `triton`
the kernels, also in float32. Rows that share no prompt, as those of answers, have `row_cache.py` on a CPU, unless it
says `triton`.

Shapes: N prompts, P tokens of the longest (packed: of all), R rows, S tokens that a row may say, L tokens of a packed
row; H query heads, G key and value heads, M = H / G query heads of one, E width of a head; Q rows of the prompt that
has most; Z pieces of the longest prompt, and one.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..utils.kernels import takes_triton
from .attention import Documents, uses_kernel

_TOGETHER = 32  # the table of pieces grows by so many, so that a graph serves many batches
_ROOM = 4096  # tokens: the buffer of prompts comes in multiples, so that it is seldom made again


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
        self._steps = _KernelSteps(self) if takes_kernels(self.prompts) else _PlainSteps(self)
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
        moved = self._steps.outgrows(max(self.lengths))
        moved = moved or need_P > have_P or num_rows > have_R or num_tokens > have_S
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
        return Prefill(self.keep_prompts, documents, start)

    def keep_prompts(self, layer: int, start: int, key_LGE: Tensor, value_LGE: Tensor) -> None:
        """Keep the keys and values of some of the prompts."""
        here = slice(start, start + len(key_LGE))
        self.prompts[0, layer, here] = key_LGE
        self.prompts[1, layer, here] = value_LGE

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
    """Prompts that attend each to itself.

    Args:
        keep: takes the layer, `start`, and the prompts' keys and values.
    """

    def __init__(self, keep: Callable[[int, int, Tensor, Tensor], None], documents: Documents, start: int):
        self.keep, self.documents, self.start = keep, documents, start

    def attend(self, layer: int, query_LHE: Tensor, key_LGE: Tensor, value_LGE: Tensor, scale: float) -> Tensor:
        self.keep(layer, self.start, key_LGE, value_LGE)
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

    def outgrows(self, longest: int) -> bool:  # noqa: ARG002
        """Whether buffers are too small for prompts of this length."""
        return False

    def reserve(self) -> None:
        """Make what is kept beside keys and values, once there is room for these."""

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


class _KernelSteps:
    """Steps by Triton kernels over packed keys, prompts in pieces.

    What differs between batches of one size, and between steps, is in buffers on the device that stay where they are.
    """

    def __init__(self, cache: KVCache):
        from . import decode_attention_triton as kernels

        self.kernels = kernels
        self.cache = cache
        self.fits_graphs = cache.device.type == "cuda"
        self.slots = 1  # Z, a power of two
        self.most = 0  # queries of one prompt and key head
        self.cuts: list[tuple[int, int, int, int]] = []  # pieces: prompt, start, tokens, slot
        self.num_pieces = 0  # rows of the table that launches are about

    @property
    def fixed(self) -> tuple[int, ...]:
        return self.most, self.num_pieces

    def empty_said(self, rows: int, tokens: int) -> Tensor:
        """What rows have said: [2, layers, R, S, G, E]."""
        return self.cache.empty(rows, tokens, self.cache.kv_heads)

    def outgrows(self, longest: int) -> bool:
        """Whether buffers are too small for prompts of this length."""
        needed = 1 + -(-longest // self.kernels.PIECE)
        if needed <= self.slots:
            return False
        self.slots = 1 << (needed - 1).bit_length()
        return True

    def reserve(self) -> None:
        """Make what is kept beside keys and values, once there is room for these."""
        cache, device = self.cache, self.cache.device
        rows, _ = cache.room
        most_pieces = cache.prompts.shape[2] // self.kernels.PIECE + rows + _TOGETHER
        self.place = torch.zeros((), dtype=torch.long, device=device)
        self.pieces_N5 = torch.zeros(most_pieces, self.kernels.COLUMNS, dtype=torch.int32, device=device)
        self.num_slots_R = torch.ones(rows, dtype=torch.int32, device=device)
        self.partial_ZRHE = torch.empty(self.slots, rows, cache.heads, cache.width, device=device)
        self.lse_ZRH = torch.empty(self.slots, rows, cache.heads, device=device)

    def take_prompts(self) -> None:
        lengths, piece = self.cache.lengths, self.kernels.PIECE
        starts = [sum(lengths[:prompt]) for prompt in range(len(lengths))]
        self.cuts = [
            (prompt, starts[prompt] + cut, min(piece, length - cut), 1 + cut // piece)
            for prompt, length in enumerate(lengths)
            for cut in range(0, length, piece)
        ]
        # What the host tells the kernels is coarse, and stays as it is when rows leave: a graph knows it.
        self.num_pieces = _TOGETHER * -(-len(self.cuts) // _TOGETHER)
        prompt_of, fold = self.cache.prompt_of, self.cache.heads // self.cache.kv_heads
        self.most = fold * max(prompt_of.count(prompt) for prompt in range(len(lengths)))

    def take_rows(self) -> None:
        prompt_of, lengths = self.cache.prompt_of, self.cache.lengths
        counts = [prompt_of.count(prompt) for prompt in range(len(lengths))]
        first = [sum(counts[:prompt]) for prompt in range(len(lengths))]
        table = [[start, tokens, first[prompt], counts[prompt], slot] for prompt, start, tokens, slot in self.cuts]
        table += [[0] * self.kernels.COLUMNS] * (self.num_pieces - len(table))
        self.pieces_N5[: self.num_pieces] = torch.tensor(table, dtype=torch.int32)
        slots = [1 + -(-lengths[prompt] // self.kernels.PIECE) for prompt in prompt_of]
        self.num_slots_R[: len(slots)] = torch.tensor(slots, dtype=torch.int32)

    def advance(self, place: int) -> None:
        self.place.fill_(place)

    def attend(self, layer: int, query_RHE: Tensor, key_RGE: Tensor, value_RGE: Tensor, scale: float) -> Tensor:
        return self.kernels.attend_step(
            query_RHE,
            key_RGE,
            value_RGE,
            self.cache.prompts[:, layer],
            self.cache.said[:, layer],
            self.pieces_N5[: self.num_pieces],
            self.num_slots_R,
            self.place,
            self.partial_ZRHE,
            self.lse_ZRH,
            scale,
            most_queries=self.most,
        )


def takes_kernels(like: Tensor) -> bool:
    """Whether keys of this kind are for the kernels: heads of a power of two, in a precision that they know."""
    known = like.dtype in (torch.float16, torch.bfloat16, torch.float32)
    width = like.shape[-1]
    fits = known and width >= 16 and width & (width - 1) == 0
    return fits and takes_triton("THREEDR1_DECODING", uses_kernel(like))
