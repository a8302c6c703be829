"""Builds the compiled libraries of the point operations: one for the CPU, one for CUDA. Standard library only.

A library has a plain C interface (csrc/pointnet2.h) and includes nothing of torch or Python, so that building takes a
C++ compiler or nvcc and some seconds, needs no GPU, and serves every torch and Python. Its file name holds a hash
of the sources, the flags and, for the CPU, of the processor's features: a library that does not fit is never found.

setup.py loads this file by its path.
"""

import contextlib
import hashlib
import itertools
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CSRC = Path(__file__).resolve().parent / "csrc"
PREBUILT = Path(__file__).resolve().parent / "lib"
SUFFIXES = {"cpu": ".cpp", "cuda": ".cu"}
# Machine code for the data-centre GPUs since Ampere, and portable code (PTX) that later ones translate themselves.
CUDA_ARCHITECTURES = ("80", "90", "100")
CPU_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-pthread")
CUDA_FLAGS = ("-O3", "-std=c++17", "--fmad=false", "-Xcompiler", "-fPIC,-fvisibility=hidden")
TIMEOUT = 900  # seconds for one compiler process


class BuildError(RuntimeError):
    """A library cannot be built here; the message says why."""


def cache_folder() -> Path:
    """Where libraries built on first use are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "threedr1" / "ops"


def find_compiler(backend: str) -> Path | None:
    """The C++ compiler (`CXX`, else c++, g++ or clang++) or nvcc (`CUDA_HOME`, else PATH, else /usr/local/cuda)."""
    if backend == "cpu":
        names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    else:
        home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
        names = [f"{home}/bin/nvcc"] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]
    found = next(filter(None, map(shutil.which, names)), None)
    return Path(found) if found else None


def library_name(backend: str, architectures: Sequence[str] = ()) -> str:
    """File name of the library that fits these sources and flags: for CUDA these architectures, as ("90",); for the
    CPU this processor."""
    digest = hashlib.sha256(" ".join(_flags(backend)).encode())
    for path in _sources(backend):
        digest.update(path.name.encode() + path.read_bytes())
    if backend == "cpu":
        digest.update(_processor().encode())
    parts = [f"pointnet2_{backend}", digest.hexdigest()[:16], *(f"sm{number}" for number in architectures)]
    return "-".join(parts) + ".so"


def find_library(backend: str, architecture: str = "") -> Path | None:
    """A library built earlier, with the package or on first use; `architecture` is the GPU's, as "90"."""
    if backend == "cpu":
        candidates = [folder / library_name(backend) for folder in (PREBUILT, cache_folder())]
    else:
        counts = range(len(CUDA_ARCHITECTURES), 0, -1)  # an nvcc of an older CUDA compiled for fewer
        candidates = [PREBUILT / library_name(backend, CUDA_ARCHITECTURES[:count]) for count in counts]
        candidates.append(cache_folder() / library_name(backend, (architecture,)))
    return next(filter(Path.exists, candidates), None)


def compilable_architectures() -> tuple[str, ...]:
    """The first of CUDA_ARCHITECTURES, up to one that this nvcc does not know.

    Raises:
        BuildError: there is no nvcc, it does not run, or it knows none of them.
    """
    compiler = find_compiler("cuda")
    if compiler is None:
        raise BuildError("building the cuda library needs nvcc (set CUDA_HOME)")
    known = _run([str(compiler), "--list-gpu-arch"]).split()
    found = tuple(itertools.takewhile(lambda number: f"compute_{number}" in known, CUDA_ARCHITECTURES))
    if not found:
        raise BuildError(f"{compiler} cannot compile for compute capability {CUDA_ARCHITECTURES[0]}; update CUDA")
    return found


def build(backend: str, folder: Path, architectures: Sequence[str] = ()) -> Path:
    """Compile one library into `folder`, which is made; the file appears whole or not at all.

    Args:
        backend: "cpu" or "cuda".
        architectures: for CUDA the compute capabilities, as ("80", "90"); the highest one is added as PTX too.

    Raises:
        BuildError: no compiler, or it failed; the message ends with what the compiler said.
    """
    compiler = find_compiler(backend)
    if compiler is None:
        wanted = "a C++ compiler (c++, g++ or clang++, or set CXX)" if backend == "cpu" else "nvcc (set CUDA_HOME)"
        raise BuildError(f"building the {backend} library needs {wanted}")
    target = folder / library_name(backend, architectures)
    folder.mkdir(parents=True, exist_ok=True)
    # beside the target, so that the last step is a rename within one file system
    with tempfile.TemporaryDirectory(prefix=".building-", dir=folder) as scratch:
        flags = [*_flags(backend), *_code_flags(backend, architectures)]
        units = [path for path in _sources(backend) if path.suffix == SUFFIXES[backend]]
        if not units:
            raise BuildError(f"{CSRC} holds no {SUFFIXES[backend]} files; install the package again")
        objects = [Path(scratch) / f"{path.stem}.o" for path in units]
        commands = [
            [str(compiler), *flags, "-c", str(unit), "-o", str(made)]
            for unit, made in zip(units, objects, strict=True)
        ]
        with ThreadPoolExecutor(max_workers=max(1, min(len(units), os.cpu_count() or 1))) as pool:
            list(pool.map(_run, commands))
        linked = Path(scratch) / target.name
        link_flags = ["-pthread"] if backend == "cpu" else _code_flags(backend, architectures)
        _run([str(compiler), "-shared", *link_flags, *map(str, objects), "-o", str(linked)])
        linked.replace(target)
    return target


@contextlib.contextmanager
def build_lock(folder: Path) -> Iterator[None]:
    """One process builds while the others wait for its library; released also when a process dies."""
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} did not run to its end: {error}") from error
    if done.returncode:
        raise BuildError(f"{command[0]} failed:\n{(done.stderr or done.stdout).strip()[-2000:]}")
    return done.stdout


def _sources(backend: str) -> list[Path]:
    """Translation units and headers, in a fixed order."""
    headers = {"cpu": (".h",), "cuda": (".h", ".cuh")}[backend]
    return sorted(path for path in CSRC.iterdir() if path.suffix in (*headers, SUFFIXES[backend]))


def _flags(backend: str) -> tuple[str, ...]:
    return CPU_FLAGS if backend == "cpu" else CUDA_FLAGS


def _code_flags(backend: str, architectures: Sequence[str]) -> list[str]:
    if backend == "cpu":
        return []
    flags = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in architectures]
    highest = max(architectures, key=int)
    return [*flags, f"-gencode=arch=compute_{highest},code=compute_{highest}"]


def _processor() -> str:
    """What -march=native depends on."""
    path = Path("/proc/cpuinfo")  # Linux only
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    described = {line for line in lines if line.partition("\t")[0] in ("flags", "Features", "vendor_id", "cpu family")}
    return "\n".join([platform.machine(), platform.processor(), *sorted(described)])
