"""Fixtures of the point operations' tests: every backend in turn."""

import shutil
from typing import NamedTuple

import pytest
import torch

from threedr1.third_party import pointnet2


class Backend(NamedTuple):
    """A backend of the point operations, and the device whose tensors it gets."""

    name: str
    device: torch.device


@pytest.fixture(
    params=[
        pytest.param(("torch", "cpu"), id="torch"),
        pytest.param(("cpu", "cpu"), id="cpu"),
        pytest.param(("torch", "cuda"), id="torch-on-cuda", marks=pytest.mark.gpu),
        pytest.param(("cuda", "cuda"), id="cuda", marks=pytest.mark.gpu),
    ]
)
def backend(request, monkeypatch):
    """Forces one backend after another; test_compiled_backends_are_there fails where one is missing without cause."""
    name, device = request.param
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if name not in pointnet2.available_backends():
        pytest.skip(f"this machine has no backend {name}; it has {', '.join(pointnet2.available_backends())}")
    monkeypatch.setenv("THREEDR1_OPS", name)
    return Backend(name, torch.device(device))


@pytest.fixture(scope="session")
def compiler():
    """A C++ compiler; tests of what it builds skip where there is none."""
    found = next((path for path in map(shutil.which, ("g++", "c++", "clang++")) if path), None)
    if found is None:
        pytest.skip("no C++ compiler on this machine")
    return found
