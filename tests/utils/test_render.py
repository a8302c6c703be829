"""Cameras and the rasteriser against hand-computed projections and brute force."""

import numpy as np
import pytest

from threedr1.utils.camera import NEAR_PLANE
from threedr1.utils.render import (
    Camera,
    draw_boxes,
    look_at,
    pinhole,
    rasterize,
)

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def front_camera(width: int = 33, height: int = 25, fov: float = 60) -> Camera:
    """At the origin of the world, looking along +x; +y is left, +z is up."""
    return Camera(look_at((0, 0, 0), (1, 0, 0)), pinhole(width, height, fov), width, height)


def facing_square(x: float, side: float, color: tuple[int, int, int]):
    """Two triangles facing the front camera at distance x."""
    half = side / 2
    corners = [[x, -half, -half], [x, half, -half], [x, half, half], [x, -half, half]]
    return np.array(corners), np.array([[0, 1, 2], [0, 2, 3]]), np.tile([color], (4, 1))


def join(*meshes):
    vertices, faces, colors, start = [], [], [], 0
    for points, triangles, paint in meshes:
        vertices.append(points)
        faces.append(triangles + start)
        colors.append(paint)
        start += len(points)
    return np.concatenate(vertices), np.concatenate(faces), np.concatenate(colors)


class TestCamera:
    def test_projection_by_hand(self):
        camera = Camera(
            look_at((1, 2, 1.5), (2, 2, 1.5)), np.array([[100, 0, 50], [0, 100, 40], [0, 0, 1.0]]), 101, 81
        )
        # 4 m ahead, 1 m to the left (+y) and 0.5 m up: left and above the principal point by 25 and 12.5 pixels
        uv, depth = camera.project(np.array([[5, 3, 2.0], [3, 2, 1.5], [0, 2, 1.5]]))
        np.testing.assert_allclose(depth, [4, 2, -1], atol=1e-12)
        np.testing.assert_allclose(uv[:2], [[25, 27.5], [50, 40]], atol=1e-9)

    def test_pinhole_field_of_view_spans_the_picture(self):
        camera = front_camera(200, 100, 90)
        # the left border of the picture is half a pixel left of the first pixel centre, 45 degrees off
        uv, _ = camera.project(np.array([[1.0, 1.0, 0.0]]))
        np.testing.assert_allclose(uv, [[-0.5, 49.5]], atol=1e-9)

    @pytest.mark.parametrize("target", [(0, 0, -1), (0, 0, 1), (3, 1, -2), (-1, 0, 0)])
    def test_look_at_is_a_rotation_that_looks_there(self, target):
        pose = look_at((0, 0, 0), target)
        np.testing.assert_allclose(pose[:3, :3] @ pose[:3, :3].T, np.eye(3), atol=1e-12)
        assert np.linalg.det(pose[:3, :3]) == pytest.approx(1)
        np.testing.assert_allclose(pose[:3, 2], np.array(target) / np.linalg.norm(target), atol=1e-12)

    def test_straight_down_has_north_up(self):
        camera = Camera(look_at((0, 0, 3), (0, 0, 0)), pinhole(101, 101, 90), 101, 101)
        uv, _ = camera.project(np.array([[1.0, 0, 0], [0, 1.0, 0]]))
        assert uv[0, 0] > 50 and uv[0, 1] == pytest.approx(50)
        assert uv[1, 1] < 50 and uv[1, 0] == pytest.approx(50)

    def test_resized_keeps_relative_positions(self):
        camera = front_camera(64, 48)
        small = camera.resized(32, 16)
        points = np.array([[2, 0.3, -0.2], [4, -1, 0.7]])
        (full, _), (half, _) = camera.project(points), small.project(points)
        # measured from the picture's corner, half a pixel outside the first centre
        np.testing.assert_allclose((half + 0.5) / [32, 16], (full + 0.5) / [64, 48], atol=1e-12)

    def test_bad_cameras(self):
        with pytest.raises(ValueError, match="two distinct points"):
            look_at((1, 1, 1), (1, 1, 1))
        with pytest.raises(ValueError, match="tracking was lost"):
            Camera(np.full((4, 4), -np.inf), np.eye(3), 4, 4)
        with pytest.raises(ValueError, match="4 x 4"):
            Camera(np.eye(3), np.eye(3), 4, 4)
        with pytest.raises(ValueError, match="field of view"):
            pinhole(10, 10, 180)


