"""Checks of a data root's scenes: ScanNet's lists, raw scans, prepared scenes, room on the disk."""

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from ..published import LABEL_TABLE_SHA256, SCENE_LISTS, SCENE_LISTS_PLACE, hash_of_ids
from ..scan_labels import LABEL_MAP_NAME
from ..scannet import SPLITS, PrepareOptions, is_prepared
from ..scannet_arrays import UNALIGNED
from ..scene import load_scene
from ..sources import ARRAYS, PICTURES, RAW, Source
from .findings import Finding, Level, SceneRow, many, some
from .place import Place

# bytes of a prepared point: coordinates, colour, object, class, vertex number
_POINT_BYTES = 12 + 3 + 4 + 1 + 4
PREPARED_BYTES = PrepareOptions().max_points * _POINT_BYTES
_LABEL_FILES = ("_vh_clean_2.0.010000.segs.json", ".aggregation.json")


def check_scenes(place: Place) -> tuple[list[SceneRow], list[Finding]]:
    """Rows of the lists of scenes, and all findings about scenes."""
    findings = list(place.findings)
    rows = []
    for split in SPLITS:
        row, found = _list(place, split)
        rows.append(row)
        findings += found
    findings += _shared(place)
    findings += _label_table(place)
    findings += _missing_scans(place)
    findings += _incomplete(place)
    findings += _unprepared(place)
    findings += _array_notes(place)
    findings += _partials(place)
    return rows, findings


def _list(place: Place, split: str) -> tuple[SceneRow, list[Finding]]:
    """One list of scenes: is it there, and is it ScanNet's own?"""
    name = f"scannetv2_{split}.txt"
    path, published = place.root / name, SCENE_LISTS[split]
    expected = None if place.generated else published.scenes
    scene_ids = place.lists.get(split)
    if scene_ids is None:
        row = SceneRow(split, None, expected, None)
        if path.exists() or (place.generated and split == "test"):
            return row, []  # a broken one is a finding of the place; generated rooms have no test scenes
        level: Level = "warning" if split == "test" else "error"
        why = " Without it rows of Scene-30K on test scenes cannot be found." if split == "test" else ""
        fix = f"copy it from {SCENE_LISTS_PLACE}, into {place.root}"
        return row, [Finding(level, "list_missing", f"{name} is missing.{why}", fix, "", split, 0, expected, (name,))]
    known = set(scene_ids)
    row = SceneRow(split, len(scene_ids), expected, None, len(known & set(place.sources)), len(known & place.prepared))
    if place.generated:
        return row, []
    row.official = hash_of_ids(scene_ids) == published.sorted_sha256
    if not row.official:
        message = (
            f"{name} is not ScanNet's own list: it names {many(len(scene_ids), 'scene')}, ScanNet's {expected:,}."
        )
        fix = f"copy ScanNet's from {SCENE_LISTS_PLACE}; leave it where you mean to use scenes of your own"
        found = Finding("warning", "list_other", message, fix, "", split, len(scene_ids), expected, (name,))
        return row, [found]
    if hashlib.sha256(path.read_bytes()).hexdigest() != published.sha256:
        message = f"{name} names ScanNet's scenes, in another order or with other line ends."
        return row, [Finding("note", "list_reordered", message, "", "", split, files=(name,))]
    return row, []


def _shared(place: Place) -> Iterator[Finding]:
    """Scenes that two lists name."""
    for number, first in enumerate(SPLITS):
        for second in SPLITS[number + 1 :]:
            shared = sorted(set(place.lists.get(first, ())) & set(place.lists.get(second, ())))
            if shared:
                names = tuple(f"scannetv2_{split}.txt" for split in (first, second))
                message = f"{first.capitalize()} and {second} share {many(len(shared), 'scene')}: {some(shared)}."
                fix = f"take them off one of {names[0]} and {names[1]} in {place.root}"
                yield Finding("error", "lists_share", message, fix, count=len(shared), expected=0, files=names)


def _label_table(place: Place) -> Iterator[Finding]:
    if place.generated or place.table is None:
        return
    digest = hashlib.sha256((place.root / LABEL_MAP_NAME).read_bytes()).hexdigest()
    if digest != LABEL_TABLE_SHA256:
        message = f"{LABEL_MAP_NAME} is not the one that ScanNet hands out; classes may differ."
        yield Finding("note", "label_table_other", message, files=(LABEL_MAP_NAME,))


def _missing_scans(place: Place) -> Iterator[Finding]:
    """Scans of train and val that are neither there nor prepared; test scans are of no use without labels."""
    present = set(place.sources) | place.prepared
    if not present:
        message = f"{place.root} has no scans: neither scans/ nor prepared arrays nor prepared scenes."
        fix = f"copy the raw scans to {place.root / 'scans'}; data/README.md says which files of a scan are needed"
        yield Finding("error", "scans_missing", message, fix, files=("scans",))
        return
    for split in ("train", "val"):
        listed = place.lists.get(split, [])
        missing = sorted(set(listed) - present)
        if missing:
            message = f"{len(missing):,} of {len(set(listed)):,} {split} scans are missing: {some(missing)}."
            fix = f"copy them to {place.root / 'scans'}, a folder each"
            files = tuple(f"scans/{scene_id}" for scene_id in missing)
            yield Finding("warning", "scans_missing", message, fix, "", split, len(missing), 0, files)


