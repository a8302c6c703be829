"""What the viewers show of a scene, the page to walk around in, and the plan from above."""

import base64
import json

import numpy as np
import pytest
from PIL import Image

from threedr1.datasets.scene import save_scene
from threedr1.utils.camera import Camera, look_at, pinhole
from threedr1.utils.predictions import Prediction, write_predictions
from threedr1.utils.view_cameras import write_camera
from threedr1.visualization import scene_page
from threedr1.visualization.scene_page import page_data, write_scene_page
from threedr1.visualization.shown_boxes import ShownBoxes
from threedr1.visualization.shown_scene import ShownScene, load_shown
from threedr1.visualization.top_view import plan_camera, top_view

from ..odd_scene import BOX, MAGENTA, odd_scene


def decoded(points: dict) -> tuple[np.ndarray, np.ndarray]:
    """Points [N, 3] in the page's frame and colours, as the page's script reads them."""
    places_N3 = np.frombuffer(base64.b64decode(points["positions"]), "<u2").reshape(-1, 3)
    colors_N3 = np.frombuffer(base64.b64decode(points["colors"]), np.uint8).reshape(-1, 3)
    return points["low"] + places_N3 * np.array(points["step"]), colors_N3


def answered(**changes) -> Prediction:
    values = {
        "sample_id": "odd-0",
        "task": "grounding",
        "scene_id": "odd",
        "question": "Where is the <trunk> & what?",
        "text": "<think>First & last.</think><answer>There</answer>",
        "think": "First & last.",
        "answer": "There </script><b>",
        "well_formed": True,
        "boxes": [BOX],
        "target_boxes": [[BOX[0] + 0.8, *BOX[1:]]],
        "references": ["there"],
        "views": ["views/odd/frame-0.jpg"],
        "meta": {"query_box": [*BOX[:6]], "situation": "You stand <here>."},
    }
    return Prediction(**{**values, **changes})


@pytest.fixture
def answers(tmp_path):
    """A folder with a prediction file, one view and its camera, and a data root with the scene."""
    picture = tmp_path / "answers" / "views" / "odd" / "frame-0.jpg"
    picture.parent.mkdir(parents=True)
    Image.fromarray(np.full((48, 64, 3), 120, np.uint8)).save(picture)
    write_camera(
        picture, Camera(look_at(np.array([1232.0, -989, 56.5]), np.array(BOX[:3])), pinhole(64, 48, 60), 64, 48)
    )
    write_predictions(tmp_path / "answers" / "predictions.jsonl", [answered(), answered(sample_id="odd-1", views=[])])
    save_scene(odd_scene(), tmp_path / "data" / "prepared" / "odd.npz")
    return tmp_path / "answers"


def test_questions_come_with_layers_labels_scores_and_cameras(answers):
    (shown,) = load_shown(answers, data_root=answers.parent / "data")
    first, second = shown.questions
    layers = first.layers
    # two boxes of length 1.6, moved along x by 0.8, headings alike at 0.6 rad: dx = 0.8 cos 0.6, dy = 0.8 sin 0.6
    inside = (1.6 - 0.8 * np.cos(0.6)) * (0.7 - 0.8 * np.sin(0.6))
    iou = inside / (2 * 1.6 * 0.7 - inside)
    assert layers["answered"].labels == ["answer IoU"] and layers["answered"].scores[0] == pytest.approx(iou, abs=1e-4)
    assert layers["true"].labels == ["true"] and layers["asked"].labels == ["asked about"]
    assert first.views[0].name == "frame-0" and first.views[0].camera is not None and second.views == []
    assert first.situation == "You stand <here>." and first.references == "there"
    assert shown.objects.labels == ["trunk"] and len(shown.predicted) == 2
    assert shown.predicted.labels == ["odd-0", "odd-1"] and shown.predicted.scores == [None, None]


def test_the_box_of_a_dense_caption_is_the_one_that_it_was_asked_for(answers):
    asked = answered(sample_id="odd-1", task="dense_caption", boxes=[], meta={"query_box": [9.0, 8, 7, 1, 1, 1, 0]})
    question = answered(sample_id="odd-2", boxes=[], meta={"query_box": BOX})  # asked about it, answered none
    write_predictions(answers / "predictions.jsonl", [answered(), asked, question])
    (shown,) = load_shown(answers, data_root=answers.parent / "data")
    assert shown.predicted.labels == ["odd-0", "odd-1"]
    np.testing.assert_allclose(shown.predicted.centers_K3[1], [9, 8, 7])


def test_a_true_box_has_the_label_of_the_object_that_it_is(answers):
    write_predictions(answers / "predictions.jsonl", [answered(target_boxes=[BOX], boxes=[BOX, BOX])])
    (shown,) = load_shown(answers, data_root=answers.parent / "data")
    layers = shown.questions[0].layers
    assert layers["true"].labels == ["trunk"] and layers["answered"].texts() == [
        "answer 1 IoU 1.00",
        "answer 2 IoU 1.00",
    ]


