"""Candidate views: time of rendering them, and how often the selected ones show what a question asks about.

Six of sixteen candidate views are chosen for questions about held-out rooms, by the paper's utility with its fixed
weights, by each of its three terms alone, evenly spaced and at random; beside them stand the six that show most of the
target, six cameras on a ring at eye height and six that look straight down. A view shows an object from 100 pixels of
224 x 224 on, counted by the renderer's point index. The scene's own boxes stand for the detector's. Rendering has no
peer here. The exit status says whether the pool is made within half a second.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..datasets.rooms import generate_room, room_seed, scene_id_of
from ..datasets.rooms.as_scene import room_as_scene
from ..datasets.scene import Scene, load_scene
from ..models.image_encoder import Encoder, load_text_encoder
from ..models.view_pool import ViewPool, build_view_pool
from ..models.view_selector import ViewSelector, top_views
from ..utils.labels import NUM_CLASSES
from ..utils.metrics.result import Aggregate, bootstrap_intervals
from ..utils.render import splat_batch
from ._arguments import measuring_parser, positive
from ._measure import Load, median_seconds, report
from ._view_questions import (
    AskedScene,
    held_out_rooms,
    labelled_scene,
    object_pixels,
    ring_views,
    top_down_views,
)
from .results import Row

# ways that are settings of the selector; the fixed weights are the paper's
SELECTORS: dict[str, dict[str, Any]] = {"selected": {}}
TERMS = {"text_term": "text_to_3d", "image_term": "image_to_3d", "clip_term": "clip"}  # ways that follow one score
CAMERAS = {"ring": ring_views, "top_down": top_down_views}  # ways that are not out of the pool
BASELINES = ("uniform", "random", *CAMERAS)
CEILING = "oracle"  # the views of the pool with most pixels of the target: what no selection can beat
TARGET_MS = 500.0  # sixteen views of 224 x 224 on two CPU cores
VISIBLE_PIXELS = 100  # of 224 x 224
CANDIDATES = 16


@dataclass(eq=False)
class Shown:
    """Whether each chosen view shows a target, by kind of question and way: a list of [views] a scene and question."""

    hits: dict[tuple[str, str], list[list[np.ndarray]]]

    def table(self, kind: str, way: str) -> np.ndarray:
        """Sums a scene [R, 3]: questions that some view answers, shares of views that show the target, questions."""
        scenes = self.hits[kind, way]
        return np.array(
            [[sum(hit.any() for hit in rows), sum(hit.mean() for hit in rows), len(rows)] for rows in scenes]
        )


def build_selectors(encoder: Encoder, name: str, num_views: int) -> dict[str, ViewSelector]:
    """A selector a way; an encoder without pictures takes S_Image->3D by coverage and no S_CLIP."""
    weights: dict[str, Any] = {} if encoder.has_images else {"w_image": 1.0, "w_clip": 0.0}
    return {
        way: ViewSelector(encoder, encoder_name=name, num_views=num_views, **(weights | settings))
        for way, settings in SELECTORS.items()
    }


def chosen_views(
    question: str,
    pool: ViewPool,
    probs_KC: torch.Tensor,
    selectors: Mapping[str, ViewSelector],
    generator: np.random.Generator,
) -> dict[str, list[int]]:
    """The views of the pool that each way chooses."""
    found: dict[str, list[int]] = {}
    scores: dict[str, torch.Tensor] = {}
    for way, selector in selectors.items():
        selection = selector.select(question, pool, probs_KC)
        found[way] = selection.indices
        scores = scores or selection.scores
    first = next(iter(selectors.values()))
    for way, term in TERMS.items():
        if term != "clip" or first.encoder.has_images:
            found[way] = top_views(scores[term], first.num_views)
    found["uniform"] = np.linspace(0, len(pool) - 1, first.num_views).round().astype(int).tolist()
    found["random"] = generator.permutation(len(pool))[: first.num_views].tolist()
    return found


def shown(scenes: Sequence[AskedScene], selectors: Mapping[str, ViewSelector], size: int) -> Shown:
    """Ask every question of every scene and look what each way's views show."""
    generator = np.random.default_rng(0)
    hits: dict[tuple[str, str], list[list[np.ndarray]]] = {}
    num_views = next(iter(selectors.values())).num_views
    needed = VISIBLE_PIXELS * (size / 224) ** 2
    for entry in scenes:
        scene = entry.scene
        pool = build_view_pool(scene, source="rendered", num_candidates=CANDIDATES, image_size=(size, size))
        probs_KC = torch.nn.functional.one_hot(torch.from_numpy(scene.class_ids_K).long(), NUM_CLASSES).float()
        pixels_VK = object_pixels(scene, pool.cameras)
        fixed = {way: object_pixels(scene, place(scene, num_views, size)) for way, place in CAMERAS.items()}
        for kind, questions in entry.questions.items():
            found: dict[str, list[np.ndarray]] = {}
            for asked in questions:
                targets = list(asked.targets)
                views = chosen_views(asked.question, pool, probs_KC, selectors, generator)
                views[CEILING] = (-pixels_VK[:, targets].max(1)).argsort(kind="stable")[:num_views].tolist()
                seen = {way: pixels_VK[rows][:, targets] for way, rows in views.items()}
                seen |= {way: table_VK[:, targets] for way, table_VK in fixed.items()}
                for way, pixels_VT in seen.items():
                    found.setdefault(way, []).append(np.asarray((pixels_VT >= needed).any(1)))
            for way, rows in found.items():
                hits.setdefault((kind, way), []).append(rows)
    return Shown(hits)


