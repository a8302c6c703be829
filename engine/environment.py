"""What this installation can do, for `python main.py doctor`."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess

import torch

REQUIRED = ("torch", "transformers", "peft", "accelerate", "safetensors", "numpy", "scipy", "plyfile", "trimesh")
OPTIONAL = {
    "rerun-sdk": "the viewer: pip install 'threedr1[viewer]'",
    "google-genai": "the Gemini teacher: pip install 'threedr1[synthesis]'",
    "tensorboard": "the tensorboard tracker: pip install 'threedr1[tracking]'",
}


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
    rows += [("box overlap", describe_boxes()), ("java", describe_java())]
    return rows


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
