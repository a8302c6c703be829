"""Fields of configuration classes: their bounds, their types, and the way from nested dictionaries and back.

Values from a file are checked here against what the classes say, key by key; what the keys are is no matter here.
"""

import dataclasses
import difflib
import math
import types
import typing
from typing import Any


def at_least(config: Any, **bounds: int) -> None:
    """ValueError where a field is below its bound."""
    for name, bound in bounds.items():
        if getattr(config, name) < bound:
            raise ValueError(f"{name} is {getattr(config, name)}; it must be at least {bound}.")


def one_of(config: Any, **choices: tuple[str, ...]) -> None:
    """ValueError where a field has none of its values."""
    for name, known in choices.items():
        if getattr(config, name) not in known:
            raise ValueError(f"{name} is {getattr(config, name)!r}; choose {', '.join(known[:-1])} or {known[-1]}.")


def from_dict(cls: type, values: dict[str, Any], prefix: str = "", base: Any = None) -> Any:
    """Build a configuration dataclass from nested dictionaries, checking names and types.

    Keys left out keep the value of `base`, by default `cls()`: a command's own defaults, such as GRPO's schedule,
    outlive a recipe that sets their neighbours.
    """
    if not isinstance(values, dict):
        raise ValueError(f"Config key {prefix.rstrip('.') or 'top level'} takes a mapping, not {values!r}.")
    base = cls() if base is None else base
    hints = typing.get_type_hints(cls)
    arguments = {}
    for key, value in values.items():
        if key not in hints:
            raise ValueError(_unknown_key(prefix, str(key), cls))
        arguments[key] = _convert(hints[key], value, prefix + key, getattr(base, key))
    try:
        return dataclasses.replace(base, **arguments)
    except ValueError as error:
        raise ValueError(f"Config key {prefix}{error}") from None


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain dictionaries of a configuration, ready for YAML."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(entry) for key, entry in value.items()}
        return [plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value

    return plain(dataclasses.asdict(config))


def _unknown_key(prefix: str, key: str, cls: type) -> str:
    """The sentence for an unknown key: a key of that very name further down, else the nearest one here."""
    known = list(typing.get_type_hints(cls))
    deeper = [path for path in _paths(cls, prefix) if path.split(".")[-1] == key]
    nearest = deeper or difflib.get_close_matches(key, known, n=1, cutoff=0.4)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"known keys here: {', '.join(known)}."
    return f"Unknown config key {prefix + key!r}; {hint}"


def _paths(cls: type, prefix: str) -> list[str]:
    """Dotted names of all keys below a configuration class."""
    paths = []
    for name, kind in typing.get_type_hints(cls).items():
        paths.append(prefix + name)
        if dataclasses.is_dataclass(kind):
            paths += _paths(typing.cast(type, kind), f"{prefix}{name}.")
    return paths


def _convert(kind: Any, value: Any, key: str, base: Any = None) -> Any:
    if dataclasses.is_dataclass(kind):
        values: Any = value
        if isinstance(value, bool) and "enabled" in typing.get_type_hints(kind):
            values = {"enabled": value}
        return from_dict(typing.cast(type, kind), values, key + ".", base)
    origin = typing.get_origin(kind)
    if origin is tuple:
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",") if part.strip()]
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"Config key {key} takes a list, not {value!r}.")
        item = typing.get_args(kind)[0]
        return tuple(_convert(item, entry, f"{key}[{index}]") for index, entry in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"Config key {key} takes a mapping, not {value!r}.")
        return {str(name): _convert(typing.get_args(kind)[1], entry, f"{key}.{name}") for name, entry in value.items()}
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _convert(next(part for part in typing.get_args(kind) if part is not type(None)), value, key)
    # what a Literal allows is checked by the class that has the field
    return _convert_scalar(str if origin is typing.Literal else kind, value, key)


def _convert_scalar(kind: type, value: Any, key: str) -> Any:
    if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = float(value)  # YAML reads 1e-6 as a string
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(f"Config key {key} takes a number, not {value!r}.")
        return number
    if kind is str and value is None:
        return ""
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"Config key {key} takes {kind.__name__}, not {value!r}.")
    return value
