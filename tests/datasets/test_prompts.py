"""Prompts: every task and mode, targets in the grammar, and the fingerprint."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from threedr1.datasets import prompts
from threedr1.datasets.prompts import (
    DEFAULT_MODE,
    MODE_INSTRUCTIONS,
    OBJECT_PLACEHOLDER,
    build_question,
    build_target,
    check_prompts,
    prompt_fingerprint,
    prompt_record,
    templates,
    training_mode,
)
from threedr1.datasets.scene import TASKS, Sample
from threedr1.utils.text import parse_response


def sample(task: str, **changes) -> Sample:
    values = {"question": "Where is {it}?", "answer": "here", "situation": "I stand by {a} door."}
    return Sample(sample_id="s", task=task, dataset="d", scene_id="scene0000_00", **{**values, **changes})


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("mode", ["think", "direct"])
def test_questions_end_with_the_mode(task, mode):
    text = build_question(sample(task), mode)
    assert text.endswith("\n" + MODE_INSTRUCTIONS[mode])
    assert text == build_question(sample(task), mode)
    assert (OBJECT_PLACEHOLDER in text) is (task in ("dense_caption", "object_caption"))
    assert text.count(OBJECT_PLACEHOLDER) <= 1
    asks = task not in ("dense_caption", "object_caption", "scene_description")
    assert ("Where is {it}?" in text) is asks
    assert ("I stand by {a} door." in text) is (task == "situated_qa")


def test_default_modes():
    think = {"grounding", "qa", "situated_qa", "planning", "dialogue"}
    assert {task for task, mode in DEFAULT_MODE.items() if mode == "think"} == think
    assert build_question(sample("qa")) == build_question(sample("qa"), "think")
    assert build_question(sample("dense_caption")) == build_question(sample("dense_caption"), "direct")


def test_targets():
    with_thought, without = sample("qa", think="because"), sample("qa")
    assert training_mode(with_thought) == "think" and training_mode(without) == "direct"
    assert build_target(with_thought) == "<think>because</think><answer>here</answer>"
    assert parse_response(build_target(with_thought)).well_formed
    assert build_target(without) == build_target(with_thought, "direct") == "<answer>here</answer>"
    with pytest.raises(ValueError, match="no thought"):
        build_target(without, "think")
    with pytest.raises(ValueError, match="modes are think, direct"):
        build_question(without, "fast")


@given(st.text(max_size=60))
def test_any_question_and_situation_survive(text):
    situated = sample("situated_qa", question=text, situation="{question}" + text)
    assert build_question(situated, "direct").startswith(("{question}" + text).strip())
    assert text.strip() in build_question(situated)


def test_fingerprint_changes_with_every_template(monkeypatch):
    before = prompt_fingerprint()
    assert before == prompt_fingerprint() and len(before) == 16
    monkeypatch.setattr(prompts, "SYSTEM_PROMPT", "another")
    second = prompt_fingerprint()
    monkeypatch.setitem(prompts.TASK_TEMPLATES, "qa", "{question} please")
    assert len({before, second, prompt_fingerprint()}) == 3


def test_samples_hold_no_arrays_in_common():
    one, two = sample("qa"), sample("qa")
    one.target_boxes_K7 = np.ones((1, 7), np.float32)
    assert two.target_boxes_K7.shape == (0, 7)


def test_checkpoints_keep_every_template():
    record = prompt_record()
    assert record["prompts"] == prompt_fingerprint() and record["templates"] == templates()
    assert templates()["task.qa"] == "{question}" and templates()["default_mode.dense_caption"] == "direct"
    assert {f"task.{task}" for task in TASKS} <= set(templates())


def test_changed_prompts_are_named_in_one_warning(monkeypatch, caplog):
    record = prompt_record()
    check_prompts("model", record)
    assert caplog.text == ""
    monkeypatch.setitem(prompts.TASK_TEMPLATES, "qa", "{question} please")
    monkeypatch.setattr(prompts, "SYSTEM_PROMPT", "another")
    check_prompts("runs/a", record)
    (warned,) = caplog.messages
    assert warned.startswith("runs/a was trained under other prompts (system, task.qa);")
    caplog.clear()
    check_prompts("runs/a", {"prompts": record["prompts"]})
    assert "which ones was not kept" in caplog.text
    with pytest.raises(ValueError, match="'templates' is not a table"):
        check_prompts("runs/a", {**record, "templates": "text"})
