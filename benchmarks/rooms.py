"""Rooms generated a second by the points-only fast path, on one core and on all of them.

No peer: nothing else writes these rooms. The exit status says whether 16 such cores would make 50 rooms a second.
"""

import multiprocessing
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

from ..datasets.rooms import ROOMS_VERSION, generate_room
from ._arguments import measuring_parser, positive
from ._measure import Load, report
from .results import Row

TARGET_CORES, TARGET_ROOMS_PER_S = 16, 50.0


def _make(seed: int) -> tuple[int, float]:
    """Vertices of a room and the processor seconds that it took."""
    start = time.process_time()
    room = generate_room("scene0000_00", seed, points_only=True)
    return len(room.vertices_V3), time.process_time() - start


def measure(num_rooms: int, workers: int) -> list[Row]:
    """Rooms a second: of one core by processor time, which other programs hardly disturb; of `workers` together."""
    seeds = range(num_rooms)
    _make(0)  # first use fills the caches of unit shapes
    results = [_make(seed) for seed in seeds]
    per_core = num_rooms / sum(seconds for _, seconds in results)
    slowest = max(seconds for _, seconds in results)
    vertices = sum(count for count, _ in results) / num_rooms
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_make, range(workers)))  # starts the processes
        start = time.perf_counter()
        list(pool.map(_make, seeds, chunksize=4))
        together = num_rooms / (time.perf_counter() - start)
    what = f"{ROOMS_VERSION}, {num_rooms} rooms of {vertices:.0f} vertices"
    note = (
        f"{what}; needed for {TARGET_ROOMS_PER_S:.0f}/s on {TARGET_CORES} cores: {TARGET_ROOMS_PER_S / TARGET_CORES}"
    )
    return [
        Row("rooms.per_s_per_core", per_core, "1/s", better="higher", note=note),
        Row("rooms.slowest_s", slowest, "s", note=f"{what}; processor time of the slowest"),
        Row("rooms.per_s", together, "1/s", better="higher", note=f"{what}; wall time, {workers} processes"),
    ]


def main(argv: Sequence[str] = ()) -> int:
    """Print a table; the exit status says whether 16 such cores would make 50 rooms a second."""
    parser = measuring_parser("rooms", __doc__, repeats=None, cuda=False)
    parser.add_argument("--rooms", type=positive, default=64, metavar="N", help="rooms per measurement (default: 64)")
    parser.add_argument(
        "--workers", type=positive, default=os.cpu_count() or 1, metavar="N", help="processes (default: one a core)"
    )
    arguments = parser.parse_args(list(argv))
    load = Load(arguments)
    rows = measure(arguments.rooms, arguments.workers)
    report("rooms", rows, arguments, load, argv=argv, packages=("numpy",))
    return 0 if rows[0].value >= TARGET_ROOMS_PER_S / TARGET_CORES else 1
