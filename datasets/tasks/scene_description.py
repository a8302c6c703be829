"""3D-LLM scene description as LL3DA filtered it: `annotations/3d_llm_scene_description_{train,val}.json`.

One description of the room a scene.
"""

from pathlib import Path

from ..scene import Sample
from .common import Scenes, load_3d_llm


def load(root: str | Path, split: str, scenes: Scenes) -> list[Sample]:
    """Samples of one split; a row number is the sample's name, as the files have none."""
    return load_3d_llm(root, split, scenes, name="scene_description", task="scene_description")
