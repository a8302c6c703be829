"""Views that a trained model's view selector chooses, as pictures for the data engine's teacher."""

import threading
from pathlib import Path

import torch
from PIL import Image

from ..datasets.multiview import open_multiview
from ..datasets.scene_store import SceneStore
from ..datasets.synthesis.views import MOST_VIEWS, shrink
from ..models.scene_vlm import SceneVLM
from .checkpoint import model_folder
from .data import ObservationCache
from .runtime import pick_device

_KEPT_SCENES = 32


class SelectedViews:
    """A `ViewsOf` (datasets/synthesis/views.py): the views of a scene that a model's selector chooses for a question.

    Frames are shown as they are on the disk, rendered views at the size that the model sees. Threads may share it.

    Args:
        store: prepared scenes.
        model: a model that takes views; its encoder detects, its selector chooses.
        count: views to choose; 0 for as many as the model takes.
        longest: pixels of their longest side.
        seed: of the points that are sampled.

    Raises:
        ValueError: the model takes no views, or there are more than a teacher takes.
    """

    def __init__(self, store: SceneStore, model: SceneVLM, *, count: int = 0, longest: int = 768, seed: int = 0):
        if model.view_selector is None:
            raise ValueError(
                "The model of --views-model takes no views, so it chooses none; name one that was trained with "
                "model.views, or leave it out for evenly spaced frames."
            )
        self._selector = model.view_selector
        if count:
            self._selector.num_views = count
        if not 1 <= self._selector.num_views <= MOST_VIEWS:
            raise ValueError(
                f"A teacher is shown 1 to {MOST_VIEWS} views, not {self._selector.num_views}; set --views."
            )
        self.count = self._selector.num_views
        self._model, self._store, self._longest = model, store, longest
        self._observations = ObservationCache(store, model, seed=seed, capacity=_KEPT_SCENES)
        self._lock = threading.Lock()

    @torch.no_grad()
    def __call__(self, scene_id: str, question: str) -> tuple[bytes, ...]:
        """JPEG files, best first; none where the scene has no view of the kinds that the model takes."""
        with self._lock:
            observation = self._observations[scene_id]
            (encoded,) = self._model.encode([observation])
            pool = self._model.view_pool(observation)
            chosen = self._selector.select(question, pool, encoded.host_probs_nC).indices
            return tuple(self._picture(scene_id, pool.names[row], pool.images_VHW3[row]) for row in chosen)

    def _picture(self, scene_id: str, name: str, image_HW3: object) -> bytes:
        kind, _, number = name.partition(" ")
        if kind != "frame":
            return shrink(Image.fromarray(image_HW3), self._longest)  # type: ignore[arg-type]
        file = self._store[scene_id].frames[int(number)].color_path
        try:
            with Image.open(file) as picture:
                return shrink(picture, self._longest)
        except OSError as error:
            raise ValueError(f"{file} is not a whole picture ({error}); copy it again from its source.") from None


def load_selected_views(
    root: str | Path, model_path: str | Path, *, count: int = 0, longest: int = 768, multiview: str = "", seed: int = 0
) -> SelectedViews:
    """The views that a trained model chooses for questions about the scenes of a data root.

    Raises:
        ValueError: no model there, or one without a view selector or without the multi-view features that it takes.
    """
    model = SceneVLM.from_pretrained(model_folder(model_path), device=pick_device("auto"))
    model.eval()
    model.multiview = open_multiview(multiview, model.settings.multiview_dim)
    store = SceneStore(Path(root) / "prepared")
    return SelectedViews(store, model, count=count, longest=longest, seed=seed)