def _gains(tables: Mapping[str, np.ndarray], column: int) -> str:
    """What `selected` is ahead of each baseline, with intervals over scenes."""
    aggregates = {
        way: Aggregate(
            np.stack([tables["selected"][:, column] - tables[way][:, column], tables[way][:, 2]], 1), _ratio
        )
        for way in BASELINES
    }
    intervals = bootstrap_intervals(aggregates, seed=0)
    return ", ".join(
        f"{100 * aggregate.value():+.1f} [{100 * intervals[way][0]:+.1f}, {100 * intervals[way][1]:+.1f}] over {way}"
        for way, aggregate in aggregates.items()
    )


def _ratio(sums_R2: np.ndarray) -> np.ndarray:
    return sums_R2[:, 0] / sums_R2[:, 1]


def visibility(scenes: Sequence[AskedScene], arguments: argparse.Namespace) -> tuple[list[Row], dict[str, str]]:
    """Rows for each kind of question and way, and their intervals (bootstrap over scenes) as remarks."""
    encoder = load_text_encoder(arguments.encoder)
    selectors = build_selectors(encoder, arguments.encoder, arguments.views)
    found = shown(scenes, selectors, arguments.size)
    rows, remarks = [], {}
    for kind in dict.fromkeys(kind for kind, _ in found.hits):
        tables = {way: found.table(kind, way) for other, way in found.hits if other == kind}
        note = (
            f"{int(tables['selected'][:, 2].sum())} questions in {len(scenes)} scenes, {arguments.views} of "
            f"{CANDIDATES} views, encoder {Path(arguments.encoder).name}"
        )
        for column, (name, what) in enumerate(
            (
                ("found", "questions whose target any chosen view shows"),
                ("visible", "chosen views that show the target"),
            )
        ):
            parts = {way: Aggregate(table[:, [column, 2]], _ratio) for way, table in tables.items()}
            intervals = bootstrap_intervals(parts, seed=0)
            for way, part in parts.items():
                low, high = intervals[way]
                row = f"views.{kind}_{name}_{way}"
                remarks[row] = f"  [{low:.3f}, {high:.3f}]"
                peer, value, gain = "", None, ""
                if way == "selected":
                    peer, value = "evenly spaced in the pool", parts["uniform"].value()
                    gain = f"; points ahead: {_gains(tables, column)}"
                text = f"{what}; 95 % interval {low:.3f} to {high:.3f}{gain}; {note}"
                rows.append(Row(row, part.value(), "share", peer, value, "higher", text))
    return rows, remarks


