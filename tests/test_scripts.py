"""The shell entry points: what they run really parses, and set-up and quickstart skip, resume and redo as they say."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import threedr1
from threedr1 import main as cli
from threedr1.engine.config import CONFIGS, load_config

ROOT = Path(threedr1.__file__).resolve().parent
SCRIPTS = sorted((ROOT / "script").glob("*.sh"))
RECIPES_DIR = ROOT / "script" / "recipes"
RECIPES = sorted(RECIPES_DIR.rglob("*.yaml"))
ENTRY_POINTS = (
    "pretrain.detector.sh",
    "train.generalist.sh",
    "train.rl.sh",
    "infer.sh",
    "synthesize_scene30K.sh",
    "visualize.sh",
    "demo.sh",
)
OVERRIDES = ["PYTHON", "CONFIG", "NGPU", "MODEL", "ENCODER", "DATA", "RUN", "OUT"]

# Stands in for the interpreter: notes what main.py is asked to do and leaves the results that a stage would.
RECORDER = f"""#!{sys.executable}
import json, os, pathlib, sys
arguments = sys.argv[1:]
if "main.py" not in arguments:
    os.execv({sys.executable!r}, [{sys.executable!r}, *arguments])
with open(os.environ["RECORD"], "a") as record:
    record.write(json.dumps(arguments) + "\\n")
command = arguments[arguments.index("main.py") + 1 :]
with open(os.environ["RECORD"] + ".environment", "a") as record:
    record.write(json.dumps([command, dict(os.environ)]) + "\\n")
for name, value in zip(command, command[1:]):
    if name == "--out":
        pathlib.Path(value).mkdir(parents=True, exist_ok=True)
        pathlib.Path(value, "rooms.json").touch()
    if name == "--html":
        pathlib.Path(value).touch()
    if name == "--root":
        pathlib.Path(value, "prepared").mkdir(parents=True, exist_ok=True)
for value in command:
    if value.startswith("run.dir="):
        folder = pathlib.Path(value.partition("=")[2])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "begun").touch()
