"""Makes the checkout importable as `threedr1` (as main.py does) and holds the shared fixtures."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

if "threedr1" not in sys.modules:
    spec = importlib.util.spec_from_file_location(
        "threedr1", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["threedr1"] = module
    spec.loader.exec_module(module)


def _folder(variable: str, default: str) -> Path:
    return Path(os.environ.get(variable, ROOT.parent / "shared" / default))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of small real scans; tests that need it skip where it is absent."""
    folder = _folder("THREEDR1_REAL_DATA", "real")
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set THREEDR1_REAL_DATA")
    return folder


@pytest.fixture(scope="session")
def parity_data() -> Path:
    """The folder of official evaluators' results; tests that need it skip where it is absent."""
    folder = _folder("THREEDR1_PARITY_DATA", "parity")
    if not folder.is_dir():
        pytest.skip(f"no parity data at {folder}; set THREEDR1_PARITY_DATA")
    return folder
