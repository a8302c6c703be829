"""The label table of generated rooms, in the columns of ScanNet's `scannetv2-labels.combined.tsv`.

Only the labels that rooms use; the columns for WordNet, ModelNet, ShapeNet and Matterport stay empty.
"""

from collections.abc import Mapping
from pathlib import Path

from ...utils.files import write_whole
from .catalogue import CATALOGUE, NYU40_NAMES, raw_label

COLUMNS = (
    *("id", "raw_category", "category", "count", "nyu40id", "eigen13id", "nyuClass", "nyu40class", "eigen13class"),
    *("ModelNet40", "ModelNet10", "ShapeNetCore55", "synsetoffset", "wnsynsetid", "wnsynsetkey"),
    *("mpcat40", "mpcat40index"),
)
_EIGEN13 = {
    "Bed": (1, {4}),
    "Books": (2, {23}),
    "Chair": (4, {5}),
    "Floor": (5, {2}),
    "Furniture": (6, {3, 10, 12, 17, 24, 32, 36, 39}),
    "Objects": (7, {16, 18, 19, 27, 28, 29, 30, 33, 34, 35, 38, 40}),
    "Picture": (8, {11}),
    "Sofa": (9, {6}),
    "Table": (10, {7, 14}),
    "TV": (11, {25}),
    "Wall": (12, {1, 8}),
    "Window": (13, {9}),
}


def label_rows() -> list[tuple[str, int]]:
    """(raw label, NYU40 id) of everything that rooms can hold, wall and floor first."""
    items = {raw_label(item): item.nyu40 for item in CATALOGUE.values()}
    return [("wall", 1), ("floor", 2), *sorted(items.items())]


def write_label_table(path: Path, counts: Mapping[str, int]) -> None:
    """Write the table atomically; `counts` says how many objects have each raw label."""
    lines = ["\t".join(COLUMNS)]
    for number, (label, nyu40) in enumerate(label_rows(), start=1):
        name = NYU40_NAMES[nyu40]
        eigen = next((title, index) for title, (index, members) in _EIGEN13.items() if nyu40 in members)
        row = [number, label, label, counts.get(label, 0), nyu40, eigen[1], name, name, eigen[0]]
        lines.append("\t".join([*map(str, row), *[""] * (len(COLUMNS) - len(row))]))
    write_whole(path, "\n".join(lines) + "\n")
