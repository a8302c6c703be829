"""Starts headless Chromium on a page."""

import shutil
import subprocess
from pathlib import Path

import pytest


def find_browser() -> str:
    """The browser's program; skips where there is none."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no chromium on PATH (Debian: apt-get install chromium)")
    return found


def open_page(
    browser: str, page: Path, folder: Path, *more: str, size: tuple[int, int], fragment: str = ""
) -> subprocess.CompletedProcess[str]:
    """Load a page for five seconds of its own time; WebGL is drawn in software."""
    done = subprocess.run(
        [
            browser,
            "--headless",
            "--no-sandbox",
            "--use-angle=swiftshader",
            "--enable-unsafe-swiftshader",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-dev-shm-usage",
            "--enable-logging=stderr",
            f"--user-data-dir={folder / 'profile'}",
            f"--window-size={size[0]},{size[1]}",
            "--virtual-time-budget=5000",
            *more,
            page.as_uri() + fragment,
        ],
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done


def console(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What the page wrote to the browser's console."""
    return [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
