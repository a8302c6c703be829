"""A sample in words: rows of tokens that speak of a scene's proposals by name.

Needs neither a device nor the model's weights, so other processes may write rows too.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..datasets.prompts import OBJECT_PLACEHOLDER, SYSTEM_PROMPT, build_question
from ..datasets.scene import Sample
from .inputs import Row, RowWriter
from .named_proposals import NamedProposals, pointer_to
from .view_pixels import Grid


@dataclass(frozen=True)
class PromptWriter:
    """Writes the rows of one model.

    Args:
        rows: writes them in the language model's tokens.
        name_pool: names that training draws from; 0: proposals are always called in order.
        object_token: whether the object asked for has a token.
        num_layout_tokens: of each scene.
        num_view_image_tokens, num_view_depth_tokens: of each view, behind its image.
    """

    rows: RowWriter
    name_pool: int
    object_token: bool
    num_layout_tokens: int
    num_view_image_tokens: int
    num_view_depth_tokens: int

    def draw_names(self, told: NamedProposals, rng: np.random.Generator) -> list[int] | None:
        """Numbers to call a scene's proposals by in one training sample; None where they are always called in order.

        In order every scene has the same names, and there is nothing to be gained from telling them apart until they
        are told apart: a model of random weights then never learns to go from a thing to its name.
        """
        return rng.permutation(self.name_pool)[: len(told)].tolist() if self.name_pool else None

    def write(
        self,
        sample: Sample,
        told: NamedProposals,
        mode: str,
        target: str | None,
        names: Sequence[int] | None = None,
        *,
        asked_7: list[float] | None = None,
        grids: Sequence[Grid] = (),
    ) -> Row:
        """Tokens of one sample; `names` are as in `pointer_to`.

        OBJECT_PLACEHOLDER in a question about a box becomes the box's name or numbers, then its object token.

        Args:
            asked_7: the box that the sample asks about, model frame; None without one.
            grids: patches of each view that goes with it.
        """
        question, after_object, token_of_7 = build_question(sample, mode), "", None
        if asked_7 is not None:
            pointer = pointer_to(asked_7, told.covering([asked_7])[0], names)
            if self.object_token and OBJECT_PLACEHOLDER in question:
                before, _, after_object = question.partition(OBJECT_PLACEHOLDER)
                question, token_of_7 = before + pointer, asked_7
            question, after_object = (text.replace(OBJECT_PLACEHOLDER, pointer) for text in (question, after_object))
        return self.rows.write(
            system=SYSTEM_PROMPT,
            question=question,
            num_proposals=len(told),
            num_layout_tokens=self.num_layout_tokens,
            grids=grids,
            num_view_image_tokens=self.num_view_image_tokens,
            num_view_depth_tokens=self.num_view_depth_tokens,
            target=target,
            names=names,
            asked_box_7=token_of_7,
            after_object=after_object,
        )
