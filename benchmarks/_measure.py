"""How benchmarks take times and report them."""

import argparse
import os
import shlex
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from ._arguments import RESULTS
from .results import ROOT, Row, record, shown

T = TypeVar("T")
QUEUED = 10  # calls that median_device_seconds times together where one takes under a millisecond
_SPIN_CYCLES = 10_000_000  # some 5 ms: longer than it takes to queue QUEUED calls


class Load:
    """What else the machine does: the load when the benchmark began, for the note of every number."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        if arguments.device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError("PyTorch sees no CUDA device; leave --device out to measure the CPU.")
        if arguments.threads:
            torch.set_num_threads(arguments.threads)
        self._load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None

    def __str__(self) -> str:
        load = "" if self._load is None else f", load {self._load:.1f} before"
        threads = torch.get_num_threads()
        return f"{threads} thread{'s' if threads > 1 else ''}{load}"


def seconds(action: Callable[[], object], device: str) -> float:
    """Wall seconds of one call, until the device is done with it."""
    return timed(action, device)[0]


def timed(action: Callable[[], T], device: str) -> tuple[float, T]:
    """Wall seconds of one call, until the device is done with it, and what it returned."""
    _wait(device)
    start = time.perf_counter()
    result = action()
    _wait(device)
    return time.perf_counter() - start, result


def median_seconds(actions: Sequence[Callable[[], object]], repeats: int, device: str = "cpu") -> list[float]:
    """Median seconds of each action over `repeats` rounds, after one call of each that warms up.

    The actions take turns, so that whatever else the machine does meets them alike.
    """
    for action in actions:
        seconds(action, device)
    rounds = [[seconds(action, device) for action in actions] for _ in range(repeats)]
    return [statistics.median(column) for column in zip(*rounds, strict=True)]


def median_device_seconds(actions: Sequence[Callable[[], object]], repeats: int, device: str) -> list[float]:
    """Median seconds that a GPU spends on each action, as `median_seconds`, without the host's time to launch it.

    Of actions that take under a millisecond, `QUEUED` calls are timed together. Their results live until the last one
    is done, so that each is written to memory of its own, not to a cache that still holds the one before.
    """
    counts = []
    for action in actions:
        seconds(action, device)
        counts.append(QUEUED if seconds(action, device) < 1e-3 else 1)
    pairs = list(zip(actions, counts, strict=True))
    rounds = [[_queued_seconds(action, count, device) for action, count in pairs] for _ in range(repeats + 1)]
    return [statistics.median(column[1:]) for column in zip(*rounds, strict=True)]  # the first allocates memory


def _queued_seconds(action: Callable[[], object], count: int, device: str) -> float:
    with torch.cuda.device(device):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        _wait(device)
        torch.cuda._sleep(_SPIN_CYCLES)  # the GPU spins while the host queues the calls
        begin.record()
        results = [action() for _ in range(count)]
        end.record()
        end.synchronize()
        del results
        return begin.elapsed_time(end) / 1000 / count


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(torch.device(device))


def report(
    name: str,
    rows: Sequence[Row],
    arguments: argparse.Namespace,
    load: Load | None,
    *,
    argv: Sequence[str],
    packages: Sequence[str] = (),
    remarks: Mapping[str, str] | None = None,
) -> None:
    """Print peer, ours and ratio; record them where the user asked for it.

    Args:
        load: None for rows that are not measured here.
        remarks: words to print at the end of the row of that name.

    Raises:
        ValueError: --record without a file, outside a checkout.
    """
    conditions = [*([f"median of {arguments.repeats}"] if arguments.repeats else []), *([str(load)] if load else [])]
    print(f"{name}: {', '.join(conditions)}" if conditions else name)
    width = max([44, *(len(row.name) for row in rows)])
    print(f"{'':<{width}}{'peer':>12}{'ours':>12}{'':<8}{'ratio':>8}")
    for row in rows:
        peer = "-" if row.peer_value is None else shown(row.peer_value)
        ratio = "-" if row.ratio is None else f"{shown(row.ratio)}x"
        remark = remarks.get(row.name, "") if remarks else ""
        print(f"{row.name:<{width}}{peer:>12}{shown(row.value):>12} {row.unit:<7}{ratio:>8}{remark}")
    for peer in dict.fromkeys(row.peer for row in rows if row.peer):
        print(f"peer: {peer}")
    if arguments.record is None:
        return
    path: Path = arguments.record
    if path == RESULTS and not (ROOT / "pyproject.toml").exists():
        raise ValueError("This is not a checkout; name the file to record in: --record results.json.")
    noted = [replace(row, note="; ".join(filter(None, [row.note, *conditions, arguments.note]))) for row in rows]
    record(noted, path, command=command_line(name, argv), device=arguments.device, packages=packages)
    print(f"recorded in {path}")


def command_line(name: str, argv: Sequence[str]) -> str:
    """What a user types to measure again, without where it was recorded and the note."""
    words: list[str] = []
    dropping = False  # the value of an option that was dropped
    for word in argv:
        if word.startswith(("--record", "--note")):
            dropping = "=" not in word
        elif not dropping or word.startswith("--"):
            dropping = False
            words.append(word)
        else:
            dropping = False
    processes = os.environ.get("WORLD_SIZE", "1")
    start = ["torchrun", "--standalone", f"--nproc-per-node={processes}"] if processes != "1" else ["python"]
    return shlex.join([*start, "main.py", "bench", name, *words])
