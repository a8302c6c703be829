"""The Scene-30K engine: chain-of-thought data from existing questions, written by a teacher and filtered.

Paper: 3D-R1, section on Scene-30K and its Algorithm 1. Steps: questions of training scenes (sources) -> scene
description (description) -> prompt (prompts) -> teacher (rule_teacher, gemini_teacher, openai_teacher) -> filters ->
records that datasets.tasks.scene30k reads.
"""

from pathlib import Path
from typing import Any

from ..scene_store import SceneStore
from .datasheet import sheet_folder
from .description import InputOptions
from .engine import synthesize_with
from .filters import FilterOptions
from .gemini_teacher import GeminiTeacher
from .openai_teacher import OpenAITeacher
from .rule_teacher import RuleTeacher
from .teacher import Teacher
from .views import ViewsOf

TEACHERS = ("rules", "gemini", "openai")

__all__ = [
    "TEACHERS",
    "FilterOptions",
    "InputOptions",
    "build_teacher",
    "sheet_folder",
    "synthesize",
    "synthesize_with",
]


def build_teacher(
    name: str, *, store: SceneStore, model: str = "", workers: int = 4, thinking_budget: int = -1, seed: int = 0
) -> Teacher:
    """A teacher by name: rules (offline), gemini, or openai (any compatible server).

    Raises:
        ValueError: unknown name, or no key; ModuleNotFoundError where google-genai is missing.
    """
    if name == "rules":
        if model:
            raise ValueError("The rule teacher has no models; leave --model out, or name another --teacher.")
        return RuleTeacher(store.index)
    if name == "gemini":
        return GeminiTeacher(model, thinking_budget=thinking_budget, seed=seed)
    if name == "openai":
        return OpenAITeacher(model, workers=workers, seed=seed)
    raise ValueError(f"Unknown teacher {name!r}; there are {', '.join(TEACHERS)}.")


def synthesize(
    root: str | Path,
    out: str | Path,
    *,
    teacher: str = "rules",
    model: str = "",
    split: str = "train",
    limit: int = 0,
    workers: int = 4,
    seed: int = 0,
    thinking_budget: int = -1,
    options: FilterOptions | None = None,
    inputs: InputOptions | None = None,
    views_of: ViewsOf | None = None,
) -> dict[str, Any]:
    """Write chain-of-thought records (`<out>`, JSON lines) about the questions of training scenes.

    Beside it go `<out>.journal.jsonl` (every reply, synced as it comes: a run that ends early goes on where it
    stopped and asks nothing twice), `<out>.rejects.jsonl` and `<out>.report.json` (counts by reason, tokens).

    Args:
        root: data root with annotations/, prepared/ and the split files.
        out: file to write; one that this engine wrote before goes on.
        teacher: rules, gemini or openai.
        model: the teacher's model; "" for its own default.
        split: name of the list of training scenes (`scannetv2_<split>.txt`).
        limit: questions to ask at most; 0 for all.
        workers: requests at a time.
        seed: order of the questions, which decides those that `limit` leaves, and the jitter of retries.
        thinking_budget: Gemini's hidden thought in tokens, -1 for its own choice.
        options: thresholds of the filters, and those to skip.
        inputs: sources of questions, and what the teacher is told and shown.
        views_of: pictures to show instead of uniform frames, by scene and question.

    Returns:
        The report.

    Raises:
        ValueError: held-out scenes, missing files or key, unknown teacher or model, a foreign file at `out`.
    """
    store = SceneStore(Path(root) / "prepared")
    built = build_teacher(
        teacher, store=store, model=model, workers=workers, thinking_budget=thinking_budget, seed=seed
    )
    return synthesize_with(
        built,
        root,
        out,
        split=split,
        limit=limit,
        workers=workers,
        seed=seed,
        options=options,
        store=store,
        inputs=inputs,
        views_of=views_of,
    )
