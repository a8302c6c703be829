"""Random models in the real on-disk format: config, safetensors, tokenizer, image processor.

They load by the same from_pretrained path as `Qwen/Qwen2.5-VL-7B-Instruct`. A small one makes the whole pipeline run
on a CPU; one of a published model's shape makes speed and memory measurable where its weights cannot be had. The
tokenizer is Qwen2.5's own kind (byte-level BPE, digits one by one) trained on the text at hand.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AddedToken,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
)

from ..datasets.prompts import MODE_INSTRUCTIONS, SYSTEM_PROMPT, TASK_TEMPLATES
from ..utils.files import readable_as_its_folder
from .name_tokens import name_tokens

# Qwen2.5's special tokens, in its order.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
PATCH_SIZE = 14
_PROMPT_REPEATS = 100
# of attentions that start as look-ups: what is left of their random weights, and how much is taken over
_RANDOM_SHARE = 0.3
_TAKEN_OVER = 2.0


@dataclass(frozen=True)
class TinySize:
    """Widths and depths of a Qwen2.5-VL."""

    vocab_size: int = 2000  # of the tokenizer, at most
    names: int = 0  # that are one token each, <obj0>, <obj1>, …, with the blank before them; 0: none is
    embeddings: int = 0  # rows of the embedding; 0: as many as the tokenizer has tokens
    width: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    mlp_width: int = 384
    vision_width: int = 48
    vision_layers: int = 2
    vision_heads: int = 4
    vision_mlp_width: int = 0  # 0: twice the width
    vision_whole: tuple[int, ...] = ()  # blocks that see the whole image, not windows; (): the last
    tied: bool = True  # whether the LM head is the embedding
    theta: float = 10_000.0  # of the rotary embedding
    spread: float = 0.02  # standard deviation of the decoder's random weights
    look_up: bool = False  # whether its attentions start as look-ups (`_start_as_look_ups`)


_VISION = {"vision_width": 1280, "vision_layers": 32, "vision_heads": 16, "vision_mlp_width": 3420}
_VISION |= {"vision_whole": (7, 15, 23, 31)}
_PUBLISHED: dict[str, Any] = {"vocab_size": 4000, "theta": 1_000_000.0, **_VISION}
# Of the published models their own numbers, from their config.json.
SHAPES = {
    "tiny": TinySize(),
    # some 15 million weights: what one GPU trains from nothing in minutes (script/proof.sh). Their spread is the root
    # of 1 / width: with the published models' 0.02 so narrow a model is slow to find what refers to what. A name is
    # one token right behind the word it goes with: to look up in two steps (door, <obj, 12) is a long plateau. So is
    # to look up at all among fifty things, for attentions that are random, of few heads, and turned by their distance
    "small": TinySize(
        vocab_size=4000,
        names=100,
        width=384,
        layers=8,
        heads=6,
        kv_heads=6,
        mlp_width=1024,
        vision_width=96,
        vision_layers=4,
        theta=1_000_000.0,
        spread=0.05,
        look_up=True,
    ),
    "3b": TinySize(embeddings=151_936, width=2048, layers=36, heads=16, kv_heads=2, mlp_width=11_008, **_PUBLISHED),
    "7b": TinySize(
        embeddings=152_064, width=3584, layers=28, heads=28, kv_heads=4, mlp_width=18_944, tied=False, **_PUBLISHED
    ),
}


def corpus_texts(root: str | Path) -> Iterator[str]:
    """All strings of the JSON annotation files under `root`, and the prompts, for training a tokenizer."""
    prompts = [
        SYSTEM_PROMPT,
        *TASK_TEMPLATES.values(),
        *MODE_INSTRUCTIONS.values(),
        "Views: ",
        "Objects: ",
        "Layout: ",
    ]
    # often enough for their words to become tokens: every row of the data will hold them
    yield from prompts * _PROMPT_REPEATS
    folder = Path(root) / "annotations"
    files = [
        path
        for path in sorted(folder.glob("*.json")) + sorted(folder.glob("*.jsonl"))
        if "_val" not in path.name and "_test" not in path.name  # held-out words stay unseen
    ]
    if not files:
        raise ValueError(f"There are no annotation files under {folder}; run `python main.py rooms` first.")
    for path in files:
        try:
            text = path.read_text(encoding="utf-8")
            lines = text.removesuffix("\n").split("\n")
            rows = [json.loads(line) for line in lines] if path.suffix == ".jsonl" else json.loads(text)
        except ValueError as error:
            raise ValueError(f"{path} is not whole JSON ({error}); copy it again from its source.") from None
        yield from _strings(rows)


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for entry in value.values():
            yield from _strings(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from _strings(entry)


def train_tokenizer(texts: Iterable[str], vocab_size: int, names: int = 0) -> Qwen2Tokenizer:
    """Train a tokenizer of Qwen2.5's kind, with its special tokens; and so many names of proposals, a token each."""
    pattern = Qwen2Tokenizer()  # its normaliser and pre-tokenizer are the ones that the trained one will use
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pattern.backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS) - names,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    trained = json.loads(backend.to_str())["model"]
    tokenizer = Qwen2Tokenizer(vocab=trained["vocab"], merges=[tuple(pair) for pair in trained["merges"]])  # type: ignore[arg-type]
    tokenizer.add_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS], special_tokens=True
    )
    tokenizer.add_tokens(name_tokens(names))
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    return tokenizer


