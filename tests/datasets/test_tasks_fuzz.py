"""Whatever an annotation file holds, a reader gives samples and problems, or one ValueError; and soon."""

import json
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from threedr1.datasets.scene_store import SceneStore
from threedr1.datasets.tasks import LOADERS, Problem, load_samples
from threedr1.datasets.tasks.nr3d import parse_stimulus, tokens_of
from threedr1.datasets.tasks.problems import RowError
from threedr1.datasets.tasks.rows import Row

from .. import data_factory as factory
from .test_tasks import ANNOTATION_FILES

FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
scalars = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8)
)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


def refused_or_read(root, dataset, store) -> None:
    """Every record becomes a sample or a problem, or is dropped by rule; a whole file may be refused in a sentence."""
    problems: list[Problem] = []
    try:
        samples = load_samples(root, "train", [dataset], scenes=store.index, problems=problems)
    except ValueError as error:
        assert str(error).count("\n") == 0 and str(root) in str(error)
        return
    assert all(sample.question for sample in samples)
    assert all(one.message.startswith(one.path) and one.row >= 1 for one in problems)


def mutated(content, path, value):
    """A copy of JSON content with `value` at the place that `path` leads to (numbers, taken modulo the length)."""
    if not path or not isinstance(content, (dict, list)) or not content:
        return value
    if isinstance(content, dict):
        key = sorted(content)[path[0] % len(content)]
        return {**content, key: mutated(content[key], path[1:], value)}
    row = path[0] % len(content)
    return [*content[:row], mutated(content[row], path[1:], value), *content[row + 1 :]]


@pytest.mark.parametrize("dataset", sorted(set(LOADERS) - {"inventory", "contents"}))  # which read no values
@FUZZ
@given(place=st.lists(st.integers(0, 20), max_size=5), value=anything, in_answers=st.booleans())
def test_any_value_anywhere_is_read_or_refused(prepared, root, store, dataset, place, value, in_answers):
    name = ANNOTATION_FILES[dataset]
    if dataset == "sqa3d" and in_answers:
        name = name.replace("questions", "sqa_annotations")
    content = (prepared / "annotations" / name).read_text(encoding="utf-8")
    if name.endswith(".csv"):
        lines = content.splitlines()
        row = place[0] % len(lines) if place else 0
        cells = lines[row].split(",")
        cells[place[1] % len(cells) if len(place) > 1 else 0] = str(value).encode("utf-8", "replace").decode()
        lines[row] = ",".join(cells)
        broken = "\n".join(lines)
    elif name.endswith(".jsonl"):
        rows = [json.loads(line) for line in content.splitlines()]
        broken = "\n".join(json.dumps(row) for row in (mutated(rows, place, value) if place else [value]))
    else:
        broken = json.dumps(mutated(json.loads(content), place, value))
    (root / "annotations" / name).write_text(broken, encoding="utf-8", newline="")
    refused_or_read(root, dataset, store)


@pytest.mark.parametrize("dataset", ["scanqa", "nr3d", "scene30k", "scene30k_captions", "cap3d"])
@FUZZ
@given(content=st.binary(max_size=120), keep=st.integers(0, 400))
def test_any_bytes_are_read_or_refused(prepared, root, store, dataset, content, keep):
    name = ANNOTATION_FILES[dataset]
    whole = (prepared / "annotations" / name).read_bytes()
    (root / "annotations" / name).write_bytes(whole[:keep] + content + whole[keep:])
    refused_or_read(root, dataset, store)


def row_of(tokens: str) -> Row:
    return Row(factory.Path("nr3d.csv"), 1, {"tokens": tokens})


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=10), max_size=8))
def test_tokens_round_trip(tokens):
    assert tokens_of(row_of(repr(tokens))) == tokens


@given(st.text("[]'\"\\, abu{}()0", max_size=60))
def test_any_text_is_tokens_or_refused(text):
    try:
        tokens = tokens_of(row_of(text))
    except RowError as error:
        assert error.field == "tokens"
    else:
        assert all(isinstance(token, str) for token in tokens)


@given(st.text("scene0_-1234 x", max_size=60))
def test_any_text_is_a_stimulus_or_refused(text):
    try:
        stimulus = parse_stimulus(text)
    except ValueError as error:
        assert "stimulus_id" in str(error)
    else:
        assert stimulus.count == len(stimulus.distractor_ids) + 1


@pytest.mark.parametrize(
    ("dataset", "content"),
    [
        ("scanqa", "[" * 1_000_000),
        ("scanqa", '[{"question_id": "' + "9" * 1_000_000 + '"}]'),
        ("scanrefer", '[{"scene_id": "a", "ann_id": "0", "object_id": "' + "9" * 1_000_000 + '"}]'),
        ("scene30k", '{"scene_id": "scene0000_00", "question": "?", "cot": "' + "<think>" * 150_000 + '"}'),
        ("scene30k_captions", '{"a":' * 200_000 + "1" + "}" * 200_000),
        ("nr3d_captions", '{"scene0000_00": ' + "[" * 500 + "]" * 500 + "}"),
        ("nr3d", '"' * 1_000_001),
        (
            "nr3d",
            "assignmentid,stimulus_id,scan_id,target_id,instance_type,utterance,tokens,mentions_target_class\n"
            * 9_000,
        ),
        ("cap3d", "a," * 500_000),
    ],
)
def test_a_megabyte_of_nonsense_takes_no_time(root, store: SceneStore, dataset, content):
    (root / "annotations" / ANNOTATION_FILES[dataset]).write_text(content)
    start = time.perf_counter()
    refused_or_read(root, dataset, store)
    assert time.perf_counter() - start < 2
