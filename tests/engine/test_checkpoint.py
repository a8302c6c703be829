"""Snapshots, the state's two files, writing in the background, a disk that refuses, the best model."""

import errno
import gc
import json
import pickle
import random
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from threedr1.engine import checkpoint as module
from threedr1.engine import sft
from threedr1.engine.background import Writer, advice, disk_error
from threedr1.engine.checkpoint import list_checkpoints, model_folder
from threedr1.engine.config import load_config, save_config
from threedr1.engine.optim import Optimizer
from threedr1.engine.run_folder import open_run, run_folder
from threedr1.engine.runtime import Runtime
from threedr1.engine.saving import Checkpoints
from threedr1.engine.snapshot import twin
from threedr1.engine.training_state import load_state, rng_state, save_state, set_rng_state
from threedr1.models.scene_vlm import SceneVLM

from .processes import run_script
from .test_pipeline import assert_same_weights, sft_config, weights

CPU = Runtime(torch.device("cpu"))


class Layer(nn.Linear):
    """A model that writes itself."""

    def __init__(self) -> None:
        super().__init__(2, 2)

    def save_pretrained(self, folder: Path) -> None:
        save_file(dict(self.state_dict()), folder / "model.safetensors")


def small_run(folder: Path, *more: str, rank: int = 0, fresh: bool = False):
    """The checkpoints of a run, its model and its optimizer."""
    config = load_config("sft", None, [f"run.dir={folder}", "run.best_metric=score", *more])
    torch.manual_seed(0)
    model = Layer()
    optimizer = Optimizer(dict(model.named_parameters()), config.optim, 10, CPU)
    runtime = Runtime(torch.device("cpu"), rank, rank + 1)
    return Checkpoints(runtime, config, samples={"scanqa": 3}, fresh=fresh), model, optimizer


# Snapshots --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", ["full", "lora"])
def test_a_twin_keeps_what_the_model_was(rooms_root, tmp_path, train):
    """Everything that can change changes after the snapshot; what the twin writes is what the model wrote before."""
    config = sft_config(
        rooms_root, tmp_path, f"model.language.train={train}", "model.train_scene_encoder=true", "run.steps=0"
    )
    model = sft.load_model(config, None, CPU)
    (tmp_path / "before" / "model").mkdir(parents=True)
    model.save_pretrained(tmp_path / "before" / "model")
    copied = twin(model)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.zero_()
    copied.save_pretrained(tmp_path / "after" / "model")
    assert_same_weights(tmp_path / "before", tmp_path / "after")
    names = [
        {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.json")}
        for name in ("before", "after")
    ]
    assert names[0] == names[1] and len(weights(tmp_path / "after")) == 3
    SceneVLM.from_pretrained(tmp_path / "after" / "model")
    base = copied.language.base.model.language_model.embed_tokens.weight
    assert base.is_meta == (train == "lora"), "a frozen base is not copied"
    assert copied.language.head_weight_VD.is_meta == (train == "lora")
    assert not any(value.is_meta for value in copied.scene_encoder.parameters())


def test_tied_tensors_of_a_twin_stay_tied_and_the_model_is_left_alone():
    model = nn.ModuleDict({"one": nn.Linear(3, 3), "two": nn.Linear(3, 3)})
    model["two"].weight = model["one"].weight
    before = dict(model.named_parameters())
    copied = twin(model)
    assert copied["one"].weight is copied["two"].weight and copied["one"].weight is not model["one"].weight
    assert copied["one"].weight.data_ptr() != model["one"].weight.data_ptr()
    assert all(value is before[name] for name, value in model.named_parameters())


def test_what_was_copied_goes_as_soon_as_it_is_written(tmp_path):
    """Without waiting for Python to look for cycles: a copy may be of many gigabytes."""
    checkpoints, model, optimizer = small_run(tmp_path)
    model.weight.grad, model.bias.grad = torch.ones(2, 2), torch.ones(2)
    optimizer.step(0)
    kinds = (torch.Tensor, nn.Parameter)
    gc.collect()
    gc.disable()
    try:
        before = {id(entry) for entry in gc.get_objects() if type(entry) in kinds}
        with checkpoints:
            checkpoints.save(1, model, optimizer)
            checkpoints.offer_best(1, {"score": 1.0}, model)
        left = [entry for entry in gc.get_objects() if type(entry) in kinds and id(entry) not in before]
    finally:
        gc.enable()
    assert left == []


# State ------------------------------------------------------------------------------------------------------------

tensors = st.builds(
    lambda values, dtype: torch.tensor(values).to(dtype),
    st.lists(st.integers(-100, 100), max_size=4),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.uint8]),
)
plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.lists(st.integers())
keys = st.text(min_size=1, max_size=5).filter(lambda text: "/" not in text)
states = st.dictionaries(keys, st.recursive(plain | tensors, lambda inner: st.dictionaries(keys, inner, max_size=3)))


