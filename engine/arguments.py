"""The command line's arguments and help texts; those of the longer commands stand in commands/, beside their code.

Nothing heavy is imported, so that every `--help` answers at once.
"""

import argparse
from collections.abc import Callable, Mapping
from typing import Any

from .commands import infer, synthesize, view
from .commands.parser import DEFAULT_MODEL, TASKS, AddCommand, Parser, at_least, seconds


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
    infer.add_command(add)
    view.add_command(add)
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

    synthesize.add_command(add)

    doctor = add(
        "doctor",
        "what is installed, and what is missing or wrong in a data root",
        epilog="exit status: 0 where nothing stops a command (warnings and notes do not), 1 where something does",
    )
    doctor.add_argument("--root", metavar="DIR", help="data root to examine; without one, how to get started")
    doctor.add_argument("--json", action="store_true", help="print one JSON object (docs/data_formats.md)")


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
    tiny.add_argument(
        "--names",
        type=at_least(0),
        metavar="N",
        help="names of detected objects, <obj0> and on, that are one token each, if not the shape's own",
    )
    tiny.add_argument("--seed", type=at_least(0), default=0, help="of the random weights (default: %(default)s)")

    names = add("names", "give a language model names of detected objects that are one token each")
    names.add_argument(
        "--model",
        required=True,
        metavar="NAME",
        help="a Qwen2.5-VL: folder (model/language_model of a checkpoint trained whole, too), or name on the hub",
    )
    names.add_argument("--out", required=True, metavar="DIR", help="new folder to write")
    names.add_argument(
        "--names", type=at_least(1), default=100, metavar="N", help="<obj0> and on (default: %(default)s)"
    )
    names.add_argument(
        "--redraw",
        action="store_true",
        help="draw the embeddings of names that it has, too: for names that it was never taught (default: keep them)",
    )
    names.add_argument("--seed", type=at_least(0), default=0, help="of their embeddings (default: %(default)s)")

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