@torch.no_grad()
def _start_as_look_ups(model: Qwen2_5_VLForConditionalGeneration) -> None:
    """Let tokens attend to tokens like themselves, and add what those hold, from the first step on.

    Each head's W_Q and W_K are the same rows of a random rotation, its W_O the transpose of its W_V, likewise, so
    W_Q^T W_K and W_O W_V are parts of the identity; some of the random weights stays. After Trockman and Kolter,
    "Mimetic Initialization of Self-Attention Layers" (2023), who take minus the identity for values; here a name is
    to be copied.
    """
    layers: Any = model.model.language_model.layers
    for layer in layers:
        attention = layer.self_attn
        width, head = attention.o_proj.weight.shape[0], attention.head_dim
        queries = attention.q_proj.weight.shape[0] // attention.k_proj.weight.shape[0]
        drawn = (torch.randn(width, width, dtype=torch.float32) for _ in range(2))
        rotations = (torch.linalg.qr(matrix).Q[: len(attention.k_proj.weight)] for matrix in drawn)
        keys, values = (rows.unflatten(0, (-1, head)) for rows in rotations)
        asked, taken = (rows.repeat_interleave(queries, 0).flatten(0, 1) for rows in (keys, values))
        for projection, start in (
            (attention.q_proj, asked),
            (attention.k_proj, keys.flatten(0, 1)),
            (attention.v_proj, _TAKEN_OVER * values.flatten(0, 1)),
            (attention.o_proj, _TAKEN_OVER / queries * taken.T),
        ):
            projection.weight.mul_(_RANDOM_SHARE).add_(start)


def build_tiny(
    out: str | Path,
    texts: Iterable[str],
    *,
    size: TinySize | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Path:
    """Write a random Qwen2.5-VL of the given size to the folder `out`.

    Args:
        device: where the weights are drawn; billions of them take minutes on a CPU.
    """
    size = size or TinySize()
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; name a folder to write the model to.")
    tokenizer = train_tokenizer(texts, size.vocab_size, size.names)

    def token_id(name: str) -> int:
        return int(tokenizer.convert_tokens_to_ids(name))  # type: ignore[arg-type]

    head_dim = size.width // size.heads
    temporal = head_dim // 8
    spatial = (head_dim // 2 - temporal) // 2
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": size.embeddings or len(tokenizer),
            "hidden_size": size.width,
            "intermediate_size": size.mlp_width,
            "num_hidden_layers": size.layers,
            "num_attention_heads": size.heads,
            "num_key_value_heads": size.kv_heads,
            "max_position_embeddings": 8192,
            "initializer_range": size.spread,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": size.theta,
                "mrope_section": [head_dim // 2 - 2 * spatial, spatial, spatial],
            },
            "bos_token_id": token_id("<|endoftext|>"),
            "eos_token_id": token_id("<|im_end|>"),
            "pad_token_id": token_id("<|endoftext|>"),
        },
        vision_config={
            "depth": size.vision_layers,
            "hidden_size": size.vision_width,
            "intermediate_size": size.vision_mlp_width or 2 * size.vision_width,
            "num_heads": size.vision_heads,
            "out_hidden_size": size.width,
            "patch_size": PATCH_SIZE,
            "window_size": 112,
            "fullatt_block_indexes": list(size.vision_whole) or [size.vision_layers - 1],
        },
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=size.tied,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.random.fork_rng(), torch.device(device):
            torch.manual_seed(seed)
            model = Qwen2_5_VLForConditionalGeneration(config)
            if size.look_up:
                _start_as_look_ups(model)
    finally:
        torch.set_default_dtype(before)
    model.generation_config.eos_token_id = token_id("<|im_end|>")
    model.generation_config.pad_token_id = token_id("<|endoftext|>")
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "image_processor_type": "Qwen2VLImageProcessor",
                "processor_class": "Qwen2_5_VLProcessor",
                "min_pixels": 4 * PATCH_SIZE**2,
                "max_pixels": 16_384 * PATCH_SIZE**2,
                "patch_size": PATCH_SIZE,
                "temporal_patch_size": 2,
                "merge_size": 2,
                "image_mean": [0.48145466, 0.4578275, 0.40821073],
                "image_std": [0.26862954, 0.26130258, 0.27577711],
            },
            indent=2,
        )
    )
    readable_as_its_folder(out)
    return out
