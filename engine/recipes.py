"""Recipes: YAML files over their `base:` recipes and under `key.sub=value` overrides, as nested dictionaries."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ..utils.files import read_text

_SWITCHED = ("augment",)  # groups that `true` or `false` switch


def recipe_values(path: str | Path | None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """What a recipe and overrides say, key by key; a later word replaces an earlier one.

    Raises:
        ValueError: unreadable recipe, a recipe that is its own base, or an override of another form.
    """
    values: dict[str, Any] = _read_recipe(Path(path)) if path else {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ValueError(f"Override {override!r} is not of the form key.sub=value.")
        _set_dotted(values, key.strip(), _parse_yaml(text, f"--set {override}"))
    return values


def _read_recipe(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Keys of a recipe over those of its bases; `above` are the recipes that led to it."""
    if path.resolve() in above:
        raise ValueError(f"Recipe {path} is its own base; take one `base:` line out.")
    text = read_text(path, f"There is no recipe at {path}; the ones we ship are under script/recipes/.")
    values = _parse_yaml(text, str(path)) or {}
    if not isinstance(values, dict):
        raise ValueError(f"Recipe {path} is not a mapping; write `key: value` lines, as those in script/recipes/.")
    bases = values.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ValueError(f"Recipe {path}: `base` takes the path of another recipe, or a list of paths, not {bases!r}.")
    merged: dict[str, Any] = {}
    for base in bases:
        _merge(merged, _read_recipe(path.parent / base, (*above, path.resolve())))
    _merge(merged, values)
    return merged


def _parse_yaml(text: str, source: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or "unreadable characters"
        where = f" in line {mark.line + 1}" if mark else ""
        raise ValueError(f"{source} is not valid YAML: {problem}{where}; mend it and try again.") from None


def _merge(target: dict[str, Any], source: dict[str, Any]) -> None:
    for key, value in source.items():
        if isinstance(value, dict) and isinstance(target.get(key), bool):
            target[key] = {"enabled": target[key]}
        if isinstance(value, dict) and isinstance(target.get(key), dict):
            _merge(target[key], value)
        else:
            _set_or_switch(target, key, value)


def _set_or_switch(target: dict[str, Any], key: str, value: Any) -> None:
    """Set a key; `true` or `false` for a group with a switch keep the group's other keys."""
    if isinstance(value, bool) and key in _SWITCHED and isinstance(target.get(key), dict):
        value = {**target[key], "enabled": value}
    target[key] = value


def _set_dotted(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        if parent in _SWITCHED and isinstance(values.get(parent), bool):
            values[parent] = {"enabled": values[parent]}
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise ValueError(f"Config key {key}: {parent} is not a group of keys.")
    _set_or_switch(values, last, value)
