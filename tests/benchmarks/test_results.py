"""The record of measured claims, and that each benchmark runs, agrees with its peer and records what it measured."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from threedr1 import main as cli
from threedr1.benchmarks import BENCHMARKS, _arguments, _measure, results, run_benchmark
from threedr1.benchmarks.results import FIELDS, Row, merge, read_results, record, render

COMMAND = "python main.py bench ops"
GATHERS = ("group", "interpolate", "query_and_group")
OPERATIONS = ("fps", "ball_query", "three_nn", *GATHERS, *(f"{name}_backward" for name in GATHERS))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "new" / "results.json"


def entry(**changes: object) -> dict:
    values: dict[str, object] = {
        "name": "ops.fps_1_2_3",
        "value": 2.0,
        "unit": "ms",
        "peer": "loop",
        "peer_value": 8.0,
        "ratio": 4.0,
        "machine": "some CPU, 2 cores",
        "versions": {"python": "3.11.0", "torch": "2.13.0"},
        "commit": "abc",
        "date": "2026-01-02",
        "command": COMMAND,
        "note": "",
    }
    return values | changes


def test_ratios_say_how_many_times_better():
    assert Row("a", 2.0, "ms", "p", 8.0).ratio == 4.0
    assert Row("a", 2.0, "1/s", "p", 8.0, better="higher").ratio == 0.25
    assert Row("a", 2.0, "ms").ratio is None
    assert Row("a", 0.0, "ms", "p", 8.0).ratio is None


def test_a_record_has_every_field(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("THREEDR1_COMMIT", "deadbeef")
    rows = [Row("b.x", 1.23456789, "s", "p", 3.0, note="n"), Row("a.y", 5.0, "share")]
    record(rows, path, command=COMMAND, packages=("numpy",))
    entries = json.loads(path.read_text())
    assert [tuple(found) for found in entries] == [FIELDS, FIELDS]
    assert [found["name"] for found in entries] == ["a.y", "b.x"]
    assert entries[0]["peer"] == "" and entries[0]["peer_value"] is None and entries[0]["ratio"] is None
    assert entries[1]["value"] == 1.235 and entries[1]["ratio"] == 2.43 and entries[1]["note"] == "n"
    assert entries[1]["commit"] == "deadbeef" and entries[1]["command"] == COMMAND
    assert entries[1]["versions"]["numpy"] == np.__version__ and "cuda" not in entries[1]["versions"]
    assert entries[1]["machine"] == results.machine_name("cpu") and "core" in entries[1]["machine"]
    assert sorted(file.name for file in path.parent.iterdir()) == ["RESULTS.md", "results.json"]


def test_the_same_name_and_machine_is_replaced_and_others_stay(path: Path):
    merge([entry(), entry(name="boxes.iou_1_1"), entry(machine="another")], path)
    merge([entry(value=1.0)], path)
    found = {(row["machine"], row["name"]): row["value"] for row in read_results(path)}
    assert found == {
        ("some CPU, 2 cores", "ops.fps_1_2_3"): 1.0,
        ("some CPU, 2 cores", "boxes.iou_1_1"): 2.0,
        ("another", "ops.fps_1_2_3"): 2.0,
    }
    assert path.with_name("RESULTS.md").read_text() == render(read_results(path))


def test_a_failed_write_leaves_the_old_results(path: Path, monkeypatch: pytest.MonkeyPatch):
    merge([entry()], path)
    before = path.read_text()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        merge([entry(value=9.0)], path)
    assert path.read_text() == before
    assert sorted(file.name for file in path.parent.iterdir()) == ["RESULTS.md", "results.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [("[{]", "is not JSON"), ("{}", "not a list"), ('[{"name": "x"}]', "entry 1 does not have the fields")],
)
def test_a_broken_results_file_is_refused_and_kept(path: Path, content: str, message: str):
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        merge([entry()], path)
    assert path.read_text() == content


def test_what_is_not_a_number_is_not_recorded(path: Path):
    with pytest.raises(ValueError, match="x measured nan"):
        record([Row("x", float("nan"), "s")], path, command=COMMAND)
    assert not path.exists()


def test_the_page_gives_ratios_for_cpu_times_and_times_for_gpus():
    gpu = entry(machine="GPU", versions={"torch": "2.13.0", "cuda": "13.0"}, note="backend cuda")
    alone = entry(name="prepare.x", unit="s", peer="", peer_value=None, ratio=None, value=12345.6)
    page = render([entry(), gpu, alone])
    assert "| `ops.fps_1_2_3` |  |  | 4.00x | peer: loop |" in page
    assert "| `ops.fps_1_2_3` | 2.00 ms | 8.00 ms | 4.00x | peer: loop; backend cuda |" in page
    assert "| `prepare.x` | 12,346 s |  |  |" in page
    assert page.index("## GPU") < page.index("## some CPU")
    assert page.count(f"- `{COMMAND}`") == 2


def test_numbers_are_shown_with_three_digits():
    assert [results.shown(number) for number in (0, 0.0012345, 1.2345, 123.45, 1234.5, 98765.4)] == [
        *("0", "0.00123", "1.23", "123", "1234", "98,765"),
    ]


def test_bench_results_takes_in_another_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    mine, theirs = tmp_path / "results.json", tmp_path / "gpu" / "results.json"
    merge([entry()], mine)
    merge([entry(machine="GPU")], theirs)
    (tmp_path / "RESULTS.md").unlink()
    assert cli.main(["bench", "results", "--results", str(mine), "--merge", str(theirs)]) == 0
    assert {row["machine"] for row in read_results(mine)} == {"GPU", "some CPU, 2 cores"}
    assert "## GPU" in (tmp_path / "RESULTS.md").read_text()
    assert cli.main(["bench", "results", "--results", str(tmp_path / "none.json")]) == 1
    assert "There is no results file" in capsys.readouterr().err


def test_the_checkouts_page_is_that_of_its_results():
    entries = read_results(_arguments.RESULTS)
    assert entries, "benchmarks/results.json is empty; run the benchmarks with --record"
    assert _arguments.RESULTS.with_name("RESULTS.md").read_text(encoding="utf-8") == render(entries)
    for found in entries:
        start = re.match(
            r"(?:python|torchrun --standalone --nproc-per-node=\d+) main\.py bench (\w+)", found["command"]
        )
        assert start and start[1] in BENCHMARKS
        if found["ratio"] is not None:
            ratios = (found["peer_value"] / found["value"], found["value"] / found["peer_value"])
            assert any(found["ratio"] == pytest.approx(ratio, rel=2e-3) for ratio in ratios), found["name"]


def test_a_benchmark_does_not_read_the_command_line_of_its_caller(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from threedr1.benchmarks import iou

    monkeypatch.setattr(sys, "argv", ["main.py", "bench", "iou", "--boxes", "no"])
    monkeypatch.setattr(iou, "measure", lambda *_: [Row("boxes.x", 1.0, "ms")])
    assert run_benchmark("iou") == 0
    assert "boxes.x" in capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(BENCHMARKS))
def test_every_benchmark_explains_itself(name: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", name, "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert f"threedr1 bench {name}" in shown and BENCHMARKS[name].split()[0] in shown


@pytest.mark.parametrize(
    ("name", "words", "names"),
    [
        (
            "ops",
            ["--shapes", "2_600_40"],
            {f"ops.{op}_2_600_40" for op in OPERATIONS},
        ),
        ("lm_head", ["--shapes", "40_16_300"], {"lm_head.step_40_16_300"}),
        ("iou", ["--boxes", "12", "9"], {"boxes.iou_12_9", "boxes.iou_aligned_12_9", "boxes.giou_12_9"}),
        ("prepare", ["--vertices", "3000"], {"prepare.seconds_per_scan"}),
        (
            "views",
            ["--only-rendering", "--rooms", "1", "--points", "500", "--cloud", "900", "--size", "24"],
            {"views.pool16_ms", "views.render16_ms", "views.select_ms", "views.select_known_ms"},
        ),
    ],
)
def test_small_runs_agree_with_their_peers_and_are_recorded(name: str, words: list[str], names: set[str], path: Path):
    """The benchmarks refuse to measure what disagrees; how long things take is not tested."""
    threads = torch.get_num_threads()
    try:
        status = run_benchmark(name, [*words, "--repeats", "1", "--record", str(path), "--note", "quick test"])
    finally:
        torch.set_num_threads(threads)
    entries = read_results(path)
    assert status in (0, 1) and names <= {found["name"] for found in entries}
    for found in entries:
        assert found["value"] >= 0 and found["note"].endswith("quick test")
        assert found["command"] == " ".join(["python main.py bench", name, *words, "--repeats 1"])


def test_rooms_are_counted(path: Path):
    assert run_benchmark("rooms", ["--rooms", "1", "--workers", "1", "--record", str(path)]) in (0, 1)
    assert [row["name"] for row in read_results(path)] == ["rooms.per_s", "rooms.per_s_per_core", "rooms.slowest_s"]


@pytest.mark.slow
def test_scores_agree_with_pycocoevalcap(path: Path):
    pytest.importorskip("pycocoevalcap")
    from threedr1.utils.metrics.java import java_available

    if not java_available():
        pytest.skip("METEOR needs Java")
    words = ["--predictions", "20", "--repeats", "1", "--record", str(path)]
    assert run_benchmark("score", words) in (0, 1)
    assert read_results(path)[0]["peer"] == "pycocoevalcap"


def test_a_disagreement_is_not_measured(monkeypatch: pytest.MonkeyPatch, path: Path):
    from threedr1.benchmarks import iou, lm_head, ops

    monkeypatch.setattr(ops.pointnet2, "three_nn", lambda query, points: (None, torch.zeros(1, 300, 3).int()))
    with pytest.raises(ValueError, match="ops.three_nn_1_300_20.* differ from scipy"):
        run_benchmark("ops", ["--shapes", "1_300_20", "--ops", "three_nn", "--record", str(path)])
    monkeypatch.setattr(iou, "box3d_iou", lambda first, second: torch.zeros(len(first), len(second)))
    with pytest.raises(ValueError, match="Ours differs from polygon clipping"):
        run_benchmark("iou", ["--boxes", "9", "9", "--record", str(path)])
    monkeypatch.setattr(lm_head, "token_logprobs", lambda hidden, *_: (hidden.sum(1), hidden.sum(1)))
    with pytest.raises(ValueError, match="The LM head differs"):
        run_benchmark("lm_head", ["--shapes", "40_16_300", "--record", str(path)])
    assert not path.exists()


def test_a_walk_of_furthest_points_is_checked_wherever_it_begins():
    from threedr1.benchmarks.ops import shortfall

    points_BN3 = torch.tensor([[[0.0, 0, 0], [1, 0, 0], [4, 0, 0], [10, 0, 0]]])
    for walk, share in (
        ([0, 3, 2], 0.0),
        ([1, 3, 2], 0.0),
        ([0, 2, 3], 1 - 16 / 100),
        ([0, 3, 1], 1 - 1 / 16),
        ([0, 4], math.inf),
    ):
        assert shortfall(points_BN3, torch.tensor([walk])) == pytest.approx(share), walk


def test_packages_are_rows_where_they_agree_and_are_refused_where_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], path: Path
):
    from threedr1.benchmarks import ops
    from threedr1.third_party import pointnet2

    class Sampler:
        @staticmethod
        def sample_farthest_points(points: torch.Tensor, K: int) -> tuple[None, torch.Tensor]:
            return None, pointnet2.furthest_point_sample(points, K)

        @staticmethod
        def ball_query(centers: torch.Tensor, points: torch.Tensor, K: int, **_: object) -> object:
            raise RuntimeError("no kernel image")

        @staticmethod
        def knn_points(query: torch.Tensor, points: torch.Tensor, K: int, **_: object) -> object:
            return SimpleNamespace(idx=torch.zeros(*query.shape[:2], K).int())

    monkeypatch.setattr(ops, "load_packages", lambda *_: {"pytorch3d": Sampler})
    words = ["--shapes", "1_300_20", "--repeats", "1", "--record", str(path)]
    assert run_benchmark("ops", [*words, "--ops", "fps", "ball_query", "three_nn"]) == 0
    rows = {found["name"].partition(".vs_")[0]: found for found in read_results(path) if "pytorch3d" in found["peer"]}
    assert set(rows) == {"ops.fps_1_300_20"}
    shown = capsys.readouterr().out
    assert "ball_query_1_300_20: pytorch3d fails and is not measured: no kernel image" in shown
    assert "% of the results of pytorch3d differ from ours; it is not measured" in shown


def test_the_reference_serves_a_peer_and_nothing_else(monkeypatch: pytest.MonkeyPatch):
    from threedr1.benchmarks._ops_data import Data
    from threedr1.benchmarks.ops import our_way, reference_way, share_different

    data = Data("1_200_10", "cpu")
    for before in ("", "torch"):
        monkeypatch.setenv("THREEDR1_OPS", before)
        for name in OPERATIONS:
            ours, peer = our_way(name), reference_way(name)
            assert share_different(ours.read(ours.build(data)()), peer.read(peer.build(data)())) == 0
        assert os.environ["THREEDR1_OPS"] == before


def test_clipping_gives_known_overlaps():
    from threedr1.benchmarks.iou import clipped_iou

    unit = np.array([[0.0, 0, 0, 1, 1, 1, 0]])
    others = np.array([[0.5, 0, 0, 1, 1, 1, 0], [0, 0, 0.5, 1, 1, 1, np.pi / 2], [3, 0, 0, 1, 1, 1, 0.3]])
    octagon = 2 * (np.sqrt(2) - 1)  # a unit square and the same turned by 45 degrees share this area
    turned = np.array([[0.0, 0, 0, 1, 1, 1, np.pi / 4]])
    assert clipped_iou(unit, others)[0] == pytest.approx([1 / 3, 1 / 3, 0])
    assert clipped_iou(unit, turned)[0, 0] == pytest.approx(octagon / (2 - octagon))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ops", ["--shapes", "1_2"]),
        ("ops", ["--repeats", "0"]),
        ("ops", ["--device", "gpu"]),
        ("prepare", ["--device", "cuda"]),
        ("iou", ["--boxes", "0", "3"]),
        ("views", ["--views", "17"]),
        ("lm_head", ["--shapes", "8_0_3"]),
    ],
)
def test_wrong_arguments_stop_with_the_usage(name: str, words: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        run_benchmark(name, words)
    assert stop.value.code == 2
    assert f"usage: threedr1 bench {name}" in capsys.readouterr().err


def test_cuda_without_a_gpu_is_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["bench", "iou", "--device", "cuda"]) == 1
    assert "PyTorch sees no CUDA device" in capsys.readouterr().err


def test_recording_needs_a_checkout_or_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(_measure, "ROOT", tmp_path)
    assert cli.main(["bench", "iou", "--boxes", "2", "2", "--repeats", "1", "--record"]) == 1
    assert "name the file to record in" in capsys.readouterr().err


def test_the_recorded_command_leaves_out_where_and_why():
    words = ["--shapes", "1_2_3", "--record", "x.json", "--note", "two words", "--repeats", "3"]
    assert _measure.command_line("ops", words) == "python main.py bench ops --shapes 1_2_3 --repeats 3"
    assert _measure.command_line("ops", ["--record"]) == "python main.py bench ops"
    assert _measure.command_line("ops", ["--record", "--note=a b", "--repeats", "3"]).endswith("ops --repeats 3")


def test_the_commit_marks_changed_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def git(*words: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *words], check=True, capture_output=True)

    monkeypatch.delenv("THREEDR1_COMMIT", raising=False)
    monkeypatch.setattr(results, "ROOT", tmp_path)
    assert results.commit() == "unknown"
    git("init")
    (tmp_path / "code.py").write_text("1\n")
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "results.json").write_text("[]\n")
    git("add", "-A")
    git("commit", "-m", "first")
    clean = results.commit()
    (tmp_path / "benchmarks" / "results.json").write_text("[1]\n")
    assert len(clean) == 10 and results.commit() == clean
    (tmp_path / "code.py").write_text("2\n")
    assert results.commit() == clean + "+"
