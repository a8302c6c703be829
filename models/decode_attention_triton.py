"""Attention of one decoding step as Triton kernels: rows to their shared prompts, and each to what it has said.

One launch attends, cut so that a GPU is full: a program takes one piece of a prompt with all queries of all rows that
go on from it, or one row with what that row has said, for one key head. A second launch merges what a row's pieces
gave by their log-sum-exps (Hydragen, arXiv 2402.05099, section 3.1; split keys as in Flash-Decoding). The row's new
key and value are kept by the program that attends to them. Arithmetic is float32; products take the keys' precision.

Nothing depends on what the host knows of a step: lengths, rows and places are read from the device, so that the
launches serve in CUDA graphs.

Imported only where it serves: a GPU, or the interpreter (`TRITON_INTERPRET=1`) on a CPU.

Shapes: R rows, H query heads, G key and value heads, M = H / G, E width of a head; P tokens of all prompts, packed;
S tokens that a row may say; N pieces of prompts, each [start, tokens, first row, rows, slot]; Z slots: 0 for what a
row has said, then the pieces of its prompt in order.
"""

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

PIECE = 256  # keys of a prompt that one program takes
COLUMNS = 5  # of the table of pieces
_KEYS = 32  # keys at a time
_STAGES = 3  # of keys on their way: more programs share a processor with fewer
_WARPS = 4
_LOG2_E = 1.4426950408889634


@triton.jit
def _fold(query_ME, top_M, total_M, out_ME, keys, values, offsets_K, inside_K, columns_E, scale, EXACT: tl.constexpr):
    """Take some more keys into the running attention of queries: their top score, sum of exponentials, and output."""
    at_KE = offsets_K[:, None] + columns_E[None, :]
    key_KE = tl.load(keys + at_KE, mask=inside_K[:, None], other=0.0)
    value_KE = tl.load(values + at_KE, mask=inside_K[:, None], other=0.0)
    precision: tl.constexpr = "ieee" if EXACT else "tf32"
    scores_MK = tl.dot(query_ME, tl.trans(key_KE), input_precision=precision) * scale
    scores_MK = tl.where(inside_K[None, :], scores_MK, float("-inf"))
    new_top_M = tl.maximum(top_M, tl.max(scores_MK, 1))
    shrink_M = tl.exp2(top_M - new_top_M)  # 0 at first, where the top is -inf
    weights_MK = tl.exp2(scores_MK - new_top_M[:, None])
    total_M = total_M * shrink_M + tl.sum(weights_MK, 1)
    out_ME = out_ME * shrink_M[:, None]
    out_ME += tl.dot(weights_MK.to(value_KE.dtype), value_KE, input_precision=precision)
    return new_top_M, total_M, out_ME


