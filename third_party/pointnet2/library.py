"""The point operations as torch.library operators `threedr1::…`: schemas, shapes for tracing, gradients.

Compiled graphs see opaque operators with known output shapes; each call picks its backend (backends.py). Features of
types that the libraries do not compute with (float64, say) go to the reference, and so do more scenes than a CUDA grid
has rows.

Shapes: B scenes, N points, M centres, S or K neighbours, C or F channels, P positions, X = 3 + F.
"""

from typing import Any

import torch
from torch import Tensor

from . import native, reference
from .backends import Backend, backend_for

NAMESPACE = "threedr1"
_MOST_SCENES = 65_535
_library = torch.library.Library(NAMESPACE, "DEF")

SCHEMAS = {
    "furthest_point_sample": "(Tensor points, SymInt num_samples) -> Tensor",
    "ball_query": "(Tensor points, Tensor centers, float radius, SymInt num_samples) -> Tensor",
    "three_nn": "(Tensor query, Tensor points) -> (Tensor, Tensor)",
    "group_points": "(Tensor features, Tensor idx) -> Tensor",
    "group_points_backward": "(Tensor grad, Tensor idx, SymInt num_points) -> Tensor",
    "three_interpolate": "(Tensor features, Tensor idx, Tensor weight) -> Tensor",
    "three_interpolate_backward": "(Tensor grad, Tensor features, Tensor idx, Tensor weight, "
    "bool need_features=True, bool need_weight=True) -> (Tensor, Tensor)",
    "group_offsets": "(Tensor points, Tensor centers, Tensor? features, Tensor idx, float radius) -> Tensor",
    "group_offsets_backward": "(Tensor grad, Tensor idx, SymInt num_points, float radius, bool need_points=True, "
    "bool need_centers=True, bool need_features=True) -> (Tensor, Tensor, Tensor)",
}


def _backend(tensor: Tensor, features: Tensor | None = None) -> Backend:
    chosen = backend_for(tensor.device)
    if tensor.is_cuda and tensor.shape[0] > _MOST_SCENES:
        return reference
    return chosen if features is None or native.accepts(features.dtype) else reference


def _furthest_point_sample(points: Tensor, num_samples: int) -> Tensor:
    return _backend(points, points).furthest_point_sample(points.contiguous(), num_samples)


def _ball_query(points: Tensor, centers: Tensor, radius: float, num_samples: int) -> Tensor:
    return _backend(points, points).ball_query(radius, num_samples, points.contiguous(), centers.contiguous())


