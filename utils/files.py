"""Text files that people hand in: read whole, or refused in one sentence that names the file. Who may read ours."""

import json
import stat
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
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = []
    for number, line in enumerate(lines):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            if number + 1 < len(lines):
                raise ValueError(f"{path}, line {number + 1}: not JSON.") from None
    return rows


def readable_as_its_folder(folder: str | Path) -> None:
    """Let whoever may read a folder read the files in it: safetensors writes files that only their owner can read."""
    folder = Path(folder)
    mode = stat.S_IMODE(folder.stat().st_mode) & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)
