"""A small prepared data root with every data set's files, for the tests of readers."""

from pathlib import Path

import pytest

from threedr1.datasets.scannet import prepare_scans
from threedr1.datasets.scene_store import SceneStore

from .. import data_factory as factory


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Path:
    root = factory.write_root(tmp_path_factory.mktemp("root"))
    factory.write_more_annotations(root)
    assert prepare_scans(root, workers=1) == []
    return root


@pytest.fixture
def root(prepared, tmp_path) -> Path:
    """A data root of one's own, to break."""
    return factory.copy_of_root(prepared, tmp_path)


@pytest.fixture
def store(root) -> SceneStore:
    return SceneStore(root / "prepared")
