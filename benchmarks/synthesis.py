"""Rate of the Scene-30K engine at 64 requests in flight, and its memory over 100,000 questions.

The teacher is a local server that speaks Gemini's protocol and answers after a fixed time, in a process of its own;
the engine asks it through google-genai with everything on: journal, filters, budget, progress bar. Against 500 ms the
peer is the ideal rate, 64 / 0.5 s; against 50 ms it is google-genai alone, called with the same prompts by 64 tasks
in the same process, with one client and a typed configuration as its documentation shows. They take turns. Memory is
the growth of the largest resident size from the first tenth of the questions to the end of the run, with a teacher
that answers at once. The exit status says whether both shares reach 0.9 and memory grows by at most 64 MiB.
"""

import asyncio
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, overload

import numpy as np

from ..datasets.scene_store import SceneInfo
from ..datasets.synthesis.asking import Asker
from ..datasets.synthesis.engine import Engine, ask_all, write_lines
from ..datasets.synthesis.filters import FilterOptions
from ..datasets.synthesis.gemini_teacher import GeminiTeacher
from ..datasets.synthesis.journal import Journal
from ..datasets.synthesis.limits import Limits
from ..datasets.synthesis.outcomes import OutcomeSpool, to_record, to_reject
from ..datasets.synthesis.prompts import answer_prompt, check_prompt
from ..datasets.synthesis.sources import Question
from ..datasets.synthesis.teacher import Reply, Request
from ._arguments import measuring_parser, positive
from ._measure import Load, report
from ._slow_teacher import CHECKED, GOOD, THINK, SlowTeacher
from .results import Row

WORKERS, TARGET, LARGEST_GROWTH = 64, 0.9, 64.0
SCENES = 1000
DESCRIPTION = "This scene holds one desk, one monitor, two chairs and one bed. " * 8


class Questions(Sequence[Question]):
    """Questions made when they are asked for, so that they take no memory themselves."""

    def __init__(self, count: int):
        self._count = count

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Question: ...
    @overload
    def __getitem__(self, index: slice) -> list[Question]: ...
    def __getitem__(self, index: int | slice) -> Question | list[Question]:
        if isinstance(index, slice):
            return [self[number] for number in range(self._count)[index]]
        if not 0 <= index < self._count:
            raise IndexError(index)
        text = f"What is left of chair number {index}?"
        return Question(
            f"q{index}", "scanqa", f"scene{index % SCENES:04d}_00", "qa", text, (index,), ("table",), ("table",), ()
        )


def index_all() -> dict[str, SceneInfo]:
    """The labels and boxes of every scene: none."""
    zero_3 = np.zeros(3)
    none_K, none_K7 = np.zeros(0, np.int32), np.zeros((0, 7), np.float32)
    names = [f"scene{number:04d}_00" for number in range(SCENES)]
    return {
        name: SceneInfo(name, none_K, [], none_K, none_K7, frozenset(), np.eye(4), zero_3, zero_3) for name in names
    }


def describe(_: Question) -> str:
    """The description of every scene."""
    return DESCRIPTION


class InstantTeacher:
    """Answers at once, without a network."""

    identity = "instant"

    async def ask(self, request: Request) -> Reply:
        """A thought and an answer, or the answer alone."""
        return Reply(CHECKED if request.think else GOOD, "", 200, 60)

    async def close(self) -> None:
        """Nothing to close."""


def run_engine(questions: Questions, folder: Path, url: str) -> float:
    """Requests a second of the whole engine."""
    limits = Limits()
    teacher = GeminiTeacher("some-model", base_url=url, limits=limits)
    begin = time.perf_counter()
    with Journal(folder / "journal.jsonl") as journal, OutcomeSpool(folder) as spool:
        engine = Engine(
            teacher,
            journal,
            index=index_all(),
            ask_about=Asker(describe),
            options=FilterOptions(),
            workers=WORKERS,
            estimator=limits.estimator,
        )
        ask_all(engine, questions, spool)
        if spool.tally.kept != len(questions) or engine.new_requests != 2 * len(questions):
            raise ValueError("The engine did not keep what it should; not measured.")
    return 2 * len(questions) / (time.perf_counter() - begin)


