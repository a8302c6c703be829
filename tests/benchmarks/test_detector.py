"""The detector's benchmark: its rows, its peer, how shares are counted, and scores out of run folders."""

import itertools
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.autograd import DeviceType

from threedr1 import main as cli
from threedr1.benchmarks import _detector_peer, _detector_scores, _shares, detector, run_benchmark
from threedr1.benchmarks._detector_peer import PaddedTargets, check_pairs, layer_cost, match_by_layer
from threedr1.benchmarks._detector_scores import scan_rows
from threedr1.benchmarks._rooms import room_scene, write_rooms
from threedr1.benchmarks.results import read_results
from threedr1.engine.config import load_config
from threedr1.engine.detect import train
from threedr1.models.scene_encoder import DetectionTargets
from threedr1.models.scene_encoder.matcher import match, match_cost

SIZES = ("num_tokens=64", "num_queries=32", "width=32", "num_neighbors=8", "encoder_layers=1", "decoder_layers=2")
SMALL = [f"encoder.{size}" for size in SIZES]
SHARES = {f"detector.{kind}_share" for kind in ("match", "operators", "attention")}
RATES = {"detector.train_scenes_per_s", "detector.infer_scenes_per_s"}


def measured(path: Path, *words: str) -> dict[str, dict]:
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    try:
        words = ("--points", "400", "--batch-size", "2", "--repeats", "1", *words, "--record", str(path))
        assert run_benchmark("detector", [*words, "--set", *SMALL]) == 0
    finally:
        torch.set_num_threads(threads)
    assert torch.get_float32_matmul_precision() == precision
    return {row["name"]: row for row in read_results(path)}


def test_it_measures_rates_matching_and_shares(tmp_path: Path):
    rows = measured(tmp_path / "results.json", "--threads", "1")
    assert set(rows) == {"detector.match_ms"} | RATES | SHARES
    for name in SHARES:
        assert 0 < rows[name]["value"] < 1 and rows[name]["unit"] == "share"
    assert sum(rows[name]["value"] for name in SHARES) < 1
    for name in RATES:
        assert rows[name]["value"] > 0 and rows[name]["unit"] == "1/s" and rows[name]["peer_value"] is None
    assert rows["detector.match_ms"]["ratio"] > 0 and "3DETR" in rows["detector.match_ms"]["peer"]
    assert "the loader is not in it" in rows["detector.train_scenes_per_s"]["note"]
    assert "pointnet2, bfloat16, 400 points, batches of 2, generated rooms" in rows["detector.match_share"]["note"]


def test_other_settings_have_rows_of_their_own_and_scenes_can_be_prepared_ones(tmp_path: Path):
    write_rooms(tmp_path / "own", 2, 500)
    rows = measured(tmp_path / "results.json", "--precision", "float32", "--root", str(tmp_path / "own"))
    assert set(rows) == {f"{name}_float32" for name in {"detector.match_ms"} | RATES | SHARES}
    assert all("float32, 400 points, batches of 2, prepared scenes of own" in row["note"] for row in rows.values())


def batch(
    counts: tuple[int, ...], num_layers: int, num_queries: int
) -> tuple[torch.Tensor, torch.Tensor, DetectionTargets]:
    generator = torch.Generator().manual_seed(len(counts))

    def boxes(*shape: int) -> torch.Tensor:
        centre, size = (torch.rand(*shape, 3, generator=generator) for _ in range(2))
        return torch.cat([3 * centre, 0.2 + size, torch.zeros(*shape, 1)], -1)

    classes = [torch.randint(5, (count,), generator=generator) for count in counts]
    targets = DetectionTargets.of([boxes(count) for count in counts], classes)
    logits_LBQC1 = torch.randn(num_layers, len(counts), num_queries, 6, generator=generator)
    return logits_LBQC1, boxes(num_layers, len(counts), num_queries), targets


