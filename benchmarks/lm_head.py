"""LM head: log-probabilities, entropy, cross-entropy and their gradients against logits in float32 and Liger.

One call is forward and backward through hidden states; the weight is frozen, as under LoRA. The plain peers make the
logits of all tokens in float32, as `transformers` does, and take `log_softmax` or `cross_entropy` of them; on a GPU
where liger-kernel is installed, its fused cross-entropy is a peer too. The peak of memory above the inputs is measured
as well: PyTorch's own count on a GPU; on a CPU the resident memory of the process, where Linux lets its peak be reset.
The floor is the bare products of whole matrices in the input's precision: logits twice and the gradient of hidden
states for log-probabilities, once less for cross-entropy.

Shapes: T tokens, D width, V vocabulary.
"""

import argparse
import functools
import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.lm_head import cross_entropy, token_logprobs
from ._arguments import measuring_parser, positive
from ._measure import Load, median_seconds, report
from .results import Row

CPU_SHAPES = ["1024_896_32000"]
GPU_SHAPES = ["1024_3584_152064", "8192_3584_152064", "16384_3584_152064"]
PEER = "float32 logits and log_softmax"
LOSS_PEER = "float32 logits and cross_entropy"
LIGER = "liger-kernel's fused linear cross-entropy"
Step = Callable[[], tuple[Tensor, ...]]