def run_bare(questions: Questions, url: str) -> float:
    """Requests a second of google-genai alone, with the prompts that the engine sends."""
    from google import genai
    from google.genai import types

    client: Any = genai.Client(api_key="k", vertexai=False, http_options=types.HttpOptions(base_url=url))
    config = types.GenerateContentConfig(thinking_config=types.ThinkingConfig(thinking_budget=-1))
    prompts = (
        prompt
        for question in questions
        for prompt in (answer_prompt(question, DESCRIPTION), check_prompt(question, THINK))
    )

    async def run() -> None:
        async def work() -> None:
            for prompt in prompts:
                response = await client.aio.models.generate_content(model="some-model", contents=prompt, config=config)
                if not response.text:
                    raise ValueError("The bare client got no text; not measured.")

        await asyncio.gather(*(work() for _ in range(WORKERS)))
        await client.aio.aclose()

    begin = time.perf_counter()
    asyncio.run(run())
    return 2 * len(questions) / (time.perf_counter() - begin)


def measure_rates(num_slow: int, num_fast: int, repeats: int) -> list[Row]:
    """Both rates as shares of their peers'."""
    os.environ.setdefault("GEMINI_API_KEY", "k")
    os.environ["no_proxy"] = "127.0.0.1"

    def ours(questions: Questions, url: str) -> float:
        with tempfile.TemporaryDirectory() as folder:
            return run_engine(questions, Path(folder), url)

    with SlowTeacher(0.05) as teacher:
        warm, questions = Questions(WORKERS), Questions(num_fast)
        run_bare(warm, teacher.url)
        ours(warm, teacher.url)
        pairs = [(run_bare(questions, teacher.url), ours(questions, teacher.url)) for _ in range(repeats)]
    bare, fast = (statistics.median(column) for column in zip(*pairs, strict=True))
    with SlowTeacher(0.5) as teacher:
        slow = ours(Questions(num_slow), teacher.url)
    ideal = WORKERS / 0.5
    return [
        _share("synthesis.rate_share", slow, ideal, f"{WORKERS} in flight over 500 ms", f"{num_slow} questions, once"),
        _share("synthesis.rate_share_50ms", fast, bare, "google-genai alone", f"{num_fast} questions, 50 ms"),
    ]


def _share(name: str, ours: float, theirs: float, peer: str, note: str) -> Row:
    rates = f"{ours:.0f} of {theirs:.0f} requests a second"
    return Row(name, ours / theirs, "share", peer, 1.0, "higher", f"{rates}, {note}")


def largest_size() -> float:
    """MiB that this process has occupied at most."""
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size / (2**20 if sys.platform == "darwin" else 2**10)


class Watched(Questions):
    """Questions that note the memory when a tenth of them has been asked."""

    early = 0.0

    def __getitem__(self, index: Any) -> Any:
        if index == self._count // 10 and not self.early:
            self.early = largest_size()
        return super().__getitem__(index)


def measure_memory(count: int) -> Row:
    """Growth from a tenth of the questions to the end of the run, output written."""
    questions = Watched(count)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with Journal(folder / "journal.jsonl") as journal, OutcomeSpool(folder) as spool:
            engine = Engine(
                InstantTeacher(), journal, index=index_all(), ask_about=Asker(describe), options=FilterOptions()
            )
            ask_all(engine, questions, spool)
            write_lines(folder / "out.jsonl", (to_record(row, "instant") for row in spool.all(questions)))
            write_lines(folder / "no.jsonl", (to_reject(row) for row in spool.all(questions) if row.reason))
            if spool.tally.judged != count:
                raise ValueError("The engine lost questions; not measured.")
    end = largest_size()
    note = f"growth from {count // 10} to {count} questions; {end:.0f} MiB at the end"
    return Row(f"synthesis.memory_mib_{count // 1000}k", end - questions.early, "MiB", note=note)


def main(argv: Sequence[str] = ()) -> int:
    """Print a table; the exit status says whether the targets are reached."""
    parser = measuring_parser("synthesis", __doc__, repeats=3, cuda=False)
    add = parser.add_argument
    add("--slow", type=positive, default=1280, metavar="N", help="questions at 500 ms (default: %(default)s)")
    add("--fast", type=positive, default=1920, metavar="N", help="questions at 50 ms (default: %(default)s)")
    add("--items", type=positive, default=100_000, metavar="N", help="questions for memory (default: %(default)s)")
    arguments = parser.parse_args(list(argv))
    arguments.threads = arguments.threads or 1
    load = Load(arguments)
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        rows = pool.submit(measure_rates, arguments.slow, arguments.fast, arguments.repeats).result()
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        rows.append(pool.submit(measure_memory, arguments.items).result())
    remarks = {row.name: f"  {row.note}" for row in rows}
    report("synthesis", rows, arguments, load, argv=argv, packages=("google-genai",), remarks=remarks)
    reached = all(row.value >= TARGET for row in rows[:2]) and rows[2].value <= LARGEST_GROWTH
    return 0 if reached else 1
