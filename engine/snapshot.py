"""Copies in host memory of what a checkpoint writes, so that training may go on while it is written.

The twin of a model is made of the same modules with other tensors: host copies of those that `save_pretrained` writes,
and tensors without data for all others, so that a frozen base of many gigabytes is never copied, and writing one that
was not copied fails loudly.
"""

import copy
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .shards import gathered, is_sharded

M = TypeVar("M", bound=nn.Module)
_CONFIGS = ("config", "peft_config")  # which libraries write to while they save


def host_copies(tensors: Iterable[Tensor], *, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Contiguous copies in host memory, those of a GPU all under way at once.

    Args:
        dtype: of the copies of sharded tensors (shards.py), which are gathered one by one, so that no GPU ever holds
            two of them whole. All ranks must ask for the same; `join_copies` is for those that want no copy.
    """
    tensors = list(tensors)
    with torch.no_grad():
        copies = [_host_copy(tensor, dtype) for tensor in tensors]
    if any(tensor.is_cuda for tensor in tensors):
        torch.cuda.synchronize()
    return copies


def _host_copy(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    if isinstance(tensor, DTensor):
        return gathered(tensor, dtype).cpu()
    if tensor.is_cuda:
        return tensor.detach().contiguous().to("cpu", non_blocking=True)
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def join_copies(model: nn.Module, state: Any) -> None:
    """Take part in another rank's `twin(model)` and `host_state(state)`."""
    with torch.no_grad():
        for tensors, dtype in ((_saved(model), getattr(model, "saved_dtype", None)), (_tensors_in(state), None)):
            for tensor in {id(tensor): tensor for tensor in tensors}.values():
                if isinstance(tensor, DTensor):
                    gathered(tensor, dtype)


def host_state(state: Any) -> Any:
    """Nested dictionaries with host copies in the place of their tensors; everything else is shared."""
    tensors = {id(tensor): tensor for tensor in _tensors_in(state)}
    return _replaced(state, dict(zip(tensors, host_copies(tensors.values()), strict=True)))


def _tensors_in(state: Any) -> Iterator[Tensor]:
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict):
        for entry in state.values():
            yield from _tensors_in(entry)


def _replaced(state: Any, copies: Mapping[int, Tensor]) -> Any:
    if isinstance(state, dict):
        return {key: _replaced(entry, copies) for key, entry in state.items()}
    return copies[id(state)] if isinstance(state, Tensor) else state


def twin(model: M) -> M:
    """A model of the same modules that holds what the model holds now, in host memory, for `save_pretrained` alone.

    All parameters and buffers are copied, or those that the model's `saved_tensors()` names where it has that; sharded
    ones as the model's `saved_dtype`.
    """
    kept = {id(tensor): tensor for tensor in _saved(model)}
    copies = dict(zip(kept, host_copies(kept.values(), dtype=getattr(model, "saved_dtype", None)), strict=True))
    result = _Twins(copies, is_sharded(model)).of(model)
    assert isinstance(result, type(model))
    return result


def _saved(model: nn.Module) -> list[Tensor]:
    own = getattr(model, "saved_tensors", None)
    return list(own()) if own is not None else [*model.parameters(), *model.buffers()]


class _Twins:
    """Twins of modules, each made once.

    Args:
        copies: what the tensors are replaced by, by id; all others lose their data.
        sharded: whether the model's parameters are.
    """

    def __init__(self, copies: Mapping[int, Tensor], sharded: bool = False):
        self.copies = copies
        self.sharded = sharded
        self.tensors: dict[int, Tensor] = {}  # so that tied tensors stay tied
        self.modules: dict[int, nn.Module] = {}
        self.configs: dict[int, Any] = {}

    def of(self, module: nn.Module | None) -> nn.Module | None:
        if module is None or id(module) in self.modules:
            return self.modules.get(id(module))
        its = self.modules[id(module)] = object.__new__(type(module))
        its.__dict__.update(module.__dict__)
        for group, change in (("_parameters", self._tensor), ("_buffers", self._tensor), ("_modules", self.of)):
            its.__dict__[group] = {name: change(value) for name, value in module.__dict__[group].items()}
        if self.sharded:  # fully_shard's hooks would free what the model has gathered, in the middle of a pass
            its.__dict__["_state_dict_pre_hooks"] = OrderedDict()
        for name in _CONFIGS:
            if name in its.__dict__:
                its.__dict__[name] = copy.deepcopy(its.__dict__[name], self.configs)
        return its

    def _tensor(self, tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        if id(tensor) not in self.tensors:
            value = self.copies[id(tensor)] if id(tensor) in self.copies else torch.empty_like(tensor, device="meta")
            is_parameter = isinstance(tensor, nn.Parameter)
            self.tensors[id(tensor)] = nn.Parameter(value, requires_grad=False) if is_parameter else value
        return self.tensors[id(tensor)]
