"""Labels of a ScanNet scan: the label table, and objects from over-segmentation and aggregation.

Shapes: V mesh vertices, S segments.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from ..utils.files import read_text

LABEL_MAP_NAME = "scannetv2-labels.combined.tsv"


@dataclass
class Annotation:
    """Objects of a scan: objectId and NYU40 id per vertex, and the raw label of every object."""

    instance_ids_V: np.ndarray  # int32, -1 where unlabelled
    nyu40_V: np.ndarray  # uint8, 0 where unlabelled
    labels: dict[int, str]  # objectId -> raw label


def load_label_map(path: str | Path) -> dict[str, int]:
    """raw_category -> nyu40id of ScanNet's label table (tab-separated); ValueError where it is not one."""
    path = Path(path)
    lines = read_text(
        path, f"There is no label table at {path}; copy {LABEL_MAP_NAME} from ScanNet there."
    ).splitlines()
    header = lines[0].split("\t") if lines else []
    if "raw_category" not in header or "nyu40id" not in header:
        raise ValueError(f"{path} is not ScanNet's label table: its first line lacks raw_category or nyu40id.")
    name, number = header.index("raw_category"), header.index("nyu40id")
    table: dict[str, int] = {}
    for count, line in enumerate(lines[1:], 2):
        cells = line.split("\t")
        if not line.strip():
            continue
        if len(cells) <= max(name, number) or not cells[number].strip().isdigit():
            raise ValueError(f"{path}, line {count}: no whole number in the column nyu40id.")
        table[cells[name].strip()] = int(cells[number])
    return table


def _read_json(path: Path) -> Any:
    try:
        return orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        raise BrokenJson(f"{path} is not whole JSON ({error}); copy it again from its source.") from None


class BrokenJson(ValueError):
    """A file that is not JSON."""


def read_annotation(scan_dir: Path, num_vertices: int, label_map: dict[str, int]) -> Annotation | None:
    """Objects of a scan from its over-segmentation and aggregation; None where both files are absent."""
    scene_id = scan_dir.name
    segs_path = scan_dir / f"{scene_id}_vh_clean_2.0.010000.segs.json"
    groups_path = scan_dir / f"{scene_id}.aggregation.json"
    if not segs_path.exists() and not groups_path.exists():
        return None
    for path in (segs_path, groups_path):
        if not path.exists():
            raise ValueError(
                f"{path} is missing though its partner is there; copy it, or remove both to go unlabelled."
            )
    try:
        segments_V = np.asarray(_read_json(segs_path)["segIndices"], dtype=np.int64)
        groups = [
            (int(group["objectId"]), str(group["label"]), np.asarray(group["segments"], dtype=np.int64))
            for group in _read_json(groups_path)["segGroups"]
        ]
    except BrokenJson:
        raise
    except KeyError as error:
        raise ValueError(f"{scan_dir}: segmentation or aggregation lacks {error}; copy both files again.") from None
    except (TypeError, ValueError, OverflowError):
        raise ValueError(
            f"{segs_path.name} or {groups_path.name} in {scan_dir} is not in ScanNet's form; copy both files again."
        ) from None
    if segments_V.shape != (num_vertices,):
        raise ValueError(f"{segs_path} labels {segments_V.size} vertices, the mesh has {num_vertices}: not one scan.")
    names, index_V = np.unique(segments_V, return_inverse=True)
    instance_S, nyu40_S = np.full(len(names), -1, np.int32), np.zeros(len(names), np.uint8)
    labels: dict[int, str] = {}
    for object_id, label, segments in groups:
        if label not in label_map:
            raise ValueError(
                f"{groups_path}: label {label!r} of object {object_id} is not in the label table; add a row for it."
            )
        rows = np.searchsorted(names, segments)
        rows = rows[(rows < len(names)) & (names[np.minimum(rows, len(names) - 1)] == segments)]
        instance_S[rows], nyu40_S[rows] = object_id, label_map[label]
        labels[object_id] = label
    return Annotation(instance_S[index_V], nyu40_S[index_V], labels)
