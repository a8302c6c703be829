"""A small text and picture encoder, trained on generated rooms, in place of CLIP and SigLIP-2 that cannot be had.

`python main.py dual` trains one (engine/dual.py). Its space has one coordinate for each pair of a name and a colour
that the training rooms use. A text becomes the chance that it is about an object of that name, times that of the
colour; a picture becomes the share of it that shows such an object, added up over its cells, so that name and colour
stay together. The root of the shares is taken, since a question is about what is there and not about how large it is.
Words are hashed with their character trigrams: there is no vocabulary and any text in any script is read. At most 5 MB
on disk.

Shapes: n texts or pictures, L words and the start token, or cells, G hashed pieces a word, S pixels a side,
C channels, M names, B colours, D = M B width of the shared space.
"""

import inspect
import json
import re
import zlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from .weights import save_module

CELL = 8  # pixels a side of what the picture tower describes by one cell
CONFIG_NAME, WEIGHTS_NAME = "dual_encoder.json", "dual_encoder.safetensors"
_PIECES = 12  # hashed pieces of a word: itself and its trigrams
_LEAST_SHARE = 1e-6  # keeps the gradient of the root finite
_POWER = 0.5  # of a share
_LETTERS = 24  # of a word; the rest is dropped
_WORD = re.compile(r"\w+")
_PAD, _START, _RESERVED = 0, 1, 2


@lru_cache(maxsize=65536)
def word_pieces(word: str, num_buckets: int) -> tuple[int, ...]:
    """Buckets of a lower-case word: one for the word, one for each trigram of `<word>`, at most 12 together."""
    marked = f"<{word[:_LETTERS]}>"
    pieces = [marked, *(marked[start : start + 3] for start in range(len(marked) - 2))][:_PIECES]
    return tuple(_RESERVED + zlib.crc32(piece.encode()) % (num_buckets - _RESERVED) for piece in pieces)


def text_pieces(texts: Sequence[str], num_buckets: int, max_words: int) -> Tensor:
    """Buckets [n, L, G] int64 of texts, 0 for padding; a start token stands before the first `max_words` words."""
    rows = []
    for text in texts:
        # cut first: a text may go on for megabytes
        words = _WORD.findall(text[: 64 * max_words].lower())[:max_words]
        rows.append([(_START,), *(word_pieces(word, num_buckets) for word in words)])
    longest = max((len(row) for row in rows), default=1)
    pieces_nLG = np.full((len(rows), longest, _PIECES), _PAD, dtype=np.int64)
    for row, words in enumerate(rows):
        for column, word in enumerate(words):
            pieces_nLG[row, column, : len(word)] = word
    return torch.from_numpy(pieces_nLG)


