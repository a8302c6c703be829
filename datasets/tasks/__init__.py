"""The benchmarks, one file each. Every file has a `BENCHMARK`: how its samples are read, and from which files."""

import difflib
import logging
from collections.abc import Sequence
from pathlib import Path

from ..scene import Sample
from . import (
    cap3d,
    contents,
    dialogue,
    embodied_qa,
    inventory,
    nr3d,
    nr3d_captions,
    object_caption,
    planning,
    scan2cap,
    scan2cap_nr3d,
    scanqa,
    scanrefer,
    scene30k,
    scene30k_captions,
    scene_description,
    sqa3d,
    targets,
)
from .cache import read_samples
from .common import Benchmark, Inputs, Scenes
from .problems import Problem, count_problems, in_one_sentence

__all__ = ["LOADERS", "Inputs", "Problem", "count_problems", "in_one_sentence", "inputs_of", "load_samples"]

LOADERS: dict[str, Benchmark] = {
    "scanrefer": scanrefer.BENCHMARK,
    "nr3d": nr3d.BENCHMARK,
    "scan2cap": scan2cap.BENCHMARK,
    "scan2cap_nr3d": scan2cap_nr3d.BENCHMARK,
    "object_caption": object_caption.BENCHMARK,
    "cap3d": cap3d.BENCHMARK,
    "scanqa": scanqa.BENCHMARK,
    "sqa3d": sqa3d.BENCHMARK,
    "embodied_qa": embodied_qa.BENCHMARK,
    "dialogue": dialogue.BENCHMARK,
    "planning": planning.BENCHMARK,
    "scene_description": scene_description.BENCHMARK,
    "inventory": inventory.BENCHMARK,
    "contents": contents.BENCHMARK,
    "scene30k": scene30k.BENCHMARK,
    "scene30k_captions": scene30k_captions.BENCHMARK,
    "scanrefer_targets": targets.SCANREFER,
    "nr3d_targets": targets.NR3D,
    "nr3d_captions": nr3d_captions.BENCHMARK,
}
_log = logging.getLogger(__name__)


def load_samples(
    root: str | Path, split: str, datasets: Sequence[str], *, scenes: Scenes, problems: list[Problem] | None = None
) -> list[Sample]:
    """Samples of some data sets in one split, in the order of `datasets` and of their files.

    Args:
        root: data root with `annotations/`, the split files and the label table.
        split: train, val or test; ScanQA also has test_w_obj and test_wo_obj.
        scenes: a SceneStore, or scenes or index entries by scene id. With a store, what was read is kept beside its
            scenes and read back while no input changes.
        problems: takes the records that cannot be used, of all kinds, and the rest is returned; None refuses them.

    Raises:
        ValueError: unknown data set, a file that is missing or unreadable as a whole; without `problems` also a
            record that cannot be used, naming the first and counting the others.
    """
    samples: list[Sample] = []
    found: list[Problem] = []
    for name in datasets:
        read, report = read_samples(_benchmark(name), name, Path(root), split, scenes, strict=problems is None)
        samples += read
        found += report.problems
        for note in report.notes:
            _log.warning("%s", note)
    if problems is not None:
        problems += found
    elif found:
        raise ValueError(in_one_sentence(found))
    return samples


def inputs_of(dataset: str, split: str) -> Inputs:
    """The files below the data root that a data set reads in one split."""
    return _benchmark(dataset).inputs(split)


def _benchmark(name: str) -> Benchmark:
    if name not in LOADERS:
        nearest = difflib.get_close_matches(name, LOADERS, n=1, cutoff=0.4)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"there are {', '.join(LOADERS)}."
        raise ValueError(f"Unknown data set {name!r}; {hint}")
    return LOADERS[name]
