"""Where a data root holds each scene's data: raw scans, prepared arrays, labelled instances, pictures.

They are told apart by the files present.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .frames import has_frames, list_pictures
from .scannet_arrays import SUFFIXES, VERTICES
from .scannet_instances import FOLDER, MATRICES

RAW, ARRAYS, INSTANCES = "raw scans", "scenes as prepared arrays", "scenes as labelled instances"
PICTURES = "scenes of pictures alone"
_MESH = "_vh_clean_2.ply"
_RAW_FILES = (_MESH, "_vh_clean_2.0.010000.segs.json", ".aggregation.json", ".txt")
_VIEW_FOLDERS = ("color", "images", "depth", "pose")


@dataclass(frozen=True)
class Source:
    """Where one scene comes from.

    `folder` is the scan's own folder (it may be absent where other data is there); `arrays` is the folder of prepared
    arrays, `instances` the file of labelled instances; both are None for a raw scan.
    """

    scene_id: str
    kind: str
    folder: Path
    arrays: Path | None = None
    instances: Path | None = None

    @property
    def matrices(self) -> Path:
        """The table of axis alignments beside the folder of instances, whether there or not."""
        assert self.instances is not None
        return self.instances.parent.parent / MATRICES

    def inputs(self) -> dict[str, list[int]]:
        """Size and time of each file that the scene is made of, by name, where it is there."""
        paths = [self.folder / name for name in _VIEW_FOLDERS]
        if self.instances is not None:
            paths += [self.instances, self.matrices]
            paths += [folder / f"{self.scene_id}.txt" for folder in (self.instances.parent, self.folder)]
        elif self.arrays is None:
            paths += [self.folder / f"{self.scene_id}{suffix}" for suffix in _RAW_FILES]
        else:
            paths += [self.arrays / f"{self.scene_id}{suffix}" for suffix in (*SUFFIXES, ".txt")]
            paths += [self.folder / f"{self.scene_id}.txt"]
        found: dict[str, list[int]] = {}
        for path in paths:
            if path.exists():
                status = path.stat()
                found[path.name] = [status.st_size if path.is_file() else 0, status.st_mtime_ns]
        return found


def raw_source(scan_dir: Path) -> Source:
    """A raw scan by its folder."""
    return Source(scan_dir.name, RAW, scan_dir)


def find_sources(root: str | Path, wanted: Sequence[str] | None = None) -> list[Source]:
    """Scenes below a data root, by name; with `wanted` those in that order, whether there or not.

    Looked at: `scans/<id>/` and, for meshes and pictures, `<id>/`; arrays in `scannet_data/`, in `scans/`, in the root
    and in the scan's folder; instances in `scannet_instances/`. A scan that is there in several forms is read in the
    first of: mesh, arrays, instances, pictures. Where instances are all that a root has, they are a part of ScanNet by
    nature, and those of `wanted` that are not there are left out.

    Raises:
        ValueError: none of these folders is there.
    """
    root = Path(root)
    folders = _scan_folders(root)
    arrays = _array_folders(root, folders)
    instances = {path.stem: path for path in (root / FOLDER).glob("*.npz")}
    others = (root / "scans").is_dir() or bool(folders) or bool(arrays)
    if not others and not instances:
        raise ValueError(
            f"There is no folder {root / 'scans'}; put the raw scans there, or run `python main.py rooms` first, or "
            f"put prepared arrays (<scene_id>{VERTICES}) into {root / 'scannet_data'}, or instances (<scene_id>.npz) "
            f"into {root / FOLDER}."
        )
    names = sorted({*folders, *arrays, *instances}) if wanted is None else wanted
    return [
        _source(name, folders.get(name, root / "scans" / name), arrays.get(name), instances.get(name))
        for name in names
        if others or name in instances
    ]


def has_sources(root: str | Path) -> bool:
    """Whether a data root has a place for scenes: `scans/`, scans of its own, arrays or instances."""
    root = Path(root)
    folders = _scan_folders(root)
    held = folders or _array_folders(root, folders) or any((root / FOLDER).glob("*.npz"))
    return (root / "scans").is_dir() or bool(held)


def describe(sources: Sequence[Source]) -> str:
    """What was found, in words: counts by kind and where arrays and instances lie."""
    counts = Counter(source.kind for source in sources)
    arrays = {str(source.arrays) for source in sources if source.arrays is not None}
    instances = {str(source.instances.parent) for source in sources if source.instances is not None}
    where = {ARRAYS: _places(arrays), INSTANCES: _places(instances)}
    return "; ".join(f"{count:,} {kind}{where.get(kind, '')}" for kind, count in sorted(counts.items()))


def _places(folders: set[str]) -> str:
    return f" in {', '.join(sorted(folders)[:3])}{' and more folders' if len(folders) > 3 else ''}"


def _source(scene_id: str, folder: Path, arrays: Path | None, instances: Path | None) -> Source:
    if (folder / f"{scene_id}{_MESH}").exists():
        return Source(scene_id, RAW, folder)
    if arrays is not None:
        return Source(scene_id, ARRAYS, folder, arrays)
    if instances is not None:
        return Source(scene_id, INSTANCES, folder, instances=instances)
    return Source(scene_id, PICTURES if has_pictures(folder) else RAW, folder)


def has_pictures(folder: Path) -> bool:
    """Whether a scan folder holds pictures and none of the files of a raw scan."""
    raw = any((folder / f"{folder.name}{suffix}").exists() for suffix in _RAW_FILES[:3])
    return not raw and folder.is_dir() and (has_frames(folder) or bool(list_pictures(folder)))


def _scan_folders(root: Path) -> dict[str, Path]:
    """Folders of scans by scene id: all below scans/, and those below the root that look like one."""
    folders: dict[str, Path] = {}
    if root.is_dir():
        for path in root.iterdir():
            if path.is_dir() and ((path / f"{path.name}{_MESH}").exists() or (path / "images").is_dir()):
                folders[path.name] = path
    if (root / "scans").is_dir():
        folders |= {path.name: path for path in (root / "scans").iterdir() if path.is_dir()}
    return {name: path for name, path in folders.items() if not name.startswith(".")}


def _array_folders(root: Path, folders: dict[str, Path]) -> dict[str, Path]:
    """The folder that holds each scene's arrays."""
    found = {scene_id: path for scene_id, path in folders.items() if (path / f"{scene_id}{VERTICES}").exists()}
    for folder in (root, root / "scans", root / "scannet_data"):
        if folder.is_dir():
            found |= {path.name.removesuffix(VERTICES): folder for path in folder.glob(f"*{VERTICES}")}
    return found
