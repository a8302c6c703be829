"""One file per benchmark; `python main.py bench NAME` runs its `main(argv)`.

A benchmark is any module of this folder whose name does not begin with an underscore. The first line of its docstring
says what it measures. Listing them reads the files and imports none.
"""

import ast
import importlib
from collections.abc import Sequence
from pathlib import Path

_FOLDER = Path(__file__).resolve().parent


def _purpose(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0]


BENCHMARKS = {path.stem: _purpose(path) for path in sorted(_FOLDER.glob("[!_]*.py"))}


def run_benchmark(name: str, arguments: Sequence[str] = ()) -> int:
    """Run one benchmark with its own command-line arguments; returns its exit status."""
    module = importlib.import_module(f"{__name__}.{name}")
    return int(module.main(list(arguments)))
