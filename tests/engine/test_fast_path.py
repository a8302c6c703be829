"""Fast paths against the plain one: the same losses over a run, whichever way blocks run and samples are packed."""

import numpy as np
import pytest
import torch

from threedr1.engine import sft
from threedr1.engine.checkpoint import latest_checkpoint
from threedr1.engine.tracking import read_metrics

from .test_pipeline import sft_config, weights

LORA = ["model.language.train=lora", "model.language.lora_rank=4", "optim.lr=1e-2"]


def losses(rooms_root, run_dir, *more):
    sft.train(sft_config(rooms_root, run_dir, *LORA, *more))
    return np.array([row["loss"] for row in read_metrics(run_dir / "metrics.jsonl")])


@pytest.mark.parametrize("more", [(), ("model.language.gradient_checkpointing=true", "token_budget=400")])
def test_fused_blocks_train_as_plain_ones(rooms_root, tmp_path, more):
    plain = losses(rooms_root, tmp_path / "plain", "run.steps=8", "blocks=plain")
    fused = losses(rooms_root, tmp_path / "fused", "run.steps=8", "blocks=fused", *more)
    assert plain[-1] < plain[0] - 0.05, "it learns, or equal losses would say little"
    np.testing.assert_allclose(fused, plain, rtol=1e-5)
    ours, theirs = (weights(latest_checkpoint(tmp_path / name)) for name in ("fused", "plain"))
    assert ours.keys() == theirs.keys()
    for name, tensors in theirs.items():
        for key, value in tensors.items():
            torch.testing.assert_close(ours[name][key], value, atol=2e-4, rtol=2e-3, msg=f"{name}: {key}")


def test_full_training_refuses_fused_blocks(rooms_root, tmp_path):
    with pytest.raises(ValueError, match="weights that learn cannot be fused"):
        sft.train(sft_config(rooms_root, tmp_path, "run.steps=1", "blocks=fused"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_fast_paths_follow_the_plain_one_in_bfloat16(rooms_root, tmp_path):
    """Over 50 steps the curves differ by less than two seeds' curves do."""
    more = ["run.steps=50", "run.device=cuda", "model.language.dtype=bfloat16", "run.save_every=50"]
    plain = losses(rooms_root, tmp_path / "plain", *more, "blocks=plain")
    other = losses(rooms_root, tmp_path / "seed", *more, "blocks=plain", "run.seed=1")
    noise = np.abs(other - plain).mean()
    for blocks in ("compiled", "fused"):
        fast = losses(rooms_root, tmp_path / blocks, *more, f"blocks={blocks}")
        assert np.abs(fast - plain).mean() < 0.2 * noise, blocks
        assert np.abs(fast - plain).max() < 0.05, blocks
