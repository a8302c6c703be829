"""The splatter's Triton kernels against its plain passes: the same pictures.

Without a GPU the kernels run in Triton's interpreter. It must be on before Triton is imported, so one test starts a
process that runs the others, and all of the splatter's own tests, through the kernels.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from threedr1.utils import splat as splat_module
from threedr1.utils.render import Camera, look_at, pinhole, splat_batch

from ..triton_interpreter import inside, needs_triton, outside, run_through_interpreter

pytestmark = needs_triton


@pytest.mark.slow
@outside
def test_the_splatter_through_the_interpreter():
    here = Path(__file__)
    run_through_interpreter([here.with_name("test_splat.py"), here], "THREEDR1_SPLAT")


def both_ways(monkeypatch, *arguments, device="cpu", **keywords):
    """Pictures of the kernels and of the plain passes."""
    monkeypatch.setenv(splat_module.VARIABLE, "triton")
    found = splat_batch(*arguments, device=device, **keywords)
    monkeypatch.setenv(splat_module.VARIABLE, "torch")
    return found, splat_batch(*arguments, device=device, **keywords)


def cloud_and_cameras(count, views, width, height, seed=0):
    generator = np.random.default_rng(seed)
    # two sheets and some dust, with the cameras among them: discs of all sizes, points behind, holes
    sheets = generator.uniform(-1, 1, (count, 3)) * [1.5, 1.5, 0.02] + generator.choice([-0.8, 0.6], (count, 1)) * [
        0,
        0,
        1,
    ]
    points = np.where(generator.random((count, 1)) < 0.1, generator.uniform(-1, 1, (count, 3)), sheets)
    cameras = [
        Camera(
            look_at((0.9 * np.cos(a), 0.9 * np.sin(a), 0.1), (0, 0, -0.3)), pinhole(width, height, 80), width, height
        )
        for a in np.linspace(0, 6, views)
    ]
    return points, generator.integers(0, 256, (count, 3)), cameras


@inside
@pytest.mark.parametrize(
    ("block", "width", "height", "settings"),
    [
        (256, 20, 12, {"max_pixels": 2}),  # many programs, the last ones in part
        (1 << 14, 70, 41, {"max_pixels": 8}),
        (1 << 14, 66, 130, {"radius": 0.02}),  # two rounds of smoothing
        (1 << 14, 70, 41, {"smooth": False, "background": (3, 0, 251)}),
        (1 << 14, 70, 41, {"fill_holes": False, "background": (3, 0, 251)}),
        (1 << 14, 40, 30, {"max_pixels": 0, "radius": 0.5}),
        (1 << 14, 3, 1, {"radius": 3.0, "max_pixels": 4}),
    ],
)
def test_kernels_equal_the_plain_passes(monkeypatch, block, width, height, settings):
    from threedr1.utils import splat_triton

    monkeypatch.setattr(splat_triton, "BLOCK", block)
    calls, real = [], splat_triton.draw_views
    monkeypatch.setattr(splat_triton, "draw_views", lambda *args, **keys: calls.append(1) or real(*args, **keys))
    found, wanted = both_ways(monkeypatch, *cloud_and_cameras(600, 3, width, height), **settings)
    assert calls == [1] and any(len(np.unique(render.index_HW)) > 2 for render in wanted)
    for there, here in zip(found, wanted, strict=True):
        for name in ("index_HW", "depth_HW", "color_HW3"):
            np.testing.assert_array_equal(getattr(there, name), getattr(here, name))
            assert getattr(there, name).dtype == getattr(here, name).dtype


@inside
def test_several_rounds_of_cameras(monkeypatch):
    points, colors, cameras = cloud_and_cameras(200, 5, 24, 16)
    monkeypatch.setattr(splat_module, "_cameras_at_once", lambda *_: 2)
    found, wanted = both_ways(monkeypatch, points, colors, cameras)
    assert len(found) == 5
    for there, here in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(there.index_HW, here.index_HW)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("count", "size", "settings"),
    [
        (200_000, 224, {}),
        (30_000, 224, {"radius": 0.05}),
        (5_000, 640, {}),  # discs of up to 32 pixels, four rounds of smoothing
        (200_000, 224, {"smooth": False, "fill_holes": False, "background": (3, 0, 251)}),
        (500, 64, {"smooth": False}),
    ],
)
def test_kernels_equal_the_plain_passes_on_a_gpu(monkeypatch, count, size, settings):
    found, wanted = both_ways(monkeypatch, *cloud_and_cameras(count, 8, size, size), device="cuda", **settings)
    for there, here in zip(found, wanted, strict=True):
        agree = there.index_HW == here.index_HW
        assert agree.mean() > 0.9999  # the last bit of a float64 sum may move a point over the border of two pixels
        np.testing.assert_allclose(there.depth_HW[agree], here.depth_HW[agree], rtol=1e-6)
        apart = np.abs(there.color_HW3.astype(int) - here.color_HW3)
        assert (apart[agree] > 1).mean() < 0.001  # neighbours of a pixel that differs