def assert_equal(one, two) -> None:
    assert type(one) is type(two)
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            assert_equal(one[key], two[key])
    elif isinstance(one, torch.Tensor):
        assert one.dtype == two.dtype and torch.equal(one, two)
    else:
        assert one == two


@given(states)
def test_a_state_comes_back_as_it_was(tmp_path_factory, state):
    folder = tmp_path_factory.mktemp("state")
    save_state(state, folder)
    assert_equal(load_state(folder), state)


def test_random_generators_go_on_where_they_were(tmp_path):
    random.gauss(0, 1)  # leaves a second number waiting
    np.random.standard_normal(3)
    save_state(rng_state(), tmp_path)

    def draw() -> tuple:
        return random.gauss(0, 1), random.random(), *np.random.standard_normal(3), *torch.rand(3).tolist()

    expected = draw()
    set_rng_state(load_state(tmp_path))
    assert draw() == expected


class Trap:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickled_state_is_refused_and_not_opened(tmp_path):
    (tmp_path / "state.pt").write_bytes(pickle.dumps(Trap(tmp_path / "opened")))
    with pytest.raises(
        ValueError, match="pickles are not read; resume with the version that wrote it, or start a new"
    ):
        load_state(tmp_path)
    assert not (tmp_path / "opened").exists()


def test_states_that_do_not_belong_together_are_refused(tmp_path):
    save_state({"a": {"b": torch.ones(2)}}, tmp_path)
    (tmp_path / "state.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match=r"does not belong to state.safetensors"):
        load_state(tmp_path)


# Writing in the background ----------------------------------------------------------------------------------------


def test_a_writer_keeps_the_order_and_one_job_of_a_name():
    writer, done, gate = Writer(), [], threading.Event()
    writer.submit("a", lambda: (gate.wait(5), done.append("a1"))[0])
    writer.submit("b", lambda: done.append("b1"))  # another name does not wait
    assert done == []
    threading.Timer(0.1, gate.set).start()
    writer.submit("a", lambda: done.append("a2"))
    assert done[:1] == ["a1"], "a second job of a name waits for the first"
    writer.wait()
    assert done == ["a1", "b1", "a2"]
    writer.submit("a", lambda: 1 // 0)  # type: ignore[arg-type,return-value]
    with pytest.raises(ZeroDivisionError):
        writer.submit("a", lambda: None)
    assert writer.close() == []


def test_errors_of_the_disk_are_known():
    wrapped = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    found = disk_error(wrapped)
    assert found is not None and found.errno == errno.ENOSPC
    assert disk_error(SafetensorError("Error while serializing: invalid dtype")) is None
    assert advice(found).startswith("the disk is full; make room on it")
    assert "read-only" in advice(OSError(errno.EROFS, "x")) and "check the disk" in advice(OSError(errno.EIO, "I/O"))


def slow_disk(monkeypatch, seconds: float) -> None:
    real = module._sync

    def sync(folder: Path) -> None:
        time.sleep(seconds)
        real(folder)

    monkeypatch.setattr(module, "_sync", sync)


def test_the_loop_does_not_wait_for_the_disk_but_for_the_save_before(tmp_path, monkeypatch):
    slow_disk(monkeypatch, 0.5)
    checkpoints, model, optimizer = small_run(tmp_path)
    began = time.perf_counter()
    with checkpoints:
        checkpoints.save(1, model, optimizer, {"data": "x"})
        checkpoints.offer_best(1, {"score": 0.5}, model)
        held = time.perf_counter() - began
        expected = model.weight.detach().clone()
        with torch.no_grad():
            model.weight.zero_()  # training goes on
        assert list_checkpoints(tmp_path) == []
        checkpoints.save(2, model, optimizer, {"data": "x"})
        assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000001"]
    assert held < 0.25 and time.perf_counter() - began > 1.4
    first, second = list_checkpoints(tmp_path)
    assert torch.equal(load_file(first / "model" / "model.safetensors")["weight"], expected)
    assert torch.equal(load_file(tmp_path / "best" / "model.safetensors")["weight"], expected)
    assert not load_file(second / "model" / "model.safetensors")["weight"].any()


def test_other_ranks_write_nothing_and_wait_for_nothing(tmp_path):
    checkpoints, model, optimizer = small_run(tmp_path, rank=1)
    assert checkpoints.save(3, model, optimizer) == tmp_path / "checkpoints" / "step-000003"
    assert not checkpoints.offer_best(3, {"score": 1.0}, model)
    checkpoints.wait()
    assert list(tmp_path.iterdir()) == []


def test_an_error_in_training_lets_the_write_under_way_finish(tmp_path, monkeypatch):
    slow_disk(monkeypatch, 0.3)
    checkpoints, model, optimizer = small_run(tmp_path)
    with pytest.raises(FloatingPointError), checkpoints:
        checkpoints.save(1, model, optimizer)
        raise FloatingPointError
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]
    assert load_state(list_checkpoints(tmp_path)[0])["step"] == 1


def test_an_error_in_the_writer_that_is_not_the_disks_ends_the_run(tmp_path, monkeypatch):
    def broken(state, folder):
        raise KeyError("a mistake of ours")

    monkeypatch.setattr(module, "save_state", broken)
    checkpoints, model, optimizer = small_run(tmp_path)
    with pytest.raises(KeyError, match="a mistake of ours"), checkpoints:
        checkpoints.save(1, model, optimizer)


# A disk that refuses ----------------------------------------------------------------------------------------------


def refusing(monkeypatch, *steps: int) -> None:
    """Writing the state of these steps finds the disk full, half way through a checkpoint."""
    real = module.save_state

    def full(state, folder):
        if state["step"] in steps:
            (folder / "state.safetensors").write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(state, folder)

    monkeypatch.setattr(module, "save_state", full)


def test_a_full_disk_is_told_and_the_next_save_tries_again(tmp_path, monkeypatch, caplog):
    refusing(monkeypatch, 3)
    checkpoints, model, optimizer = small_run(tmp_path, "run.keep_checkpoints=1")
    with checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, model, optimizer)
        checkpoints.wait()
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000002"], (
            "the last good one stays"
        )
        assert f"Could not write {tmp_path}/checkpoints/step-000003: the disk is full; make room" in caplog.text
        checkpoints.save(4, model, optimizer)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000004"]


