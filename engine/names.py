"""A language model with names of detected objects that are one token each, as a folder of its own."""

from pathlib import Path

from ..models.language_model import load_language_model, save_language_model
from ..models.name_tokens import add_names
from .checkpoint import new_folder, write_folder


def write_named(model: str, out: str | Path, *, names: int, redraw: bool = False, seed: int = 0) -> Path:
    """Write a language model with names to a new folder, whole or not at all; returns the folder.

    Its weights keep their precision.

    Args:
        model: a Qwen2.5-VL, a folder or a name on the hub; the `language_model` of a checkpoint that was trained whole
            is one.
        names: how many, `<obj0>` and on; `model.language.name_pool` may be so large then.
        redraw, seed: of their embeddings (`models/name_tokens.py`).

    Raises:
        ValueError: no such model, a folder that is there already, names that it has.
    """
    out = new_folder(out)
    language = load_language_model(model, dtype="auto")
    add_names(language, names, redraw=redraw, seed=seed)
    return write_folder(out, lambda partial: save_language_model(language, partial))
