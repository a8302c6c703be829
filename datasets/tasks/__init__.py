"""The benchmarks, one file each. Every file has `load(root, split, scenes) -> list[Sample]`."""

import difflib
from collections.abc import Callable, Sequence
from pathlib import Path

from ..scene import Sample
from . import (
    dialogue,
    nr3d,
    object_caption,
    planning,
    scan2cap,
    scanqa,
    scanrefer,
    scene30k,
    scene_description,
    sqa3d,
)
from .common import Scenes

LOADERS: dict[str, Callable[[str | Path, str, Scenes], list[Sample]]] = {
    "scanrefer": scanrefer.load,
    "nr3d": nr3d.load,
    "scan2cap": scan2cap.load,
    "object_caption": object_caption.load,
    "scanqa": scanqa.load,
    "sqa3d": sqa3d.load,
    "dialogue": dialogue.load,
    "planning": planning.load,
    "scene_description": scene_description.load,
    "scene30k": scene30k.load,
}


def load_samples(root: str | Path, split: str, datasets: Sequence[str], *, scenes: Scenes) -> list[Sample]:
    """Samples of some data sets in one split, in the order of `datasets` and of their files.

    Args:
        root: data root with `annotations/`, the split files and the label table.
        split: train, val or test.
        scenes: a SceneStore, or scenes or index entries by scene id.

    Raises:
        ValueError: unknown data set, missing or broken file, a row naming an unknown scene or object.
    """
    samples: list[Sample] = []
    for name in datasets:
        if name not in LOADERS:
            nearest = difflib.get_close_matches(name, LOADERS, n=1, cutoff=0.4)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"there are {', '.join(LOADERS)}."
            raise ValueError(f"Unknown data set {name!r}; {hint}")
        samples += LOADERS[name](root, split, scenes)
    return samples
