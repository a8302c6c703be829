"""Intervals of metrics: which get one, that corpus scores are resampled as corpora, and groups as groups."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from threedr1.utils.metrics import grounding
from threedr1.utils.metrics.caption import ngram_scores
from threedr1.utils.metrics.java import java_available
from threedr1.utils.metrics.ngram_statistics import meteor_aggregate
from threedr1.utils.metrics.result import (
    Aggregate,
    Scores,
    bootstrap_interval,
    bootstrap_intervals,
    group_means,
    grouped_percent,
    metric_intervals,
)
from threedr1.utils.metrics.score import score_predictions
from threedr1.utils.predictions import Prediction

needs_java = pytest.mark.skipif(not java_available(), reason="Java is not installed")
BLEU = [f"BLEU-{order}" for order in range(1, 5)]
BOX = [1.0, 2, 0.5, 1, 1, 1, 0]
FAR = [9.0, 2, 0.5, 1, 1, 1, 0]

words = st.lists(st.sampled_from(["a", "red", "chair", "by", "the", "door", "."]), max_size=8).map(" ".join)
texts = st.lists(st.tuples(words, st.lists(words.filter(bool), min_size=1, max_size=3)), min_size=1, max_size=6)


def corpus(pairs, meteor=False):
    references = {str(index): golden for index, (_, golden) in enumerate(pairs)}
    candidates = {str(index): [text] for index, (text, _) in enumerate(pairs)}
    return ngram_scores(references, candidates, tokenizer="none", meteor=meteor)


def resampled(aggregate: Aggregate, rows) -> float:
    return float(aggregate.of_sums(aggregate.statistics_NS[rows].sum(0, keepdims=True))[0])


class TestCorpusScores:
    @given(texts, st.data())
    def test_bleu_of_any_resample_is_that_of_its_corpus(self, pairs, data):
        rows = data.draw(st.lists(st.integers(0, len(pairs) - 1), min_size=2, max_size=8))
        aggregates = corpus(pairs).aggregates
        expected = corpus([pairs[row] for row in rows]).corpus
        for name in BLEU:
            assert resampled(aggregates[name], rows) == pytest.approx(expected[name], rel=1e-9, abs=1e-15), name

    def test_meteor_by_the_jars_own_lines(self):
        # SCORE lines, and what EVAL answers to the three of them
        lines = [
            "6 6 2 3  2 2 1 1  0 0 0 0  0 0 0 0  1 1 1 1  2 5 5",
            "2 2 1 1  1 1 0 0  0 0 0 0  0 0 0 0  0 0 0 0  1 1 1",
            "2 2 0 0  2 2 0 0  0 0 0 0  0 0 0 0  0 0 0 0  1 2 2",
        ]
        aggregate = meteor_aggregate(np.array([line.split() for line in lines], dtype=float))
        items = [resampled(aggregate, [row]) for row in range(3)]
        assert items == pytest.approx([0.38247153741897855, 0.3, 1.0], abs=1e-12)
        assert aggregate.value() == pytest.approx(0.41822824668452535, abs=1e-12)
        assert resampled(meteor_aggregate(np.zeros((1, 23))), [0]) == 0

    @needs_java
    @pytest.mark.slow
    def test_meteor_of_resamples(self):
        pairs = [
            ("a chair near the door", ["the red chair by the door"]),
            ("two lamps", ["two lamps", "lamps"]),
            ("", ["a table"]),
            ("couches are walking", ["the sofa walks", "a couch"]),
        ]
        aggregate = corpus(pairs, meteor=True).aggregates["METEOR"]
        for rows in ([0, 1, 2, 3], [1, 1], [2, 2], [0, 0, 3], [3, 1, 2]):
            expected = corpus([pairs[row] for row in rows], meteor=True).corpus["METEOR"]
            assert resampled(aggregate, rows) == pytest.approx(expected, abs=1e-9)

    def test_the_interval_is_not_that_of_the_mean_over_items(self):
        # one long right answer and many short wrong ones: the corpus is nearly right, the mean is nearly wrong
        long = " ".join(f"w{index}" for index in range(400))
        pairs = [(long, [long])] + [("x", ["y"])] * 9
        ngrams = corpus(pairs)
        scores = Scores("fraction", 10, dict(ngrams.corpus), ngrams.per_item, aggregates=ngrams.aggregates)
        low, high = metric_intervals(scores, 0)[0]["BLEU-1"]
        assert np.mean(ngrams.per_item["BLEU-1"]) == pytest.approx(0.1, abs=1e-6)
        assert low < 1e-3 and high > 0.99 > scores.metrics["BLEU-1"] > 0.97


class TestMetricIntervals:
    def test_groups(self):
        scores = grouped_percent({"EM": [1.0, 1.0, 0.0, 1.0, 0.0]}, ["what", "what", "how", "how", ""])
        intervals, notes = metric_intervals(scores, 0)
        assert intervals.keys() == {"EM", "EM/what", "EM/how"} and not notes
        assert intervals["EM/what"] == [100, 100]
        assert intervals["EM/how"] == [0, 100]
        assert intervals["EM"][0] < 60 < intervals["EM"][1]

    def test_a_group_of_one_leaves_out_resamples_without_it(self):
        groups = {"rare": [False] * 30 + [True], "none": [False] * 31}
        values = {"Acc": [0.0] * 30 + [1.0]}
        scores = Scores(
            "fraction", 31, {"Acc/rare": 1.0, "Acc/none": 0.0}, values, aggregates=group_means(values, groups)
        )
        intervals, notes = metric_intervals(scores, 0)
        assert intervals == {"Acc/rare": [1, 1]} and not notes

    def test_metrics_that_the_items_do_not_explain(self):
        scores = Scores("percent", 2, {"EM": 50.0, "F": 3.0, "METEOR": 50.0, "none": None}, {"EM": [0.0, 0.0]})
        scores.per_item["METEOR"] = [0.0, 1.0]
        intervals, notes = metric_intervals(scores, 0)
        assert intervals == {}
        assert notes == ["No interval is given for EM, F, METEOR: it does not follow from values per item."]

    def test_one_seed_means_the_same_resamples(self):
        values = np.random.default_rng(0).random(50)
        column = Aggregate(np.stack([values, np.ones(50)], axis=1), lambda sums_R2: sums_R2[:, 0] / sums_R2[:, 1])
        twice = Aggregate(column.statistics_NS, lambda sums_R2: 2 * sums_R2[:, 0] / sums_R2[:, 1])
        single = Aggregate(np.ones((1, 2)), lambda sums_R2: sums_R2[:, 0])
        intervals = bootstrap_intervals({"a": column, "s": single, "b": twice}, seed=4)
        assert list(intervals) == ["a", "s", "b"] and intervals["s"] == (1, 1)
        assert intervals["b"] == pytest.approx([2 * bound for bound in intervals["a"]])
        assert intervals["a"] == bootstrap_interval(values.tolist(), seed=4)
        # the resamples themselves, drawn one by one
        drawn = np.random.default_rng(4).integers(0, 50, (1000, 50))
        assert intervals["a"] == pytest.approx(np.quantile(values[drawn].mean(1), (0.025, 0.975)))


class TestScorers:
    """Every metric that has a value gets an interval around it."""

    def check(self, result):
        valued = {name for name, value in result["metrics"].items() if value is not None}
        assert result["intervals"].keys() == valued
        for name in valued:
            low, high = result["intervals"][name]
            assert low - 1e-9 <= result["metrics"][name] <= high + 1e-9, name
        assert not any("interval" in note for note in result["notes"])

    def rows(self, task, **fields):
        answers = ["a red chair by the door", "two lamps", "a table here", "the door of the room", "a bin"]
        return [
            Prediction(
                sample_id=str(index),
                task=task,
                scene_id=f"scene{index % 2:04d}_00",
                question=f"{'what' if index % 2 else 'how many'} {index}?",
                text=answer,
                answer=answer,
                references=[answer if index % 2 else "a chair near the wall", "a thing"],
                boxes=[BOX if index % 2 else FAR],
                target_boxes=[[BOX[0] + index // 2 * 0.1, *BOX[1:]]],
                meta={"query_box": BOX, "object_id": index},
                **fields,
            )
            for index, answer in enumerate(answers * 4)
        ]

    @pytest.mark.parametrize(
        "scorer", ["exact", "scanqa_ll3da", "scanqa_leo", "scanqa_video3dllm", "sqa3d", "sqa3d_text"]
    )
    def test_question_answering(self, scorer):
        task = "situated_qa" if scorer.startswith("sqa3d") else "qa"
        self.check(score_predictions(task, self.rows(task), scorer, meteor=False))

    @needs_java
    @pytest.mark.slow
    def test_with_meteor_and_the_tokenizer(self):
        for scorer in ("scanqa", "scanqa_chat_scene"):
            result = score_predictions("qa", self.rows("qa"), scorer, meteor=True)
            assert "METEOR" in result["metrics"]
            self.check(result)

    @pytest.mark.parametrize("task", ["dense_caption", "planning", "object_caption"])
    def test_captions(self, task):
        self.check(score_predictions(task, self.rows(task), meteor=False))

    def test_grounding_groups(self):
        rows = self.rows("grounding")
        for index, row in enumerate(rows):
            row.question_type = "multiple"
            row.meta |= {"others": index % 3 == 0, "multiple": True}
        result = score_predictions("grounding", rows, "scanrefer")
        unique = {name for name in result["metrics"] if "/unique" in name}
        assert unique and not unique & result["intervals"].keys()
        result["metrics"] = {name: value for name, value in result["metrics"].items() if name not in unique}
        self.check(result)

    def test_nr3d_groups(self):
        groups = {"easy": [True, False, True], "hard": [False, True, False], "none": [False] * 3}
        scores = grounding.nr3d([1, 2, 3], [1, 0, 0], groups=groups)
        intervals, notes = metric_intervals(scores, 0)
        assert intervals.keys() == {"Acc", "Acc/easy", "Acc/hard"} and not notes
        assert intervals["Acc/hard"] == [0, 0]
