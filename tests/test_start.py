"""Every way of starting 3D-R1, from the checkout and installed, beside an installed Hugging Face `datasets`."""

import argparse
import importlib.util
import json
import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import threedr1
from threedr1 import main as cli
from threedr1.datasets.scene import TASKS as SCENE_TASKS
from threedr1.engine import arguments
from threedr1.engine.config import CONFIGS

ROOT = Path(threedr1.__file__).resolve().parent
VERSION = f"threedr1 {threedr1.__version__}"
COMMANDS = sorted(cli.FUNCTIONS)
COPIED = ("models", "datasets", "engine", "third_party", "utils", "visualization", "benchmarks", "script")


def run(
    arguments: Sequence[str | Path], *, cwd: Path = ROOT, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program without this process's PYTHONPATH."""
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "THREEDR1_DEBUG")}
    return subprocess.run(
        list(map(str, arguments)), cwd=cwd, env=variables | (env or {}), capture_output=True, text=True, timeout=120
    )


def checked(*arguments: str | Path, cwd: Path = ROOT, env: dict[str, str] | None = None) -> str:
    done = run(arguments, cwd=cwd, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def parsers() -> dict[str, argparse.ArgumentParser]:
    actions = cli.build_parser()._actions
    commands = next(action for action in actions if isinstance(action, argparse._SubParsersAction))
    return dict(commands.choices)


# From the checkout -----------------------------------------------------------------------------------------------


def test_main_py_starts_from_any_folder(tmp_path: Path):
    assert checked(sys.executable, "main.py", "--version") == VERSION
    assert checked(sys.executable, ROOT / "main.py", "--version", cwd=tmp_path) == VERSION
    (tmp_path / "linked.py").symlink_to(ROOT / "main.py")
    assert checked(sys.executable, "linked.py", "--version", cwd=tmp_path) == VERSION


def test_main_py_reaches_the_package(tmp_path: Path):
    output = checked(sys.executable, ROOT / "main.py", "sft", "--dry-run", "--set", "run.steps=7", cwd=tmp_path)
    assert "steps: 7" in output


@pytest.mark.parametrize("asked", ["", "COMPATIBLE"])
def test_products_on_a_cpu_round_alike_unless_asked_otherwise(asked: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("MKL_CBWR")
    if asked:
        monkeypatch.setenv("MKL_CBWR", asked)
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert os.environ["MKL_CBWR"] == (asked or "AUTO,STRICT")


def test_torchrun_starts_main_py():
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    output = checked(*launcher, "main.py", "sft", "--dry-run")
    assert output.count("lora_rank:") == 2


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="accelerate is not installed")
def test_accelerate_starts_main_py(tmp_path: Path):
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_machines", "1"]
    options = ["--num_processes", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    output = checked(*launcher, *options, "main.py", "sft", "--dry-run", env={"HF_HOME": str(tmp_path)})
    assert output.count("lora_rank:") == 1


def test_under_pytest_the_checkout_is_the_package_and_off_the_path():
    assert sys.modules["threedr1"].__file__ == str(ROOT / "__init__.py")
    assert ROOT not in [Path(entry or ".").resolve() for entry in sys.path]


def test_a_spawned_worker_finds_the_package():
    # multiprocessing's spawn runs the main file again, under the name __mp_main__, before it unpickles anything
    code = (
        "import runpy, sys; runpy.run_path('main.py', run_name='__mp_main__');"
        "from threedr1.utils.text import format_name; print(format_name(3))"
    )
    assert checked(sys.executable, "-S", "-c", code) == "<obj3>"


# Hugging Face's `datasets` ----------------------------------------------------------------------------------------

beside_hugging_face = pytest.mark.skipif(
    not any(Path(folder, "datasets", "arrow_dataset.py").is_file() for folder in sysconfig.get_paths().values()),
    reason="Hugging Face's datasets is not installed",
)


@beside_hugging_face
def test_hugging_face_finds_its_own_datasets_from_the_checkout_folder():
    code = (
        "import runpy; runpy.run_path('main.py', run_name='started');"
        "from transformers import Trainer; import datasets, transformers.utils;"
        "assert transformers.utils.is_datasets_available();"
        "print(datasets.Dataset.from_list([{'a': 1}])[0]['a'], Trainer.__name__)"
    )
    assert checked(sys.executable, "-c", code) == "1 Trainer"


def test_bare_datasets_is_refused_with_the_remedy():
    done = run([sys.executable, "-c", "import datasets"], env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 1
    assert "ImportError: This is 3D-R1's own `datasets` folder" in done.stderr
    assert "import threedr1" in done.stderr


# Installed -------------------------------------------------------------------------------------------------------


def copy_checkout(target: Path) -> Path:
    """A copy of what is packaged, so that building leaves nothing in the checkout."""
    target.mkdir()
    for name in COPIED:
        shutil.copytree(
            ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", "build", "lib")
        )
    for path in ROOT.iterdir():
        if path.is_file() and path.suffix in (".py", ".toml", ".md", ".txt"):
            shutil.copy(path, target)
    return target


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes empty virtual environments that see this one's packages, but not its installed threedr1."""
    if importlib.util.find_spec("pip") is None or importlib.util.find_spec("setuptools") is None:
        pytest.skip("pip and setuptools are needed to build and install")
    folder = tmp_path_factory.mktemp("environments")

    def make(name: str) -> Path:
        checked(sys.executable, "-m", "venv", "--without-pip", folder / name)
        site = next((folder / name).glob("lib/python*/site-packages"))
        (site / "parent.pth").write_text(sysconfig.get_path("purelib") + "\n")
        return folder / name / "bin" / "python"

    return make


OFFLINE = ("--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check")


def pip_install(python: Path, *arguments: str | Path, env: dict[str, str] | None = None) -> str:
    command = [sys.executable, "-m", "pip", "--python", python, "install", "--ignore-installed"]
    done = run([*command, *OFFLINE, *arguments], env=env)
    assert done.returncode == 0, done.stderr
    return done.stderr


def pip_wheel(folder: Path, checkout: Path, env: dict[str, str] | None = None) -> tuple[Path, set[str]]:
    """The wheel of a checkout, and the names of the files in it."""
    checked(sys.executable, "-m", "pip", "wheel", "--quiet", *OFFLINE, "-w", folder, checkout, env=env)
    wheel = next(folder.glob("threedr1-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        return wheel, set(archive.namelist())


def check_installed(python: Path, expected: Path, cwd: Path) -> None:
    """Both ways of starting an installed package, from a folder where `datasets/` would shadow the library."""
    assert checked(python, "-m", "threedr1.main", "--version", cwd=cwd) == VERSION
    assert checked(python.with_name("threedr1"), "--version", cwd=cwd) == VERSION
    where = checked(python, "-c", "import threedr1; print(threedr1.__file__)", cwd=cwd)
    assert Path(where).resolve().is_relative_to(expected.resolve())


def test_editable_install(environment: Callable[[str], Path], tmp_path: Path):
    checkout = copy_checkout(tmp_path / "checkout")
    python = environment("editable")
    pip_install(python, "-e", checkout)
    check_installed(python, checkout, checkout)
    check_installed(python, checkout, tmp_path)


def test_wheel(environment: Callable[[str], Path], tmp_path: Path):
    checkout = copy_checkout(tmp_path / "checkout")
    wheel, names = pip_wheel(tmp_path, checkout)
    assert wheel.name.endswith("-none-any.whl") and not [name for name in names if name.endswith(".so")]
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"threedr1"}
    for name in COPIED[:-1]:
        packaged = {entry for entry in names if entry.startswith(f"threedr1/{name}/") and entry.endswith(".py")}
        sources = {f"threedr1/{path.relative_to(checkout)}" for path in (checkout / name).rglob("*.py")}
        assert packaged == sources, f"{name}: a folder without __init__.py is not packaged"
    assert "threedr1/main.py" in names and "threedr1/script/setup.sh" in names
    compiled = [*checkout.glob("third_party/pointnet2/csrc/*"), *checkout.glob("utils/*.pyx")]
    compiled += checkout.glob("visualization/*.html")
    assert {f"threedr1/{path.relative_to(checkout)}" for path in compiled} <= names, (
        "what is compiled on first use, and pages"
    )
    python = environment("wheel")
    pip_install(python, wheel)
    check_installed(python, python.parents[1], tmp_path)
    check_installed(python, python.parents[1], checkout)


@pytest.fixture
def compiling(tmp_path: Path) -> dict[str, str]:
    """Variables with which the CPU library is compiled on installation, quickly, and nothing on first use."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler on this machine")
    quick = tmp_path / "quick-compiler"
    quick.write_text(f'#!/bin/sh\nexec {compiler} "$@" -O0\n')
    quick.chmod(0o755)
    variables = {"THREEDR1_BUILD_OPS": "1", "CXX": str(quick), "CUDA_HOME": str(tmp_path / "no-cuda")}
    return variables | {"THREEDR1_JIT": "0", "XDG_CACHE_HOME": str(tmp_path / "cache"), "THREEDR1_OPS": ""}


USED_LIBRARY = "from threedr1.third_party.pointnet2 import describe_backends; print(describe_backends()[0])"


def test_an_editable_install_compiles_the_operations_when_asked(
    environment: Callable[[str], Path], compiling: dict[str, str], tmp_path: Path
):
    checkout = copy_checkout(tmp_path / "checkout")
    python = environment("editable-ops")
    told = pip_install(python, "--verbose", "-e", checkout, env=compiling)
    assert "the CUDA library is not built, as there is no nvcc (set CUDA_HOME)" in told
    folder = checkout / "third_party" / "pointnet2" / "lib"
    assert [path.name[:14] for path in folder.iterdir()] == ["pointnet2_cpu-"]
    assert f"cpu tensors: cpu ({folder}" in checked(python, "-c", USED_LIBRARY, env=compiling)


def test_a_wheel_holds_the_compiled_operations_when_asked(
    environment: Callable[[str], Path], compiling: dict[str, str], tmp_path: Path
):
    checkout = copy_checkout(tmp_path / "checkout")
    wheel, names = pip_wheel(tmp_path / "with", checkout, compiling)
    assert f"-cp3{sys.version_info.minor}-" in wheel.name and "-any" not in wheel.name, "one Python, one platform"
    made = sorted(name.partition("threedr1/")[2][:26] for name in names if name.endswith(".so"))
    assert made == ["third_party/pointnet2/lib/", "utils/box_intersection.cpy"]
    assert not (checkout / "third_party" / "pointnet2" / "lib").exists()
    python = environment("wheel-ops")
    pip_install(python, wheel)
    assert f"cpu tensors: cpu ({python.parents[1]}" in checked(python, "-c", USED_LIBRARY, cwd=tmp_path, env=compiling)
    wheel, names = pip_wheel(tmp_path / "without", checkout)  # build/ still has the library
    assert wheel.name.endswith("-none-any.whl") and not [name for name in names if name.endswith(".so")]


def test_a_failed_compilation_fails_the_installation(
    environment: Callable[[str], Path], compiling: dict[str, str], tmp_path: Path
):
    checkout = copy_checkout(tmp_path / "checkout")
    (checkout / "third_party" / "pointnet2" / "csrc" / "cpu.cpp").write_text("a mistake")
    command = [sys.executable, "-m", "pip", "--python", environment("failed-ops"), "install", *OFFLINE, "-e", checkout]
    done = run(command, env=compiling)
    assert done.returncode != 0 and "cpu.cpp:1:1: error:" in done.stdout + done.stderr
    done = run(command, env=compiling | {"THREEDR1_BUILD_OPS": "yes"})
    assert done.returncode != 0 and "THREEDR1_BUILD_OPS=yes is not 1, cpu or 0" in done.stdout + done.stderr


def test_setup_py_does_not_import_torch(tmp_path: Path):
    checkout = copy_checkout(tmp_path / "checkout")
    code = (
        "import sys; sys.argv = ['setup.py', '--quiet', '--version'];"
        "import runpy; runpy.run_path('setup.py', run_name='__main__'); assert 'torch' not in sys.modules"
    )
    assert checked(sys.executable, "-c", code, cwd=checkout).splitlines()[-1] == threedr1.__version__


# The command line ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_answers_within_a_second(command: str):
    times = []
    for _ in range(3):
        started = time.perf_counter()
        output = checked(sys.executable, "main.py", command, "--help")
        times.append(time.perf_counter() - started)
        assert output.startswith(f"usage: threedr1 {command}")
        if times[-1] < 1:
            return
    pytest.fail(f"{command} --help took {min(times):.2f} s at best")


def test_help_imports_nothing_heavy():
    code = (
        "import runpy, sys\n"
        "sys.argv = ['main.py', 'sft', '--help']\n"
        "try:\n    runpy.run_path('main.py', run_name='__main__')\n"
        "except SystemExit as stop:\n    assert stop.code == 0\n"
        "heavy = {'torch', 'numpy', 'transformers', 'yaml', 'scipy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    checked(sys.executable, "-c", code)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_argument_has_a_help_text(command: str):
    parser = parsers()[command]
    assert parser.description
    for action in parser._actions:
        assert action.help, f"{command} {action.option_strings or action.dest} has no help text"


def test_help_lists_what_exists():
    assert set(CONFIGS) <= set(COMMANDS)
    assert ", ".join(SCENE_TASKS) == arguments.TASKS


def test_an_error_is_one_sentence_and_a_nonzero_exit():
    done = run([sys.executable, "main.py", "sft", "--dry-run", "--set", "run.stepz=3"])
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "did you mean 'steps'" in done.stderr


def test_debug_shows_the_traceback():
    command = [sys.executable, "main.py", "sft", "--dry-run", "--set", "run.stepz=3"]
    done = run(command, env={"THREEDR1_DEBUG": "1"})
    assert done.returncode == 1 and "Traceback" in done.stderr


def test_a_question_is_needed(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["infer", "--scene", "room.ply"]) == 1
    assert "There is no question" in capsys.readouterr().err


def test_a_missing_question_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["infer", "--scene", "room.ply", "--questions", str(tmp_path / "none.txt")]) == 1
    assert "There is no question file at" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (ValueError("The scan is empty."), 1, "threedr1 doctor: The scan is empty."),
        (KeyboardInterrupt(), 130, "Interrupted."),
        (ModuleNotFoundError("no", name="plyfile"), 1, "'plyfile' is missing; run `bash script/setup.sh`"),
    ],
)
def test_expected_errors(
    error: BaseException,
    status: int,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    def fail(_: argparse.Namespace) -> int:
        raise error

    monkeypatch.setitem(cli.FUNCTIONS, "doctor", fail)
    monkeypatch.delenv("THREEDR1_DEBUG", raising=False)
    assert cli.main(["doctor"]) == status
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("error", [RuntimeError("shape"), ModuleNotFoundError("no", name="threedr1.lost")])
def test_bugs_keep_their_traceback(error: Exception, monkeypatch: pytest.MonkeyPatch):
    def fail(_: argparse.Namespace) -> int:
        raise error

    monkeypatch.setitem(cli.FUNCTIONS, "doctor", fail)
    with pytest.raises(type(error)):
        cli.main(["doctor"])


def test_doctor_reports_the_installation(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["doctor"]) == 0
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line[:1].isalpha())
    import torch

    assert rows["torch"] == torch.__version__ and rows["python"].startswith(f"{sys.version_info[0]}.")


def test_benchmarks_are_listed_with_their_purpose():
    from threedr1.benchmarks import BENCHMARKS

    files = {path.stem for path in (ROOT / "benchmarks").glob("*.py") if not path.name.startswith("_")}
    assert set(BENCHMARKS) == files
    assert all(BENCHMARKS.values()), "the first line of a benchmark's docstring says what it measures"


def test_score_prints_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    score = pytest.importorskip("threedr1.utils.metrics.score")
    seen = {}

    def score_file(task: str, scorer: str | None, references: str | None, predictions: str) -> dict[str, float]:
        seen.update(task=task, scorer=scorer, references=references, predictions=predictions)
        return {"em": 0.5}

    monkeypatch.setattr(score, "score_file", score_file)
    assert cli.main(["score", "--task", "qa", "--predictions", "p.jsonl", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"em": 0.5}
    assert seen == {"task": "qa", "scorer": None, "references": None, "predictions": "p.jsonl"}


def test_main_runs_twice_in_one_process():
    namespace = runpy.run_path(str(ROOT / "main.py"), run_name="again")
    assert namespace["__package__"] == "threedr1"
    assert sys.modules["threedr1"] is threedr1
