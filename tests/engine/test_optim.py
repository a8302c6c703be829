"""Schedule, guarded step, independence of micro-batches."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn

from threedr1.engine.config import OptimConfig
from threedr1.engine.optim import Optimizer, learning_rate
from threedr1.engine.runtime import Runtime

CPU = Runtime(torch.device("cpu"))


def test_schedule_by_hand():
    config = OptimConfig(lr=1.0, min_lr=0.2, warmup_steps=4)
    assert [learning_rate(step, 12, config) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert learning_rate(4, 12, config) == pytest.approx(1.0)
    assert learning_rate(8, 12, config) == pytest.approx(0.6)
    assert learning_rate(12, 12, config) == pytest.approx(0.2)
    constant = OptimConfig(lr=1.0, warmup_steps=0, schedule="constant")
    assert learning_rate(999, 1000, constant) == 1.0
    with pytest.raises(ValueError, match="Unknown optim.schedule 'linear'"):
        learning_rate(1, 2, OptimConfig(schedule="linear", warmup_steps=0))


def make(dtype=torch.float32, **changes):
    torch.manual_seed(0)
    layer = nn.Linear(4, 3).to(dtype)
    config = OptimConfig(**{"lr": 0.1, "warmup_steps": 0, "weight_decay": 0.0, **changes})
    return layer, Optimizer(dict(layer.named_parameters()), config, 10, CPU)


def test_summed_micro_batches_equal_one_batch():
    inputs, results = torch.randn(6, 4, generator=torch.Generator().manual_seed(1)), []
    for size in (6, 2, 5):
        layer, optimizer = make()
        for part in inputs.split(size):
            layer(part).square().sum().backward()
        optimizer.step(0, divisor=6)
        results.append(layer.weight.detach().clone())
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(results[0], results[2])


def test_a_non_finite_gradient_changes_nothing_and_is_counted_then_aborts():
    layer, optimizer = make(max_skipped_steps=2)
    before = layer.weight.detach().clone()
    for step in range(3):
        (layer.weight.sum() * math.inf).backward()
        if step < 2:
            assert optimizer.step(step)["skipped_steps"] == step + 1
        else:
            with pytest.raises(FloatingPointError, match="3 steps in a row"):
                optimizer.step(step)
    assert torch.equal(layer.weight, before)


def test_low_precision_parameters_keep_small_updates_in_their_masters():
    layer, optimizer = make(torch.bfloat16, lr=1e-5)
    before = layer.weight.detach().clone()
    for step in range(100):
        layer.weight.sum().backward()
        optimizer.step(step)
    # each step is below bfloat16's resolution, their sum is not
    assert not torch.equal(layer.weight, before)
    torch.testing.assert_close(optimizer.masters[0].bfloat16(), layer.weight.detach())


def test_nothing_to_train_is_an_error():
    with pytest.raises(ValueError, match="Nothing to train"):
        Optimizer({}, OptimConfig(), 1, CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_buffer_of_gradients_changes_no_bit(dtype):
    """The sum over one rank is what was there; a parameter without a gradient takes part, and stays when it comes."""
    results = []
    for world_size in (1, 2):  # 2: as in a group of several, of which there is one
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3), nn.Linear(3, 3)).to(dtype)
        config = OptimConfig(lr=0.1, warmup_steps=0, max_grad_norm=0.5)
        optimizer = Optimizer(dict(layers.named_parameters()), config, 10, Runtime(CPU.device, 0, world_size))
        if world_size == 2:
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            norms = []
            for step in range(4):
                used = layers[:2] if step in (0, 2) else layers
                used(torch.ones(2, 5, dtype=dtype)).float().square().sum().backward()
                norms.append(optimizer.step(step, divisor=3.0)["grad_norm"])
        finally:
            if world_size == 2:
                dist.destroy_process_group()
        results.append(([parameter.detach().clone() for parameter in layers.parameters()], norms))
    assert results[0][1] == results[1][1] and all(norm > 0 for norm in results[0][1])
    assert all(torch.equal(one, two) for one, two in zip(results[0][0], results[1][0], strict=True))


@pytest.mark.parametrize("fused", [False, True])
def test_an_update_shows_in_the_version_of_a_parameter(fused):
    layer, optimizer = make()
    optimizer.adam = torch.optim.AdamW(optimizer.adam.param_groups, lr=0.1, fused=fused)
    versions = [parameter._version for parameter in layer.parameters()]
    layer(torch.ones(2, 4)).sum().backward()
    optimizer.step(0)
    assert all(now._version > before for now, before in zip(layer.parameters(), versions, strict=True))


def test_a_rank_that_learned_nothing_takes_its_step_like_the_others():
    """Low-precision parameters, whose gradients go through the shared buffer, and not one gradient."""
    parameter = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = Optimizer({"w": parameter}, OptimConfig(lr=0.1, weight_decay=0.0, warmup_steps=0), 10, CPU)
    assert optimizer.step(0)["grad_norm"] == 0
    assert torch.equal(parameter, torch.ones(3, dtype=torch.bfloat16))
