"""Where a scan lies that a user names."""

from pathlib import Path


def find_scene(scene: str | Path, data_root: str | Path) -> Path:
    """The path of a scan: as named, or the prepared scene of that name in a data root; ValueError where neither is."""
    if Path(scene).exists():
        return Path(scene)
    prepared = Path(data_root) / "prepared" / f"{scene}.npz"
    if not prepared.exists():
        raise ValueError(f"There is no scan at {scene}, and no prepared scene {prepared}; check the path, or --data.")
    return prepared
