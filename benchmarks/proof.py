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
    """Keep every evaluated run below the proof's folder, and the curves of others; returns what was written."""
    from ._proof_runs import collect, write_run

    written = []
    unscored = {"detect-0": "detect", "real-detect-0": "real-detect"}
    unscored |= {path.name: path.name for path in sorted(run.glob("align-*"))}
    for label, trained in unscored.items():
        if finished(run, trained):
            written.append(write_run(collect(label, run / "eval" / label, run / trained), folder))
    for evaluated in sorted((run / "eval").glob("*")):
        label, trained, scored = evaluated.name, *(finished(run, f"{part}{evaluated.name}") for part in ("", "eval-"))
        if trained is None or scored is None or scored < trained:
            print(f"left out: {label} is not trained and scored to the end; run its stage again")
            continue
        written.append(write_run(collect(label, evaluated, run / label), folder))
    if not written:
        raise ValueError(f"{run} has no evaluated runs; `bash script/proof.sh sft,blind` makes some.")
    return written


def finished(run: Path, stage: str) -> int | None:
    """When a stage of script/proof.sh was finished, in seconds; None where it was not, or is being done again."""
    stamp = run / "stages" / f"{stage}.done"
    return int(stamp.read_text(encoding="utf-8").split()[-1]) if stamp.exists() else None


def page(docs: Path) -> str:
    """The page's text from the runs that are kept, what people found, and their summary of it."""
    from ._proof_page import render
    from ._proof_runs import read_runs

    def written(name: str) -> str:
        path = docs / "proof" / name
        return path.read_text(encoding="utf-8") if path.exists() else ""

    return render(read_runs(docs / "proof" / "runs"), written("findings.md"), written("summary.md"))


def main(argv: Sequence[str] = ()) -> int:
    """Take in runs, write the page and its pictures, print the headline table."""
    parser = benchmark_parser("proof", __doc__)
    parser.add_argument("--collect", type=Path, metavar="RUN", help="folder of script/proof.sh, such as runs/proof")
    parser.add_argument("--docs", type=Path, default=DOCS, metavar="DIR", help="default: the checkout's docs/")
    arguments = parser.parse_args(list(argv))
    from ._proof_page import draw, headline, with_headline
    from ._proof_runs import read_runs

    folder = arguments.docs / "proof" / "runs"
    readme = arguments.docs.parent / "README.md"
    introduction = readme.read_text(encoding="utf-8")
    with_headline(introduction, [])  # that it lacks the marks is said before anything is written
    if arguments.collect:
        for path in collect_all(arguments.collect, folder):
            print(f"wrote {path}")
    runs = read_runs(folder)
    pictures = draw(runs, folder.parent)
    write_whole(arguments.docs / "proof.md", page(arguments.docs))
    write_whole(readme, with_headline(introduction, runs))
    print(f"wrote {arguments.docs / 'proof.md'} of {len(runs)} runs with {len(pictures)} pictures\n")
    print(headline(runs) or "Not measured yet.")
    return 0
