"""Object captioning: the description of one given object as a sentence, from ScanRefer's descriptions."""

from pathlib import Path

from ..scene import Sample
from .captions import load_captions
from .common import Scenes
from .scanrefer import Description


def _sentence(one: Description) -> str:
    return one.text


def load(root: str | Path, split: str, scenes: Scenes) -> list[Sample]:
    """One sample per described object (per description in the training split), with the object's box as query."""
    return load_captions(root, split, scenes, dataset="object_caption", task="object_caption", caption=_sentence)
