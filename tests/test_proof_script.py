"""script/proof.sh: what each stage asks for parses, builds on what it says, is done once and goes on."""

import os
import shutil
from pathlib import Path

import pytest

from threedr1.engine.config import load_config

from .test_scripts import Shell, check_command, names, shell  # noqa: F401 - fixture

RUN = "runs/proof"


def settings(command: list[str]) -> dict[str, str]:
    """KEY=VALUE of a command."""
    return dict(word.split("=", 1) for word in command[command.index("--set") + 1 :])


def proof(shell: Shell, *stages: str, **variables: str) -> list[list[str]]:  # noqa: F811
    done = shell.run("proof.sh", *stages, **variables)
    assert done.returncode == 0, done.stderr
    for command in shell.commands():
        if command[0] != "bench":
            check_command(command)
    return shell.commands()


def made(commands: list[list[str]]) -> list[str]:
    """The folders that runs and evaluations leave, in an order of their own, as runs are side by side."""
    return sorted(settings(command)["run.dir"].removeprefix(f"{RUN}/") for command in commands)


def both(*names: str, seeds: str = "012") -> list[str]:
    """The folders of training and of evaluation."""
    return sorted(f"{folder}{name}-{seed}" for name in names for seed in seeds for folder in ("", "eval/"))


def test_every_stage_parses_and_is_done_once(shell: Shell):  # noqa: F811
    assert names(proof(shell, "data", "detect")) == ["rooms", "prepare", "tiny", "detect", "export"]
    assert proof(shell, "data", "detect") == []
    assert made(proof(shell, "align")) == [f"align-{seed}" for seed in range(3)]
    trained = proof(shell, "sft,blind", "grpo")
    assert made(trained) == both("sft", "blind", "grpo")
    assert sorted(names(trained[:12])) == ["eval"] * 6 + ["sft"] * 6
    assert sorted(names(trained[12:])) == ["eval"] * 3 + ["grpo"] * 3
    for command in trained:
        values, kind = settings(command), command[0]
        if kind == "eval":
            assert values["model"] == f"{RUN}/{values['label']}"
            continue
        before = {f"{RUN}/sft": f"{RUN}/align", f"{RUN}/grpo": f"{RUN}/sft"}.get(values["run.dir"][:-2])
        assert values.get("init") == (before and f"{before}-{values['run.seed']}")
        encoder = "" if values["run.dir"].startswith(f"{RUN}/blind") else f"{RUN}/encoder"
        assert kind == "grpo" or values["model.encoder.pretrained"] == encoder
    assert proof(shell, "sft", "blind", "grpo") == []
    assert names(proof(shell, "page")) == ["bench"]
    rooms = shell.root / "datasets" / "rooms" / "annotate.py"
    rooms.write_text(rooms.read_text().replace('ANNOTATION_VERSION = "', 'ANNOTATION_VERSION = "newer-'))
    assert names(proof(shell, "data"))[0] == "rooms"  # the same command of other code


