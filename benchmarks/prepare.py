"""One raw ScanNet-format scan of 150,000 vertices prepared on one core, beside the official steps in plain Python.

Both read the same files, from the file cache, and write their result. Ours also keeps the outermost points, records
what the result was made from, and compresses nothing. The peer's code is in `_raw_scan.py`; the boxes agree, which is
checked. The exit status says whether ours stays within one second.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..datasets.scan_labels import load_label_map
from ..datasets.scannet import prepare_scan
from ._arguments import measuring_parser, positive
from ._measure import Load, median_seconds, report
from ._raw_scan import prepare_plainly, write_raw_scan
from .results import Row

TARGET_S = 1.0
MAX_POINTS = 50_000
PEER = "load_scannet_data's steps: json, plyfile, Python loops"


def measure(num_vertices: int, repeats: int) -> Row:
    """Seconds a scan. ValueError where the two ways disagree on a box."""
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        folder = write_raw_scan(root, num_vertices)
        table, out = root / "scannetv2-labels.combined.tsv", root / "out.npz"

        def ours() -> dict[int, np.ndarray]:
            out.unlink(missing_ok=True)  # else it would be current, and only be read
            scene = prepare_scan(folder, load_label_map(table), out, max_points=MAX_POINTS)
            return dict(zip(scene.object_ids_K.tolist(), scene.boxes_K7[:, :6], strict=True))

        def peer() -> dict[int, np.ndarray]:
            return prepare_plainly(folder, table, root, MAX_POINTS)

        boxes, theirs = ours(), peer()
        if boxes.keys() != theirs.keys() or any(np.abs(boxes[key] - theirs[key]).max() > 1e-4 for key in boxes):
            raise ValueError("The prepared boxes differ from the peer's; not measured.")
        mine, plain = median_seconds((ours, peer), repeats)
    return Row("prepare.seconds_per_scan", mine, "s", PEER, plain, note=f"{num_vertices} vertices, {len(boxes)} boxes")


def main(argv: Sequence[str] = ()) -> int:
    """Print a table; the exit status says whether a scan takes at most one second."""
    parser = measuring_parser("prepare", __doc__, repeats=5, cuda=False)
    parser.add_argument(
        "--vertices", type=positive, default=150_000, metavar="N", help="of the scan (default: %(default)s)"
    )
    arguments = parser.parse_args(list(argv))
    arguments.threads = arguments.threads or 1
    load = Load(arguments)
    row = measure(arguments.vertices, arguments.repeats)
    report("prepare", [row], arguments, load, argv=argv, packages=("numpy", "plyfile", "orjson"))
    return 0 if row.value <= TARGET_S else 1
