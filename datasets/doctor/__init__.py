"""What is missing or wrong below a data root, and the file or the command that mends it."""

from pathlib import Path

from .advice import getting_started, real_data
from .annotations import check_annotations
from .findings import SCHEMA, DataRow, Examination, Finding, SceneRow
from .place import is_empty, take_in
from .report import findings_text, to_text
from .scans import check_scenes, free_bytes, gigabytes

__all__ = [
    "SCHEMA",
    "DataRow",
    "Examination",
    "Finding",
    "SceneRow",
    "examine",
    "findings_text",
    "free_bytes",
    "getting_started",
    "gigabytes",
    "to_text",
]


def examine(root: str | Path) -> Examination:
    """Look at a data root (data/README.md): lists of scenes, scans, preparation, annotations, leaked scenes.

    Reads every annotation file that is there; for all of ScanNet's benchmarks this takes a minute or so at first.
    """
    root = Path(root)
    if not root.is_dir():
        made = f"python main.py rooms --out {root} --train 24 --val 8"
        missing = Finding(
            "error", "root_missing", f"There is no data root {root}.", f"make one of generated rooms: {made}"
        )
        return Examination(str(root), "absent", findings=[missing], advice=getting_started(root))
    if is_empty(root):
        message = f"{root} is empty: no scans, no lists of scenes, no annotations."
        empty = Finding("error", "root_empty", message, "follow the steps below")
        return Examination(str(root), "empty", findings=[empty], advice=getting_started(root))
    place = take_in(root)
    scenes, findings = check_scenes(place)
    rows, more = check_annotations(place)
    bare = not place.sources and not place.prepared
    advice = real_data(root) if bare else []
    kind = "generated" if place.generated else "scans"
    return Examination(str(root), kind, scenes, rows, findings + more, advice)
