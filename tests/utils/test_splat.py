"""The point splatter against hand-computed pixels and brute force, on every device, however the work is cut."""

import os

import numpy as np
import pytest
import torch

from threedr1.utils import splat as splat_module
from threedr1.utils.camera import NEAR_PLANE
from threedr1.utils.render import Camera, look_at, pinhole, splat, splat_batch
from threedr1.utils.splat import disc_half_widths, point_radii

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


@pytest.fixture(autouse=True)
def large_programs(monkeypatch):
    """Triton's interpreter, where `test_splat_triton.py` runs these tests, takes its time a program."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        from threedr1.utils import splat_triton

        monkeypatch.setattr(splat_triton, "BLOCK", 1 << 14)


def front_camera(width: int = 33, height: int = 25, fov: float = 60) -> Camera:
    """At the origin of the world, looking along +x; +y is left, +z is up."""
    return Camera(look_at((0, 0, 0), (1, 0, 0)), pinhole(width, height, fov), width, height)


def assert_same_render(found, wanted):
    np.testing.assert_array_equal(found.index_HW, wanted.index_HW)
    np.testing.assert_array_equal(found.depth_HW, wanted.depth_HW)
    np.testing.assert_array_equal(found.color_HW3, wanted.color_HW3)


def brute_force_splat(points, radius_pixels, rise_metres, camera):
    """One disc of the same pixel radius a point, paraboloid depth, in float64."""
    uv, depth = camera.project(points)
    best = np.full((camera.height, camera.width), np.inf)
    index = np.full((camera.height, camera.width), -1)
    for point in range(len(points)):
        if depth[point] < NEAR_PLANE:
            continue
        centre_u, centre_v = np.floor(uv[point] + 0.5).astype(int)
        for row in range(centre_v - radius_pixels, centre_v + radius_pixels + 1):
            for column in range(centre_u - radius_pixels, centre_u + radius_pixels + 1):
                square = (row - centre_v) ** 2 + (column - centre_u) ** 2
                if square > (radius_pixels + 0.5) ** 2 or not (
                    0 <= row < camera.height and 0 <= column < camera.width
                ):
                    continue
                key = depth[point] + rise_metres * square / (radius_pixels + 0.5) ** 2
                if key < best[row, column]:
                    best[row, column], index[row, column] = key, point
    return index, depth


class TestSplat:
    def test_one_point_by_hand(self):
        camera = front_camera()
        render = splat(np.array([[2.0, 0, 0]]), np.array([RED]), camera, radius=0.2, fill_holes=False)
        # 28.58 * 0.2 / 2 = 2.86 pixels, limited to 33 // 16 = 2: rows of half width 2, 2, 1 (within 2.5 pixels)
        assert disc_half_widths(2) == [2, 2, 1]
        assert (render.index_HW == 0).sum() == 5 * 3 + 3 * 2
        assert tuple(render.color_HW3[12, 16]) == RED and render.depth_HW[12, 16] == 2
        assert render.index_HW[12, 18] == 0 and render.index_HW[12, 19] == -1 and render.index_HW[14, 18] == -1

    def test_near_hides_far(self):
        points = np.array([[3.0, 0, 0], [2.0, 0, 0], [2.0, 0.5, 0]])
        render = splat(points, np.array([RED, GREEN, BLUE]), front_camera(), radius=0.01, smooth=False)
        assert render.index_HW[12, 16] == 1 and tuple(render.color_HW3[12, 16]) == GREEN
        # 0.5 m left at 2 m: 28.58 * 0.25 = 7.1 pixels
        assert render.index_HW[12, 9] == 2 and (render.index_HW >= 0).sum() == 2

    @pytest.mark.parametrize(("radius_pixels", "seed"), [(1, 0), (2, 1), (3, 2), (6, 3)])
    def test_equals_brute_force(self, radius_pixels, seed):
        generator = np.random.default_rng(seed)
        camera = front_camera(48, 40, 70)
        points = generator.uniform(-1.2, 1.2, (60, 3)) + [2.0, 0, 0]
        # huge discs, all limited to the same pixel radius
        render = splat(
            points, np.zeros((60, 3)), camera, radius=9.0, max_pixels=radius_pixels, fill_holes=False, smooth=False
        )
        index, depth = brute_force_splat(points.astype(np.float32), radius_pixels, 18.0, camera)
        assert (index >= 0).mean() > 0.05
        assert (render.index_HW == index).mean() > 0.995  # 0.1 mm depth steps may settle near ties differently
        seen = (render.index_HW >= 0) & (render.index_HW == index)
        np.testing.assert_allclose(render.depth_HW[seen], depth[index[seen]], rtol=1e-5)

    @pytest.mark.parametrize("radius", [None, 0.03, 0.1])  # radii of all sizes, of the smaller ones, of the middle
    @pytest.mark.parametrize(("cameras_at_once", "radii_at_once"), [(1, 1), (3, 2), (9, 99)])
    def test_batch_equals_single_views_whatever_is_drawn_together(
        self, monkeypatch, cameras_at_once, radii_at_once, radius
    ):
        generator = np.random.default_rng(5)
        points = generator.uniform(-1, 1, (400, 3))
        colors = generator.integers(0, 256, (400, 3))
        cameras = [
            Camera(look_at((2 * np.cos(a), 2 * np.sin(a), 0.5), (0, 0, 0)), pinhole(40, 30, 60), 40, 30)
            for a in np.linspace(0, 6, 5)
        ]
        single = [splat(points, colors, camera, radius=radius, max_pixels=6) for camera in cameras]
        monkeypatch.setattr(splat_module, "_cameras_at_once", lambda *_: cameras_at_once)
        monkeypatch.setattr(splat_module, "_radii_at_once", lambda _: radii_at_once)
        batch = splat_batch(points, colors, cameras, radius=radius, max_pixels=6)
        for alone, render in zip(single, batch, strict=True):
            assert len(np.unique(render.index_HW)) > 20
            assert_same_render(render, alone)

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    @pytest.mark.parametrize("radius", [None, 0.01, 0.05])
    def test_gpu_equals_cpu_even_where_float32_products_are_rough(self, radius):
        y, z = np.meshgrid(np.linspace(-2, 2, 260), np.linspace(-1, 1.5, 190))
        generator = np.random.default_rng(0)
        walls = [np.stack([np.full(y.size, side), y.ravel(), z.ravel()], 1) for side in (-2.5, 2.5)]
        floor = generator.uniform((-2.5, -2, -1), (2.5, 2, -0.99), (60_000, 3))
        points = np.concatenate([*walls, floor, generator.normal(0, 0.3, (20_000, 3))])
        colors = generator.integers(0, 256, points.shape)
        cameras = [
            Camera(look_at((1.5 * np.cos(a), np.sin(a), 0.6), (0, 0, 0)), pinhole(224, 224, 75), 224, 224)
            for a in np.linspace(0, 6, 16)
        ]
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            found = splat_batch(points, colors, cameras, radius=radius, device="cuda")
        finally:
            torch.set_float32_matmul_precision(precision)
        wanted = splat_batch(points, colors, cameras, radius=radius)
        for there, here in zip(found, wanted, strict=True):
            agree = there.index_HW == here.index_HW
            assert agree.mean() > 0.9999  # the last bit of a sum may move a point over the border of two pixels
            np.testing.assert_allclose(there.depth_HW[agree], here.depth_HW[agree], rtol=1e-6)
            apart = np.abs(there.color_HW3.astype(int) - here.color_HW3)
            assert (apart[agree] > 1).mean() < 0.001  # neighbours of a pixel that differs

    def test_radii_counted_in_a_table_or_by_sorting_are_the_same(self, monkeypatch):
        points = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (3000, 3)).astype(np.float32))
        table = point_radii(points)
        monkeypatch.setattr(splat_module, "_GRID", 0)
        assert table.unique().numel() > 5
        torch.testing.assert_close(point_radii(points), table, rtol=0, atol=0)

    def test_radius_of_a_cell_by_hand(self):
        # 100 points in one cell, 1 in a far one: 0.15 / sqrt(100), and never above 0.15 / sqrt(100 / 4)
        points = torch.cat([torch.full((100, 3), 0.05), torch.tensor([[3.0, 0.0, 0.0]]), torch.zeros(1, 3)])
        radius = point_radii(points)
        assert radius[:100].numpy() == pytest.approx(0.15 / np.sqrt(101))
        assert radius[100].item() == pytest.approx(0.15 / np.sqrt(101 / 4))

    def test_very_far_points_and_very_large_discs_do_not_wrap_around(self):
        points = np.array([[3e5, 0, 0], [2.0, 0, 0], [3e5, 6e4, 0]])
        near_wins = splat(points, np.array([BLUE, RED, GREEN]), front_camera(), radius=0.01, smooth=False)
        # 28.58 * 0.2 = 5.7 pixels left of the middle
        assert near_wins.index_HW[12, 16] == 1 and near_wins.index_HW[12, 10] == 2
        assert near_wins.depth_HW[12, 10] == pytest.approx(3e5)
        huge = splat(points, np.array([BLUE, RED, GREEN]), front_camera(), radius=1e6, fill_holes=False)
        assert huge.index_HW[12, 16] == 1 and (huge.index_HW == 1).sum() == 5 * 3 + 3 * 2

    def test_adaptive_radius_closes_a_wall_and_keeps_what_is_behind_hidden(self):
        y, z = np.meshgrid(np.arange(-2, 2, 0.05), np.arange(-2, 2, 0.05))
        wall = np.stack([np.full(y.size, 2.0), y.ravel(), z.ravel()], 1)
        behind = wall + [1.0, 0, 0]
        colors = np.concatenate([np.tile([RED], (len(wall), 1)), np.tile([BLUE], (len(wall), 1))])
        camera = front_camera(96, 96, 80)
        render = splat(np.concatenate([wall, behind]), colors, camera)
        assert (render.color_HW3 == RED).all()
        assert (render.index_HW < len(wall)).all() and (render.index_HW >= 0).all()

    def test_holes_are_filled_with_what_lies_behind_their_rim(self):
        y, z = np.meshgrid(np.linspace(-1, 1, 41), np.linspace(-1, 1, 41))
        wall = np.stack([np.full(y.size, 2.0), y.ravel(), z.ravel()], 1)
        keep = np.abs(wall[:, 1:]).max(1) > 0.08
        near = np.array([[1.5, 0.06, 0.0]])  # a nearer point at the rim must not spread into the hole
        points = np.concatenate([wall[keep], near])
        colors = np.concatenate([np.tile([RED], (keep.sum(), 1)), [BLUE]])
        camera = front_camera(64, 64, 40)
        plain = splat(points, colors, camera, radius=0.03, fill_holes=False, smooth=False)
        filled = splat(points, colors, camera, radius=0.03, smooth=False)
        hole = plain.index_HW[16:48, 16:48] < 0
        assert hole.sum() > 10
        assert (filled.index_HW[16:48, 16:48] >= 0).all()
        assert (filled.color_HW3[16:48, 16:48][hole] == RED).all()
        same = plain.index_HW >= 0
        np.testing.assert_array_equal(filled.index_HW[same], plain.index_HW[same])

    def test_smoothing_mixes_on_one_surface_only(self):
        y, z = np.meshgrid(np.linspace(-2, 2, 161), np.linspace(-2, 2, 161))
        wall = np.stack([np.full(y.size, 3.0), y.ravel(), z.ravel()], 1)
        near = wall[(np.abs(wall[:, 1:]) < 0.5).all(1)] - [1.0, 0, 0]
        generator = np.random.default_rng(0)
        noise = generator.integers(80, 120, (len(wall), 3))
        colors = np.concatenate([noise, np.full((len(near), 3), 250)])
        camera = front_camera(96, 96, 60)
        rough = splat(np.concatenate([wall, near]), colors, camera, smooth=False)
        soft = splat(np.concatenate([wall, near]), colors, camera)
        far = rough.index_HW < len(wall)
        assert soft.color_HW3[far].astype(float).std() < 0.6 * rough.color_HW3[far].astype(float).std()
        assert soft.color_HW3[far].max() < 121 and (soft.color_HW3[~far] == 250).all()

    def test_real_cloud_is_dense(self, real_data):
        cloud = np.load(real_data / "scannet" / "scene0000_00_cloud.npz")
        points, colors = cloud["xyz"], cloud["rgb"]
        middle = (points.min(0) + points.max(0)) / 2
        eye = np.array([middle[0], middle[1], 1.5])
        cameras = [
            Camera(look_at(eye, eye + [np.cos(a), np.sin(a), -0.4]), pinhole(96, 96, 70), 96, 96)
            for a in (0.0, 1.5, 3.0)
        ]
        for render in splat_batch(points, colors, cameras):
            assert (render.index_HW >= 0).mean() > 0.85  # windows and unscanned ceiling stay open
            assert render.color_HW3[render.index_HW >= 0].std() > 20

    def test_a_cpu_takes_one_thread_and_gives_the_others_back(self, monkeypatch):
        taken, real = [], splat_module.point_radii
        monkeypatch.setattr(
            splat_module, "point_radii", lambda points: taken.append(torch.get_num_threads()) or real(points)
        )
        before = torch.get_num_threads()
        torch.set_num_threads(3)
        try:
            splat(np.ones((2, 3)), np.zeros((2, 3)), front_camera())
            assert taken == [1] and torch.get_num_threads() == 3
        finally:
            torch.set_num_threads(before)

    def test_bad_clouds(self):
        camera = front_camera()
        with pytest.raises(ValueError, match="no points"):
            splat(np.zeros((0, 3)), np.zeros((0, 3)), camera)
        with pytest.raises(ValueError, match="not finite"):
            splat(np.array([[np.nan, 0, 0]]), np.zeros((1, 3)), camera)
        with pytest.raises(ValueError, match="as many colours"):
            splat(np.zeros((2, 3)), np.zeros((1, 3)), camera)
        with pytest.raises(ValueError, match="picture size"):
            splat_batch(np.ones((1, 3)), np.zeros((1, 3)), [camera, front_camera(10, 10)])
        assert splat_batch(np.ones((1, 3)), np.zeros((1, 3)), []) == []
