"""Every command of the documents that needs no ScanNet, GPU, key or display is run, in a copy of the checkout.

Each page has a copy of its own, in which its commands run in their order. Recipes, and the numbers of rooms, are
made small.

Shapes: N points.
"""

import io
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from threedr1 import main as cli
from threedr1.engine import grpo, sft

from .data_factory import room_vertices, write_ply
from .documents import PAGES, ROOT, Command, blocks, commands, run_elsewhere
from .engine.test_pipeline import grpo_config, sft_config
from .test_quickstart import small_checkout

pytestmark = pytest.mark.slow

# What makes a command short where its defaults would not be; the recipes are shrunk as for the quickstart.
SHORTER = {
    "rooms": ["--train", "3", "--val", "3", "--frames", "2", "--workers", "1"],
    "infer": ["--max-tokens", "8"],
    "dual": ["--rooms", "1", "--held-out", "1", "--steps", "1"],
}
# Files that a page has its readers write: the first block of a language.
FILES = {
    "own_dataset.md": ("python", "make_mine.py"),
    "configuration.md": ("yaml", "script/recipes/my.sft.yaml"),
}


def to_run(page: Path) -> list[Command]:
    return [command for command in commands(page) if not command.needs and run_elsewhere(command.text) is None]


@pytest.fixture(scope="module")
def trained(rooms_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of the detector, SFT and GRPO of two steps, and an encoder of views that learned nothing."""
    runs = tmp_path_factory.mktemp("runs")
    sft.train(sft_config(rooms_root, runs / "sft", "run.steps=2"))
    grpo.train(grpo_config(rooms_root, runs / "sft", runs / "grpo"))
    few = [
        f"run.dir={runs}/detect",
        f"data.root={rooms_root}",
        "run.steps=2",
        "run.batch_size=2",
        "data.num_points=1024",
    ]
    assert cli.main(["detect", "--config", str(ROOT / "script/recipes/tiny.detect.yaml"), "--set", *few]) == 0
    assert cli.main(["dual", "--out", str(runs / "dual"), *SHORTER["dual"]]) == 0
    return runs


@pytest.fixture
def checkout(trained: Path, rooms_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the checkout with rooms, runs and a scan, as somebody has it who read the pages before."""
    copy = small_checkout(tmp_path / "checkout")
    for name in ("rooms", "scannet"):
        shutil.copytree(rooms_root, copy / "data" / name, ignore=shutil.ignore_patterns("tiny"))
    shutil.copytree(trained, copy / "runs")
    (copy / "runs" / "quickstart").mkdir()
    for name in ("detect", "sft", "grpo"):
        shutil.copytree(trained / name, copy / "runs" / "quickstart" / name)
    shutil.copytree(rooms_root / "tiny", copy / "runs" / "quickstart" / "tiny")
    vertices_N3, _ = room_vertices(0.05)
    for name in ("my_room.ply", "my_video.ply"):
        write_ply(copy / name, vertices_N3)
    (copy / "questions.txt").write_text("Where is the chair?\nHow many tables are there?\n")
    monkeypatch.chdir(copy)
    return copy


def run(command: Command) -> None:
    """main.py in this process, which is quicker; anything else in a shell."""
    words = shlex.split(command.text)
    if words[:2] == ["python", "main.py"]:
        arguments = [*words[2:], *SHORTER.get(words[2], [])]
        if "--help" in arguments:
            with pytest.raises(SystemExit, match="^0$"):
                cli.main(arguments)
        else:
            assert cli.main(arguments) == 0, command.text
        return
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "THREEDR1_PYTHON": sys.executable,
    }
    done = subprocess.run(
        ["bash", "-c", command.text], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, f"{command.text}: {done.stderr[-2000:]}"


@pytest.mark.parametrize("page", [page for page in PAGES if to_run(page)], ids=lambda page: page.name)
def test_commands_of_the_page_run(page: Path, checkout: Path, monkeypatch: pytest.MonkeyPatch):
    if page.name in FILES:
        language, name = FILES[page.name]
        (checkout / name).write_text(blocks(page, language)[0][1])
    for command in to_run(page):
        if " rooms --out " in command.text:  # a page that makes its rooms says all that it takes
            shutil.rmtree(checkout / shlex.split(command.text)[4], ignore_errors=True)
        monkeypatch.setattr("sys.stdin", io.StringIO(""))  # a chat ends at once
        run(command)
