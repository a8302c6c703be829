"""The camera that stands beside a view's picture."""

import json

import numpy as np
import pytest

from threedr1.utils.camera import Camera, look_at, pinhole
from threedr1.utils.view_cameras import camera_path, read_camera, write_camera


def test_a_camera_is_read_as_it_was_written(tmp_path):
    camera = Camera(look_at(np.array([1.5, 2, 3]), np.zeros(3)), pinhole(64, 48, 60.0), 64, 48)
    picture = tmp_path / "views" / "scene" / "frame-3.jpg"
    write_camera(picture, camera)
    found = read_camera(picture)
    assert found is not None and (found.width, found.height) == (64, 48)
    np.testing.assert_array_equal(found.pose_44, camera.pose_44)
    np.testing.assert_array_equal(found.intrinsics_33, camera.intrinsics_33)
    assert [path.name for path in picture.parent.iterdir()] == ["frame-3.json"]


def test_pictures_without_a_camera(tmp_path):
    assert read_camera(tmp_path / "frame-3.jpg") is None


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", json.dumps({"pose": [[1]], "intrinsics": [[1]], "width": 1, "height": 1})]
)
def test_broken_cameras_are_one_sentence(tmp_path, content):
    camera_path(tmp_path / "a.jpg").write_text(content)
    with pytest.raises(ValueError, match=r"a\.json is not the camera of a view"):
        read_camera(tmp_path / "a.jpg")
