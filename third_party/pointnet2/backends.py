"""Which implementation of the point operations serves a tensor: CUDA kernels, the native CPU library, plain torch.

Compiled libraries come with the package (`THREEDR1_BUILD_OPS=1 pip install -e .`) or are built on first use where
there is a compiler (for CUDA: nvcc and a GPU), once for a machine. None is ever needed: plain torch computes the same.

Environment variables:
    THREEDR1_OPS    torch, cpu or cuda: use this implementation and no other
    THREEDR1_JIT    0: build nothing on first use
"""

import functools
import logging
import os
import time
from pathlib import Path
from types import ModuleType
from typing import TypeAlias

import torch

from . import reference
from .build import BuildError, build, build_lock, cache_folder, find_compiler, find_library, library_name
from .native import LibraryError, NativeBackend

NAMES = ("torch", "cpu", "cuda")
VARIABLE = "THREEDR1_OPS"
Backend: TypeAlias = ModuleType | NativeBackend

log = logging.getLogger("threedr1.ops")


class _UnavailableError(RuntimeError):
    """A compiled backend cannot be used here; the message says why and what would help."""


def available_backends() -> tuple[str, ...]:
    """Names that `THREEDR1_OPS` accepts on this machine; asking builds what can be built."""
    return tuple(name for name in NAMES if not isinstance(_state(name), str))


def backend_name(device: torch.device | str = "cpu") -> str:
    """The backend that serves tensors of a device.

    Raises:
        ValueError: `THREEDR1_OPS` names a backend that this machine does not have, or one of another device.
    """
    device = torch.device(device)
    device_type = device.type
    forced = os.environ.get(VARIABLE, "")
    if not forced:
        native = device_type in ("cpu", "cuda") and not isinstance(_state(device_type, device), str)
        return device_type if native else "torch"
    if forced not in NAMES:
        raise ValueError(f"{VARIABLE}={forced} is not a backend; set it to torch, cpu or cuda, or unset it.")
    state = _state(forced, device)
    if isinstance(state, str):
        raise ValueError(f"{VARIABLE}={forced} cannot be had here: {state}; set it to torch, or unset it.")
    if forced not in ("torch", device_type):
        raise ValueError(
            f"{VARIABLE}={forced} does not serve tensors on {device_type}; "
            f"set it to torch or {device_type}, or unset it."
        )
    return forced


def backend_for(device: torch.device) -> Backend:
    """The implementation that serves tensors of a device; ValueError as `backend_name`."""
    backend = _state(backend_name(device), device)
    assert not isinstance(backend, str)
    return backend


def describe_backends() -> list[str]:
    """What serves CPU and GPU tensors here, and why not something faster: one line each."""
    lines = []
    for device_type in ("cpu", *(("cuda",) if torch.cuda.is_available() else ())):
        state = _state(device_type)
        reason = f" (no faster one: {state})" if isinstance(state, str) else f" ({state.path})"
        forced = f", set by {VARIABLE}" if os.environ.get(VARIABLE) else ""
        try:
            lines.append(f"{device_type} tensors: {backend_name(device_type)}{forced or reason}")
        except ValueError as error:
            lines.append(f"{device_type} tensors: none. {error}")
    return lines


def _state(name: str, device: torch.device | None = None) -> Backend | str:
    """The backend, or why it cannot be had; GPUs of one machine may differ, `cuda` is asked about a device's (default:
    the current one)."""
    gpu = 0
    if name == "cuda" and torch.cuda.is_available():
        index = device.index if device is not None and device.type == "cuda" else None
        gpu = torch.cuda.current_device() if index is None else index
    return _load(name, gpu)


@functools.cache
def _load(name: str, gpu: int) -> Backend | str:
    if name == "torch":
        return reference
    try:
        return _load_native(name, gpu)
    except (_UnavailableError, LibraryError) as error:
        return str(error)


def _load_native(name: str, gpu: int) -> NativeBackend:
    architecture = ""
    if name == "cuda":
        if not torch.cuda.is_available():
            raise _UnavailableError("PyTorch sees no GPU")
        major, minor = torch.cuda.get_device_capability(gpu)
        architecture = f"{major}{minor}"
        if major < 8:
            raise _UnavailableError(f"the kernels need a GPU of compute capability 8.0 or newer, not {major}.{minor}")
    path = find_library(name, architecture)
    if path is None:
        path = _build_once(name, architecture)
    return NativeBackend(path, name, gpu)


def _build_once(name: str, architecture: str) -> Path:
    """Build on first use; a failure is remembered beside the libraries, so that not every start tries again."""
    if os.environ.get("THREEDR1_JIT") == "0":
        raise _UnavailableError("it is not built, and THREEDR1_JIT=0 forbids building it on first use")
    if find_compiler(name) is None:
        wanted = (
            "C++ compiler (install g++, or set CXX)"
            if name == "cpu"
            else "nvcc (install the CUDA toolkit, or set CUDA_HOME)"
        )
        raise _UnavailableError(f"it is not built, and there is no {wanted}")
    folder = cache_folder()
    architectures = (architecture,) if architecture else ()
    failed = folder / f"{library_name(name, architectures)}.failed"
    try:
        with build_lock(folder):
            if (path := find_library(name, architecture)) is not None:
                return path  # another process has built it meanwhile
            if failed.exists():
                raise _UnavailableError(f"building it failed: see {failed}, and delete that file to try again")
            start = time.perf_counter()
            try:
                path = build(name, folder, architectures)
            except BuildError as error:
                failed.write_text(f"{error}\n", encoding="utf-8")
                log.warning(
                    "The %s library of the point operations cannot be built; plain torch serves. See %s", name, failed
                )
                raise _UnavailableError(
                    f"building it failed: see {failed}, and delete that file to try again"
                ) from error
            log.warning(
                "Built the %s library of the point operations in %.0f s (once): %s",
                name,
                time.perf_counter() - start,
                path,
            )
            return path
    except OSError as error:
        raise _UnavailableError(f"{folder} cannot be written ({error.strerror}); set XDG_CACHE_HOME") from error
