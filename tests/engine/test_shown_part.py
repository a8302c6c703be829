"""Samples that are shown a part of their proposals: what they point at stays, names and targets agree."""

import re
from collections import Counter

import numpy as np
import pytest
import torch

from threedr1.engine.data import ObservationCache, load_split
from threedr1.engine.runtime import Runtime
from threedr1.engine.sft_data import (
    Batches,
    NameStreams,
    ShownPart,
    listing_named,
    show_part,
    shown_rows,
    write_targets,
)
from threedr1.utils.streams import stream
from threedr1.utils.text import find_pointers

from .test_names import build, caption, model, observation, settings  # noqa: F401


def test_the_part_grows_with_the_steps_up_to_all():
    assert ShownPart.at(5, 0, 100) is None
    rng = np.random.default_rng(0)
    for step, most in ((0, 4), (50, 27), (100, 50), (1000, 50)):
        part = ShownPart.at(step, 4, 100)
        assert part is not None
        drawn = {part.draw(50, rng) for _ in range(2000)}
        assert (min(drawn), max(drawn)) == (4, most)
    whole = ShownPart.at(3, 4, 0)
    assert whole is not None
    assert {whole.draw(6, rng) for _ in range(100)} == {4, 5, 6} and {whole.draw(3, rng) for _ in range(9)} == {3}


def taught_by(model, sample, observation, shown, place):  # noqa: F811
    """What a sample teaches, drawn by the stream of its place."""
    (taught,) = write_targets(
        model, [sample], [observation], pointers="name", naming=lambda _: stream(place), shown=shown
    )
    return taught


def test_what_a_sample_points_at_stays_and_is_called_alike(model, observation):  # noqa: F811
    boxes = observation.encoded.named
    sample = caption(observation.scene.to_world(boxes)[2])
    sizes = Counter()
    for place in range(20):
        asked_7 = model.asked_box(sample, observation)
        rows = shown_rows(sample, observation.encoded.told, asked_7, ShownPart(2, 1.0), stream(place))
        shown = show_part(observation, rows)
        part = shown.encoded.named
        (row_of_it,) = shown.encoded.told.covering(boxes[2:3])
        assert (part[row_of_it] == boxes[2]).all()
        assert (shown.encoded.boxes_K7[shown.encoded.valid_K].numpy() == part).all()
        sizes[len(part)] += 1
        taught = taught_by(model, sample, observation, ShownPart(2, 1.0), place)
        text = model.language.decode(taught.row.token_ids).partition("Objects: ")[2]
        said = re.findall(r"<obj(\d+)>", text)
        assert len(said) == len(part) + 1 and said[-1] == said[row_of_it]
        assert model.embed_rows([taught.row], [taught.observation], [[]]).inputs_embeds_BLD.isfinite().all()
    assert len(sizes) > 2 and min(sizes) == 2
    assert len(observation.encoded.named) == len(boxes), "the scene itself is as it was"


def test_an_inventory_lists_what_is_shown_and_covered(model, observation, rooms_root):  # noqa: F811
    config = settings(rooms_root, "data.datasets=inventory")
    samples, _ = load_split(config.data, "train", 0)
    its = [sample for sample in samples if sample.scene_id == observation.scene.scene_id]
    assert its
    for place, sample in enumerate(its):
        covered = [row is not None for row in observation.encoded.told.covering(find_pointers(sample.answer))]
        whole = listing_named(sample, observation.encoded.told)
        assert find_pointers(whole.answer) == [
            box for box, kept in zip(find_pointers(sample.answer), covered, strict=True) if kept
        ] or not any(covered)
        if not any(covered):
            assert whole is sample
            continue
        asked_7 = model.asked_box(sample, observation)
        rows = shown_rows(sample, observation.encoded.told, asked_7, ShownPart(2, 0.0), stream(place))
        shown = show_part(observation, rows)
        part = listing_named(sample, shown.encoded.told)
        assert len(shown.encoded.named) == 2
        assert 1 <= len(find_pointers(part.answer)) <= sum(covered)
        assert "<box>" not in shown.encoded.told.pointed(part.answer)
        taught = taught_by(model, sample, observation, ShownPart(2, 0.0), place)
        said = model.language.decode(taught.row.token_ids).rpartition("assistant")[2]
        assert len(taught.observation.encoded.named) == 2
        assert "<box>" not in said and len(find_pointers(said)) == len(find_pointers(part.answer))


def batches_of(model, cache, samples, **options) -> Batches:  # noqa: F811
    return Batches(model, lambda _: samples, cache, num_steps=2, **options)


@pytest.mark.parametrize(
    ("pointers", "drawn", "more"),
    [
        ("name", True, ("model.language.name_pool=30",)),
        ("box", False, ()),
        ("name", True, ("model.language.num_proposals=0",)),
    ],
    ids=["names", "boxes", "blind"],
)
def test_processes_write_the_batches_that_one_writes(rooms_root, pointers, drawn, more):
    its_model = build(rooms_root, *more)
    samples, store = load_split(settings(rooms_root, "data.datasets=inventory,nr3d,scan2cap").data, "train", 0)
    its = samples[:: max(len(samples) // 12, 1)]
    assert {sample.dataset for sample in its} == {"inventory", "nr3d", "scan2cap"}
    cache = ObservationCache(store, its_model, seed=0)
    naming = NameStreams(0, len(its), Runtime(torch.device("cpu"))) if drawn else None

    def written_by(workers: int) -> list:
        batches = batches_of(
            its_model,
            cache,
            its,
            pointers=pointers,
            naming=naming,
            shown=lambda step: ShownPart(2, 0.5) if step else None,
            workers=workers,
        )
        with batches:
            made = [taught for step in range(2) for taught in batches[step]]
            pools = batches._helpers._pools if workers else []
            running = [process for pool in pools for process in pool._processes.values()]
        assert len(running) == workers and not any(process.is_alive() for process in running)
        shown = [taught.observation.encoded.named.tolist() for taught in made]
        return [
            (taught.row, taught.views, taught.sample.answer, boxes) for taught, boxes in zip(made, shown, strict=True)
        ]

    written = written_by(2)
    assert written == written_by(0) and len(written) == 2 * len(its)


def test_a_killed_writing_process_is_told(model, rooms_root):  # noqa: F811
    samples, store = load_split(settings(rooms_root).data, "train", 0)
    batches = batches_of(model, ObservationCache(store, model, seed=0), samples[:2], pointers="name", workers=1)
    with batches:
        assert len(batches[0]) == 2
        (pool,) = batches._helpers._pools
        (process,) = pool._processes.values()
        process.kill()
        process.join()
        for _ in range(2):  # while the pool does not know it yet, or once it does
            with pytest.raises(ValueError, match=r"killed \(memory\?\) or did not start; lower data\.workers"):
                batches[1]