def brute_force_raster(vertices, faces, camera):
    """Ray by ray in float64: depth along z and face of the nearest hit (Moeller-Trumbore), camera frame."""
    points = camera.to_camera(vertices)
    inverse = np.linalg.inv(camera.intrinsics_33)
    depth = np.full((camera.height, camera.width), np.inf)
    index = np.full((camera.height, camera.width), -1)
    for row in range(camera.height):
        for column in range(camera.width):
            ray = inverse @ np.array([column, row, 1.0])
            for face, (a, b, c) in enumerate(points[faces]):
                edge1, edge2 = b - a, c - a
                p = np.cross(ray, edge2)
                det = edge1 @ p
                if abs(det) < 1e-12:
                    continue
                u = (-a @ p) / det
                q = np.cross(-a, edge1)
                v, z = (ray @ q) / det, (edge2 @ q) / det
                if u >= 0 and v >= 0 and u + v <= 1 and NEAR_PLANE <= z < depth[row, column]:
                    depth[row, column], index[row, column] = z, face
    return np.where(np.isinf(depth), 0, depth), index


class TestRasterize:
    def test_square_by_hand(self):
        # f = 16.5 / tan 30 = 28.58; a square of side 1 at 2 m covers u in 16 +- 7.14: columns 9..23, rows 5..19
        render = rasterize(*facing_square(2, 1, RED), front_camera())
        rows, columns = np.nonzero(render.index_HW >= 0)
        assert (columns.min(), columns.max(), rows.min(), rows.max()) == (9, 23, 5, 19)
        assert len(rows) == 15 * 15
        assert (render.color_HW3[rows, columns] == RED).all()
        np.testing.assert_allclose(render.depth_HW[rows, columns], 2, rtol=1e-6)
        assert (render.color_HW3[0, 0] == 255).all() and render.depth_HW[0, 0] == 0
        assert render.color_HW3.dtype == np.uint8 and render.depth_HW.dtype == np.float32
        assert render.index_HW.dtype == np.int32

    @pytest.mark.parametrize("order", [(0, 1), (1, 0)])
    def test_near_hides_far_in_any_order(self, order):
        squares = [facing_square(2, 0.5, RED), facing_square(3, 3, BLUE)]
        render = rasterize(*join(*(squares[i] for i in order)), front_camera())
        assert tuple(render.color_HW3[12, 16]) == RED and render.depth_HW[12, 16] == pytest.approx(2)
        assert tuple(render.color_HW3[2, 2]) == BLUE and render.depth_HW[2, 2] == pytest.approx(3)
        assert render.index_HW[12, 16] // 2 == order.index(0)

    def test_equal_depth_goes_to_the_lower_face(self):
        render = rasterize(*join(facing_square(2, 1, RED), facing_square(2, 1, BLUE)), front_camera())
        assert tuple(render.color_HW3[12, 16]) == RED

    def test_colours_are_perspective_correct(self):
        # a floor strip from x = 1 (black) to x = 9 (white): colour is linear in the world, not on the screen
        vertices = np.array([[1, -5, -1], [1, 5, -1], [9, 5, -1], [9, -5, -1.0]])
        colors = np.array([[0] * 3, [0] * 3, [240] * 3, [240] * 3])
        camera = front_camera(41, 101, 60)
        render = rasterize(vertices, np.array([[0, 1, 2], [0, 2, 3]]), colors, camera)
        rows = np.nonzero(render.index_HW[:, 20] >= 0)[0]
        assert len(rows) > 20
        depth = camera.intrinsics_33[1, 1] / (rows - 50)
        np.testing.assert_allclose(render.depth_HW[rows, 20], depth, rtol=1e-5)
        np.testing.assert_allclose(render.color_HW3[rows, 20, 0], (depth - 1) / 8 * 240, atol=0.51)

    @pytest.mark.parametrize("seed", range(4))
    def test_equals_brute_force_with_triangles_through_the_camera(self, seed):
        generator = np.random.default_rng(seed)
        vertices = generator.uniform(-2, 2, (36, 3)) + [1.0, 0, 0]
        faces = np.arange(36).reshape(12, 3)
        camera = front_camera(21, 17, 80)
        render = rasterize(vertices, faces, generator.integers(0, 256, (36, 3)), camera)
        depth, index = brute_force_raster(vertices, faces, camera)
        assert (index >= 0).mean() > 0.3
        agree = render.index_HW == index
        assert agree.mean() > 0.99  # pixel centres within rounding of an edge may fall either way
        np.testing.assert_allclose(render.depth_HW[agree], depth[agree], rtol=1e-5)

    def test_watertight_from_inside(self):
        trimesh = pytest.importorskip("trimesh")
        room = trimesh.creation.box((4, 3, 2.5)).subdivide_to_size(0.4)
        for yaw in np.linspace(0, 6, 7):
            eye = np.array([1.2, -0.9, 0.3])
            target = eye + [np.cos(yaw), np.sin(yaw), -0.3]
            camera = Camera(look_at(eye, target), pinhole(64, 48, 90), 64, 48)
            render = rasterize(room.vertices, room.faces, np.full((len(room.vertices), 3), 90), camera)
            assert (render.index_HW >= 0).all()
            assert (render.color_HW3 == 90).all()

    def test_large_mesh_in_chunks_equals_one_chunk(self, monkeypatch):
        from threedr1.utils import render as module

        generator = np.random.default_rng(0)
        vertices = generator.uniform(-1, 1, (300, 3)) + [2.5, 0, 0]
        mesh = (vertices, np.arange(300).reshape(100, 3), generator.integers(0, 256, (300, 3)))
        whole = rasterize(*mesh, front_camera(64, 48))
        monkeypatch.setattr(module, "_CHUNK", 97)
        pieces = rasterize(*mesh, front_camera(64, 48))
        np.testing.assert_array_equal(whole.index_HW, pieces.index_HW)
        np.testing.assert_array_equal(whole.color_HW3, pieces.color_HW3)

    def test_nothing_in_front_and_degenerate_faces(self):
        behind = rasterize(*facing_square(-2, 1, RED), front_camera(), background=BLUE)
        assert (behind.index_HW == -1).all() and (behind.color_HW3 == BLUE).all()
        line = np.array([[2, -1, 0], [2, 0, 0], [2, 1, 0.0]])
        assert (rasterize(line, np.array([[0, 1, 2]]), np.zeros((3, 3)), front_camera()).index_HW == -1).all()
        empty = rasterize(line, np.zeros((0, 3), int), np.zeros((3, 3)), front_camera())
        assert (empty.index_HW == -1).all()

    def test_bad_meshes(self):
        vertices, faces, colors = facing_square(2, 1, RED)
        with pytest.raises(ValueError, match="as many colours"):
            rasterize(vertices, faces, colors[:2], front_camera())
        with pytest.raises(ValueError, match="outside 0..3"):
            rasterize(vertices, faces + 1, colors, front_camera())


