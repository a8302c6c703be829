"""3D-LLM planning as LL3DA filtered it: `annotations/3d_llm_embodied_planning_filtered_{train,val}.json`.

The question holds the goal and the steps already done, the answer the next step.
"""

from pathlib import Path

from ..scene import Sample
from .common import Scenes, load_3d_llm


def load(root: str | Path, split: str, scenes: Scenes) -> list[Sample]:
    """Samples of one split; a row number is the sample's name, as the files have none."""
    return load_3d_llm(root, split, scenes, name="embodied_planning_filtered", task="planning")
