"""Caption and question-answering metrics against the official evaluators' results and hand-computed values."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from threedr1.utils.metrics import caption, java
from threedr1.utils.metrics.caption import ngram_scores, rouge_l, simple_words
from threedr1.utils.metrics.java import java_available, ptb_tokenize
from threedr1.utils.metrics.qa import (
    QaItem,
    clean_answer,
    exact,
    qa_exact,
    qa_refined,
    scanqa,
    scanqa_ll3da,
    sqa3d,
    sqa3d_question_type,
)
from threedr1.utils.metrics.result import bootstrap_interval

needs_java = pytest.mark.skipif(not java_available(), reason="Java is not installed")
METEOR = "METEOR"
# METEOR takes many seconds to start
with_and_without_meteor = pytest.mark.parametrize(
    "meteor", [False, pytest.param(True, marks=[pytest.mark.slow, needs_java])]
)


def without(meteor):
    return set() if meteor else {METEOR}


def no_java(monkeypatch):
    for module in (java, caption):
        monkeypatch.setattr(module, "java_available", lambda: False)


@pytest.fixture(scope="module")
def scanqa_file(parity_data):
    return json.loads((parity_data / "scanqa.json").read_text())


def scanqa_items(content):
    return [
        QaItem(item["question_id"], item["question"], tuple(item["answer_top10"]), tuple(item["answers"]))
        for item in content["items"]
    ]


class TestParity:
    @needs_java
    @with_and_without_meteor
    def test_scanqa(self, scanqa_file, meteor):
        scores = scanqa(scanqa_items(scanqa_file), meteor=meteor)
        assert scores.metrics.keys() == scanqa_file["expected"].keys() - without(meteor)
        for name in scores.metrics:
            value = scanqa_file["expected"][name]
            assert scores.metrics[name] == pytest.approx(value, rel=1e-9), name
        for name in scanqa_file["expected_per_item"].keys() - without(meteor):
            values = scanqa_file["expected_per_item"][name]
            assert scores.per_item[name] == pytest.approx(values, rel=1e-9, abs=1e-15), name

    @with_and_without_meteor
    def test_scanqa_ll3da(self, parity_data, meteor):
        content = json.loads((parity_data / "scanqa_ll3da.json").read_text())
        items = [
            QaItem(item["question_id"], item["question"], (item["prediction"],), tuple(item["answers"]))
            for item in content["items"]
        ]
        scores = scanqa_ll3da(items, meteor=meteor)
        names = {"CiDEr": "CIDEr", "Rouge": "ROUGE-L"}
        for name in content["expected"].keys() - without(meteor):
            value = content["expected"][name]
            assert scores.metrics[names.get(name, name)] == pytest.approx(value, rel=1e-9), name

    def test_sqa3d(self, parity_data):
        content = json.loads((parity_data / "sqa3d.json").read_text())
        items = []
        for item in content["items"]:
            assert clean_answer(item["prediction"]) == item["clean_prediction"]
            assert clean_answer(item["answer"]) == item["clean_answer"]
            assert sqa3d_question_type(item["question"]) == item["question_type"]
            items.append(QaItem(str(item["question_id"]), item["question"], (item["prediction"],), (item["answer"],)))
        scores = sqa3d(items)
        assert scores.per_item["EM"] == [item["em"] for item in content["items"]]
        assert scores.per_item["EM-R"] == [item["em_refined"] for item in content["items"]]
        assert scores.counts == content["expected"]["counts"]
        for name, official in (("EM", "EM"), ("EM-R", "EM_R")):
            for kind, value in content["expected"][official].items():
                key = name if kind == "all" else f"{name}/{kind}"
                assert scores.metrics[key] == pytest.approx(value, abs=1e-6), key


class TestNgrams:
    references = {"a": ["the red chair by the door"], "b": ["a table", "the wooden table"], "c": ["two lamps"]}

    def test_perfect_answers(self):
        candidates = {key: [texts[0]] for key, texts in self.references.items()}
        scores = ngram_scores(self.references, candidates, tokenizer="none", meteor=False)
        assert scores.corpus["BLEU-4"] == pytest.approx(1, abs=1e-6)
        assert scores.corpus["ROUGE-L"] == pytest.approx(1)
        assert METEOR not in scores.corpus and not scores.notes

    def test_one_item_has_no_cider(self):
        scores = ngram_scores({"a": ["one chair"]}, {"a": ["one chair"]}, tokenizer="none", meteor=False)
        assert scores.corpus["CIDEr"] == 0

    @pytest.mark.parametrize(
        "references, candidates, message",
        [
            ({}, {}, "nothing to score"),
            ({"a": ["x"]}, {"b": ["x"]}, "differ in 2 keys, for instance 'a'"),
            ({"a": []}, {"a": ["x"]}, "no reference"),
            ({"a": ["x"]}, {"a": ["x", "y"]}, "2 candidates"),
            ({"a": "x"}, {"a": ["x"]}, "list of strings"),
            ({"a": [" "]}, {"a": ["x"]}, "empty strings"),
        ],
    )
    def test_bad_input(self, references, candidates, message):
        with pytest.raises(ValueError, match=message):
            ngram_scores(references, candidates, tokenizer="none", meteor=False)

    def test_without_java(self, monkeypatch):
        no_java(monkeypatch)
        candidates = {key: ["a chair"] for key in self.references}
        with pytest.raises(ValueError, match="scanqa_ll3da or exact"):
            ptb_tokenize(["a chair"])
        assert set(ngram_scores(self.references, candidates, tokenizer="ptb", meteor=False).corpus.values()) == {None}
        with pytest.raises(ValueError, match="meteor=False"):
            ngram_scores(self.references, candidates, tokenizer="none", meteor=True)
        scores = ngram_scores(self.references, candidates, tokenizer="none", meteor="auto")
        assert scores.corpus[METEOR] is None and "Java" in scores.notes[0]

    @needs_java
    def test_tokenizer(self):
        texts = ["A chair, left of the café.", "", "line\nbreak\r\nand\u2028more", "Don't!", " . "]
        assert ptb_tokenize(texts) == ["a chair left of the café", "", "line break and more", "do n't", ""]
        assert ptb_tokenize([]) == []

    @needs_java
    @pytest.mark.slow
    def test_meteor_with_awkward_texts(self):
        references = {"a": ["the chair ||| table"], "b": ["a lamp\nby the door"]}
        candidates = {"a": ["the chair table"], "b": ["a  lamp by the door"]}
        scores = ngram_scores(references, candidates, tokenizer="none", meteor=True)
        assert scores.per_item[METEOR] == pytest.approx([1, 1], abs=0.02)
        again = ngram_scores(references, candidates, tokenizer="none", meteor=True)
        assert again == scores

    @needs_java
    @pytest.mark.slow
    def test_meteor_that_dies(self):
        texts = {"a": ["a chair"]}
        java._meteor_process().kill()
        with pytest.raises(ValueError, match="METEOR stopped after 0 of 1"):
            java.meteor_scores(texts, texts)
        assert java.meteor_scores(texts, texts)[0] > 0.9


class TestAnswers:
    @pytest.mark.parametrize(
        "text, cleaned",
        [
            ("  The TV. ", "TV"),
            ("2 chairs", "two chairs"),
            ("None", "zero"),
            ("chair2", "chair"),
            ("x .", "x "),
            ("23", "twenty-three"),
            ("backwards", "backward"),
            ("an apple on a table", "apple on table"),
            ("the", "the"),
        ],
    )
    def test_cleaning(self, text, cleaned):
        assert clean_answer(text) == cleaned

    def test_exact_cannot_be_met_by_fragments(self):
        assert qa_exact("The chair.", ["chair"]) == 1
        assert qa_exact("two", ["2"]) == 1
        for answer in ("", " ", "chai", "chair table", "a"):
            assert qa_exact(answer, ["office chair"]) == 0
        # the published refinement is as lax as this; hence it is no reward
        assert qa_refined("", ["office chair"]) == qa_refined("off", ["office chair"]) == 1
        assert qa_refined("table", ["office chair"]) == 0

    @given(st.text(max_size=40))
    def test_an_answer_equals_itself(self, text):
        if clean_answer(text).strip():
            assert qa_exact(text, ["nothing", text]) == 1
        assert qa_refined(text, [text]) == 1

    def test_exact_scorer(self):
        items = [
            QaItem("1", "what?", ("Chair",), ("chair",), "what"),
            QaItem("2", "how many?", ("three",), ("4",), "how"),
        ]
        scores = exact(items)
        assert scores.unit == "percent" and scores.items == 2
        assert scores.metrics == {"EM": 50, "EM-raw": 0, "EM-R": 50} | {
            "EM/what": 100,
            "EM/how": 0,
            "EM-raw/what": 0,
            "EM-raw/how": 0,
            "EM-R/what": 100,
            "EM-R/how": 0,
        }

    def test_hits_of_answers_that_say_nothing_are_told(self):
        items = [QaItem("1", "what is it?", ("",), ("chair",))]
        for scores in (exact(items), sqa3d(items)):
            assert scores.metrics["EM"] == 0 and scores.metrics["EM-R"] == 100
            assert scores.notes == ["1 of 1 answers are empty, and EM-R, as published, counts them as hits: go by EM."]
        assert exact([QaItem("1", "what?", ("a chair",), ("chair",))]).notes == []

    def test_bad_items(self):
        item = QaItem("1", "q", ("x",), ("y",))
        with pytest.raises(ValueError, match="answered twice"):
            exact([item, item])
        with pytest.raises(ValueError, match="no reference"):
            exact([QaItem("1", "q", ("x",), ())])
        with pytest.raises(ValueError, match="nothing to score"):
            sqa3d([])


def test_rouge_l_by_hand():
    # LCS 2 of 3 and 4 words: precision 2/3, recall 1/2, beta 1.2
    precision, recall, beta2 = 2 / 3, 1 / 2, 1.44
    expected = (1 + beta2) * precision * recall / (recall + beta2 * precision)
    assert rouge_l("Red chair, here", ["the red chair left"]) == pytest.approx(expected)
    assert rouge_l("...", ["a"]) == rouge_l("a", ["!"]) == rouge_l("a", []) == 0
    assert rouge_l("A chair.", ["no", "a chair"]) == 1
    assert simple_words("It's the TV-stand.") == ["it's", "the", "tv", "stand"]


def test_bootstrap_interval():
    values = [0.0, 1.0] * 200
    low, high = bootstrap_interval(values, seed=3)
    assert (low, high) == bootstrap_interval(values, seed=3)
    half_width = 1.96 * 0.5 / math.sqrt(len(values))
    assert low == pytest.approx(0.5 - half_width, abs=0.01) and high == pytest.approx(0.5 + half_width, abs=0.01)
    assert bootstrap_interval([0.25], 0) == (0.25, 0.25)
    with pytest.raises(ValueError, match="at least one"):
        bootstrap_interval([], 0)
