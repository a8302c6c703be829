"""3D-LLM dialogue as LL3DA filtered it: `annotations/3d_llm_embodied_dialogue_filtered_{train,val}.json`.

The question holds the whole conversation so far, written `### human: … ### assistant: …`.
"""

from pathlib import Path

from ..scene import Sample
from .common import Scenes, load_3d_llm


def load(root: str | Path, split: str, scenes: Scenes) -> list[Sample]:
    """Samples of one split; a row number is the sample's name, as the files have none."""
    return load_3d_llm(root, split, scenes, name="embodied_dialogue_filtered", task="dialogue")
