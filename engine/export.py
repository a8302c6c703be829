"""A trained model as a folder for others: as it is, in fewer bits, or with its adapter merged into the base."""

import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ..models.scene_vlm import SceneVLM
from .checkpoint import model_folder, new_folder, write_folder
from .model_card import CARD


def export_model(source: str | Path, out: str | Path, *, merge: bool = False, dtype: str | None = None) -> Path:
    """Write a model to a new folder, whole or not at all, with its card; returns the folder.

    Args:
        source: run, checkpoint or model folder, of a scene encoder too.
        merge: add the adapter to the base weights. The result needs no base model beside it.
        dtype: of the merged language model; without `merge` what all float32 weights are rounded to in their files,
            which halves them. A model computes in what it did before. None keeps every weight as it is.

    Raises:
        ValueError: no such model, a folder that is there already, no adapter to merge.
    """
    folder, out = model_folder(source), new_folder(out)
    model = SceneVLM.from_pretrained(folder, dtype=dtype) if merge else None
    if model is not None:
        model.merge_adapter()

    def fill(partial: Path) -> None:
        if model is None:
            shutil.copytree(folder, partial, dirs_exist_ok=True)
            if dtype:
                for path in partial.rglob("*.safetensors"):
                    round_weights(path, getattr(torch, dtype))
            return
        model.save_pretrained(partial)
        if (folder / CARD).exists():
            shutil.copy(folder / CARD, partial / CARD)

    return write_folder(out, fill)


def round_weights(path: Path, dtype: torch.dtype) -> None:
    """Round the float32 tensors of a safetensors file to another dtype, in place; its metadata stays."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    state = load_file(path)
    for name, value in state.items():
        if value.dtype == torch.float32:
            state[name] = value.to(dtype)
            if not torch.isfinite(state[name]).all() and torch.isfinite(value).all():
                raise ValueError(f"{path.name} has weights in {name} that {dtype} cannot hold; choose bfloat16.")
    save_file(state, path, metadata)
