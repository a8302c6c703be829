"""A trained model as a folder for others: as it is, or with its adapter merged into the language model."""

import shutil
from pathlib import Path

from ..models.scene_vlm import SceneVLM
from .checkpoint import model_folder, write_folder
from .model_card import CARD


def export_model(source: str | Path, out: str | Path, *, merge: bool = False, dtype: str | None = None) -> Path:
    """Write a model to a new folder, whole or not at all, with its card; returns the folder.

    Args:
        source: run, checkpoint or model folder.
        merge: add the adapter to the base weights. The result needs no base model beside it.
        dtype: of the merged language model; None keeps its own.

    Raises:
        ValueError: no such model, a folder that is there already, no adapter to merge, a dtype without `merge`.
    """
    folder, out = model_folder(source), Path(out)
    if out.exists():
        raise ValueError(f"{out} is there already; name a new folder.")
    if dtype and not merge:
        raise ValueError("A dtype is for the merged language model; add --merge, or leave --dtype out.")
    model = SceneVLM.from_pretrained(folder, dtype=dtype) if merge else None
    if model is not None:
        model.merge_adapter()

    def fill(partial: Path) -> None:
        if model is None:
            shutil.copytree(folder, partial, dirs_exist_ok=True)
            return
        model.save_pretrained(partial)
        if (folder / CARD).exists():
            shutil.copy(folder / CARD, partial / CARD)

    return write_folder(out, fill)
