"""What a resumed run needs besides its model, in two files that cannot run code: state.safetensors and state.json.

The state is nested dictionaries. Tensors stand in the first file under their path, keys joined by `/`; everything else
in the second, with null in the place of each tensor.
"""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..utils.files import read_text

TENSORS, REST = "state.safetensors", "state.json"
_OLD = "state.pt"


def rng_state() -> dict[str, Any]:
    """State of the global generators."""
    numpy: Any = np.random.get_state()
    name, key, position, has_gauss, cached = numpy
    return {
        "python": random.getstate(),
        "numpy": {"name": name, "key": key.tolist(), "position": position, "has_gauss": has_gauss, "cached": cached},
        "torch": torch.get_rng_state(),
        "cuda": {
            str(index): state
            for index, state in enumerate(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])
        },
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore what `rng_state` gave, as it is or read from files."""
    version, internal, cached = state["python"]
    random.setstate((version, tuple(internal), cached))
    numpy = state["numpy"]
    key = np.asarray(numpy["key"], dtype=np.uint32)
    np.random.set_state((numpy["name"], key, numpy["position"], numpy["has_gauss"], numpy["cached"]))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([state["cuda"][name] for name in sorted(state["cuda"], key=int)])


def save_state(state: dict[str, Any], folder: Path) -> None:
    """Write nested dictionaries of tensors and of what JSON takes; keys are strings without `/`."""
    tensors: dict[str, Tensor] = {}
    rest = json.dumps(_plain(state, (), tensors))
    save_file(tensors, folder / TENSORS)
    (folder / REST).write_text(rest + "\n", encoding="utf-8")


def _plain(value: Any, path: tuple[str, ...], tensors: dict[str, Tensor]) -> Any:
    """A state without its tensors, which go into `tensors` by their path."""
    if isinstance(value, Tensor):
        tensors["/".join(path)] = value.detach().cpu().contiguous()
        return None
    if not isinstance(value, dict):
        return value
    assert all(isinstance(key, str) and "/" not in key for key in value), f"keys of {path} cannot be a path"
    return {key: _plain(entry, (*path, key), tensors) for key, entry in value.items()}


def load_state(checkpoint: str | Path, *, mapped: bool = False) -> dict[str, Any]:
    """What `save_state` wrote, tensors in host memory.

    Args:
        mapped: leave the tensors in the file, of which the processes of a machine keep one copy in memory together.

    Raises:
        ValueError: missing, broken, or of a version that pickled it, which is not read.
    """
    folder = Path(checkpoint)
    if (folder / _OLD).exists() and not (folder / REST).exists():
        raise ValueError(
            f"{folder / _OLD} is from a version that pickled its state, and pickles are not read; resume with the "
            f"version that wrote it, or start a new run from its model: init={folder / 'model'} "
            "(of a scene encoder: encoder.pretrained)."
        )
    broken = "is missing or broken; delete that checkpoint and resume from the one before."
    text = read_text(folder / REST, f"{folder / REST} {broken}")
    try:
        state = json.loads(text)
        tensors = load_file(folder / TENSORS)
    except json.JSONDecodeError:
        raise ValueError(f"{folder / REST} {broken}") from None
    except (FileNotFoundError, SafetensorError):
        raise ValueError(f"{folder / TENSORS} {broken}") from None
    for path, tensor in tensors.items():
        *above, name = path.split("/")
        group = state
        for key in above:
            group = group.get(key) if isinstance(group, dict) else None
        if not isinstance(group, dict) or name not in group:
            raise ValueError(f"{folder / REST} does not belong to {TENSORS} beside it; it {broken}")
        group[name] = tensor if mapped else tensor.clone()  # the file stays mapped otherwise
    return state
