"""The process in which a user's reward runs, started as a file by user.py: foreign code that hangs can be killed.

Protocol on one connection, pickled: the worker sends None once the reward is loaded, or else the reason why not; then,
for each (completions, columns), ("ok", list of float or None) or ("error", reason).
"""

import importlib
import importlib.util
import math
import os
import pickle
import sys
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def load_function(spec: str) -> Callable:
    """The function named by `module:function` or `path/to/file.py:function`; ValueError says what is wrong."""
    module_name, colon, function_name = spec.rpartition(":")
    if not colon or not module_name or not function_name:
        raise ValueError(f"A user reward is written module:function or path/to/file.py:function, not {spec!r}.")
    module = _load_file(Path(module_name)) if module_name.endswith(".py") else _load_module(module_name)
    function = getattr(module, function_name, None)
    if function is None:
        public = [name for name in vars(module) if not name.startswith("_")]
        near = get_close_matches(function_name, public, n=1)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise ValueError(f"The reward module {module_name} has no {function_name}{hint}")
    if not callable(function):
        raise ValueError(f"{spec} is not a function but a {type(function).__name__}.")
    return function


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ValueError(f"There is no reward file {path}.")
    module_spec = importlib.util.spec_from_file_location(f"threedr1_user_reward_{path.stem}", path.resolve())
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module
    module_spec.loader.exec_module(module)
    return module


def _load_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name and not name.startswith(f"{error.name}."):
            raise
        raise ValueError(
            f"There is no module {name} to take a reward from; install it, or name the file: path/to/file.py:function."
        ) from None


def _import_package() -> None:
    """Make `threedr1` importable for rewards that use it, where it is not installed."""
    if importlib.util.find_spec("threedr1") is None:
        package_spec = importlib.util.spec_from_file_location(
            "threedr1", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
        )
        assert package_spec is not None and package_spec.loader is not None
        sys.modules["threedr1"] = importlib.util.module_from_spec(package_spec)
        package_spec.loader.exec_module(sys.modules["threedr1"])


def _reason(error: BaseException) -> str:
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"


def _rewards(values: Iterable[Any], count: int) -> list[float | None]:
    """What a reward returned as plain numbers; ValueError for anything else."""
    rewards = [None if value is None else float(value) for value in values]
    if len(rewards) != count:
        raise ValueError(f"it returned {len(rewards)} values for {count} completions")
    bad = [reward for reward in rewards if reward is not None and not math.isfinite(reward)]
    if bad:
        raise ValueError(f"it returned {bad[0]}")
    return rewards


def serve(connection: Connection, spec: str) -> None:
    """Load the reward and answer calls until the other end closes."""
    try:
        function = load_function(spec)
    except Exception as error:  # noqa: BLE001 - foreign code: the reason goes to the trainer, which stops with it
        connection.send_bytes(pickle.dumps(_reason(error)))
        return
    connection.send_bytes(pickle.dumps(None))
    while True:
        try:
            message = connection.recv_bytes()
        except EOFError:
            return
        try:
            completions, columns = pickle.loads(message)
            reply = ("ok", _rewards(function(completions, **columns), len(completions)))
        except Exception as error:  # noqa: BLE001 - foreign code: the trainer counts the failure and aborts on many
            reply = ("error", _reason(error))
        connection.send_bytes(pickle.dumps(reply))


def main() -> None:
    """Arguments: file descriptor of the connection, reward, then the search path of the trainer."""
    descriptor, spec, *search_path = sys.argv[1:]
    # started as a file, this folder stands on the path, where its `format` or `user` would hide other modules
    sys.path[:] = search_path
    os.dup2(2, 1)  # what a reward prints must not mix with the trainer's output
    _import_package()
    serve(Connection(int(descriptor)), spec)


if __name__ == "__main__":
    main()
