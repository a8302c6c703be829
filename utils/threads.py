"""How many threads PyTorch's operations on a CPU take."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Let PyTorch's operations that this thread starts run on one core; also a decorator, `@one_thread()`.

    For thousands of operations of some 50,000 numbers: threads wait for one another after each, which takes longer
    than the work, and far longer where other processes have their cores. A thread whose first operation of all falls
    into that time keeps to one core.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
