"""Cap3D object captioning: captions of Objaverse objects, `annotations/Cap3D_automated_Objaverse_full.csv`.

The file has no header; a row is uid, caption. An object's cloud is `cap3d/<uid>.ply` below the data root; it becomes a
scene of its own, named by the uid, whose one object is the whole cloud (`prepare_objects`). Objaverse has no scale:
positions are in the file's own units.

Lists of uids, one a line, are optional: `annotations/Cap3D_<split>.txt`. Without one of its own, a split takes every
captioned object that no other split's list names, and says so.
"""

import re
from collections.abc import Hashable
from dataclasses import replace
from pathlib import Path

import numpy as np

from ...utils.labels import OTHERS
from ..prompts import CAPTION_QUESTION
from ..readers import read_scene
from ..scannet import SPLITS, Failure
from ..scene import Sample, Scene, save_scene
from .common import Benchmark, Index, Inputs, scene_of
from .problems import Report
from .rows import Row, annotation_file, first_time, read_csv, read_utf8, shown

FILE = "Cap3D_automated_Objaverse_full.csv"
FOLDER = "cap3d"
OBJECT_ID = 0
_UID = re.compile(r"[A-Za-z0-9_-]{1,100}")  # it becomes the name of a file


def read_object(path: str | Path) -> Scene:
    """An object's cloud as a scene: frame as in the file, one object OBJECT_ID whose box is the cloud's extent."""
    scene = read_scene(path, align="none")
    low_3, high_3 = scene.points_N3.min(0), scene.points_N3.max(0)
    box_7 = np.concatenate([(low_3 + high_3) / 2, high_3 - low_3, [0.0]]).astype(np.float32)
    return replace(
        scene,
        instance_ids_N=np.full(len(scene.points_N3), OBJECT_ID, np.int32),
        object_ids_K=np.array([OBJECT_ID], np.int32),
        object_labels=["object"],
        class_ids_K=np.array([OTHERS], np.int32),
        boxes_K7=box_7[None],
    )


def _clouds(root: str | Path) -> list[Path]:
    return sorted((Path(root) / FOLDER).glob("*.ply"))


def has_objects(root: str | Path) -> bool:
    """Whether a data root holds clouds of Cap3D's objects."""
    return bool(_clouds(root))


def prepare_objects(root: str | Path, out: str | Path | None = None) -> list[Failure]:
    """Make prepared scenes of all clouds in `root/cap3d` in `out` (default `root/prepared`); newer ones stay.

    Returns:
        clouds that could not be read, with the reason.
    """
    out = Path(out) if out else Path(root) / "prepared"
    failures = []
    for path in _clouds(root):
        target = out / f"{path.stem}.npz"
        if target.exists() and target.stat().st_mtime_ns >= path.stat().st_mtime_ns:
            continue
        try:
            save_scene(read_object(path), target)
        except ValueError as error:
            failures.append(Failure(path.stem, str(error)))
    return failures


def _list_file(split: str) -> str:
    return f"Cap3D_{split}.txt"


def read_uids(root: Path, split: str) -> set[str] | None:
    """uids of a split's list; None where there is none. A pickled list is refused."""
    path = root / "annotations" / _list_file(split)
    pickled = path.with_suffix(".pkl")
    if not path.is_file() and pickled.exists():
        raise ValueError(
            f"{pickled} is a pickle, which can run code when it is read; write its uids to {path.name}, one a line."
        )
    return set(read_utf8(path).split()) if path.is_file() else None


def load(root: Path, split: str, index: Index, report: Report) -> list[Sample]:
    """One object_caption sample per captioned object, the object's extent as query box; no target boxes."""
    path = annotation_file(root, FILE)
    own = read_uids(root, split)
    others = {uid for other in SPLITS if other != split for uid in read_uids(root, other) or ()}
    seen: dict[Hashable, int] = {}

    def read(row: Row) -> Sample | None:
        uid = row.filled("uid")
        if (uid not in own) if own is not None else (uid in others):
            return None
        if not _UID.fullmatch(uid):
            raise row.bad("uid", f"{shown(uid)!r} is not a uid of letters and digits; use the official file.")
        first_time(seen, uid, row, "uid")
        caption = row.filled("caption")
        info = scene_of(index, uid, row)
        number = info.row_of(OBJECT_ID)
        if number is None:
            raise row.error("no_box", "uid", f" names {uid}, which was not prepared as an object; prepare it again.")
        return Sample(
            sample_id=f"cap3d-{uid}",
            task="object_caption",
            dataset="cap3d",
            scene_id=uid,
            question=CAPTION_QUESTION,
            answer=caption,
            references=[caption],
            query_box_7=info.boxes_K7[number],
        )

    samples = report.keep(read_csv(path, ("uid", "caption"), report, header=False), read)
    if own is None:
        report.notes.append(
            f"cap3d has no list annotations/{_list_file(split)}: its split {split} is all {len(samples)} objects that "
            "no other split's list names."
        )
    uncaptioned = sorted((own or set()) - set(seen))
    if uncaptioned:
        report.notes.append(
            f"cap3d: {len(uncaptioned)} objects of {_list_file(split)} have no caption, as {shown(uncaptioned[0])}."
        )
    return samples


def _inputs(_split: str) -> Inputs:
    return Inputs((f"annotations/{FILE}",), tuple(f"annotations/{_list_file(split)}" for split in SPLITS))


BENCHMARK = Benchmark(load, _inputs)
