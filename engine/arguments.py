"""The command line's arguments and help texts; imports nothing heavy, so that every `--help` answers at once."""

import argparse
import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

TASKS = "dense_caption, object_caption, grounding, qa, situated_qa, dialogue, planning, scene_description"
DEFAULT_MODEL = os.environ.get("THREEDR1_MODEL", "runs/quickstart/grpo")
AddCommand = Callable[..., argparse.ArgumentParser]
UPS = ("x", "-x", "y", "-y", "z", "-z")
_POINTING = ("--box", "--click", "--up")
_MINUS = re.compile(r"-[\d.xyz]")


class Parser(argparse.ArgumentParser):
    """A parser that answers a wrong command line with one sentence instead of the whole usage.

    It takes `--click -1,0.5,0.4` and `--up -y` as they are meant; argparse alone reads the values as options for
    their minus sign.
    """

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        joined: list[str] = []
        for word in sys.argv[1:] if args is None else args:
            if joined and joined[-1] in _POINTING and _MINUS.match(word):
                joined[-1] += f"={word}"
            else:
                joined.append(word)
        return super().parse_known_args(joined, namespace)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help.\n")


def at_least(bound: int) -> Callable[[str], int]:
    """A whole number that is not below a bound, as an argument's type."""

    def read(text: str) -> int:
        number = int(text) if text.lstrip("-").isdigit() else None
        if number is None or number < bound:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least {bound}")
        return number

    return read


def seconds(text: str) -> float:
    """A number of seconds above zero, as an argument's type."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0")
    return value


def metres(text: str) -> float:
    """A room's height in metres, as an argument's type."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.1 <= value <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} is no height of a room in metres")
    return value


def amount(text: str) -> float:
    """A number that is not negative, as an argument's type."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no amount of dollars")
    return value


def numbers(*counts: int) -> Callable[[str], list[float]]:
    """Numbers between commas, as many as one of `counts`, as an argument's type."""

    def read(text: str) -> list[float]:
        try:
            values = [float(part) for part in text.split(",")]
        except ValueError:
            values = []
        if len(values) not in counts or not all(map(math.isfinite, values)):
            wanted = " or ".join(map(str, counts))
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted} numbers with commas between, without blanks")
        return values

    return read