def test_a_run_whose_last_save_failed_ends_with_an_error(tmp_path, monkeypatch):
    refusing(monkeypatch, 2)
    checkpoints, model, optimizer = small_run(tmp_path)
    with (
        pytest.raises(OSError, match=r"Could not write .*step-000002: the disk is full; .*--resume goes on"),
        checkpoints,
    ):
        checkpoints.save(1, model, optimizer)
        checkpoints.save(2, model, optimizer)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]


LIMITED = """
import resource
from threedr1 import main
from threedr1.engine.saving import Checkpoints

full_at, real = int(sys.argv[1]), Checkpoints.save

def save(self, step, *more):
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000 if step == full_at else hard, hard))
    path = real(self, step, *more)
    self.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    return path

Checkpoints.save = save
sys.exit(main.main(sys.argv[2:]))
"""


def test_a_limit_on_file_sizes_hit_in_the_middle_of_a_file(rooms_root, tmp_path):
    """A real error of the operating system: at step 4 it costs one checkpoint, at the last step the run fails."""
    results = {}
    for name, full_at in (("whole", 0), ("middle", 4), ("end", 6)):
        config = sft_config(rooms_root, tmp_path / name, "run.steps=6", "run.keep_checkpoints=0")
        save_config(config, tmp_path / "sft.yaml")
        arguments = (str(full_at), "sft", "--config", str(tmp_path / "sft.yaml"))
        results[name] = run_script(tmp_path / "limited.py", LIMITED, *arguments)
    kept = {name: sorted(entry.name for entry in (tmp_path / name / "checkpoints").iterdir()) for name in results}
    assert results["middle"].returncode == 0, results["middle"].stderr[-2000:]
    assert kept["middle"] == ["step-000002", "step-000006"]
    assert_same_weights(*(tmp_path / name / "checkpoints" / "step-000006" for name in ("whole", "middle")))
    said = "step-000004: the file is larger than this process may write; raise the limit (ulimit -f); training goes on"
    assert said in results["middle"].stderr
    assert results["end"].returncode == 1 and kept["end"] == ["step-000002", "step-000004"]
    last = results["end"].stderr.strip().splitlines()[-1]
    assert last.startswith("threedr1 sft: Could not write ") and "step-000006: the file is larger" in last
    resumed = run_script(tmp_path / "limited.py", LIMITED, "0", *arguments[1:], "--resume")
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    assert_same_weights(*(tmp_path / name / "checkpoints" / "step-000006" for name in ("whole", "end")))


# The best model ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "kept"), [("max", [0, 2]), ("min", [0, 1, 4])])
def test_the_best_model_is_the_one_of_the_best_score(tmp_path, mode, kept):
    checkpoints, model, _ = small_run(tmp_path, f"run.best_mode={mode}")
    taken = []
    with checkpoints:
        for step, score in enumerate([0.4, 0.3, 0.7, float("nan"), 0.2]):
            with torch.no_grad():
                model.weight.fill_(step)
            beside = {"scores.json": {"step": step}}
            taken += (
                [step] if checkpoints.offer_best(step, {"score": score, "other": -score}, model, beside=beside) else []
            )
    assert taken == kept
    assert load_file(tmp_path / "best" / "model.safetensors")["weight"].unique().tolist() == [kept[-1]]
    assert json.loads((tmp_path / "scores.json").read_text()) == {"step": kept[-1]}
    facts = json.loads((tmp_path / "best" / "best.json").read_text())
    assert facts["metric"] == "score" and facts["step"] == kept[-1]
    assert {entry.name for entry in tmp_path.iterdir()} == {"best", "scores.json"}


