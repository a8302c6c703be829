"""Which points views see, against hand-computed cases and one point after another."""

import numpy as np
import pytest
import torch

from threedr1.utils import projection
from threedr1.utils.camera import NEAR_PLANE
from threedr1.utils.render import Camera, look_at, pinhole, visible_points


def front_camera(width: int = 33, height: int = 25, fov: float = 60) -> Camera:
    """At the origin of the world, looking along +x; +y is left, +z is up."""
    return Camera(look_at((0, 0, 0), (1, 0, 0)), pinhole(width, height, fov), width, height)


def seen_by_one(point_3: np.ndarray, camera: Camera, depth_HW: np.ndarray, tolerance: float) -> bool:
    uv_12, depth_1 = camera.project(point_3[None])
    column, row = np.floor(uv_12[0] + 0.5).astype(int)
    if depth_1[0] < NEAR_PLANE or not (0 <= row < camera.height and 0 <= column < camera.width):
        return False
    surface = depth_HW[row, column]
    return surface > 0 and depth_1[0] <= 1.02 * surface + tolerance


class TestVisiblePoints:
    def test_occlusion_borders_and_tolerance(self):
        points = np.array([[2.0, 0, 0], [2.05, 0, 0], [3.0, 0, 0], [-2.0, 0, 0], [2.0, 30.0, 0], [1.0, 0, 0]])
        camera = front_camera()
        depth = np.full((25, 33), 2.0, np.float32)
        seen = visible_points(points, [camera, camera], [depth, np.zeros_like(depth)], tolerance=0.03)
        # 2.05 lies within 0.03 m + 2 % of 2 m; nothing is seen where no depth was measured
        assert seen.tolist() == [[True, True, False, False, False, True], [False] * 6]

    @pytest.mark.parametrize("together", [1, 700, 1 << 20])  # points times cameras: one camera, two, all
    def test_equals_one_point_after_another_with_pictures_of_several_sizes(self, monkeypatch, together):
        monkeypatch.setattr(projection, "_CPU_PROJECTED", together)
        generator = np.random.default_rng(3)
        points = generator.uniform(-2, 2, (300, 3)).astype(np.float32)
        cameras, depths = [], []
        for width, height in ((33, 25), (8, 20), (64, 5), (1, 1), (33, 25)):
            eye = generator.uniform(-2, 2, 3)
            cameras.append(Camera(look_at(eye, -eye), pinhole(width, height, 80), width, height))
            depths.append(generator.uniform(0.5, 4, (height, width)) * (generator.random((height, width)) > 0.2))
        seen = visible_points(points, cameras, depths, tolerance=0.1)
        wanted = [
            [seen_by_one(point, camera, depth, 0.1) for point in points]
            for camera, depth in zip(cameras, depths, strict=True)
        ]
        assert seen.dtype == bool and 0.05 < np.mean(wanted[0]) < 0.9
        np.testing.assert_array_equal(seen, wanted)

    def test_none_to_look_at_and_none_to_look(self):
        camera, depth = front_camera(), np.ones((25, 33))
        assert visible_points(np.zeros((0, 3)), [camera], [depth]).shape == (1, 0)
        assert visible_points(np.zeros((4, 3)), [], []).shape == (0, 4)

    def test_maps_of_another_size(self):
        with pytest.raises(ValueError, match=r"view 1 is \(33, 25\)"):
            visible_points(np.ones((1, 3)), [front_camera()] * 2, [np.ones((25, 33)), np.ones((33, 25))])

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_a_gpu_sees_what_a_cpu_sees(self):
        generator = np.random.default_rng(4)
        points = generator.uniform(-2, 2, (50_000, 3))
        cameras = [
            Camera(look_at((np.cos(a), np.sin(a), 0.2), (0, 0, 0)), pinhole(60, 40, 75), 60, 40)
            for a in np.linspace(0, 6, 7)
        ]
        depths = [generator.uniform(0, 4, (40, 60)) for _ in cameras]
        found = visible_points(points, cameras, depths, device="cuda")
        wanted = visible_points(points, cameras, depths)
        assert wanted.mean() > 0.02
        assert (
            found == wanted
        ).mean() > 0.9999  # the last bit of a sum may move a point over the border of two pixels
