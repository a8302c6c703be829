"""What a loop needs at each step, made in a thread while the GPU computes the step before."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from threading import Lock
from typing import Generic, TypeVar

import torch
from torch._dynamo.callback import callback_handler

from .runtime import beside, wait_for_beside

T = TypeVar("T")


class Ahead(Generic[T]):
    """`make(step)` for one step after the other, on a GPU on a stream of its own.

    A context manager, in which the thread runs. What was given out last must be kept until its step is done: the GPU
    reads it, and what is freed is used again at once.

    While torch compiles, the thread pauses: to trace, torch.fx takes over the call of every module of the process, and
    one that another thread calls meanwhile is "not installed as a submodule".

    Args:
        make: what a step needs; it may depend on nothing that a step moves.
        num_steps: of the run.
        on: whether the thread is used; without it all is made here and now.
    """

    def __init__(self, make: Callable[[int], T], device: torch.device, *, num_steps: int, on: bool):
        self.make = make
        self.device = device
        self.num_steps = num_steps
        self.on = on
        self._thread: ThreadPoolExecutor | None = None
        self._coming: tuple[int, Future[T]] | None = None
        self._calling_modules = Lock()  # held by the thread while it makes something, or by a compilation

    def _beside(self, step: int) -> T:
        with self._calling_modules, beside(self.device):
            return self.make(step)

    def _before_compiling(self, *_: object) -> None:
        self._calling_modules.acquire()

    def _after_compiling(self, *_: object) -> None:
        self._calling_modules.release()

    def __getitem__(self, step: int) -> T:
        """What a step needs; steps are asked for in order. RuntimeError where the thread was not started."""
        if not self.on:
            return self.make(step)
        if self._thread is None:
            raise RuntimeError("Ahead makes things in its thread inside `with` alone, where compilations wait for it.")
        if self._coming is None or self._coming[0] != step:
            self.settle()
            self._coming = step, self._thread.submit(self._beside, step)
        made = self._coming[1].result()
        wait_for_beside(self.device)
        self._coming = None
        if step + 1 < self.num_steps:
            self._coming = step + 1, self._thread.submit(self._beside, step + 1)
        return made

    def settle(self) -> None:
        """Wait until nothing is being made, so that the model may be used for something else."""
        if self._coming is not None:
            wait([self._coming[1]])
            wait_for_beside(self.device)

    def __enter__(self) -> "Ahead[T]":
        if self.on:
            self._thread = ThreadPoolExecutor(1)
            callback_handler.register_start_callback(self._before_compiling)
            callback_handler.register_end_callback(self._after_compiling)
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
            self._thread = self._coming = None
            with suppress(ValueError):  # torch._dynamo.reset() has taken them away
                callback_handler.remove_start_callback(self._before_compiling)
                callback_handler.remove_end_callback(self._after_compiling)