def test_tables_train_and_evaluate_their_rows(shell: Shell):  # noqa: F811
    proof(shell, "data", "detect", "align", "sft", SEEDS="1")
    rewards = [settings(command) for command in proof(shell, "table7", SEEDS="1") if command[0] == "grpo"]
    assert sorted(entry["reward.names"] for entry in rewards) == sorted([
        *("format", "perception", "semantic"),
        *("format,perception", "format,semantic", "perception,semantic"),
    ])  # fmt: skip
    for entry in rewards:
        overrides = [f"{name}={entry[name]}" for name in ("reward.names", "reward.weights")]
        reward = load_config("grpo", None, overrides).reward
        assert len(reward.names) == len(reward.weights) and sum(reward.weights) == 1
        assert entry["reward.gate_by_format"] == ("true" if "format" in reward.names else "false")
        assert entry["run.dir"] == f"{RUN}/grpo.{entry['reward.names'].replace(',', '+')}-1"
    dual, *views = proof(shell, "table8", SEEDS="1")
    assert dual[:3] == ["dual", "--out", f"{RUN}/dual"]
    rows = ("none", "ours", "uniform", "coverage", "ring", "top")
    assert made(views) == both(*(f"views.{row}" for row in rows), seeds="1")
    trained = {settings(command)["run.dir"]: settings(command) for command in views if command[0] == "sft"}
    sources = [trained[f"{RUN}/views.{row}-1"].get("model.views.source") for row in rows]
    assert sources == ["none", None, None, None, "ring", "top"]
    choices = [trained[f"{RUN}/views.{row}-1"].get("model.views.choice") for row in rows]
    assert choices == [None, None, "uniform", "uniform", "uniform", "uniform"]
    assert {values["model.views.encoder"] for values in trained.values()} == {f"{RUN}/dual"}
    assert made(proof(shell, "table10", SEEDS="1")) == both(
        *(f"encoders.{row}" for row in ("depth", "point", "full")), seeds="1"
    )
    assert "there is no runs/proof/views.ours-1/checkpoints" in shell.run("proof.sh", "table11", SEEDS="1").stderr
    kept = shell.root / RUN / "views.ours-1" / "checkpoints"
    for step in (750, 1500):
        (kept / f"step-{step:06d}" / "model" / "language_model").mkdir(parents=True)
    named, *ranks = proof(shell, "table11", SEEDS="1")
    assert named[0] == "names" and named[named.index("--out") + 1] == f"{RUN}/pictured-1"
    assert named[-1] == f"{RUN}/views.ours-1/checkpoints/step-001500/model/language_model"
    assert made(ranks) == both(*(f"lora.{rank}" for rank in (4, 8, 12, 16, 32)), seeds="1")
    for values in map(settings, ranks):
        assert (values.get("language_model") or values["model.language.model"]) == f"{RUN}/pictured-1"
        assert values.get("model.language.lora_rank") in (None, values["run.dir"].split(".")[-1].split("-")[0])
    assert sum("model.language.lora_rank" in settings(command) for command in ranks) == 5
    assert proof(shell, "table8", "table10", "table11", SEEDS="1") == []


def test_an_adapter_travels_with_the_model_that_it_is_of(shell: Shell):  # noqa: F811
    proof(shell, "data", "detect", "views.ours", SEEDS="1")
    run = shell.root / RUN
    (run / "views.ours-1" / "checkpoints" / "step-000007" / "model" / "language_model").mkdir(parents=True)
    proof(shell, "lora.8,lora.12", SEEDS="1")
    for rank in (8, 12):
        (run / f"lora.{rank}-1" / "checkpoints" / "step-000009" / "model").mkdir(parents=True)
        (run / f"lora.{rank}-1" / "checkpoints" / "step-000009" / "model" / "adapter").touch()
    proof(shell, "pack", "lora.8", "lora.12", SEEDS="1")
    packed = sorted(path.name.removesuffix(".tar.gz.aa") for path in (run / "packed").iterdir())
    assert packed == ["base", "lora.12-1", "lora.8-1", "pictured-1"]
    shutil.move(run / "packed", shell.root / "packed")  # to another machine
    shutil.rmtree(run)
    shutil.rmtree(shell.root / "data" / "proof")
    shutil.move(shell.root / "packed", run / "packed")
    proof(shell, "unpack")
    assert (run / "lora.8-1" / "checkpoints" / "step-000009" / "model" / "adapter").exists()
    assert (run / "pictured-1").is_dir() and not (run / "views.ours-1").exists()
    proof(shell, "data")
    assert proof(shell, "lora.8", "lora.12", SEEDS="1") == []
    assert made(proof(shell, "lora.4", SEEDS="1")) == ["eval/lora.4-1", "lora.4-1"]


