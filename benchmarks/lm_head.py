"""LM head (log-probabilities, entropy and their gradients) against logits and `log_softmax`.

One call is forward and backward through hidden states; the weight is frozen, as under LoRA. The peer makes the logits
of all tokens in float32, as `transformers` does. The peak of memory above the inputs is measured as well: PyTorch's
own count on a GPU; on a CPU the resident memory of the process, where Linux lets its peak be reset.

Shapes: T tokens, D width, V vocabulary.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..models.lm_head import token_logprobs
from ._arguments import measuring_parser
from ._measure import Load, median_seconds, report
from .results import Row

CPU_SHAPE, GPU_SHAPE = "1024_896_32000", "8192_3584_152064"
PEER = "float32 logits and log_softmax"


def plain_logprobs(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of the targets and entropy, each [T], from the whole matrix of logits."""
    logps_TV = torch.log_softmax((hidden_TD @ weight_VD.T).float(), dim=-1)
    entropy_T = -(logps_TV.exp() * logps_TV).sum(-1)
    return logps_TV.gather(1, targets_T[:, None])[:, 0], entropy_T


def _step(function: Callable[..., Sequence[Tensor | None]], *inputs: Tensor) -> tuple[Tensor, Tensor]:
    """One forward and backward pass: the log-probabilities and the gradient of the hidden states."""
    hidden_TD, weight_VD, targets_T = inputs
    hidden_TD = hidden_TD.detach().requires_grad_()
    logps_T, entropy_T = function(hidden_TD, weight_VD, targets_T)[:2]
    assert logps_T is not None and entropy_T is not None
    (logps_T.mean() + 0.01 * entropy_T.mean()).backward()
    assert hidden_TD.grad is not None
    return logps_T.detach(), hidden_TD.grad


def peak_mebibytes(action: Callable[[], object], device: str) -> float:
    """Memory that a call needs at its peak, above what was there before."""
    if device == "cpu":
        _RESET_PEAK.write_text("5")
        before = _resident_mebibytes("VmRSS")
        action()
        return _resident_mebibytes("VmHWM") - before
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    action()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


_RESET_PEAK = Path("/proc/self/clear_refs")


def _resident_mebibytes(field: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


def measure(shape: str, device: str, repeats: int) -> list[Row]:
    """Time, and on CUDA memory, of one shape. ValueError where ours and the peer disagree."""
    num_tokens, width, vocabulary = (int(number) for number in shape.split("_"))
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    hidden_TD = torch.randn(num_tokens, width, generator=generator).to(device, dtype)
    weight_VD = (torch.randn(vocabulary, width, generator=generator) * width**-0.5).to(device, dtype)
    targets_T = torch.randint(vocabulary, (num_tokens,), generator=generator).to(device)
    inputs = (hidden_TD, weight_VD, targets_T)

    def ours() -> tuple[Tensor, Tensor]:
        return _step(token_logprobs, *inputs)

    def peer() -> tuple[Tensor, Tensor]:
        return _step(plain_logprobs, *inputs)

    # in bfloat16 the peer rounds its logits (of size 1 to 4), and its gradient goes through them
    tolerance = 1e-4 if device == "cpu" else 3e-2
    for mine, theirs in zip(ours(), peer(), strict=True):
        distance = float((mine.float() - theirs.float()).norm() / theirs.float().norm())
        if distance > tolerance:
            raise ValueError(f"The LM head differs from {PEER} by {distance:.2%} at {shape}; not measured.")
    mine, theirs = median_seconds((ours, peer), repeats, device)
    note = f"forward and backward, {str(dtype).removeprefix('torch.')}"
    rows = [Row(f"lm_head.step_{shape}", 1000 * mine, "ms", PEER, 1000 * theirs, note=note)]
    if device != "cpu" or os.access(_RESET_PEAK, os.W_OK):
        peaks = [peak_mebibytes(action, device) for action in (ours, peer)]
        rows.append(Row(f"lm_head.peak_{shape}", peaks[0], "MiB", PEER, peaks[1], note=note))
    return rows


def main(argv: Sequence[str] = ()) -> int:
    """Print a table of every shape."""
    parser = measuring_parser("lm_head", __doc__, repeats=5)
    parser.add_argument(
        "--shapes", nargs="+", metavar="T_D_V", help=f"default: {CPU_SHAPE} on a CPU, {GPU_SHAPE} on a GPU"
    )
    arguments = parser.parse_args(list(argv))
    shapes = arguments.shapes or [CPU_SHAPE if arguments.device == "cpu" else GPU_SHAPE]
    for shape in shapes:
        numbers = shape.split("_")
        if len(numbers) != 3 or not all(number.isdigit() and int(number) for number in numbers):
            parser.error(f"--shapes takes tokens_width_vocabulary, as {CPU_SHAPE}, not {shape}")
    load = Load(arguments)
    rows = [row for shape in shapes for row in measure(shape, arguments.device, arguments.repeats)]
    report("lm_head", rows, arguments, load, argv=argv)
    return 0