@pytest.mark.parametrize("counts", [(3,), (2, 0, 4), (0, 0), (7, 5, 6, 1)])
def test_the_peer_makes_the_same_pairs_out_of_the_same_costs(counts: tuple[int, ...]):
    logits_LBQC1, boxes_LBQ7, targets = batch(counts, 3, 8)
    padded = PaddedTargets.of(targets)
    cost_LTQ = match_cost(logits_LBQC1, boxes_LBQ7, targets)
    for layer, cost_TQ in enumerate(cost_LTQ):
        cost_BQK = layer_cost(logits_LBQC1[layer], boxes_LBQ7[layer], padded)
        assert cost_BQK.shape == (len(counts), 8, max(counts))
        for scene, cost_KQ in enumerate(cost_TQ.split(counts)):
            torch.testing.assert_close(cost_BQK[scene, :, : counts[scene]].T, cost_KQ)
    theirs = match_by_layer(logits_LBQC1, boxes_LBQ7, padded)
    assert [int(matched_BQ.sum()) for _, matched_BQ in theirs] == [sum(counts)] * 3
    check_pairs(match(logits_LBQC1, boxes_LBQ7, targets), theirs, targets)


def test_the_peer_finds_the_cheapest_of_all_assignments():
    logits_LBQC1, boxes_LBQ7, targets = batch((3,), 1, 5)
    padded = PaddedTargets.of(targets)
    cost_QK = layer_cost(logits_LBQC1[0], boxes_LBQ7[0], padded)[0]
    best = min(itertools.permutations(range(5), 3), key=lambda queries: float(cost_QK[list(queries), range(3)].sum()))
    ((object_BQ, matched_BQ),) = match_by_layer(logits_LBQC1, boxes_LBQ7, padded)
    found = {int(object_BQ[0, query]): int(query) for query in matched_BQ[0].nonzero()}
    assert found == dict(enumerate(best))


def test_other_pairs_are_not_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    logits_LBQC1, boxes_LBQ7, targets = batch((2, 3), 1, 6)
    theirs = match_by_layer(logits_LBQC1, boxes_LBQ7, PaddedTargets.of(targets))
    theirs[0][0][1] = (theirs[0][0][1] + 1) % 3
    with pytest.raises(ValueError, match="differs from the peer's for 3 queries"):
        check_pairs(match(logits_LBQC1, boxes_LBQ7, targets), theirs, targets)
    monkeypatch.setattr(_detector_peer, "layer_cost", lambda *args: -layer_cost(*args))
    with pytest.raises(ValueError, match="Matching differs from the peer's"):
        measured(tmp_path / "results.json")
    assert not (tmp_path / "results.json").exists()


def test_kernels_count_by_name():
    names = {
        "void pn2::(anonymous namespace)::sample_kernel<4>(float const*)": 10,
        "fmha_cutlassF_f32_aligned_64x64_rf_sm80(Params)": 20,
        "void pytorch_flash::flash_bwd_kernel<...>": 30,
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop": 40,
        "sm90_xmma_gemm_f32f32": 500,
    }
    events = [
        SimpleNamespace(device_type=kind, name=name, time_range=SimpleNamespace(elapsed_us=lambda taken=taken: taken))
        for kind in (DeviceType.CPU, DeviceType.CUDA)
        for name, taken in names.items()
    ]
    found = _shares.kernel_seconds(events, _shares.KERNELS)
    assert found == {"operators": pytest.approx(10e-6), "attention": pytest.approx(90e-6)}
    with pytest.raises(ValueError, match="saw no kernel"):
        _shares.kernel_seconds(events[: len(names)], _shares.KERNELS)


def test_a_share_that_is_not_found_is_said_and_is_no_row(capsys: pytest.CaptureFixture[str]):
    rows = detector._share_rows({"match": 0.1, "operators": 0.2, "attention": 0.0}, "cuda")
    assert [(row.name, row.value) for row in rows] == [
        ("detector.match_share", 0.1),
        ("detector.operators_share", 0.2),
    ]
    assert "detector.attention_share: the profiler saw none" in capsys.readouterr().out


def test_operators_inside_of_operators_count_once():
    def event(name: str, taken: float, parent: object = None) -> SimpleNamespace:
        return SimpleNamespace(name=name, cpu_time_total=taken, cpu_parent=parent)

    outer = event("aten::scaled_dot_product_attention", 9.0)
    between = event("aten::contiguous", 8.0, outer)
    inner = event("aten::_scaled_dot_product_attention_math", 7.0, between)
    backward = event("aten::_scaled_dot_product_flash_attention_for_cpu_backward", 5.0, event("SomeBackward", 6.0))
    ours = event("threedr1::ball_query", 3.0, outer)
    found = _shares.operator_seconds([outer, between, inner, backward, ours], _shares.OPERATORS)
    assert found == {"operators": pytest.approx(3e-6), "attention": pytest.approx(14e-6)}