def test_what_cannot_go_on_begins_anew(shell: Shell):  # noqa: F811
    proof(shell, "data", "detect", SEEDS="0")
    stages = shell.root / RUN / "stages"
    key = (stages / "encoder.done").read_text().split()[:-1]
    (stages / "encoder.done").unlink()
    (stages / "encoder.begun").write_text(" ".join(key) + "\n")  # killed behind the last write
    (shell.root / RUN / "encoder" / "left").touch()
    assert names(proof(shell, "detect")) == ["export"]
    assert not (shell.root / RUN / "encoder" / "left").exists()


def test_one_row_of_a_table_can_be_asked_for(shell: Shell):  # noqa: F811
    proof(shell, "data", "detect", SEEDS="0")
    dual, *commands = proof(shell, "views.ring,encoders.depth", SEEDS="0")
    assert dual[0] == "dual"
    assert made(commands) == both("views.ring", "encoders.depth", seeds="0")


def test_runs_are_spread_over_gpus(shell: Shell):  # noqa: F811
    smi = shell.root / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    smi.write_text("#!/bin/sh\nprintf '0\\n1\\n'\n")
    smi.chmod(0o755)
    path = {"PATH": f"{smi.parent}:{os.environ['PATH']}", "AT_ONCE": "1"}
    proof(shell, "data", "detect", **path)
    proof(shell, "align,blind", SET="run.steps=7", **path)
    used = {}
    for command, environment in shell.environments():
        assert environment["THREEDR1_TYPED"] == "SET='run.steps=7' bash script/proof.sh align,blind"
        used.setdefault(environment["CUDA_VISIBLE_DEVICES"], []).append(command)
    assert sorted(used) == ["0", "1"] and sum(map(len, used.values())) == 9  # six trained, three of them scored
    proof(shell, "blind", SEEDS="7", CUDA_VISIBLE_DEVICES="5", **path)
    assert {environment["CUDA_VISIBLE_DEVICES"] for _, environment in shell.environments()} == {"5"}


def test_trained_models_travel_without_their_optimizers(shell: Shell):  # noqa: F811
    proof(shell, "data", "detect", "align", "sft", SEEDS="0,1")
    run, contents = shell.root / RUN, os.urandom(20_000_000)
    for step in (1, 12):
        kept = run / "sft-0" / "checkpoints" / f"step-{step:06d}"
        (kept / "model").mkdir(parents=True)
        (kept / "model" / "model.safetensors").write_bytes(contents)
        (kept / "config.yaml").touch()
        (kept / "state.safetensors").touch()
    (run / "align-0" / "checkpoints" / "step-000003").mkdir(parents=True)
    (run / "align-0" / "checkpoints" / "step-000003" / "config.yaml").touch()
    (run / "detect" / "metrics.jsonl").touch()
    (run / "sft-0" / "metrics.jsonl").touch()
    missing = shell.run("proof.sh", "pack", "sft", SEEDS="0,1,2")
    assert missing.returncode == 1 and "sft-2 is not trained and scored" in missing.stderr
    (run / "stages" / "eval-sft-1.done").rename(run / "away")
    assert "sft-1 is not trained and scored" in shell.run("proof.sh", "pack", "sft", SEEDS="1").stderr
    (run / "away").rename(run / "stages" / "eval-sft-1.done")
    assert "name the models" in shell.run("proof.sh", "pack").stderr
    assert "nothing in" in shell.run("proof.sh", "unpack").stderr
    proof(shell, "pack", "align", "sft", SEEDS="0")
    packed = sorted((run / "packed").iterdir())
    assert [path.name for path in packed] == [
        "align-0.tar.gz.aa",
        "base.tar.gz.aa",
        "sft-0.tar.gz.aa",
        "sft-0.tar.gz.ab",
    ]
    assert all(path.stat().st_size <= 15_000_000 for path in packed)
    shutil.move(run / "packed", shell.root / "packed")  # to another machine
    shutil.rmtree(run)
    shutil.rmtree(shell.root / "data" / "proof")
    shutil.move(shell.root / "packed", run / "packed")
    proof(shell, "unpack")
    found = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    newest = "sft-0/checkpoints/step-000012"
    assert {f"{newest}/config.yaml", f"{newest}/model/model.safetensors", "sft-0/metrics.jsonl"} <= found
    assert {
        "stages/sft-0.done",
        "stages/encoder.done",
        "stages/detect.done",
        "eval/sft-0/begun",
        "detect/metrics.jsonl",
    } <= found
    assert not [name for name in found if "state" in name or "step-000001" in name or "sft-1" in name]
    assert not (run / "model").exists()
    assert (run / newest / "model" / "model.safetensors").read_bytes() == contents
    # rooms and untrained model are the same, made again, so what was unpacked stays
    assert names(proof(shell, "data")) == ["rooms", "prepare", "tiny"]
    assert made(proof(shell, "sft", SEEDS="0")) == []
    assert made(proof(shell, "grpo", SEEDS="0")) == ["eval/grpo-0", "grpo-0"]
    assert (run / newest / "model" / "model.safetensors").exists()


