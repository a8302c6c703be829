"""Configuration and weights of a module in a folder: written whole, refused in one sentence where they do not fit."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..utils.files import readable_as_its_folder, replacing, write_whole


def save_module(module: nn.Module, config: Mapping[str, Any], folder: str | Path, names: tuple[str, str]) -> None:
    """Write the configuration (JSON) and the weights (safetensors) under `names`, each atomically."""
    folder, (config_name, weights_name) = Path(folder), names
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / weights_name) as partial:
        save_file({name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}, partial)
    write_whole(folder / config_name, json.dumps(config, indent=2) + "\n")
    readable_as_its_folder(folder)


def load_module(module: nn.Module, path: Path, missing: str) -> None:
    """Load a safetensors file into a module; ValueError where it is missing (saying so), broken or does not fit."""
    try:
        state = load_file(path)
    except FileNotFoundError:
        raise ValueError(missing) from None
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or no safetensors file ({error}); copy it again.") from None
    check_fit(module, state, path)
    module.load_state_dict(state)


def check_fit(model: nn.Module, state: dict[str, Tensor], source: str | Path) -> None:
    """ValueError, in one sentence, where weights are not those of this model's size."""
    own = model.state_dict()
    for name in own:
        if name not in state:
            raise ValueError(f"{source} lacks {name}, which the configured model has; use that model's own size.")
        if own[name].shape != state[name].shape:
            raise ValueError(
                f"{source} is a checkpoint of another model size: {name} is {list(state[name].shape)} there and "
                f"{list(own[name].shape)} in the configured model; configure the model as the checkpoint was."
            )
    surplus = sorted(set(state) - set(own))
    if surplus:
        raise ValueError(f"{source} holds {surplus[0]}, which the configured model lacks; use that model's own size.")
