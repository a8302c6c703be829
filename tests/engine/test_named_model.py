"""`main.py names`: the folder it writes, what is refused, and that an adapter learns on it."""

import json

import pytest
import torch

from threedr1.engine import sft
from threedr1.engine.names import write_named
from threedr1.main import main
from threedr1.models.inputs import RowWriter
from threedr1.models.language_model import load_language_model, save_language_model
from threedr1.models.scene_vlm import SceneVLM

from .test_object_token import settings


@pytest.fixture(scope="module")
def named(rooms_root, tmp_path_factory):
    """The rooms' tiny model, which spells names in pieces, with 30 of them as tokens."""
    out = tmp_path_factory.mktemp("named") / "model"
    assert main(["names", "--model", str(rooms_root / "tiny"), "--out", str(out), "--names", "30"]) == 0
    return out


def test_the_folder_holds_a_whole_model_with_names(rooms_root, named):
    before, after = (load_language_model(folder, dtype="auto") for folder in (rooms_root / "tiny", named))
    assert after.dtype == before.dtype
    assert json.loads((named / "config.json").read_text())["text_config"]["vocab_size"] == len(after.tokenizer)
    names = [RowWriter(after.tokenizer)._text(f"<obj{name}>") for name in range(31)]
    assert all(len(ids) == 1 for ids in names[:30]) and len(names[30]) > 1
    assert after.image_processor.to_dict() == before.image_processor.to_dict()


def test_weights_keep_their_precision(rooms_root, tmp_path):
    whole = load_language_model(rooms_root / "tiny", dtype="bfloat16")
    save_language_model(whole, tmp_path / "half")
    out = write_named(str(tmp_path / "half"), tmp_path / "named", names=5)
    named = load_language_model(out, dtype="auto")
    rows = whole.embedding.weight
    assert named.dtype == torch.bfloat16 and torch.equal(named.embedding.weight[: len(rows)], rows)


def test_an_adapter_learns_on_it(rooms_root, named, tmp_path):
    own = [
        *("model.language.name_pool=30", "model.language.token_in_name=true", "model.language.name_in_token=true"),
        *("model.language.train=lora", f"model.language.model={named}"),
    ]
    sft.train(settings(rooms_root, *own, run_dir=tmp_path / "run"))
    model = SceneVLM.from_pretrained(tmp_path / "run" / "checkpoints" / "step-000002" / "model")
    learned = [value for name, value in model.language.named_parameters() if "lora_B" in name]
    assert learned and all(float(value.detach().abs().sum()) for value in learned)  # which start at 0


def test_a_folder_that_is_there_is_kept_and_a_model_that_is_not_is_said(rooms_root, named, tmp_path):
    kept = (named / "config.json").read_bytes()
    with pytest.raises(ValueError, match="is there already; name a new folder"):
        write_named(str(rooms_root / "tiny"), named, names=3)
    assert (named / "config.json").read_bytes() == kept
    with pytest.raises(ValueError, match="there is no such folder"):
        write_named(str(tmp_path / "none"), tmp_path / "new", names=3)
    assert not (tmp_path / "new").exists()
