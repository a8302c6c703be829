"""Exported models answer as the trained one does."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from threedr1.datasets.scene import Sample, load_scene
from threedr1.engine import sft
from threedr1.engine.export import export_model, round_weights
from threedr1.models.scene_encoder.encoder import SceneEncoder
from threedr1.models.scene_vlm import SceneVLM

from .test_pipeline import sft_config


@pytest.fixture(scope="module")
def lora_run(rooms_root, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("export") / "run"
    more = ["model.language.train=lora", "model.language.lora_rank=4", "run.steps=3", "optim.lr=3e-2"]
    sft.train(sft_config(rooms_root, run_dir, *more))
    return run_dir


def hidden(folder, scene):
    model = SceneVLM.from_pretrained(folder)
    observation = model.observe(scene)
    sample = Sample("one", "qa", "own", scene.scene_id, "How many chairs are there?", "two")
    row, views = model.write_row(sample, observation, "direct", None)
    with torch.no_grad():
        return model.hidden(model.embed_rows([row], [observation], [views])), model


def test_a_merged_model_is_whole_and_equal(rooms_root, lora_run, tmp_path):
    scene = load_scene(next(iter(sorted((rooms_root / "prepared").glob("*.npz")))))
    theirs, trained = hidden(lora_run / "checkpoints" / "step-000003" / "model", scene)
    merged = export_model(lora_run, tmp_path / "merged", merge=True)
    ours, model = hidden(merged, scene)
    assert trained.language.has_adapter and not model.language.has_adapter
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert not list(merged.rglob("adapter*")) and (merged / "language_model" / "config.json").exists()
    assert (merged / "README.md").exists() and [path.name for path in tmp_path.iterdir()] == ["merged"]
    modes = {path.stat().st_mode & 0o777 for path in merged.rglob("*") if path.is_file()}
    assert modes == {merged.stat().st_mode & 0o666}, "others may read the weights where they may read the folder"
    base = load_file(rooms_root / "tiny" / "model.safetensors")
    found = load_file(merged / "language_model" / "model.safetensors")
    moved = [name for name, value in base.items() if not torch.equal(value, found[name])]
    assert moved and all(".layers." in name and "_proj" in name for name in moved)


def test_a_copy_keeps_the_adapter(lora_run, tmp_path):
    copied = export_model(lora_run, tmp_path / "copied")
    assert (copied / "adapter").is_dir() and SceneVLM.from_pretrained(copied).language.has_adapter


def test_fewer_bits_halve_the_files_and_answers_stay_close(rooms_root, lora_run, tmp_path):
    scene = load_scene(next(iter(sorted((rooms_root / "prepared").glob("*.npz")))))
    theirs, _ = hidden(lora_run, scene)
    half = export_model(lora_run, tmp_path / "half", dtype="float16")
    ours, model = hidden(half, scene)
    assert {value.dtype for value in model.scene_encoder.parameters()} == {torch.float32}
    assert 0 < (ours - theirs).abs().max() < 0.02 * theirs.abs().max()
    sizes = [
        sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
        for folder in (half, lora_run / "checkpoints" / "step-000003" / "model")
    ]
    assert sizes[0] < 0.55 * sizes[1]
    encoder = SceneEncoder.from_pretrained(half / "scene_encoder")
    for name, value in model.scene_encoder.state_dict().items():
        assert torch.equal(value, encoder.state_dict()[name])


def test_weights_that_do_not_fit_are_named(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"wide": torch.tensor([1e6]), "whole": torch.tensor([1 << 40])}, path, {"format": "pt"})
    with pytest.raises(ValueError, match="weights in wide that torch.float16 cannot hold; choose bfloat16"):
        round_weights(path, torch.float16)
    round_weights(path, torch.bfloat16)
    found = load_file(path)
    assert found["wide"].dtype == torch.bfloat16 and found["whole"] == torch.tensor([1 << 40])


def test_what_cannot_be_exported_is_said(lora_run, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="there already; name a new folder"):
        export_model(lora_run, tmp_path / "there")
    with pytest.raises(ValueError, match="no adapter to merge"):
        export_model(export_model(lora_run, tmp_path / "whole", merge=True), tmp_path / "again", merge=True)
    assert not (tmp_path / "again").exists()
