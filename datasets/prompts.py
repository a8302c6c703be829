"""Prompts, in one place: what the model is asked per task and what it is taught to reply.

Two response modes: `think` asks for `<think>…</think><answer>…</answer>`, `direct` for `<answer>…</answer>` alone.
The assembler (models/inputs.py) replaces OBJECT_PLACEHOLDER by the object that a caption is asked for.
"""

import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..utils.text import format_response
from .scene import TASKS, Sample

THINK, DIRECT = "think", "direct"
MODES = (THINK, DIRECT)
OBJECT_PLACEHOLDER = "{object}"

SYSTEM_PROMPT = (
    "You see a 3D indoor scene. Detected objects are named <obj0>, <obj1>, and so on. Point at a thing by its name, "
    "or by <box>x, y, z, dx, dy, dz</box>: centre and size in metres."
)

# `{question}` and `{situation}` are filled in here, `{object}` by the assembler.
TASK_TEMPLATES = {
    "grounding": "Find this object and point at it: {question}",
    "qa": "{question}",
    "situated_qa": "{situation} {question}",
    "dialogue": "{question}",
    "planning": "{question}",
    "scene_description": "Describe this room.",
    "dense_caption": "Describe {object} and where it stands among its neighbours.",
    "object_caption": "Describe {object}.",
}
MODE_INSTRUCTIONS = {
    THINK: "Think step by step. Reply as <think>thoughts</think><answer>answer</answer>.",
    DIRECT: "Reply as <answer>answer</answer>.",
}
DEFAULT_MODE = {
    "grounding": THINK,
    "qa": THINK,
    "situated_qa": THINK,
    "planning": THINK,
    "dialogue": THINK,
    "dense_caption": DIRECT,
    "object_caption": DIRECT,
    "scene_description": DIRECT,
}
# What people call the tasks on the command line and in Python.
TASK_NAMES = {
    "caption": "object_caption",
    "dense-caption": "dense_caption",
    "ground": "grounding",
    "plan": "planning",
    "describe": "scene_description",
    "situated": "situated_qa",
}
_log = logging.getLogger(__name__)
_FIELD = re.compile(r"\{(?:question|situation)\}")
# What a caption sample carries as its question: read by people, not by the model.
CAPTION_QUESTION = "Describe the object."

assert set(TASK_TEMPLATES) == set(DEFAULT_MODE) == set(TASKS)


def task_named(name: str) -> str:
    """The task that goes by a name of TASKS or by a friendlier one; ValueError where there is none."""
    task = TASK_NAMES.get(name, name)
    if task not in TASKS:
        raise ValueError(f"Unknown task {name!r}; choose one of {', '.join((*TASKS, *TASK_NAMES))}.")
    return task


def dialogue_question(turns: Sequence[tuple[str, str]], question: str) -> str:
    """The next question of a dialogue, behind its turns (question, answer), as 3D-LLM's samples write them."""
    said = "".join(f"### human: {asked.strip()} ### assistant: {reply.strip()} " for asked, reply in turns)
    return f"{said}### human: {question.strip()} ### assistant:"


def training_mode(sample: Sample) -> str:
    """The mode to train a sample in: `think` where the data holds a thought, else `direct`."""
    return THINK if sample.think else DIRECT


def build_question(sample: Sample, mode: str | None = None) -> str:
    """The user's turn for a sample, with the instruction of a response mode (default: the task's DEFAULT_MODE).

    The text of caption tasks holds OBJECT_PLACEHOLDER exactly once.
    """
    mode = _check_mode(mode or DEFAULT_MODE[sample.task])
    values = {"{situation}": sample.situation.strip(), "{question}": sample.question.strip()}
    # one pass, and not `format`: questions may hold braces of their own
    text = _FIELD.sub(lambda match: values[match[0]], TASK_TEMPLATES[sample.task])
    return f"{text.strip()}\n{MODE_INSTRUCTIONS[mode]}"


def build_target(sample: Sample, mode: str | None = None) -> str:
    """The reply to teach, in the answer grammar; ValueError where `think` is asked of a sample without a thought."""
    mode = _check_mode(mode or training_mode(sample))
    if mode == DIRECT:
        return f"<answer>{sample.answer}</answer>"
    if not sample.think:
        raise ValueError(
            f"Sample {sample.sample_id} ({sample.dataset}) has no thought to teach; train it in the mode `direct`."
        )
    return format_response(sample.think, sample.answer)


def _check_mode(mode: str) -> str:
    if mode not in MODES:
        raise ValueError(f"Unknown response mode {mode!r}; modes are {', '.join(MODES)}.")
    return mode


def prompt_fingerprint() -> str:
    """Hash of every template, stored in checkpoints and results: scores under other prompts are other scores."""
    content = [SYSTEM_PROMPT, TASK_TEMPLATES, MODE_INSTRUCTIONS, DEFAULT_MODE, OBJECT_PLACEHOLDER]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def templates() -> dict[str, str]:
    """Every template by name (`system`, `task.qa`, `mode.think`, …), as checkpoints store them."""
    return {
        "system": SYSTEM_PROMPT,
        "object": OBJECT_PLACEHOLDER,
        **{f"task.{task}": text for task, text in TASK_TEMPLATES.items()},
        **{f"mode.{mode}": text for mode, text in MODE_INSTRUCTIONS.items()},
        **{f"default_mode.{task}": mode for task, mode in DEFAULT_MODE.items()},
    }


def prompt_record() -> dict[str, Any]:
    """What a checkpoint keeps of its prompts: `prompts`, their fingerprint, and `templates`, their texts."""
    return {"prompts": prompt_fingerprint(), "templates": templates()}


def check_prompts(where: object, record: Mapping[str, Any]) -> None:
    """One warning where a checkpoint was trained under other prompts than those in force, naming the templates.

    Args:
        where: what the checkpoint is called in messages.
        record: holds what `prompt_record` gave; early versions kept only `prompts`.

    Raises:
        ValueError: `templates` is not a table.
    """
    saved = record.get("templates")
    if saved is not None and not isinstance(saved, dict):
        raise ValueError(f"{where}: 'templates' is not a table of texts; copy the model again from its source.")
    if record.get("prompts") == prompt_fingerprint():
        return
    now = templates()
    if saved is None:
        changed = "which ones was not kept"
    else:
        changed = ", ".join(sorted(name for name in now.keys() | saved.keys() if now.get(name) != saved.get(name)))
    _log.warning(
        "%s was trained under other prompts (%s); its answers and scores may differ from those it was saved with.",
        where,
        changed,
    )
