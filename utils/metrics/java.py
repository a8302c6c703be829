"""The two parts of caption scoring that run in Java: the Stanford PTB tokenizer and METEOR 1.5.

Both jars ship inside pycocoevalcap. They are run here as one batch over pipes, in UTF-8 whatever the locale, with
line breaks inside texts folded first: either program answers line by line, and a stray break would shift every
later answer.
"""

import atexit
import contextlib
import functools
import shutil
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import pycocoevalcap.meteor.meteor as meteor_module
import pycocoevalcap.tokenizer.ptbtokenizer as tokenizer_module

_PUNCTUATION = frozenset(tokenizer_module.PUNCTUATIONS)
_ENCODING = ("-Dfile.encoding=UTF-8", "-Dstdout.encoding=UTF-8")
_METEOR_MEMORY = "-Xmx2G"
_PROBE_SECONDS = 30


@functools.cache
def java_available() -> bool:
    """Whether a Java program starts here. Some systems have a `java` that only asks to install one."""
    command = shutil.which("java")
    if command is None:
        return False
    try:
        return subprocess.run([command, "-version"], capture_output=True, timeout=_PROBE_SECONDS).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def ptb_tokenize(texts: Sequence[str]) -> list[str]:
    """Texts lower-cased and split as the Penn Treebank does, punctuation tokens dropped, joined by single spaces."""
    if not java_available():
        raise ValueError(
            "The PTB tokenizer needs Java (17 or later), which was not found; install it, or choose a scorer "
            "without it (scanqa_ll3da or exact for qa, sqa3d for situated_qa)."
        )
    if not texts:
        return []
    jar = Path(tokenizer_module.__file__).parent / tokenizer_module.STANFORD_CORENLP_3_4_1_JAR
    command = ["java", *_ENCODING, "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer"]
    finished = subprocess.run(
        [*command, "-preserveLines", "-lowerCase"],
        input="".join(f"{_one_line(text)}\n" for text in texts).encode(),
        capture_output=True,
    )
    lines = finished.stdout.decode().split("\n")
    if finished.returncode != 0 or len(lines) != len(texts) + 1:
        raise ValueError(
            f"The PTB tokenizer returned {len(lines) - 1} lines for {len(texts)} texts "
            f"(exit status {finished.returncode}): {finished.stderr.decode(errors='replace')[-500:]}"
        )
    return [" ".join(word for word in line.rstrip().split(" ") if word not in _PUNCTUATION) for line in lines[:-1]]


class MeteorScores(NamedTuple):
    """METEOR of the corpus and of each item, as fractions, and the counts [N, 23] that it is computed from."""

    corpus: float
    per_item: list[float]
    statistics_NS: np.ndarray


def meteor_scores(references: Mapping[str, Sequence[str]], candidates: Mapping[str, Sequence[str]]) -> MeteorScores:
    """METEOR by meteor-1.5.jar with its usual options.

    The jar answers every SCORE line with statistics, and the EVAL line with one value an item and the corpus value.
    Its start takes seconds, so one process is kept for the life of this one.
    """
    questions = [
        " ||| ".join(["SCORE", *(_meteor_text(text) for text in references[key]), _meteor_text(candidates[key][0])])
        for key in references
    ]
    with _METEOR_LOCK:
        process = _meteor_process()
        try:
            statistics = _ask(process, questions, len(questions))
            values = _ask(process, [" ||| ".join(["EVAL", *statistics])], len(questions) + 1)
        except BaseException:
            # answers may be left in the pipe: the next call needs a fresh process
            _stop_meteor(process)
            raise
    scores = [float(value) for value in values]
    counts = np.array([line.split() for line in statistics], dtype=np.float64)
    return MeteorScores(scores[-1], scores[:-1], counts)


_METEOR_LOCK = threading.Lock()


@functools.cache
def _meteor_process() -> subprocess.Popen:
    jar = Path(meteor_module.__file__).parent / meteor_module.METEOR_JAR
    command = ["java", *_ENCODING, _METEOR_MEMORY, "-jar", str(jar), "-", "-", "-stdio", "-l", "en", "-norm"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    atexit.register(_stop_meteor, process)
    return process


def _stop_meteor(process: subprocess.Popen) -> None:
    _meteor_process.cache_clear()
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):  # closing flushes what the dead process never read
                pipe.close()


def _ask(process: subprocess.Popen, lines: Sequence[str], num_answers: int) -> list[str]:
    """Send lines and read the answers at the same time, so that neither pipe fills up."""
    assert process.stdin is not None and process.stdout is not None
    data = "".join(f"{line}\n" for line in lines).encode()
    writer = threading.Thread(target=_send, args=(process.stdin, data))
    writer.start()
    answers = []
    for _ in range(num_answers):
        answer = process.stdout.readline()
        if not answer:
            break
        answers.append(answer.decode().strip())
    if len(answers) < num_answers:
        process.kill()  # also frees the writer, should it be blocked
    writer.join()
    if len(answers) < num_answers:
        raise ValueError(
            f"METEOR stopped after {len(answers)} of {num_answers} answers; check that Java may use 2 GB."
        )
    return answers


def _send(stream: IO[bytes], data: bytes) -> None:
    # a broken pipe shows at the reader, as answers that do not come
    with contextlib.suppress(BrokenPipeError):
        stream.write(data)
        stream.flush()


def _one_line(text: str) -> str:
    """A text without line breaks of any kind (also the Unicode ones, which Java honours)."""
    return " ".join(text.splitlines())


def _meteor_text(text: str) -> str:
    """METEOR's field mark must not occur in a text; double spaces count as one, as in pycocoevalcap."""
    return _one_line(text).replace("|||", "").replace("  ", " ")