def test_real_rows_can_be_asked_for_by_name(shell: Shell, tmp_path: Path):  # noqa: F811
    commands = proof(shell, "real.blind", SEEDS="0", REAL=str(tmp_path))
    assert names(commands) == ["bench", "prepare", "tiny", "detect", "export", "sft", "eval"]
    assert settings(commands[-2])["model.encoder.pretrained"] == f"{RUN}/real-encoder"
    assert "set REAL" in shell.run("proof.sh", "real", SEEDS="0").stderr
    proof(shell, "pack", "real.blind", SEEDS="0")
    other = shell.root / "runs" / "other"
    shutil.copytree(shell.root / RUN / "packed", other / "packed")
    proof(shell, "unpack", RUN="runs/other")
    assert (other / "real-encoder").is_dir() and (other / "stages" / "real-encoder.done").exists()


def test_a_stage_goes_on_after_a_failure_and_is_done_again_after_a_change(shell: Shell):  # noqa: F811
    proof(shell, "data", "detect", "align", SEEDS="0")
    done = shell.run("proof.sh", "sft", SEEDS="0", FAIL_AT="sft")
    assert done.returncode == 1 and "stage sft-0 failed" in done.stdout
    kept = shell.root / RUN / "sft-0" / "checkpoint"
    kept.touch()
    assert names(proof(shell, "sft", SEEDS="0")) == ["sft", "eval"]
    assert kept.exists()
    recipe = shell.root / "script" / "recipes" / "proof" / "detect.yaml"  # what sft builds on
    recipe.write_text(recipe.read_text() + "\n# changed\n")
    assert names(proof(shell, "detect")) == ["detect", "export"]
    assert names(proof(shell, "align", "sft", SEEDS="0")) == ["sft", "sft", "eval"]
    assert not kept.exists()


def test_a_change_of_a_recipes_base_counts_and_of_another_recipe_does_not(shell: Shell):  # noqa: F811
    proof(shell, "data", "detect", "align", "sft", "blind", SEEDS="0")
    folder: Path = shell.root / "script" / "recipes" / "proof"
    (folder / "grpo.yaml").write_text((folder / "grpo.yaml").read_text() + "\n# changed\n")
    assert proof(shell, "detect", "sft", "blind", SEEDS="0") == []
    (folder / "sft.yaml").write_text((folder / "sft.yaml").read_text() + "\n# changed\n")
    assert names(proof(shell, "detect", "blind", SEEDS="0")) == ["sft", "eval"]  # blind's, whose base it is


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        (("sft",), "stage model comes first"),
        (("table11",), "stage views.ours-0 comes first"),
        (("table12",), "no stage table12"),
    ],
)
def test_what_cannot_be_done_is_said(shell: Shell, stages, words):  # noqa: F811
    done = shell.run("proof.sh", *stages, SEEDS="0")
    assert done.returncode == 1 and words in done.stdout + done.stderr
