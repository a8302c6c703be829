"""Tensors of which every rank keeps some rows (sharding.py makes them): whole to rows, and back.

With R ranks a tensor of n rows is cut after every ceil(n / R) of them; the last ranks may have fewer, or none.
"""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard


def is_sharded(model: nn.Module) -> bool:
    """Whether a model's parameters are cut into parts."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def own_rows(tensor: Tensor) -> Tensor:
    """This rank's rows of a sharded tensor, not a copy; any other tensor as it is."""
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local().detach()


def rows_of(whole: Tensor, like: DTensor) -> Tensor:
    """The rows that this rank keeps of a parameter, of a tensor of its shape: a view."""
    (placement,) = like.placements
    assert isinstance(placement, Shard) and placement.dim == 0, "parameters are cut by rows"
    each = -(-len(whole) // like.device_mesh.size())
    return whole[like.device_mesh.get_local_rank() * each :][:each]


def as_sharded(rows: Tensor, like: DTensor) -> DTensor:
    """Rows of all ranks as one tensor of a parameter's shape."""
    return DTensor.from_local(
        rows, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def gathered(tensor: DTensor, dtype: torch.dtype | None = None) -> Tensor:
    """All rows on every rank, in another dtype where one is named; a collective."""
    rows = own_rows(tensor)
    return as_sharded(rows.to(dtype or rows.dtype), tensor).full_tensor()
