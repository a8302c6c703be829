"""Device, process group, seeds: what every loop needs before it starts."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist

from ..utils.streams import epoch_order, stream

log = logging.getLogger("threedr1")

T = TypeVar("T")
# how long a rank waits for the others: rank 0 may first have to finish writing the checkpoint before, 116 GB at 7B
_PATIENCE = timedelta(minutes=30)


@dataclass(frozen=True)
class Runtime:
    """Where this process runs. `rank` and `world_size` are torchrun's."""

    device: torch.device
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def all_finite(self, finite: bool) -> bool:
        """True where the flag is true on every rank, so that all ranks skip a bad step together."""
        if self.world_size == 1:
            return finite
        flag = torch.tensor(float(finite), device=self.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MIN)
        return bool(flag.item())

    def most(self, count: int) -> int:
        """The largest of the ranks' counts."""
        if self.world_size == 1:
            return count
        largest = torch.tensor(count, device=self.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return int(largest.item())

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in the order of ranks, on every rank. Any value that pickles."""
        if self.world_size == 1:
            return [value]
        values: list[T | None] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return cast(list[T], values)

    def total(self, *values: float) -> list[float]:
        """Sums over ranks."""
        if self.world_size == 1:
            return list(values)
        packed = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(packed)
        return packed.tolist()


def pick_device(name: str) -> torch.device:
    """`auto` takes CUDA where there is one. ValueError where the asked device is missing."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("run.device is cuda, but PyTorch sees no GPU; set run.device=cpu or check the driver.")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"The device is {name!r}; choose auto, cpu or cuda.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"The device is {name}, but there are {torch.cuda.device_count()} GPUs; the first is cuda:0.")
    return device


def init_runtime(device: str = "auto") -> Runtime:
    """Join the process group that torchrun or accelerate launched, if any, and choose the device."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    chosen = pick_device(device)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        return Runtime(chosen)
    rank, local_rank = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    if chosen.type == "cuda":
        chosen = torch.device("cuda", local_rank)
        torch.cuda.set_device(chosen)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=_PATIENCE)
    if rank != 0:
        log.setLevel(logging.WARNING)
    return Runtime(chosen, rank, world_size, local_rank)


def close_runtime(runtime: Runtime) -> None:
    """Leave the process group."""
    if runtime.world_size > 1 and dist.is_initialized():
        dist.destroy_process_group()


_side_streams: dict[torch.device, torch.cuda.Stream] = {}


@contextmanager
def beside(device: torch.device) -> Iterator[None]:
    """Run a block's GPU work on a stream of its own, so that to wait for it is not to wait for all that is queued.

    Before its results are used, `wait_for_beside`. Until other streams have done what they were told, what they read
    must be kept alive: memory that is freed here is used again at once.
    """
    if device.type != "cuda":
        yield
        return
    if device not in _side_streams:
        _side_streams[device] = torch.cuda.Stream(device, priority=-1)
        _side_streams[device].wait_stream(torch.cuda.current_stream(device))
    side = _side_streams[device]
    # each thread has a current GPU of its own, the first at the start
    with torch.cuda.device(device), torch.cuda.stream(side):
        yield


def wait_for_beside(device: torch.device) -> None:
    """Let the current stream wait for what `beside` has been told so far."""
    if device in _side_streams:
        torch.cuda.current_stream(device).wait_stream(_side_streams[device])


def torch_stream(device: torch.device | str, *keys: int) -> torch.Generator:
    """A random stream of torch on a device, by keys as `utils.streams.stream` takes them."""
    generator = torch.Generator(device=device)
    generator.manual_seed(int(stream(*keys).integers(2**62)))
    return generator


def seed_everything(*keys: int) -> None:
    """Seed the global generators (dropout, initial weights) from a stream."""
    seed = int(stream(*keys).integers(2**31))
    torch.manual_seed(seed)
    np.random.seed(seed)


def batch_positions(step: int, batch_size: int, runtime: Runtime) -> range:
    """Places in the endless row of samples that this rank takes at one step.

    A function of the step alone, so resuming needs no sampler state, and the union over ranks is the same for any
    number of ranks.

    Args:
        batch_size: of all ranks together; ValueError where they cannot share it evenly.
    """
    own, rest = divmod(batch_size, runtime.world_size)
    if rest or not own:
        raise ValueError(f"run.batch_size {batch_size} cannot be shared evenly by {runtime.world_size} processes.")
    first = step * batch_size + runtime.rank * own
    return range(first, first + own)


def batch_indices(num_samples: int, step: int, batch_size: int, seed: int, runtime: Runtime) -> list[int]:
    """Rows of the data set that this rank takes at one step, epoch by epoch."""
    rows = []
    for position in batch_positions(step, batch_size, runtime):
        epoch, offset = divmod(position, num_samples)
        rows.append(int(epoch_order(num_samples, seed, epoch)[offset]))
    return rows
