"""What this installation can do, for `python main.py doctor`, and what a run was made with."""

import importlib.metadata
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from ..datasets.doctor import Finding, free_bytes, gigabytes

ROOT = Path(__file__).resolve().parents[1]
REQUIRED = ("torch", "transformers", "peft", "accelerate", "safetensors", "numpy", "scipy", "plyfile", "trimesh")
OPTIONAL = {
    "rerun-sdk": "the viewer: pip install 'threedr1[viewer]'",
    "google-genai": "the Gemini teacher: pip install 'threedr1[synthesis]'",
    "tensorboard": "the tensorboard tracker: pip install 'threedr1[tracking]'",
    "gradio": "the demo: bash script/demo.sh, or pip install 'threedr1[demo]'",
}
# bytes: the quickstart with its Python environment; ScanNet's needed files with prepared scenes and annotations
QUICKSTART_BYTES, SCANNET_BYTES = 5e9, 15e9


def describe_environment() -> list[tuple[str, str]]:
    """Name and state of everything that decides what works here; a row without a name continues the one above."""
    rows = [
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        ("cpu cores", str(os.cpu_count())),
    ]
    rows += [(name, _version(name) or "missing: pip install -r requirements.txt") for name in REQUIRED]
    rows += [(name, _version(name) or f"absent; needed for {purpose}") for name, purpose in OPTIONAL.items()]
    rows.append(("cuda", describe_cuda()))
    rows += [("" if index else "point operations", line) for index, line in enumerate(describe_ops())]
    rows += [("box overlap", describe_boxes()), ("java", describe_java()), ("disk", describe_disk())]
    return rows


def check_environment() -> list[Finding]:
    """What is missing here and stops commands, or changes what they can do."""
    findings = [
        Finding("error", "package_missing", f"The Python package {name} is missing.", "bash script/setup.sh")
        for name in REQUIRED
        if _version(name) is None
    ]
    if shutil.which("java") is None:
        message = "Java is missing: METEOR and PTB-tokenized scores are n/a, all others work."
        fix = "install a Java runtime, 17 or newer, for instance: apt install default-jre-headless"
        findings.append(Finding("warning", "java_missing", message, fix))
    free = free_bytes(Path.cwd())
    if free < QUICKSTART_BYTES:
        message = f"{gigabytes(free)} are free here; the quickstart takes about {gigabytes(int(QUICKSTART_BYTES))}."
        fix = "make room on this disk, or run in a checkout on another one"
        findings.append(Finding("warning", "disk_low", message, fix, count=free, expected=int(QUICKSTART_BYTES)))
    return findings


def describe_disk() -> str:
    """Free space in the current folder, against what is needed."""
    needs = (
        f"quickstart takes about {QUICKSTART_BYTES / 1e9:.0f} GB, ScanNet's part about {SCANNET_BYTES / 1e9:.0f} GB"
    )
    return f"{gigabytes(free_bytes(Path.cwd()))} free here ({needs}, models and runs besides)"


def describe_cuda() -> str:
    """The GPUs that PyTorch sees, with their memory."""
    if not torch.cuda.is_available():
        build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
        return f"no GPU (PyTorch is {build}); everything runs on the CPU"
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    names = ", ".join(f"{gpu.name} {gpu.total_memory / 2**30:.0f} GiB" for gpu in gpus)
    return f"CUDA {torch.version.cuda}: {names}"


def describe_ops() -> list[str]:
    """Which backend the PointNet++ operations take on each kind of device, and why not a faster one: one line each.

    Libraries that can be built here are built by asking.
    """
    from ..third_party import pointnet2

    return pointnet2.describe_backends()


def describe_boxes() -> str:
    """What computes the overlap of boxes with headings on a CPU."""
    spec = importlib.util.find_spec("..utils.box_intersection", __package__)
    if spec is None:
        return "plain torch (no faster one: utils/box_intersection.pyx is not compiled)"
    return f"compiled loop ({spec.origin})"


def describe_java() -> str:
    """Java runs METEOR and the PTB tokenizer of the official caption scorers."""
    java = shutil.which("java")
    if java is None:
        return "absent; METEOR and PTB-tokenized scores need it (17 or newer)"
    done = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=30, check=False)
    lines = (done.stderr or done.stdout).splitlines()
    return lines[0] if done.returncode == 0 and lines else f"{java} does not run (exit status {done.returncode})"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit(root: Path = ROOT, ignoring: Sequence[str] = ()) -> str:
    """The checkout's commit, with `+` where the code differs from it; THREEDR1_COMMIT names it where git cannot.

    Args:
        ignoring: files whose changes do not count, relative to `root`.

    Returns:
        "unknown" for an installed package, or a copy without its history.
    """
    named = os.environ.get("THREEDR1_COMMIT", "")
    if named or not (root / ".git").exists():  # a package inside someone else's repository is not that repository
        return named or "unknown"
    try:
        head = _git(root, "rev-parse", "--short=10", "HEAD")
        changed = _git(root, "status", "--porcelain", "--", ".", *(f":!{name}" for name in ignoring))
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return head + ("+" if changed else "")


def _git(root: Path, *words: str) -> str:
    command = ["git", "-C", str(root), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.strip()


def machine_name(device: str = "cpu") -> str:
    """Name of the GPU, or the model of the CPU and how many cores this process may use."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(torch.device(device))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    architecture = platform.machine().replace("_", "-") or "unknown architecture"
    model = next((line.split(":", 1)[1].strip() for line in _cpu_lines() if line.startswith("model name")), "CPU")
    return f"{model}, {architecture}, {cores} {'core' if cores == 1 else 'cores'}"


def _cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")  # Linux only
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []


def versions(device: str, packages: Sequence[str] = ()) -> dict[str, str]:
    """Versions of Python, PyTorch and the named packages; of CUDA where it is used."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    found |= {name: importlib.metadata.version(name) for name in packages}
    if device.startswith("cuda"):
        found["cuda"] = str(torch.version.cuda)
    return found


def describe_start(device: str, processes: int = 1) -> dict[str, Any]:
    """When, where, with what code and by what command this process was started.

    `typed` is what the user typed, which a script that starts several commands leaves in THREEDR1_TYPED; else the
    command itself.
    """
    command = shlex.join(["python", *sys.argv])
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "typed": os.environ.get("THREEDR1_TYPED", "") or command,
        "command": command,
        "commit": commit(),
        "machine": machine_name(device),
        "processes": processes,
        "versions": versions(device, ("transformers",)),
    }
