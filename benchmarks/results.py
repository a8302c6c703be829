"""Measured claims: writes RESULTS.md from results.json, and takes in what other machines measured.

`results.json` is a list of objects with the keys of `FIELDS`, one for every claim and machine. Benchmarks write it
(`--record`), hands do not. `ratio` says how many times better ours is than the peer: above 1 we are ahead, whether the
unit is a time or a rate.
"""

import hashlib
import json
import math
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock

from ..utils.files import write_whole
from ._arguments import RESULTS, benchmark_parser

ROOT = Path(__file__).resolve().parents[1]
PAGE = "RESULTS.md"
FIELDS = (
    *("name", "value", "unit", "peer", "peer_value", "ratio"),
    *("machine", "versions", "commit", "date", "command", "note"),
)
Entry = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One measured number, beside what a peer does with the same data in the same run, where there is a peer.

    `better` says which way the unit runs: "lower" for times, "higher" for rates and shares.
    """

    name: str
    value: float
    unit: str
    peer: str = ""
    peer_value: float | None = None
    better: Literal["lower", "higher"] = "lower"
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """How many times better than the peer; None without a peer."""
        if self.peer_value is None:
            return None
        ours, peers = (self.peer_value, self.value) if self.better == "lower" else (self.value, self.peer_value)
        return ours / peers if peers else None


def record(
    rows: Iterable[Row], path: Path, *, command: str, device: str = "cpu", packages: Sequence[str] = ()
) -> None:
    """Put rows into `path` (results.json), in place of those of the same name and machine; make the page beside it.

    Args:
        command: what was run, as a user would type it.
        device: "cpu" or a CUDA device; names the machine.
        packages: distributions beside Python and PyTorch whose versions matter to the numbers.
    """
    context = {
        "machine": machine_name(device),
        "versions": versions(device, packages),
        "commit": commit(),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "command": command,
    }
    entries = []
    for row in rows:
        for value in (row.value, row.peer_value):
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{row.name} measured {value}; nothing was recorded, run the benchmark again.")
        measured = {name: getattr(row, name) for name in ("name", "unit", "peer", "note")}
        numbers = {"value": row.value, "peer_value": row.peer_value, "ratio": row.ratio}
        entry = measured | {name: rounded(number) for name, number in numbers.items()} | context
        entries.append({name: entry[name] for name in FIELDS})
    merge(entries, path)


def merge(entries: Sequence[Entry], path: Path) -> None:
    """Replace entries of the same name and machine in `path`, add the others, and make the page beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    key = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    with FileLock(Path(tempfile.gettempdir()) / f"threedr1-results-{key}.lock"):
        table = {(entry["machine"], entry["name"]): entry for entry in read_results(path)}
        table |= {(entry["machine"], entry["name"]): entry for entry in entries}
        kept = [table[key] for key in sorted(table)]
        write_whole(path, json.dumps(kept, indent=2, ensure_ascii=False) + "\n")
        write_whole(path.with_name(PAGE), render(kept))


def read_results(path: Path) -> list[Entry]:
    """The entries of a results file; none where it is absent. ValueError where it is not one."""
    if not path.exists():
        return []
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error.msg}, line {error.lineno}); restore it from git.") from None
    if not isinstance(entries, list):
        raise ValueError(f"{path} is not a list of measurements; restore it from git.")
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict) or set(entry) != set(FIELDS):
            raise ValueError(f"{path}: entry {number} does not have the fields {', '.join(FIELDS)}; measure it again.")
    return entries


def render(entries: Sequence[Entry]) -> str:
    """The page: a table for every machine. Times on a CPU that stand beside a peer's are given as ratios only."""
    lines = [
        "# Measured results",
        "",
        "Written by `python main.py bench results` from `results.json`; every row comes from a benchmark's own run",
        "(docs/benchmarks.md). The ratio says how many times better than the peer we are in the same run, on the same",
        "data: above 1 we are ahead. Of times on a CPU beside a peer's only the ratio stands here.",
    ]
    if not entries:
        lines += ["", "Nothing has been recorded yet."]
    for machine in sorted({entry["machine"] for entry in entries}):
        rows = sorted((entry for entry in entries if entry["machine"] == machine), key=lambda entry: entry["name"])
        lines += ["", f"## {machine}", ""]
        lines += ["| claim | ours | peer | ratio | what | measured |", "|---|---|---|---|---|---|"]
        lines += [_table_row(entry) for entry in rows]
        lines += ["", "Commands:", ""]
        lines += [f"- `{command}`" for command in sorted({entry["command"] for entry in rows})]
        lines += ["", "Versions: " + "; ".join(sorted({_versions_text(entry) for entry in rows})) + "."]
    return "\n".join(lines) + "\n"


def _table_row(entry: Entry) -> str:
    only_ratio = entry["ratio"] is not None and "cuda" not in entry["versions"] and _is_time(entry["unit"])
    ours = "" if only_ratio else f"{shown(entry['value'])} {entry['unit']}"
    peer = "" if only_ratio or entry["peer_value"] is None else f"{shown(entry['peer_value'])} {entry['unit']}"
    ratio = "" if entry["ratio"] is None else f"{shown(entry['ratio'])}x"
    what = "; ".join(part for part in (f"peer: {entry['peer']}" if entry["peer"] else "", entry["note"]) if part)
    cells = (f"`{entry['name']}`", ours, peer, ratio, what, f"{entry['date']}, {entry['commit']}")
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _is_time(unit: str) -> bool:
    return unit in ("s", "ms", "us")


def _versions_text(entry: Entry) -> str:
    return ", ".join(f"{name} {version}" for name, version in entry["versions"].items())


def rounded(number: float | None) -> float | None:
    """Four significant digits: more would be noise."""
    return None if number is None else float(f"{number:.4g}")


def shown(number: float) -> str:
    """Three significant digits, without an exponent, digits grouped from 10,000 on."""
    if number == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(number))))
    return f"{number:,.{digits}f}" if abs(number) >= 10_000 else f"{number:.{digits}f}"


def machine_name(device: str = "cpu") -> str:
    """Name of the GPU or the CPU, as engine.environment gives it."""
    from ..engine import environment  # it loads torch

    return environment.machine_name(device)


def versions(device: str, packages: Sequence[str] = ()) -> dict[str, str]:
    """Versions of Python, PyTorch, CUDA and the named packages, as engine.environment gives them."""
    from ..engine import environment

    return environment.versions(device, packages)


def commit() -> str:
    """The checkout's commit, as engine.environment gives it; what benchmarks write here is no change."""
    from ..engine import environment  # it loads torch

    return environment.commit(ROOT, ("benchmarks/results.json", f"benchmarks/{PAGE}"))


def main(argv: Sequence[str] = ()) -> int:
    """Make the page again, after taking in the results of other machines."""
    parser = benchmark_parser("results", __doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE", help="default: the checkout's")
    parser.add_argument("--merge", type=Path, nargs="+", default=[], metavar="FILE", help="results of other machines")
    arguments = parser.parse_args(list(argv))
    for path in arguments.merge or [arguments.results]:
        if not path.exists():
            raise ValueError(f"There is no results file {path}; benchmarks write one with --record.")
    merge([entry for path in arguments.merge for entry in read_results(path)], arguments.results)
    print(f"wrote {arguments.results.with_name(PAGE)}")
    return 0
