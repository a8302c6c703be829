"""ScanQA and SQA3D answers as other papers score them; percent. None of these is the benchmark's own scorer.

- `scanqa_leo`: embodied-generalist evaluator/scanqa_eval.py. Both sides cleaned, no tokenizer; its EM counts too few.
- `scanqa_video3dllm`: LaVi-Lab/Video-3D-LLM llava/eval/eval_scanqa.py, which 3DRS and VEGA-3D use too. Raw texts, no
  tokenizer, final full stops dropped for the n-grams only.
- `scanqa_chat_scene`: ZzZZCHS/Chat-Scene utils/eval.py, which GPT4Scene copies. The prediction cleaned, the references
  raw, then the PTB tokenizer.
- `sqa3d_text`: n-gram scores of SQA3D answers without a tokenizer, as captioning code gives them.
"""

from collections.abc import Iterable, Sequence

from .caption import MeteorChoice
from .qa import QaItem, check_items, clean_answer, collapse_spaces, first_answer, percent_scores
from .result import Scores


def scanqa_leo(items: Sequence[QaItem], *, meteor: MeteorChoice = "auto") -> Scores:
    """EM, EM-R and n-grams on cleaned strings, as LEO does it.

    EM and EM-R go by the first reference that matches at all, so that a prediction equal to a later one is no exact
    match where an earlier one merely overlaps with it: published EM values are too low by that much.
    """
    check_items(items)
    predictions = {item.key: clean_answer(first_answer(item)) for item in items}
    references = {item.key: [clean_answer(text) for text in item.references] for item in items}
    measures = _measures(_leo_match(predictions[key], references[key]) for key in references)
    return percent_scores(measures, references, predictions, tokenizer="none", meteor=meteor)


def _leo_match(prediction: str, references: Sequence[str]) -> tuple[float, float]:
    """(EM, EM-R) by the first reference that is equal or overlaps."""
    for reference in references:
        if prediction == reference:
            return 1.0, 1.0
        if _overlap(prediction, reference):
            return 0.0, 1.0
    return 0.0, 0.0


def scanqa_video3dllm(items: Sequence[QaItem], *, meteor: MeteorChoice = "auto") -> Scores:
    """EM on raw strings; n-grams on raw references and predictions without full stops at the end."""
    check_items(items)
    measures = {"EM": [float(first_answer(item) in item.references) for item in items]}
    references = {item.key: list(item.references) for item in items}
    predictions = {item.key: first_answer(item).rstrip(".") for item in items}
    return percent_scores(measures, references, predictions, tokenizer="none", meteor=meteor)


def scanqa_chat_scene(items: Sequence[QaItem], *, meteor: MeteorChoice = "auto") -> Scores:
    """EM and EM-R of the cleaned prediction among raw references; n-grams of the same after the PTB tokenizer.

    A reference that cleaning would change (`2`, `the TV`) therefore cannot be met exactly.
    """
    check_items(items)
    predictions = {item.key: _chat_scene_answer(first_answer(item)) for item in items}
    measures = _measures(_chat_scene_match(predictions[item.key], item.references) for item in items)
    references = {item.key: [text.replace("\n", " ").strip() for text in item.references] for item in items}
    return percent_scores(measures, references, predictions, tokenizer="ptb", meteor=meteor)


def _chat_scene_answer(prediction: str) -> str:
    """Cleaned, after texts of two characters or more lost one full stop at the end and a capital at the start."""
    if len(prediction) > 1:
        prediction = prediction.removesuffix(".")
        prediction = prediction[0].lower() + prediction[1:]
    return clean_answer(prediction)


def _chat_scene_match(prediction: str, references: Sequence[str]) -> tuple[float, float]:
    """(EM, EM-R), each by any of the references; an empty prediction is no hit."""
    if not prediction:
        return 0.0, 0.0
    equal = prediction in references
    return float(equal), float(equal or any(_overlap(prediction, reference) for reference in references))


def sqa3d_text(items: Sequence[QaItem], *, meteor: MeteorChoice = "auto") -> Scores:
    """CIDEr, BLEU, METEOR and ROUGE-L of SQA3D answers, as 3D-R1 reports C, B-4, M and R; percent.

    The paper names no tokenizer; this is LL3DA's scoring, on which its code builds: strings as they are but for runs
    of spaces. Most references are one word, so that the length of an answer decides: a sentence of 19 words around
    each right answer brings CIDEr from 272 down to about 0.4.
    """
    check_items(items)
    references = {item.key: list(item.references) for item in items}
    predictions = {item.key: collapse_spaces(first_answer(item)) for item in items}
    return percent_scores({}, references, predictions, tokenizer="none", meteor=meteor)


def _overlap(prediction: str, reference: str) -> bool:
    """Whether one is part of the other after all white space is removed; an empty text is part of everything."""
    squeezed, golden = "".join(prediction.split()), "".join(reference.split())
    return squeezed in golden or golden in squeezed


def _measures(pairs: Iterable[tuple[float, float]]) -> dict[str, list[float]]:
    rows = list(pairs)
    return {"EM": [exact for exact, _ in rows], "EM-R": [refined for _, refined in rows]}
