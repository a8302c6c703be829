"""Pools and embeddings on disk: the same as made anew, made again when anything changed, never an error."""

import dataclasses
import logging
import os

import numpy as np
import pytest
import torch

from threedr1.datasets.archive import write_arrays
from threedr1.datasets.rooms import generate_room
from threedr1.datasets.rooms.as_scene import room_as_scene
from threedr1.models import view_cache
from threedr1.models.dual_encoder import DualEncoder
from threedr1.models.view_cache import ViewCache, encoder_fingerprint
from threedr1.models.view_pool import build_view_pool

OPTIONS = {"source": "rendered", "num_candidates": 3, "image_size": (24, 32), "seed": 1}


def small_encoder(seed: int) -> DualEncoder:
    torch.manual_seed(seed)
    return DualEncoder(
        num_names=4, num_colors=2, text_width=8, text_heads=2, num_buckets=64, image_width=8, image_size=16
    ).eval()


@pytest.fixture(scope="module")
def scene():
    return room_as_scene(generate_room("scene0000_00", 6, points_only=True), 4000)


@pytest.fixture
def counted(monkeypatch):
    """How many pools were built."""
    calls = []

    def build(scene, **options):
        calls.append(options)
        return build_view_pool(scene, **options)

    monkeypatch.setattr(view_cache, "build_view_pool", build)
    return calls


def test_a_pool_from_disk_is_the_pool(scene, tmp_path, counted):
    fresh = build_view_pool(scene, **OPTIONS)
    ViewCache(tmp_path).pool(scene, **OPTIONS)
    pool = ViewCache(tmp_path).pool(scene, **OPTIONS)
    assert len(counted) == 1 and pool.names == fresh.names
    for name in ("images_VHW3", "visible_VK", "coverage_VS", "points_N3", "seen_VN"):
        found, expected = getattr(pool, name), getattr(fresh, name)
        np.testing.assert_array_equal(found, expected)
        assert found.dtype == expected.dtype
    for found, expected in zip(pool.cameras, fresh.cameras, strict=True):
        np.testing.assert_array_equal(found.pose_44, expected.pose_44)
        np.testing.assert_array_equal(found.intrinsics_33, expected.intrinsics_33)
        assert (found.width, found.height) == (32, 24)
    np.testing.assert_array_equal(pool.visibility(scene.boxes_K7), fresh.visibility(scene.boxes_K7))


def test_whatever_changes_makes_the_pool_again(scene, tmp_path, counted):
    cache = ViewCache(tmp_path)
    moved = dataclasses.replace(scene, points_N3=scene.points_N3 + np.float32(0.001))
    painted = dataclasses.replace(scene, colors_N3=255 - scene.colors_N3)
    variants = [
        (scene, {}),
        (moved, {}),
        (painted, {}),
        (scene, {"seed": 2}),
        (scene, {"num_candidates": 2}),
        (scene, {"image_size": (32, 32)}),
        (scene, {"boxes_K7": scene.boxes_K7[:1]}),
    ]
    for number, (variant, options) in enumerate(variants, 1):
        for _ in range(2):
            pool = cache.pool(variant, **(OPTIONS | options))
        assert len(counted) == number
        np.testing.assert_array_equal(pool.images_VHW3, build_view_pool(variant, **(OPTIONS | options)).images_VHW3)
    assert len(list(tmp_path.iterdir())) == 1, "one pool a scene is kept"


def test_embeddings_are_computed_once_for_an_encoder_and_its_pictures(scene, tmp_path):
    encoder, calls = small_encoder(0), []
    original = encoder.embed_images
    encoder.embed_images = lambda images, batch_size=16: calls.append(len(images)) or original(images, batch_size)  # type: ignore[method-assign]
    pools = [build_view_pool(scene, **OPTIONS) for _ in range(2)]
    for pool in pools:
        found = ViewCache(tmp_path).embed(scene.scene_id, pool, encoder, "dual")
        torch.testing.assert_close(found, original(list(pool.images_VHW3)), rtol=0, atol=0)
        assert pool.embeddings["dual"] is found
    assert calls == [3]
    other = small_encoder(1)  # the same name with other weights
    again = ViewCache(tmp_path).embed(scene.scene_id, build_view_pool(scene, **OPTIONS), other, "dual")
    torch.testing.assert_close(again, other.embed_images(list(pools[0].images_VHW3)), rtol=0, atol=0)
    dark = dataclasses.replace(pools[0], images_VHW3=pools[0].images_VHW3 // 2, embeddings={})
    ViewCache(tmp_path).embed(scene.scene_id, dark, other, "dual")
    torch.testing.assert_close(dark.embeddings["dual"], other.embed_images(list(dark.images_VHW3)), rtol=0, atol=0)


def test_fingerprints_tell_weights_apart():
    first = small_encoder(0)
    assert encoder_fingerprint(first) == encoder_fingerprint(small_encoder(0)) != encoder_fingerprint(small_encoder(1))
    before = encoder_fingerprint(first)
    with torch.no_grad():
        first.text.positions[1, 2] += 1e-3
    assert encoder_fingerprint(first) != before


def test_broken_files_are_made_anew_with_one_warning(scene, tmp_path, counted, caplog):
    fresh = ViewCache(tmp_path).pool(scene, **OPTIONS)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    generator = np.random.default_rng(0)
    broken = [b"", b"no archive", whole[: len(whole) // 2], whole[:-1]]
    for place in generator.integers(0, len(whole), 60):
        flipped = bytearray(whole)
        flipped[place] ^= 0xFF
        broken.append(bytes(flipped))
    for content in broken:
        path.write_bytes(content)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            pool = ViewCache(tmp_path).pool(scene, **OPTIONS)
        np.testing.assert_array_equal(pool.images_VHW3, fresh.images_VHW3)
        assert len(caplog.records) <= 1  # a byte of padding, or of the key, is none
        assert path.read_bytes() in (content, whole)
    assert len(counted) > len(broken) // 2
    write_arrays(path, {"key": np.zeros(32, np.uint8), "something": np.zeros(2)})
    caplog.clear()
    ViewCache(tmp_path).pool(scene, **OPTIONS)
    assert "not a file of the view cache" in caplog.text


def test_a_folder_that_cannot_be_written_is_said_once(scene, tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    cache = ViewCache(tmp_path / "file")
    for seed in (0, 1):
        assert len(cache.pool(scene, **(OPTIONS | {"seed": seed}))) == 3
    assert sum("cannot be written" in record.message for record in caplog.records) == 1


def test_names_of_scenes_cannot_leave_the_folder(scene, tmp_path):
    inside = tmp_path / "views"
    odd = dataclasses.replace(scene, scene_id="../../etc/passwd")
    ViewCache(inside).pool(odd, **OPTIONS)
    assert len(list(inside.iterdir())) == 1 and os.listdir(tmp_path) == ["views"]


def test_an_empty_pool_is_not_kept(scene, tmp_path):
    pool = ViewCache(tmp_path).pool(scene, source="none")
    assert len(pool) == 0 and not list(tmp_path.iterdir())
    assert ViewCache(tmp_path).embed("s", pool, small_encoder(0), "dual").shape == (0, 8)