@triton.jit
def _to_prompt(  # noqa: PLR0913 - a launch takes no structures
    query,
    query_stride,
    keys,
    values,
    out,
    lse,
    piece,
    tile,
    head,
    room_rows,
    scale,
    KV_HEADS: tl.constexpr,
    FOLD: tl.constexpr,
    WIDTH: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    EXACT: tl.constexpr,
):
    """A tile of the queries of the rows that go on from a prompt, to one piece of it."""
    start = tl.load(piece).to(tl.int64)
    length = tl.load(piece + 1)
    first_row = tl.load(piece + 2)
    queries = tl.load(piece + 3) * FOLD
    slot = tl.load(piece + 4).to(tl.int64)
    if tile * QUERIES < queries:
        columns_E = tl.arange(0, WIDTH)
        number_M = tile * QUERIES + tl.arange(0, QUERIES)
        asked_M1 = (number_M < queries)[:, None]
        row_M = (first_row + number_M // FOLD).to(tl.int64)
        head_M = head * FOLD + number_M % FOLD
        at_ME = row_M[:, None] * query_stride + head_M[:, None] * WIDTH + columns_E[None, :]
        query_ME = tl.load(query + at_ME, mask=asked_M1, other=0.0)
        top_M = tl.full((QUERIES,), float("-inf"), tl.float32)
        total_M = tl.zeros((QUERIES,), tl.float32)
        out_ME = tl.zeros((QUERIES, WIDTH), tl.float32)
        for begin in range(0, length, KEYS):
            number_K = begin + tl.arange(0, KEYS)
            at_K = ((start + number_K) * KV_HEADS + head) * WIDTH
            inside_K = number_K < length
            top_M, total_M, out_ME = _fold(
                query_ME, top_M, total_M, out_ME, keys, values, at_K, inside_K, columns_E, scale, EXACT
            )
        place_M = (slot * room_rows + row_M) * (KV_HEADS * FOLD) + head_M
        tl.store(out + place_M[:, None] * WIDTH + columns_E[None, :], out_ME / total_M[:, None], asked_M1)
        tl.store(lse + place_M, top_M + tl.log2(total_M), number_M < queries)


@triton.jit
def _to_said(  # noqa: PLR0913 - a launch takes no structures
    query,
    query_stride,
    key,
    key_stride,
    value,
    value_stride,
    keys,
    values,
    out,
    lse,
    place,
    row,
    head,
    tokens,
    scale,
    KV_HEADS: tl.constexpr,
    FOLD: tl.constexpr,
    WIDTH: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    EXACT: tl.constexpr,
):
    """The queries of a row to what it has said; its new key and value are kept."""
    said = tl.load(place)
    columns_E = tl.arange(0, WIDTH)
    number_M = tl.arange(0, QUERIES)
    asked_M1 = (number_M < FOLD)[:, None]
    head_M = head * FOLD + number_M
    at_ME = row * query_stride + head_M[:, None] * WIDTH + columns_E[None, :]
    query_ME = tl.load(query + at_ME, mask=asked_M1, other=0.0)
    # its new token, of which there is one key: with it the running attention begins
    key_E = tl.load(key + row * key_stride + head * WIDTH + columns_E)
    value_E = tl.load(value + row * value_stride + head * WIDTH + columns_E)
    new = ((row * tokens + said) * KV_HEADS + head) * WIDTH
    tl.store(keys + new + columns_E, key_E)
    tl.store(values + new + columns_E, value_E)
    top_M = tl.sum(query_ME.to(tl.float32) * key_E.to(tl.float32)[None, :], 1) * scale
    total_M = tl.full((QUERIES,), 1.0, tl.float32)
    out_ME = tl.zeros((QUERIES, WIDTH), tl.float32) + value_E.to(tl.float32)[None, :]
    for begin in range(0, said, KEYS):
        number_K = begin + tl.arange(0, KEYS)
        at_K = ((row * tokens + number_K) * KV_HEADS + head) * WIDTH
        inside_K = number_K < said
        top_M, total_M, out_ME = _fold(
            query_ME, top_M, total_M, out_ME, keys, values, at_K, inside_K, columns_E, scale, EXACT
        )
    place_M = row * (KV_HEADS * FOLD) + head_M
    tl.store(out + place_M[:, None] * WIDTH + columns_E[None, :], out_ME / total_M[:, None], asked_M1)
    tl.store(lse + place_M, top_M + tl.log2(total_M), number_M < FOLD)


@triton.jit(do_not_specialize=["num_pieces", "room_rows", "tokens"])
def _attend_kernel(  # noqa: PLR0913 - a launch takes no structures
    query,
    key,
    value,
    query_stride,
    key_stride,
    value_stride,
    prompt_keys,
    prompt_values,
    said_keys,
    said_values,
    out,
    lse,
    pieces,
    place,
    num_pieces,
    room_rows,
    tokens,
    scale,
    TILES: tl.constexpr,
    COLUMNS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    FOLD: tl.constexpr,
    WIDTH: tl.constexpr,
    QUERIES: tl.constexpr,
    OWN_QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    EXACT: tl.constexpr,
):
    unit = tl.program_id(0)
    head = tl.program_id(1)
    if unit < num_pieces * TILES:
        piece = pieces + unit // TILES * COLUMNS
        _to_prompt(
            query,
            query_stride,
            prompt_keys,
            prompt_values,
            out,
            lse,
            piece,
            unit % TILES,
            head,
            room_rows,
            scale,
            KV_HEADS,
            FOLD,
            WIDTH,
            QUERIES,
            KEYS,
            EXACT,
        )
    else:
        row = (unit - num_pieces * TILES).to(tl.int64)
        _to_said(
            query,
            query_stride,
            key,
            key_stride,
            value,
            value_stride,
            said_keys,
            said_values,
            out,
            lse,
            place,
            row,
            head,
            tokens,
            scale,
            KV_HEADS,
            FOLD,
            WIDTH,
            OWN_QUERIES,
            KEYS,
            EXACT,
        )


@triton.jit(do_not_specialize=["room_rows"])
def _merge_kernel(
    out, lse, merged, num_slots, room_rows, HEADS: tl.constexpr, WIDTH: tl.constexpr, SLOTS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    slots_Z = tl.arange(0, SLOTS)
    used_Z = slots_Z < tl.load(num_slots + row)
    columns_E = tl.arange(0, WIDTH)
    place_Z = (slots_Z.to(tl.int64) * room_rows + row) * HEADS + head
    lse_Z = tl.load(lse + place_Z, mask=used_Z, other=float("-inf"))
    weight_Z = tl.exp2(lse_Z - tl.max(lse_Z, 0))
    weight_Z = weight_Z / tl.sum(weight_Z, 0)
    out_ZE = tl.load(out + place_Z[:, None] * WIDTH + columns_E[None, :], mask=used_Z[:, None], other=0.0)
    merged_E = tl.sum(out_ZE * weight_Z[:, None], 0)
    tl.store(merged + (row * HEADS + head) * WIDTH + columns_E, merged_E.to(merged.dtype.element_ty))


def attend_step(
    query_RHE: Tensor,
    key_RGE: Tensor,
    value_RGE: Tensor,
    prompts_2PGE: Tensor,
    said_2RSGE: Tensor,
    pieces_N5: Tensor,
    num_slots_R: Tensor,
    place: Tensor,
    partial_ZRHE: Tensor,
    lse_ZRH: Tensor,
    scale: float,
    *,
    most_queries: int,
) -> Tensor:
    """Keep the rows' keys and values; attention [R, H, E] of each to its prompt, to what it has said, and to itself.

    Args:
        pieces_N5: int32; those without rows are passed over.
        num_slots_R: int32: the pieces of each row's prompt, and one.
        place: int64 []: the tokens that each row has said.
        partial_ZRHE, lse_ZRH: float32 buffers, for as many rows as `said_2RSGE` has room for.
        most_queries: of one prompt and key head, at most; a graph knows it.
    """
    rows, heads, width = query_RHE.shape
    kv_heads = key_RGE.shape[1]
    fold = heads // kv_heads
    query_RHE, key_RGE, value_RGE = (
        part if part.stride()[1:] == (width, 1) else part.contiguous() for part in (query_RHE, key_RGE, value_RGE)
    )
    queries = min(64, max(16, triton.next_power_of_2(most_queries)))
    tiles = triton.cdiv(most_queries, queries)
    _attend_kernel[(len(pieces_N5) * tiles + rows, kv_heads)](  # pyright: ignore[reportIndexIssue]
        query_RHE,
        key_RGE,
        value_RGE,
        query_RHE.stride(0),
        key_RGE.stride(0),
        value_RGE.stride(0),
        *prompts_2PGE.unbind(0),
        *said_2RSGE.unbind(0),
        partial_ZRHE,
        lse_ZRH,
        pieces_N5,
        place,
        len(pieces_N5),
        lse_ZRH.shape[1],
        said_2RSGE.shape[2],
        scale * _LOG2_E,
        TILES=tiles,
        COLUMNS=COLUMNS,
        KV_HEADS=kv_heads,
        FOLD=fold,
        WIDTH=width,
        QUERIES=queries,
        OWN_QUERIES=max(16, triton.next_power_of_2(fold)),
        KEYS=_KEYS,
        EXACT=query_RHE.dtype == torch.float32,
        num_warps=_WARPS,
        num_stages=_STAGES,
    )
    merged_RHE = torch.empty(rows, heads, width, dtype=query_RHE.dtype, device=query_RHE.device)
    _merge_kernel[(rows, heads)](  # pyright: ignore[reportIndexIssue]
        partial_ZRHE,
        lse_ZRH,
        merged_RHE,
        num_slots_R,
        lse_ZRH.shape[1],
        HEADS=heads,
        WIDTH=width,
        SLOTS=triton.next_power_of_2(len(lse_ZRH)),
        num_warps=1 if len(lse_ZRH) <= 4 else 4,
    )
    return merged_RHE
