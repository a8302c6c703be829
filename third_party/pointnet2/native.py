"""The compiled libraries as Python functions: the same functions as in reference.py, on tensors of one device.

A library is called through its C interface (csrc/pointnet2.h). Inputs are contiguous and checked (ops.py); outputs are
allocated here, so that torch's allocator owns all memory.

Shapes: B scenes, N points, M centres, S or K neighbours, C or F channels, P positions.
"""

import contextlib
import ctypes
from pathlib import Path

import torch
from torch import Tensor

INTERFACE = 1  # PN2_INTERFACE of csrc/pointnet2.h
_BAD_INDEX = -1  # PN2_BAD_INDEX
_ELEMENT_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_SIGNATURES = {
    "pn2_furthest_point_sample": [_POINTER, *[_LONG] * 3, _POINTER, _POINTER, _POINTER],
    "pn2_ball_query": [_POINTER, _POINTER, *[_LONG] * 4, _FLOAT, _POINTER, _POINTER, _POINTER],
    "pn2_three_nn": [_POINTER, _POINTER, *[_LONG] * 3, _POINTER, _POINTER, _POINTER, _POINTER],
    "pn2_group": [_POINTER, _POINTER, *[_LONG] * 4, _INT, _POINTER, _POINTER],
    "pn2_group_backward": [_POINTER, _POINTER, *[_LONG] * 4, _INT, _POINTER, _POINTER],
    "pn2_interpolate": [*[_POINTER] * 3, *[_LONG] * 4, _INT, _POINTER, _POINTER],
    "pn2_interpolate_backward": [*[_POINTER] * 4, *[_LONG] * 4, _INT, *[_POINTER] * 3],
    "pn2_group_offsets": [*[_POINTER] * 4, *[_LONG] * 5, _FLOAT, _INT, _POINTER, _POINTER],
    "pn2_group_offsets_backward": [_POINTER, _POINTER, *[_LONG] * 5, _FLOAT, _INT, *[_POINTER] * 4],
}
_WORKSPACES = {"pn2_furthest_point_sample": 3, "pn2_ball_query": 4, "pn2_three_nn": 3}


class LibraryError(RuntimeError):
    """A library cannot be used here, or refused to compute; the message says why."""


