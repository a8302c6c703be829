"""Writing a file whole or not at all."""

import json
import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from threedr1.utils import files
from threedr1.utils.files import read_log, replacing, write_whole

# what a process of its own begins with: the module stands alone
ALONE = f"import os, runpy, signal, sys; there = runpy.run_path({files.__file__!r}); path = sys.argv[1]; "


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_text_bytes_and_views_of_bytes_are_written_as_they_are(tmp_path: Path):
    path = tmp_path / "out.txt"
    for content, expected in (
        ("Stühle\r\n2 m²\n", "Stühle\r\n2 m²\n".encode()),
        (b"\x00\xff", b"\x00\xff"),
        (memoryview(b"view"), b"view"),
        ("", b""),
    ):
        write_whole(path, content)
        assert path.read_bytes() == expected
        assert names(tmp_path) == ["out.txt"]


@pytest.mark.parametrize("kept", [1, 2, 5, 100], ids=lambda kept: f"cut after {kept} bytes")
def test_a_log_is_read_by_lines_whatever_its_texts_hold_and_without_what_a_kill_cut(tmp_path: Path, kept: int):
    rows = [{"text": f"a{odd}b"} for odd in ("\u2028", "\u2029", "\x85", "\x0c", "\x1c", "Stühle")]
    lines = [json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows]
    cut = json.dumps({"é": 1}, ensure_ascii=False).encode()[: kept + 2]  # 1: within the character
    (tmp_path / "log.jsonl").write_bytes(b"".join(lines) + cut)
    assert read_log(tmp_path / "log.jsonl") == rows + ([{"é": 1}] if kept == 100 else [])
    (tmp_path / "log.jsonl").write_bytes(cut[:3] + b"\n" + lines[0])
    with pytest.raises(ValueError, match=r"log\.jsonl, line 1: not JSON"):
        read_log(tmp_path / "log.jsonl")
    (tmp_path / "log.jsonl").write_bytes(b"")
    assert read_log(tmp_path / "log.jsonl") == read_log(tmp_path / "none.jsonl") == []


def test_the_old_file_is_there_until_the_block_ends(tmp_path: Path):
    path = tmp_path / "out.txt"
    path.write_text("old")
    with replacing(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
        assert partial.parent.parent == tmp_path  # of one file system, which a rename needs
    assert path.read_text() == "new"
    assert names(tmp_path) == ["out.txt"]


@pytest.mark.parametrize("error", [OSError("disk full"), ValueError("no such row"), KeyboardInterrupt()])
@pytest.mark.parametrize("old", ["old", None])
def test_a_writer_that_raises_leaves_the_old_content_and_nothing_else(
    tmp_path: Path, error: BaseException, old: str | None
):
    path = tmp_path / "out.txt"
    if old is not None:
        path.write_text(old)
    with pytest.raises(type(error)), replacing(path) as partial, partial.open("w") as stream:
        stream.write("half of the new")
        stream.flush()
        partial.with_suffix(".more").write_text("what a library writes beside it")
        raise error
    assert names(tmp_path) == ([] if old is None else ["out.txt"])
    assert old is None or path.read_text() == old


def test_text_that_is_no_utf_8_leaves_the_old_content(tmp_path: Path):
    path = tmp_path / "out.txt"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "\ud800")
    assert (names(tmp_path), path.read_text()) == (["out.txt"], "old")


def test_a_block_that_writes_nothing_and_a_missing_folder_are_errors(tmp_path: Path):
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "out.txt"):
        pass
    assert names(tmp_path) == []
    with pytest.raises(FileNotFoundError) as missing:
        write_whole(tmp_path / "gone" / "out.txt", "text")
    assert missing.value.filename == str(tmp_path / "gone" / "out.txt"), "not a name of our own"


@pytest.mark.parametrize("name", ["arrays.npz", "arrays.v2.npz"])
def test_a_library_that_goes_by_the_suffix_finds_it(tmp_path: Path, name: str):
    with replacing(tmp_path / name) as partial:
        np.savez(partial, points_N3=np.ones((4, 3)))  # adds .npz to any other name
        assert not list(tmp_path.glob("*.npz"))  # whoever lists the folder does not meet half of a file
    assert names(tmp_path) == [name]
    with np.load(tmp_path / name) as archive:
        assert archive["points_N3"].shape == (4, 3)


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_a_new_file_has_the_permissions_of_a_plain_open(tmp_path: Path, umask: int):
    before = os.umask(umask)
    try:
        write_whole(tmp_path / "ours", "text")
        (tmp_path / "plain").write_text("text")
    finally:
        os.umask(before)
    ours, plain = (stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ours", "plain"))
    assert ours == plain == 0o666 & ~umask


def test_processes_that_write_one_file_at_a_time_write_it_whole(tmp_path: Path):
    path = tmp_path / "out.txt"
    wholes = {letter * 300_000 for letter in "abc"}
    write_whole(path, "a" * 300_000)
    code = ALONE + "[there['write_whole'](path, sys.argv[2] * 300_000) for _ in range(60)]"
    writers = [subprocess.Popen([sys.executable, "-c", code, str(path), letter]) for letter in "abc"]
    while any(writer.poll() is None for writer in writers):
        assert path.read_text() in wholes
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    assert names(tmp_path) == ["out.txt"]


def test_threads_that_write_one_file_at_a_time_write_it_whole(tmp_path: Path):
    path, together, failures = tmp_path / "out.txt", threading.Barrier(4), []

    def write(letter: str) -> None:
        try:
            with replacing(path) as partial, partial.open("w") as stream:
                stream.write(letter)
                stream.flush()
                together.wait(timeout=30)  # all are in the middle of it
                stream.write(letter)
        except (OSError, threading.BrokenBarrierError) as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert path.read_text() in {"aa", "bb", "cc", "dd"}
    assert names(tmp_path) == ["out.txt"]


def test_a_kill_in_the_middle_leaves_the_old_content(tmp_path: Path):
    path = tmp_path / "out.txt"
    path.write_text("old")
    code = ALONE + (
        "block = there['replacing'](path); partial = block.__enter__(); partial.write_text('half');"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    (left,) = set(names(tmp_path)) - {"out.txt"}
    assert left.startswith("out.txt.") and left.endswith(".partial")  # what `doctor` looks for
    write_whole(path, "new")
    assert path.read_text() == "new"


@pytest.mark.parametrize("sync", [False, True])
def test_only_who_asks_waits_for_the_disk(tmp_path: Path, sync: bool, monkeypatch: pytest.MonkeyPatch):
    path, synced = tmp_path / "out.txt", []
    path.write_text("old")

    def note(descriptor: int) -> None:
        synced.append((os.fstat(descriptor).st_size, path.read_text()))

    monkeypatch.setattr("os.fsync", note)
    with replacing(path, sync=sync) as partial:
        partial.write_text("the new")
    assert synced == ([(7, "old")] if sync else [])
    assert path.read_text() == "the new"
