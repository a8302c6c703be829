"""A run that is killed, wherever, and resumed equals one that was not: weights, metrics, completions."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from threedr1.engine.checkpoint import list_checkpoints, save_checkpoint
from threedr1.engine.config import load_config, save_config
from threedr1.engine.run_folder import open_run
from threedr1.engine.tracking import drop_steps_from, read_metrics
from threedr1.engine.training_state import load_state
from threedr1.models.scene_vlm import SceneVLM

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


def kill_when(arguments: list[str], ready: Callable[[], bool], pause: float, delay: float) -> bool:
    """Start a run and SIGKILL it `delay` seconds after `ready` says so, asked every `pause`; False: it was faster."""
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment())
    try:
        deadline = time.monotonic() + 120
        while process.poll() is None and not ready():
            assert time.monotonic() < deadline, "the run does not get on"
            time.sleep(pause)
        time.sleep(delay)
        killed = process.poll() is None
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        _, errors = process.communicate()
    assert killed or process.returncode == 0, errors.decode()[-2000:]
    return killed


def kill_at_random(arguments: list[str], run_dir: Path, rows: int, rng: random.Random) -> bool:
    """Start a run and SIGKILL it a moment after it has logged `rows` rows more; False where it was faster."""
    begun = len(read_metrics(run_dir / "metrics.jsonl"))

    def ready() -> bool:
        # a resumed run first drops the rows that it will do again, so fewer than `begun` may be seen as well
        return len(read_metrics(run_dir / "metrics.jsonl")) >= begun + rows

    return kill_when(arguments, ready, 0.005, rng.uniform(0, 0.25))


def kill_while_writing(arguments: list[str], run_dir: Path, rng: random.Random) -> bool:
    """Start a run and SIGKILL it within a few milliseconds of a checkpoint's being begun; False where it was faster.

    The checkpoint is the run's first, second or third.
    """
    saves, writing = rng.randint(1, 3), False

    def ready() -> bool:
        nonlocal saves, writing
        before, writing = writing, any((run_dir / "checkpoints").glob("partial-*"))
        saves -= writing and not before
        return saves == 0

    return kill_when(arguments, ready, 0.0005, rng.uniform(0, 0.02))


def assert_loads(run_dir: Path) -> bool:
    """Every checkpoint that stands there loads, model and state; whether a kill left something half-written."""
    for folder in list_checkpoints(run_dir):
        state = load_state(folder)
        assert folder.name == f"step-{state['step']:06d}" and len(state["optimizer"]["adam"]["exp_avg"]) > 10
        SceneVLM.from_pretrained(folder / "model")
    folder = run_dir / "checkpoints"
    return folder.is_dir() and any(entry.name.startswith(("partial-", "deleted-")) for entry in folder.iterdir())


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
    optimizers = [load_state(run / "checkpoints" / names[0][-1])["optimizer"]["adam"] for run in (killed, whole)]
    assert optimizers[0].keys() == optimizers[1].keys() == {"step", "exp_avg", "exp_avg_sq"}
    for kind, values in optimizers[1].items():
        for name, value in values.items():
            assert torch.equal(optimizers[0][kind][name], value), f"{kind} of {name}"


@pytest.mark.slow
def test_sft_killed_twenty_times(rooms_root, tmp_path):
    """At random moments, every second time while a checkpoint is being written; each time everything there loads."""
    steps = ("run.steps=60", "run.save_every=1", "run.log_every=2", "model.train_scene_encoder=true")
    steps += ("data.weights={scanqa: 0.5}", "run.eval_every=5", "eval_datasets=scan2cap", "eval_samples=2")
    for name in ("whole", "killed"):
        arguments = command("sft", sft_config(rooms_root, tmp_path / name, *steps), tmp_path, "--resume")
        rng, kills, torn = random.Random(1), 0, 0
        for attempt in range(20 if name == "killed" else 0):
            if attempt % 2:
                kills += kill_while_writing(arguments, tmp_path / name, rng)
            else:
                kills += kill_at_random(arguments, tmp_path / name, rng.randint(1, 3), rng)
            torn += assert_loads(tmp_path / name)
        assert run_with_kills(arguments, tmp_path / name, kills=0, steps=60, seed=1) == 0
    assert kills == 20 and torn >= 5, f"{kills} kills, {torn} of them while writing"
    assert_equal_runs(tmp_path / "killed", tmp_path / "whole")
    best = [json.loads((tmp_path / name / "best" / "best.json").read_text()) for name in ("killed", "whole")]
    assert best[0] == best[1]


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
