"""Contents: what a room holds, in words, counted by hand; and nothing of what its labels do not say."""

import json
from dataclasses import replace

import pytest

from threedr1.datasets.tasks import contents, load_samples

from .test_inventory import info, root  # noqa: F401 - fixture

LABELS = ["chair", "bed", "chair", "sofa, leather", "chair"]
COLORS = {"10": "red", "11": "light blue", "12": "black", "14": "black"}  # of the sofa none is known


def told(root, labels=LABELS, colors=COLORS, split="train"):  # noqa: F811
    """Answers of the first scene by question."""
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations" / "object_colors.json").write_text(json.dumps({"scene0000_00": colors}))
    scenes = {name: info(name, labels) for name in ("scene0000_00", "scene0001_00", "scene0002_00")}
    samples = load_samples(root, split, ["contents"], scenes=scenes)
    assert len({sample.sample_id for sample in samples}) == len(samples)
    assert all(sample.references == [sample.answer] and sample.task == "dialogue" for sample in samples)
    return [(sample.scene_id, sample.question, sample.answer) for sample in samples]


def test_kinds_and_colors_by_hand(root):  # noqa: F811
    samples = told(root)
    first = [(question, answer) for scene, question, answer in samples if scene == "scene0000_00"]
    assert first[:3] == [
        (contents.COUNTS, "bed 1, chair 3, sofa, leather 1"),
        (contents.COLORS_BY_KIND, "bed light blue, chair black black red"),
        (contents.KINDS_BY_COLOR, "black chair chair, light blue bed, red chair"),
    ]
    of = {
        contents.COLORS_OF.replace("{kinds}", kind): answer
        for kind, answer in (("bed", "bed light blue"), ("chair", "chair black black red"))
    }
    assert len(first) == 3 + contents.PARTS
    assert all(of[question] == answer for question, answer in first[3:])
    others = [(question, answer) for scene, question, answer in samples if scene != "scene0000_00"]
    assert others == [first[0]], "without colours a room tells its kinds"
    assert told(root) == samples


def test_parts_are_half_of_the_kinds_and_differ(root):  # noqa: F811
    kinds = [f"kind{number:02}" for number in range(21)]
    colors = {str(10 + number): "red" for number in range(21)}
    parts = [(question, answer) for _, question, answer in told(root, kinds, colors)[3 : 3 + contents.PARTS]]
    assert len(set(parts)) == contents.PARTS
    for question, answer in parts:
        asked = question.removeprefix(contents.COLORS_OF.partition("{")[0]).removesuffix(".").split(", ")
        assert len(asked) == 11 and asked == sorted(asked) and set(asked) <= set(kinds)
        assert answer == ", ".join(f"{kind} red" for kind in asked)


def test_held_out_scenes_and_empty_ones(root):  # noqa: F811
    assert [question for _, question, _ in told(root, split="val")] == [contents.COUNTS]
    empty = {name: replace(info(name, []), object_labels=[]) for name in ("scene0000_00", "scene0001_00")}
    assert load_samples(root, "train", ["contents"], scenes=empty) == []


def test_a_broken_table_of_colors_is_refused(root):  # noqa: F811
    with pytest.raises(ValueError, match="is not a table of colors by scene and object"):
        told(root, colors=["red"])
