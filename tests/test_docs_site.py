"""The documentation as a site: script/docs.sh builds it, and refuses what leads nowhere. Needs mkdocs-material."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .test_quickstart import small_checkout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    if importlib.util.find_spec("material") is None:
        pytest.skip("mkdocs-material is not installed; `bash script/test.sh --docs` fetches it")
    return small_checkout(tmp_path / "checkout")


def build(checkout: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(checkout / "script" / "docs.sh")],
        env=os.environ | {"THREEDR1_PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_site_is_built_with_pages_from_outside_the_folder_of_documents(checkout):
    done = build(checkout)
    assert done.returncode == 0, done.stderr[-3000:]
    site = checkout / "build" / "site"
    home, own_scan = (site / name for name in ("index.html", "docs/own_scan.html"))
    assert 'href="docs/quickstart.html"' in home.read_text() and 'src="docs/images/quickstart.png"' in home.read_text()
    assert (site / "docs/images/quickstart.png").is_file() and (site / "script/recipes/grpo.yaml").is_file()
    assert 'href="predictions.html"' in own_scan.read_text()
    assert 'href="../data/index.html' in (site / "docs/data_formats.html").read_text()
    fetched = [page.name for page in site.rglob("*.html") if 'src="http' in page.read_text()]
    assert not fetched, f"pages fetch something from elsewhere: {fetched}"


@pytest.mark.parametrize("link", ["nowhere.md", "stages.md#nowhere", "../data/nowhere.md"])
def test_a_link_that_leads_nowhere_ends_the_build(checkout, link):
    page = checkout / "docs" / "paper.md"
    page.write_text(page.read_text() + f"\n[somewhere]({link})\n")
    done = build(checkout)
    assert done.returncode != 0 and link.partition("#")[2] in done.stderr and "paper.md" in done.stderr
