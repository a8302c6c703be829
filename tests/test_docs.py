"""The documents name files, links, commands, errors, tests and numbers that exist. test_docs_commands.py runs them."""

import json
import re
from pathlib import Path

import pytest
import yaml

from threedr1 import main as cli
from threedr1.engine.config import CONFIGS, load_config
from threedr1.utils.predictions import Prediction

from .documents import PAGES, ROOT, anchors, commands, defined, messages, prose, run_elsewhere, table_rows

DOCUMENTS = [*PAGES, ROOT / "CHANGELOG.md"]
FOLDERS = "engine|models|datasets|utils|third_party|visualization|script|benchmarks|tests|docs"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_named_files_exist(document: Path):
    text = document.read_text(encoding="utf-8")
    paths = set(re.findall(rf"(?<![\w/.])(?:{FOLDERS})/[\w./-]+\.(?:py|sh|md)\b", text))
    missing = [path for path in paths if not (ROOT / path).exists()]
    assert not missing, f"{document.name} names files that do not exist: {sorted(missing)}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_links_lead_somewhere(document: Path):
    """Files that exist, and headings that they have."""
    missing = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(document)):
        name, _, anchor = link.partition("#")
        target = document.parent / name if name else document
        if "://" not in link and (not target.exists() or (anchor and anchor not in anchors(target))):
            missing.append(link)
    assert not missing, f"{document.name} links to what does not exist: {missing}"


def test_a_missing_file_and_a_missing_heading_are_found(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text("# A `page`, one\n\n```bash\n# no heading\n```\n[a](#a-page-one) [b](b.md)\n")
    assert anchors(page) == {"a-page-one"} and "no heading" not in prose(page)


def test_every_page_stands_in_the_sites_contents_and_in_the_readme():
    """mkdocs.yml's own tags (a slug function) are no plain YAML, so its contents are read alone."""
    contents = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    sections = yaml.safe_load(contents)
    entries = [entry for section in sections for entry in next(iter(section.values()))]
    listed = [entry if isinstance(entry, str) else next(iter(entry.values())) for entry in entries]
    pages = {str(page.relative_to(ROOT)) for page in DOCUMENTS} | {"benchmarks/RESULTS.md"}
    assert len(listed) == len(set(listed)) and set(listed) == pages
    more = (ROOT / "README.md").read_text(encoding="utf-8").partition("## More")[2]
    assert set(re.findall(r"\]\(([^)]+\.md)\)", more)) == pages - {"README.md"}


def test_the_tree_in_the_readme_exists():
    """Folders stand at the margin, files and folders inside them are indented by two."""
    block = (ROOT / "README.md").read_text(encoding="utf-8").partition("## The tree")[2].split("```")[1]
    folder, named, missing = "", 0, []
    for line in filter(None, block.splitlines()):
        for name in re.findall(r"[\w/]+(?:/|\.py)(?= |$)", line[:27]):
            path = folder + name if line.startswith("  ") else name
            named += 1
            if not (ROOT / path).exists():
                missing.append(path)
        if not line.startswith(" "):
            folder = line.split()[0]
    assert named > 30 and not missing, missing


def test_commands_in_the_documents_parse():
    """Every `python main.py …` line of a code block parses, and its --set keys exist."""
    found = 0
    for document in DOCUMENTS:
        for line in re.findall(r"python main\.py ([^`\n|]+)", document.read_text(encoding="utf-8")):
            words = [word.strip('"') for word in re.findall(r'"[^"]*"|\S+', line.partition("#")[0])]
            if len(words) < 2 or "…" in line or words[-1] in ("NAME", "--help"):
                continue  # a command's name, or a pattern
            args = cli.build_parser().parse_args(words)
            if args.command in CONFIGS:
                load_config(args.command, None, args.set)
            found += 1
    assert found >= 8


def test_every_command_stands_in_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    line = next(line for line in readme.splitlines() if line.startswith("main.py  "))
    assert set(line.partition("commands: ")[2].split()) == set(cli.FUNCTIONS)


def test_every_field_of_a_prediction_is_documented():
    text = (ROOT / "docs" / "predictions.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))
    assert documented == set(Prediction.__dataclass_fields__)


def test_every_claim_of_the_paper_has_a_file_and_a_test():
    """A test's cell names a file, then what in it: `tests/a.py`: `test_b`, `TestC::test_d`; `tests/e.py`."""
    rows = list(table_rows(ROOT / "docs" / "paper.md"))
    assert len(rows) > 30
    for claim, files, tests in rows:
        named = re.findall(r"`([^`]+)`", files)
        proved = []
        for part in tests.split("; "):
            path, *names = re.findall(r"`([^`]+)`", part)
            proved += [f"{path}::{name}" for name in names] or [path]
        missing = [name for name in named if not (ROOT / name).is_file()] + [t for t in proved if not defined(t)]
        assert named and proved and not missing, f"{claim}: {missing or 'no file or no test'}"


def test_the_program_still_says_what_troubleshooting_explains():
    page = ROOT / "docs" / "troubleshooting.md"
    quoted = re.findall(r"^### `(.+)`$", page.read_text(encoding="utf-8"), re.MULTILINE)
    said = messages()
    assert len(quoted) > 30
    gone = [sentence for sentence in quoted if not any(sentence in message for message in said)]
    assert not gone, f"no message reads so any more: {gone}"


def test_numbers_of_the_stages_are_those_recorded():
    """The row of results.json that each line names, to the digits that the line gives."""
    machines = {"CPU": "AMD EPYC, x86-64, 2 cores", "H100": "NVIDIA H100 80GB HBM3"}
    results = json.loads((ROOT / "benchmarks" / "results.json").read_text(encoding="utf-8"))
    recorded = {(row["name"], row["machine"]): row for row in results}
    checked = 0
    for cells in table_rows(ROOT / "docs" / "stages.md"):
        if len(cells) != 5 or cells[3] not in machines:
            continue
        number, _, unit = cells[2].replace(",", "").partition(" ")
        row = recorded[cells[4].strip("`"), machines[cells[3]]]
        assert float(number) == pytest.approx(row["value"], rel=0.01) and unit == row["unit"], cells
        checked += 1
    assert checked > 15


def test_every_command_is_run_by_a_test_or_says_what_it_needs():
    """A test that runs a command by other means is named here, and must speak of it."""
    everywhere = [command for page in PAGES for command in commands(page)]
    assert len(everywhere) > 60
    for command in everywhere:
        elsewhere = run_elsewhere(command.text)
        if elsewhere is not None:
            path, word = elsewhere
            assert word in (ROOT / path).read_text(encoding="utf-8"), f"{path} does not run {command.text}"
            assert not command.needs, f"{command.page.name}: {command.text} needs nothing, {path} runs it"