def test_scenes_and_limits(answers, tmp_path):
    scene = odd_scene()
    (shown,) = load_shown(answers / "predictions.jsonl", data_root="nowhere", scene=scene, limit=1)
    assert shown.scene is scene and len(shown.questions) == 1
    scene.scene_id = "other"
    with pytest.raises(ValueError, match="has no answers about other; its scenes are odd"):
        load_shown(answers, data_root="nowhere", scene=scene)
    with pytest.raises(ValueError, match=r"There is no prepared scene nowhere/prepared/odd\.npz; name the data root"):
        load_shown(answers, data_root="nowhere")
    write_predictions(tmp_path / "none.jsonl", [answered(text="")])
    with pytest.raises(ValueError, match="holds no answers to show"):
        load_shown(tmp_path / "none.jsonl", data_root="nowhere")


def test_boxes_lie_on_their_points_in_the_page(answers):
    """Against drift: a scene far from the origin, a turned box; corners in the page are where its points are."""
    (shown,) = load_shown(answers, data_root=answers.parent / "data")
    data = page_data(shown)
    points_N3, colors_N3 = decoded(data["points"])
    object_N3 = points_N3[(colors_N3 == MAGENTA).all(1)]
    np.testing.assert_allclose(points_N3 + data["offset"], shown.scene.points_N3, atol=3e-4)
    assert np.abs(points_N3).max() < 4, "the page's frame has its origin at the floor's centre"
    for boxes in (data["layers"]["objects"], data["questions"][0]["layers"]["answered"]):
        corners_83 = np.array(boxes[0]["corners"])
        gaps_8N = np.linalg.norm(corners_83[:, None] - object_N3, axis=-1)
        assert gaps_8N.min(1).max() < 1e-3, "every corner of the box is a point of the object"
        # along each edge from the first corner, the object fills the box from 0 to 1
        edges_33 = corners_83[[1, 3, 4]] - corners_83[0]
        share_N3 = (object_N3 - corners_83[0]) @ edges_33.T / (edges_33**2).sum(1)
        np.testing.assert_allclose(share_N3.min(0), 0, atol=2e-3)
        np.testing.assert_allclose(share_N3.max(0), 1, atol=2e-3)


def test_cameras_stand_in_the_same_frame(answers):
    """The frustum's axis goes through the middle of what the camera looks at."""
    (shown,) = load_shown(answers, data_root=answers.parent / "data")
    data = page_data(shown)
    (view,) = data["questions"][0]["views"]
    tip_3, *rim = np.array(view["frustum"])
    np.testing.assert_allclose(tip_3 + data["offset"], [1232.0, -989.0, 56.5], atol=1e-3)
    axis_3 = np.mean(rim, axis=0) - tip_3
    wanted_3 = np.array(BOX[:3]) - data["offset"] - tip_3
    cosine = axis_3 @ wanted_3 / np.linalg.norm(axis_3) / np.linalg.norm(wanted_3)
    assert cosine > 0.99999
    assert rim[0][2] > rim[3][2] and rim[1][2] > rim[2][2], "the upper corners come first"


def test_the_page_is_one_file_that_text_cannot_break_out_of(answers, tmp_path):
    (shown,) = load_shown(answers, data_root=answers.parent / "data")
    page = write_scene_page(shown, tmp_path / "out" / "room.html")
    text = page.read_text(encoding="utf-8")
    assert text.count("<script") == 2 and text.count("</script>") == 2
    assert not [word for word in ("http://", "https://", "src=", "@import", "url(") if word in text]
    data = json.loads(text.split('id="data">')[1].split("</script>")[0])
    assert data["questions"][0]["answer"] == "There </script><b>"
    assert data["questions"][0]["views"][0]["picture"] == 0 and len(data["pictures"]) == 1
    assert [path.name for path in page.parent.iterdir()] == ["room.html"]


def test_large_clouds_are_thinned_the_same_way_each_time(answers):
    (shown,) = load_shown(answers, data_root=answers.parent / "data")
    first, second = (page_data(shown, max_points=1000) for _ in range(2))
    assert first == second and len(decoded(first["points"])[0]) == 1000
    assert first["notes"][-1] == f"1,000 of {len(shown.scene.points_N3):,} points shown"


def test_a_room_at_the_limits_stays_below_ten_megabytes(answers, tmp_path):
    """A million points, and 120 views of noise, which no JPEG makes small."""
    rng = np.random.default_rng(0)
    scene = odd_scene()
    scene.points_N3 = (rng.random((1_000_000, 3)) * [8, 6, 3]).astype(np.float32)
    scene.colors_N3 = rng.integers(0, 256, scene.points_N3.shape, dtype=np.uint8)
    scene.origin_3 = np.array([4, 3, 0], np.float32)
    names = [f"views/odd/rendered-{number}.jpg" for number in range(120)]
    for name in names:
        Image.fromarray(rng.integers(0, 256, (96, 128, 3), dtype=np.uint8)).save(answers / name)
    write_predictions(answers / "predictions.jsonl", [answered(views=names)])
    (shown,) = load_shown(answers, data_root="nowhere", scene=scene)
    size = write_scene_page(shown, tmp_path / "room.html").stat().st_size
    assert 3_000_000 < size < 10_000_000


