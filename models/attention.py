"""Attention over packed documents, by what torch itself has.

Several samples stand one after the other in one row, each a document that attends to itself alone. On CUDA in half
precision this is one call of torch's varlen kernel, which takes grouped KV heads as they are and never sees a mask;
elsewhere it is scaled_dot_product_attention over each document. The vision tower's windows are documents too, so it
goes the same way: transformers calls its attention once a window and layer, hundreds of times an image.

A document may also go on from another, as the completions of a prompt do (`Groups`): the prompt stands in the row
once, however many go on from it. A packed row tells how it attends by `Attends`, which decoding has its own of
(kv_cache.py).

Registered with transformers under two names, since it hands a vision tower's windows over only to attention that has
"flash" in its name. Of padded rows both are transformers' own `sdpa`, mask and all.

Shapes: L tokens of all documents, H query heads, G key and value heads, E width of a head, N documents; C completions,
P tokens of prompts, K keys of completions.
"""

import inspect
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .view_pixels import to_device

PACKED = "packed"  # the name in a configuration, and transformers' for the text decoder
PACKED_VISION = "packed_flash"

# before torch 2.12 it took grouped heads without being told
_GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
_SHORTEST = 512  # of the lengths that the kernel is told: few of them, or compiled layers would be made again for each


class Attends(Protocol):
    """How the tokens of a packed row attend."""

    def attend(self, layer: int, query_LHE: Tensor, key_LGE: Tensor, value_LGE: Tensor, scale: float, /) -> Tensor:
        """What attention gives [L, H, E] in one of the decoder's layers, counted from 0."""
        ...


class Documents(NamedTuple):
    """Where the documents of a packed row begin."""

    starts_N: Tensor  # int32 [N + 1], from 0 to L, on the device of the row
    longest: int  # tokens; at least those of the longest document

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device | str) -> "Documents":
        """Documents of these lengths, one after the other."""
        starts_N = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        starts_N[1:] = torch.tensor(lengths).cumsum(0)
        longest = max(_SHORTEST, 1 << (max(lengths) - 1).bit_length())
        return cls(to_device(starts_N, device), longest)

    def attend(self, layer: int, query_LHE: Tensor, key_LGE: Tensor, value_LGE: Tensor, scale: float) -> Tensor:  # noqa: ARG002
        """Each token to its document, up to itself."""
        return attend_documents(query_LHE, key_LGE, value_LGE, *self, causal=True, scale=scale)

    def arguments(self) -> dict[str, Any]:
        """What transformers' decoder hands on to its attention: by its own names, tensors and numbers alone, so that
        compiled layers take them."""
        starts_N = self.starts_N
        return {
            "cu_seq_lens_q": starts_N,
            "cu_seq_lens_k": starts_N,
            "max_length_q": self.longest,
            "max_length_k": self.longest,
        }


class Groups(NamedTuple):
    """Prompts one after the other, then their completions, each of which goes on from its prompt.

    Exact, and with gradients: a completion's keys are its prompt's and its own, brought together for the kernel. (To
    merge two attentions by their log-sum-exps would spare that, but the kernel's backward pass ignores what reaches
    those.)
    """

    num_prompt_tokens: int
    prompts: Documents
    completions: Documents  # counted from the end of the prompts
    keys_at_K: Tensor  # int64: of each completion its prompt's tokens, then its own
    keys: Documents

    @classmethod
    def of(
        cls, prompts: Sequence[int], completions: Sequence[int], after: Sequence[int], device: torch.device | str
    ) -> "Groups":
        """From the lengths of prompts and completions, and which prompt each completion goes on from (-1: none)."""
        prompt_starts = [0, *accumulate(prompts)]
        start = prompt_starts[-1]
        keys = []
        for length, prompt in zip(completions, after, strict=True):
            if prompt >= 0:
                keys.append(torch.arange(prompt_starts[prompt], prompt_starts[prompt + 1]))
            keys.append(torch.arange(start, start + length))
            start += length
        key_lengths = [
            length + (prompts[prompt] if prompt >= 0 else 0) for length, prompt in zip(completions, after, strict=True)
        ]
        return cls(
            prompt_starts[-1],
            Documents.of(prompts, device),
            Documents.of(completions, device),
            to_device(torch.cat(keys), device),
            Documents.of(key_lengths, device),
        )

    def attend(self, layer: int, query_LHE: Tensor, key_LGE: Tensor, value_LGE: Tensor, scale: float) -> Tensor:  # noqa: ARG002
        """Each token to its document and the prompt of that, up to itself."""
        end = self.num_prompt_tokens
        prompts_PHE = attend_documents(
            query_LHE[:end], key_LGE[:end], value_LGE[:end], *self.prompts, causal=True, scale=scale
        )
        completions_LHE = attend_documents(
            query_LHE[end:],
            _gather(key_LGE, self.keys_at_K),
            _gather(value_LGE, self.keys_at_K),
            *self.completions,
            causal=True,
            scale=scale,
            keys=self.keys,
        )
        return torch.cat([prompts_PHE, completions_LHE])


