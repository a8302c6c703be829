"""Command line of 3D-R1.

Started from a checkout as `python main.py COMMAND`, once installed as `threedr1 COMMAND` or
`python -m threedr1.main COMMAND`; `torchrun` and `accelerate launch` take main.py too. Each command imports what it
needs when it runs, so that every `--help` answers at once (engine/arguments.py has the arguments).
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if not __package__:  # started as a file: give it its package (PEP 366), so that the relative imports below work
    import importlib.util

    _root = Path(__file__).resolve().parent
    if "threedr1" not in sys.modules:
        _spec = importlib.util.spec_from_file_location(
            "threedr1", _root / "__init__.py", submodule_search_locations=[str(_root)]
        )
        assert _spec is not None and _spec.loader is not None
        sys.modules["threedr1"] = importlib.util.module_from_spec(_spec)
        _spec.loader.exec_module(sys.modules["threedr1"])
    __package__ = "threedr1"


if TYPE_CHECKING:
    from .datasets.alignment import AlignOptions
    from .datasets.scene import Scene
    from .datasets.synthesis.views import ViewsOf
    from .engine.predict import Session
    from .engine.questions import Request
    from .engine.rollout import Rollout
    from .utils.predictions import Prediction
    from .visualization.shown_boxes import ShownBoxes

    Answer = tuple[Prediction, Rollout]


def say(text: str) -> None:
    """One line, or several, on standard output."""
    sys.stdout.write(text + "\n")


def show_table(values: dict[str, Any], prefix: str = "") -> None:
    """Nested results, one number, interval or note a line; n/a for what could not be computed."""
    for name, value in values.items():
        if isinstance(value, dict):
            show_table(value, f"{prefix}{name}.")
        elif isinstance(value, list) and not all(isinstance(part, float) for part in value):
            for part in value:
                say(f"{prefix + name:28} {part}")
        elif value != []:
            say(f"{prefix + name:28} {_shown(value)}")


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return f"{_shown(value[0])} to {_shown(value[-1])}"
    return "n/a" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def run_rooms(args: argparse.Namespace) -> int:
    from .datasets.rooms import write_rooms

    write_rooms(
        args.out,
        num_train=args.train,
        num_val=args.val,
        seed=args.seed,
        points_only=args.points_only,
        annotations=not args.no_annotations,
        workers=args.workers,
        num_frames=args.frames,
    )
    return 0


def run_prepare(args: argparse.Namespace) -> int:
    from .datasets.scannet import prepare_scans
    from .datasets.sources import has_sources
    from .datasets.tasks import cap3d

    objects = cap3d.has_objects(args.root)
    failures = []
    if not objects or has_sources(args.root):
        failures = prepare_scans(args.root, args.out, split=args.split, workers=args.workers)
    if objects:
        broken = cap3d.prepare_objects(args.root, args.out)
        for failure in broken:
            sys.stderr.write(f"{failure.scene_id}: {failure.message}\n")
        failures += broken
    if failures:  # each was reported, with its reason, when it happened
        names = ", ".join(failure.scene_id for failure in failures)
        raise ValueError(
            f"{len(failures)} of the scans could not be prepared, for the reasons above ({names}); mend them and run "
            "this again."
        )
    return 0


def run_loop(args: argparse.Namespace) -> int:
    from importlib import import_module

    from .engine.config import dump_config, load_config

    config = load_config(args.command, args.config, args.set)
    if args.dry_run:
        say(dump_config(config).rstrip())
    elif args.command == "eval":
        import_module("threedr1.engine.evaluate").evaluate(config)
    else:
        import_module(f"threedr1.engine.{args.command}").train(config, resume=args.resume)
    return 0


def run_score(args: argparse.Namespace) -> int:
    from importlib import import_module

    if args.references and args.data:
        raise ValueError("Both --references and --data are given; the references come from one of them.")
    place = {"root": args.data, "dataset": args.dataset, "split": args.split}
    if any(place.values()) and not all(place.values()):
        raise ValueError("References from a data set need all of --data, --dataset and --split.")
    if args.scorer == "clip":
        options = {"model": args.clip_model, "images": args.images, "references": args.references, **place}
        result = import_module("threedr1.engine.clip_score").score_file(args.task, args.predictions, **options)
    elif args.clip_model or args.images:
        raise ValueError("--clip-model and --images go with --scorer clip.")
    elif args.data:
        score_dataset = import_module("threedr1.engine.references").score_dataset
        result = score_dataset(args.task, args.scorer, args.predictions, **place)
    else:
        score_file = import_module("threedr1.utils.metrics.score").score_file
        result = score_file(args.task, args.scorer, args.references, args.predictions)
    if args.json:
        say(json.dumps(result, indent=2))
    else:
        show_table(result)
    return 0


def scan_frame(args: argparse.Namespace) -> "Literal['none'] | AlignOptions":
    """How the scan is read, as `read_scene` takes it."""
    from .datasets.alignment import AlignOptions

    known = AlignOptions(args.up, args.height, args.from_video)
    if args.align != "none":
        return known
    if known != AlignOptions():
        raise ValueError("--up, --height and --from-video go with --align auto; --align none takes the scan as it is.")
    return "none"


def run_infer(args: argparse.Namespace) -> int:
    from .engine.questions import Request

    request = Request(asked_questions(args), args.box, args.click, args.task, args.situation)
    if args.chat:
        if request.questions or request.pointing or request.task or request.situation or args.json:
            raise ValueError("--chat asks for its questions itself; leave questions, boxes, --task and --json out.")
    elif not request.questions and not request.pointing and not args.task:
        raise ValueError("There is no question; give one or more with --ask, or a file with one a line: --questions.")
    else:
        request.check()
    align = scan_frame(args)
    from .engine.predict import check_out, open_session

    check_out(args.out)
    session = open_session(
        args.scene,
        args.model,
        None if args.chat else request,
        align=align,
        device=args.device,
        max_new_tokens=args.max_tokens,
        language_model=args.language_model,
        multiview=args.multiview,
    )
    answers = chat_answers(session) if args.chat else request_answers(session, request, args.json)
    from .engine.answers import save_answers

    if not answers:
        return 0
    pictures = save_answers(session, answers, Path(args.out))
    sys.stderr.write(f"wrote {args.out}/predictions.jsonl and {', '.join(path.name for path in pictures)}\n")
    return 0


def asked_questions(args: argparse.Namespace) -> list[str]:
    """Questions of the command line, then those of the file."""
    from .utils.files import read_text

    questions = list(args.ask)
    if args.questions:
        text = read_text(args.questions, f"There is no question file at {args.questions}; write one question a line.")
        questions += [line.strip() for line in text.splitlines() if line.strip()]
    return questions


def show_piece(text: str) -> None:
    """Text on standard output, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def show_notes(session: "Session") -> None:
    """What was assumed of a scan, on standard error."""
    sys.stderr.write("".join(f"assumed: {note}\n" for note in session.scene.notes))


