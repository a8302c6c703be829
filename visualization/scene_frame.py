"""A scene that turns under the mouse, as an element of another page: the page of scene_page.py without its panel.

The page around it changes the boxes by `postMessage` of what `box_layers` gives, so that the camera stays where it is.
"""

import html
from collections.abc import Mapping
from typing import Any

from ..datasets.scene import Scene
from .scene_page import box_rows, page_data, page_text
from .shown_boxes import ShownBoxes
from .shown_scene import ShownScene

SHOWN_POINTS = 80_000


def framed_scene(scene: Scene, *, max_points: int = SHOWN_POINTS) -> str:
    """The page of a scene without boxes; it needs no other file and no network.

    Raises:
        ValueError: a scene without points.
    """
    return page_text(page_data(ShownScene(scene), max_points=max_points) | {"framed": True, "layers": {}})


def box_layers(layers: Mapping[str, ShownBoxes], scene: Scene) -> dict[str, Any]:
    """What the page is sent to show boxes (world frame) by layer (palette.LAYERS), in the place of those before."""
    return {"layers": {name: box_rows(boxes, scene) for name, boxes in layers.items()}}


def inline_frame(page: str, title: str, *, height: int = 520) -> str:
    """The page as an element of another one. Its scripts run apart: they see neither that page nor its cookies."""
    style = f"width:100%;height:{height}px;border:0;border-radius:8px;display:block"
    source = html.escape(page, quote=True)
    return f'<iframe sandbox="allow-scripts" title="{html.escape(title)}" style="{style}" srcdoc="{source}"></iframe>'
