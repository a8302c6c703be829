"""`python main.py synthesize`: chain-of-thought data (Scene-30K) by a teacher model."""

import argparse
from typing import TYPE_CHECKING

from .parser import AddCommand, amount, at_least, seconds
from .terminal import say, show_table

if TYPE_CHECKING:
    from ...datasets.synthesis.views import ViewsOf


def add_command(add: AddCommand) -> None:
    """The command and its arguments."""
    synthesize = add("synthesize", "write chain-of-thought data (Scene-30K) with a teacher model")
    synthesize.add_argument("--root", required=True, metavar="DIR", help="data root with prepared scenes")
    synthesize.add_argument(
        "--out", required=True, metavar="FILE", help="JSON lines to write; an existing one goes on"
    )
    synthesize.add_argument(
        "--teacher", choices=("rules", "gemini", "openai"), default="rules", help="who writes (default: %(default)s)"
    )
    synthesize.add_argument(
        "--model", default="", metavar="NAME", help="the teacher's model (default: the teacher's own)"
    )
    synthesize.add_argument(
        "--split", default="train", metavar="NAME", help="list of training scenes (default: %(default)s)"
    )
    synthesize.add_argument(
        "--limit", type=at_least(0), default=0, metavar="N", help="questions to ask at most; 0 for all (default)"
    )
    synthesize.add_argument(
        "--workers", type=at_least(1), default=64, metavar="N", help="requests at a time (default: %(default)s)"
    )
    synthesize.add_argument(
        "--seed", type=at_least(0), default=0, help="order of the questions (default: %(default)s)"
    )
    synthesize.add_argument(
        "--thinking-budget",
        type=int,
        default=-1,
        metavar="TOKENS",
        help="Gemini's hidden thought; -1 leaves it to the model (default)",
    )
    synthesize.add_argument(
        "--min-think-words",
        type=at_least(0),
        default=30,
        metavar="N",
        help="shorter thoughts are rejected (default: 30)",
    )
    synthesize.add_argument(
        "--min-answer-words",
        type=at_least(0),
        default=0,
        metavar="N",
        help="shorter answers are rejected; the paper says 20 and breaks it (default: 0, off)",
    )
    _add_operation(synthesize)
    _add_inputs(synthesize)


def _add_operation(synthesize: argparse.ArgumentParser) -> None:
    group = synthesize.add_argument_group("pace and budget", "0 means no limit (docs/synthesis_operation.md)")
    group.add_argument("--dry-run", action="store_true", help="estimate requests, tokens and cost, and ask nothing")
    for flag, name, purpose in (
        ("--rpm", "requests_per_minute", "requests a minute that the account allows"),
        ("--tpm", "tokens_per_minute", "tokens a minute that the account allows"),
        ("--max-tokens", "max_tokens", "stop before the output has taken more tokens, earlier runs included"),
    ):
        group.add_argument(flag, dest=name, type=at_least(0), default=0, metavar="N", help=purpose)
    for flag, default, purpose in (
        ("--max-cost", 0.0, "stop before the output has cost more, earlier runs included"),
        ("--input-price", None, "for a million tokens of prompt (default: a table of list prices)"),
        ("--output-price", None, "for a million tokens of reply, hidden thought included"),
    ):
        group.add_argument(flag, type=amount, default=default, metavar="DOLLARS", help=purpose)
    group.add_argument(
        "--timeout",
        type=at_least(1),
        default=300,
        metavar="SECONDS",
        help="that a whole reply may take (default: %(default)s)",
    )
    batches = synthesize.add_argument_group("batches", "of gemini and openai (docs/synthesis_operation.md)")
    batches.add_argument(
        "--batch",
        action="store_true",
        help="ask through the provider's batch interface: half the price, replies within a day",
    )
    batches.add_argument(
        "--batch-size", type=at_least(1), default=5000, metavar="N", help="requests in a batch (default: %(default)s)"
    )
    batches.add_argument(
        "--poll-interval",
        type=seconds,
        default=60.0,
        metavar="SECONDS",
        help="between two looks at a batch (default: 60)",
    )
    batches.add_argument(
        "--cancel-batches",
        action="store_true",
        help="end the batches of this output that are under way, keep what they have answered, ask nothing",
    )


