"""Whatever JSON a file holds: a result that is JSON again, or a ValueError of one line."""

import json
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from threedr1.utils.metrics.files import join, load_scored_pairs
from threedr1.utils.metrics.score import SCORERS, score_file, score_predictions
from threedr1.utils.predictions import Prediction

BOX = [1.0, 2.0, 0.5, 1.0, 1.0, 1.0, 0.0]
FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

# texts that break readers: tags, pointers, half characters, line ends, digits without end
texts = st.text(max_size=8) | st.sampled_from(
    [
        "",
        " ",
        "<answer>x</answer>",
        "<box>1,2,3,1,1,1</box>",
        "\ud800",
        "a\u2028b",
        "a\nb",
        "9" * 300,
        ". , .",
        "<obj1>",
    ]
)
numbers = (
    st.integers(-3, 3)
    | st.floats(allow_nan=True, allow_infinity=True)
    | st.sampled_from([True, 10**400, -0.0, 1e-320, 1e300])
)
scalars = st.none() | numbers | texts
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3))
boxes = st.lists(numbers, min_size=5, max_size=8) | st.just(BOX)
keys = st.sampled_from(["s0", "s1", "s2"])
fields = {
    "sample_id": keys | values,
    "question_id": keys | values,
    "task": st.sampled_from(list(SCORERS)) | values,
    "scene_id": texts | values,
    "question": texts | values,
    "text": texts | values,
    "answer": texts | values,
    "answers": st.lists(texts, max_size=3) | values,
    "answer_top10": st.lists(texts, max_size=11) | values,
    "references": st.lists(texts, max_size=3) | values,
    "boxes": st.lists(boxes, max_size=2) | values,
    "box": boxes | values,
    "target_boxes": st.lists(boxes, max_size=2) | values,
    "question_type": st.sampled_from(["easy", "hard", "unique", ""]) | values,
    "annotations": st.lists(st.dictionaries(st.sampled_from(["question_id", "scene_id", "answers"]), values)) | values,
    "class_probs": st.lists(st.lists(st.just(0.5), min_size=18, max_size=18), max_size=2) | values,
    "objectness": st.lists(st.just(0.5), max_size=2) | values,
    "classes": st.lists(st.integers(-1, 18), max_size=2) | values,
    "meta": st.dictionaries(
        st.sampled_from(["multiple", "others", "object_id", "query_box", "distractor_boxes", "answer_top10"]),
        values | boxes | st.booleans(),
        max_size=3,
    ),
}
rows = st.fixed_dictionaries({}, optional=fields) | values
documents = (
    st.lists(rows, max_size=3)
    | st.dictionaries(keys, texts | boxes | st.lists(texts, max_size=3))
    | st.fixed_dictionaries({"annotations": fields["annotations"]})
    | rows
)
TASKS = sorted(SCORERS)
# scorers that need Java on each call take too long here
WITHOUT_JAVA = {task: [name for name in table if "ptb" not in name] for task, table in SCORERS.items()}
for task, name in (("qa", "scanqa"), ("situated_qa", "scanqa"), ("dense_caption", "oracle_chat_scene")):
    WITHOUT_JAVA[task].remove(name)


def dump(path, document, *, as_lines):
    lines = document if as_lines and isinstance(document, list) else [document]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return path


def check(call):
    """A finite result, or one sentence."""
    try:
        result = call()
    except ValueError as error:
        message = str(error)
        assert message and "\n" not in message and len(message) < 6000
        assert type(error) is ValueError, "an error of a library reached the user"
        return
    text = json.dumps(result, allow_nan=False)
    assert all(value is None or math.isfinite(value) for value in json.loads(text)["metrics"].values())
    text.encode()


@FUZZ
@given(st.sampled_from(TASKS), st.data(), documents, documents, st.booleans())
def test_any_two_documents(tmp_path, task, data, references, predictions, as_lines):
    scorer = data.draw(st.sampled_from(WITHOUT_JAVA[task]))
    suffix = "jsonl" if as_lines else "json"
    first = dump(tmp_path / f"r.{suffix}", references, as_lines=as_lines)
    second = dump(tmp_path / f"p.{suffix}", predictions, as_lines=as_lines)
    check(lambda: score_file(task, scorer, first, second, meteor=False))
    check(lambda: score_file(task, scorer, None, second, meteor=False))


own_rows = st.builds(
    lambda task, **kept: {"sample_id": "s0", "task": task, "scene_id": "s", "question": "q", "text": "x"} | kept,
    st.sampled_from(TASKS),
    text=texts,
    references=st.lists(texts, min_size=1, max_size=3),
    boxes=st.lists(boxes, max_size=2),
    target_boxes=st.lists(boxes, min_size=1, max_size=2),
    meta=fields["meta"],
)


@FUZZ
@given(own_rows, st.data())
def test_nearly_whole_rows(tmp_path, row, data):
    scorer = data.draw(st.sampled_from(WITHOUT_JAVA[row["task"]]))
    path = dump(tmp_path / "p.jsonl", [row], as_lines=True)
    check(lambda: score_file(row["task"], scorer, path, path, meteor=False))


@FUZZ
@given(
    st.sampled_from(TASKS), st.dictionaries(keys, texts | boxes | st.lists(texts, max_size=11), min_size=1), st.data()
)
def test_any_mapping(tmp_path, task, mapping, data):
    references = [
        Prediction(key, task, "s", "q", "", references=["x"], target_boxes=[BOX], meta={"query_box": BOX})
        for key in mapping
    ]
    path = dump(tmp_path / "p.json", mapping, as_lines=False)
    scorer = data.draw(st.sampled_from(WITHOUT_JAVA[task]))
    check(lambda: score_predictions(task, join(references, path), scorer, meteor=False))


@FUZZ
@given(st.binary(max_size=40))
def test_any_bytes(tmp_path, content):
    for name in ("p.json", "p.jsonl"):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ValueError):
            load_scored_pairs("qa", path, path)


@pytest.mark.parametrize(
    "content", [b"[" * 1_000_000, b'{"a":' * 200_000, b"[" * 900 + b"]" * 900, b'"' + b"\\" * 10**6]
)
@pytest.mark.parametrize("name", ["p.json", "p.jsonl"])
def test_long_and_deep_documents(tmp_path, content, name):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        load_scored_pairs("qa", path, path)
    assert len(str(caught.value)) < 1000