def test_pictures_shrink_until_they_fit_or_are_refused(answers, monkeypatch):
    rng = np.random.default_rng(0)
    files = [answers / f"{number}.png" for number in range(3)]
    for file in files:
        Image.fromarray(rng.integers(0, 256, (600, 600, 3), dtype=np.uint8)).save(file)
    large = scene_page._pictures(files)
    monkeypatch.setattr(scene_page, "_PICTURE_BYTES", sum(map(len, large)) // 3)
    small = scene_page._pictures(files)
    assert len(small) == 3 and sum(map(len, small)) <= sum(map(len, large)) // 3
    monkeypatch.setattr(scene_page, "_PICTURE_BYTES", 1000)
    with pytest.raises(ValueError, match="3 pictures are too many for one page of 10 MB; show fewer questions"):
        scene_page._pictures(files)
    files[0].write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"0\.png is no picture that can be read"):
        scene_page._pictures(files)


def test_text_that_does_not_fit_is_refused(answers, tmp_path, monkeypatch):
    (shown,) = load_shown(answers, data_root=answers.parent / "data")
    monkeypatch.setattr(scene_page, "MAX_BYTES", 10_000)
    with pytest.raises(ValueError, match="10 at most; show fewer questions, with --limit"):
        write_scene_page(shown, tmp_path / "room.html")
    assert not (tmp_path / "room.html").exists()


# the plan ----------------------------------------------------------------------------------------------------------


def test_the_plan_shows_points_and_boxes_at_one_scale():
    """Magenta lies where the box's footprint is, by numbers worked out from the room's extent alone."""
    image_HW3 = top_view(odd_scene(), [], width=680)
    # 6 m on 600 pixels, 40 of margin: 100 pixels a metre; 4 m deep
    assert image_HW3.shape == (480, 680, 3)
    rows, columns = np.nonzero((image_HW3 == MAGENTA).all(-1))
    half_x = (1.6 * np.cos(0.6) + 0.7 * np.sin(0.6)) / 2
    half_y = (1.6 * np.sin(0.6) + 0.7 * np.cos(0.6)) / 2
    left, top = 40 + 100 * (BOX[0] - half_x - 1231.5), 40 + 100 * (-986.1 - BOX[1] - half_y)
    wide, deep = 200 * half_x, 200 * half_y
    found = np.array([columns.min(), columns.max(), rows.min(), rows.max()])
    np.testing.assert_allclose(found, [left, left + wide, top, top + deep], atol=9)  # points are drawn as discs


def test_boxes_of_the_plan_enclose_their_points():
    red = (255, 0, 0)
    image_HW3 = top_view(odd_scene(), [(ShownBoxes.from_rows([BOX], ["trunk"], [0.5]), red)], width=680)
    rows, columns = np.nonzero((image_HW3 == red).all(-1))
    assert rows.min() < 200, "the label stands above the box"
    plain_HW3 = top_view(odd_scene(), [(ShownBoxes.from_rows([BOX]), red)], width=680)
    rows, columns = np.nonzero((plain_HW3 == red).all(-1))
    inner = np.nonzero((top_view(odd_scene(), [], width=680) == MAGENTA).all(-1))
    assert abs(rows.min() - inner[0].min()) < 9 and abs(columns.max() - inner[1].max()) < 9


def test_ceilings_hide_nothing_and_long_rooms_fit():
    scene = odd_scene()
    ceiling_N3 = scene.points_N3[scene.points_N3[:, 2] < 55.01] + np.array([0, 0, 2.4], np.float32)
    scene.points_N3 = np.concatenate([scene.points_N3, ceiling_N3])
    scene.colors_N3 = np.concatenate([scene.colors_N3, np.zeros_like(ceiling_N3, np.uint8)])
    assert (top_view(scene, [], width=680) == MAGENTA).all(-1).sum() > 5000
    camera = plan_camera(np.array([0, 0, 0.0]), np.array([1.0, 30, 3]), 300)
    uv_22, _ = camera.project(np.array([[0, 0, 0.0], [1, 30, 3]]))
    assert camera.height == 1200 and (uv_22 > 30).all() and (uv_22 < [270, 1170]).all()


def test_an_empty_scene_is_refused():
    scene = odd_scene()
    scene.points_N3 = scene.points_N3[:0]
    with pytest.raises(ValueError, match="Scene odd has no points"):
        top_view(scene, [])
    with pytest.raises(ValueError, match="Scene odd has no points"):
        page_data(ShownScene(scene))
