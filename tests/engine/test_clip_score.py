"""CLIP scores of captions against pictures: a tiny random model in the real format; sets where the truth is known."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from threedr1.engine import clip_score
from threedr1.models.image_encoder import load_text_encoder

from ..models.test_view_selector import WORDS, write_dual_encoder


@pytest.fixture(scope="module", params=["clip", "siglip"])
def model(request, tmp_path_factory) -> str:
    return write_dual_encoder(tmp_path_factory.mktemp("encoder") / request.param, request.param)


@pytest.fixture
def objects(tmp_path):
    """Six captions, and a picture of each, of two formats."""
    captions = {f"cap3d-{number}": " ".join(WORDS[number : number + 2]) for number in range(6)}
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number, name in enumerate(captions):
        pixels = np.random.default_rng(number).integers(0, 255, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(pictures / f"{name}.{'png' if number % 2 else 'jpg'}")
    (tmp_path / "p.json").write_text(json.dumps(captions))
    return captions, pictures, tmp_path / "p.json"


def test_scores_are_those_of_the_embeddings(model, objects):
    captions, pictures, path = objects
    result = clip_score.score_file("object_caption", path, model=model, images=pictures)
    assert (result["model"], result["scorer"], result["items"], result["unit"]) == (model, "clip", 6, "percent")
    encoder = load_text_encoder(model)
    texts_ND = encoder.embed_texts(list(captions.values()))
    files = [pictures / f"{name}.{'png' if row % 2 else 'jpg'}" for row, name in enumerate(captions)]
    images_ND = encoder.embed_images([np.asarray(Image.open(file)) for file in files])
    assert result["metrics"]["CLIP"] == pytest.approx(100 * float((texts_ND * images_ND).sum(1).mean()), abs=1e-3)
    own = (texts_ND * images_ND).sum(1, keepdim=True)
    rank_N = (images_ND @ texts_ND.T >= own - 1e-6).sum(1)
    assert result["metrics"]["R@1"] == pytest.approx(100 * float((rank_N == 1).float().mean()))
    assert result["metrics"]["R@5"] == pytest.approx(100 * float((rank_N <= 5).float().mean()))
    assert result["metrics"]["R@10"] is None and any("only 6 objects" in note for note in result["notes"])
    assert result["intervals"]["CLIP"][0] <= result["metrics"]["CLIP"] <= result["intervals"]["CLIP"][1]


def test_a_picture_is_read_as_rgb(tmp_path):
    Image.new("RGBA", (4, 3), (255, 0, 0, 10)).save(tmp_path / "a.png")
    pixels = clip_score.read_picture(tmp_path / "a.png")
    assert pixels.shape == (3, 4, 3) and pixels.dtype == np.uint8 and pixels[0, 0].tolist() == [255, 0, 0]


def test_what_is_missing_is_named(model, objects):
    _, pictures, path = objects

    def refused(task="object_caption", **options):
        with pytest.raises(ValueError) as caught:
            clip_score.score_file(task, path, **{"model": model, "images": pictures, **options})
        return str(caught.value)

    assert "is for object_caption, not for qa" in refused("qa")
    assert "needs --clip-model" in refused(model=None)
    assert "There is no folder of pictures" in refused(images=pictures / "none")
    assert "embeds text only" in refused(model="all-MiniLM-L6-v2")
    (pictures / "cap3d-3.png").write_bytes(b"no picture")
    assert "cap3d-3.png is not a picture that can be read" in refused()
    for number in (1, 3):
        (pictures / f"cap3d-{number}.png").unlink()
    assert "There is no picture" in refused() and "cap3d-1.png (or .jpg), and 1 more are missing" in refused()
    path.write_text(json.dumps([{"sample_id": "cap3d-0", "text": "a"}] * 2))
    assert "Sample cap3d-0 occurs 2 times" in refused()


def test_right_captions_are_found(monkeypatch, objects):
    """With an encoder that knows the objects, every picture finds its caption."""
    captions, pictures, path = objects

    class Knowing(torch.nn.Module):
        has_images = True

        def embed_texts(self, texts):
            return torch.eye(6)[: len(texts)]

        def embed_images(self, images):
            return torch.eye(6)[: len(images)]

    monkeypatch.setattr(clip_score, "load_text_encoder", lambda name: Knowing())
    result = clip_score.score_file("object_caption", path, model="knowing", images=pictures)
    assert result["metrics"]["CLIP"] == pytest.approx(100) and result["metrics"]["R@1"] == 100
    assert len(captions) == result["items"]
