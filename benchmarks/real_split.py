"""A data root of real labelled instances, with ScanRefer's and Nr3D's sentences about a part of their scans held out.

The sentences at hand are of ScanNet's validation scans. Which of these scans are tested on is drawn by a seed; the
rest are trained on, together with all training scans, of which there are no sentences but labels.

    python main.py bench real_split --instances REAL/scannet_instances --lists REAL/scannet \\
        --annotations REAL/annotations --out data/proof-real
    python main.py prepare --root data/proof-real

No peer: it measures nothing.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ._arguments import benchmark_parser, positive

TABLES = ("scannetv2-labels.combined.tsv", "scans_axis_alignment_matrices.json")
SENTENCES = ("scanrefer", "nr3d")
_STREAM = 41  # name of a random stream


def held_out_scans(scans: Sequence[str], count: int, seed: int) -> list[str]:
    """So many of some scans, drawn by the seed, whatever their order.

    Raises:
        ValueError: none would be left to train on.
    """
    if count >= len(scans):
        raise ValueError(f"There are {len(scans)} scans with sentences; hold out fewer than {count} of them.")
    rng = np.random.default_rng([_STREAM, seed])
    return sorted(np.asarray(sorted(scans))[rng.permutation(len(scans))[:count]].tolist())


def write_root(
    instances: Path, lists: Path, annotations: Path, out: Path, *, held_out: int, seed: int
) -> dict[str, int]:
    """Write the data root and say how many scans and sentences each part has.

    Raises:
        ValueError: no instances of validation scans, or a file that is missing.
    """
    known = {path.stem for path in instances.glob("*.npz")}
    validation = _read(lists / "scannetv2_val.txt").split()
    told = sorted(known & set(validation))
    if not told:
        raise ValueError(f"{instances} has no validation scan of {lists / 'scannetv2_val.txt'}; check both.")
    tested = held_out_scans(told, held_out, seed)
    parts = {"train": sorted(known - set(tested)), "val": tested}
    (out / "annotations").mkdir(parents=True, exist_ok=True)
    for name in TABLES:
        (out / name).write_text(_read(lists / name), encoding="utf-8")
    (out / "scannet_instances").mkdir(exist_ok=True)
    for name in sorted(known):
        shutil.copyfile(instances / f"{name}.npz", out / "scannet_instances" / f"{name}.npz")
    counts = {}
    for part, scans in parts.items():
        (out / f"scannetv2_{part}.txt").write_text("\n".join(scans) + "\n", encoding="utf-8")
        counts[f"{part} scans"] = len(scans)
        for name in SENTENCES:
            rows = json.loads(_read(annotations / f"{name}_val_targets.json"))
            own = [row for row in rows if row["scan_id"] in set(scans)]
            path = out / "annotations" / f"{name}_{part}_targets.json"
            path.write_text(json.dumps(own), encoding="utf-8")
            counts[f"{part} {name}"] = len(own)
    return counts


def _read(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"There is no {path}; data/README.md says where it comes from.")
    return path.read_text(encoding="utf-8")


def main(argv: Sequence[str] = ()) -> int:
    """Write the data root."""
    parser = benchmark_parser("real_split", __doc__)
    parser.add_argument("--instances", type=Path, required=True, metavar="DIR", help="scannet_instances/*.npz")
    parser.add_argument("--lists", type=Path, required=True, metavar="DIR", help="lists of scans, labels, alignments")
    parser.add_argument("--annotations", type=Path, required=True, metavar="DIR", help="*_val_targets.json")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="data root to write")
    parser.add_argument("--held-out", type=positive, default=8, metavar="N", help="scans tested on (default: 8)")
    parser.add_argument("--seed", type=int, default=0, help="chooses them (default: 0)")
    given = parser.parse_args(list(argv))
    counts = write_root(
        given.instances, given.lists, given.annotations, given.out, held_out=given.held_out, seed=given.seed
    )
    print(", ".join(f"{name} {count}" for name, count in counts.items()))
    return 0
