"""Scan2Cap, dense captioning: captions of objects from ScanRefer's descriptions, in their official token form.

References are the tokens joined by blanks, lower-case; the scorer cuts them to 30 and adds `sos` and `eos`.
"""

from pathlib import Path

from ..scene import Sample
from .captions import load_captions
from .common import Scenes
from .scanrefer import Description


def _tokens(one: Description) -> str:
    return " ".join(one.tokens)


def load(root: str | Path, split: str, scenes: Scenes) -> list[Sample]:
    """One sample per described object (per description in the training split), with the object's box as query."""
    return load_captions(root, split, scenes, dataset="scan2cap", task="dense_caption", caption=_tokens)
