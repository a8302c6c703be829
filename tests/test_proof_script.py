"""script/proof.sh: what each stage asks for parses, builds on what it says, is done once and goes on."""

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


def test_every_stage_parses_and_is_done_once(shell: Shell):  # noqa: F811
    assert names(proof(shell, "data", "detect")) == ["rooms", "prepare", "tiny", "detect"]
    assert proof(shell, "data", "detect") == []
    aligned = proof(shell, "align")
    assert [command[0] for command in aligned] == ["sft"] * 3
    trained = proof(shell, "sft", "blind", "grpo")
    assert sorted(settings(command)["run.dir"] for command in trained) == sorted(
        f"{RUN}/{name}-{seed}" for name in ("sft", "blind", "grpo") for seed in range(3)
    )
    assert {command[0] for command in trained[:6]} == {"sft"} and {command[0] for command in trained[6:]} == {"grpo"}
    for command in trained:
        before = {f"{RUN}/sft": f"{RUN}/align", f"{RUN}/grpo": f"{RUN}/sft"}.get(settings(command)["run.dir"][:-2])
        assert settings(command).get("init") == (before and f"{before}-{settings(command)['run.seed']}")
    assert proof(shell, "sft", "blind", "grpo") == []
    evaluated = proof(shell, "eval", "sft", "grpo")
    assert [command[0] for command in evaluated] == ["eval"] * 6
    for command in evaluated:
        assert settings(command)["model"] == f"{RUN}/{settings(command)['label']}"
    assert names(proof(shell, "page")) == ["bench"]


def test_tables_train_and_evaluate_their_rows(shell: Shell):  # noqa: F811
    proof(shell, "data", "detect", "align", "sft", SEEDS="1")
    rewards = [settings(command) for command in proof(shell, "table7", SEEDS="1") if command[0] == "grpo"]
    assert [entry["reward.names"] for entry in rewards] == [
        *("format", "perception", "semantic"),
        *("format,perception", "format,semantic", "perception,semantic"),
    ]
    for entry in rewards:
        overrides = [f"{name}={entry[name]}" for name in ("reward.names", "reward.weights")]
        reward = load_config("grpo", None, overrides).reward
        assert len(reward.names) == len(reward.weights) and sum(reward.weights) == 1
        assert entry["reward.gate_by_format"] == ("true" if "format" in reward.names else "false")
    views = proof(shell, "table8", SEEDS="1")
    assert [command[0] for command in views] == ["sft", "eval"] * 5
    sources = [settings(command).get("model.views.source") for command in views[::2]]
    assert sources == ["none", None, None, "ring", "top"]
    assert names(proof(shell, "table10", SEEDS="1")) == ["sft", "eval"] * 3
    assert proof(shell, "table8", "table10", SEEDS="1", ONLY="ring") == []


def test_one_row_of_a_table_can_be_asked_for(shell: Shell):  # noqa: F811
    proof(shell, "data", "detect", SEEDS="0")
    commands = proof(shell, "table8", SEEDS="0", ONLY="ring")
    assert [settings(command)["run.dir"] for command in commands] == [
        f"{RUN}/views.ring-0",
        f"{RUN}/eval/views.ring-0",
    ]


def test_a_stage_goes_on_after_a_failure_and_is_done_again_after_a_change(shell: Shell):  # noqa: F811
    proof(shell, "data", "detect", "align", SEEDS="0")
    done = shell.run("proof.sh", "sft", SEEDS="0", FAIL_AT="sft")
    assert done.returncode == 1 and "stage sft-0 failed" in done.stdout
    kept = shell.root / RUN / "sft-0" / "checkpoint"
    kept.touch()
    assert names(proof(shell, "sft", SEEDS="0")) == ["sft"]
    assert kept.exists()
    recipe = shell.root / "script" / "recipes" / "proof" / "detect.yaml"  # what sft builds on
    recipe.write_text(recipe.read_text() + "\n# changed\n")
    assert names(proof(shell, "detect")) == ["detect"]
    assert names(proof(shell, "align", "sft", SEEDS="0")) == ["sft", "sft"]
    assert not kept.exists()


def test_a_change_of_a_recipes_base_counts_and_of_another_recipe_does_not(shell: Shell):  # noqa: F811
    proof(shell, "data", "detect", "align", "sft", "blind", SEEDS="0")
    folder: Path = shell.root / "script" / "recipes" / "proof"
    for name in ("eval.yaml", "grpo.yaml"):
        (folder / name).write_text((folder / name).read_text() + "\n# changed\n")
    assert proof(shell, "detect", "sft", "blind", SEEDS="0") == []
    (folder / "sft.yaml").write_text((folder / "sft.yaml").read_text() + "\n# changed\n")
    assert names(proof(shell, "detect", "blind", SEEDS="0")) == ["sft"]  # blind's, whose base it is


@pytest.mark.parametrize(
    ("stages", "words"), [(("sft",), "stage model comes first"), (("table11",), "no stage table11")]
)
def test_what_cannot_be_done_is_said(shell: Shell, stages, words):  # noqa: F811
    done = shell.run("proof.sh", *stages, SEEDS="0")
    assert done.returncode == 1 and words in done.stdout + done.stderr
