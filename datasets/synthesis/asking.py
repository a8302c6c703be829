"""The first request about a question: prompt, description and views. A run and its estimate make it alike."""

from collections.abc import Callable
from pathlib import Path

from ..scene_store import SceneStore
from .description import Describer, InputOptions, caption_lists, join_captions
from .prompts import answer_prompt
from .sources import Question
from .teacher import Request
from .views import UniformViews, ViewsOf, within_limits


class Asker:
    """Makes the first request about a question.

    Args:
        describe: what the prompt tells of the question's scene.
        views_of: pictures to show; None shows none.
    """

    def __init__(self, describe: Callable[[Question], str], views_of: ViewsOf | None = None):
        self._describe, self._views_of = describe, views_of
        self.reads_files = views_of is not None  # then it takes a while, and is better called in a thread

    def __call__(self, question: Question) -> Request:
        """The request. ValueError where its scene has no pictures to show, or too many."""
        images: tuple[bytes, ...] = ()
        if self._views_of is not None:
            images = within_limits(self._views_of(question.scene_id, question.text), question.scene_id)
        return Request(question, answer_prompt(question, self._describe(question), len(images)), images=images)


def build_asker(
    root: str | Path, store: SceneStore, questions: list[Question], *, split: str, inputs: InputOptions
) -> Asker:
    """The asker that the options ask for.

    Raises:
        ValueError: captions of another form, an unknown description, or a scene without pictures where views are asked
            for: said before anything is paid for.
    """
    views_of = inputs.views_of
    if inputs.views and views_of is None:
        views_of = UniformViews(store, inputs.views, inputs.view_size)
    if isinstance(views_of, UniformViews):
        views_of.require(question.scene_id for question in questions)
    captions = join_captions(caption_lists(root, split))
    return Asker(Describer(store.index, captions, inputs.description), views_of)
