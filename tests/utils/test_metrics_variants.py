"""The ways in which other papers score ScanQA and SQA3D: worked out by hand, and against their own code's results."""

import json

import pytest

from threedr1.utils.metrics import caption, java
from threedr1.utils.metrics.caption import ngram_scores
from threedr1.utils.metrics.java import java_available
from threedr1.utils.metrics.qa import QaItem, sqa3d
from threedr1.utils.metrics.qa_variants import scanqa_chat_scene, scanqa_leo, scanqa_video3dllm, sqa3d_text

needs_java = pytest.mark.skipif(not java_available(), reason="Java is not installed")

# what each project's own code gives for the predictions of the parity file, with pycocoevalcap's scorers
PUBLISHED = {
    scanqa_leo: {
        "EM": 39.0,
        "EM-R": 208 / 3,
        "BLEU-1": 52.07423580780342,
        "BLEU-2": 44.39147583015327,
        "BLEU-3": 38.86778491795959,
        "BLEU-4": 33.39994322168634,
        "METEOR": 34.62352394226405,
        "ROUGE-L": 59.49873375445469,
        "CIDEr": 180.45142908731196,
    },
    scanqa_video3dllm: {
        "EM": 98 / 3,
        "BLEU-1": 46.16998950677212,
        "BLEU-2": 38.29482455469511,
        "BLEU-3": 32.870089105478485,
        "BLEU-4": 27.867134967370948,
        "METEOR": 34.059504408161104,
        "ROUGE-L": 53.80072797023258,
        "CIDEr": 159.84364691134567,
    },
    scanqa_chat_scene: {
        "EM": 40.0,
        "EM-R": 62.0,
        "BLEU-1": 51.528384279419726,
        "BLEU-2": 43.68590936460488,
        "BLEU-3": 37.84832803336684,
        "BLEU-4": 32.22081247258401,
        "METEOR": 34.40271821805714,
        "ROUGE-L": 58.51004885999475,
        "CIDEr": 176.0012448993714,
    },
}


def items(*rows):
    return [QaItem(str(index), "what?", (answer,), tuple(golden)) for index, (answer, *golden) in enumerate(rows)]


