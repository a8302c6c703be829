"""Scan2Cap, dense captioning: captions of objects from ScanRefer's descriptions, in their official token form.

References are the tokens joined by blanks, lower-case; the scorer cuts them to 30 and adds `sos` and `eos`.
"""

from pathlib import Path

from ..scene import Sample
from .captions import joined_tokens, to_captions
from .common import Benchmark, Index, Inputs
from .problems import Report
from .rows import annotation_file
from .scanrefer import file_of, read_descriptions


def load(root: Path, split: str, index: Index, report: Report) -> list[Sample]:
    """One sample per described object (per description in the training split), with the object's box as query."""
    descriptions = read_descriptions(annotation_file(root, file_of(split)), report)
    return to_captions(descriptions, split, index, report, task="dense_caption", caption=joined_tokens)


BENCHMARK = Benchmark(load, lambda split: Inputs((f"annotations/{file_of(split)}",)))