def plain_logprobs(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of the targets and entropy, each [T], from the whole matrix of logits."""
    logps_TV = torch.log_softmax((hidden_TD @ weight_VD.T).float(), dim=-1)
    entropy_T = -(logps_TV.exp() * logps_TV).sum(-1)
    return logps_TV.gather(1, targets_T[:, None])[:, 0], entropy_T


def plain_cross_entropy(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> Tensor:
    """Mean cross-entropy from the whole matrix of logits."""
    return F.cross_entropy((hidden_TD @ weight_VD.T).float(), targets_T)


def _logprob_step(function: Callable[..., Sequence[Tensor | None]], *inputs: Tensor) -> tuple[Tensor, ...]:
    """One forward and backward pass: the log-probabilities and the gradient of the hidden states."""
    hidden_TD, weight_VD, targets_T = inputs
    hidden_TD = hidden_TD.detach().requires_grad_()
    logps_T, entropy_T = function(hidden_TD, weight_VD, targets_T)[:2]
    assert logps_T is not None and entropy_T is not None
    (logps_T.mean() + 0.01 * entropy_T.mean()).backward()
    assert hidden_TD.grad is not None
    return logps_T.detach(), hidden_TD.grad


def _loss_step(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    """One forward and backward pass: the loss and the gradient of the hidden states."""
    hidden_TD, weight_VD, targets_T = inputs
    hidden_TD = hidden_TD.detach().requires_grad_()
    loss = function(hidden_TD, weight_VD, targets_T)
    loss.backward()
    assert hidden_TD.grad is not None
    return loss.detach(), hidden_TD.grad


def liger_cross_entropy() -> Callable[..., Tensor]:
    """Liger's loss with our order of arguments; its weight gradient is made only where one is required."""
    from liger_kernel.transformers.fused_linear_cross_entropy import (  # pyright: ignore[reportMissingImports]
        LigerFusedLinearCrossEntropyLoss,
    )

    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda hidden_TD, weight_VD, targets_T: loss(weight_VD, hidden_TD, targets_T)


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


def floor_seconds(hidden_TD: Tensor, weight_VD: Tensor, repeats: int, device: str) -> tuple[float, float]:
    """Seconds of the two bare products: logits [T, V], and [T, V] times weight."""
    grad_TV = hidden_TD @ weight_VD.T
    logits, hidden = median_seconds((lambda: hidden_TD @ weight_VD.T, lambda: grad_TV @ weight_VD), repeats, device)
    return logits, hidden


def compare(
    kind: str, shape: str, ours: Step, theirs: Step, peer: str, arguments: argparse.Namespace, note: str
) -> list[Row]:
    """Time, and where it can be known memory, of both; ValueError where they disagree."""
    device = arguments.device
    # in bfloat16 the peers round their logits (of size 1 to 4), and the gradient goes through them
    tolerance = 1e-4 if device == "cpu" else 3e-2
    for mine, other in zip(ours(), theirs(), strict=True):
        distance = float((mine.float() - other.float()).norm() / other.float().norm())
        if not distance <= tolerance:
            raise ValueError(f"The LM head differs from {peer} by {distance:.2%} at {shape}; not measured.")
    mine, other = median_seconds((ours, theirs), arguments.repeats, device)
    rows = [Row(f"lm_head.{kind}_{shape}", 1000 * mine, "ms", peer, 1000 * other, note=note)]
    if device != "cpu" or os.access(_RESET_PEAK, os.W_OK):
        peaks = [peak_mebibytes(action, device) for action in (ours, theirs)]
        kind = "peak" if kind == "step" else f"{kind}_peak"
        rows.append(Row(f"lm_head.{kind}_{shape}", peaks[0], "MiB", peer, peaks[1], note=note))
    return rows


def measure(shape: str, arguments: argparse.Namespace) -> tuple[list[Row], dict[str, str]]:
    """Rows of one shape, and beside the times their floors. ValueError where ours and a peer disagree."""
    num_tokens, width, vocabulary = (int(number) for number in shape.split("_"))
    device = arguments.device
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    hidden_TD = torch.randn(num_tokens, width, generator=generator).to(device, dtype)
    weight_VD = (torch.randn(vocabulary, width, generator=generator) * width**-0.5).to(device, dtype)
    targets_T = torch.randint(vocabulary, (num_tokens,), generator=generator).to(device)
    inputs = (hidden_TD, weight_VD, targets_T)
    tile = dict(zip(("chunk_size", "vocab_chunk_size"), arguments.tile or (), strict=False))
    logprobs = functools.partial(token_logprobs, **tile)
    loss = functools.partial(cross_entropy, ignore_index=None, chunk_size=arguments.chunk)

    logits_seconds, hidden_seconds = floor_seconds(hidden_TD, weight_VD, arguments.repeats, device)
    floors = {"step": 2 * logits_seconds + hidden_seconds, "cross_entropy": logits_seconds + hidden_seconds}
    notes = {kind: f"forward and backward, {str(dtype).removeprefix('torch.')}" for kind in floors}
    if device != "cpu":
        for kind, floor in floors.items():
            notes[kind] += f"; bare products {1000 * floor:,.1f} ms"
    rows = compare(
        "step",
        shape,
        functools.partial(_logprob_step, logprobs, *inputs),
        functools.partial(_logprob_step, plain_logprobs, *inputs),
        PEER,
        arguments,
        notes["step"],
    )
    ours = functools.partial(_loss_step, loss, *inputs)
    theirs = functools.partial(_loss_step, plain_cross_entropy, *inputs)
    rows += compare("cross_entropy", shape, ours, theirs, LOSS_PEER, arguments, notes["cross_entropy"])
    if device != "cpu" and importlib.util.find_spec("liger_kernel"):
        theirs = functools.partial(_loss_step, liger_cross_entropy(), *inputs)
        rows += compare("cross_entropy_liger", shape, ours, theirs, LIGER, arguments, notes["cross_entropy"])
    remarks = {
        f"lm_head.{kind}_{shape}": f"  bare products {1000 * floor:,.1f} ms, {floor / seconds:.0%} of ours"
        for kind, floor in floors.items()
        for seconds in [row.value / 1000 for row in rows if row.name == f"lm_head.{kind}_{shape}"]
    }
    return rows, remarks


def main(argv: Sequence[str] = ()) -> int:
    """Print a table of every shape."""
    parser = measuring_parser("lm_head", __doc__, repeats=5)
    parser.add_argument(
        "--shapes",
        nargs="+",
        metavar="T_D_V",
        help=f"default: {' '.join(CPU_SHAPES)} on a CPU, {' '.join(GPU_SHAPES)} on a GPU",
    )
    parser.add_argument(
        "--tile",
        nargs=2,
        type=positive,
        metavar=("C", "W"),
        help="tokens and vocabulary rows of a tile (default: ours)",
    )
    parser.add_argument(
        "--chunk", type=positive, metavar="C", help="tokens that cross-entropy takes at a time (default: ours)"
    )
    arguments = parser.parse_args(list(argv))
    shapes = arguments.shapes or (CPU_SHAPES if arguments.device == "cpu" else GPU_SHAPES)
    for shape in shapes:
        numbers = shape.split("_")
        if len(numbers) != 3 or not all(number.isdigit() and int(number) for number in numbers):
            parser.error(f"--shapes takes tokens_width_vocabulary, as {CPU_SHAPES[0]}, not {shape}")
    load = Load(arguments)
    rows, remarks = [], {}
    for shape in shapes:
        measured, floors = measure(shape, arguments)
        rows += measured
        remarks |= floors
    installed = [name for name in ("triton", "liger-kernel") if _installed(name)] if arguments.device != "cpu" else []
    report("lm_head", rows, arguments, load, argv=argv, packages=installed, remarks=remarks)
    return 0


def _installed(distribution: str) -> bool:
    return importlib.util.find_spec(distribution.replace("-", "_")) is not None
