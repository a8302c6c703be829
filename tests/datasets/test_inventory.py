"""Inventories: every object once in each direction, at its own box, in orders that a scene alone decides."""

import json
from dataclasses import replace

import numpy as np
import pytest

from threedr1.datasets.scene_store import SceneInfo
from threedr1.datasets.tasks import inventory, load_samples
from threedr1.utils.text import find_pointers, format_box

LABELS = ["chair", "table", "chair"]


def info(scene_id: str, labels=LABELS) -> SceneInfo:
    boxes = np.array([[k, 2.0, 0.5, 0.4, 0.4, 1 + k / 10, 0.0] for k in range(len(labels))], np.float32).reshape(-1, 7)
    return SceneInfo(
        scene_id=scene_id,
        object_ids_K=np.arange(10, 10 + len(labels), dtype=np.int32),
        object_labels=list(labels),
        class_ids_K=np.zeros(len(labels), np.int32),
        boxes_K7=boxes,
        structure_ids=frozenset(),
        axis_align_44=np.eye(4),
        origin_3=np.array([0.0, 2.0, 0.0], np.float32),
        raw_middle_3=np.zeros(3),
    )


@pytest.fixture
def root(tmp_path):
    (tmp_path / "scannetv2_train.txt").write_text("scene0000_00\nscene0001_00\n")
    (tmp_path / "scannetv2_val.txt").write_text("scene0002_00\n")
    return tmp_path


SCENES = {name: info(name) for name in ("scene0000_00", "scene0001_00", "scene0002_00")}


def listed(root, scenes=SCENES, split="train"):
    """Inventories of kinds, colours and heights."""
    samples = load_samples(root, split, ["inventory"], scenes=scenes)
    return [sample for sample in samples if sample.query_box_7 is None]


POINTERS = [format_box([k, 0.0, 0.5, 0.4, 0.4, 1 + k / 10, 0.0]) for k in range(3)]  # model frame


def test_both_directions_name_every_object_at_its_box(root):
    samples = listed(root)
    assert len(samples) == 2 * 3 * inventory.ORDERS
    assert len({sample.sample_id for sample in samples}) == len(samples)
    assert {sample.scene_id for sample in samples} == {"scene0000_00", "scene0001_00"}
    for sample in samples:
        assert sorted(sample.target_object_ids) == [10, 11, 12] and sample.think == ""
        if sample.question == inventory.BY_NAME:
            named = [f"{POINTERS[row - 10]} {LABELS[row - 10]}" for row in sample.target_object_ids]
            assert sample.answer == ", ".join(named)
        elif sample.question == inventory.HEIGHTS:
            told = [f"{POINTERS[row - 10]} {row / 10:.1f}" for row in sample.target_object_ids]
            assert sample.answer == ", ".join(told)
        else:
            assert sample.question == inventory.BY_KIND
            parts = {f"chair {POINTERS[0]} {POINTERS[2]}", f"table {POINTERS[1]}"}
            assert sample.answer in {", ".join(order) for order in (sorted(parts), sorted(parts, reverse=True))}


def test_colors_are_told_in_both_directions_where_they_are_known(root):
    folder = root / "annotations"
    folder.mkdir()
    # object 12 has no colour, and the second scene none at all
    (folder / "object_colors.json").write_text(json.dumps({"scene0000_00": {"10": "red", "11": "light blue"}}))
    samples = listed(root)
    told = {sample.question: sample.answer for sample in samples if sample.scene_id == "scene0000_00"}
    assert len(samples) == (5 + 3) * inventory.ORDERS and len(told) == 5
    parts = [f"{POINTERS[0]} red", f"{POINTERS[1]} light blue"]
    assert told[inventory.COLOR_BY_NAME] in {", ".join(parts), ", ".join(parts[::-1])}
    parts = [f"red {POINTERS[0]}", f"light blue {POINTERS[1]}"]
    assert told[inventory.BY_COLOR] in {", ".join(parts), ", ".join(parts[::-1])}


@pytest.mark.parametrize("content", ["[1]", "{", '{"scene0000_00": {"door": "red"}}', '{"scene0000_00": ["red"]}'])
def test_a_broken_table_of_colors_is_refused(root, content):
    (root / "annotations").mkdir()
    (root / "annotations" / "object_colors.json").write_text(content)
    with pytest.raises(ValueError, match="is not a table of colors by scene and object"):
        load_samples(root, "train", ["inventory"], scenes=SCENES)