class TextTower(nn.Module):
    """Hashed words, a small transformer, the mean of its outputs: logits of what a text is about, [n, M + B]."""

    def __init__(self, num_buckets: int, width: int, layers: int, heads: int, max_words: int, num_logits: int):
        super().__init__()
        self.num_buckets, self.max_words = num_buckets, max_words
        self.buckets = nn.Embedding(num_buckets, width, padding_idx=_PAD)
        self.positions = nn.Parameter(0.02 * torch.randn(max_words + 1, width))
        layer = nn.TransformerEncoderLayer(
            width, heads, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.out = nn.Linear(width, num_logits)
        nn.init.normal_(self.buckets.weight, std=0.3)
        with torch.no_grad():
            self.buckets.weight[_PAD] = 0

    def forward(self, pieces_nLG: Tensor) -> Tensor:
        count_nL1 = (pieces_nLG != _PAD).sum(2, keepdim=True)
        words_nLW = self.buckets(pieces_nLG).sum(2) / count_nL1.clamp(min=1)
        words_nLW = words_nLW + self.positions[: pieces_nLG.shape[1]]
        there_nL1 = count_nL1 > 0
        words_nLW = self.layers(words_nLW, src_key_padding_mask=~there_nL1[..., 0])
        return self.out((words_nLW * there_nL1).sum(1) / there_nL1.sum(1))


class _Residual(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.body = nn.Sequential(_convolution(channels, channels), nn.GELU(), _convolution(channels, channels))

    def forward(self, cells_nCSS: Tensor) -> Tensor:
        return F.gelu(cells_nCSS + self.body(cells_nCSS))


def _convolution(channels_in: int, channels_out: int, stride: int = 1, kernel: int = 3) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, kernel, stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(channels_out),
    )


class ImageTower(nn.Module):
    """Convolutions down to an eighth of the picture's side: logits of what each cell shows, [n, L, M + 1 + B].

    Of the M + 1 the last is for a cell that shows no object.
    """

    def __init__(self, width: int, num_logits: int):
        super().__init__()
        coarse, wide = width // 2, 4 * width
        self.body = nn.Sequential(
            _convolution(3, coarse, stride=4, kernel=7),
            nn.GELU(),
            _Residual(coarse),
            _convolution(coarse, width, stride=2),
            _Residual(width),
            nn.Conv2d(width, wide, 1, bias=False),
            nn.BatchNorm2d(wide),
            nn.GELU(),
        )
        self.out = nn.Linear(wide, num_logits)

    def forward(self, pictures_n3SS: Tensor) -> Tensor:
        return self.out(self.body(pictures_n3SS).flatten(2).transpose(1, 2))


def prepare_pictures(images: Sequence[np.ndarray], size: int) -> Tensor:
    """Pictures [H, W, 3] uint8, each of any size, squeezed to [n, 3, size, size] float32 around 0.

    ValueError for an array of another form.
    """
    rows = []
    for image in images:
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
            raise ValueError(f"A picture must be [H, W, 3] of uint8, not {image.shape} of {image.dtype}.")
        picture_13HW = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float()
        rows.append(F.interpolate(picture_13HW, (size, size), mode="bilinear", antialias=True))
    return torch.cat(rows) / 127.5 - 1 if rows else torch.zeros(0, 3, size, size)


class DualEncoder(nn.Module):
    """Text and pictures in one space. Frozen as loaded; `text` and `image` are trained by engine/dual.py.

    Args:
        num_names: M, names of objects that are told apart.
        num_colors: B, colours that are told apart.
        image_size: pixels a side that pictures are squeezed to.
        image_width: channels of the coarse cells.
        num_buckets: rows of the table that words and trigrams are hashed into.
        text_width, text_layers, text_heads: of the transformer.
        max_words: later words of a text are not read.
    """

    has_images = True
    class_template = "{}"

    def __init__(
        self,
        *,
        num_names: int = 64,
        num_colors: int = 16,
        image_size: int = 112,
        image_width: int = 96,
        num_buckets: int = 4096,
        text_width: int = 96,
        text_layers: int = 2,
        text_heads: int = 4,
        max_words: int = 48,
    ):
        super().__init__()
        sizes = (num_names, num_colors, image_size, image_width, text_width, text_layers, text_heads, max_words)
        if min(sizes) < 1:
            raise ValueError("The sizes of a dual encoder must be positive.")
        if image_size % CELL or image_width % 2:
            raise ValueError(f"image_size must be a multiple of {CELL} and image_width of 2.")
        if num_buckets <= _RESERVED:
            raise ValueError(f"num_buckets is {num_buckets}; it must be above {_RESERVED}.")
        self.config: dict[str, Any] = {
            "num_names": num_names,
            "num_colors": num_colors,
            "image_size": image_size,
            "image_width": image_width,
            "num_buckets": num_buckets,
            "text_width": text_width,
            "text_layers": text_layers,
            "text_heads": text_heads,
            "max_words": max_words,
        }
        self.num_names, self.dim = num_names, num_names * num_colors
        self.text = TextTower(num_buckets, text_width, text_layers, text_heads, max_words, num_names + num_colors)
        self.image = ImageTower(image_width, num_names + 1 + num_colors)

    def text_logits(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Logits of the names [n, M] and colours [n, B] that texts are about, with gradients."""
        pieces_nLG = text_pieces(texts, self.text.num_buckets, self.text.max_words)
        logits = self.text(pieces_nLG.to(self.text.positions.device))
        return logits[:, : self.num_names], logits[:, self.num_names :]

    def cell_logits(self, pictures_n3SS: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the names [n, L, M + 1] and colours [n, L, B] of prepared pictures, with gradients."""
        logits = self.image(pictures_n3SS)
        return logits[..., : self.num_names + 1], logits[..., self.num_names + 1 :]

    def texts(self, texts: Sequence[str]) -> Tensor:
        """L2-normalised embeddings [n, D]."""
        names_nM, colors_nB = self.text_logits(texts)
        return F.normalize((names_nM.softmax(1)[:, :, None] * colors_nB.softmax(1)[:, None]).flatten(1), dim=1)

    def pictures(self, pictures_n3SS: Tensor) -> Tensor:
        """L2-normalised embeddings [n, D] of prepared pictures; 0 only where no cell shows anything."""
        names_nLM, colors_nLB = self.cell_logits(pictures_n3SS)
        names_nLM = names_nLM.softmax(2)[..., : self.num_names]  # that of no object is left out
        share_nMB = names_nLM.transpose(1, 2) @ colors_nLB.softmax(2) / names_nLM.shape[1]
        return F.normalize(share_nMB.flatten(1).clamp_min(_LEAST_SHARE) ** _POWER, dim=1)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str], batch_size: int = 64) -> Tensor:
        """L2-normalised embeddings [n, D], float32; words beyond `max_words` are not read, no words are a text too."""
        rows = [self.texts(texts[start : start + batch_size]) for start in range(0, len(texts), batch_size)]
        return torch.cat(rows).float() if rows else torch.zeros(0, self.dim)

    @torch.no_grad()
    def embed_images(self, images: Sequence[np.ndarray], batch_size: int = 16) -> Tensor:
        """L2-normalised embeddings [n, D], float32, of pictures [H, W, 3] uint8."""
        weight = self.text.positions
        rows = []
        for start in range(0, len(images), batch_size):
            pictures_n3SS = prepare_pictures(images[start : start + batch_size], self.config["image_size"])
            rows.append(self.pictures(pictures_n3SS.to(weight.device, weight.dtype)).float())
        return torch.cat(rows) if rows else torch.zeros(0, self.dim)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write dual_encoder.json and dual_encoder.safetensors, each atomically."""
        save_module(self, self.config, folder, (CONFIG_NAME, WEIGHTS_NAME))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "DualEncoder":
        """The encoder that `save_pretrained` wrote, frozen and in evaluation mode.

        ValueError: missing, broken, or not what dual_encoder.json says.
        """
        folder = Path(folder)
        try:
            config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
            state = load_file(folder / WEIGHTS_NAME)
        except FileNotFoundError as error:
            raise ValueError(
                f"There is no whole dual encoder at {folder}: {Path(error.filename or WEIGHTS_NAME).name} is missing; "
                "run `python main.py dual` first."
            ) from None
        except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as error:
            raise ValueError(
                f"The dual encoder at {folder} is broken ({error}); copy it again, or train it anew."
            ) from None
        if not isinstance(config, dict) or set(config) - set(inspect.signature(cls).parameters):
            raise ValueError(f"{folder / CONFIG_NAME} has keys that no dual encoder has; train it anew.")
        encoder = cls(**config)
        expected = {name: tuple(value.shape) for name, value in encoder.state_dict().items()}
        found = {name: tuple(value.shape) for name, value in state.items()}
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        if wrong:
            raise ValueError(
                f"{folder / WEIGHTS_NAME} does not fit {CONFIG_NAME}: {wrong[0]} is {found.get(wrong[0])}, not "
                f"{expected.get(wrong[0])}; copy both files from one training."
            )
        encoder.load_state_dict(state)
        return encoder.eval().requires_grad_(False)
