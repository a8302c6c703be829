"""What a run makes of its hardware: floating-point operations a token, and their share of the device's peak."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..models.scene_vlm import SceneVLM
from .runtime import Runtime

# Dense bfloat16 peaks of the makers' data sheets, FLOP/s, by a part of the device's name.
_PEAKS = {"H200": 989.4e12, "H100": 989.4e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165.2e12}


def training_flops(model: SceneVLM) -> float:
    """Operations of one token forward and backward through the decoder's blocks.

    2 a weight forward, 2 for the gradient of what goes in, and 2 for that of the weight where it learns. Attention,
    the LM head (which sees taught tokens alone) and the vision tower are left out: a share of the peak is a low
    estimate.
    """
    layers = model.language.decoder.layers
    assert isinstance(layers, nn.ModuleList)
    matrices = [parameter for parameter in layers.parameters() if parameter.dim() >= 2]
    return sum(parameter.numel() * (6 if parameter.requires_grad else 4) for parameter in matrices)


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bfloat16 peak in FLOP/s; None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAKS.items() if part in name), None)


def mfu(flops_per_s: float, device: torch.device) -> float:
    """Model FLOPs utilisation: the share of the device's peak; ValueError where that is not known."""
    peak = peak_flops(device)
    if peak is None:
        raise ValueError(f"The bfloat16 peak of {device} is not known; add it to engine/throughput.py.")
    return flops_per_s / peak


class Phases:
    """Seconds that the parts of a step take, by name. On a GPU a part ends when its work is done."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """The block is part of what has this name."""
        begun = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begun

    def read(self) -> dict[str, float]:
        """`seconds/<name>` since the last reading."""
        found = {f"seconds/{name}": value for name, value in self.seconds.items()}
        self.seconds = {}
        return found


class Meter:
    """Tokens a second between two readings, their share of the hardware's peak, and the most memory so far.

    Args:
        flops: operations of one token, as `training_flops` gives them.
    """

    def __init__(self, flops: float, runtime: Runtime):
        self.flops = flops
        self.runtime = runtime
        self._tokens = 0.0
        self._started = time.perf_counter()

    def add(self, tokens: float) -> None:
        """Tokens of all ranks that went through the language model. The host must have waited for their step."""
        self._tokens += tokens

    @property
    def rate(self) -> float:
        """Tokens a second, of all ranks, since the last reading."""
        return self._tokens / max(time.perf_counter() - self._started, 1e-9)

    def read(self) -> dict[str, float]:
        """`tokens_per_s`; `mfu` where the peak is known; `peak_gib` of this process's GPU. The next begins here."""
        device = self.runtime.device
        found = {"tokens_per_s": self.rate}
        if peak_flops(device):
            found["mfu"] = mfu(self.flops * self.rate / self.runtime.world_size, device)
        if device.type == "cuda":
            found["peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        self._tokens, self._started = 0.0, time.perf_counter()
        return found

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent in the block does not count."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self._started += time.perf_counter() - begun