def selecting(scene: Scene, arguments: argparse.Namespace) -> list[Row]:
    """Milliseconds of a new question about a scene whose views are embedded."""
    encoder = load_text_encoder(arguments.encoder)
    selector = next(iter(build_selectors(encoder, arguments.encoder, arguments.views).values())).to(arguments.device)
    pool = build_view_pool(scene, source="rendered", image_size=(arguments.size, arguments.size))
    probs_KC = torch.nn.functional.one_hot(torch.from_numpy(scene.class_ids_K).long(), NUM_CLASSES).float()
    selector.select("Where is the chair?", pool, probs_KC)
    number = iter(range(1_000_000))

    def select() -> object:
        return selector.select(f"What color is the chair closest to door {next(number)}?", pool, probs_KC)

    (taken,) = median_seconds((select,), 4 * arguments.repeats, arguments.device)
    note = f"a new question, {len(pool)} embedded views, {len(scene.boxes_K7)} objects, {Path(arguments.encoder).name}"
    return [Row("views.select_ms", 1000 * taken, "ms", note=note)]


def rendering(scene: Scene, arguments: argparse.Namespace) -> list[Row]:
    """Milliseconds of rendering sixteen views, and of making the whole pool with cameras and visibility."""
    size = (arguments.size, arguments.size)
    pool = build_view_pool(scene, source="rendered", num_candidates=16, image_size=size)

    def make_pool() -> object:
        return build_view_pool(scene, source="rendered", num_candidates=16, image_size=size, device=arguments.device)

    def splat() -> object:
        return splat_batch(scene.points_N3, scene.colors_N3, pool.cameras, device=arguments.device)

    pool_s, splat_s = median_seconds((make_pool, splat), arguments.repeats, arguments.device)
    note = f"{len(scene.points_N3)} points, 16 views of {arguments.size} x {arguments.size}"
    return [
        Row("views.pool16_ms", 1000 * pool_s, "ms", note=f"{note}, with placing cameras and visibility"),
        Row("views.render16_ms", 1000 * splat_s, "ms", note=note),
    ]


def main(argv: Sequence[str] = ()) -> int:
    """Print a table; the exit status says whether the pool is made within the target on this machine."""
    parser = measuring_parser("views", __doc__, repeats=5)
    parser.add_argument("--scene", type=Path, action="append", help="prepared scene (.npz); default: generated rooms")
    parser.add_argument(
        "--rooms", type=positive, default=40, help="held-out rooms to ask about (default: %(default)s)"
    )
    parser.add_argument("--points", type=positive, default=50_000, help="points a room (default: %(default)s)")
    parser.add_argument("--size", type=positive, default=224, help="pixels a side (default: %(default)s)")
    parser.add_argument("--views", type=positive, default=6, help="views to select (default: %(default)s)")
    parser.add_argument(
        "--encoder",
        default="runs/dual",
        help="of text and pictures, or of text alone; `python main.py dual --out runs/dual` trains the default",
    )
    parser.add_argument("--only-rendering", action="store_true", help="take times only; needs no text encoder")
    arguments = parser.parse_args(list(argv))
    if arguments.views > 16:
        parser.error("--views selects from sixteen candidates; ask for 1 to 16")
    load = Load(arguments)
    if arguments.scene:
        scenes = [labelled_scene(load_scene(path)) for path in arguments.scene]
    elif arguments.only_rendering:
        room = generate_room(scene_id_of("val", 0), room_seed(0, "val", 0), points_only=True)
        scenes = [AskedScene(room_as_scene(room, arguments.points), {})]
    else:
        scenes = held_out_rooms(arguments.rooms, arguments.points)
    rows, remarks = rendering(scenes[0].scene, arguments), {}
    if not arguments.only_rendering:
        rows += selecting(scenes[0].scene, arguments)
        more, remarks = visibility(scenes, arguments)
        rows += more
    report("views", rows, arguments, load, argv=argv, packages=("numpy",), remarks=remarks)
    return 0 if rows[0].value <= TARGET_MS else 1
