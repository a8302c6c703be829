"""Object captioning: the description of one given object as a sentence, from ScanRefer's descriptions."""

from pathlib import Path

from ..scene import Sample
from .captions import to_captions
from .common import Benchmark, Index, Inputs
from .problems import Report
from .rows import annotation_file
from .scanrefer import file_of, read_descriptions


def load(root: Path, split: str, index: Index, report: Report) -> list[Sample]:
    """One sample per described object (per description in the training split), with the object's box as query."""
    descriptions = read_descriptions(annotation_file(root, file_of(split)), report)
    return to_captions(descriptions, split, index, report, task="object_caption", caption=lambda one: one.text)


BENCHMARK = Benchmark(load, lambda split: Inputs((f"annotations/{file_of(split)}",)))