def _three_nn(query: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    return _backend(query, query).three_nn(query.contiguous(), points.contiguous())


def _group_points(features: Tensor, idx: Tensor) -> Tensor:
    backend = _backend(features) if features.element_size() <= 8 else reference  # complex128 is wider
    return backend.group_points(features.contiguous(), idx.contiguous())


def _group_points_backward(grad: Tensor, idx: Tensor, num_points: int) -> Tensor:
    return _backend(grad, grad).group_points_backward(grad.contiguous(), idx.contiguous(), num_points)


def _three_interpolate(features: Tensor, idx: Tensor, weight: Tensor) -> Tensor:
    backend = _backend(features, features)
    return backend.three_interpolate(features.contiguous(), idx.contiguous(), weight.contiguous())


def _three_interpolate_backward(
    grad: Tensor, features: Tensor, idx: Tensor, weight: Tensor, need_features: bool = True, need_weight: bool = True
) -> tuple[Tensor, Tensor]:
    tensors = (grad.contiguous(), features.contiguous(), idx.contiguous(), weight.contiguous())
    return _backend(grad, grad).three_interpolate_backward(*tensors, need_features, need_weight)


def _group_offsets(points: Tensor, centers: Tensor, features: Tensor | None, idx: Tensor, radius: float) -> Tensor:
    backend = _backend(points, points)
    if features is not None:
        features = features.contiguous()
        backend = backend if native.accepts(features.dtype) else reference
    return backend.group_offsets(points.contiguous(), centers.contiguous(), features, idx.contiguous(), radius)


def _group_offsets_backward(
    grad: Tensor,
    idx: Tensor,
    num_points: int,
    radius: float,
    need_points: bool = True,
    need_centers: bool = True,
    need_features: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    needs = (need_points, need_centers, need_features)
    backend = _backend(grad, grad)
    return backend.group_offsets_backward(grad.contiguous(), idx.contiguous(), num_points, radius, needs)


_KERNELS = {
    "furthest_point_sample": _furthest_point_sample,
    "ball_query": _ball_query,
    "three_nn": _three_nn,
    "group_points": _group_points,
    "group_points_backward": _group_points_backward,
    "three_interpolate": _three_interpolate,
    "three_interpolate_backward": _three_interpolate_backward,
    "group_offsets": _group_offsets,
    "group_offsets_backward": _group_offsets_backward,
}


# Shapes and types of the outputs, for tracing.


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _fake_interpolate_backward(
    grad: Tensor, features: Tensor, idx: Tensor, weight: Tensor, need_features: bool = True, need_weight: bool = True
) -> tuple[Tensor, Tensor]:
    return (
        features.new_empty(features.shape if need_features else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
    )


def _fake_group_offsets(
    points: Tensor, centers: Tensor, features: Tensor | None, idx: Tensor, radius: float
) -> Tensor:
    like = points if features is None else features
    return like.new_empty(*idx.shape, 3 + (0 if features is None else features.shape[2]))


def _fake_group_offsets_backward(
    grad: Tensor,
    idx: Tensor,
    num_points: int,
    radius: float,
    need_points: bool = True,
    need_centers: bool = True,
    need_features: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    num_scenes, num_centers, _, width = grad.shape
    exact = _sum_dtype(grad.dtype)
    return (
        grad.new_empty((num_scenes, num_points, 3) if need_points else (0,), dtype=exact),
        grad.new_empty((num_scenes, num_centers, 3) if need_centers else (0,), dtype=exact),
        grad.new_empty((num_scenes, num_points, width - 3) if need_features else (0,)),
    )


_FAKES = {
    "furthest_point_sample": lambda points, num_samples: points.new_empty(
        points.shape[0], num_samples, dtype=torch.int32
    ),
    "ball_query": lambda points, centers, radius, num_samples: points.new_empty(
        *centers.shape[:2], num_samples, dtype=torch.int32
    ),
    "three_nn": lambda query, points: (
        query.new_empty(query.shape),
        query.new_empty(query.shape, dtype=torch.int32),
    ),
    "group_points": lambda features, idx: features.new_empty(*features.shape[:2], idx.shape[1]),
    "group_points_backward": lambda grad, idx, num_points: grad.new_empty(*grad.shape[:2], num_points),
    "three_interpolate": lambda features, idx, weight: features.new_empty(*features.shape[:2], idx.shape[1]),
    "three_interpolate_backward": _fake_interpolate_backward,
    "group_offsets": _fake_group_offsets,
    "group_offsets_backward": _fake_group_offsets_backward,
}


# Gradients. Grouping is linear, so its backward is differentiable again; the others are differentiable once.


def _save_group(ctx: Any, inputs: tuple, output: Tensor) -> None:
    features, idx = inputs
    ctx.save_for_backward(idx)
    ctx.num_points = features.shape[2]


def _group_gradient(ctx: Any, grad: Tensor) -> tuple:
    (idx,) = ctx.saved_tensors
    return torch.ops.threedr1.group_points_backward(grad, idx, ctx.num_points), None


def _save_group_backward(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _group_backward_gradient(ctx: Any, grad: Tensor) -> tuple:
    (idx,) = ctx.saved_tensors
    return torch.ops.threedr1.group_points(grad, idx), None, None


def _save_interpolate(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _interpolate_gradient(ctx: Any, grad: Tensor) -> tuple:
    features, idx, weight = ctx.saved_tensors
    need_features, _, need_weight = ctx.needs_input_grad
    grad_features, grad_weight = torch.ops.threedr1.three_interpolate_backward(
        grad, features, idx, weight, need_features, need_weight
    )
    return grad_features if need_features else None, None, grad_weight if need_weight else None


def _save_group_offsets(ctx: Any, inputs: tuple, output: Tensor) -> None:
    points, _, _, idx, radius = inputs
    ctx.save_for_backward(idx)
    ctx.num_points, ctx.radius = points.shape[1], radius


def _group_offsets_gradient(ctx: Any, grad: Tensor) -> tuple:
    (idx,) = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    grads = torch.ops.threedr1.group_offsets_backward(grad, idx, ctx.num_points, ctx.radius, *needs)
    kept = (part if needed else None for part, needed in zip(grads, needs, strict=True))
    return *kept, None, None


_GRADIENTS = {
    "group_points": (_group_gradient, _save_group),
    "group_points_backward": (_group_backward_gradient, _save_group_backward),
    "three_interpolate": (_interpolate_gradient, _save_interpolate),
    "group_offsets": (_group_offsets_gradient, _save_group_offsets),
}

for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_name, _KERNELS[_name], "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _FAKES[_name], lib=_library)
for _name, (_gradient, _save) in _GRADIENTS.items():
    torch.library.register_autograd(f"{NAMESPACE}::{_name}", _gradient, setup_context=_save, lib=_library)
