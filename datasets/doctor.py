"""What is missing or wrong below a data root, and the command that mends it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .scan_labels import LABEL_MAP_NAME, load_label_map
from .scannet import PrepareOptions, is_prepared, list_scans, read_split
from .scene_store import SceneStore
from .tasks import load_samples
from .tasks.scene30k import FILE as SCENE30K_FILE
from .tasks.scene30k import count_leaked

ERROR, WARNING, NOTE = "error", "warning", "note"
# files that each data set reads in one split, below annotations/
FILES = {
    "scanrefer": ("ScanRefer_filtered_{split}.json",),
    "nr3d": ("nr3d.csv",),
    "scan2cap": ("ScanRefer_filtered_{split}.json",),
    "object_caption": ("ScanRefer_filtered_{split}.json",),
    "scanqa": ("ScanQA_v1.0_{split}.json",),
    "sqa3d": ("v1_balanced_questions_{split}_scannetv2.json", "v1_balanced_sqa_annotations_{split}_scannetv2.json"),
    "dialogue": ("3d_llm_embodied_dialogue_filtered_{split}.json",),
    "planning": ("3d_llm_embodied_planning_filtered_{split}.json",),
    "scene_description": ("3d_llm_scene_description_{split}.json",),
    "scene30k": (SCENE30K_FILE,),
}
_MAX_NAMED = 5


@dataclass(frozen=True)
class Finding:
    """One thing about a data root. `level` is error (stops a command), warning (a part is missing) or note."""

    level: str
    what: str
    fix: str = ""


def examine(root: str | Path) -> list[Finding]:
    """Look at a data root (data/README.md): files, preparation, annotations against scenes, leaked rows.

    Reads every annotation file that is there; for all of ScanNet's benchmarks this takes a minute or so.
    """
    root = Path(root)
    if not root.is_dir():
        return [
            Finding(ERROR, f"There is no data root {root}.", f"python main.py rooms --out {root} --train 24 --val 8")
        ]
    findings = list(_top_files(root))
    findings += _scans(root)
    findings += _annotations(root)
    findings += _leak(root)
    return findings


def _top_files(root: Path) -> Iterator[Finding]:
    for split in ("train", "val"):
        if not (root / f"scannetv2_{split}.txt").exists():
            yield Finding(
                ERROR, f"scannetv2_{split}.txt is missing.", f"copy ScanNet's scannetv2_{split}.txt into {root}"
            )
    try:
        load_label_map(root / LABEL_MAP_NAME)
    except ValueError as error:
        yield Finding(ERROR, str(error), f"copy {LABEL_MAP_NAME} from ScanNet into {root}")
    splits = [set(read_split(root, split)) for split in ("train", "val") if (root / f"scannetv2_{split}.txt").exists()]
    if len(splits) == 2 and splits[0] & splits[1]:
        shared = sorted(splits[0] & splits[1])
        yield Finding(
            ERROR, f"Train and val share {_some(shared)}.", f"take them off one of the split files in {root}"
        )


def _label_table(root: Path) -> dict[str, int] | None:
    """The label table; None where it is missing or broken, which `_top_files` reports."""
    try:
        return load_label_map(root / LABEL_MAP_NAME)
    except ValueError:
        return None


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return f"{len(names)}: {', '.join(names[:_MAX_NAMED])}{more}"


def _scans(root: Path) -> Iterator[Finding]:
    prepare = f"python main.py prepare --root {root}"
    out = root / "prepared"
    if (root / "scans").is_dir():
        scans = list_scans(root)
        present = {scan.name for scan in scans}
        for split in ("train", "val"):
            if (root / f"scannetv2_{split}.txt").exists():
                missing = sorted(set(read_split(root, split)) - present)
                if missing:
                    yield Finding(
                        WARNING,
                        f"Scans of split {split} are missing, {_some(missing)}.",
                        f"copy them to {root / 'scans'}",
                    )
        table = _label_table(root)
        if table is not None:
            options = PrepareOptions()
            stale = [scan.name for scan in scans if not is_prepared(scan, table, out / f"{scan.name}.npz", options)]
            if stale:
                yield Finding(
                    WARNING, f"Scans not prepared, changed since, or prepared otherwise, {_some(stale)}.", prepare
                )
    elif not out.is_dir():
        yield Finding(ERROR, f"{root} has neither scans/ nor prepared/.", f"copy the raw scans to {root / 'scans'}")
    for partial in sorted(out.glob("*.partial")) if out.is_dir() else []:
        yield Finding(NOTE, f"{partial.name} was left by an interrupted run.", f"rm {partial}")


def _annotations(root: Path) -> Iterator[Finding]:
    try:
        store = SceneStore(root / "prepared")
    except ValueError as error:
        yield Finding(ERROR, str(error), f"python main.py prepare --root {root}")
        return
    for dataset in FILES:
        for split in ("train", "val"):
            if dataset == "scene30k" and split == "val":
                continue
            names = [name.format(split=split) for name in FILES[dataset]]
            absent = [name for name in names if not (root / "annotations" / name).exists()]
            if absent:
                yield Finding(
                    WARNING,
                    f"{dataset} ({split}): annotations/{absent[0]} is missing.",
                    f"data/README.md says where to get it; leave {dataset} out of data.datasets until then",
                )
                continue
            try:
                samples = load_samples(root, split, [dataset], scenes=store)
            except ValueError as error:
                yield Finding(ERROR, f"{dataset} ({split}): {error}", f"python main.py prepare --root {root}")
                continue
            yield Finding(NOTE, f"{dataset} ({split}): {len(samples)} samples.")


def _leak(root: Path) -> Iterator[Finding]:
    if not (root / "annotations" / SCENE30K_FILE).exists() or not (root / "scannetv2_val.txt").exists():
        return
    try:
        leaked, total = count_leaked(root)
    except ValueError as error:
        yield Finding(ERROR, str(error), "copy Scene-30K.jsonl again from its source")
        return
    if leaked:
        yield Finding(
            WARNING,
            f"Scene-30K: {leaked} of {total} rows are on validation or test scenes; they are dropped before training.",
            "nothing to do here; do not compare with models that were trained on the whole file",
        )
