"""Sentence encoders: pooled as their checkpoint says, padding or not."""

import json
from pathlib import Path

import pytest
import torch

from threedr1.models.image_encoder import SentenceEncoder, load_text_encoder, resolve_encoder

TEXTS = ["a chair", "the wooden table beside the window, under a lamp"]
FIRST, LAST = 0, -1


def checkpoint(folder: Path, pooling: dict | str | None) -> str:
    """all-MiniLM-L6-v2, which a package brings along, with another word on how it pools."""
    folder.mkdir()
    for path in Path(resolve_encoder("all-MiniLM-L6-v2")).iterdir():
        if path.is_file():
            (folder / path.name).symlink_to(path)
    if pooling is not None:
        (folder / "1_Pooling").mkdir()
        text = pooling if isinstance(pooling, str) else json.dumps(pooling)
        (folder / "1_Pooling" / "config.json").write_text(text, encoding="utf-8")
    return str(folder)


def hidden(encoder: SentenceEncoder, text: str) -> torch.Tensor:
    """Hidden states [L, D] of one text alone, so without padding."""
    with torch.no_grad():
        return encoder.model(**encoder.tokenizer([text], return_tensors="pt")).last_hidden_state[0]


@pytest.mark.parametrize(
    ("said", "pooling"),
    [
        (None, "mean"),
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_lasttoken": True}, "lasttoken"),
        ({"pooling_mode": "cls", "embedding_dimension": 384}, "cls"),
        ({"pooling_mode": ["lasttoken"]}, "lasttoken"),
    ],
)
def test_tokens_are_pooled_as_the_checkpoint_says(tmp_path: Path, said, pooling):
    encoder = load_text_encoder(checkpoint(tmp_path / "encoder", said))
    assert isinstance(encoder, SentenceEncoder) and encoder.pooling == pooling
    pools = {"mean": lambda h: h.mean(0), "cls": lambda h: h[FIRST], "lasttoken": lambda h: h[LAST]}
    for side in ("right", "left"):  # the shorter text is padded there
        encoder.tokenizer.padding_side = side
        found_ND = encoder.embed_texts(TEXTS)
        for row, text in enumerate(TEXTS):
            alone_D = torch.nn.functional.normalize(pools[pooling](hidden(encoder, text)), dim=0)
            if side == "right" or row == 1:  # BERT's positions count padding on the left
                torch.testing.assert_close(found_ND[row], alone_D, atol=1e-5, rtol=1e-4)


def test_the_mask_says_which_token_is_first_and_last():
    from threedr1.models.image_encoder import _pool

    hidden_nLD = torch.arange(8.0).view(2, 4, 1)
    mask_nL = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]])
    assert _pool(hidden_nLD, mask_nL, "cls").tolist() == [[1.0], [4.0]]
    assert _pool(hidden_nLD, mask_nL, "lasttoken").tolist() == [[3.0], [5.0]]
    assert _pool(hidden_nLD, mask_nL, "mean").tolist() == [[2.0], [4.5]]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (
            {"pooling_mode_max_tokens": True},
            "pools tokens by pooling_mode_max_tokens, not by mean or cls or lasttoken",
        ),
        ({"pooling_mode": ["cls", "mean"]}, "pools tokens by cls and mean"),
        ({"pooling_mode_mean_tokens": False}, "pools tokens by nothing"),
        ("{", "Cannot load the encoder"),
    ],
)
def test_other_pooling_is_refused(tmp_path: Path, said, message):
    with pytest.raises(ValueError, match=message):
        load_text_encoder(checkpoint(tmp_path / "encoder", said))
    with pytest.raises(ValueError, match="choose mean, cls, lasttoken"):
        SentenceEncoder(torch.nn.Identity(), None, 8, "max")
