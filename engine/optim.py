"""AdamW, learning-rate schedule, and the guarded optimiser step that every loop takes."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from .config import OptimConfig
from .runtime import Runtime, log
from .shards import as_sharded, own_rows, rows_of
from .skipped import MicroBatch, save_skipped

_LINE = 32  # numbers
_KEPT = 1 << 28  # numbers of the buffer of gradients at most, for it to stay between steps: 1 GiB


def learning_rate(step: int, total_steps: int, config: OptimConfig) -> float:
    """Learning rate of a step: linear warm-up, then cosine from lr to min_lr, or constant."""
    if config.schedule not in ("cosine", "constant"):
        raise ValueError(f"Unknown optim.schedule {config.schedule!r}; choose cosine or constant.")
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


class Optimizer:
    """AdamW over float32 masters of the trained parameters, with clipping and non-finite steps skipped.

    Low-precision parameters get a float32 master copy: bfloat16 rounds small updates away. Of sharded parameters
    (sharding.py) each rank moves its own rows; their gradients come summed over ranks.

    Parameters that every rank has whole need one all-reduce a step, of all gradients in one float32 buffer, after the
    last backward pass. That is what DistributedDataParallel gives when its no_sync holds for all passes but the last,
    with a sum for its mean; and since no pass communicates, ranks may make different numbers of them.

    Args:
        parameters: trained parameters by name. Matrices decay; vectors (norms, biases) do not.
        config: optimiser settings.
        total_steps: length of the schedule.
        lr_factors: factor on the learning rate of single parameters, by name; 1 for all others.
        skipped_dir: where the batches of skipped steps are written for inspection; None writes none.
        low_precision: names of float32 parameters that a saved model holds in less, so that a checkpoint needs both.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        config: OptimConfig,
        total_steps: int,
        runtime: Runtime,
        *,
        lr_factors: Mapping[str, float] | None = None,
        skipped_dir: Path | None = None,
        low_precision: Iterable[str] = (),
    ):
        if not parameters:
            raise ValueError("Nothing to train: every parameter is frozen.")
        learning_rate(0, total_steps, config)  # refuses an unknown schedule before the first step
        self.config = config
        self.total_steps = total_steps
        self.runtime = runtime
        self.skipped_dir = skipped_dir
        self.names = list(parameters)
        self.parameters = list(parameters.values())
        self.low_precision = set(low_precision)
        self.sharded = [isinstance(parameter, DTensor) for parameter in self.parameters]
        self.masters = [_master(parameter) for parameter in self.parameters]
        self._buffer: torch.Tensor | None = None
        factors = [(lr_factors or {}).get(name, 1.0) for name in parameters]
        self.group_factors: list[float] = []
        groups = []
        for factor in sorted(set(factors) | {1.0}):
            mine = [master for master, its in zip(self.masters, factors, strict=True) if its == factor]
            decayed, plain = [[master for master in mine if (master.dim() >= 2) == matrix] for matrix in (True, False)]
            groups.append({"params": decayed, "weight_decay": config.weight_decay})
            groups.append({"params": plain, "weight_decay": 0.0})
            self.group_factors += [factor, factor]
        on_gpu = all(master.is_cuda for master in self.masters)
        betas = (config.beta1, config.beta2)
        self.adam = torch.optim.AdamW(groups, lr=config.lr, betas=betas, fused=on_gpu or None)
        self.skipped_in_a_row = 0
        self.skipped = 0
        self.noted: list[MicroBatch] = []

    def note(
        self,
        sample_ids: Sequence[str],
        tasks: Sequence[str],
        loss: float | torch.Tensor,
        *,
        texts: Sequence[str] = (),
    ) -> None:
        """Say what a backward pass of the coming step was about.

        A loss that is not finite skips the step as a gradient does, and what was noted is written where it is skipped.

        Args:
            texts: the completions, where there are any.
        """
        kept = loss.detach() if isinstance(loss, torch.Tensor) else loss
        self.noted.append(MicroBatch(list(sample_ids), list(tasks), kept, list(texts)))

    def step(self, step: int, divisor: float = 1.0) -> dict[str, float]:
        """Sum gradients over ranks, divide, clip, update, clear. A non-finite one skips the step on every rank.

        Args:
            step: number of the step, for the schedule.
            divisor: what the summed loss is the mean over, on ALL ranks together: taught tokens, completions, ...
                Dividing here makes the result independent of micro-batches and of the number of ranks.

        Raises:
            FloatingPointError: more non-finite steps in a row than max_skipped_steps.
        """
        own_norms = self._sum_gradients()
        gradients = [master.grad for master in self.masters if master.grad is not None]
        if divisor != 1.0:
            torch._foreach_div_(gradients, divisor)  # type: ignore[reportPrivateImportUsage]
        norm_0 = self._norm()
        torch.nn.utils.clip_grads_with_norm_(self.masters, self.config.max_grad_norm or math.inf, norm_0)
        norm = float(norm_0)
        rate = learning_rate(step, self.total_steps, self.config)
        for group, factor in zip(self.adam.param_groups, self.group_factors, strict=True):
            group["lr"] = rate * factor
        noted, self.noted = self.noted, []
        if self.runtime.all_finite(math.isfinite(norm) and all(batch.is_finite for batch in noted)):
            self.adam.step()
            self.skipped_in_a_row = 0
            with torch.no_grad():
                for parameter, master in zip(self.parameters, self.masters, strict=True):
                    if not _shares(master, parameter):
                        parameter.copy_(master)
            # the fused update does not say that it changed them; what was made of a parameter is made again by this
            torch.autograd.graph.increment_version(self.parameters)
        else:
            self._skip(step, noted, own_norms.tolist())
        self.adam.zero_grad(set_to_none=True)
        for parameter in self.parameters:
            parameter.grad = None
        return {"lr": rate, "grad_norm": norm, "skipped_steps": float(self.skipped)}

    def _sum_gradients(self) -> torch.Tensor:
        """Give every master the gradient summed over ranks; returns their norms from before that, [parameters].

        Those of sharded parameters were summed in the backward pass.
        """
        wholes = []
        for parameter, master, sharded in zip(self.parameters, self.masters, self.sharded, strict=True):
            if not sharded:
                wholes.append((parameter, master))
                continue
            rows = own_rows(parameter)
            if rows.data_ptr() != master.data_ptr():
                master.data = rows  # fully_shard may move what it pads at the first forward pass
            master.grad = torch.zeros_like(master) if parameter.grad is None else own_rows(parameter.grad)
        if self.runtime.world_size > 1 or any(master is not parameter for parameter, master in wholes):
            flat = self._gather_in_buffer(wholes)
        else:
            flat = None
            for parameter, _ in wholes:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        own_norms = torch.stack(_norms([master.grad for master in self.masters]))
        if flat is not None and self.runtime.world_size > 1:
            dist.all_reduce(flat, op=dist.ReduceOp.SUM)
        return own_norms

    def _gather_in_buffer(self, wholes: Sequence[tuple[nn.Parameter, torch.Tensor]]) -> torch.Tensor | None:
        """Move the gradients of parameters into one float32 buffer, where they are their masters' gradients."""
        if not wholes:
            return None
        # whole cache lines, so that kernels over many tensors may read each in wide pieces
        sizes = [_LINE * -(-master.numel() // _LINE) for _, master in wholes]
        flat = self._buffer
        if flat is None:
            flat = torch.zeros(sum(sizes), device=wholes[0][1].device)
            self._buffer = flat if flat.numel() <= _KEPT else None
        views = [
            part[: master.numel()].view_as(master) for part, (_, master) in zip(flat.split(sizes), wholes, strict=True)
        ]
        found = [(view, parameter.grad) for view, (parameter, _) in zip(views, wholes, strict=True)]
        missing = [view for view, gradient in found if gradient is None]
        if missing:  # every rank must take part in the all-reduce
            torch._foreach_zero_(missing)  # type: ignore[reportPrivateImportUsage]
        given = [(view, gradient) for view, gradient in found if gradient is not None]
        if given:  # a rank may have had nothing to learn from
            torch._foreach_copy_([view for view, _ in given], [gradient for _, gradient in given])  # type: ignore[reportPrivateImportUsage]
        for view, (parameter, master) in zip(views, wholes, strict=True):
            parameter.grad = None
            master.grad = view
        return flat

    def _norm(self) -> torch.Tensor:
        """Norm of the gradients of all parameters, on all ranks together."""
        pairs = list(zip(self.masters, self.sharded, strict=True))
        whole = [master.grad for master, sharded in pairs if not sharded]
        rows = [master.grad for master, sharded in pairs if sharded]
        if not rows:
            return torch.linalg.vector_norm(torch.stack(_norms(whole)))
        square = torch.stack(_norms(rows)).square().sum()
        dist.all_reduce(square)
        if whole:
            square = square + torch.stack(_norms(whole)).square().sum()
        return square.sqrt()

    def _skip(self, step: int, noted: Sequence[MicroBatch], own_norms: Sequence[float]) -> None:
        """Count a skipped step, write what the ranks at fault had seen, and give up where there are too many."""
        self.skipped += 1
        self.skipped_in_a_row += 1
        not_finite = [name for name, norm in zip(self.names, own_norms, strict=True) if not math.isfinite(norm)]
        mixed = {name for name, sharded in zip(self.names, self.sharded, strict=True) if sharded}  # with other ranks'
        at_fault = bool(set(not_finite) - mixed) or not all(batch.is_finite for batch in noted)
        nobody = not any(self.runtime.gather(at_fault))  # finite on every rank and not in their sum: all had a part
        where = ""
        if (at_fault or nobody) and noted and self.skipped_dir is not None:
            path = save_skipped(self.skipped_dir, step, self.runtime.rank, noted, not_finite)
            where = f"; its batch is in {path}" if path else ""
        log.warning("step %d: loss or gradient is not finite, step skipped%s", step, where)
        if self.skipped_in_a_row > self.config.max_skipped_steps:
            seen = f"; {self.skipped_dir} says which samples they had" if self.skipped_dir is not None else ""
            raise FloatingPointError(
                f"{self.skipped_in_a_row} steps in a row had a loss or gradients that are not finite{seen}; lower "
                "optim.lr and restart with --resume from the last checkpoint."
            )

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs, by name of parameter: the tensors themselves, not copies.

        What belongs to a sharded parameter is sharded as it is.

        `adam` has the moments and step numbers, `masters` the float32 copies of low-precision parameters.
        """
        adam: dict[str, dict[str, torch.Tensor]] = {}
        parameters = dict(zip(self.names, self.parameters, strict=True))
        for name, master in zip(self.names, self.masters, strict=True):
            for kind, value in self.adam.state.get(master, {}).items():
                parameter = parameters[name]
                if isinstance(parameter, DTensor) and kind != "step":
                    value = as_sharded(value, parameter)
                adam.setdefault(kind, {})[name] = value
        masters = {
            name: parameters[name].detach() if isinstance(parameters[name], DTensor) else master.detach()
            for name, master in self._kept_masters().items()
        }
        return {"adam": adam, "masters": masters, "skipped": self.skipped}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave; ValueError where it is of other parameters, naming the first."""
        parameters = dict(zip(self.names, self.parameters, strict=True))
        masters = self._kept_masters()
        _check_names(state["masters"], {name: parameters[name] for name in masters})
        for kind, values in state["adam"].items():
            _check_names(values, parameters, scalars=kind == "step")

        def own(name: str, value: torch.Tensor) -> torch.Tensor:
            like = parameters[name]
            return rows_of(value, like).clone() if isinstance(like, DTensor) and value.dim() else value

        name_of = {id(master): name for name, master in zip(self.names, self.masters, strict=True)}
        ordered = [name_of[id(master)] for group in self.adam.param_groups for master in group["params"]]
        moments = {
            index: {kind: own(name, values[name]) for kind, values in state["adam"].items()}
            for index, name in enumerate(ordered)
        }
        # torch puts each tensor where its kind belongs: step numbers stay on the host but for fused kernels
        self.adam.load_state_dict({**self.adam.state_dict(), "state": moments if state["adam"] else {}})
        self.skipped = state["skipped"]
        with torch.no_grad():
            for name, master in masters.items():
                master.copy_(own(name, state["masters"][name]))

    def _kept_masters(self) -> dict[str, torch.Tensor]:
        """Masters whose values a saved model does not hold, by name."""
        return {
            name: master
            for name, parameter, master in zip(self.names, self.parameters, self.masters, strict=True)
            if name in self.low_precision or not _shares(master, parameter)
        }


def _master(parameter: nn.Parameter) -> torch.Tensor:
    """What the optimizer moves: the parameter, a float32 copy of it, or its rows on this rank."""
    if isinstance(parameter, DTensor):
        if parameter.dtype != torch.float32:
            raise ValueError(f"Sharded parameters must be float32, not {parameter.dtype}.")
        return own_rows(parameter).requires_grad_()
    return parameter if parameter.dtype == torch.float32 else parameter.detach().float().requires_grad_()


def _shares(master: torch.Tensor, parameter: nn.Parameter) -> bool:
    """Whether moving a master moves the parameter."""
    return master is parameter or isinstance(parameter, DTensor)


def _norms(tensors: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
    given = [tensor for tensor in tensors if tensor is not None]
    return list(torch._foreach_norm(given))  # type: ignore[reportPrivateImportUsage]


def _check_names(saved: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor], scalars: bool = False) -> None:
    """ValueError where a saved state is not of these parameters, or they have another size."""
    advice = "resume with the configuration and version that wrote it, or start a new run from its model by init."
    odd = sorted(set(saved) ^ set(own))
    if odd:
        which = "has" if odd[0] in saved else "lacks"
        raise ValueError(f"The optimizer's saved state {which} {odd[0]}, unlike the parameters to train; {advice}")
    for name, value in own.items():
        if not scalars and saved[name].shape != value.shape:
            raise ValueError(
                f"The optimizer's saved state has {name} as {list(saved[name].shape)}, but the parameter to train is "
                f"{list(value.shape)}; {advice}"
            )


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Exponential moving average of a model's parameters after a step, in place.

    The decay grows to `decay` over the first steps, as (1 + step) / (10 + step), so that the start is soon forgotten.
    """
    average_in_place = get_ema_multi_avg_fn(min(decay, (1 + step) / (10 + step)))
    average_in_place(list(average.parameters()), list(model.parameters()), step)