@needs_java
@pytest.mark.parametrize("meteor", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("scorer", PUBLISHED, ids=lambda scorer: scorer.__name__)
def test_the_projects_own_results(parity_data, scorer, meteor):
    content = json.loads((parity_data / "scanqa.json").read_text())["items"]
    rows = [
        QaItem(row["question_id"], row["question"], (row["answer_top10"][0],), tuple(row["answers"]))
        for row in content
    ]
    scores = scorer(rows, meteor=meteor)
    expected = {name: value for name, value in PUBLISHED[scorer].items() if meteor or name != "METEOR"}
    assert scores.unit == "percent" and scores.items == 300
    assert scores.metrics == pytest.approx(expected, rel=1e-9)


class TestLeo:
    def test_a_later_equal_reference_does_not_make_an_exact_match(self):
        scores = scanqa_leo(
            items(
                ("brown", "dark brown", "brown"),  # overlaps with the first: no exact match, as published
                ("brown", "red", "brown"),  # the first does not match at all, so the second decides
                ("brown", "brown", "dark brown"),
                ("the 2 chairs.", "Two  Chairs"),
                ("north", "no"),
                ("red", "blue"),
            ),
            meteor=False,
        )
        assert scores.per_item["EM"] == [0, 1, 1, 1, 0, 0]
        assert scores.per_item["EM-R"] == [1, 1, 1, 1, 1, 0]
        assert scores.metrics["EM"] == 50 and scores.metrics["EM-R"] == pytest.approx(500 / 6)

    def test_both_sides_are_cleaned_for_the_ngrams(self):
        scores = scanqa_leo(items(("The 2 Chairs.", "two chairs"), ("a lamp", "the Lamp!")), meteor=False)
        assert scores.per_item["ROUGE-L"] == [1, 1]


class TestVideo3dLlm:
    def test_raw_answers_and_stops(self):
        scores = scanqa_video3dllm(
            items(("chair.", "chair"), ("chair", "chair"), ("Chair", "chair"), ("a b...", "a b"), ("x.", "x.")),
            meteor=False,
        )
        assert scores.per_item["EM"] == [0, 1, 0, 0, 1]
        # stops go from predictions alone, case stays
        assert scores.per_item["ROUGE-L"] == [1, 1, 0, 1, 0]
        assert "EM-R" not in scores.metrics


class TestChatScene:
    rows = items(
        ("Chair.", "chair"),
        ("The chair", "the chair"),  # cleaned to `chair`, which is only part of the raw reference
        ("two", "2"),
        ("2", "two"),
        ("Brown", "dark brown", "brown"),  # any equal reference counts
        ("", "chair"),
        (".", "chair"),
        ("A", "a"),
    )

    def test_only_the_prediction_is_cleaned(self, monkeypatch):
        for module in (java, caption):
            monkeypatch.setattr(module, "java_available", lambda: False)
        scores = scanqa_chat_scene(self.rows, meteor="auto")
        assert scores.per_item["EM"] == [1, 0, 0, 1, 1, 0, 0, 1]
        assert scores.per_item["EM-R"] == [1, 1, 0, 1, 1, 0, 0, 1]
        # without Java the exact matches stay, and nothing else has a number
        assert scores.metrics["EM"] == 50
        assert {name for name, value in scores.metrics.items() if value is not None} == {"EM", "EM-R"}
        assert len(scores.notes) == 1 and "Java" in scores.notes[0]

    @needs_java
    def test_ngrams_come_after_the_tokenizer(self):
        scores = scanqa_chat_scene(items(("the Chair.", "the chair!\n"), ("lamp", "lamp,lamp")), meteor=False)
        # `chair` against `the chair`: precision 1, recall 1/2, beta 1.2
        expected = 2.44 * 0.5 / (0.5 + 1.44)
        assert scores.per_item["ROUGE-L"][0] == pytest.approx(expected)


class TestSqa3dText:
    def test_texts_are_compared_as_they_are(self):
        scores = sqa3d_text(items(("left", "left"), ("Left", "left"), (" two  chairs ", "two chairs")), meteor=False)
        assert scores.unit == "percent"
        assert scores.per_item["ROUGE-L"] == [1, 0, 1]
        assert "EM" not in scores.metrics and "METEOR" not in scores.metrics

    def test_a_sentence_around_the_right_word_scores_nothing(self):
        # CIDEr of one 1-gram w of idf log(3) among 3 items: 19 words of which w alone is known (18 unseen of idf
        # log(3)): cosine 1/sqrt(19), length penalty exp(-18^2 / 72) for 18 bigrams against 0; times 10 / 4
        sentence = "i would say that what you are asking about in this room here must be some kind of {}"
        assert len(sentence.split()) == 19
        rows = items((sentence.format("left"), "left"), ("right", "right"), ("two", "two"))
        scores = sqa3d_text(rows, meteor=False)
        cosine, penalty = 19**-0.5, 2.718281828459045 ** (-(18**2) / 72)
        assert scores.per_item["CIDEr"][0] == pytest.approx(10 / 4 * cosine * penalty)
        assert scores.per_item["CIDEr"][1] == pytest.approx(10 / 4)
        assert sqa3d(rows).per_item["EM"] == [0, 1, 1]

    def test_the_published_test_split(self, real_data):
        folder = real_data / "annotations"
        path = folder / "v1_balanced_sqa_annotations_test_scannetv2.json"
        if not path.is_file():
            pytest.skip(f"no {path.name}")
        answers = [row["answers"][0]["answer"] for row in json.loads(path.read_text())["annotations"]]
        oracle = sqa3d_text(items(*((answer, answer) for answer in answers)), meteor=False)
        assert oracle.items == 3519 and oracle.metrics["CIDEr"] == pytest.approx(272.1, abs=0.05)
        sentence = "I think that the answer to your question about this room, as far as I can see, is {}"
        wrapped = items(*((sentence.format(answer), answer) for answer in answers))
        assert sqa3d_text(wrapped, meteor=False).metrics["CIDEr"] == pytest.approx(0.4, abs=0.05)
        assert sqa3d(wrapped).metrics["EM"] == 0


def test_without_java_the_tokenized_scores_have_no_value(monkeypatch):
    for module in (java, caption):
        monkeypatch.setattr(module, "java_available", lambda: False)
    texts = {"a": ["a chair"]}
    scores = ngram_scores(texts, texts, tokenizer="ptb", meteor="auto")
    assert scores.corpus == dict.fromkeys(["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr"])
    assert scores.per_item == {} and len(scores.notes) == 1
    assert "METEOR" not in ngram_scores(texts, texts, tokenizer="ptb", meteor=False).corpus
    with pytest.raises(ValueError, match="differ in 2 keys"):
        ngram_scores(texts, {"b": ["a chair"]}, tokenizer="ptb", meteor=False)
