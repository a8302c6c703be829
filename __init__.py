"""3D-R1: a reasoning 3D vision-language model for indoor scenes.

The checkout itself is the package `threedr1`. Its folder `datasets/` would shadow Hugging Face's
`datasets` if the checkout stood on `sys.path`, so importing this package takes it off.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_ROOT = Path(__file__).resolve().parent


def _is_checkout(entry: str) -> bool:
    try:
        return Path(entry or ".").resolve() == _ROOT
    except OSError:
        return False


sys.path[:] = [entry for entry in sys.path if not _is_checkout(entry)]

if TYPE_CHECKING:
    from .models.scene_vlm import SceneVLM

__all__ = ["SceneVLM", "__version__"]


def __getattr__(name: str):
    if name == "SceneVLM":
        from .models.scene_vlm import SceneVLM

        return SceneVLM
    raise AttributeError(f"module 'threedr1' has no attribute {name!r}")
