"""The path by which pyright checks the checkout finds errors, and tells our `datasets` from Hugging Face's."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import threedr1

ROOT = Path(threedr1.__file__).resolve().parent

pytestmark = pytest.mark.skipif(importlib.util.find_spec("pyright") is None, reason="pyright is not installed")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A small checkout under another name, with the contract files and the scripts."""
    target = tmp_path / "checkout"
    for name in (
        "script",
        "utils/files.py",
        "utils/text.py",
        "utils/__init__.py",
        "datasets/__init__.py",
        "datasets/scene.py",
        "datasets/archive.py",
    ):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name)
        else:
            shutil.copy(ROOT / name, target / name)
    (target / "__init__.py").write_text('"""Package."""\n')
    return target


def typecheck(checkout: Path, *files: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(checkout / "script" / "typecheck.sh"), *files],
        env=os.environ | {"THREEDR1_PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_sound_code_passes(checkout: Path):
    (checkout / "use.py").write_text(
        "from .datasets.scene import Scene\nfrom .utils.text import format_name\n\n\n"
        "def f(scene: Scene) -> str:\n    return format_name(3) + scene.scene_id\n"
    )
    done = typecheck(checkout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 errors" in done.stdout


def test_errors_across_relative_and_absolute_imports_are_found(checkout: Path):
    (checkout / "relative.py").write_text("from .utils.text import format_name\n\nformat_name('three')\n")
    (checkout / "absolute.py").write_text("from threedr1.utils.text import format_name\n\nformat_name('three')\n")
    done = typecheck(checkout)
    assert done.returncode != 0
    for place in ("relative.py:3", "absolute.py:3"):
        assert place in done.stdout, done.stdout


@pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="Hugging Face's datasets is not installed")
def test_bare_datasets_is_hugging_faces_library(checkout: Path):
    (checkout / "engine").mkdir()
    (checkout / "engine" / "use.py").write_text("from datasets import Dataset\n\nDataset.from_list([])\n")
    done = typecheck(checkout, "engine/use.py")
    assert done.returncode == 0, done.stdout + done.stderr


def test_chosen_files_only(checkout: Path):
    (checkout / "wrong.py").write_text("x: int = 'one'\n")
    assert typecheck(checkout, "utils/text.py").returncode == 0
    assert typecheck(checkout, "wrong.py").returncode != 0
