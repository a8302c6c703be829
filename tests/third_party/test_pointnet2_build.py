"""What the compiled libraries are made of, what they export, and which GPUs the CUDA library serves."""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from threedr1.third_party import pointnet2
from threedr1.third_party.pointnet2 import build as builder
from threedr1.third_party.pointnet2 import native

CUDA_HEADER = r"cuda_\w+\.h|cooperative_groups(/\w+)?\.h|mma\.h|cuda/\w+|cub/[\w/]+\.cuh"
STANDARD_HEADER = r"[a-z_]+|stdint\.h"  # C++ names its headers without a suffix


def declared_functions() -> dict[str, int]:
    """Name and number of arguments of every function of pointnet2.h."""
    header = re.sub(r"/\*.*?\*/", "", (builder.CSRC / "pointnet2.h").read_text(encoding="utf-8"), flags=re.DOTALL)
    found = re.findall(r"PN2_EXPORT[\w\s*]*?\b(pn2_\w+)\(([^)]*)\)\s*;", header)
    return {name: 0 if arguments == "void" else arguments.count(",") + 1 for name, arguments in found}


def missing_functions(path: Path) -> list[str]:
    library = ctypes.CDLL(str(path))
    return [name for name in declared_functions() if not hasattr(library, name)]


@pytest.mark.parametrize("path", sorted(builder.CSRC.glob("*.cu*")), ids=lambda path: path.name)
def test_cuda_sources_need_only_the_toolkit(path: Path):
    """Headers of torch or Python would tie the library to one version of them."""
    for bracket, name in re.findall(r'^\s*#\s*include\s*([<"])([^">]+)[">]', path.read_text(), re.MULTILINE):
        if bracket == '"':
            assert name == "pointnet2.h" or (builder.CSRC / name).suffix == ".cuh" and (builder.CSRC / name).exists()
        else:
            assert re.fullmatch(f"{CUDA_HEADER}|{STANDARD_HEADER}", name), f"{path.name} includes <{name}>"


def test_every_declared_function_has_its_signature_in_python():
    declared = declared_functions()
    assert len(declared) > 10
    workspaces = {f"{name}_workspace": count for name, count in native._WORKSPACES.items()}
    plain = {"pn2_interface": 0, "pn2_error": 1, "pn2_usable": 1}
    signatures = {name: len(types) for name, types in native._SIGNATURES.items()}
    assert declared == signatures | workspaces | plain


def test_the_cpu_library_exports_every_declared_function():
    if "cpu" not in pointnet2.available_backends():
        pytest.skip("this machine has no backend cpu")
    path = builder.find_library("cpu")
    assert path is not None and missing_functions(path) == []


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


def held_code(program: Path, path: Path) -> tuple[set[str], set[str]]:
    """Architectures of the machine code and of the PTX that a library holds, as {"80"}."""
    listed = [
        subprocess.run([program, option, path], capture_output=True, text=True, check=True).stdout
        for option in ("--list-elf", "--list-ptx")
    ]
    machine, portable = (set(re.findall(r"\.sm_(\d+)\w*\.", text)) for text in listed)
    return machine, portable


def find_cuobjdump() -> Path | None:
    nvcc = builder.find_compiler("cuda")
    folders = [*Path("/usr/local").glob("cuda*/bin"), *([nvcc.resolve().parent] if nvcc else [])]
    found = shutil.which("cuobjdump") or next(
        (path for folder in folders if (path := folder / "cuobjdump").exists()), None
    )
    return Path(found) if found else None


@pytest.mark.slow
def test_the_cuda_library_compiles_for_every_architecture(tmp_path):
    """Neither a GPU nor a torch with CUDA is needed."""
    if builder.find_compiler("cuda") is None:
        pytest.skip("no nvcc on this machine")
    known = builder.compilable_architectures()
    if known != builder.CUDA_ARCHITECTURES:
        pytest.skip(f"this nvcc knows only {', '.join(known)}")
    path = builder.build("cuda", tmp_path, known)
    assert path.name == builder.library_name("cuda", known) and list(tmp_path.iterdir()) == [path]
    assert missing_functions(path) == []
    assert ctypes.CDLL(str(path)).pn2_interface() == native.INTERFACE
    cuobjdump = find_cuobjdump()
    if cuobjdump is not None:
        assert held_code(cuobjdump, path) == (set(known), {max(known, key=int)})
