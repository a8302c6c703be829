"""Attention over packed documents, by what torch itself has.

Several samples stand one after the other in one row, each a document that attends to itself alone. On CUDA in half
precision this is one call of torch's varlen kernel, which takes grouped KV heads as they are and never sees a mask;
elsewhere it is scaled_dot_product_attention over each document. The vision tower's windows are documents too, so it
goes the same way: transformers calls its attention once a window and layer, hundreds of times an image.

Registered with transformers under two names, since it hands a vision tower's windows over only to attention that has
"flash" in its name. Without documents both are transformers' own `sdpa`, mask and all: padded rows, decoding.

Shapes: L tokens of all documents, H query heads, G key and value heads, E width of a head, N documents.
"""

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

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

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments that transformers' decoder hands on to its attention."""
        starts_N = self.starts_N
        return {
            "cu_seq_lens_q": starts_N,
            "cu_seq_lens_k": starts_N,
            "max_length_q": self.longest,
            "max_length_k": self.longest,
        }


def attend_documents(
    query_LHE: Tensor,
    key_LGE: Tensor,
    value_LGE: Tensor,
    starts_N: Tensor,
    longest: int,
    *,
    causal: bool,
    scale: float | None = None,
) -> Tensor:
    """Attention [L, H, E] of every token to its own document, up to itself where `causal`."""
    if query_LHE.is_cuda and query_LHE.dtype in (torch.float16, torch.bfloat16):
        window = (-1, 0) if causal else (-1, -1)
        out_LHE: Any = varlen_attn(
            query_LHE,
            key_LGE,
            value_LGE,
            starts_N,
            starts_N,
            longest,
            longest,
            window_size=window,
            scale=scale,
            **_GROUPED,
        )
        return out_LHE
    lengths = starts_N.diff().tolist()
    if len(set(lengths)) == 1:  # windows of a vision tower: one batch
        query, key, value = (tensor.unflatten(0, (len(lengths), -1)) for tensor in (query_LHE, key_LGE, value_LGE))
        return _attend(query, key, value, causal, scale).flatten(0, 1)
    parts = zip(*(tensor[None].split(lengths, dim=1) for tensor in (query_LHE, key_LGE, value_LGE)), strict=True)
    return torch.cat([_attend(query, key, value, causal, scale)[0] for query, key, value in parts])


def _attend(query_BLHE: Tensor, key_BLGE: Tensor, value_BLGE: Tensor, causal: bool, scale: float | None) -> Tensor:
    out_BHLE = F.scaled_dot_product_attention(
        query_BLHE.transpose(1, 2),
        key_BLGE.transpose(1, 2),
        value_BLGE.transpose(1, 2),
        is_causal=causal,
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
    **options: Any,
) -> tuple[Tensor, None]:
    """Transformers' interface: query [1, H, L, E], key and value [1, G, L, E] -> [1, L, H, E]."""
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **options
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    query_LHE, key_LGE, value_LGE = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    assert max_length_q is not None
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
