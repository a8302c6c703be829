"""A step's needs made in a thread, while the main thread computes and, now and then, compiles."""

import threading
from collections.abc import Callable

import pytest
import torch
from torch import nn

from threedr1.engine.ahead import Ahead


def test_modules_called_in_the_thread_and_compiling_do_not_meet():
    """torch.fx takes over every module's call while it traces; a thread that calls one meanwhile would fail."""
    layer, begun = nn.Sequential(*[nn.Linear(4, 4) for _ in range(8)]), threading.Event()

    @torch.no_grad()
    def make(step: int) -> float:
        begun.set()
        return sum(float(layer(torch.full((1, 4), float(step))).sum()) for _ in range(400))

    def tracing(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable:
        for _ in range(60):
            torch.fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(lambda x: x.sin().sum(), backend=tracing, dynamic=False)
    with Ahead(make, torch.device("cpu"), num_steps=7, on=True) as ahead:
        expected = [make(step) for step in range(7)]
        for step in range(7):
            assert ahead[step] == expected[step]
            begun.wait(1)
            x = torch.ones(step + 2)  # compiled anew for each length
            torch.testing.assert_close(compiled(x), x.sin().sum())


def test_compiling_waits_for_what_is_being_made_and_holds_up_nothing_afterwards():
    going, let_go, order = threading.Event(), threading.Event(), []

    def make(step: int) -> int:
        if step == 1:
            going.set()
            assert let_go.wait(30)
            order.append("made")
        return step

    torch._dynamo.reset()
    with Ahead(make, torch.device("cpu"), num_steps=3, on=True) as ahead:
        assert ahead[0] == 0
        assert going.wait(30)
        threading.Timer(0.3, let_go.set).start()
        torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2))
        order.append("compiled")
        assert ahead[1] == 1 and ahead[2] == 2
    assert order == ["made", "compiled"]
    torch.compile(lambda x: x + 2, backend="eager")(torch.ones(2))  # after the thread nobody holds it up


def test_outside_of_with_the_thread_would_not_pause_and_there_is_none():
    ahead = Ahead(lambda step: step, torch.device("cpu"), num_steps=3, on=True)
    with pytest.raises(RuntimeError, match="inside `with` alone"):
        ahead[0]
    with ahead:
        assert ahead[0] == 0
    with pytest.raises(RuntimeError, match="inside `with` alone"):
        ahead[1]
    with ahead:  # and again
        assert ahead[1] == 1
