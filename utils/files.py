"""Text files that people hand in: read whole, or refused in one sentence that names the file.

Files of ours: written whole, or not at all; who may read them.
"""

import json
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def read_text(path: str | Path, missing: str) -> str:
    """Content of a UTF-8 text file, without a byte order mark.

    Args:
        missing: the sentence for a file that is not there.

    Raises:
        ValueError: not there, a folder, or not UTF-8.
    """
    path = Path(path)
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ValueError(missing) from None
    except IsADirectoryError:
        raise ValueError(f"{path} is a folder where a file is expected; name the file itself.") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a text file in UTF-8; save it as one, or copy it again.") from None


def read_log(path: str | Path) -> list[dict]:
    """Rows of a log of one JSON object a line; none where there is no file.

    A last line that a kill cut short is left out; ValueError for any other that is not JSON.
    """
    path = Path(path)
    # by bytes: texts of models hold characters that str.splitlines takes for ends of lines, too
    lines = path.read_bytes().removesuffix(b"\n").split(b"\n") if path.exists() else []
    rows = []
    for number, line in enumerate(lines):
        try:
            rows.append(json.loads(line))
        except ValueError:  # cut within a character, it is no UTF-8
            if number + 1 < len(lines):
                raise ValueError(f"{path}, line {number + 1}: not JSON.") from None
    return rows


@contextmanager
def replacing(path: str | Path, *, sync: bool = False) -> Iterator[Path]:
    """A path to write a file at, which takes the place of `path` when the block ends without an error.

    So a reader meets the old file or the new one, and so does who comes after a kill. The path to write at has the
    name of `path`, for libraries that go by the suffix, and lies in a fresh folder `<name>.<random>.partial` beside
    it: processes of several machines may write one file at a time, and whoever lists the files there meets no half
    of one. The folder goes when the block ends, however it ends; only a kill leaves it behind.

    Args:
        sync: wait until the content is on the disk before the old file goes, for what must outlive a power cut.

    Raises:
        OSError: the folder of `path` is not there or cannot be written, or the block wrote nothing.
    """
    path = Path(path)
    try:
        beside = tempfile.TemporaryDirectory(
            prefix=f"{path.name}.", suffix=".partial", dir=path.parent, ignore_cleanup_errors=True
        )
    except OSError as error:
        error.filename = str(path)  # what the user named
        raise
    with beside as folder:
        partial = Path(folder) / path.name
        yield partial
        if sync:
            with partial.open("rb") as stream:
                os.fsync(stream.fileno())
        os.replace(partial, path)


def write_whole(path: str | Path, content: str | bytes | memoryview) -> None:
    """Write a file, text in UTF-8 with its line ends as they are, by way of `replacing`."""
    with replacing(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def readable_as_its_folder(folder: str | Path) -> None:
    """Let whoever may read a folder read the files in it: safetensors writes files that only their owner can read."""
    folder = Path(folder)
    mode = stat.S_IMODE(folder.stat().st_mode) & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)
