"""`python main.py view`: a scan with answers or boxes, a run's report, or how views are chosen."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .parser import AddCommand, at_least
from .scan_frame import add_frame_arguments, say_assumed, scan_frame
from .terminal import say

if TYPE_CHECKING:
    from ...datasets.scene import Scene
    from ...visualization.shown_boxes import ShownBoxes


def add_command(add: AddCommand) -> None:
    """The command and its arguments."""
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
        type=at_least(1),
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
    add_frame_arguments(view)


def run(args: argparse.Namespace) -> int:
    """Write or show what is asked for; the exit status."""
    check_view(args)
    sections = save_view_sheets(args) if args.views is not None else []
    if args.predictions is None and args.scene is None:
        from ...visualization.report import write_page

        page = args.html or Path(args.out) / "views.html"
        say(f"wrote {write_page(page, '3D-R1 views', str(args.views), sections)}")
        return 0
    if args.html and args.predictions is not None:
        from ...visualization.report import write_report
        from ...visualization.table import results_markdown
        from ..scene_viewer import read_scan

        table = results_markdown(args.predictions)
        if table:
            say(table)
        scene = None
        if args.scene is not None:
            scene = read_scan(args.scene, args.data, scan_frame(args))
            say_assumed(scene.notes)
        how: dict[str, Any] = {"data_root": args.data, "limit": args.limit, "sections": sections, "scene": scene}
        out = write_report(args.predictions, args.html, **how)
        say(f"wrote {out}")
    if args.save or args.room or args.top or args.export or not args.html:
        show_scenes(args)
    return 0


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
    from ...visualization.rerun_view import show
    from ..scene_viewer import check_names, save_scene, scenes_to_show, the_scene

    def detect(scene: "Scene") -> "ShownBoxes":
        from ..detections import detected_boxes

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
        say_assumed(scenes[0].scene.notes)
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
    from ...visualization.contact_sheet import contact_sheet, sheet_section
    from ...visualization.pictures import save_picture
    from ..scans import find_scene
    from ..views import SENTENCE_ENCODER, score_views

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
    say_assumed(scored[0].assumed)
    sections = []
    for number, found in enumerate(scored):
        text: dict[str, Any] = {"title": found.question, "notes": found.notes, "taken_off_V": found.taken_off_V}
        sheet_HW3 = contact_sheet(found.images_VHW3, found.names, found.scores, found.chosen, **text)
        say(f"wrote {save_picture(sheet_HW3, Path(args.out) / f'views-{number}.png')}")
        sections.append(sheet_section(sheet_HW3, found.names, found.scores, found.chosen, **text))
    return sections
