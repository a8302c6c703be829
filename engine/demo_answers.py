"""Answers of the demo: the tasks by name, a question as a sample, and the model's text as it comes.

Nothing here knows of a web framework.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from ..datasets.prompts import CAPTION_QUESTION, dialogue_question
from ..datasets.scene import TASKS, Sample
from ..models.scene_vlm import SceneVLM
from ..utils.text_stream import ANSWER, PLAIN, THOUGHT, ResponseParts, TokenText
from .demo_scenes import Limits, Opened
from .rollout import roll_out

_LOOK = 0.2  # seconds between two looks at what was said
Turns = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class DemoTask:
    """How a task is offered: its title, what to write, and questions to begin with."""

    title: str
    hint: str
    examples: tuple[str, ...] = ()
    question: bool = True
    situation: bool = False
    object: bool = False


DEMO_TASKS = {
    "qa": DemoTask(
        "Question answering",
        "Ask anything about the scene.",
        ("How many chairs are there?", "Where can I sit?", "What is next to the door?"),
    ),
    "grounding": DemoTask(
        "Grounding",
        "Describe one object; the answer points at it with a box.",
        ("the chair closest to the door", "the largest table", "the picture on the wall"),
    ),
    "situated_qa": DemoTask(
        "Situated question answering",
        "Say where you are and where you look, then ask.",
        ("What is on my left?", "Is there a window behind me?"),
        situation=True,
    ),
    "dialogue": DemoTask(
        "Dialogue",
        "Talk about the scene; earlier turns are remembered until another scene is opened.",
        ("Can you help me find a chair?", "What color is it?", "Where is it?"),
    ),
    "planning": DemoTask(
        "Planning",
        "Say what you want to do and what is done; the answer is the next step.",
        ("I want to tidy up the room. What should I do first?",),
    ),
    "dense_caption": DemoTask(
        "Dense captioning",
        "Choose a detected object; it is described where it stands among its neighbours.",
        question=False,
        object=True,
    ),
    "object_caption": DemoTask(
        "Object captioning",
        "Choose a detected object; it is described by itself.",
        question=False,
        object=True,
    ),
    "scene_description": DemoTask(
        "Scene description", "Nothing to write: the whole scene is described.", question=False
    ),
}
assert set(DEMO_TASKS) == set(TASKS)


@dataclass(frozen=True)
class Told:
    """An answer as far as it has come; boxes are in the world frame, views are indices of the scene's pool."""

    think: str
    answer: str
    done: bool = False
    finished: bool = False  # whether it ended of itself
    boxes: Sequence[Sequence[float]] = ()
    views: Sequence[int] = ()
    seconds: float = 0.0


def make_sample(
    opened: Opened, task: str, *, question: str, situation: str, number: int | None, turns: Turns, limits: Limits
) -> Sample:
    """What a visitor asks, as a sample.

    Args:
        number: which detected object, for the caption tasks.
        turns: the dialogue so far.

    Raises:
        ValueError: an unknown task, or one that lacks what it needs; a text that is too long.
    """
    if task not in DEMO_TASKS:
        raise ValueError("There is no such task; choose one from the list.")
    form, question, situation = DEMO_TASKS[task], question.strip(), situation.strip()
    if max(len(question), len(situation)) > limits.characters:
        raise ValueError(f"That is too long; ask with up to {limits.characters} characters.")
    if form.question and not question:
        raise ValueError("There is no question; write one, or take an example.")
    if form.situation and not situation:
        raise ValueError("Say where you are, too: for instance “I am standing at the door, facing the window.”")
    box_7 = None
    if form.object:
        if number is None or not 0 <= number < len(opened.objects_K7):
            raise ValueError("Choose one of the detected objects; if none is listed, none was detected in this scene.")
        box_7 = np.asarray(opened.objects_K7[number], dtype=np.float32)
        question = CAPTION_QUESTION
    if task == "dialogue":
        question = dialogue_question(turns, question)
    scene_id = opened.scene.scene_id
    situation = situation if form.situation else ""
    return Sample(f"{scene_id}-0", task, "own", scene_id, question, "", query_box_7=box_7, situation=situation)


def parts_so_far(text: str) -> tuple[str, str]:
    """Thought and answer of a response that is still being written; an unfinished tag at its end is left out."""
    found = {THOUGHT: "", ANSWER: "", PLAIN: ""}
    for part, piece in ResponseParts().push(text):
        found[part] += piece
    return found[THOUGHT].strip(), (found[ANSWER] or found[PLAIN]).strip()


class _Enough(Exception):
    """The time is up, or nobody listens any more."""


@torch.no_grad()
def generate(
    model: SceneVLM,
    sample: Sample,
    opened: Opened,
    limits: Limits,
    *,
    on_text: Callable[[str], object],
    left: threading.Event,
) -> Told:
    """Answer one question greedily, telling the text as it grows. The caller holds the model's lock.

    Args:
        on_text: called with the whole text so far after each token.
        left: set where nobody waits for the answer any more.
    """
    start, ids = time.monotonic(), list[int]()
    written, text = TokenText(model.language.decode), ""
    prompts = opened.session.as_prompts([sample])

    def on_token(_: int, token: int) -> None:
        nonlocal text
        ids.append(token)
        text += written.push(token)
        on_text(text)
        if left.is_set() or time.monotonic() - start > limits.seconds:
            raise _Enough

    try:
        (rollout,) = roll_out(model, prompts, max_new_tokens=limits.new_tokens, on_token=on_token)
        whole, finished = rollout.texts[0], rollout.finished[0]
    except _Enough:
        whole, finished = model.language.decode(ids), False
    said = model.read_answer(whole, opened.observation)
    seconds = time.monotonic() - start
    return Told(said.think, said.answer, True, finished, said.boxes, prompts[0].views, seconds)


def answers(model: SceneVLM, lock: threading.Lock, sample: Sample, opened: Opened, limits: Limits) -> Iterator[Told]:
    """The answer to a sample as it grows, whole at last. Closing the iterator ends the model's work."""
    said: queue.SimpleQueue[str] = queue.SimpleQueue()
    left = threading.Event()

    def work() -> Told:
        with lock:
            return generate(model, sample, opened, limits, on_text=said.put, left=left)

    with ThreadPoolExecutor(1, thread_name_prefix="answer") as pool:
        future = pool.submit(work)
        try:
            while not future.done():
                text = _latest(said)
                if text is not None:
                    yield Told(*parts_so_far(text))
            yield future.result()
        finally:
            left.set()


def _latest(said: "queue.SimpleQueue[str]") -> str | None:
    """The last text that has come, after waiting a moment for the first; None where none has."""
    try:
        text = said.get(timeout=_LOOK)
    except queue.Empty:
        return None
    while not said.empty():
        text = said.get()
    return text
