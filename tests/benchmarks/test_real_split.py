"""The split of real scans: every scan in one part, sentences with their scans, and the seed alone decides."""

import json
import os
from pathlib import Path

import pytest

from threedr1.benchmarks import real_split

REAL = Path(os.environ.get("THREEDR1_REAL_DATA", "../shared/real"))
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="set THREEDR1_REAL_DATA to the folder of real scans")
SCANS = [f"scene{number:04d}_00" for number in range(12)]


def test_the_seed_alone_decides_which_scans_are_held_out():
    chosen = real_split.held_out_scans(SCANS, 4, seed=0)
    assert chosen == real_split.held_out_scans(SCANS[::-1], 4, seed=0) == sorted(chosen)
    assert len(set(chosen)) == 4 and set(chosen) < set(SCANS)
    assert len({tuple(real_split.held_out_scans(SCANS, 4, seed=seed)) for seed in range(8)}) > 4
    with pytest.raises(ValueError, match="There are 12 scans with sentences; hold out fewer than 12"):
        real_split.held_out_scans(SCANS, 12, seed=0)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"There is no .*scannetv2_val.txt"):
        real_split.write_root(tmp_path, tmp_path, tmp_path, tmp_path / "out", held_out=1, seed=0)
    (tmp_path / "scannetv2_val.txt").write_text("scene0000_00\n")
    with pytest.raises(ValueError, match="has no validation scan"):
        real_split.write_root(tmp_path, tmp_path, tmp_path, tmp_path / "out", held_out=1, seed=0)


@needs_real
def test_parts_share_no_scan_and_hold_the_sentences_of_their_own(tmp_path):
    words = [f"--{name}={REAL / folder}" for name, folder in (
        ("instances", "scannet_instances"), ("lists", "scannet"), ("annotations", "annotations")
    )]  # fmt: skip
    assert real_split.main([*words, "--out", str(tmp_path), "--held-out", "8"]) == 0
    parts = {part: (tmp_path / f"scannetv2_{part}.txt").read_text().split() for part in ("train", "val")}
    assert len(parts["train"]) == 238 and len(parts["val"]) == 8 and not set(parts["train"]) & set(parts["val"])
    assert len(list((tmp_path / "scannet_instances").glob("*.npz"))) == 246
    counted = 0
    for part, scans in parts.items():
        for name in ("scanrefer", "nr3d"):
            rows = json.loads((tmp_path / "annotations" / f"{name}_{part}_targets.json").read_text())
            assert rows and {row["scan_id"] for row in rows} <= set(scans)
            counted += len(rows)
    assert counted == 1985 + 2104  # of the 24 validation scans at hand
