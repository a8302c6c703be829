"""The documents name files, commands and flags that exist."""

import re
from pathlib import Path

import pytest

import threedr1
from threedr1 import main as cli
from threedr1.engine.config import CONFIGS, load_config
from threedr1.utils.predictions import Prediction

ROOT = Path(threedr1.__file__).resolve().parent
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(ROOT.glob("docs/*.md"))
FOLDERS = "engine|models|datasets|utils|third_party|visualization|script|benchmarks|tests|docs"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_named_files_exist(document: Path):
    text = document.read_text(encoding="utf-8")
    paths = set(re.findall(rf"(?<![\w/.])(?:{FOLDERS})/[\w./-]+\.(?:py|sh|md)\b", text))
    missing = [path for path in paths if not (ROOT / path).exists()]
    assert not missing, f"{document.name} names files that do not exist: {sorted(missing)}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path):
    targets = re.findall(r"(?<!!)\[[^\]]*\]\(([^)#]+)\)", document.read_text(encoding="utf-8"))
    missing = [name for name in targets if "://" not in name and not (document.parent / name).exists()]
    assert not missing, f"{document.name} links to files that do not exist: {missing}"


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
        for line in re.findall(r"python main\.py ([^`\n]+)", document.read_text(encoding="utf-8")):
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
