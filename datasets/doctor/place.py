"""A data root taken in once: its lists of scenes, where each scene's data lie, and what is prepared."""

from dataclasses import dataclass, field
from pathlib import Path

from ..scan_labels import LABEL_MAP_NAME, load_label_map
from ..scannet import SPLITS, read_split
from ..scene import load_scene
from ..scene_store import SceneInfo, SceneStore
from ..sources import Source, find_sources
from .findings import Finding

_HELD_OUT = ("val", "test")
_ROOMS = "rooms.json"  # what the generator of rooms leaves in a root


@dataclass
class Place:
    """`lists` holds the lists of scenes that can be read; `table` is None where the label table is missing or broken.

    `scenes` is the store, or, where a prepared file is broken, the index of the others; None where there is none.
    """

    root: Path
    generated: bool
    lists: dict[str, list[str]]
    sources: dict[str, Source]
    table: dict[str, int] | None
    scenes: SceneStore | dict[str, SceneInfo] | None
    findings: list[Finding] = field(default_factory=list)

    @property
    def prepare(self) -> str:
        """The command that prepares scenes; only of use where there are scans."""
        return f"python main.py prepare --root {self.root}"

    @property
    def prepared(self) -> set[str]:
        """Ids of the prepared scenes that can be read."""
        return set(_index(self.scenes)) if self.scenes is not None else set()

    @property
    def held_out(self) -> set[str]:
        """Scenes of the validation and test lists."""
        return {scene_id for split in _HELD_OUT for scene_id in self.lists.get(split, ())}

    @property
    def listed(self) -> set[str]:
        """Scenes of all lists."""
        return {scene_id for scene_ids in self.lists.values() for scene_id in scene_ids}


def is_empty(root: Path) -> bool:
    """Whether a folder holds nothing that belongs to a data root."""
    known = [f"scannetv2_{split}.txt" for split in SPLITS] + [LABEL_MAP_NAME, "scans", "prepared", "annotations"]
    return not any((root / name).exists() for name in known) and not _sources(root)


def take_in(root: Path) -> Place:
    """Read what a data root holds; what cannot be read becomes a finding of the place."""
    findings: list[Finding] = []
    lists = {}
    for split in SPLITS:
        if (root / f"scannetv2_{split}.txt").exists():
            try:
                lists[split] = read_split(root, split)
            except (ValueError, OSError) as error:
                name = f"scannetv2_{split}.txt"
                findings.append(
                    Finding("error", "list_broken", f"{error}", f"copy {name} again", "", split, files=(name,))
                )
    try:
        table = load_label_map(root / LABEL_MAP_NAME)
    except (ValueError, OSError) as error:
        table = None
        code = "label_table_broken" if (root / LABEL_MAP_NAME).exists() else "label_table_missing"
        fix = f"copy {LABEL_MAP_NAME} from ScanNet into {root}; it comes with the scans"
        findings.append(Finding("error", code, f"{error}", fix, files=(LABEL_MAP_NAME,)))
    place = Place(root, (root / _ROOMS).exists(), lists, _sources(root), table, None, findings)
    place.scenes = _scenes(place)
    return place


def _sources(root: Path) -> dict[str, Source]:
    try:
        return {source.scene_id: source for source in find_sources(root)}
    except ValueError:  # no folder of scans, which `scans_missing` reports
        return {}


def _index(scenes: SceneStore | dict[str, SceneInfo]) -> dict[str, SceneInfo]:
    return scenes.index if isinstance(scenes, SceneStore) else scenes


def _scenes(place: Place) -> SceneStore | dict[str, SceneInfo] | None:
    """The prepared scenes; each that is broken becomes a finding, and the others are kept."""
    folder = place.root / "prepared"
    paths = sorted(folder.glob("*.npz")) if folder.is_dir() else []
    if not paths:
        return None
    try:
        return SceneStore(folder)
    except (ValueError, OSError):
        pass  # a broken scene: found below, one by one
    index = {}
    for path in paths:
        try:
            index[path.stem] = SceneInfo.of(load_scene(path))
        except (ValueError, OSError) as error:
            fix = f"rm {path}" + (f" && {place.prepare}" if path.stem in place.sources else "")
            name = f"prepared/{path.name}"
            place.findings.append(Finding("error", "prepared_broken", f"{error}", fix, files=(name,)))
    return index or None
