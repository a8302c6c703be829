"""The command line that benchmarks share; imports nothing heavy."""

import argparse
from pathlib import Path

RESULTS = Path(__file__).resolve().with_name("results.json")


def benchmark_parser(name: str, docstring: str | None) -> argparse.ArgumentParser:
    """A parser named after its command, described by the module's docstring."""
    return argparse.ArgumentParser(
        f"threedr1 bench {name}", description=docstring, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def measuring_parser(
    name: str, docstring: str | None, *, repeats: int | None, cuda: bool = True
) -> argparse.ArgumentParser:
    """The arguments of a benchmark that measures: repeats, device, and where results are recorded.

    Args:
        repeats: default number of timed runs; None for a benchmark that takes no medians.
        cuda: whether it runs on GPUs too.
    """
    parser = benchmark_parser(name, docstring)
    parser.set_defaults(repeats=None)
    if repeats is not None:
        parser.add_argument(
            "--repeats", type=positive, default=repeats, metavar="N", help="timed runs (default: %(default)s)"
        )
    devices = "cpu, cuda or cuda:1" if cuda else "cpu"
    parser.add_argument(
        "--device", default="cpu", type=device if cuda else _cpu, help=f"{devices} (default: %(default)s)"
    )
    parser.add_argument("--threads", type=positive, metavar="N", help="threads of PyTorch (default: its own choice)")
    parser.add_argument(
        "--record",
        type=Path,
        nargs="?",
        const=RESULTS,
        metavar="FILE",
        help="write results.json (default: the checkout's)",
    )
    parser.add_argument("--note", default="", metavar="TEXT", help="condition to record with the numbers")
    return parser


def positive(text: str) -> int:
    """A whole number from 1 on."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 on")
    return int(text)


def device(text: str) -> str:
    """cpu, cuda or cuda:INDEX."""
    kind, _, index = text.partition(":")
    if text != "cpu" and (kind != "cuda" or (text != "cuda" and not index.isdigit())):
        raise argparse.ArgumentTypeError(f"{text} is not cpu, cuda or cuda:INDEX")
    return text


def _cpu(text: str) -> str:
    if text != "cpu":
        raise argparse.ArgumentTypeError("this one measures the CPU")
    return text
