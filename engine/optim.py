"""AdamW, learning-rate schedule, and the guarded optimiser step that every loop takes."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from .config import OptimConfig
from .runtime import Runtime, log
from .skipped import MicroBatch, save_skipped


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

    Low-precision parameters get a float32 master copy: bfloat16 rounds small updates away.

    Args:
        parameters: trained parameters by name. Matrices decay; vectors (norms, biases) do not.
        config: optimiser settings.
        total_steps: length of the schedule.
        lr_factors: factor on the learning rate of single parameters, by name; 1 for all others.
        skipped_dir: where the batches of skipped steps are written for inspection; None writes none.
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
        self.masters = [
            parameter if parameter.dtype == torch.float32 else parameter.detach().float().requires_grad_()
            for parameter in self.parameters
        ]
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
        gradients = []
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)  # every rank must take part in the all-reduce
            if master is not parameter:
                master.grad = parameter.grad.float()
                parameter.grad = None
            gradients.append(master.grad)
        own_norms = torch._foreach_norm(gradients)  # type: ignore[reportPrivateImportUsage]  # before ranks mix
        if self.runtime.world_size > 1:
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            dist.all_reduce(flat, op=dist.ReduceOp.SUM)
            for gradient, part in zip(
                gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True
            ):
                gradient.copy_(part.view_as(gradient))
        if divisor != 1.0:
            for gradient in gradients:
                gradient.div_(divisor)
        norm = float(torch.nn.utils.clip_grad_norm_(self.masters, self.config.max_grad_norm or math.inf))
        rate = learning_rate(step, self.total_steps, self.config)
        for group, factor in zip(self.adam.param_groups, self.group_factors, strict=True):
            group["lr"] = rate * factor
        noted, self.noted = self.noted, []
        if self.runtime.all_finite(math.isfinite(norm) and all(batch.is_finite for batch in noted)):
            self.adam.step()
            self.skipped_in_a_row = 0
            with torch.no_grad():
                for parameter, master in zip(self.parameters, self.masters, strict=True):
                    if master is not parameter:
                        parameter.copy_(master)
        else:
            self._skip(step, noted, torch.stack([own.float() for own in own_norms]).tolist())
        self.adam.zero_grad(set_to_none=True)
        for parameter in self.parameters:
            parameter.grad = None
        return {"lr": rate, "grad_norm": norm, "skipped_steps": float(self.skipped)}

    def _skip(self, step: int, noted: Sequence[MicroBatch], own_norms: Sequence[float]) -> None:
        """Count a skipped step, write what the ranks at fault had seen, and give up where there are too many."""
        self.skipped += 1
        self.skipped_in_a_row += 1
        not_finite = [name for name, norm in zip(self.names, own_norms, strict=True) if not math.isfinite(norm)]
        at_fault = bool(not_finite) or not all(batch.is_finite for batch in noted)
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

        `adam` has the moments and step numbers, `masters` the float32 copies of low-precision parameters.
        """
        adam: dict[str, dict[str, torch.Tensor]] = {}
        for name, master in zip(self.names, self.masters, strict=True):
            for kind, value in self.adam.state.get(master, {}).items():
                adam.setdefault(kind, {})[name] = value
        masters = {
            name: master.detach()
            for name, parameter, master in zip(self.names, self.parameters, self.masters, strict=True)
            if master is not parameter
        }
        return {"adam": adam, "masters": masters, "skipped": self.skipped}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave; ValueError where it is of other parameters, naming the first."""
        masters = {
            name: master
            for name, parameter, master in zip(self.names, self.parameters, self.masters, strict=True)
            if master is not parameter
        }
        _check_names(state["masters"], masters)
        for kind, values in state["adam"].items():
            _check_names(values, dict(zip(self.names, self.masters, strict=True)), scalars=kind == "step")
        name_of = {id(master): name for name, master in zip(self.names, self.masters, strict=True)}
        ordered = [name_of[id(master)] for group in self.adam.param_groups for master in group["params"]]
        moments = {
            index: {kind: values[name] for kind, values in state["adam"].items()} for index, name in enumerate(ordered)
        }
        # torch puts each tensor where its kind belongs: step numbers stay on the host but for fused kernels
        self.adam.load_state_dict({**self.adam.state_dict(), "state": moments if state["adam"] else {}})
        self.skipped = state["skipped"]
        with torch.no_grad():
            for name, master in masters.items():
                master.copy_(state["masters"][name])


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