class TestDrawBoxes:
    def test_edges_of_a_box_by_hand(self):
        image = np.zeros((25, 33, 3), np.uint8)
        # front face at 2 m, side 1: +- 7.14 pixels around (16, 12); back face at 3 m: +- 4.76
        drawn = draw_boxes(image, np.array([[2.5, 0, 0, 1, 1, 1, 0]]), front_camera(), RED, width=1)
        assert (image == 0).all()
        for pixel in [(5, 16), (19, 16), (12, 9), (12, 23), (7, 16), (12, 11)]:
            assert tuple(drawn[pixel]) == RED, pixel
        assert tuple(drawn[12, 16]) == (0, 0, 0) and tuple(drawn[2, 16]) == (0, 0, 0)

    def test_heading_turns_counter_clockwise(self):
        camera = Camera(look_at((0, 0, 5), (0, 0, 0)), pinhole(101, 101, 60), 101, 101)
        box = np.array([[0, 0, 0, 3, 0.02, 0.02, np.radians(30)]])
        drawn = draw_boxes(np.zeros((101, 101, 3), np.uint8), box, camera, RED, width=1)
        rows, columns = np.nonzero(drawn[..., 0])
        # +x is right and +y up in this picture: 30 degrees counter-clockwise rises to the right
        slope = np.polyfit(columns - 50, 50 - rows, 1)[0]
        assert slope == pytest.approx(np.tan(np.radians(30)), abs=0.03)

    def test_camera_inside_the_box_and_box_behind(self):
        image = np.zeros((25, 33, 3), np.uint8)
        inside = draw_boxes(image, np.array([[0, 0, 0, 4, 1, 1, 0]]), front_camera(), [GREEN])
        assert inside.any()
        behind = draw_boxes(image, np.array([[-5, 0, 0, 1, 1, 1, 0]]), front_camera(), [GREEN])
        assert not behind.any()
        assert not draw_boxes(image, np.zeros((0, 7)), front_camera(), RED).any()