class _Gather(torch.autograd.Function):
    """Rows of a tensor, some of them many times; their gradients are summed in float32 or better."""

    @staticmethod
    def forward(ctx, rows_LGE, at_K):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(at_K)
        ctx.length = len(rows_LGE)
        return rows_LGE.index_select(0, at_K)

    @staticmethod
    def backward(ctx, *grads):  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad_KGE,) = grads
        (at_K,) = ctx.saved_tensors
        wide = torch.promote_types(grad_KGE.dtype, torch.float32)
        summed_LGE = torch.zeros(ctx.length, *grad_KGE.shape[1:], dtype=wide, device=grad_KGE.device)
        return summed_LGE.index_add_(0, at_K, grad_KGE.to(wide)).to(grad_KGE.dtype), None


def _gather(rows_LGE: Tensor, at_K: Tensor) -> Tensor:
    gathered_KGE: Any = _Gather.apply(rows_LGE, at_K)
    return gathered_KGE


def attend_documents(
    query_LHE: Tensor,
    key_LGE: Tensor,
    value_LGE: Tensor,
    starts_N: Tensor,
    longest: int,
    *,
    causal: bool,
    scale: float | None = None,
    keys: Documents | None = None,
) -> Tensor:
    """Attention [L, H, E] of every token to its own document, up to itself where `causal`.

    Args:
        keys: the documents of keys and values where they are longer: the queries stand at their ends.
    """
    if uses_kernel(query_LHE):
        window = (-1, 0) if causal else (-1, -1)
        key_starts_N, longest_key = keys or (starts_N, longest)
        out_LHE: Any = varlen_attn(
            query_LHE,
            key_LGE,
            value_LGE,
            starts_N,
            key_starts_N,
            longest,
            longest_key,
            window_size=window,
            scale=scale,
            **_GROUPED,
        )
        return out_LHE
    lengths = starts_N.diff().tolist()
    if keys is None and len(set(lengths)) == 1:  # windows of a vision tower: one batch
        query, key, value = (tensor.unflatten(0, (len(lengths), -1)) for tensor in (query_LHE, key_LGE, value_LGE))
        return _attend(query, key, value, causal, scale).flatten(0, 1)
    key_lengths = lengths if keys is None else keys.starts_N.diff().tolist()
    parts = zip(
        query_LHE[None].split(lengths, dim=1),
        key_LGE[None].split(key_lengths, dim=1),
        value_LGE[None].split(key_lengths, dim=1),
        strict=True,
    )
    return torch.cat([_attend(query, key, value, causal, scale)[0] for query, key, value in parts])


def uses_kernel(tensor: Tensor) -> bool:
    """Whether torch's varlen kernel takes it: on CUDA in half precision."""
    return tensor.is_cuda and tensor.dtype in (torch.float16, torch.bfloat16)


def _attend(query_BLHE: Tensor, key_BLGE: Tensor, value_BLGE: Tensor, causal: bool, scale: float | None) -> Tensor:
    queries, keys = query_BLHE.shape[1], key_BLGE.shape[1]
    mask = None
    if causal and queries != keys:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=query_BLHE.device).tril(keys - queries)
    out_BHLE = F.scaled_dot_product_attention(
        query_BLHE.transpose(1, 2),
        key_BLGE.transpose(1, 2),
        value_BLGE.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal and mask is None,
        scale=scale,
        enable_gqa=query_BLHE.shape[2] != key_BLGE.shape[2],
    )
    return out_BHLE.transpose(1, 2)


def _packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    attends: Attends | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Transformers' interface: query [1, H, L, E], key and value [1, G, L, E] -> [1, L, H, E]."""
    if cu_seq_lens_q is None and attends is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **options
        )
    query_LHE, key_LGE, value_LGE = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    if attends is not None:
        layer: Any = module.layer_idx
        return attends.attend(layer, query_LHE, key_LGE, value_LGE, scaling or query.shape[-1] ** -0.5)[None], None
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    assert cu_seq_lens_q is not None and max_length_q is not None
    out_LHE = attend_documents(
        query_LHE, key_LGE, value_LGE, cu_seq_lens_q, max_length_q, causal=causal, scale=scaling
    )
    return out_LHE[None], None


for _name in (PACKED, PACKED_VISION):
    AttentionInterface.register(_name, _packed_attention)
    AttentionMaskInterface.register(_name, sdpa_mask)


def use_packed_attention(decoder: nn.Module, vision_tower: nn.Module) -> None:
    """Let a loaded Qwen2.5-VL attend as this module does."""
    for part, name in ((decoder, PACKED), (vision_tower, PACKED_VISION)):
        config: Any = part.config
        config._attn_implementation = name
