"""The files of a saved model: where they lie, what its description must hold, and errors that say what to do."""

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from ..utils.files import read_text
from .connector import Connector
from .observation import SceneSettings
from .weights import load_module

FORMAT = 1
_HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
_STEP = re.compile(r"step-(\d+)")
# What a model is made of: nothing else is fetched, least of all what could run.
_FETCHED = ("*.json", "*.safetensors", "*.txt", "*.jinja", "*.md")
_CONNECTOR, _TOWER = "connector.safetensors", "vision_tower.safetensors"

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


def checkpoints_of(run: Path) -> list[Path]:
    """Complete checkpoints of a run, by their steps."""
    found = {entry: _STEP.fullmatch(entry.name) for entry in run.glob("checkpoints/*")}
    steps = {entry: int(match[1]) for entry, match in found.items() if match}
    return sorted(steps, key=lambda entry: steps[entry])


def local_folder(source: str | Path) -> Path:
    """Where a model lies on this machine.

    Args:
        source: its folder; a checkpoint or a run, of which the newest checkpoint's model is meant; or a name on the
            hub, `owner/name` or `owner/name@revision`, which is fetched where it is not in the cache.

    Raises:
        ValueError: there is none.
    """
    path = Path(source)
    if path.is_file():
        raise ValueError(f"{path} is a file; name the folder of a model, a checkpoint or a run.")
    if path.is_dir():
        if (path / "scene_vlm.json").exists():
            return path
        if (path / "model").is_dir():
            return path / "model"
        steps = checkpoints_of(path)
        return steps[-1] / "model" if steps else path
    named = _HUB_NAME.fullmatch(str(source))
    # `runs/grpo` looks like a name on the hub: what begins with a folder that is there is a path
    if named is None or Path(path.parts[0]).exists() or path.parts[0] == "runs":
        raise ValueError(f"There is no model at {path}; train one, or name a folder written by save_pretrained.")
    return _fetched(named["name"], named["revision"])


def _fetched(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(_FETCHED)))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"There is no folder {name}, and the hub gives no model of that name ({reason}); check the name and the "
            "connection."
        ) from None


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
    unknown |= connector - {
        "num_proposals",
        "num_layout_tokens",
        "name_pool",
        "name_in_token",
        "token_in_name",
        "object_token",
        "object_color",
    }
    if missing or unknown:
        wrong = f"lacks {min(missing)!r}" if missing else f"has the unknown setting {min(unknown)!r}"
        raise ValueError(f"{path} {wrong}; copy the model again from its source.")
    return description


def part_of(name: str) -> str:
    """The part that a parameter of the model belongs to, by its name: that of a module, or `vision_tower`."""
    return "vision_tower" if ".visual." in name else name.partition(".")[0]


def save_connector(connector: Connector, folder: Path) -> None:
    """Write a connector's weights."""
    _save(connector, folder / _CONNECTOR)


def load_connector(connector: Connector, folder: Path) -> None:
    """Load a connector's weights; ValueError where they are missing, broken or of another size."""
    path = folder / _CONNECTOR
    load_module(connector, path, f"There are no connector weights at {path}; copy the whole model folder again.")


def save_vision_tower(tower: nn.Module, folder: Path) -> None:
    """Write the language model's vision tower, where it was trained and the rest was not."""
    _save(tower, folder / _TOWER)


def load_vision_tower(tower: nn.Module, folder: Path) -> None:
    """Load a vision tower's weights; ValueError where they are missing, broken or of another size."""
    path = folder / _TOWER
    load_module(tower, path, f"There are no weights of the vision tower at {path}; copy the whole model folder again.")


def _save(module: nn.Module, path: Path) -> None:
    save_file({name: value.contiguous() for name, value in module.state_dict().items()}, path)