def build_parser(
    functions: Mapping[str, Callable[[argparse.Namespace], int]], benchmarks: Mapping[str, str], version: str
) -> argparse.ArgumentParser:
    """The whole command line.

    Args:
        functions: what runs each command, by the command's name; stored as `function` in the parsed arguments.
        benchmarks: name and purpose of each benchmark, for `bench --help`.
        version: for `--version`.
    """
    parser = Parser("threedr1", description="3D-R1: a reasoning 3D vision-language model for indoor scenes.")
    parser.add_argument("--version", action="version", version=f"threedr1 {version}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, purpose: str, **options: Any) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=purpose, description=f"{purpose[0].upper()}{purpose[1:]}.", **options)
        command.set_defaults(function=functions[name])
        return command

    _add_data_commands(add)
    _add_loop_commands(add)
    _add_score_command(add)
    _add_infer_command(add)
    _add_view_command(add)
    _add_demo_command(add)
    _add_bench_command(add, benchmarks)
    return parser


def _add_data_commands(add: AddCommand) -> None:
    rooms = add("rooms", "write generated rooms in ScanNet's raw format, with annotations of every benchmark")
    rooms.add_argument("--out", required=True, metavar="DIR", help="data root to write: scans/, annotations/, splits")
    rooms.add_argument(
        "--train", type=at_least(0), default=24, metavar="N", help="training rooms (default: %(default)s)"
    )
    rooms.add_argument("--val", type=at_least(0), default=8, metavar="N", help="held-out rooms (default: %(default)s)")
    rooms.add_argument("--seed", type=at_least(0), default=0, help="same seed, same rooms (default: %(default)s)")
    rooms.add_argument("--points-only", action="store_true", help="no mesh faces and no frames: much faster")
    rooms.add_argument(
        "--no-annotations", action="store_true", help="boxes only, which is all that detect needs: faster"
    )
    rooms.add_argument(
        "--frames", type=at_least(0), default=12, metavar="N", help="RGB-D frames a room (default: %(default)s)"
    )
    rooms.add_argument("--workers", type=at_least(1), metavar="N", help="processes (default: one a core)")

    prepare = add(
        "prepare",
        "raw scans, prepared arrays, instances, picture trees and Cap3D objects to aligned, labelled, cached scenes",
    )
    prepare.add_argument(
        "--root",
        required=True,
        metavar="DIR",
        help="data root with scans/, prepared arrays (<scene_id>_aligned_vert.npy) with or without picture trees "
        "(<scene_id>/images), scannet_instances/*.npz, or cap3d/*.ply (data/README.md)",
    )
    prepare.add_argument("--out", metavar="DIR", help="where the scenes go (default: ROOT/prepared)")
    prepare.add_argument(
        "--split", choices=("train", "val", "test"), help="only the scans of one split (default: all)"
    )
    prepare.add_argument("--workers", type=at_least(1), metavar="N", help="processes (default: one a core)")

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

    _add_synthesis_inputs(synthesize)

    doctor = add(
        "doctor",
        "what is installed, and what is missing or wrong in a data root",
        epilog="exit status: 0 where nothing stops a command (warnings and notes do not), 1 where something does",
    )
    doctor.add_argument("--root", metavar="DIR", help="data root to examine; without one, how to get started")
    doctor.add_argument("--json", action="store_true", help="print one JSON object (docs/data_formats.md)")


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


def _add_synthesis_inputs(synthesize: argparse.ArgumentParser) -> None:
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


def _add_loop_commands(add: AddCommand) -> None:
    loops = {
        "detect": "pre-train the scene encoder on boxes",
        "sft": "supervised fine-tuning: the cold start on chain-of-thought data, then the tasks",
        "grpo": "reinforcement learning with GRPO from an SFT model",
        "eval": "evaluate a model on the benchmarks",
    }
    for name, purpose in loops.items():
        loop = add(name, purpose)
        loop.add_argument("--config", metavar="FILE", help="YAML recipe, for instance one under script/recipes/")
        loop.add_argument(
            "--set", action="extend", nargs="+", default=[], metavar="KEY=VALUE", help="override keys: run.steps=100"
        )
        loop.add_argument("--dry-run", action="store_true", help="print the resolved configuration and stop")
        if name != "eval":
            loop.add_argument(
                "--resume", action="store_true", help="go on from the newest checkpoint in run.dir, if there is one"
            )
    tiny = add("tiny", "write a random language model in the real on-disk format: a small one for a CPU, or a shape")
    tiny.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    tiny.add_argument(
        "--corpus", required=True, metavar="ROOT", help="data root whose annotations train the tokenizer"
    )
    tiny.add_argument(
        "--shape",
        choices=("tiny", "small", "3b", "7b"),
        default="tiny",
        help="small: 15 M weights, for a GPU and minutes; 3b and 7b: that of the published Qwen2.5-VL, in bfloat16, "
        "to measure with (default: %(default)s)",
    )
    tiny.add_argument("--layers", type=at_least(1), metavar="N", help="blocks of the decoder, if not the shape's own")
    tiny.add_argument("--seed", type=at_least(0), default=0, help="of the random weights (default: %(default)s)")

    export = add("export", "write a trained model for others to use: as it is, or its adapter merged into the base")
    export.add_argument("--model", required=True, metavar="DIR", help="run, checkpoint or model folder")
    export.add_argument("--out", required=True, metavar="DIR", help="new folder to write")
    export.add_argument(
        "--merge", action="store_true", help="add the adapter to the language model and write that whole"
    )
    export.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="of the merged language model, where small updates are rounded away in bfloat16; without --merge what "
        "float32 weights are stored in (default: as they are)",
    )

    dual = add("dual", "train a small text and picture encoder on generated rooms, in place of CLIP or SigLIP")
    dual.add_argument("--out", required=True, metavar="DIR", help="folder to write; the encoder's name in recipes")
    dual.add_argument(
        "--rooms", type=at_least(1), default=64, metavar="N", help="training rooms (default: %(default)s)"
    )
    dual.add_argument(
        "--held-out", type=at_least(0), default=8, metavar="N", help="rooms to test on (default: %(default)s)"
    )
    dual.add_argument("--steps", type=at_least(0), default=2000, metavar="N", help="default: %(default)s")
    dual.add_argument(
        "--seed", type=at_least(0), default=0, help="of rooms, weights and batches (default: %(default)s)"
    )
    dual.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")


