"""What the documents say, taken apart: code blocks, commands, links, anchors, tables."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import threedr1

ROOT = Path(threedr1.__file__).resolve().parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "data" / "README.md", *sorted(ROOT.glob("docs/*.md"))]
_BLOCK = re.compile(r'^```(\w*)(?: title="([^"]*)")?\n(.*?)^```', re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Command:
    """One line of a shell block. `needs` is what it cannot run without, as its block or its comment says; or empty."""

    page: Path
    text: str
    needs: str


def blocks(page: Path, language: str) -> list[tuple[str, str]]:
    """Title and content of the page's code blocks in a language."""
    found = _BLOCK.findall(page.read_text(encoding="utf-8"))
    return [(title, content) for kind, title, content in found if kind == language]


def commands(page: Path) -> list[Command]:
    """Every command of the page's shell blocks, without its comment."""
    found = []
    for title, content in blocks(page, "bash"):
        for line in content.splitlines():
            text, _, comment = line.partition(" #")
            if text.strip():
                needs = title or next(iter(re.findall(r"needs .*", comment)), "")
                found.append(Command(page, text.strip(), needs))
    return found


def prose(page: Path) -> str:
    """The page without its code blocks, whose lines may look like headings and links."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """What a link may name behind `#`: a heading in lower case, without punctuation, blanks as hyphens."""
    headings = re.findall(r"^#+ (.+?)\s*$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def table_rows(page: Path) -> Iterator[list[str]]:
    """Cells of every row of the page's tables; the headings are left out."""
    for table in re.findall(r"^\|.*\n\|-.*\n((?:\|.*\n)*)", page.read_text(encoding="utf-8"), re.MULTILINE):
        for line in table.splitlines():
            yield [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def messages() -> list[str]:
    """Every text of the package's sources, with … for what is filled in; and the shell scripts as they are."""
    found = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "script").glob("*.sh"))]
    folders = ("engine", "models", "datasets", "utils", "visualization", "third_party")
    for path in [ROOT / "main.py", *(path for folder in folders for path in (ROOT / folder).rglob("*.py"))]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append(
                    "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def defined(test: str) -> bool:
    """Whether `tests/file.py`, `tests/file.py::name` or `tests/file.py::Class::name` is there."""
    path, *names = test.split("::")
    if not (ROOT / path).is_file():
        return False
    body: list[ast.stmt] = ast.parse((ROOT / path).read_text(encoding="utf-8")).body
    for name in names:
        node = next((n for n in body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name == name), None)
        if node is None:
            return False
        body = node.body
    return True


# Commands that other tests run, and the word by which they are found there.
RUN_ELSEWHERE = (
    (r"bash script/quickstart\.sh$", "tests/test_quickstart.py", "quickstart.sh"),
    (r"bash script/setup\.sh$", "tests/test_scripts.py", "setup.sh"),
    (r"(bash script/test\.sh --(?!gpu)[a-z]+)$", ".ci/run", r"\1"),
    (r"bash script/test\.sh(?: tests/utils)?$", ".ci/run", "script/test.sh"),
    (r"(?:[A-Z]+=\S+ )*bash script/demo\.sh$", "tests/test_scripts.py", "demo.sh"),
    (r"python main\.py demo ", "tests/engine/test_demo_browser.py", "launch("),
    (r"bash script/docs\.sh(?: serve)?$", "tests/test_docs_site.py", "docs.sh"),
)


def run_elsewhere(text: str) -> tuple[str, str] | None:
    """The test that runs a command, if not test_docs_commands.py, and the word to find it by; else None."""
    matches = ((re.match(pattern, text), path, word) for pattern, path, word in RUN_ELSEWHERE)
    return next(((path, match.expand(word)) for match, path, word in matches if match), None)