def in_colour() -> bool:
    """Whether standard output is a terminal that may be written to in colour (no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def request_answers(session: "Session", request: "Request", as_json: bool) -> "list[Answer]":
    """Ask and show each answer: as it is written, or as one JSON object when it is whole."""
    from .engine.chat import Printer

    samples = session.samples(request)
    show_notes(session)
    printer, answers = Printer(show_piece, dim=in_colour()), []
    if as_json or request.all_objects:  # many short captions come sooner together
        for prediction, rollout in session.answers(samples):
            answers.append((prediction, rollout))
            if as_json:
                say(json.dumps(asdict(prediction), ensure_ascii=False))
            else:
                box = prediction.meta["query_box"]
                show_piece(f"object  {', '.join(f'{number:.2f}' for number in box)}\n")
                printer(prediction.text)
                printer.end(prediction.boxes)
                say("")
            sys.stdout.flush()
        return answers
    for sample in samples:
        show_piece(f"asked   {sample.question}\n")
        answers += session.answers([sample], printer)
        printer.end(answers[-1][0].boxes)
        say("")
    return answers


def chat_answers(session: "Session") -> "list[Answer]":
    """A dialogue in the terminal; its answers."""
    from .engine.chat import chat

    if sys.stdin.isatty():
        import readline  # noqa: F401 - gives `input` its line editing and history

    show_notes(session)
    answers: list[Answer] = []
    chat(session, input, show_piece, dim=in_colour(), on_answer=lambda *answer: answers.append(answer))
    return answers


def run_demo(args: argparse.Namespace) -> int:
    from .engine.demo import check_gradio, serve
    from .engine.demo_scenes import Limits

    check_gradio()
    limits = Limits(
        file_bytes=args.max_mb * 2**20, rows=args.max_points, seconds=args.time_limit, waiting=args.max_waiting
    )
    serve(
        args.model,
        data=args.data,
        language_model=args.language_model,
        device=args.device,
        host=args.host,
        port=args.port,
        limits=limits,
        on_start=lambda address: say(f"demo at {address} (Ctrl-C ends it)"),
    )
    return 0


def run_view(args: argparse.Namespace) -> int:
    check_view(args)
    sections = save_view_sheets(args) if args.views is not None else []
    if args.predictions is None and args.scene is None:
        from .visualization.report import write_page

        page = args.html or Path(args.out) / "views.html"
        say(f"wrote {write_page(page, '3D-R1 views', str(args.views), sections)}")
        return 0
    if args.html and args.predictions is not None:
        from .engine.scene_viewer import read_scan
        from .visualization.report import write_report
        from .visualization.table import results_markdown

        table = results_markdown(args.predictions)
        if table:
            say(table)
        scene = None
        if args.scene is not None:
            scene = read_scan(args.scene, args.data, scan_frame(args))
            say_assumed(scene)
        how: dict[str, Any] = {"data_root": args.data, "limit": args.limit, "sections": sections, "scene": scene}
        out = write_report(args.predictions, args.html, **how)
        say(f"wrote {out}")
    if args.save or args.room or args.top or args.export or not args.html:
        show_scenes(args)
    return 0


def say_assumed(scene: "Scene") -> None:
    """What reading a scan assumed, on standard error."""
    for note in scene.notes:
        sys.stderr.write(f"assumed: {note}\n")


def check_view(args: argparse.Namespace) -> None:
    """ValueError where the arguments of `view` do not go together."""
    if args.views is None and (args.ask or args.encoder or args.source or args.candidates):
        raise ValueError("--ask, --encoder, --source and --candidates go with --views SCENE.")
    if args.views is None and args.scene is None and args.model:
        raise ValueError("--model goes with --scene SCAN, for what it detects, or with --views SCENE.")
    if args.views is None and args.scene is None and args.predictions is None:
        raise ValueError(
            "Name a run folder or predictions.jsonl to look at, a scan with --scene, or one with --views."
        )
    if args.views is not None and args.scene is not None:
        raise ValueError("--scene and --views show different things; give one of them at a time.")
    if args.predictions is None and args.scene is None and (args.save or args.room or args.top or args.export):
        raise ValueError("--save, --room, --top and --export show predictions or a scan; name one, or --scene.")
    if args.html and args.scene is not None and args.predictions is None:
        raise ValueError("--html reports on predictions; a scan alone is shown with --room.")
    if args.html and args.predictions is not None and Path(args.predictions).suffix.lower() == ".npz":
        raise ValueError("--html reports on predictions; boxes are shown with --room, --top or --save.")
    scan_frame(args)
    if args.views is None and args.scene is None and (args.up or args.height or args.from_video):
        raise ValueError("--up, --height and --from-video say how a scan is read; name it with --scene or --views.")


def show_scenes(args: argparse.Namespace) -> None:
    """The scenes of `view` in Rerun or in an .rrd file; one of them as a page, a plan or a file of boxes."""
    from .engine.scene_viewer import check_names, save_scene, scenes_to_show, the_scene
    from .visualization.rerun_view import show

    def detect(scene: "Scene") -> "ShownBoxes":
        from .engine.detections import detected_boxes

        return detected_boxes(scene, args.model, language_model=args.language_model, multiview=args.multiview)

    check_names(args.top, args.export)
    scenes = scenes_to_show(
        args.predictions,
        args.scene,
        data_root=args.data,
        align=scan_frame(args),
        frame=args.frame,
        limit=args.limit,
        detect=detect if args.scene is not None and args.model is not None else None,
    )
    if args.scene is not None and not args.html:  # which has said it
        say_assumed(scenes[0].scene)
    if args.room or args.top or args.export:
        one = the_scene(scenes)
        for path in save_scene(one, room=args.room, top=args.top, export=args.export, frame=args.frame):
            say(f"wrote {path}")
    if args.save or not (args.html or args.room or args.top or args.export):
        show(scenes, save=args.save)
        if args.save:
            say(f"wrote {args.save}")


def save_view_sheets(args: argparse.Namespace) -> list[str]:
    """A contact sheet of the candidate views for each question, as PNG; returns them as sections of a report."""
    from .engine.scans import find_scene
    from .engine.views import SENTENCE_ENCODER, score_views
    from .visualization.contact_sheet import contact_sheet, sheet_section
    from .visualization.pictures import save_picture

    scored = score_views(
        find_scene(args.views, args.data),
        args.ask,
        model_path=args.model,
        language_model=args.language_model,
        multiview=args.multiview,
        encoder=args.encoder or SENTENCE_ENCODER,
        source=args.source,
        num_candidates=args.candidates,
        align=scan_frame(args),
    )
    for note in scored[0].assumed:
        sys.stderr.write(f"assumed: {note}\n")
    sections = []
    for number, found in enumerate(scored):
        text: dict[str, Any] = {"title": found.question, "notes": found.notes, "taken_off_V": found.taken_off_V}
        sheet_HW3 = contact_sheet(found.images_VHW3, found.names, found.scores, found.chosen, **text)
        say(f"wrote {save_picture(sheet_HW3, Path(args.out) / f'views-{number}.png')}")
        sections.append(sheet_section(sheet_HW3, found.names, found.scores, found.chosen, **text))
    return sections


def chosen_views(args: argparse.Namespace) -> "ViewsOf | None":
    """Who chooses the views that `synthesize` shows: a trained model; None for evenly spaced frames, or for none."""
    if args.views_model is None:
        if args.multiview:
            raise ValueError("--multiview is for the model of --views-model; name one, or leave it out.")
        return None
    from .datasets.synthesis.kept_views import KeptViews
    from .engine.checkpoint import model_folder
    from .engine.teacher_views import load_selected_views

    selected = load_selected_views(
        args.root, args.views_model, count=args.views, longest=args.view_size, multiview=args.multiview, seed=args.seed
    )
    folder = model_folder(args.views_model).resolve()
    by = f"{folder} {selected.count} {args.view_size} {args.seed}"
    return KeptViews(selected, f"{args.out}.views", by=by, read_only=args.dry_run)


def show_samples(args: argparse.Namespace, views_of: "ViewsOf | None") -> None:
    """The page of random records of a `synthesize` run."""
    from .datasets.synthesis import sheet_folder
    from .visualization.samples_page import write_samples

    page = sheet_folder(args.out) / "samples.html"
    write_samples(args.out, page, data_root=args.root, count=args.samples, seed=args.seed, views_of=views_of)
    say(f"wrote {page}")


def run_synthesize(args: argparse.Namespace) -> int:
    from dataclasses import fields

    from .datasets.synthesis import FilterOptions, InputOptions, Operation, synthesize

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


def run_tiny(args: argparse.Namespace) -> int:
    import dataclasses

    import torch

    from .models.tiny import SHAPES, build_tiny, corpus_texts

    size, published = SHAPES[args.shape], args.shape in ("3b", "7b")
    size = dataclasses.replace(size, layers=args.layers or size.layers)
    build_tiny(
        args.out,
        corpus_texts(args.corpus),
        size=size,
        seed=args.seed,
        dtype=torch.bfloat16 if published else torch.float32,
        device="cuda" if published and torch.cuda.is_available() else "cpu",
    )
    return 0


def run_export(args: argparse.Namespace) -> int:
    from .engine.export import export_model

    say(f"wrote {export_model(args.model, args.out, merge=args.merge, dtype=args.dtype)}")
    return 0


def run_dual(args: argparse.Namespace) -> int:
    from .engine.dual import train_dual

    found = train_dual(
        args.out, rooms=args.rooms, held_out=args.held_out, steps=args.steps, seed=args.seed, device=args.device
    )
    show_table(found)
    return 0


def run_doctor(args: argparse.Namespace) -> int:
    from .datasets.doctor import SCHEMA, examine, findings_text, getting_started, to_text
    from .engine.environment import check_environment, describe_environment

    installation, findings = describe_environment(), check_environment()
    examination = examine(args.root) if args.root else None
    blocked = any(finding.level == "error" for finding in findings) or (
        examination is not None and examination.blocking
    )
    if args.json:
        content = {
            "schema": SCHEMA,
            "status": int(blocked),
            "installation": [{"name": name, "state": state} for name, state in installation],  # "" goes on
            "findings": [asdict(finding) for finding in findings],
            "data": examination.to_json() if examination is not None else None,
        }
        say(json.dumps(content, indent=2))
        return int(blocked)
    for name, state in installation:
        say(f"{name:22} {state}")
    parts = ["\n".join(findings_text(findings))]
    if examination is None:
        parts.append(
            "Getting started (no data root was named: --root DIR examines one)\n" + "\n".join(getting_started())
        )
    else:
        parts.append(to_text(examination))
    say("\n" + "\n\n".join(filter(None, parts)))
    return int(blocked)


def run_bench(args: argparse.Namespace) -> int:
    from .benchmarks import run_benchmark

    return run_benchmark(args.name, args.arguments)


FUNCTIONS = {
    "rooms": run_rooms,
    "prepare": run_prepare,
    "synthesize": run_synthesize,
    "tiny": run_tiny,
    "dual": run_dual,
    "detect": run_loop,
    "sft": run_loop,
    "grpo": run_loop,
    "eval": run_loop,
    "score": run_score,
    "infer": run_infer,
    "demo": run_demo,
    "export": run_export,
    "view": run_view,
    "doctor": run_doctor,
    "bench": run_bench,
}


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    from . import __version__
    from .benchmarks import BENCHMARKS
    from .engine.arguments import build_parser

    return build_parser(FUNCTIONS, BENCHMARKS, __version__)


def explain(error: BaseException) -> str:
    """One sentence for an error that a user can act on."""
    if isinstance(error, ModuleNotFoundError):
        return (
            f"The Python package {error.name!r} is missing; run `bash script/setup.sh`, or install requirements.txt."
        )
    if isinstance(error, (NotADirectoryError, FileExistsError)):
        return f"{error.filename} needs a folder, but a file is in the way; name another path."
    if isinstance(error, IsADirectoryError):
        return f"{error.filename} is a folder where a file is expected; name the file itself."
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}; check the path and its permissions."
    return " ".join(str(error).split()) or type(error).__name__  # one line, whatever a library wrote


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the return value is the exit status. THREEDR1_DEBUG=1 lets errors through with a traceback."""
    args = build_parser().parse_args(argv)
    try:
        return args.function(args)
    except KeyboardInterrupt:
        sys.stderr.write("\nInterrupted.\n")
        return 130
    except (ValueError, OSError, ModuleNotFoundError, FloatingPointError) as error:
        ours = isinstance(error, ModuleNotFoundError) and str(error.name).partition(".")[0] == "threedr1"
        if ours or os.environ.get("THREEDR1_DEBUG") == "1":
            raise
        sys.stderr.write(f"threedr1 {args.command}: {explain(error)}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
