"""The proof's page, docs/proof.md, and its headline in README.md, from runs of script/proof.sh; --collect adds some.

    bash script/proof.sh sft,blind             # trains and scores, on a machine with a GPU
    python main.py bench proof --collect runs/proof

No peer: it compares models of this project with one another.
"""

from collections.abc import Sequence
from pathlib import Path

from ..utils.files import write_whole
from ._arguments import benchmark_parser

DOCS = Path(__file__).resolve().parents[1] / "docs"


def collect_all(run: Path, folder: Path) -> list[Path]:
    """Keep every evaluated run below the proof's folder, and the scene encoder's curves; returns what was written."""
    from ._proof_runs import collect, write_run

    written = []
    for label, trained in (("detect-0", "detect"), ("real-detect-0", "real-detect")):
        if (run / trained / "metrics.jsonl").exists():
            written.append(write_run(collect(label, run / "eval" / label, run / trained), folder))
    for evaluated in sorted((run / "eval").glob("*")):
        if (evaluated / "results.json").exists():
            written.append(write_run(collect(evaluated.name, evaluated, run / evaluated.name), folder))
    if not written:
        raise ValueError(f"{run} has no evaluated runs; `bash script/proof.sh sft,blind` makes some.")
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
    from ._proof_page import draw, headline, with_headline
    from ._proof_runs import read_runs

    folder = arguments.docs / "proof" / "runs"
    if arguments.collect:
        for path in collect_all(arguments.collect, folder):
            print(f"wrote {path}")
    runs = read_runs(folder)
    pictures = draw(runs, folder.parent)
    write_whole(arguments.docs / "proof.md", page(arguments.docs))
    readme = arguments.docs.parent / "README.md"
    write_whole(readme, with_headline(readme.read_text(encoding="utf-8"), runs))
    print(f"wrote {arguments.docs / 'proof.md'} of {len(runs)} runs with {len(pictures)} pictures\n")
    print(headline(runs) or "Not measured yet.")
    return 0
