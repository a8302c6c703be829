"""Full fine-tuning with parameters cut over two processes equals one process, and goes on from its checkpoints."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from threedr1.engine import sft
from threedr1.engine.checkpoint import latest_checkpoint
from threedr1.engine.config import save_config
from threedr1.engine.training_state import load_state
from threedr1.models.tiny import TinySize, build_tiny, corpus_texts

from .processes import run_script
from .test_distributed import assert_equal_up_to_rounding, column, run_on_two_ranks
from .test_pipeline import sft_config

pytestmark = pytest.mark.slow

SHARDED = "model.language.sharding=full"


def test_training_equals_one_process(rooms_root, tmp_path):
    more = ("run.batch_size=4", "optim.lr=1e-3")
    sft.train(sft_config(rooms_root, tmp_path / "start", "run.steps=0"))
    sft.train(sft_config(rooms_root, tmp_path / "alone", *more))
    run_on_two_ranks("sft", sft_config(rooms_root, tmp_path / "pair", *more, SHARDED), tmp_path / "sft.yaml")
    for name, tolerance in (("loss", 1e-5), ("grad_norm", 1e-4), ("tokens", 0), ("lr", 0)):
        np.testing.assert_allclose(column(tmp_path / "pair", name), column(tmp_path / "alone", name), rtol=tolerance)
    assert_equal_up_to_rounding(tmp_path / "start", tmp_path / "alone", tmp_path / "pair")


STEPS = """
import gc, json, sys
import torch
from threedr1.engine.config import load_config
from threedr1.engine.data import ObservationCache, load_split
from threedr1.engine.optim import Optimizer
from threedr1.engine.runtime import close_runtime, init_runtime, seed_everything
from threedr1.engine.sft import accumulate_gradients, load_model
from threedr1.engine.sft_data import write_targets
from threedr1.engine.shards import is_sharded
from threedr1.engine.snapshot import twin

runtime = init_runtime("cpu")


def run():
    config = load_config("sft", sys.argv[1], [])
    seed_everything(0)
    model = load_model(config, None, runtime)
    assert is_sharded(model) == (runtime.world_size > 1)
    samples, store = load_split(config.data, config.data.train_split, 0)
    seen = ObservationCache(store, model, seed=0, capacity=8, cache_views=False).of(samples[:5])
    sighted = write_targets(model, samples[:3], seen[:3], pointers="name")
    selector, model.view_selector = model.view_selector, None
    blind = write_targets(model, samples[3:5], seen[3:], pointers="name")
    model.view_selector = selector
    assert all(entry.views for entry in sighted) and not any(entry.views for entry in blind)
    mine = [*sighted, *blind] if runtime.world_size == 1 else [sighted, blind][runtime.rank]
    optimizer = Optimizer(model.trainable_parameters(), config.optim, 4, runtime)
    for step in range(4):
        loss, counts = accumulate_gradients(model, mine, config, optimizer)
        total, tokens = runtime.total(float(loss), counts["tokens"])
        metrics = optimizer.step(step, divisor=tokens)
        if runtime.is_main:
            print(json.dumps([total / tokens, metrics["grad_norm"], tokens]))
    if runtime.world_size > 1:  # to write a copy, as a thread does, must not free what a pass has gathered
        copied, hidden_1D = twin(model), torch.zeros(1, model.language.width)

        def size_after_writing(_, weight_VD):
            copied.state_dict()
            return weight_VD.untyped_storage().size()

        with torch.no_grad():
            assert model(lambda: model.language.at_head(hidden_1D, size_after_writing)) > 0


run()
gc.collect()  # what holds the process group goes before it
close_runtime(runtime)
"""


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_ranks_with_other_numbers_of_packs_and_one_without_pictures(tied, checkpointing, rooms_root, tmp_path):
    """Three packs with pictures on one rank, two without any on the other: one process with all five says the same."""
    size = TinySize(vocab_size=600, width=64, layers=2, heads=4, kv_heads=2, mlp_width=96, vision_width=32, tied=tied)
    build_tiny(tmp_path / "tiny", corpus_texts(rooms_root), size=size)
    more = (SHARDED, "run.micro_batch_size=1", "optim.lr=1e-3", f"model.language.model={tmp_path / 'tiny'}")
    more += (f"model.language.gradient_checkpointing={str(checkpointing).lower()}",)
    save_config(sft_config(rooms_root, tmp_path / "run", *more), tmp_path / "sft.yaml")
    found = []
    for ranks in (1, 2):
        done = run_script(tmp_path / "steps.py", STEPS, str(tmp_path / "sft.yaml"), ranks=ranks)
        assert done.returncode == 0, done.stderr[:6000] + "\n[…]\n" + done.stderr[-2000:]
        found.append([json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")])
    assert len(found[0]) == 4
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)
    assert found[0][-1][0] < found[0][0][0] - 0.01


@pytest.mark.parametrize("sharding", ["none", "full"])
def test_a_run_goes_on_from_one_process_to_two_and_back(sharding, rooms_root, tmp_path):
    more = ("run.save_every=2", "optim.lr=2e-4", "optim.schedule=constant", f"model.language.sharding={sharding}")
    sft.train(sft_config(rooms_root, tmp_path / "alone", *more, "run.steps=6"))
    moved = tmp_path / "moved"
    sft.train(sft_config(rooms_root, moved, *more, "run.steps=2"))
    run_on_two_ranks("sft", sft_config(rooms_root, moved, *more, "run.steps=4"), tmp_path / "two.yaml", "--resume")
    sft.train(sft_config(rooms_root, moved, *more, "run.steps=6"), resume=True)
    np.testing.assert_allclose(column(moved, "loss"), column(tmp_path / "alone", "loss"), atol=1e-6)
    np.testing.assert_array_equal(column(moved, "sequence_tokens"), column(tmp_path / "alone", "sequence_tokens"))


def language_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "model" / "language_model" / "model.safetensors")


def test_a_sharded_bfloat16_model_is_saved_as_one_process_saves_it(rooms_root, tmp_path):
    more = ("run.steps=2", "optim.lr=1e-3", "optim.schedule=constant", "model.language.dtype=bfloat16")
    alone = sft.train(sft_config(rooms_root, tmp_path / "alone", *more))
    run_on_two_ranks("sft", sft_config(rooms_root, tmp_path / "pair", *more, SHARDED), tmp_path / "sft.yaml")
    pair = latest_checkpoint(tmp_path / "pair")
    assert pair is not None
    one, two = language_weights(alone), language_weights(pair)
    assert {name: (value.shape, value.dtype) for name, value in one.items()} == {
        name: (value.shape, value.dtype) for name, value in two.items()
    }
    assert {value.dtype for value in two.values()} == {torch.bfloat16}
    states = [load_state(checkpoint)["optimizer"] for checkpoint in (alone, pair)]
    assert states[0]["masters"].keys() == states[1]["masters"].keys()
    for name, master in states[1]["masters"].items():
        assert master.dtype == torch.float32 and master.shape == states[0]["masters"][name].shape
    head = states[1]["masters"]["language.model.model.language_model.norm.weight"]
    torch.testing.assert_close(head.bfloat16(), two["model.norm.weight"], rtol=0, atol=0)
    for kind, values in states[0]["adam"].items():
        assert {name: value.shape for name, value in values.items()} == {
            name: value.shape for name, value in states[1]["adam"][kind].items()
        }
    sft.train(sft_config(rooms_root, tmp_path / "pair", *more[1:], SHARDED, "run.steps=3"), resume=True)
    assert column(tmp_path / "pair", "step")[-1] == 2