sys.exit(3 if command[0] == os.environ.get("FAIL_AT") else 0)
"""


class Shell:
    """Runs the scripts of one checkout with an interpreter that only records."""

    def __init__(self, root: Path, folder: Path):
        self.root = root
        self.record = folder / "record.jsonl"
        self.python = folder / "recorder"
        self.python.write_text(RECORDER)
        self.python.chmod(0o755)

    def run(self, script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {
            name: value
            for name, value in os.environ.items()
            if name not in OVERRIDES and not name.startswith("THREEDR1_")
        }
        environment |= {"THREEDR1_PYTHON": str(self.python), "RECORD": str(self.record)} | variables
        for path in (self.record, Path(f"{self.record}.environment")):
            path.unlink(missing_ok=True)
        return subprocess.run(
            ["bash", str(self.root / "script" / script), *arguments],
            env=environment,
            cwd=self.root,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def environments(self) -> list[tuple[list[str], dict[str, str]]]:
        """What main.py was asked to do in the last run, and its environment."""
        rows = Path(f"{self.record}.environment").read_text().splitlines()
        return [(command, environment) for command, environment in map(json.loads, rows)]

    def commands(self) -> list[list[str]]:
        """What main.py was asked to do in the last run, without the launcher."""
        if not self.record.exists():
            return []
        rows = [json.loads(line) for line in self.record.read_text().splitlines()]
        return [row[row.index("main.py") + 1 :] for row in rows]


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    """A checkout that holds little but the scripts."""
    shutil.copytree(ROOT / "script", tmp_path / "checkout" / "script")
    for name in ("version.py", "annotate.py"):  # which say what the scripts' rooms are
        target = tmp_path / "checkout" / "datasets" / "rooms" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "datasets" / "rooms" / name, target)
    return Shell(tmp_path / "checkout", tmp_path)


def check_command(command: list[str]) -> None:
    """The command line parses, and its recipe and overrides make a configuration."""
    args = cli.build_parser().parse_args(command)
    if args.command in CONFIGS:
        load_config(args.command, ROOT / args.config, args.set)


# Recipes and flags ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_parses(script: Path):
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_recipes_exist_for_every_loop():
    names = {path.name for path in RECIPES}
    assert {f"{size}{kind}.yaml" for size in ("", "tiny.") for kind in CONFIGS} <= names


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: str(path.relative_to(RECIPES_DIR)))
def test_recipe_loads(recipe: Path):
    # A name without a command, as model.7b.yaml, is a part that SFT recipes build on.
    kinds = [part for part in recipe.name.split(".") if part in CONFIGS] or ["sft"]
    load_config(kinds[0], recipe)


@pytest.mark.parametrize("script", ENTRY_POINTS)
def test_entry_point_runs_what_exists(script: str, shell: Shell):
    done = shell.run(script)
    assert done.returncode == 0, done.stderr
    assert len(shell.commands()) == 1
    check_command(shell.commands()[0])


@pytest.mark.parametrize("script", ENTRY_POINTS)
def test_entry_point_takes_its_overrides(script: str, shell: Shell):
    kind = {"pretrain.detector.sh": "detect", "train.generalist.sh": "sft", "train.rl.sh": "grpo", "infer.sh": "eval"}
    variables = {"MODEL": "some/model", "ENCODER": "some/encoder", "DATA": "some/data", "RUN": "some/run"}
    if script in kind:
        variables["CONFIG"] = f"script/recipes/tiny.{kind[script]}.yaml"
    done = shell.run(script, **variables)
    assert done.returncode == 0, done.stderr
    (command,) = shell.commands()
    check_command(command)
    usage = shell.run(script, "--help").stdout
    for name, value in variables.items():
        if f"\n  {name}=" in usage:
            assert any(value in word for word in command), f"{script} ignores {name}"


@pytest.mark.parametrize("script", ["pretrain.detector.sh", "train.generalist.sh", "train.rl.sh", "infer.sh"])
def test_unknown_arguments_reach_main(script: str, shell: Shell):
    assert shell.run(script, "--dry-run", "--set", "run.seed=5").returncode == 0
    (command,) = shell.commands()
    args = cli.build_parser().parse_args(command)
    assert args.dry_run and "run.seed=5" in args.set


def test_a_scan_is_detected_in_and_shown_as_by_the_official_script(shell: Shell):
    done = shell.run("visualize.sh", "room.PLY", "scene0000_00", "out", "json", "--save", "a.rrd", MODEL="some/model")
    assert done.returncode == 0, done.stderr
    scan, boxes = ["--scene", "room.PLY"], "out/scene0000_00.json"
    (command,) = shell.commands()
    assert command == ["view", *scan, "--model", "some/model", "--save", "a.rrd", "--export", boxes]
    check_command(command)


def test_without_an_output_both_the_detection_and_the_viewer_read_the_scan_alike(shell: Shell):
    how = ["--up=-y", "--height", "2.6"]
    assert shell.run("visualize.sh", "room.ply", "b", "c", "npz", *how, MODEL="m").returncode == 0
    export, show = shell.commands()
    assert export == ["view", "--scene", "room.ply", "--model", "m", *how, "--export", "c/b.npz"]
    assert show == ["view", "c/b.npz", "--scene", "room.ply", *how]
    for command in (export, show):
        check_command(command)


@pytest.mark.parametrize(
    ("words", "boxes"),
    [
        (["a/my room.ply"], "outputs/preds/my room.npz"),
        (["a.glb", "b", "--limit", "3"], "outputs/preds/b.npz"),
        (["a.ply", "b", "c"], "c/b.npz"),
    ],
)
def test_what_the_official_script_is_not_told_has_defaults(words: list[str], boxes: str, shell: Shell):
    assert shell.run("visualize.sh", *words).returncode == 0
    export, show = shell.commands()
    more = ["--limit", "3"] if "--limit" in words else []
    assert export == ["view", "--scene", words[0], "--model", "runs/quickstart/grpo", *more, "--export", boxes]
    assert show == ["view", boxes, "--scene", words[0], *more]


def test_boxes_that_are_there_are_shown_without_a_model(shell: Shell):
    assert shell.run("visualize.sh", "a.ply", "b", "c", "npz", MODEL="").returncode == 0
    assert shell.commands() == [["view", "c/b.npz", "--scene", "a.ply"]]


def test_a_scan_in_which_nothing_could_be_detected_is_not_shown(shell: Shell):
    assert shell.run("visualize.sh", "a.ply", FAIL_AT="view").returncode == 3
    assert len(shell.commands()) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a.ply", "b", "c", "txt"], "writes boxes as npz or json, not as txt"),
        (["a.ply", "b", "c", "npz", "d"], "takes PLY SCAN OUT FORMAT, and then options"),
    ],
)
def test_wrong_words_for_the_official_script(words: list[str], said: str, shell: Shell):
    done = shell.run("visualize.sh", *words)
    assert done.returncode == 2 and said in done.stderr and not shell.commands()


def test_several_gpus_start_torchrun(shell: Shell):
    assert shell.run("train.rl.sh", NGPU="4").returncode == 0
    (row,) = [json.loads(line) for line in shell.record.read_text().splitlines()]
    assert row[:4] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"]
    check_command(shell.commands()[0])


@pytest.mark.parametrize("script", [*ENTRY_POINTS, "quickstart.sh", "test.sh", "typecheck.sh", "docs.sh"])
def test_help_prints_the_usage_and_runs_nothing(script: str, shell: Shell):
    done = shell.run(script, "--help", THREEDR1_PYTHON="/nonexistent")
    assert done.returncode == 0 and f"bash script/{script}" in done.stdout
    assert "#" not in done.stdout and "source " not in done.stdout
    assert not shell.commands()


def test_infer_help_names_recipes_that_exist():
    for script in SCRIPTS:
        for word in script.read_text(encoding="utf-8").replace("*", "").replace('"', " ").split():
            name = word.partition("=")[2] or word
            if name.startswith("script/recipes/") and name.endswith(".yaml"):
                assert (ROOT / name).is_file() or "tiny.." in name, f"{script.name} names {name}"


def test_the_demo_installs_nothing_into_an_interpreter_that_is_given(shell: Shell):
    assert shell.run("demo.sh", "--port", "8000").returncode == 0
    (row,) = [json.loads(line) for line in shell.record.read_text().splitlines()]
    assert row == ["main.py", "demo", "--port", "8000"]


def test_the_dockerfile_copies_what_exists_and_has_both_images():
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    copied = [name for line in lines if line.startswith("COPY ") for name in line.split()[1:-1] if name[0] != "-"]
    assert copied and all((ROOT / name).exists() for name in copied)
    assert {line.split()[-1] for line in lines if line.startswith("FROM ")} >= {"cpu", "cuda"}
    assert any(line.startswith('ENTRYPOINT ["python", "main.py"]') for line in lines)


# Stands in for the interpreter: `pip install` makes a folder `peer`, unless it is to fail; pytest notes what it sees.
PEER_RECORDER = f"""#!{sys.executable}
import json, os, pathlib, sys
arguments = sys.argv[1:]
if arguments[:2] == ["-m", "pip"]:
    if "FAIL_PIP" in os.environ:
        sys.exit(1)
    constraints = pathlib.Path(arguments[arguments.index("--constraint") + 1]).read_text()
    assert "numpy==" in constraints and "pillow" not in constraints and "[" not in constraints
    pathlib.Path(arguments[arguments.index("--target") + 1], "peer").write_text(arguments[-1])
