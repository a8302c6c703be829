"""The two requests about a question: prompt, description and views, then the check. All runs make them alike."""

from collections.abc import Callable
from pathlib import Path

from ...utils.text import parse_response
from ..scene_store import SceneInfo, SceneStore
from .description import Describer, InputOptions, caption_lists, join_captions
from .filters import FilterOptions, check_free
from .prompts import answer_prompt, check_prompt
from .sources import Question
from .teacher import Reply, Request
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


def reject(question: Question, reply: Reply, info: SceneInfo, options: FilterOptions) -> str:
    """The reason to reject a first reply that needs no second one; "" where there is none."""
    return reply.reason or check_free(reply.text, question, info.to_model(info.boxes_K7), options)


def check_of(question: Question, reply: Reply | None, info: SceneInfo, options: FilterOptions) -> Request | None:
    """The request that checks a first reply; None where it is rejected already, or checks are left out.

    Of a reply that is still to come it is the request around its thought, to estimate by.
    """
    if not options.applies("inconsistent") or (reply is not None and reject(question, reply, info, options)):
        return None
    think = parse_response(reply.text).think if reply is not None else ""
    return Request(question, check_prompt(question, think), think)