def accepts(dtype: torch.dtype) -> bool:
    """Whether the libraries compute with features of this type; others are left to the reference."""
    return dtype in _ELEMENT_TYPES


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class NativeBackend:
    """One library.

    Args:
        path: the shared library.
        device_type: "cpu" or "cuda".
        gpu: index of the CUDA device that it is for.

    Raises:
        LibraryError: it cannot be loaded, has another interface, or cannot compute on that device.
    """

    def __init__(self, path: Path, device_type: str, gpu: int = 0):
        self.path, self._on_gpu = path, device_type == "cuda"
        try:
            library = ctypes.CDLL(str(path))
        except OSError as error:
            raise LibraryError(f"{path} cannot be loaded: {error}") from error
        library.pn2_error.restype = ctypes.c_char_p
        if library.pn2_interface() != INTERFACE:
            raise LibraryError(f"{path} has interface {library.pn2_interface()}, not {INTERFACE}")
        for name, types in _SIGNATURES.items():
            getattr(library, name).argtypes = types
        for name, count in _WORKSPACES.items():
            function = getattr(library, f"{name}_workspace")
            function.argtypes, function.restype = [_LONG] * count, _LONG
        self._library = library
        usable = library.pn2_usable(gpu)
        if usable:
            raise LibraryError(f"{path}: {self._message(usable)}")

    def _message(self, code: int) -> str:
        return self._library.pn2_error(code).decode()

    def _call(self, name: str, device: torch.device, *arguments: object) -> None:
        context = torch.cuda.current_stream(device).cuda_stream if self._on_gpu else torch.get_num_threads()
        with self._current(device):
            code = getattr(self._library, name)(*arguments, context)
        if code == _BAD_INDEX:
            raise IndexError(f"{name.removeprefix('pn2_')}: {self._message(code)}.")
        if code:
            raise LibraryError(f"{name.removeprefix('pn2_')}: {self._message(code)}.")

    def _current(self, device: torch.device) -> contextlib.AbstractContextManager[object]:
        """Makes a GPU the current one: the library computes there."""
        return torch.cuda.device(device) if self._on_gpu else contextlib.nullcontext()

    def _workspace(self, name: str, device: torch.device, *sizes: int) -> Tensor:
        with self._current(device):
            num_bytes = getattr(self._library, f"{name}_workspace")(*sizes)
        return torch.empty(num_bytes, dtype=torch.uint8, device=device)

    def furthest_point_sample(self, points_BN3: Tensor, num_samples: int) -> Tensor:
        name, device = "pn2_furthest_point_sample", points_BN3.device
        sizes = (*points_BN3.shape[:2], num_samples)
        idx_BM = torch.empty(points_BN3.shape[0], num_samples, dtype=torch.int32, device=device)
        workspace = self._workspace(name, device, *sizes)
        self._call(name, device, points_BN3.data_ptr(), *sizes, idx_BM.data_ptr(), workspace.data_ptr())
        return idx_BM

    def ball_query(self, radius: float, num_samples: int, points_BN3: Tensor, centers_BM3: Tensor) -> Tensor:
        name, device = "pn2_ball_query", points_BN3.device
        sizes = (*points_BN3.shape[:2], centers_BM3.shape[1], num_samples)
        idx_BMS = torch.empty(*centers_BM3.shape[:2], num_samples, dtype=torch.int32, device=device)
        workspace = self._workspace(name, device, *sizes)
        inputs = (points_BN3.data_ptr(), centers_BM3.data_ptr(), *sizes, radius)
        self._call(name, device, *inputs, idx_BMS.data_ptr(), workspace.data_ptr())
        return idx_BMS

    def three_nn(self, query_BN3: Tensor, points_BM3: Tensor) -> tuple[Tensor, Tensor]:
        name, device = "pn2_three_nn", query_BN3.device
        sizes = (*query_BN3.shape[:2], points_BM3.shape[1])
        distance_BN3 = torch.empty_like(query_BN3)
        idx_BN3 = torch.empty_like(query_BN3, dtype=torch.int32)
        workspace = self._workspace(name, device, *sizes)
        outputs = (distance_BN3.data_ptr(), idx_BN3.data_ptr(), workspace.data_ptr())
        self._call(name, device, query_BN3.data_ptr(), points_BM3.data_ptr(), *sizes, *outputs)
        return distance_BN3, idx_BN3

    def group_points(self, features_BCN: Tensor, idx_BP: Tensor) -> Tensor:
        out_BCP = features_BCN.new_empty(*features_BCN.shape[:2], idx_BP.shape[1])
        inputs = (features_BCN.data_ptr(), idx_BP.data_ptr(), *features_BCN.shape, idx_BP.shape[1])
        outputs = (features_BCN.element_size(), out_BCP.data_ptr())
        self._call("pn2_group", features_BCN.device, *inputs, *outputs)
        return out_BCP

    def group_points_backward(self, grad_BCP: Tensor, idx_BP: Tensor, num_points: int) -> Tensor:
        num_scenes, channels, positions = grad_BCP.shape
        sums_BCN = torch.zeros(num_scenes, channels, num_points, device=grad_BCP.device)
        inputs = (grad_BCP.data_ptr(), idx_BP.data_ptr(), num_scenes, channels, num_points, positions)
        outputs = (_ELEMENT_TYPES[grad_BCP.dtype], sums_BCN.data_ptr())
        self._call("pn2_group_backward", grad_BCP.device, *inputs, *outputs)
        return sums_BCN.to(grad_BCP.dtype)

    def three_interpolate(self, features_BCM: Tensor, idx_BN3: Tensor, weight_BN3: Tensor) -> Tensor:
        sizes = (*features_BCM.shape, idx_BN3.shape[1])
        out_BCN = features_BCM.new_empty(*features_BCM.shape[:2], idx_BN3.shape[1])
        inputs = (features_BCM.data_ptr(), idx_BN3.data_ptr(), weight_BN3.data_ptr(), *sizes)
        outputs = (_ELEMENT_TYPES[features_BCM.dtype], out_BCN.data_ptr())
        self._call("pn2_interpolate", features_BCM.device, *inputs, *outputs)
        return out_BCN

    def three_interpolate_backward(
        self,
        grad_BCN: Tensor,
        features_BCM: Tensor,
        idx_BN3: Tensor,
        weight_BN3: Tensor,
        need_features: bool,
        need_weight: bool,
    ) -> tuple[Tensor, Tensor]:
        sizes = (*features_BCM.shape, idx_BN3.shape[1])
        sums_BCM = torch.zeros(features_BCM.shape if need_features else 0, device=grad_BCN.device)
        grad_weight_BN3 = torch.zeros(weight_BN3.shape if need_weight else 0, device=grad_BCN.device)
        inputs = (grad_BCN.data_ptr(), features_BCM.data_ptr(), idx_BN3.data_ptr(), weight_BN3.data_ptr(), *sizes)
        outputs = (_pointer(sums_BCM if need_features else None), _pointer(grad_weight_BN3 if need_weight else None))
        dtype = _ELEMENT_TYPES[features_BCM.dtype]
        self._call("pn2_interpolate_backward", grad_BCN.device, *inputs, dtype, *outputs)
        return sums_BCM.to(features_BCM.dtype), grad_weight_BN3

    def group_offsets(
        self, points_BN3: Tensor, centers_BM3: Tensor, features_BNF: Tensor | None, idx_BMK: Tensor, radius: float
    ) -> Tensor:
        num_features = 0 if features_BNF is None else features_BNF.shape[2]
        like = points_BN3 if features_BNF is None else features_BNF
        out_BMKX = like.new_empty(*idx_BMK.shape, 3 + num_features)
        sizes = (*points_BN3.shape[:2], *idx_BMK.shape[1:], num_features)
        inputs = (points_BN3.data_ptr(), centers_BM3.data_ptr(), _pointer(features_BNF), idx_BMK.data_ptr(), *sizes)
        outputs = (_ELEMENT_TYPES[like.dtype], out_BMKX.data_ptr())
        self._call("pn2_group_offsets", points_BN3.device, *inputs, radius, *outputs)
        return out_BMKX

    def group_offsets_backward(
        self, grad_BMKX: Tensor, idx_BMK: Tensor, num_points: int, radius: float, needs: tuple[bool, bool, bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        num_scenes, num_centers, num_neighbors, width = grad_BMKX.shape
        shapes = ((num_points, 3), (num_centers, 3), (num_points, width - 3))
        sums = [
            torch.zeros((num_scenes, *shape) if needed else 0, device=grad_BMKX.device)
            for shape, needed in zip(shapes, needs, strict=True)
        ]
        sizes = (num_scenes, num_points, num_centers, num_neighbors, width - 3)
        outputs = [_pointer(part if needed else None) for part, needed in zip(sums, needs, strict=True)]
        inputs = (grad_BMKX.data_ptr(), idx_BMK.data_ptr(), *sizes, radius, _ELEMENT_TYPES[grad_BMKX.dtype])
        self._call("pn2_group_offsets_backward", grad_BMKX.device, *inputs, *outputs)
        points, centers, features = sums
        return points, centers, features.to(grad_BMKX.dtype)