elif arguments[:2] == ["-m", "pytest"]:
    path = os.environ["PYTHONPATH"].split(":")[0]
    row = [*arguments[2:], path, pathlib.Path(path, "peer").read_text()]
    pathlib.Path(os.environ["RECORD"]).write_text(json.dumps(row))
    sys.exit(1 if "FAIL_PYTEST" in os.environ else 0)
else:
    os.execv({sys.executable!r}, [{sys.executable!r}, *arguments])
"""
PEERS = {
    "--trl": ("trl", ["tests/engine/test_grpo_trl.py"]),
    "--triton": (
        "triton",
        [
            *("-n", "2", "-m", "not gpu"),
            "tests/models/test_decode_attention_triton.py",
            "tests/models/test_lm_head_triton.py",
            "tests/utils/test_splat_triton.py",
        ],
    ),
    "--demo": ("gradio", ["-m", "not gpu", "tests/engine/test_demo.py", "tests/engine/test_demo_browser.py"]),
    "--docs": ("mkdocs-material", ["tests/test_docs_site.py"]),
}


@pytest.fixture
def peers(shell: Shell) -> Shell:
    """A checkout with what names the releases, and an interpreter that fetches nothing."""
    for name in ("requirements.txt", "setup.py"):
        shutil.copy(ROOT / name, shell.root)
    shell.python.write_text(PEER_RECORDER)
    return shell


@pytest.mark.parametrize("part", PEERS)
def test_what_set_up_leaves_out_is_fetched_into_a_folder_that_goes_again(part: str, peers: Shell):
    package, expected = PEERS[part]
    for failing, status in (({}, 0), ({"FAIL_PYTEST": "1"}, 1)):
        done = peers.run("test.sh", part, "-q", **failing)
        assert done.returncode == status, done.stderr
        *arguments, folder, fetched = json.loads(peers.record.read_text())
        assert arguments == [*expected, "-q"]
        assert all((ROOT / name).is_file() for name in expected if name.startswith("tests/"))
        assert fetched.startswith(f"{package}==") and fetched[-1].isdigit() and not Path(folder).exists()


@pytest.mark.parametrize("part", PEERS)
def test_where_it_cannot_be_fetched_its_tests_are_left_out(part: str, peers: Shell):
    done = peers.run("test.sh", part, FAIL_PIP="1")
    assert done.returncode == 0 and "cannot be fetched here" in done.stderr and not peers.record.exists()


# Slurm ----------------------------------------------------------------------------------------------------------


def under_slurm(shell: Shell, folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The script as sbatch runs it, a copy that lies elsewhere, on two nodes that are this machine."""
    for name, code in {
        # it writes more after the script has what it needs
        "scontrol": "echo node7; sleep 0.1; echo node8",
        "srun": 'while [[ $1 == --* ]]; do shift; done; "$@"',
    }.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{code}\n")
        (folder / name).chmod(0o755)
    shutil.copy(shell.root / "script" / "slurm.sh", folder / "slurm_script")
    slurm = {
        "SLURM_JOB_ID": "123456",
        "SLURM_NNODES": "2",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_GPUS_ON_NODE": "4",
    }
    path = f"{folder}:{os.environ['PATH']}"
    slurm |= {"SLURM_SUBMIT_DIR": str(shell.root), "PATH": path, "SLURM_CPUS_PER_TASK": "30"}
    return shell.run(str(folder / "slurm_script"), *arguments, **(slurm | variables))


