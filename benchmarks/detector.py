"""Scenes a second of the scene encoder in training and inference, and where a training step's time goes.

Encoder, criterion and optimizer are those of script/recipes/detect.yaml. A training step takes a batch on the host
to the device and does forward, matching and losses, backward, the optimizer and the averaged weights; batches are made
before, since `loader` measures that. Inference ends with the proposals. Matching is all decoder layers and
scenes at once against 3DETR's way; the other numbers have no peer. The scenes are generated rooms, or prepared ones
under --root.

With --scores nothing is timed: rows are made of what `python main.py detect` wrote into its run folders.
"""

import argparse
import copy
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..engine.config import DetectConfig, LanguageConfig, load_config
from ..engine.detect import mean_over_ranks, train_step
from ..engine.detection_data import Batch, SceneSamples
from ..engine.optim import Optimizer, update_average
from ..engine.runtime import Runtime, seed_everything
from ..models.scene_encoder import DetectionTargets, SceneEncoder, SetCriterion, build_scene_encoder, select_proposals
from ..models.scene_encoder.matcher import match
from ._arguments import measuring_parser, positive
from ._detector_peer import PEER, PaddedTargets, check_pairs, match_by_layer
from ._detector_scores import named_run, scan_rows, score_rows
from ._measure import Load, median_seconds, report
from ._rooms import write_rooms
from ._shares import shares
from .results import ROOT, Row

RECIPE = ROOT / "script" / "recipes" / "detect.yaml"
TIMED = ("points", "batch_size", "backbone", "precision", "root", "set")  # arguments that --scores has no use for
BATCHES = 4
PLAIN = ("pointnet2", "bfloat16")  # the recipe's, whose rows have no suffix
SPARE_POINTS = 5 / 4  # points of a generated room, of those that are sampled: 50,000 to 40,000, as prepared scans


class KeptBatches(SceneSamples):
    """Training batches that are made beforehand and stay on the host."""

    def __init__(self, config: DetectConfig, runtime: Runtime):
        super().__init__(config, config.data.train_split)
        with self.loader:
            self.kept = [SceneSamples.training_batch(self, step, runtime) for step in range(BATCHES)]

    def training_batch(self, step: int, runtime: Runtime) -> Batch:  # noqa: ARG002 - as the class above
        return self.kept[step % len(self.kept)]


class Predicted(NamedTuple):
    """What the criterion matches: predictions of L layers, and the objects."""

    logits_LBQC1: Tensor
    boxes_LBQ7: Tensor
    targets: DetectionTargets
    repeats: list[int]  # queries that an object takes, by layer


class Training:
    """Encoder, criterion and optimizer as engine.detect sets them up, on one device."""

    def __init__(self, config: DetectConfig, device: str):
        self.config, self.runtime = config, Runtime(torch.device(device))
        self.batches = KeptBatches(config, self.runtime)
        seed_everything(config.run.seed)
        self.encoder: SceneEncoder = build_scene_encoder(config.encoder).to(device).train()
        if config.precision == "bfloat16":
            self.encoder.compute_in(torch.bfloat16)
        self.average = copy.deepcopy(self.encoder).eval().requires_grad_(False)
        self.criterion = SetCriterion(self.encoder.num_classes, repeats=config.queries_per_object).to(device)
        parameters = dict(self.encoder.named_parameters())
        self.optimizer = Optimizer(parameters, config.optim, config.run.steps, self.runtime)
        self.done = 0

    def step(self) -> dict[str, float]:
        """One step of the training loop; returns its losses."""
        seed_everything(self.config.run.seed, self.done, self.runtime.rank)
        losses = train_step(self.encoder, self.criterion, self.batches, self.done, self.runtime)
        self.optimizer.step(self.done)
        if self.config.ema_decay:
            update_average(self.average, self.encoder, self.config.ema_decay, self.done)
        self.done += 1
        return mean_over_ranks(losses, self.runtime)

    @torch.no_grad()
    def infer(self) -> Tensor:
        """Boxes [B, K, 7] of the proposals of the first batch, as a language model would get them."""
        points_BN3, features_BNF, _ = self.batches.kept[0]
        self.encoder.eval()
        encoding = self.encoder(points_BN3.to(self.runtime.device), features_BNF.to(self.runtime.device))
        self.encoder.train()
        return select_proposals(encoding, LanguageConfig().num_proposals).boxes_BK7

    @torch.no_grad()
    def predicted(self) -> Predicted:
        """What one training step has to match."""
        points_BN3, features_BNF, targets = self.batches.kept[0]
        encoding = self.encoder(points_BN3.to(self.runtime.device), features_BNF.to(self.runtime.device))
        layers = [*encoding.intermediate, encoding.final]
        return Predicted(
            torch.stack([layer.class_logits_BQC1 for layer in layers]).float(),
            torch.stack([layer.boxes_BQ7 for layer in layers]),
            targets.to(self.runtime.device),
            [self.criterion.repeats] * (len(layers) - 1) + [1],
        )


