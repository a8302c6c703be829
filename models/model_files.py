"""The files of a saved model: what its description must hold, and reading it with errors that say what to do."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..utils.files import read_text
from .connector import Connector
from .observation import SceneSettings
from .weights import load_module

FORMAT = 1

_DESCRIBED = {
    "language_model",
    "language_width",
    "language_layers",
    "dtype",
    "adapter",
    "connector",
    "settings",
    "views",
}


def lasting(source: str) -> str:
    """A local folder by its absolute path, which holds wherever the next command starts; hub names as they are."""
    return str(Path(source).resolve()) if Path(source).is_dir() else source


def read_description(folder: Path) -> dict[str, Any]:
    """What `save_pretrained` wrote about a model; ValueError where it is missing, broken or of another version."""
    path = folder / "scene_vlm.json"
    text = read_text(
        path, f"{folder} is not a 3D-R1 model: it has no scene_vlm.json; name a folder that `sft` or `grpo` wrote."
    )
    try:
        description = json.loads(text)
    except json.JSONDecodeError:
        description = None
    if not isinstance(description, dict):
        raise ValueError(f"{path} is broken; copy the model again from its source.")
    if description.get("format") != FORMAT:
        raise ValueError(
            f"{folder} has format {description.get('format')}, this version reads {FORMAT}; train it again, or use "
            "the version that wrote it."
        )
    missing = _DESCRIBED - description.keys()
    unknown = set(description.get("settings", {})) - {entry.name for entry in fields(SceneSettings)}
    connector = set(description.get("connector", {}))
    missing |= {f"connector.{name}" for name in {"num_proposals", "num_layout_tokens"} - connector}
    unknown |= connector - {"num_proposals", "num_layout_tokens", "object_token"}
    if missing or unknown:
        wrong = f"lacks {min(missing)!r}" if missing else f"has the unknown setting {min(unknown)!r}"
        raise ValueError(f"{path} {wrong}; copy the model again from its source.")
    return description


def load_connector(connector: Connector, path: Path) -> None:
    """Load a connector's weights; ValueError where they are missing, broken or of another size."""
    load_module(connector, path, f"There are no connector weights at {path}; copy the whole model folder again.")
