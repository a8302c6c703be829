"""Rooms generated a second by the points-only fast path, on one core and on all of them."""

import argparse
import multiprocessing
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

from ..datasets.rooms import generate_room

TARGET_CORES, TARGET_ROOMS_PER_S = 16, 50.0


def _make(seed: int) -> tuple[int, float]:
    """Vertices of a room and the processor seconds that it took."""
    start = time.process_time()
    room = generate_room("scene0000_00", seed, points_only=True)
    return len(room.vertices_V3), time.process_time() - start


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table; the exit status says whether 16 such cores would make 50 rooms a second."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rooms", type=int, default=64, help="rooms per measurement")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes of the second measurement")
    arguments = parser.parse_args(argv)
    if arguments.rooms < 1 or arguments.workers < 1:
        parser.error("--rooms and --workers must be at least 1")
    seeds = range(arguments.rooms)
    _make(0)  # first use fills the caches of unit shapes
    results = [_make(seed) for seed in seeds]
    per_room = sum(seconds for _, seconds in results) / len(results)
    with ProcessPoolExecutor(arguments.workers, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_make, range(arguments.workers)))  # starts the processes
        start = time.perf_counter()
        list(pool.map(_make, seeds, chunksize=4))
        together = len(seeds) / (time.perf_counter() - start)
    needed = TARGET_CORES / TARGET_ROOMS_PER_S
    print(f"{'measurement':<42}{'value':>10}")
    print(f"{'vertices a room':<42}{sum(count for count, _ in results) / len(results):>10.0f}")
    print(f"{'processor seconds a room, one core':<42}{per_room:>10.3f}")
    print(f"{'slowest room, processor seconds':<42}{max(seconds for _, seconds in results):>10.3f}")
    print(f"{f'rooms a second, {arguments.workers} processes':<42}{together:>10.1f}")
    print(f"{f'needed: seconds a room for {TARGET_ROOMS_PER_S:.0f}/s on {TARGET_CORES} cores':<42}{needed:>10.3f}")
    return 0 if per_room <= needed else 1


if __name__ == "__main__":
    raise SystemExit(main())
