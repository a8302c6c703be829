"""What the proof keeps of a run: scores question by question, and curves; one small JSON a run under docs/proof/runs.

A run is called `<name>-<seed>`, as script/proof.sh calls its folders. Values of questions that are all 0 or 1 are kept
as a string of these digits, others as numbers of three decimals.
"""

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..engine.tracking import STARTS
from ..utils.files import read_log, write_whole
from ..utils.metrics.score import score_predictions
from ..utils.predictions import Prediction, read_predictions
from ..visualization.curves import Curve, matching, read_curve
from ._proof_thoughts import told
from .results import rounded

# What is kept of each data set: its task's scorer, and metrics that are means over questions.
KEPT = {
    "scanrefer": ("scanrefer", ("Acc@0.25", "Acc@0.5")),
    "nr3d": ("scanrefer", ("Acc@0.25", "Acc@0.5")),
    "scanrefer_targets": ("scanrefer", ("Acc@0.25", "Acc@0.5")),
    "nr3d_targets": ("scanrefer", ("Acc@0.25", "Acc@0.5")),
    "scanqa": ("exact", ("EM",)),
    "sqa3d": ("sqa3d", ("EM",)),
    "planning": ("ll3da_per_sample", ("CIDEr", "ROUGE-L")),
}
CURVES = (
    "loss",
    "eval/loss",
    "eval/scanrefer/Acc@0.25",
    "eval/scanqa/EM",
    "eval/scanrefer_targets/Acc@0.25",
    "map25",
    "map50",
    "rewards/*/mean",
)
_MOST_POINTS = 60


@dataclass
class Asked:
    """The questions of one data set, in the order of their values: by scene, then by name."""

    digest: str  # of their names
    scenes: list[int]  # how many there are about each scene


@dataclass
class Run:
    """One trained model, as it is kept. `scores` holds values of questions by `dataset/metric`, as fractions.

    Command, commit, machine and versions are of the process that trained it (its starts.jsonl); of several, all that
    differ.
    """

    name: str
    seed: int
    command: str
    commit: str
    machine: str
    versions: str
    scores: dict[str, list[float]] = field(default_factory=dict)
    asked: dict[str, Asked] = field(default_factory=dict)  # by data set
    curves: dict[str, Curve] = field(default_factory=dict)
    well_formed: dict[str, float] = field(default_factory=dict)  # share of thoughts in form, by data set
    told: dict[str, float] = field(default_factory=dict)  # what thoughts say of the room (_proof_thoughts.told)

    @property
    def label(self) -> str:
        """Name and seed, as files are called."""
        return f"{self.name}-{self.seed}"


def thinned(curve: Curve, most: int = _MOST_POINTS) -> Curve:
    """A curve of at most so many points: means of equally many neighbours, each at its last step."""
    steps, values = curve
    size = -(-len(steps) // most) if steps else 1
    groups = range(0, len(steps), size)
    means = [sum(values[start : start + size]) / len(values[start : start + size]) for start in groups]
    return [steps[min(start + size, len(steps)) - 1] for start in groups], [rounded(value) or 0.0 for value in means]


def curves_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Curve]:
    """The kept curves out of rows of a metrics.jsonl."""
    names = [name for pattern in CURVES for name in matching(rows, pattern)]
    return {name: thinned(read_curve(rows, name)) for name in names}


def asked(entries: Sequence[Prediction]) -> Asked:
    """What was asked, of predictions sorted by scene and name."""
    digest = hashlib.sha256("\n".join(entry.sample_id for entry in entries).encode()).hexdigest()[:12]
    by_scene = itertools.groupby(entries, key=lambda entry: entry.scene_id)
    return Asked(digest, [len(list(group)) for _, group in by_scene])


def take_answers(run: Run, path: Path) -> None:
    """Put what a file of predictions tells in a run: values of questions, what was asked, what thoughts are like."""
    predictions = read_predictions(path)
    run.told = told(predictions)
    by_dataset: dict[str, list[Prediction]] = {}
    for entry in predictions:
        by_dataset.setdefault(entry.meta["dataset"], []).append(entry)
    for name, entries in by_dataset.items():
        if name not in KEPT:
            continue
        entries.sort(key=lambda entry: (entry.scene_id, entry.sample_id))
        scorer, metrics = KEPT[name]
        result = score_predictions(entries[0].task, entries, scorer, meteor=False, per_item=True)
        run.scores |= {f"{name}/{metric}": result["per_item"][metric] for metric in metrics}
        run.asked[name] = asked(entries)
        thoughts = [entry for entry in entries if entry.meta.get("mode") == "think"]
        if thoughts:
            run.well_formed[name] = rounded(sum(entry.well_formed for entry in thoughts) / len(thoughts)) or 0.0


def collect(label: str, answered: Path, trained: Path) -> Run:
    """One run out of the folder where it was trained, and of that of its `eval`.

    Args:
        label: `<name>-<seed>`.
        answered: holds predictions.jsonl; without it the run is kept with its curves alone.
        trained: holds metrics.jsonl and starts.jsonl.
    """
    name, _, seed = label.rpartition("-")
    if not name or not seed.isdigit():
        raise ValueError(f"{answered} is not named NAME-SEED, such as sft-0; name the runs as script/proof.sh does.")
    starts = read_log(trained / STARTS)
    if not starts:
        raise ValueError(f"{trained / STARTS} does not say what trained {label}; train it by script/proof.sh.")

    def of_all(key: str) -> str:
        return "; ".join(dict.fromkeys(str(start[key]) for start in starts))

    for start in starts:
        start["with"] = ", ".join(f"{package} {version}" for package, version in start["versions"].items())
    run = Run(name, int(seed), of_all("typed"), of_all("commit"), of_all("machine"), of_all("with"))
    if (answered / "predictions.jsonl").exists():
        take_answers(run, answered / "predictions.jsonl")
    run.curves = curves_of(read_log(trained / "metrics.jsonl"))
    return run


def write_run(run: Run, folder: Path) -> Path:
    """Write a run as `<folder>/<name>-<seed>.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    content = asdict(run) | {"scores": {name: _packed(values) for name, values in run.scores.items()}}
    path = folder / f"{run.label}.json"
    write_whole(path, json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n")
    return path


def read_runs(folder: Path) -> list[Run]:
    """All kept runs, by name and seed; ValueError names a file that is not one."""
    runs = []
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            content["scores"] = {name: _unpacked(values) for name, values in content["scores"].items()}
            content["asked"] = {name: Asked(**value) for name, value in content["asked"].items()}
            content["curves"] = {name: (curve[0], curve[1]) for name, curve in content["curves"].items()}
            runs.append(Run(**content))
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{path} is not a run of the proof ({error}); restore it from git.") from None
    return sorted(runs, key=lambda run: (run.name, run.seed))


def _packed(values: Sequence[float]) -> str | list[float]:
    if all(value in (0.0, 1.0) for value in values):
        return "".join(str(int(value)) for value in values)
    return [round(value, 3) for value in values]


def _unpacked(values: str | list[float]) -> list[float]:
    return [float(value) for value in values]