def test_a_slurm_job_starts_one_torchrun_a_node(shell: Shell, tmp_path: Path):
    done = under_slurm(shell, tmp_path, "sft", "--config", "script/recipes/sft.yaml", "--resume")
    assert done.returncode == 0, done.stderr
    (row,) = [json.loads(line) for line in shell.record.read_text().splitlines()]
    assert row[: row.index("main.py")] == [
        "-m",
        "torch.distributed.run",
        "--nnodes=2",
        "--nproc-per-node=4",
        "--rdzv-id=123456",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=node7:23456",
    ]
    check_command(shell.commands()[0])


def test_a_slurm_script_outside_a_job_says_so(shell: Shell, tmp_path: Path):
    done = under_slurm(shell, tmp_path, "sft", SLURM_JOB_ID="")
    assert done.returncode == 1 and "start it by sbatch" in done.stderr and not shell.commands()
    done = under_slurm(shell, tmp_path)
    assert done.returncode == 1 and "Say what to run" in done.stderr


# quickstart -----------------------------------------------------------------------------------------------------


def names(commands: list[list[str]]) -> list[str]:
    return [command[0] for command in commands]


STAGES = ["rooms", "prepare", "tiny", "detect", "sft", "sft", "grpo", "eval", "eval", "eval", "eval", "view"]


def test_quickstart_runs_every_stage_once(shell: Shell):
    done = shell.run("quickstart.sh")
    assert done.returncode == 0, done.stderr
    assert names(shell.commands()) == STAGES
    for command in shell.commands():
        check_command(command)
    assert f"== {len(STAGES)}/{len(STAGES)} report" in done.stdout
    assert shell.run("quickstart.sh").returncode == 0
    assert shell.commands() == []


def test_quickstart_goes_on_after_a_failure(shell: Shell):
    done = shell.run("quickstart.sh", FAIL_AT="grpo")
    assert done.returncode == 1 and "stage grpo failed" in done.stderr
    assert names(shell.commands()) == STAGES[:7]
    assert shell.run("quickstart.sh").returncode == 0
    assert names(shell.commands()) == STAGES[6:]
    assert "--resume" in shell.commands()[0]


