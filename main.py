"""Command line of 3D-R1.

Started from a checkout as `python main.py COMMAND`, once installed as `threedr1 COMMAND` or
`python -m threedr1.main COMMAND`; `torchrun` and `accelerate launch` take main.py too. Each command imports what it
needs when it runs, so that every `--help` answers at once. engine/arguments.py has the arguments, engine/commands/ the
longer commands, and FUNCTIONS below is the table of all.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

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

from .engine.commands import infer, synthesize, view
from .engine.commands.terminal import say, show_table


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


def run_tiny(args: argparse.Namespace) -> int:
    import dataclasses

    import torch

    from .models.tiny import SHAPES, build_tiny, corpus_texts

    size, published = SHAPES[args.shape], args.shape in ("3b", "7b")
    names = size.names if args.names is None else args.names
    if names > size.vocab_size // 2:
        raise ValueError(f"--names {names} leaves too few of {size.vocab_size} tokens to words; name fewer.")
    size = dataclasses.replace(size, layers=args.layers or size.layers, names=names)
    build_tiny(
        args.out,
        corpus_texts(args.corpus),
        size=size,
        seed=args.seed,
        dtype=torch.bfloat16 if published else torch.float32,
        device="cuda" if published and torch.cuda.is_available() else "cpu",
    )
    return 0


def run_names(args: argparse.Namespace) -> int:
    from .engine.names import write_named

    say(f"wrote {write_named(args.model, args.out, names=args.names, redraw=args.redraw, seed=args.seed)}")
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
    from dataclasses import asdict

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
    "synthesize": synthesize.run,
    "tiny": run_tiny,
    "names": run_names,
    "dual": run_dual,
    "detect": run_loop,
    "sft": run_loop,
    "grpo": run_loop,
    "eval": run_loop,
    "score": run_score,
    "infer": infer.run,
    "demo": run_demo,
    "export": run_export,
    "view": view.run,
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
    # Before torch is imported; else the last bits of a product on a CPU may go by where in memory its matrices lie,
    # and a resumed run does not repeat what the whole one does (seen on processors with AMX).
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
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
