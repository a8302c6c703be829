"""What share of a step is spent where, by the profiler: kernels by name on a GPU, operators by name on a CPU."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch.profiler import ProfilerActivity, profile

from ._measure import seconds

KERNELS = {
    "operators": re.compile(r"pn2::|_ZN3pn2"),  # ours, demangled or not
    "attention": re.compile(r"fmha|flash|sdpa|attention", re.IGNORECASE),  # cuDNN's hold sdpa in their names
}
OPERATORS = {
    "operators": re.compile(r"threedr1::"),
    "attention": re.compile(r"aten::_?scaled_dot_product"),  # and its backward, where it is one operator
}
_STEPS = 3


def shares(step: Callable[[], object], device: str, step_seconds: float) -> dict[str, float]:
    """Shares of a step's wall time in our point operators and in attention, over a few steps.

    Args:
        step_seconds: wall time of a step without the profiler, which slows the host, not the GPU. On a CPU the wall
            time under the profiler counts.
    """
    on_gpu = device.startswith("cuda")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        profiled = sum(seconds(step, device) for _ in range(_STEPS))
    events = profiler.events() or []
    if on_gpu:
        spent, wall = kernel_seconds(events, KERNELS), _STEPS * step_seconds
    else:
        spent, wall = operator_seconds(events, OPERATORS), profiled
    return {name: taken / wall for name, taken in spent.items()}


def kernel_seconds(events: Iterable[Any], patterns: Mapping[str, re.Pattern[str]]) -> dict[str, float]:
    """Time of the GPU in kernels of each kind. ValueError where the profiler saw no kernel at all."""
    kernels = [event for event in events if event.device_type.name == "CUDA"]
    if not kernels:
        raise ValueError("The profiler saw no kernel of the GPU; let this user read its counters (CUPTI), or use cpu.")
    return {
        name: sum(kernel.time_range.elapsed_us() for kernel in kernels if pattern.search(kernel.name)) / 1e6
        for name, pattern in patterns.items()
    }


def operator_seconds(events: Iterable[Any], patterns: Mapping[str, re.Pattern[str]]) -> dict[str, float]:
    """Time of the CPU in operators of each kind, what they call included; one inside another counts once."""
    events = list(events)
    return {name: _outermost(events, pattern) / 1e6 for name, pattern in patterns.items()}


def _outermost(events: Iterable[Any], pattern: re.Pattern[str]) -> float:
    """Microseconds of the matching events that are not inside of another matching one."""
    total = 0.0
    for event in events:
        parent = event.cpu_parent
        while parent is not None and not pattern.match(parent.name):
            parent = parent.cpu_parent
        if parent is None and pattern.match(event.name):
            total += event.cpu_time_total
    return total