def test_quickstart_keeps_what_it_can_resume_and_drops_what_it_cannot(shell: Shell):
    run = shell.root / "runs" / "quickstart"
    shell.run("quickstart.sh", FAIL_AT="grpo")
    (run / "grpo" / "checkpoint").touch()
    shell.run("quickstart.sh", FAIL_AT="grpo")
    assert (run / "grpo" / "checkpoint").exists()
    recipe = shell.root / "script" / "recipes" / "tiny.grpo.yaml"
    recipe.write_text(recipe.read_text() + "\n# changed\n")
    shell.run("quickstart.sh", FAIL_AT="grpo")
    assert not (run / "grpo" / "checkpoint").exists()


def test_quickstart_redoes_what_follows_a_lost_result(shell: Shell):
    shell.run("quickstart.sh")
    shutil.rmtree(shell.root / "runs" / "quickstart" / "sft")
    time.sleep(1.1)  # stamps hold seconds
    assert shell.run("quickstart.sh").returncode == 0
    assert names(shell.commands()) == STAGES[5:]


def test_quickstart_with_other_rooms_is_another_run(shell: Shell):
    shell.run("quickstart.sh")
    shell.run("quickstart.sh", SEED="1")
    assert names(shell.commands()) == STAGES
    rooms = shell.commands()[0]
    assert rooms[rooms.index("--seed") + 1] == "1"


def test_quickstart_overrides(shell: Shell):
    shell.run("quickstart.sh", RUN="runs/other", DATA="data/other")
    for command in shell.commands():
        assert "runs/quickstart" not in " ".join(command) and "data/rooms" not in " ".join(command)
    assert (shell.root / "runs" / "other" / "report.html").exists()


# set-up ---------------------------------------------------------------------------------------------------------

# Stands in for a Python that can make virtual environments; pip is only noted.
FAKE_PYTHON = f"""#!{sys.executable}
import json, os, pathlib, shutil, sys
arguments = sys.argv[1:]
if arguments[:2] == ["-m", "venv"]:
    target = pathlib.Path(arguments[2], "bin", "python")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(__file__, target)
elif arguments[:2] == ["-m", "pip"]:
    if arguments[2] == "install":
        with open(os.environ["RECORD"], "a") as record:
            record.write(json.dumps(arguments[3:]) + "\\n")
        compiling = "compiling " + os.environ.get("THREEDR1_BUILD_OPS", "")
        sys.exit(1 if os.environ.get("FAIL_AT") in (*arguments, compiling) else 0)
else:
    os.execv({sys.executable!r}, [{sys.executable!r}, *arguments])
"""


class Setup(Shell):
    """A checkout in which set-up makes .venv with a Python whose pip only notes what it is asked for."""

    def __init__(self, folder: Path):
        root = folder / "checkout"
        root.mkdir()
        shutil.copytree(ROOT / "script", root / "script")
        (root / "utils").mkdir()
        for name in ("requirements.txt", "setup.py", "utils/box_intersection.pyx"):
            shutil.copy(ROOT / name, root / name)
        super().__init__(root, folder)
        self.fake = folder / "python3.11"
        self.fake.write_text(FAKE_PYTHON)
        self.fake.chmod(0o755)

    def setup(self, **variables: str) -> subprocess.CompletedProcess[str]:
        return self.run("setup.sh", **{"THREEDR1_PYTHON": "", "PYTHON": str(self.fake)} | variables)

    def installs(self) -> list[list[str]]:
        if not self.record.exists():
            return []
        return [json.loads(line)[1:] for line in self.record.read_text().splitlines()]


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    return Setup(tmp_path)


def test_setup_says_what_it_does_before_it_does_anything(setup: Setup):
    told = setup.run("setup.sh", "--help", THREEDR1_PYTHON="", PYTHON=str(setup.fake))
    assert told.returncode == 0 and "THREEDR1_NO_VENV=1" in told.stdout and "set -euo" not in told.stdout
    odd = setup.run("setup.sh", "cpu", THREEDR1_PYTHON="", PYTHON=str(setup.fake))
    assert odd.returncode == 1 and "takes no arguments" in odd.stderr
    assert setup.installs() == [] and not (setup.root / ".venv").exists()


def test_setup_installs_torch_then_the_pins_then_the_checkout(setup: Setup):
    done = setup.setup()
    assert done.returncode == 0, done.stderr
    torch, pins, checkout = setup.installs()
    assert torch == ["torch==2.13.0"]
    assert pins == ["-r", "requirements.txt"]
    assert checkout[-2:] == ["-e", "."] and "--no-deps" in checkout


