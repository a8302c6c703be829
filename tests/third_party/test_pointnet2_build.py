"""Which GPUs the CUDA library is compiled for."""

from pathlib import Path

import pytest

from threedr1.third_party.pointnet2 import build as builder


def fake_nvcc(folder: Path, known: str) -> None:
    """An nvcc that knows these architectures and compiles nothing."""
    program = folder / "bin" / "nvcc"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\necho {known}\n")
    program.chmod(0o755)


def test_an_older_nvcc_compiles_for_the_architectures_that_it_knows(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    fake_nvcc(tmp_path, "compute_75 compute_80 compute_90")
    assert builder.compilable_architectures() == ("80", "90")
    monkeypatch.setattr(builder, "PREBUILT", tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert builder.find_library("cuda", "90") is None
    made = tmp_path / builder.library_name("cuda", ("80", "90"))
    made.touch()
    assert builder.find_library("cuda", "90") == made


def test_an_nvcc_that_is_absent_or_too_old_is_explained(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(builder.BuildError, match="needs nvcc"):
        builder.compilable_architectures()
    fake_nvcc(tmp_path, "compute_60 compute_70")
    with pytest.raises(builder.BuildError, match="compute capability 80; update CUDA"):
        builder.compilable_architectures()