def _add_score_command(add: AddCommand) -> None:
    score = add("score", "score any prediction file, ours or another model's")
    score.add_argument("--task", required=True, help=f"one of {TASKS}, detection")
    score.add_argument(
        "--scorer", metavar="NAME", help="a task has one or more, named after their source (default: first)"
    )
    score.add_argument(
        "--references", metavar="FILE", help="prediction file or official annotations with the references"
    )
    score.add_argument("--data", metavar="ROOT", help="or: data root whose data set holds the references")
    score.add_argument("--dataset", metavar="NAME", help="with --data: the data set, as scanrefer")
    score.add_argument("--split", metavar="NAME", help="with --data: its split, as val")
    score.add_argument(
        "--predictions", required=True, metavar="FILE", help="predictions.jsonl, or {id: answer} (docs/predictions.md)"
    )
    score.add_argument(
        "--clip-model", metavar="NAME", help="with --scorer clip: CLIP or SigLIP model, a hub name or a folder"
    )
    score.add_argument(
        "--images", metavar="DIR", help="with --scorer clip: a picture of each object, <sample id>.png or .jpg"
    )
    score.add_argument("--json", action="store_true", help="print one JSON object")


def _add_infer_command(add: AddCommand) -> None:
    infer = add(
        "infer",
        "ask questions about one scan: PLY, mesh, NPZ, ScanNet scan, posed RGB-D folder, export of a phone scanner",
        epilog="docs/own_scan.md: a scan of your own in five minutes",
    )
    infer.add_argument("--scene", required=True, metavar="PATH", help="the scan; needs no labels")
    infer.add_argument("--ask", action="append", default=[], metavar="TEXT", help="a question; may be repeated")
    infer.add_argument("--questions", metavar="FILE", help="questions, one a line")
    infer.add_argument(
        "--chat", action="store_true", help="ask in a dialogue that keeps what was said; Ctrl-D or Ctrl-C ends it"
    )
    infer.add_argument(
        "--box",
        action="append",
        default=[],
        type=numbers(6, 7),
        metavar="X,Y,Z,DX,DY,DZ[,HEADING]",
        help="an object: centre and size in metres, aligned frame. It is captioned, or stands in the questions as "
        "{object}; may be repeated",
    )
    infer.add_argument(
        "--click",
        action="append",
        default=[],
        type=numbers(3),
        metavar="X,Y,Z",
        help="the same by a point: the smallest detected object around it, else the nearest",
    )
    infer.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        metavar="DIR",
        help="model or run folder, or OWNER/NAME on the hub (default: %(default)s)",
    )
    infer.add_argument(
        "--language-model", metavar="NAME", help="base language model, if it does not lie where it did in training"
    )
    infer.add_argument(
        "--multiview", default="", metavar="FILE", help="HDF5 file of multi-view features, if the model takes them"
    )
    infer.add_argument(
        "--task",
        metavar="NAME",
        help="how to ask and read: qa, dialogue, caption (box or click), dense-caption (of all detected objects), "
        f"ground, plan, describe, situated, or {TASKS} (default: qa; caption for boxes without questions)",
    )
    infer.add_argument(
        "--situation", default="", metavar="TEXT", help="where you stand and look, for questions from there (situated)"
    )
    infer.add_argument(
        "--max-tokens", type=at_least(1), default=256, metavar="N", help="length of an answer (default: %(default)s)"
    )
    infer.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    _add_frame_arguments(infer)
    infer.add_argument(
        "--out",
        default="runs/infer",
        metavar="DIR",
        help="where predictions.jsonl and a picture of each answer go (default: %(default)s)",
    )
    infer.add_argument("--json", action="store_true", help="print one JSON object a question")


def _add_frame_arguments(command: argparse.ArgumentParser) -> None:
    """How a scan is read, the same for all commands that show or ask about one."""
    frame = command.add_argument_group("the scan's frame", "what was assumed or changed is said on standard error")
    frame.add_argument(
        "--align", choices=("auto", "none"), default="auto", help="correct up-axis, scale and walls, or take as is"
    )
    frame.add_argument("--up", choices=UPS, default="", help="the axis that points up, roughly (--up=-y)")
    frame.add_argument(
        "--height", type=metres, metavar="METRES", help="from the floor to the highest point of the room: the scale"
    )
    frame.add_argument(
        "--from-video",
        action="store_true",
        help="a reconstruction of MASt3R-SLAM, SLAM3R or VGGT: remove stray points, find up and walls in any frame, "
        "scale to --height, else to a usual ceiling",
    )


