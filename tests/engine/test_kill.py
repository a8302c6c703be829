"""A run that is killed, wherever, and resumed equals one that was not: weights, metrics, completions."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from threedr1.engine.checkpoint import list_checkpoints, load_state, open_run, save_checkpoint
from threedr1.engine.config import load_config, save_config
from threedr1.engine.tracking import drop_steps_from, read_metrics

from .test_pipeline import ENCODER, assert_same_weights, grpo_config, sft_config, weights

ROOT = Path(__file__).resolve().parents[2]
REWARD = "def letters(completions, **columns):\n    return [float(len(set(text))) for text in completions]\n"


# Killed at every operation on files, in one process --------------------------------------------------------------


class Killed(BaseException):
    """The process is gone: no handler of errors sees this."""


class Mortal:
    """Lets `lives` operations that change files happen, then stops every further one, as a kill does."""

    EVENTS = frozenset({"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"})

    def __init__(self) -> None:
        self.lives: int | None = None
        sys.addaudithook(self._hook)  # a hook stays for good; without lives it does nothing

    def _hook(self, event: str, arguments: tuple) -> None:
        if self.lives is None or event not in self.EVENTS:
            return
        if event == "open" and not (isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")):
            return
        if self.lives == 0:
            raise Killed
        self.lives -= 1

    def run(self, action, lives: int) -> bool:
        """Whether `action` lived to its end."""
        self.lives = lives
        try:
            action()
        except Killed:
            return False
        finally:
            self.lives = None
        return True


@pytest.fixture(scope="module")
def mortal():
    return Mortal()


def save_step(config, step: int) -> None:
    def save_model(folder: Path) -> None:
        (folder / "weights").write_text(f"{step}")
        (folder / "more").mkdir()
        (folder / "more" / "weights").write_text(f"{step}")

    save_checkpoint(config.run.dir, step, config, save_model, {"value": step}, keep=2)


def assert_whole(run_dir: Path, at_least: int) -> int:
    """Every checkpoint there is can be resumed from; returns the newest."""
    steps = []
    for folder in list_checkpoints(run_dir):
        step = load_state(folder)["value"]
        assert folder.name == f"step-{step:06d}" and (folder / "config.yaml").stat().st_size > 0
        assert (folder / "model" / "weights").read_text() == f"{step}"
        assert (folder / "model" / "more" / "weights").read_text() == f"{step}"
        steps.append(step)
    assert steps and max(steps) >= at_least
    return max(steps)


def test_a_kill_at_any_moment_of_saving_leaves_whole_checkpoints(mortal, tmp_path):
    """Saving the third writes it and deletes the first; killed after 0, 1, 2, … operations, then resumed."""
    seen = set()
    for lives in range(200):
        config = load_config("detect", None, [f"run.dir={tmp_path / str(lives)}"])
        save_step(config, 1)
        save_step(config, 2)
        lived = mortal.run(lambda config=config: save_step(config, 3), lives)
        newest = assert_whole(Path(config.run.dir), at_least=2)
        seen.add(newest)
        resumed = open_run(config, resume=True)
        assert resumed is not None and resumed.name == f"step-{newest:06d}"
        left = {entry.name for entry in resumed.parent.iterdir()}
        assert all(name.startswith("step-") for name in left), f"half-written: {left}"
        save_step(config, 3)
        assert [folder.name for folder in list_checkpoints(config.run.dir)][-2:] == ["step-000002", "step-000003"]
        if lived:
            break
    else:
        raise AssertionError("saving never came to its end")
    assert seen == {2, 3} and lives > 10


def test_a_kill_while_the_log_is_cut_back_loses_nothing(mortal, tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "loss": step / 2} for step in range(6)]
    for lives in range(10):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 6, "lo')
        lived = mortal.run(lambda: drop_steps_from(path, 4), lives)
        assert read_metrics(path) == (rows[:4] if lived else rows) or read_metrics(path) == rows[:4]
        if lived:
            return
    raise AssertionError("cutting back never came to its end")


# Real processes, SIGKILL -----------------------------------------------------------------------------------------


def command(kind: str, config, folder: Path, *more: str) -> list[str]:
    recipe = folder / f"{kind}.yaml"
    save_config(config, recipe)
    return [sys.executable, str(ROOT / "main.py"), kind, "--config", str(recipe), *more]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def logged(run_dir: Path) -> list[tuple]:
    """Rows of metrics.jsonl without the clock."""
    return [
        tuple(sorted((name, value) for name, value in row.items() if name != "seconds"))
        for row in read_metrics(run_dir / "metrics.jsonl")
    ]


def kill_at_random(arguments: list[str], run_dir: Path, rows: int, rng: random.Random) -> bool:
    """Start a run and SIGKILL it a moment after it has logged `rows` rows more; False where it was faster."""
    begun = len(read_metrics(run_dir / "metrics.jsonl"))
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment())
    try:
        deadline = time.monotonic() + 120
        # a resumed run first drops the rows that it will do again, so fewer than `begun` may be seen as well
        while process.poll() is None and len(read_metrics(run_dir / "metrics.jsonl")) < begun + rows:
            assert time.monotonic() < deadline, "the run does not get on"
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.25))
        killed = process.poll() is None
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        _, errors = process.communicate()
    assert killed or process.returncode == 0, errors.decode()[-2000:]
    return killed


def run_with_kills(arguments: list[str], run_dir: Path, *, kills: int, steps: int, seed: int) -> int:
    """Kill the run several times, then let it finish; returns how many kills it took."""
    rng = random.Random(seed)
    done = 0
    for _ in range(kills):
        done += kill_at_random(arguments, run_dir, rng.randint(1, max(1, steps // kills - 1)), rng)
    result = subprocess.run(arguments, capture_output=True, text=True, env=environment(), timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    return done


def assert_equal_runs(killed: Path, whole: Path) -> None:
    names = [[folder.name for folder in list_checkpoints(run)] for run in (killed, whole)]
    assert names[0] == names[1] and names[0]
    for name in names[0]:
        assert_same_weights(killed / "checkpoints" / name, whole / "checkpoints" / name)
    assert logged(killed) == logged(whole)
    assert {entry.name for entry in (killed / "checkpoints").iterdir()} == set(names[0]), "leftovers of a kill"
    assert not list(killed.rglob("*.partial"))
    optimizers = [
        load_state(run / "checkpoints" / names[0][-1])["optimizer"]["adam"]["state"] for run in (killed, whole)
    ]
    for key, state in optimizers[1].items():
        for name, value in state.items():
            assert torch.equal(optimizers[0][key][name], value)


@pytest.mark.slow
def test_sft_killed_several_times(rooms_root, tmp_path):
    steps = ("run.steps=24", "run.save_every=2", "model.train_scene_encoder=true")
    for name, kills in (("whole", 0), ("killed", 4)):
        arguments = command("sft", sft_config(rooms_root, tmp_path / name, *steps), tmp_path, "--resume")
        assert run_with_kills(arguments, tmp_path / name, kills=kills, steps=24, seed=1) >= kills - 1
    assert_equal_runs(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.slow
def test_grpo_killed_several_times(rooms_root, tmp_path):
    """With a reward in a process of its own, which must not outlive a killed run."""
    reward = tmp_path / "reward.py"
    reward.write_text(REWARD)
    start = command("sft", sft_config(rooms_root, tmp_path / "sft", "run.steps=6"), tmp_path)
    assert run_with_kills(start, tmp_path / "sft", kills=0, steps=6, seed=0) == 0
    more = ("run.steps=12", "run.save_every=2", "updates_per_rollout=2")
    more += (f"reward.names=[format,semantic,{reward}:letters]", "reward.weights=[0.2,0.5,0.3]")
    for name, kills in (("whole", 0), ("killed", 3)):
        config = grpo_config(rooms_root, tmp_path / "sft", tmp_path / name, *more)
        arguments = command("grpo", config, tmp_path, "--resume")
        assert run_with_kills(arguments, tmp_path / name, kills=kills, steps=12, seed=2) >= kills - 1
    assert_equal_runs(tmp_path / "killed", tmp_path / "whole")
    completions = [(tmp_path / name / "completions.jsonl").read_text() for name in ("killed", "whole")]
    assert completions[0] == completions[1] and completions[0]
    adapter = weights(list_checkpoints(tmp_path / "whole")[-1])["model/adapter/policy/adapter_model.safetensors"]
    assert any(value.any() for key, value in adapter.items() if "lora_B" in key), "the policy has moved"
    assert not processes_with(str(reward))


def processes_with(argument: str) -> list[str]:
    """Command lines of running processes that mention `argument`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # it has just ended, or belongs to someone else
        if argument in line:
            found.append(line)
    return found


@pytest.mark.slow
def test_detect_killed_several_times(rooms_root, tmp_path):
    overrides = ["run.steps=30", "run.batch_size=2", "run.save_every=3", "run.log_every=1", "run.eval_every=5"]
    overrides += [f"data.root={rooms_root}", "data.num_points=512", "data.eval_split=train"]
    overrides += [f"encoder.{setting}" for setting in ENCODER.split()]
    for name, kills in (("whole", 0), ("killed", 4)):
        config = load_config("detect", None, [*overrides, f"run.dir={tmp_path / name}"])
        arguments = command("detect", config, tmp_path, "--resume")
        assert run_with_kills(arguments, tmp_path / name, kills=kills, steps=30, seed=3) >= kills - 1
    assert_equal_runs(tmp_path / "killed", tmp_path / "whole")
    best = [load_file(tmp_path / name / "best" / "model.safetensors") for name in ("killed", "whole")]
    assert best[0].keys() == best[1].keys() and all(torch.equal(best[0][key], best[1][key]) for key in best[0])
    kept = [json.loads((tmp_path / name / "detection.json").read_text()) for name in ("killed", "whole")]
    assert kept[0].pop("seconds") > 0 < kept[1].pop("seconds") and kept[0] == kept[1]
