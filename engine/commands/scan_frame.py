"""The frame in which a scan is read: its arguments, the same for all commands that show or ask about a scan."""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from .parser import metres

if TYPE_CHECKING:
    from ...datasets.alignment import AlignOptions

UPS = ("x", "-x", "y", "-y", "z", "-z")


def add_frame_arguments(command: argparse.ArgumentParser) -> None:
    """The group of arguments that say how a scan is read."""
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


def scan_frame(args: argparse.Namespace) -> "Literal['none'] | AlignOptions":
    """How the scan is read, as `read_scene` takes it."""
    from ...datasets.alignment import AlignOptions

    known = AlignOptions(args.up, args.height, args.from_video)
    if args.align != "none":
        return known
    if known != AlignOptions():
        raise ValueError("--up, --height and --from-video go with --align auto; --align none takes the scan as it is.")
    return "none"


def say_assumed(notes: Sequence[str]) -> None:
    """What reading a scan assumed, on standard error."""
    sys.stderr.write("".join(f"assumed: {note}\n" for note in notes))
