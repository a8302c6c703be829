"""The version of the distribution that generated rooms are drawn from.

Measurements are only comparable on one distribution. `rooms-v1` is frozen: change anything that changes rooms and
ROOMS_VERSION must change with it, and every table measured on the rooms must be made again. Two guards: the hash below
covers every table and constant of the generator, and a test pins what a few seeds generate.
"""

import dataclasses
import hashlib
import json
from functools import lru_cache
from typing import Any

from . import cameras, catalogue, frames, generate, layout, mesh, placement, programmes
from .annotate import ANNOTATION_VERSION

ROOMS_VERSION = "rooms-v1"


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if callable(value):
        return value.__name__
    raise TypeError(f"{type(value)} is no parameter")


def _constants(module: Any) -> dict[str, Any]:
    """Numbers, texts and tables of a module: its names in capitals, with or without a leading underscore."""
    kinds = (int, float, str, tuple, dict)
    named = {name: value for name, value in vars(module).items() if name.strip("_").isupper()}
    return {name: value for name, value in sorted(named.items()) if isinstance(value, kinds)}


@lru_cache(maxsize=1)
def distribution_hash() -> str:
    """Twelve hexadecimal digits over the generator's tables and constants and both versions."""
    modules = (cameras, catalogue, frames, generate, layout, mesh, placement, programmes)
    parameters = {module.__name__.rpartition(".")[2]: _constants(module) for module in modules}
    content = json.dumps([ROOMS_VERSION, ANNOTATION_VERSION, parameters], sort_keys=True, default=_plain)
    return hashlib.sha256(content.encode()).hexdigest()[:12]
