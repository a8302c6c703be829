"""`python main.py demo`: a page on which scenes are opened and asked about."""

import importlib.util
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from .checkpoint import model_folder
from .demo_gate import Gate
from .demo_scenes import DemoScenes, Limits
from .predict import open_model

# The version that was tested. It is no pin of requirements.txt, as it takes an older pillow than the one there.
GRADIO = "gradio==6.31.0"


def check_gradio() -> None:
    """ValueError with the command that installs it where gradio is missing."""
    if importlib.util.find_spec("gradio") is None:
        raise ValueError(
            f"The demo needs the package gradio, which set-up leaves out; run `{sys.executable} -m pip install "
            f"{GRADIO}` (some 30 MB to fetch), or start the demo with `bash script/demo.sh`, which does."
        )


@contextmanager
def private_folder() -> Iterator[Path]:
    """A folder that only this user reads, gone at the end; gradio is told to put uploads in it, and tells nobody."""
    with tempfile.TemporaryDirectory(prefix="threedr1-demo-") as folder:
        uploads = Path(folder, "uploads")
        uploads.mkdir()
        os.environ |= {"GRADIO_TEMP_DIR": str(uploads), "GRADIO_ANALYTICS_ENABLED": "False"}
        yield uploads


def serve(
    model_path: str | Path,
    *,
    data: str | Path | None = None,
    language_model: str | None = None,
    device: str = "auto",
    host: str = "127.0.0.1",
    port: int = 7860,
    limits: Limits | None = None,
    on_start: Callable[[str], object],
) -> None:
    """Serve the demo until it is interrupted (Ctrl-C or SIGTERM).

    Args:
        model_path: model folder, checkpoint or run.
        data: data root whose prepared scenes are offered.
        on_start: told the page's address.

    Raises:
        ValueError: no gradio, an unreadable model, no prepared scene where `data` is named, a port that is taken.
    """
    check_gradio()
    limits = limits or Limits()
    folder = model_folder(model_path)
    with private_folder() as uploads:
        model = open_model(folder, device=device, language_model=language_model)
        scenes = DemoScenes(model, threading.Lock(), uploads, limits, Path(data) if data else None)
        page, address = launch(scenes, host, port)
        on_start(address)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the private folder goes
        try:
            threading.Event().wait()
        finally:
            stop(page, scenes)


def launch(scenes: DemoScenes, host: str, port: int) -> tuple[Any, str]:
    """Start serving; the page and its address. ValueError where the port is taken."""
    from .demo_page import CSS, Page

    gr, middleware = import_module("gradio"), import_module("starlette.middleware")  # extras

    limits = scenes.limits
    page = Page(scenes).build()
    fonts = ("system-ui", "sans-serif")  # of the visitor's machine: nothing is fetched
    gate = middleware.Middleware(Gate, uploads=scenes.uploads, file_bytes=limits.file_bytes)
    try:
        _, address, _ = page.launch(
            server_name=host,
            server_port=port,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            show_error=False,
            ssr_mode=False,
            mcp_server=False,
            pwa=False,
            enable_monitoring=False,
            max_file_size=limits.file_bytes,
            allowed_paths=[],
            footer_links=[],
            css=CSS,
            theme=gr.themes.Soft(font=fonts, font_mono=("ui-monospace", "monospace")),
            app_kwargs={"middleware": [gate], "docs_url": None, "redoc_url": None, "openapi_url": None},
        )
    except OSError:
        raise ValueError(
            f"Port {port} of {host} cannot be had: it is taken, or the address is none of this machine; name another "
            "with --port or --host."
        ) from None
    return page, address


def stop(page: Any, scenes: DemoScenes) -> None:
    """Stop serving, and wait for what is being done: a thread that is in torch as the process ends aborts it."""
    page.close(verbose=False)
    scenes.openings.end()
    with scenes.lock:
        pass