def _add_inputs(synthesize: argparse.ArgumentParser) -> None:
    """What is asked, what the teacher is told and shown, which filters are left out, and the page of samples."""
    synthesize.add_argument(
        "--sources",
        nargs="+",
        default=[],
        metavar="NAME",
        help="scanqa scanrefer nr3d sceneverse scene_description (default: the first four, where they are there)",
    )
    synthesize.add_argument(
        "--description",
        choices=("full", "objects", "none"),
        default="full",
        help="what the teacher is told of the scene: caption and boxes, boxes alone, nothing (default: %(default)s)",
    )
    synthesize.add_argument(
        "--views", type=at_least(0), default=0, metavar="N", help="frames to show the teacher, 16 at most (default: 0)"
    )
    synthesize.add_argument(
        "--views-model",
        metavar="DIR",
        help="a trained model whose view selector chooses the views for each question (default: evenly spaced frames)",
    )
    synthesize.add_argument(
        "--multiview", default="", metavar="FILE", help="HDF5 file of multi-view features, if that model takes them"
    )
    synthesize.add_argument(
        "--view-size",
        type=at_least(64),
        default=768,
        metavar="PIXELS",
        help="longest side of the frames (default: %(default)s)",
    )
    synthesize.add_argument(
        "--skip-filter",
        action="append",
        default=[],
        metavar="NAME",
        help="leave a filter out; may be repeated (docs/scene30k.md)",
    )
    synthesize.add_argument(
        "--samples",
        type=at_least(0),
        default=12,
        metavar="N",
        help="records on the page of samples; 0 for no page (default: %(default)s)",
    )


def chosen_views(args: argparse.Namespace) -> "ViewsOf | None":
    """Who chooses the views that `synthesize` shows: a trained model; None for evenly spaced frames, or for none."""
    if args.views_model is None:
        if args.multiview:
            raise ValueError("--multiview is for the model of --views-model; name one, or leave it out.")
        return None
    from ...datasets.synthesis.kept_views import KeptViews
    from ..checkpoint import model_folder
    from ..teacher_views import load_selected_views

    selected = load_selected_views(
        args.root, args.views_model, count=args.views, longest=args.view_size, multiview=args.multiview, seed=args.seed
    )
    folder = model_folder(args.views_model).resolve()
    by = f"{folder} {selected.count} {args.view_size} {args.seed}"
    return KeptViews(selected, f"{args.out}.views", by=by, read_only=args.dry_run)


def show_samples(args: argparse.Namespace, views_of: "ViewsOf | None") -> None:
    """The page of random records of a `synthesize` run."""
    from ...datasets.synthesis import sheet_folder
    from ...visualization.samples_page import write_samples

    page = sheet_folder(args.out) / "samples.html"
    write_samples(args.out, page, data_root=args.root, count=args.samples, seed=args.seed, views_of=views_of)
    say(f"wrote {page}")


def run(args: argparse.Namespace) -> int:
    """Write the records and say what became of the questions; the exit status, 1 where some are left."""
    from dataclasses import fields

    from ...datasets.synthesis import FilterOptions, InputOptions, Operation, synthesize

    views_of = None if args.cancel_batches else chosen_views(args)
    report = synthesize(
        args.root,
        args.out,
        teacher=args.teacher,
        model=args.model,
        split=args.split,
        limit=args.limit,
        workers=args.workers,
        seed=args.seed,
        thinking_budget=args.thinking_budget,
        options=FilterOptions(
            min_think_words=args.min_think_words,
            min_answer_words=args.min_answer_words,
            skipped=tuple(args.skip_filter),
        ),
        operation=Operation(**{field.name: getattr(args, field.name) for field in fields(Operation)}),
        inputs=InputOptions(
            tuple(args.sources), args.description, args.views, args.view_size, views_of, args.views_model or ""
        ),
    )
    if args.dry_run or args.cancel_batches:
        show_table(report)
        return 0
    names = ("questions", "kept", "rejected", "failed", "unasked", "requests", "new_requests", "cost")
    show_table({name: report[name] for name in names if report[name] is not None})
    say(f"wrote {args.out}")
    if args.samples:
        show_samples(args, views_of)
    return 0 if report["failed"] == report["unasked"] == 0 else 1