def test_a_resumed_run_knows_the_score_of_the_best_model(tmp_path):
    checkpoints, model, _ = small_run(tmp_path)
    with checkpoints:
        assert checkpoints.offer_best(5, {"score": 0.5}, model)
    resumed, model, _ = small_run(tmp_path)
    with resumed:
        assert not resumed.offer_best(3, {"score": 0.4}, model)
        assert resumed.offer_best(5, {"score": 0.5}, model), "a step that is done again writes what a kill left out"
        assert resumed.offer_best(6, {"score": 0.6}, model)
    other, model, _ = small_run(tmp_path, "run.best_metric=other")
    with other:
        assert other.offer_best(1, {"other": -3.0}, model), "scores of two metrics are not compared"
    again, model, _ = small_run(tmp_path, fresh=True)
    assert not (tmp_path / "best").exists()
    with (
        again,
        pytest.raises(ValueError, match=r"run.best_metric is 'score', which is not measured; choose cider, map"),
    ):
        again.offer_best(1, {"map": 0.1, "cider": 2.0}, model)


def test_a_best_model_whose_successor_never_came_gets_its_name_back(tmp_path):
    """A kill between the two renames."""
    checkpoints, model, optimizer = small_run(tmp_path)
    with checkpoints:
        checkpoints.save(1, model, optimizer)
        checkpoints.offer_best(1, {"score": 0.5}, model)
    (tmp_path / "best").rename(tmp_path / "deleted-best")
    (tmp_path / "partial-best").mkdir()
    open_run(checkpoints.config, resume=True)
    assert {entry.name for entry in tmp_path.iterdir()} == {"best", "checkpoints"}
    assert json.loads((tmp_path / "best" / "best.json").read_text())["score"] == 0.5


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    for step in ("step-999900", "step-1000000", "step-000100", "partial-step-2000000"):
        (tmp_path / "checkpoints" / step / "model").mkdir(parents=True)
    assert [entry.name for entry in list_checkpoints(tmp_path)] == ["step-000100", "step-999900", "step-1000000"]
    assert model_folder(tmp_path) == tmp_path / "checkpoints" / "step-1000000" / "model"


def test_a_run_has_its_folder_to_itself_until_it_ends(tmp_path, monkeypatch):
    taken = tmp_path / "runs" / "a"
    with run_folder(taken) as folder:
        assert folder == taken and taken.is_dir()
        refused = pytest.raises(ValueError, match="Another run is going on in .*; wait for it, or set another run.dir")
        with refused, run_folder(taken):
            pass
        monkeypatch.setenv("RANK", "1")
        with run_folder(taken):  # of the same run
            (taken / "metrics.jsonl").touch()
        monkeypatch.delenv("RANK")
    with run_folder(taken):
        pass
    assert [entry.name for entry in taken.iterdir()] == ["metrics.jsonl"]
    with run_folder(tmp_path / "runs" / "b"):
        pass
    assert not (tmp_path / "runs" / "b").exists(), "it stayed empty"


def test_a_best_model_that_could_not_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    checkpoints, model, _ = small_run(tmp_path)
    real = Layer.save_pretrained

    def full(self, folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    with checkpoints:
        checkpoints.offer_best(1, {"score": 0.5}, model)
        checkpoints.wait()
        monkeypatch.setattr(Layer, "save_pretrained", full)
        checkpoints.offer_best(2, {"score": 0.9}, model)
        checkpoints.wait()
        assert json.loads((tmp_path / "best" / "best.json").read_text())["step"] == 1
        monkeypatch.setattr(Layer, "save_pretrained", real)
        assert checkpoints.offer_best(3, {"score": 0.7}, model), "better than what is on the disk"
    assert json.loads((tmp_path / "best" / "best.json").read_text())["step"] == 3


@pytest.mark.slow
def test_on_two_ranks_a_last_save_that_failed_ends_the_run(rooms_root, tmp_path):
    """Neither rank waits for the other for ever."""
    config = sft_config(rooms_root, tmp_path / "run", "run.steps=4")
    save_config(config, tmp_path / "sft.yaml")
    arguments = ("4", "sft", "--config", str(tmp_path / "sft.yaml"))
    done = run_script(tmp_path / "limited.py", LIMITED, *arguments, ranks=2)
    assert done.returncode == 1
    assert "threedr1 sft: Could not write " in done.stderr, done.stderr[-3000:]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000002"]
