"""Makes the checkout importable as `threedr1` (as main.py does) and holds the shared fixtures."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")  # as main.py does

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


@pytest.fixture(scope="session")
def tiny_qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Qwen2.5-VL on disk."""
    from threedr1.models.tiny import TinySize, build_tiny

    texts = ["The red chair <obj12> stands next to the desk.", "<think>First, look.</think><answer>two</answer>"] * 20
    size = TinySize(vocab_size=360, width=64, layers=2, heads=4, kv_heads=2, mlp_width=96, vision_width=32)
    return build_tiny(tmp_path_factory.mktemp("tiny") / "qwen", texts, size=size, seed=0)


@pytest.fixture(scope="session")
def rooms_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four generated rooms (three train, one held out), prepared, and a tiny Qwen trained on their words.

    Made once and shared by the test processes.
    """
    from filelock import FileLock

    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    root = shared / "rooms"
    with FileLock(str(shared / "rooms.lock")):
        if not (root / "tiny").exists():
            from threedr1.datasets.rooms import write_rooms
            from threedr1.datasets.scannet import prepare_scans
            from threedr1.models.tiny import TinySize, build_tiny, corpus_texts

            write_rooms(root, num_train=3, num_val=1, seed=0, workers=1, num_frames=2)
            assert prepare_scans(root, workers=1) == []
            size = TinySize(vocab_size=600, width=64, layers=2, heads=4, kv_heads=2, mlp_width=96, vision_width=32)
            build_tiny(root / "partial-tiny", corpus_texts(root), size=size, seed=0)
            (root / "partial-tiny").rename(root / "tiny")
    return root


@pytest.fixture(scope="session")
def demo_model(rooms_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small untrained model with a view selector, in a folder."""
    import torch

    from threedr1.engine.build import build_model
    from threedr1.engine.config import load_config

    settings = [
        f"data.root={rooms_root}",
        "data.num_points=512",
        f"model.language.model={rooms_root}/tiny",
        "model.language.dtype=float32",
        "model.language.train=full",
        "model.language.num_proposals=8",
        "model.language.num_layout_tokens=2",
        "model.encoder.num_tokens=32",
        "model.encoder.num_neighbors=8",
        "model.encoder.width=16",
        "model.encoder.encoder_layers=1",
        "model.encoder.decoder_layers=1",
        "model.encoder.num_heads=2",
        "model.encoder.num_queries=9",
        "model.views.encoder=all-MiniLM-L6-v2",
        "model.views.w_image=1.0",
        "model.views.w_clip=0.0",
        "model.views.source=inside+ring",
        "model.views.num_candidates=4",
        "model.views.num_views=2",
        "model.views.image_size=56",
    ]
    config = load_config("sft", None, settings)
    torch.manual_seed(0)
    model = build_model(config.model, config.data)
    folder = tmp_path_factory.mktemp("demo") / "model"
    model.save_pretrained(folder)
    return folder
