"""AdamW, learning-rate schedule, and the guarded optimiser step that every loop takes."""

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from .config import OptimConfig
from .runtime import Runtime, log


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
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        config: OptimConfig,
        total_steps: int,
        runtime: Runtime,
        *,
        lr_factors: Mapping[str, float] | None = None,
    ):
        if not parameters:
            raise ValueError("Nothing to train: every parameter is frozen.")
        learning_rate(0, total_steps, config)  # refuses an unknown schedule before the first step
        self.config = config
        self.total_steps = total_steps
        self.runtime = runtime
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
        if self.runtime.all_finite(math.isfinite(norm)):
            self.adam.step()
            self.skipped_in_a_row = 0
            with torch.no_grad():
                for parameter, master in zip(self.parameters, self.masters, strict=True):
                    if master is not parameter:
                        parameter.copy_(master)
        else:
            self.skipped += 1
            self.skipped_in_a_row += 1
            log.warning("step %d: gradient is not finite, step skipped", step)
            if self.skipped_in_a_row > self.config.max_skipped_steps:
                raise FloatingPointError(
                    f"{self.skipped_in_a_row} steps in a row had non-finite gradients; lower optim.lr and restart "
                    "with --resume from the last checkpoint."
                )
        self.adam.zero_grad(set_to_none=True)
        for parameter in self.parameters:
            parameter.grad = None
        return {"lr": rate, "grad_norm": norm, "skipped_steps": float(self.skipped)}

    def state_dict(self) -> dict:
        """Everything that a resumed run needs."""
        return {
            "adam": self.adam.state_dict(),
            "masters": [
                master.detach().cpu() if master is not parameter else None
                for parameter, master in zip(self.parameters, self.masters, strict=True)
            ],
            "skipped": self.skipped,
        }

    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict` gave."""
        self.adam.load_state_dict(state["adam"])
        self.skipped = state["skipped"]
        with torch.no_grad():
            for master, saved in zip(self.masters, state["masters"], strict=True):
                if saved is not None:
                    master.copy_(saved)


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Exponential moving average of a model's parameters after a step, in place.

    The decay grows to `decay` over the first steps, as (1 + step) / (10 + step), so that the start is soon forgotten.
    """
    average_in_place = get_ema_multi_avg_fn(min(decay, (1 + step) / (10 + step)))
    average_in_place(list(average.parameters()), list(model.parameters()), step)
