"""Patches made here against Qwen's own image processor, and the vision tower's places and windows against its own."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from threedr1.models.language_model import load_language_model
from threedr1.models.view_pixels import PatchSettings, patchify, stack_images


@pytest.fixture(scope="module")
def language(tiny_qwen):
    return load_language_model(tiny_qwen, dtype="float32").eval()


def pictures(count, height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4))
def test_patches_equal_the_processors(language, count, rows, columns):
    images = pictures(count, 28 * rows, 28 * columns, seed=rows)
    patch_settings = PatchSettings.of(language.image_processor)
    made = language.image_processor(images=list(images), return_tensors="pt")
    assert made["image_grid_thw"].tolist() == [list(patch_settings.grid(28 * rows, 28 * columns))] * count
    ours = patchify(stack_images(list(images), torch.device("cpu")), patch_settings)
    torch.testing.assert_close(ours, torch.as_tensor(made["pixel_values"]), atol=1e-5, rtol=1e-5)


def test_other_sizes_are_left_to_the_processor(language):
    patch_settings = PatchSettings.of(language.image_processor)
    assert patch_settings.grid(56, 57) is None and patch_settings.grid(50, 56) is None
    assert patch_settings.grid(28 * 200, 28 * 200) is None, "above the largest number of pixels"
    assert patch_settings.grid(56, 84) == (1, 4, 6)


@pytest.mark.parametrize("grids", [[(1, 4, 4)], [(1, 8, 8), (1, 8, 8)], [(1, 20, 10), (1, 2, 12), (1, 16, 16)]])
def test_the_vision_tower_sees_what_it_would_work_out_itself(language, grids):
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(sum(rows * columns for _, rows, columns in grids), 1176, generator=generator)
    with torch.no_grad():
        ours = language.embed_images(patches, grids)
        theirs = language.base.model.get_image_features(patches, torch.tensor(grids)).pooler_output
    torch.testing.assert_close(ours, torch.cat(list(theirs)), atol=1e-5, rtol=1e-4)
