"""The direction of imports: utils, third_party <- datasets <- models <- engine <- main; visualization stands aside."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import threedr1

ROOT = Path(threedr1.__file__).resolve().parent
FOLDERS = ("utils", "third_party", "datasets", "models", "engine", "visualization", "benchmarks")
COMMANDS = ROOT / "engine" / "commands"  # main.py's longer commands: part of the command line
# What the modules of a folder may import, besides their own folder.
ALLOWED = {
    "utils": set(),
    "third_party": set(),
    "datasets": {"utils", "third_party"},
    "models": {"utils", "third_party", "datasets"},
    "engine": {"utils", "third_party", "datasets", "models", "visualization"},
    "visualization": {"utils", "datasets.scene"},
    "benchmarks": {"utils", "third_party", "datasets", "models", "engine", "visualization"},
    "main": {"utils", "third_party", "datasets", "models", "engine", "visualization", "benchmarks"},
    "": {"models"},  # threedr1/__init__.py, which offers the model class
}


def modules_imported(tree: ast.AST, package: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """Line and name of each module that a source file imports, at any depth; ours without the leading `threedr1.`.

    Args:
        package: the package that the file stands in, below threedr1, as ("models", "scene_encoder").
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, f"absolute:{alias.name}") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.lineno, f"absolute:{node.module}"
        elif isinstance(node, ast.ImportFrom):
            if node.level > len(package) + 1:
                yield node.lineno, "absolute:(beyond threedr1)"
                continue
            base = package[: len(package) - node.level + 1]
            target = ".".join((*base, *(node.module or "").split("."))).strip(".")
            # `from . import a` and `from ..datasets import scene` name modules, perhaps, by their aliases
            for alias in node.names:
                yield node.lineno, f"{target}.{alias.name}".strip(".")


def violations(root: Path) -> list[str]:
    """Every import below `root` that the layers forbid."""
    found = []
    files = [path for folder in FOLDERS for path in sorted((root / folder).rglob("*.py"))]
    for path in [*files, *(root / name for name in ("main.py", "__init__.py") if (root / name).exists())]:
        package = path.relative_to(root).parts[:-1]
        layer = package[0] if package else path.stem.replace("__init__", "")
        for line, module in modules_imported(ast.parse(path.read_text(encoding="utf-8")), package):
            place = f"{path.relative_to(root)}:{line}"
            if module.startswith("absolute:"):
                name = module.removeprefix("absolute:").partition(".")[0]
                if name in (*FOLDERS, "threedr1", "main", "(beyond threedr1)"):
                    found.append(f"{place}: bare import of {name}; imports inside the package are relative")
                continue
            top = module.partition(".")[0]
            if top == layer or not (root / top).is_dir():
                continue
            if not any(module == name or module.startswith(f"{name}.") for name in ALLOWED[layer]):
                found.append(f"{place}: {layer} must not import {module}")
    return found


def test_the_checkout_keeps_its_layers():
    found = violations(ROOT)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source", "complaint"),
    [
        ("utils/boxes.py", "from ..datasets.scene import Scene", "utils must not import datasets.scene"),
        ("datasets/x.py", "def f():\n    from ..models import tiny", "datasets must not import models.tiny"),
        ("models/deep/x.py", "from ...engine.config import load_config", "models must not import engine.config"),
        ("visualization/x.py", "from ..datasets import scannet", "visualization must not import datasets.scannet"),
        ("engine/x.py", "from .. import benchmarks", "engine must not import benchmarks"),
        ("engine/x.py", "import datasets", "bare import of datasets"),
        ("engine/x.py", "from utils.boxes import box3d_iou", "bare import of utils"),
        ("engine/x.py", "import threedr1.utils", "bare import of threedr1"),
        ("utils/x.py", "from .... import models", "beyond threedr1"),
    ],
)
def test_a_violation_is_found(tmp_path: Path, path: str, source: str, complaint: str):
    for folder in FOLDERS:
        (tmp_path / folder).mkdir()
    (tmp_path / path).parent.mkdir(exist_ok=True)
    (tmp_path / path).write_text(source)
    found = violations(tmp_path)
    assert len(found) == 1 and complaint in found[0]


def test_what_is_allowed_passes(tmp_path: Path):
    for folder in FOLDERS:
        (tmp_path / folder).mkdir()
    (tmp_path / "visualization/x.py").write_text("from ..datasets.scene import Scene\nfrom ..utils import boxes\n")
    (tmp_path / "engine/x.py").write_text("import torch\nfrom . import config\nfrom ..models.tiny import build_tiny\n")
    (tmp_path / "main.py").write_text("from . import __version__\nfrom .engine import sft\n")
    assert violations(tmp_path) == []


def test_only_the_command_line_prints():
    """Library code reports through logging, exceptions and return values; ruff's T20 covers print itself."""
    writers = []
    for folder in FOLDERS[:-1]:
        for path in set((ROOT / folder).rglob("*.py")) - set(COMMANDS.rglob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            for node in ast.walk(tree):
                if isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.stdout.write":
                    writers.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not writers, writers


def test_only_the_command_line_imports_the_commands():
    """What engine/commands writes to the terminal cannot come out of library code."""
    users = set()
    for folder in FOLDERS:
        for path in set((ROOT / folder).rglob("*.py")) - set(COMMANDS.rglob("*.py")):
            package = path.relative_to(ROOT).parts[:-1]
            modules = modules_imported(ast.parse(path.read_text(encoding="utf-8")), package)
            users |= {path.relative_to(ROOT).as_posix() for _, name in modules if name.startswith("engine.commands")}
    assert users == {"engine/arguments.py"}


def test_every_folder_with_code_is_a_package():
    folders = {path.parent for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    assert not [str(folder) for folder in folders if not (folder / "__init__.py").is_file()]
