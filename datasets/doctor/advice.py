"""What to do on a machine that has no data yet, in the order in which it pays."""

from pathlib import Path

_EXAMPLE = Path("data/scannet")
# a generated room with six frames, prepared, takes about 4 MB
_QUICKSTART = """\
1. Try everything on generated rooms: nothing to download, no GPU needed.
     bash script/quickstart.sh
   It trains and evaluates a small model in about ten minutes, and writes data/rooms (about 0.2 GB) and
   runs/quickstart/report.html. What you want later on real data works the same way."""
_ROOMS_HERE = """\
1. Try everything on generated rooms: nothing to download, no GPU needed.
     bash script/quickstart.sh
   That is the whole pipeline, on data/rooms, in about ten minutes. Rooms for this root alone, about 4 MB each:
     python main.py rooms --out {root} --train 24 --val 8"""
_REAL = """\
{first}. Ask for ScanNet: terms of use by e-mail, https://github.com/ScanNet/ScanNet. The answer can take a week.
   Of its 1.2 TB four files a scan are needed, about 10 GB for 1,513 scans (a rough number), in
   {root}/scans/<scene_id>/: data/README.md, "What of ScanNet is needed".
{second}. Lists of scenes and the label table, a few hundred kB, into {root}: scannetv2_train.txt, scannetv2_val.txt,
   scannetv2_test.txt (https://github.com/ScanNet/ScanNet, folder Tasks/Benchmark) and
   scannetv2-labels.combined.tsv (comes with the scans).
{third}. Annotations, into {root}/annotations: data/README.md, "Annotations". In this order:
     ScanQA             no form         1.1 MB (val)   https://github.com/ATR-DBI/ScanQA
     SQA3D              no form         2.7 MB (test)  https://zenodo.org/records/7792397
     3D-LLM             no form         6.4 MB (six)   https://github.com/Open3DA/LL3DA, folder data/3D_LLM
     ScanRefer          by form                        https://github.com/daveredrum/ScanRefer (serves Scan2Cap, too)
     Nr3D               no form                        https://github.com/referit3d/referit3d
     Scene-30K          no form                        https://huggingface.co/datasets/AIGeeksGroup/Scene-30K
     Cap3D              no form, last   131 MB         https://huggingface.co/datasets/tiange/Cap3D (and its clouds)
{fourth}. After each step ask again; the doctor names the next command:
     python main.py doctor --root {root}"""


def getting_started(root: Path | None = None) -> list[str]:
    """Steps from nothing to real data, lines of text; generated rooms come first."""
    first = _QUICKSTART if root is None else _ROOMS_HERE.format(root=root)
    return [*first.splitlines(), *real_data(root, first=2)]


def real_data(root: Path | None = None, *, first: int = 1) -> list[str]:
    """Steps to a data root of ScanNet's scenes, lines of text.

    Args:
        first: number of the first step.
    """
    numbers = dict(zip(("first", "second", "third", "fourth"), range(first, first + 4), strict=True))
    return _REAL.format(root=root or _EXAMPLE, **numbers).splitlines()