def _add_view_command(add: AddCommand) -> None:
    view = add(
        "view",
        "look at a scan with answers or boxes (Rerun, a page to walk around in, a plan), at a run (HTML report), or "
        "at how views are chosen (--views)",
    )
    view.add_argument(
        "predictions",
        nargs="?",
        help="run folder, predictions.jsonl, or a file of boxes: .npz, .json (docs/viewer.md)",
    )
    view.add_argument(
        "--data",
        default="data/rooms",
        metavar="ROOT",
        help="data root with the prepared scenes (default: %(default)s)",
    )
    view.add_argument(
        "--scene",
        metavar="SCAN",
        help="the scan to show (as infer --scene takes it), or a prepared scene of the data root (default: those "
        "that the predictions are about)",
    )
    view.add_argument("--html", metavar="FILE", help="write a report that needs no server")
    view.add_argument("--save", metavar="FILE.rrd", help="write a Rerun file instead of opening the viewer")
    view.add_argument(
        "--room", metavar="FILE.html", help="write one scene as a page to walk around in, for any browser"
    )
    view.add_argument("--top", metavar="FILE.png", help="write a plan of one scene, seen from above")
    view.add_argument(
        "--export", metavar="FILE", help="write the predicted boxes of one scene: .npz, or .json (docs/viewer.md)"
    )
    view.add_argument(
        "--frame",
        choices=("scan", "world", "camera"),
        default="scan",
        help="frame of a file of boxes that is read or written: the scan file's, the aligned one, or that with a "
        "camera's axes (default: %(default)s)",
    )
    view.add_argument(
        "--limit",
        type=at_least(0),
        metavar="N",
        help="predictions to show (default: 2 a task in the report, all in the viewers)",
    )
    views = view.add_argument_group("how views are chosen", "one contact sheet a question (docs/views.md)")
    views.add_argument(
        "--views", metavar="SCENE", help="a scan (as infer --scene takes it), or a prepared scene of the data root"
    )
    views.add_argument("--ask", action="append", default=[], metavar="TEXT", help="a question; may be repeated")
    chooser = views.add_mutually_exclusive_group()
    chooser.add_argument(
        "--model", metavar="DIR", help="model or run folder: its detections (with --scene too), its view selector"
    )
    chooser.add_argument(
        "--encoder",
        metavar="NAME",
        help="fixed weights and the scan's own boxes; CLIP, SigLIP, a sentence encoder or what `dual` wrote "
        "(default: all-MiniLM-L6-v2)",
    )
    views.add_argument(
        "--language-model", metavar="NAME", help="base language model, if it does not lie where it did in training"
    )
    views.add_argument("--multiview", default="", metavar="FILE", help="multi-view features, if the model takes them")
    views.add_argument(
        "--source",
        metavar="KINDS",
        help="posed, rendered, mixed, or kinds joined by +, out of posed, inside, ring, top, bottom, object "
        "(default: the model's, else mixed)",
    )
    views.add_argument(
        "--candidates", type=at_least(1), metavar="N", help="views to choose from (default: the model's, else 16)"
    )
    views.add_argument(
        "--out",
        default="runs/views",
        metavar="DIR",
        help="where views-<n>.png and views.html go (default: %(default)s)",
    )
    _add_frame_arguments(view)


def _add_demo_command(add: AddCommand) -> None:
    demo = add(
        "demo",
        "a page in the browser: open a room, a scene or a PLY of your own, ask, see answer and boxes (docs/demo.md)",
    )
    demo.add_argument(
        "--model", default=DEFAULT_MODEL, metavar="DIR", help="model or run folder (default: %(default)s)"
    )
    demo.add_argument(
        "--language-model", metavar="NAME", help="base language model, if it does not lie where it did in training"
    )
    demo.add_argument("--data", metavar="ROOT", help="data root whose prepared scenes are offered (default: none)")
    demo.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    demo.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="who may connect: this machine alone (default: %(default)s), or 0.0.0.0 for everyone who reaches it",
    )
    demo.add_argument("--port", type=at_least(0), default=7860, metavar="N", help="default: %(default)s")
    limits = demo.add_argument_group("limits for visitors")
    limits.add_argument(
        "--max-mb", type=at_least(1), default=256, metavar="N", help="size of an upload (default: %(default)s)"
    )
    limits.add_argument(
        "--max-points",
        type=at_least(1),
        default=5_000_000,
        metavar="N",
        help="points of an upload, and faces (default: %(default)s)",
    )
    limits.add_argument(
        "--time-limit",
        type=seconds,
        default=120.0,
        metavar="SECONDS",
        help="that the model may work on one answer (default: 120)",
    )
    limits.add_argument(
        "--max-waiting", type=at_least(1), default=20, metavar="N", help="visitors in the queue (default: %(default)s)"
    )


def _add_bench_command(add: AddCommand, benchmarks: Mapping[str, str]) -> None:
    names = "\n".join(f"  {name:14} {purpose}" for name, purpose in benchmarks.items())
    bench = add(
        "bench",
        "run one benchmark",
        epilog=f"benchmarks:\n{names}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    bench.add_argument("name", choices=tuple(benchmarks), metavar="NAME", help="one of the benchmarks listed below")
    bench.add_argument("arguments", nargs=argparse.REMAINDER, help="passed on to the benchmark")
