"""Candidate views: time of rendering them, and how often the selected ones show what a question asks about.

Ways of choosing six of sixteen: selected by the question `Where is the X?`; evenly spaced in the pool; random in the
pool; a ring of cameras at eye height that look at the middle of the room. Rendering has no peer here. The exit status
says whether the pool is made within half a second.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ..datasets.rooms import generate_room
from ..datasets.scene import Scene, floor_centre, load_scene
from ..models.view_pool import ViewPool, build_view_pool, visible_shares
from ..models.view_selector import ViewSelector
from ..utils.labels import NUM_CLASSES, OTHERS
from ..utils.render import Camera, look_at, pinhole, splat_batch
from ._arguments import measuring_parser, positive
from ._measure import Load, median_seconds, report
from .results import Row

WAYS = ("selected", "uniform", "random", "ring")
TARGET_MS = 500.0  # sixteen views of 224 x 224 on two CPU cores
VISIBLE = 0.15  # a target counts as shown where a view sees this share of its points


def room_scene(seed: int, num_points: int) -> Scene:
    """A generated room as a scene of `num_points` points (fewer where its mesh has fewer vertices), without frames."""
    room = generate_room(f"scene{seed:04d}_00", seed, points_only=True)
    generator = np.random.default_rng(seed)
    count = len(room.vertices_V3)
    pick = np.sort(generator.choice(count, min(num_points, count), replace=False))
    points_N3 = room.vertices_V3[pick]
    return Scene(
        scene_id=room.scene_id,
        points_N3=points_N3,
        colors_N3=room.colors_V3[pick],
        instance_ids_N=room.instance_V[pick],
        nyu40_N=room.nyu40_V[pick],
        object_ids_K=np.array([thing.object_id for thing in room.objects], dtype=np.int32),
        object_labels=[thing.label for thing in room.objects],
        class_ids_K=np.array([thing.class_id for thing in room.objects], dtype=np.int32),
        boxes_K7=np.stack([thing.box_7 for thing in room.objects]).astype(np.float32),
        axis_align_44=room.axis_align_44,
        origin_3=floor_centre(room.vertices_V3),
    )


def ring_views(scene: Scene, count: int, size: int) -> list[Camera]:
    """Cameras at eye height on a circle, all looking at the middle of the room: the usual horizontal baseline."""
    lower_3, upper_3 = scene.points_N3.min(0), scene.points_N3.max(0)
    middle_3 = np.array([*(lower_3 + upper_3)[:2] / 2, scene.origin_3[2] + 0.8])
    reach = 0.35 * float((upper_3 - lower_3)[:2].min())
    angles = np.arange(count) * 2 * np.pi / count
    eyes = [middle_3 + [reach * np.cos(angle), reach * np.sin(angle), 0.7] for angle in angles]
    return [Camera(look_at(eye_3, middle_3), pinhole(size, size, 75), size, size) for eye_3 in eyes]


def shown(scene: Scene, pool: ViewPool, selector: ViewSelector, generator: np.random.Generator) -> np.ndarray:
    """Per object of the 17 named classes and way of choosing: which chosen views show it, bool [K, 4, views].

    Ways: selected by the question `Where is the X?`, evenly spaced in the pool, random in the pool, ring.
    """
    probs_KC = torch.nn.functional.one_hot(torch.from_numpy(scene.class_ids_K).long(), NUM_CLASSES).float()
    uniform = np.linspace(0, len(pool) - 1, selector.num_views).round().astype(int)
    ring = ring_views(scene, selector.num_views, pool.images_VHW3.shape[1])
    ring_VK = visible_shares(scene, ring, scene.boxes_K7) >= VISIBLE
    rows = []
    for column in np.nonzero(scene.class_ids_K != OTHERS)[0]:
        visible_V = pool.visible_VK[:, column] >= VISIBLE
        chosen = selector.select(f"Where is the {scene.object_labels[column]}?", pool, probs_KC).indices
        random = generator.permutation(len(pool))[: selector.num_views]
        rows.append([visible_V[chosen], visible_V[uniform], visible_V[random], ring_VK[:, column]])
    return np.array(rows).reshape(-1, 4, selector.num_views)


def visibility(scenes: list[Scene], arguments: argparse.Namespace) -> list[Row]:
    """Share of the chosen views that show the target, and share of targets that any chosen view shows, by way."""
    selector = ViewSelector.from_settings(
        {"encoder": arguments.encoder, "num_views": arguments.views, "w_image": 1.0, "w_clip": 0.0}
    )
    generator = np.random.default_rng(0)
    hits = []
    for seed, scene in enumerate(scenes):
        pool = build_view_pool(scene, source="rendered", image_size=(arguments.size, arguments.size), seed=seed)
        hits.append(shown(scene, pool, selector, generator))
    hits_K4V = np.concatenate(hits)
    views = dict(zip(WAYS, hits_K4V.mean((0, 2)).tolist(), strict=True))
    targets = dict(zip(WAYS, hits_K4V.any(2).mean(0).tolist(), strict=True))
    note = f"{len(hits_K4V)} targets in {len(scenes)} scenes, {arguments.views} of 16 views, {arguments.encoder}"
    rows = []
    for kind, shares, what in (
        ("target_visible", views, "share of the chosen views that show the target"),
        ("target_found", targets, "share of targets that any chosen view shows"),
    ):
        for way, share in shares.items():
            peer, value = ("evenly spaced in the pool", shares["uniform"]) if way == "selected" else ("", None)
            rows.append(Row(f"views.{kind}_{way}", share, "share", peer, value, "higher", f"{what}; {note}"))
    return rows


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
    parser.add_argument("--rooms", type=positive, default=10, help="rooms to ask about (default: %(default)s)")
    parser.add_argument("--points", type=positive, default=50_000, help="points a room (default: %(default)s)")
    parser.add_argument("--size", type=positive, default=224, help="pixels a side (default: %(default)s)")
    parser.add_argument("--views", type=positive, default=6, help="views to select (default: %(default)s)")
    parser.add_argument("--encoder", default="all-MiniLM-L6-v2", help="text encoder (default: %(default)s)")
    parser.add_argument("--only-rendering", action="store_true", help="take times only; needs no text encoder")
    arguments = parser.parse_args(list(argv))
    if arguments.views > 16:
        parser.error("--views selects from sixteen candidates; ask for 1 to 16")
    load = Load(arguments)
    if arguments.scene:
        scenes = [load_scene(path) for path in arguments.scene]
    else:
        scenes = [room_scene(seed, arguments.points) for seed in range(arguments.rooms)]
    rows = rendering(scenes[0], arguments)
    if not arguments.only_rendering:
        rows += visibility(scenes, arguments)
    report("views", rows, arguments, load, argv=argv, packages=("numpy",))
    return 0 if rows[0].value <= TARGET_MS else 1
