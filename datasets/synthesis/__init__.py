"""The Scene-30K engine: chain-of-thought data from existing questions, written by a teacher and filtered.

Paper: 3D-R1, section on Scene-30K and its Algorithm 1. Steps: questions of training scenes (sources) -> scene
description (description) -> prompt (prompts) -> teacher (rule_teacher, gemini_teacher, openai_teacher) -> filters ->
records that datasets.tasks.scene30k reads.
"""

from pathlib import Path
from typing import Any

from ..scene_store import SceneStore
from . import gemini_teacher, openai_teacher, rule_teacher
from .asking import build_asker
from .batches import Batches
from .budget import build_budget
from .datasheet import sheet_folder
from .description import InputOptions
from .engine import cancel_batches, journal_of, synthesize_with
from .filters import FilterOptions
from .gemini_teacher import GeminiTeacher
from .limits import Estimator, Limits
from .openai_batches import OpenAIBatches
from .openai_teacher import OpenAITeacher
from .operation import WORKERS, Operation, estimate_run
from .prices import FREE, Price, find_price
from .rule_teacher import RuleTeacher
from .sources import load_questions
from .teacher import Teacher

TEACHERS = ("rules", "gemini", "openai")

__all__ = [
    "TEACHERS",
    "FilterOptions",
    "InputOptions",
    "Operation",
    "build_teacher",
    "sheet_folder",
    "synthesize",
    "synthesize_with",
]


def check_teacher(name: str, model: str, operation: Operation) -> None:
    """ValueError for an unknown teacher, or a model or batches that it does not have."""
    if name not in TEACHERS:
        raise ValueError(f"Unknown teacher {name!r}; there are {', '.join(TEACHERS)}.")
    if name == "rules" and operation.uses_batches:
        raise ValueError("The rule teacher has no batches; leave --batch out, or name another --teacher.")
    if name == "rules" and model:
        raise ValueError("The rule teacher has no models; leave --model out, or name another --teacher.")


def build_teacher(
    name: str,
    *,
    store: SceneStore,
    model: str = "",
    thinking_budget: int = -1,
    timeout: float = 300.0,
    limits: Limits | None = None,
    seed: int = 0,
) -> Teacher:
    """A teacher by name: rules (offline), gemini, or openai (any compatible server).

    Raises:
        ValueError: unknown name, no key, or a package is missing.
    """
    check_teacher(name, model, Operation())
    if name == "gemini":
        return GeminiTeacher(model, thinking_budget=thinking_budget, timeout=timeout, limits=limits, seed=seed)
    if name == "openai":
        return OpenAITeacher(model, timeout=timeout, limits=limits, seed=seed)
    return RuleTeacher(store.index)


def build_batches(teacher: Teacher, operation: Operation) -> Batches:
    """The batch interface of the provider that a teacher asks; rules have none."""
    if isinstance(teacher, OpenAITeacher):
        return Batches(OpenAIBatches(teacher), operation.batch_size, operation.poll_interval)
    assert isinstance(teacher, GeminiTeacher)
    from .gemini_batches import GeminiBatches

    return Batches(GeminiBatches(teacher), operation.batch_size, operation.poll_interval)


def identity_and_price(name: str, model: str, thinking_budget: int, operation: Operation) -> tuple[str, Price | None]:
    """What a teacher's replies are kept under and what they cost, without building it: a dry run needs no key."""
    given = find_price("", operation.input_price, operation.output_price)
    if name == "rules":
        return rule_teacher.IDENTITY, given or FREE
    module = gemini_teacher if name == "gemini" else openai_teacher
    price = given or find_price(model or module.DEFAULT_MODEL)
    if name == "gemini":
        return gemini_teacher.identity_of(model, thinking_budget), price
    return openai_teacher.identity_of(model), price


def synthesize(
    root: str | Path,
    out: str | Path,
    *,
    teacher: str = "rules",
    model: str = "",
    split: str = "train",
    limit: int = 0,
    workers: int = WORKERS,
    seed: int = 0,
    thinking_budget: int = -1,
    options: FilterOptions | None = None,
    operation: Operation | None = None,
    inputs: InputOptions | None = None,
) -> dict[str, Any]:
    """Write chain-of-thought records (`<out>`, JSON lines) about the questions of training scenes.

    Beside it go `<out>.journal.jsonl` (every reply, written as it comes: a run that ends early goes on where it
    stopped and asks nothing twice), `<out>.rejects.jsonl` and `<out>.report.json` (counts by reason, tokens, cost).

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
        operation: pace, budget, prices, batches; with `dry_run` nothing is asked and the estimate is returned, with
            `cancel_batches` the counts of what was ended.
        inputs: sources of questions, and what the teacher is told and shown.

    Returns:
        The report, or the estimate of a dry run.

    Raises:
        ValueError: held-out scenes, missing files or key, unknown teacher or model, a foreign file at `out`, a cap in
            dollars on a model without a price.
    """
    operation, options, inputs = operation or Operation(), options or FilterOptions(), inputs or InputOptions()
    check_teacher(teacher, model, operation)
    identity, price = identity_and_price(teacher, model, thinking_budget, operation)
    store = SceneStore(Path(root) / "prepared")
    if operation.dry_run:
        questions, _ = load_questions(root, store, split=split, seed=seed, limit=limit, sources=inputs.sources)
        return estimate_run(
            questions,
            build_asker(root, store, questions, split=split, inputs=inputs),
            journal_of(Path(out)),
            index=store.index,
            identity=identity,
            price=price,
            options=options,
            operation=operation,
        )
    caps: dict[str, Any] = {"max_cost": operation.max_cost, "max_tokens": operation.max_tokens}
    budget = build_budget(price, model, batched=operation.batch, **caps)
    estimator = Estimator()
    limits = Limits(operation.requests_per_minute, operation.tokens_per_minute, estimator=estimator)
    built = build_teacher(
        teacher,
        store=store,
        model=model,
        thinking_budget=thinking_budget,
        timeout=operation.timeout,
        limits=limits,
        seed=seed,
    )
    if operation.cancel_batches:
        return cancel_batches(Path(out), build_batches(built, operation), budget)
    return synthesize_with(
        build_batches(built, operation) if operation.batch else built,
        root,
        out,
        split=split,
        limit=limit,
        workers=workers,
        seed=seed,
        options=options,
        store=store,
        inputs=inputs,
        budget=budget,
        estimator=estimator,
    )
