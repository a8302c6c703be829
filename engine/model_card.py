"""The model card (README.md) of a saved model: a text made of facts, with the front matter that model hubs read."""

import functools
import importlib.metadata
import json
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .. import __version__
from .environment import commit

CARD = "README.md"
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_PACKAGES = ("torch", "transformers", "peft", "safetensors")
_TAGS = {
    "detect": ["3d", "point-cloud", "object-detection", "indoor-scenes"],
    "sft": ["3d", "point-cloud", "vision-language", "visual-question-answering", "indoor-scenes"],
}
_TAGS["grpo"] = [*_TAGS["sft"], "reinforcement-learning", "grpo"]
_WHAT = {
    "detect": "A scene encoder of 3D-R1: it finds the objects of an indoor scan as boxes with classes, and gives the "
    "language model its features.",
    "sft": "A reasoning vision-language model for indoor scenes, trained by supervised fine-tuning with 3D-R1.",
    "grpo": "A reasoning vision-language model for indoor scenes, trained by GRPO from verifiable rewards with 3D-R1.",
}
_LICENSE = (
    "The code of 3D-R1 is under the MIT licence. The weights also come under the terms of the base model and of the "
    "data that they were trained on; ScanNet and the benchmarks' annotations have terms of their own. Check these "
    "before you pass the weights on."
)
_LOAD_SCENE_VLM = """
```python
from threedr1 import SceneVLM

model = SceneVLM.from_pretrained("FOLDER", device="cuda")
```

```bash
python main.py infer --model FOLDER --scene scan.ply --ask "How many chairs are there?"
python main.py eval --set model=FOLDER
```
"""
_LOAD_ENCODER = """
```python
from threedr1.models.scene_encoder import SceneEncoder

encoder = SceneEncoder.from_pretrained("FOLDER")
```

```bash
python main.py sft --set model.encoder.pretrained=FOLDER
```
"""


@dataclass(frozen=True)
class RunFacts:
    """What a card says of the run.

    Args:
        kind: detect, sft or grpo.
        config: the resolved configuration, nested dictionaries.
        step: number of finished steps.
        samples: number of training samples by data set.
        scores: of the model itself, by metric, where it was scored in training.
    """

    kind: str
    config: dict[str, Any]
    step: int
    samples: dict[str, int]
    scores: dict[str, float] = field(default_factory=dict)


def write_card(folder: Path, facts: RunFacts, results: Path | None = None) -> None:
    """Write a model's card into its folder.

    Args:
        results: results.json of the run; its scores go into the card where the file is there.
    """
    evaluated = {}
    if results is not None and results.exists():
        evaluated = json.loads(results.read_text(encoding="utf-8")).get("results", {})
    description: dict[str, Any] = {}
    if (folder / "scene_vlm.json").exists():
        description = json.loads((folder / "scene_vlm.json").read_text(encoding="utf-8"))
    (folder / CARD).write_text(model_card(facts, description, evaluated), encoding="utf-8")


def model_card(facts: RunFacts, description: Mapping[str, Any], evaluated: Mapping[str, Any]) -> str:
    """Text of a card.

    Args:
        description: content of the model's scene_vlm.json; empty for a scene encoder.
        evaluated: scores by data set, as results.json has them.
    """
    base = _base_model(facts, description)
    front: dict[str, Any] = {"library_name": "threedr1", "tags": _TAGS[facts.kind]}
    if _HUB_NAME.fullmatch(base):
        front["base_model"] = base
        front["base_model_relation"] = "adapter" if description.get("adapter") else "finetune"
    if description:
        front["datasets"] = sorted(facts.samples)
    front |= {"license": "other", "license_name": "see-the-section-licence"}
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# 3D-R1: {Path(facts.config['run']['dir']).name}",
        _WHAT[facts.kind] + (f" Base model: {base or 'made from its configuration'}." if description else ""),
        "## Load it\n" + (_LOAD_SCENE_VLM if description else _LOAD_ENCODER).rstrip(),
        "## Training\n\n" + _training(facts),
        "## Scores\n\n" + _scores(facts.scores, evaluated),
        f"## Configuration\n\n```yaml\n{yaml.safe_dump(facts.config, sort_keys=False)}```",
        "## Licence\n\n" + _LICENSE,
    ]
    return "\n\n".join(sections) + "\n"


def _base_model(facts: RunFacts, description: Mapping[str, Any]) -> str:
    """Name of the base language model; of a local folder its last part, as its place means nothing elsewhere."""
    name = str(description.get("language_model", ""))
    if name == "language_model":  # the whole of it was trained
        name = str(facts.config.get("model", {}).get("language", {}).get("model", ""))
    return name if _HUB_NAME.fullmatch(name) and not Path(name).is_dir() else Path(name).name


def _training(facts: RunFacts) -> str:
    run, data = facts.config["run"], facts.config["data"]
    counts = ", ".join(f"{name} {count:,}" for name, count in sorted(facts.samples.items()))
    length = f"{facts.step:,} of {run['steps']:,} steps"
    lines = [
        f"- by `{facts.kind}`: {length}, batches of {run['batch_size']}, seed {run['seed']}",
        f"- training samples: {counts} (split {data['train_split']})",
        "- versions: " + ", ".join(f"{name} {version}" for name, version in _versions().items()),
    ]
    return "\n".join(lines)


@functools.cache
def _versions() -> dict[str, str]:
    found = {"threedr1": __version__, "python": platform.python_version()}
    found |= {name: importlib.metadata.version(name) for name in _PACKAGES}
    known = commit()
    return found | ({} if known == "unknown" else {"commit": known})


def _scores(scores: Mapping[str, float], evaluated: Mapping[str, Any]) -> str:
    rows = [f"| training | {name} | {value:.4f} | |" for name, value in scores.items()]
    for dataset, entry in evaluated.items():
        for name, value in entry.get("metrics", {}).items():
            if value is not None:
                rows.append(f"| {dataset} | {name} | {value:.4f} | {entry.get('scorer', '')} |")
    if not rows:
        return "None were measured yet: `python main.py eval --set model=FOLDER` does."
    return "\n".join(["| data set | metric | value | scorer |", "|---|---|---|---|", *rows])