def test_a_room_has_as_many_points_as_asked_for_and_none_twice():
    scene = room_scene(3, 30_000, np.random.default_rng(3))
    assert scene.points_N3.shape == (30_000, 3) and len(np.unique(scene.points_N3, axis=0)) == 30_000
    assert set(scene.object_ids_K) <= set(scene.instance_ids_N)  # though the room has 79,997 vertices


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps on two rooms, one of them held out."""
    root = tmp_path_factory.mktemp("detect")
    write_rooms(root, 2, 600)
    for split, scene_id in (("train", "scene0000_00"), ("val", "scene0001_00")):
        (root / f"scannetv2_{split}.txt").write_text(scene_id + "\n")
    changes = [*SMALL, f"data.root={root}", "data.num_points=400", f"run.dir={root / 'run'}", "run.device=cpu"]
    train(load_config("detect", None, [*changes, "run.steps=2", "run.batch_size=1", "run.seed=7"]))
    return root / "run"


def test_scores_of_a_run_become_rows(run_dir: Path, tmp_path: Path):
    path, scores = tmp_path / "results.json", json.loads((run_dir / "detection.json").read_text())
    scores |= {"seconds": 12.3}
    scores["0.25"] |= {"mAP": 0.53, "AP": {"chair": 0.61, "cabinet": 0.45}}
    scores["0.5"] |= {"mAP": 0.355, "AP": {"chair": 0.449, "cabinet": 0.2612}}
    (run_dir / "detection.json").write_text(json.dumps(scores))
    words = ["--scores", f"rooms={run_dir}", f"real={run_dir}", "--note", "as a test", "--record", str(path)]
    assert run_benchmark("detector", words) == 0
    rows = {row["name"]: row for row in read_results(path)}
    assert set(rows) == {f"detector.{name}_map{at}" for name in ("rooms", "real") for at in (25, 50)}
    assert rows["detector.real_map25"]["value"] == 0.53 and rows["detector.rooms_map50"]["value"] == 0.355
    for row in rows.values():
        assert row["unit"] == "mAP" and row["peer"] == "" and row["ratio"] is None
        assert row["note"] == (
            "best of 2 steps after 2 and 12 s of training, 1 held-out scenes, seed 7, batches of 1, 400 points, "
            "pointnet2, float32; AP@0.25/AP@0.5 in %: cabinet 45/26, chair 61/45; as a test"
        )


def test_recall_on_one_scan(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One of two objects is found, at IoU 0.4, by an encoder that is told where it is; the scan is turned."""
    rng = np.random.default_rng(0)
    boxes_K6 = np.array([[1.0, 1.0, 0.5, 1.0, 1.0, 1.0], [3.0, 3.0, 0.5, 1.0, 1.0, 1.0]])
    aligned_N3 = np.concatenate([box_6[:3] + (rng.random((500, 3)) - 0.5) * box_6[3:] for box_6 in boxes_K6])
    turn_44 = np.eye(4)
    turn_44[:2, :2], turn_44[:3, 3] = [[0, -1], [1, 0]], [5.0, 0, 2]
    raw_N3 = (aligned_N3 - turn_44[:3, 3]) @ turn_44[:3, :3]  # the inverse of a rotation is its transpose
    np.savez(tmp_path / "cloud.npz", xyz=raw_N3.astype(np.float32), rgb=np.zeros((1000, 3), np.uint8))
    content = {"scene_id": "scene7", "axis_align_matrix": turn_44.tolist()}
    content |= {"instances": [{"box_aligned": box_6.tolist()} for box_6 in boxes_K6]}
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    origin_3 = np.append((aligned_N3.min(0) + aligned_N3.max(0))[:2] / 2, np.percentile(aligned_N3[:, 2], 1))

    class Told:
        def eval(self):
            return self

        def __call__(self, points_BN3, features_BNF):
            assert points_BN3.shape == (1, 400, 3) and features_BNF.shape == (1, 400, 4)
            shifted_7 = torch.tensor([[*(boxes_K6[0, :3] - origin_3 + [3 / 7, 0, 0]), 1, 1, 1, 0]])  # IoU 0.4
            logits_QC1 = torch.zeros(1, 1, 19)
            logits_QC1[..., 2] = 9.0
            return SimpleNamespace(class_logits_BQC1=logits_QC1, boxes_BQ7=shifted_7[None].float())

    monkeypatch.setattr(_detector_scores.SceneEncoder, "from_pretrained", lambda folder: Told())
    rows = {row.name: row for row in scan_rows("real", run_dir, tmp_path / "cloud.npz", tmp_path / "boxes.json")}
    assert rows["detector.real_scene7_recall25"].value == 0.5
    assert rows["detector.real_scene7_recall50"].value == 0.0
    assert "2 objects" in rows["detector.real_scene7_recall25"].note
    (tmp_path / "boxes.json").write_text(json.dumps({"scene_id": "scene7"}))
    with pytest.raises(ValueError, match="are not a labelled scan .'axis_align_matrix'"):
        scan_rows("real", run_dir, tmp_path / "cloud.npz", tmp_path / "boxes.json")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: (run / "detection.json").unlink(), r"There is no .*detection.json; name the folder"),
        (lambda run: (run / "detection.json").write_text("{"), r"detection.json is not JSON"),
        (
            lambda run: (run / "detection.json").write_text('{"step": 1, "seconds": 2, "0.5": {}}'),
            r"lacks 0.25, scenes",
        ),
        (lambda run: (run / "checkpoints").rename(run / "away"), r"There is no checkpoint under"),
    ],
)
def test_a_folder_that_is_no_scored_run_is_one_sentence(spoil, message: str, run_dir: Path, tmp_path: Path, capsys):
    config = next(run_dir.glob("checkpoints/*/config.yaml"))
    copy = tmp_path / "run" / "checkpoints" / config.parent.name
    copy.mkdir(parents=True)
    (copy / config.name).write_text(config.read_text())
    (tmp_path / "run" / "detection.json").write_text((run_dir / "detection.json").read_text())
    spoil(tmp_path / "run")
    assert cli.main(["bench", "detector", "--scores", f"x={tmp_path / 'run'}"]) == 1
    error = capsys.readouterr().err
    assert re.search(message, error) and "Traceback" not in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--points", "0"], "0 is not a whole number"),
        (["--backbone", "votenet"], "invalid choice"),
        (["--precision", "float16"], "invalid choice"),
        (["--scores", "runs/detect"], "is not NAME=RUN_DIR"),
        (["--scores", "a b=runs/detect"], "is not NAME=RUN_DIR"),
        (["--scores", "a=x", "a=y"], "every NAME once"),
        (["--scores", "a=x", "--batch-size", "2"], "leave --batch-size out"),
        (["--scan", "a.npz", "b.json"], "--scan needs --scores"),
    ],
)
def test_wrong_arguments_stop_with_the_usage(words: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        run_benchmark("detector", words)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and "usage: threedr1 bench detector" in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "encoder.num_token=3"], "did you mean 'num_tokens'"),
        (["--set", "run.steps=1"], "takes at least 4"),
        (["--root", "nowhere"], "nowhere"),
    ],
)
def test_settings_that_do_not_fit_are_one_sentence(words: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["bench", "detector", *words]) == 1
    assert message in capsys.readouterr().err


def test_all_else_is_as_the_recipe_says():
    arguments = SimpleNamespace(points=9, batch_size=3, backbone="ptv3", precision="bfloat16", set=["run.seed=4"])
    config = detector.build_config(arguments, Path("somewhere"))
    recipe = load_config("detect", detector.RECIPE)
    assert (config.data.num_points, config.run.batch_size, config.encoder.backbone) == (9, 3, "ptv3")
    assert (config.precision, config.run.seed, config.data.root) == ("bfloat16", 4, "somewhere")
    assert config.optim == recipe.optim and config.augment == recipe.augment and config.run.steps == recipe.run.steps
