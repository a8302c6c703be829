"""`python main.py infer`: questions about one scan, asked on the command line, in a file or in a dialogue."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .parser import DEFAULT_MODEL, TASKS, AddCommand, at_least, numbers
from .scan_frame import add_frame_arguments, say_assumed, scan_frame
from .terminal import in_colour, say, show_piece

if TYPE_CHECKING:
    from ...utils.predictions import Prediction
    from ..predict import Session
    from ..questions import Request
    from ..rollout import Rollout

    Answer = tuple[Prediction, Rollout]


def add_command(add: AddCommand) -> None:
    """The command and its arguments."""
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
    add_frame_arguments(infer)
    infer.add_argument(
        "--out",
        default="runs/infer",
        metavar="DIR",
        help="where predictions.jsonl and pictures of the answers go, in place of earlier ones (default: %(default)s)",
    )
    infer.add_argument("--json", action="store_true", help="print one JSON object a question")


def run(args: argparse.Namespace) -> int:
    """Ask, show the answers and save them; the exit status."""
    from ..questions import Request

    request = Request(asked_questions(args), args.box, args.click, args.task, args.situation)
    if args.chat:
        if request.questions or request.pointing or request.task or request.situation or args.json:
            raise ValueError("--chat asks for its questions itself; leave questions, boxes, --task and --json out.")
    elif not request.questions and not request.pointing and not args.task:
        raise ValueError("There is no question; give one or more with --ask, or a file with one a line: --questions.")
    else:
        request.check()
    align = scan_frame(args)
    from ..predict import check_out, open_session

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
    from ..answers import save_answers

    if not answers:
        return 0
    earlier = (Path(args.out) / "predictions.jsonl").exists()
    pictures = save_answers(session, answers, Path(args.out))
    there = " (in place of earlier answers)" if earlier else ""
    sys.stderr.write(f"wrote {args.out}/predictions.jsonl and {', '.join(path.name for path in pictures)}{there}\n")
    return 0


def asked_questions(args: argparse.Namespace) -> list[str]:
    """Questions of the command line, then those of the file."""
    from ...utils.files import read_text

    questions = list(args.ask)
    if args.questions:
        text = read_text(args.questions, f"There is no question file at {args.questions}; write one question a line.")
        questions += [line.strip() for line in text.splitlines() if line.strip()]
    return questions


def request_answers(session: "Session", request: "Request", as_json: bool) -> "list[Answer]":
    """Ask and show each answer: as it is written, or as one JSON object when it is whole."""
    from dataclasses import asdict

    from ..chat import Printer

    samples = session.samples(request)
    say_assumed(session.scene.notes)
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
    from ..chat import chat

    if sys.stdin.isatty():
        import readline  # noqa: F401 - gives `input` its line editing and history

    say_assumed(session.scene.notes)
    answers: list[Answer] = []
    chat(session, input, show_piece, dim=in_colour(), on_answer=lambda *answer: answers.append(answer))
    return answers
