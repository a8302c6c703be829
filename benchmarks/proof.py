"""The proof's page, docs/proof.md, from the runs of script/proof.sh; with --collect takes in runs first.

    bash script/proof.sh eval sft blind        # evaluates
    python main.py bench proof --collect runs/proof

No peer: it compares models of this project with one another.
"""

from collections.abc import Sequence
from pathlib import Path

from ._arguments import benchmark_parser

DOCS = Path(__file__).resolve().parents[1] / "docs"
STAGES = {
    "views": "table8",
    "encoders": "table10",
    "real": "real",
}  # which stage of script/proof.sh makes runs of what name


def command_of(label: str) -> str:
    """The command that made a run called `<name>-<seed>`."""
    name, _, seed = label.rpartition("-")
    stage = "table7" if name.startswith("grpo.") else STAGES.get(name.partition(".")[0], name)
    return f"SEEDS={seed} bash script/proof.sh {stage}"


def collect_all(run: Path, folder: Path) -> list[Path]:
    """Keep every evaluated run below the proof's folder, and the scene encoder's curves; returns what was written."""
    from ._proof_runs import collect, write_run

    written = []
    for part, stage in (("detect", "detect"), ("real-detect", "real")):
        if (run / part / "metrics.jsonl").exists():
            encoder = collect(f"{part}-0", run / "eval" / f"{part}-0", run / part, f"bash script/proof.sh {stage}")
            written.append(write_run(encoder, folder))
    for evaluated in sorted((run / "eval").glob("*")):
        if (evaluated / "results.json").exists():
            made = collect(evaluated.name, evaluated, run / evaluated.name, command_of(evaluated.name))
            written.append(write_run(made, folder))
    if not written:
        raise ValueError(f"{run} has no evaluated runs; `bash script/proof.sh eval sft blind` makes some.")
    return written


def page(docs: Path) -> str:
    """The page's text from the runs that are kept, and what people found."""
    from ._proof_page import render
    from ._proof_runs import read_runs

    findings = docs / "proof" / "findings.md"
    return render(
        read_runs(docs / "proof" / "runs"), findings.read_text(encoding="utf-8") if findings.exists() else ""
    )


def main(argv: Sequence[str] = ()) -> int:
    """Take in runs, write the page and its pictures, print the headline table."""
    parser = benchmark_parser("proof", __doc__)
    parser.add_argument("--collect", type=Path, metavar="RUN", help="folder of script/proof.sh, such as runs/proof")
    parser.add_argument("--docs", type=Path, default=DOCS, metavar="DIR", help="default: the checkout's docs/")
    arguments = parser.parse_args(list(argv))
    from ._proof_page import draw, headline
    from ._proof_runs import read_runs

    folder = arguments.docs / "proof" / "runs"
    if arguments.collect:
        for path in collect_all(arguments.collect, folder):
            print(f"wrote {path}")
    runs = read_runs(folder)
    pictures = draw(runs, folder.parent)
    (arguments.docs / "proof.md").write_text(page(arguments.docs), encoding="utf-8")
    print(f"wrote {arguments.docs / 'proof.md'} of {len(runs)} runs with {len(pictures)} pictures\n")
    print(headline(runs))
    return 0