def test_orders_differ_and_come_again(root):
    many = {name: info(name, [f"kind{number}" for number in range(30)]) for name in SCENES}
    first, again = (listed(root, many) for _ in range(2))
    assert [sample.answer for sample in first] == [sample.answer for sample in again]
    orders = {tuple(sample.target_object_ids) for sample in first}
    assert len(orders) == 1 + 2 * (inventory.ORDERS - 1)  # both directions of one number share an order
    assert tuple(range(10, 40)) in orders  # one is from left to right, in every scene
    alike = {name: info(name, ["chair"] * 30) for name in SCENES}
    of_a_kind = [sample.answer for sample in listed(root, alike) if sample.question == inventory.BY_KIND]
    assert len(of_a_kind) == 2 * inventory.ORDERS
    for answer in of_a_kind:
        left = [box[0] for box in find_pointers(answer)]
        assert left == sorted(left) and len(left) == 30
    assert len(listed(root, many, "val")) == 3


def test_a_crowded_scene_is_cut_and_an_empty_one_left_out(root):
    crowded = info("scene0000_00", ["box"] * (inventory.MOST + 7))
    scenes = {"scene0000_00": crowded, "scene0001_00": replace(info("scene0001_00", []), object_labels=[])}
    samples = listed(root, scenes)
    assert {sample.scene_id for sample in samples} == {"scene0000_00"}
    assert all(len(set(sample.target_object_ids)) == inventory.MOST for sample in samples)


def test_objects_that_are_left_out(root):
    for sample in listed(root):
        boxes = [format_box(box) for box in find_pointers(sample.answer)]
        assert inventory.leave_out(sample.answer, [True] * 3) == sample.answer
        assert inventory.leave_out(sample.answer, [False] * 3) == ""
        left = inventory.leave_out(sample.answer, [True, False, True])
        assert [format_box(box) for box in find_pointers(left)] == [boxes[0], boxes[2]]
        words = dict(zip(POINTERS, LABELS, strict=True))
        if sample.question == inventory.BY_NAME:
            assert left == f"{boxes[0]} {words[boxes[0]]}, {boxes[2]} {words[boxes[2]]}"
        elif sample.question == inventory.HEIGHTS:
            heights = [f"{box} 1.{POINTERS.index(box)}" for box in (boxes[0], boxes[2])]
            assert left == ", ".join(heights)
        elif words[boxes[0]] == words[boxes[2]]:
            assert left == f"chair {boxes[0]} {boxes[2]}"
        else:
            assert left == f"{words[boxes[0]]} {boxes[0]}, {words[boxes[2]]} {boxes[2]}"


def test_distances_are_those_on_the_floor_from_the_object_asked_about(root):
    many = {name: info(name, [f"kind{number}" for number in range(30)]) for name in SCENES}
    samples = load_samples(root, "train", ["inventory"], scenes=many)
    asked = [sample for sample in samples if sample.query_box_7 is not None]
    starts = {(sample.scene_id, *sample.query_box_7.tolist()) for sample in asked}
    assert len(asked) == 2 * len(starts) and len(starts) == 2 * inventory.STARTS
    for sample in asked:
        start = int(sample.query_box_7[0])  # object k stands at x = k
        name = {"{label}": f"kind{start}"}
        nearest = sample.question == inventory.BY_DISTANCE.replace(*name.popitem())
        assert nearest or sample.question == inventory.DISTANCES.replace("{label}", f"kind{start}")
        found = [
            (box[0], part.rpartition(" ")[2])
            for box, part in zip(find_pointers(sample.answer), sample.answer.split("</box>")[1:], strict=True)
            for part in [part.partition(",")[0]]
        ]
        assert all(written == f"{abs(x - start):.1f}" for x, written in found)
        assert [number - 10 for number in sample.target_object_ids] == [x for x, _ in found]
        others = [k for k in range(30) if k != start]
        if nearest:
            apart = [abs(x - start) for x, _ in found]
            assert apart == sorted(abs(k - start) for k in others)
        else:
            assert sorted(x for x, _ in found) == others
        left = inventory.leave_out(sample.answer, [k % 2 == 0 for k in range(len(found))])
        assert find_pointers(left) == find_pointers(sample.answer)[::2]
        assert left.split("</box> ")[1].split(", ")[0] == found[0][1]


def test_of_many_objects_the_nearest_are_listed(root):
    many = {name: info(name, ["box"] * 60) for name in SCENES}
    samples = load_samples(root, "train", ["inventory"], scenes=many)
    (first,) = [s for s in samples if s.scene_id == "scene0000_00" and "nearest" in s.question][:1]
    start = int(first.query_box_7[0])
    apart = [abs(box[0] - start) for box in find_pointers(first.answer)]
    assert apart == sorted(abs(k - start) for k in range(60))[1 : inventory.MOST + 1]


def test_odd_labels_stay_as_they_are(root):
    odd = {name: info(name, ["sofa, leather", "", "3d printer"]) for name in SCENES}
    for sample in listed(root, odd):
        assert inventory.leave_out(sample.answer, [True] * 3) == sample.answer


def test_a_single_object_is_far_from_nothing(root):
    alone = {name: info(name, ["chair"]) for name in SCENES}
    assert all(sample.query_box_7 is None for sample in load_samples(root, "train", ["inventory"], scenes=alone))