def matching(predicted: Predicted) -> tuple[Callable[[], object], Callable[[], object]]:
    """Ours and the peer's, one query an object; ValueError where they make other pairs."""
    logits_LBQC1, boxes_LBQ7, targets, _ = predicted
    padded = PaddedTargets.of(targets)
    check_pairs(match(logits_LBQC1, boxes_LBQ7, targets), match_by_layer(logits_LBQC1, boxes_LBQ7, padded), targets)
    return lambda: match(logits_LBQC1, boxes_LBQ7, targets), lambda: match_by_layer(logits_LBQC1, boxes_LBQ7, padded)


def measure(config: DetectConfig, device: str, repeats: int, source: str) -> list[Row]:
    """Rates, time of matching, and shares of a training step.

    Args:
        source: what the scenes are, for the notes.
    """
    before = torch.get_float32_matmul_precision()
    if config.precision == "bfloat16":
        torch.set_float32_matmul_precision("high")  # as engine.detect
    try:
        return _rows(Training(config, device), device, repeats, source)
    finally:
        torch.set_float32_matmul_precision(before)


def _rows(training: Training, device: str, repeats: int, source: str) -> list[Row]:
    config = training.config
    training.step()
    predicted = training.predicted()
    ours, peer = matching(predicted)
    actions = (training.step, training.infer, ours, peer, lambda: match(*predicted))
    step_s, infer_s, match_s, peer_s, trained_s = median_seconds(actions, repeats, device)
    spent = shares(training.step, device, step_s) | {"match": trained_s / step_s}
    size = config.run.batch_size
    num_layers, num_scenes, num_queries = predicted.boxes_LBQ7.shape[:3]
    objects = len(predicted.targets.boxes_T7)
    pairs = f"{num_layers} layers, {num_scenes} scenes, {objects} objects, {num_queries} queries a scene"
    loop = "host to device, forward, matching, losses, backward, optimizer, averaged weights; the loader is not in it"
    proposals = f"host to device, forward, {LanguageConfig().num_proposals} proposals"
    rows = [
        Row("detector.train_scenes_per_s", size / step_s, "1/s", better="higher", note=loop),
        Row("detector.infer_scenes_per_s", size / infer_s, "1/s", better="higher", note=proposals),
        Row("detector.match_ms", 1000 * match_s, "ms", PEER, 1000 * peer_s, note=pairs),
        *_share_rows(spent, device),
    ]
    what = f"{config.encoder.backbone}, {config.precision}"
    what = f"{what}, {config.data.num_points} points, batches of {size}, {source}"
    suffix = "".join(f"_{name}" for name in (config.encoder.backbone, config.precision) if name not in PLAIN)
    return [replace(row, name=row.name + suffix, note=f"{row.note}; {what}") for row in rows]


