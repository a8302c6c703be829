"""Dense captioning in the oracle-proposal form: the model captions, for each annotated object, the best proposal.

Detection, suppression and false proposals play no part, so numbers are far above those of `dense_caption`, under the
same name C@0.5 in papers. A caption counts where the proposal's IoU with its object is >= k; elsewhere it is empty.
Three published forms, which give different numbers:
- `leo`: embodied-generalist/embodied-generalist evaluator/cap_eval.py. "sos … eos" with ". " set apart, no tokenizer,
  case kept. Objects without a caption are dropped from the mean (the count says how many).
- `chat_scene`: ZzZZCHS/Chat-Scene utils/eval.py (copied by GPT4Scene). PTB tokenizer, which lower-cases and drops
  punctuation, so that the sentence case of its corpus has no effect; objects without a caption count as empty.
- `video3dllm`: Video-3D-LLM llava/eval/eval_scan2cap.py (3DRS and others). "." and "," set apart, lower case, no
  tokenizer; objects without a caption count as empty, written with two blanks ("sos  eos"), which ROUGE-L sees.
References should be raw descriptions, not cut to 30 tokens, as these forms have them.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from .caption import MeteorChoice, Tokenizer, ngram_scores
from .dense_caption import EMPTY_CAPTION
from .result import Scores

Form = Literal["leo", "chat_scene", "video3dllm"]


@dataclass(frozen=True)
class OracleCaption:
    """One annotated object: its caption (None where there is none), and the IoU of the proposal it was made from."""

    key: str  # scene|object
    caption: str | None
    references: tuple[str, ...]
    iou: float = 0.0


@dataclass(frozen=True)
class _Rules:
    """How a form writes captions and references, and what an object without a caption counts as."""

    caption: Callable[[str], str]
    reference: Callable[[str], str]
    empty: str
    tokenizer: Tokenizer
    drops_missing: bool = False


def _wrap(text: str) -> str:
    return text if text.startswith("sos ") else f"sos {text} eos"


def _leo(text: str) -> str:
    return _wrap(text).replace(". ", " . ")


def _leo_reference(text: str) -> str:
    # like `_leo`, without a second blank where the tokens stand apart already
    return re.sub(r"(?<! )\. ", " . ", _wrap(text))


def _chat_scene(text: str) -> str:
    return _wrap(text).replace("\n", " ")


def _video3dllm(text: str) -> str:
    return _wrap(text.replace(".", " . ").replace(",", " , ").lower())


_FORMS: dict[Form, _Rules] = {
    "leo": _Rules(_leo, _leo_reference, EMPTY_CAPTION, "none", drops_missing=True),
    "chat_scene": _Rules(_chat_scene, _chat_scene, EMPTY_CAPTION, "ptb"),
    "video3dllm": _Rules(_video3dllm, _video3dllm, "sos  eos", "none"),
}


def oracle(
    items: Sequence[OracleCaption], *, form: Form, min_iou: float = 0.5, meteor: MeteorChoice = "auto"
) -> Scores:
    """N-gram scores m@kIoU as fractions over the annotated objects.

    `counts`: objects, those scored, those without a caption, and those whose proposal reaches `min_iou`.
    `details["candidates"]` holds the scored caption of each object.
    """
    rules = _FORMS[form]
    if not items:
        raise ValueError("There is nothing to score: no object has a reference caption.")
    twice, count = Counter(item.key for item in items).most_common(1)[0]
    if count > 1:
        raise ValueError(f"Object {twice} has {count} captions; the oracle forms score one caption an object.")
    missing = sum(item.caption is None for item in items)
    scored = [item for item in items if item.caption is not None] if rules.drops_missing else list(items)
    if missing == len(items):
        raise ValueError("No annotated object has a caption; give each row the box that was captioned.")
    matched = {item.key for item in scored if item.caption is not None and item.iou >= min_iou}
    candidates = {
        item.key: rules.caption(item.caption or "") if item.key in matched else rules.empty for item in scored
    }
    ngrams = ngram_scores(
        {item.key: [rules.reference(text) for text in item.references] for item in scored},
        {key: [text] for key, text in candidates.items()},
        tokenizer=rules.tokenizer,
        meteor=meteor,
    )
    counts = {
        "objects": len(items),
        "objects_scored": len(scored),
        "objects_without_caption": missing,
        "objects_matched": len(matched),
    }
    notes = list(ngrams.notes)
    if rules.drops_missing and missing:
        notes.append(f"{missing} of {len(items)} annotated objects have no caption; this form leaves them out.")
    metrics = {f"{name}@{min_iou}": value for name, value in ngrams.corpus.items()}
    aggregates = {f"{name}@{min_iou}": aggregate for name, aggregate in ngrams.aggregates.items()}
    details = {"candidates": candidates}
    return Scores("fraction", len(scored), metrics, ngrams.per_item, counts, notes, details, aggregates)