def _incomplete(place: Place) -> Iterator[Finding]:
    """Raw scans that lack a file."""
    lacking: dict[str, list[str]] = {}
    for source in place.sources.values():
        for suffix in _lacks(source):
            lacking.setdefault(suffix, []).append(source.scene_id)
    effects: dict[str, tuple[Level, str]] = {
        "_vh_clean_2.ply": ("error", "they cannot be prepared"),
        ".txt": ("warning", "they stay in their raw frame, and SQA3D's poses in it"),
        "both label files": ("warning", "they are prepared without objects"),
    }
    for suffix, scene_ids in lacking.items():
        level, effect = effects.get(suffix, ("error", "they cannot be prepared"))
        what = f"<scene_id>{suffix}" if suffix.startswith(("_", ".")) else suffix
        message = f"{many(len(scene_ids), 'scan')} without {what}, so {effect}: {some(scene_ids)}."
        suffixes = _LABEL_FILES if suffix == "both label files" else (suffix,)
        files = tuple(f"scans/{one}/{one}{suffix}" for one in scene_ids for suffix in suffixes)
        fix = f"copy these files into the scans' folders below {place.root / 'scans'}"
        yield Finding(level, "scan_incomplete", message, fix, count=len(scene_ids), expected=0, files=files)
    alone = sorted(source.scene_id for source in place.sources.values() if source.kind == PICTURES)
    if alone:
        message = f"{many(len(alone), 'scene')} with pictures but no geometry: {some(alone)}."
        fix = "copy <scene_id>_vh_clean_2.ply and its label files beside them, or prepared arrays"
        yield Finding("warning", "pictures_alone", message, fix, count=len(alone), expected=0)


def _lacks(source: Source) -> list[str]:
    """What a raw scan lacks: suffixes, or "both label files"."""
    if source.kind != RAW:
        return []

    def has(suffix: str) -> bool:
        return (source.folder / f"{source.scene_id}{suffix}").exists()

    lacks = [suffix for suffix in ("_vh_clean_2.ply", ".txt") if not has(suffix)]
    labels = [suffix for suffix in _LABEL_FILES if not has(suffix)]
    return lacks + (["both label files"] if len(labels) == len(_LABEL_FILES) else labels)


def _unprepared(place: Place) -> Iterator[Finding]:
    """Scans without a current prepared file, and whether the disk has room for them."""
    out = place.root / "prepared"
    stale = []
    for source in place.sources.values():
        usable = source.kind != PICTURES and "_vh_clean_2.ply" not in _lacks(source)
        known = source.kind == ARRAYS or place.table is not None
        if usable and known:
            current = is_prepared(source, place.table or {}, out / f"{source.scene_id}.npz", PrepareOptions())
            if not current:
                stale.append(source.scene_id)
    if not stale:
        return
    message = f"{many(len(stale), 'scan')} not prepared, or changed since: {some(sorted(stale))}."
    files = tuple(f"prepared/{scene_id}.npz" for scene_id in sorted(stale))
    # annotations are read from prepared scenes alone, so without any nothing runs
    level: Level = "warning" if place.prepared else "error"
    yield Finding(level, "not_prepared", message, place.prepare, "", "", len(stale), 0, files)
    needed, free = len(stale) * PREPARED_BYTES, free_bytes(place.root)
    if free < needed:
        message = f"Preparing {many(len(stale), 'scan')} takes up to {gigabytes(needed)}; {gigabytes(free)} are free."
        fix = f"make room on the disk of {place.root}, or write elsewhere: {place.prepare} --out FOLDER"
        yield Finding("error", "disk_full", message, fix, count=free, expected=needed)


def _array_notes(place: Place) -> Iterator[Finding]:
    """What `prepare` noted about scenes that are made of the field's arrays."""
    unaligned, frameless = [], []
    for scene_id in sorted(place.prepared):
        source = place.sources.get(scene_id)
        if source is None or source.kind != ARRAYS:
            continue
        scene = load_scene(place.root / "prepared" / f"{scene_id}.npz", mapped=True)
        if any(note.startswith(UNALIGNED) for note in scene.notes):
            unaligned.append(scene_id)
        if not scene.raw_frame_known:
            frameless.append(scene_id)
    if unaligned:
        message = (
            f"{many(len(unaligned), 'scene')} came with boxes of the unaligned cloud (_aligned_bbox.npy); they were "
            f"made again from the vertices: {some(unaligned)}."
        )
        fix = "nothing to do here; do not use these .npy boxes elsewhere"
        yield Finding("warning", "boxes_unaligned", message, fix, count=len(unaligned), expected=0)
    if frameless:
        message = (
            f"{many(len(frameless), 'scene')} without <scene_id>.txt, so SQA3D's poses cannot be placed: "
            f"{some(frameless)}."
        )
        fix = f"copy ScanNet's <scene_id>.txt beside the arrays, then {place.prepare}"
        files = tuple(f"{scene_id}.txt" for scene_id in frameless)
        yield Finding("warning", "raw_frame_unknown", message, fix, count=len(frameless), expected=0, files=files)


def _partials(place: Place) -> Iterator[Finding]:
    out = place.root / "prepared"
    for partial in sorted(out.glob("*.partial")) if out.is_dir() else []:
        message = f"{partial.name} was left by an interrupted run."
        yield Finding("note", "partial_left", message, f"rm -r {partial}", files=(f"prepared/{partial.name}",))


def free_bytes(path: Path) -> int:
    """Free bytes on the disk that a path lies on, or would lie on."""
    path = path.resolve()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def gigabytes(count: int) -> str:
    """Bytes in words."""
    return f"{count / 1e9:,.1f} GB"