def _share_rows(spent: Mapping[str, float], device: str) -> list[Row]:
    """Rows of those shares that were found."""
    by = "kernels by name" if device.startswith("cuda") else "operators by name, under the profiler"
    how = {"match": "match alone", "operators": by, "attention": by}
    if not device.startswith("cuda"):
        how["attention"] += ", without a backward that is not one operator"
    rows = []
    for kind, way in how.items():
        if spent[kind] > 0:
            note = f"share of a training step's wall time; {way}"
            rows.append(Row(f"detector.{kind}_share", spent[kind], "share", note=note))
        else:  # one that works by other names, such as attention by plain matrix products
            print(f"detector.{kind}_share: the profiler saw none by name; no row")
    return rows


def build_config(arguments: argparse.Namespace, root: Path) -> DetectConfig:
    """The recipe with what the command line changes."""
    changes = [f"data.root={root}", f"data.num_points={arguments.points}", f"run.batch_size={arguments.batch_size}"]
    changes += [f"encoder.backbone={arguments.backbone}", f"precision={arguments.precision}"]
    changes += ["data.workers=0", *arguments.set]  # the batches are made before
    config = load_config("detect", RECIPE, changes)
    if config.run.steps < BATCHES:
        raise ValueError(f"run.steps is {config.run.steps}; the benchmark takes at least {BATCHES}.")
    return config


def timed(arguments: argparse.Namespace) -> list[Row]:
    """All rows of the device, on prepared scenes or on rooms that are made for it."""
    if arguments.root is not None:
        config = build_config(arguments, arguments.root)
        return measure(config, arguments.device, arguments.repeats, f"prepared scenes of {arguments.root.name}")
    with tempfile.TemporaryDirectory() as temporary:
        config = build_config(arguments, Path(temporary))
        write_rooms(Path(temporary), max(8, config.run.batch_size), round(SPARE_POINTS * config.data.num_points))
        return measure(config, arguments.device, arguments.repeats, "generated rooms")


def main(argv: Sequence[str] = ()) -> int:
    """Print a table."""
    parser = measuring_parser("detector", __doc__, repeats=10)
    parser.add_argument("--points", type=positive, default=40_000, metavar="N", help="a scene (default: %(default)s)")
    parser.add_argument("--batch-size", type=positive, default=8, metavar="N", help="scenes (default: %(default)s)")
    parser.add_argument("--backbone", choices=("pointnet2", "ptv3"), default="pointnet2", help="default: %(default)s")
    parser.add_argument(
        "--precision", choices=("float32", "bfloat16"), default="bfloat16", help="default: %(default)s"
    )
    parser.add_argument("--root", type=Path, metavar="DIR", help="prepared scenes (default: rooms made for it)")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="of the recipe")
    parser.add_argument("--scores", nargs="+", type=named_run, metavar="NAME=RUN_DIR", help="rows of finished runs")
    parser.add_argument(
        "--scan",
        nargs=2,
        type=Path,
        metavar=("CLOUD", "BOXES"),
        help="with --scores: recall on one labelled scan too (.npz with xyz and rgb; JSON with scene_id, "
        "axis_align_matrix and instances, each with box_aligned)",
    )
    arguments = parser.parse_args(list(argv))
    useless = [name for name in TIMED if getattr(arguments, name) != parser.get_default(name)]
    if not arguments.scores:
        if arguments.scan:
            parser.error("--scan needs --scores NAME=RUN_DIR, whose encoder looks at it")
        load = Load(arguments)
        report("detector", timed(arguments), arguments, load, argv=argv, packages=("scipy",))
        return 0
    if useless:
        parser.error(f"--scores takes no times; leave --{useless[0].replace('_', '-')} out")
    names = [name for name, _ in arguments.scores]
    if len(set(names)) < len(names):
        parser.error("--scores takes every NAME once")
    arguments.repeats = None
    rows = [row for name, folder in arguments.scores for row in score_rows(name, folder)]
    if arguments.scan:
        rows += [row for name, folder in arguments.scores for row in scan_rows(name, folder, *arguments.scan)]
    Load(arguments)  # refuses a GPU that is not there
    report("detector", rows, arguments, None, argv=argv)
    return 0