def test_setup_goes_on_where_nothing_compiles(setup: Setup):
    done = setup.setup(FAIL_AT="compiling cpu")
    assert done.returncode == 0, done.stderr
    assert "plain PyTorch will compute the same" in done.stderr
    assert len(setup.installs()) == 4
    assert not setup.setup().stderr


def test_setup_fails_where_what_was_asked_for_does_not_compile(setup: Setup):
    assert setup.setup(FAIL_AT="compiling 1", THREEDR1_BUILD_OPS="1").returncode != 0
    assert setup.setup(THREEDR1_BUILD_OPS="1").returncode == 0


def test_a_second_setup_does_nothing_within_a_second(setup: Setup):
    setup.setup()
    times = []
    for _ in range(3):
        started = time.perf_counter()
        assert setup.setup().returncode == 0
        times.append(time.perf_counter() - started)
        assert not setup.installs()
    assert min(times) < 1


def test_setup_follows_changed_pins(setup: Setup):
    setup.setup()
    pins = setup.root / "requirements.txt"
    pins.write_text(pins.read_text() + "# changed\n")
    (setup.root / ".venv" / "kept").touch()
    assert setup.setup().returncode == 0
    assert len(setup.installs()) == 3
    assert (setup.root / ".venv" / "kept").exists()


def test_an_interrupted_setup_starts_again(setup: Setup):
    assert setup.setup(FAIL_AT="requirements.txt").returncode != 0
    (setup.root / ".venv" / "half").touch()
    assert setup.setup().returncode == 0
    assert len(setup.installs()) == 3
    assert not (setup.root / ".venv" / "half").exists()


def test_setup_leaves_an_environment_alone_that_it_did_not_make(setup: Setup):
    (setup.root / ".venv").mkdir()
    (setup.root / ".venv" / "mine").touch()
    done = setup.setup()
    assert done.returncode == 1 and "did not make it" in done.stderr
    assert (setup.root / ".venv" / "mine").exists() and not setup.installs()


def test_setup_says_which_python_it_needs(setup: Setup, tmp_path: Path):
    old = tmp_path / "python3.9"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = setup.setup(PYTHON=str(old))
    assert done.returncode == 1 and "is not a Python 3.10, 3.11 or 3.12" in done.stderr
    assert not (setup.root / ".venv" / "bin").exists()


def test_setup_without_any_python(setup: Setup, tmp_path: Path):
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "dirname", "cat", "mkdir", "touch", "rm", "flock", "grep", "mv"):
        path = shutil.which(name)
        if path:
            (tools / name).symlink_to(path)
    done = setup.setup(PYTHON="", PATH=str(tools))
    assert done.returncode == 1 and "No Python 3.10, 3.11 or 3.12 found" in done.stderr


def test_a_given_python_is_used_as_it_is(setup: Setup):
    done = setup.setup(THREEDR1_PYTHON=sys.executable)
    assert done.returncode == 0, done.stderr
    assert not (setup.root / ".venv").exists() and not setup.installs()
    done = setup.setup(THREEDR1_NO_VENV="1", PYTHON=sys.executable)
    assert done.returncode == 0, done.stderr
    assert not (setup.root / ".venv").exists() and not setup.installs()


def test_a_given_python_without_the_packages_is_refused(setup: Setup, tmp_path: Path):
    bare = tmp_path / "bare"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o755)
    done = setup.setup(THREEDR1_PYTHON=str(bare))
    assert done.returncode == 1 and "lacks torch" in done.stderr


def test_pins_satisfy_the_ranges_of_setup_py():
    packaging = pytest.importorskip("packaging.requirements")
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pins = [packaging.Requirement(line) for line in lines if line and not line.startswith("#")]
    source = (ROOT / "setup.py").read_text(encoding="utf-8")
    ranges = [packaging.Requirement(text) for text in _strings(source) if ">=" in text and not text.startswith(">")]
    for python in ("3.10", "3.11", "3.12"):
        versions = {
            pin.name: str(pin.specifier).removeprefix("==")
            for pin in pins
            if pin.marker is None or pin.marker.evaluate({"python_version": python})
        }
        for wanted in ranges:
            assert wanted.name in versions, f"requirements.txt lacks {wanted.name} on Python {python}"
            assert wanted.specifier.contains(versions[wanted.name]), f"{wanted} and {versions[wanted.name]}"


def _strings(source: str) -> list[str]:
    import ast

    nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant))
    return [node.value for node in nodes if isinstance(node.value, str) and "\n" not in node.value]
