"""Bad input, from the outside: one sentence that says what to do, a non-zero exit, nothing half-written.

The cases follow the command line; `refused` holds each to the same rules. Most run in this process, a few in a fresh
interpreter to see exactly what a user sees.
"""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

import threedr1.main as cli

from . import data_factory as factory

ROOT = Path(cli.__file__).resolve().parent
SCENE = "scene0000_00"
TINY_ENCODER = (
    "num_tokens=32 num_neighbors=8 radius=0.4 width=16 encoder_layers=1 decoder_layers=1 num_heads=2 num_queries=12"
)


def snapshot(folder: Path) -> dict[str, int | None]:
    """Every file below a folder with its size, every folder with None."""
    return {
        str(path.relative_to(folder)): path.stat().st_size if path.is_file() else None for path in folder.rglob("*")
    }


def is_bar(line: str) -> bool:
    """Whether a line of stderr is a progress bar of tqdm."""
    return re.search(r"\[\d\d:\d\d[<,].*\]", line) is not None


class Refused:
    """Runs a command that must be refused and returns its one sentence."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]):
        self.folder, self.capsys = folder, capsys

    def __call__(self, *argv: str | Path, status: int = 1, others: int = 0) -> str:
        """`others`: sentences that may stand before the last one, as `prepare` writes one for every broken scan."""
        before = snapshot(self.folder)
        self.capsys.readouterr()
        try:
            code = cli.main([str(word) for word in argv])
        except SystemExit as stop:
            code = stop.code
        output = self.capsys.readouterr()
        assert code == status, output
        assert output.out == ""
        lines = [line for line in output.err.replace("\r", "\n").splitlines() if line.strip() and not is_bar(line)]
        assert len(lines) == 1 + others, output.err
        sentence = lines[-1]
        assert sentence.startswith(f"threedr1 {argv[0]}: ") or argv[0] not in cli.FUNCTIONS, sentence
        assert sentence.rstrip()[-1] in ".?", sentence
        assert "Traceback" not in output.err
        assert snapshot(self.folder) == before, "something was written"
        return "\n".join(lines)


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Refused:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("THREEDR1_DEBUG", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return Refused(tmp_path, capsys)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data root, prepared; tests that break something copy it."""
    from threedr1.datasets.scannet import prepare_scans
    from threedr1.datasets.scene_store import SceneStore

    root = factory.write_root(tmp_path_factory.mktemp("prepared") / "root")
    assert prepare_scans(root, workers=1) == []
    SceneStore(root / "prepared")  # writes its index
    return root


@pytest.fixture(scope="module")
def run_settings(tiny_qwen: Path) -> Callable[..., list[str]]:
    def settings(root: Path, run_dir: Path | str, *more: str) -> list[str]:
        return [
            "sft",
            "--set",
            f"run.dir={run_dir}",
            "run.steps=1",
            "run.batch_size=2",
            f"data.root={root}",
            "data.num_points=512",
            "data.datasets=scanqa",
            f"model.language.model={tiny_qwen}",
            "model.language.dtype=float32",
            "model.language.train=full",
            "model.language.num_proposals=8",
            "model.language.num_layout_tokens=2",
            *[f"model.encoder.{setting}" for setting in TINY_ENCODER.split()],
            "model.views.source=none",
            *more,
        ]

    return settings


@pytest.fixture(scope="module")
def run(prepared: Path, run_settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained SFT run."""
    folder = tmp_path_factory.mktemp("runs") / "sft"
    assert cli.main(run_settings(prepared, folder, "run.steps=0")) == 0
    return folder


def model_of(run: Path) -> Path:
    return run / "checkpoints" / "step-000000" / "model"


@pytest.fixture
def model(run: Path, tmp_path: Path) -> Path:
    """A copy of the run's model, to break."""
    return Path(shutil.copytree(model_of(run), tmp_path / "model"))


@pytest.fixture
def root(prepared: Path, tmp_path: Path) -> Path:
    """A copy of the data root, to break."""
    return Path(shutil.copytree(prepared, tmp_path / "root"))


def rewrite_json(path: Path, change: Callable[[object], object]) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


# The shell -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "status", "words"),
    [
        (["sft", "--config", "nope.yaml"], 1, "There is no recipe at nope.yaml; the ones we ship are under script/"),
        (["sft", "--set", "optim.learning_rate=1"], 1, "Unknown config key 'optim.learning_rate'; did you mean"),
        (["infer", "--scene", "nope.ply", "--ask", "Where?"], 1, "There is no scan at nope.ply; check the path."),
        (["infer", "--ask", "Where is the chair?"], 2, "required: --scene; see threedr1 infer --help."),
        (["prepare", "--root", "nope"], 1, "There is no folder nope/scans; put the raw scans there, or run"),
        (["trian"], 2, "invalid choice: 'trian' (choose from"),
    ],
)
def test_a_fresh_interpreter_says_one_sentence(argv: list[str], status: int, words: str, tmp_path: Path):
    clean = {name: value for name, value in os.environ.items() if name != "THREEDR1_DEBUG"}
    done = subprocess.run(
        [sys.executable, ROOT / "main.py", *argv], cwd=tmp_path, env=clean, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == status and done.stdout == ""
    assert words in done.stderr and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# Configurations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"optim: {lrr: 0.1}", "Unknown config key 'optim.lrr'; did you mean 'lr'?"),
        (b"lr: 0.1", "Unknown config key 'lr'; did you mean 'optim.lr'?"),
        (b"run:\n\tsteps: 3", "is not valid YAML: found character '\\t' that cannot start any token in line 2"),
        (b"run: [1,", "is not valid YAML"),
        (b"\xff\xfe\x00", "is not a text file in UTF-8"),
        (b"- run", "is not a mapping; write `key: value` lines"),
        (b"base: none.yaml", "There is no recipe at"),
        (b"base: recipe.yaml", "is its own base"),
        (b"base: 5", "`base` takes the path of another recipe"),
        (b"run: {steps: -1}", "Config key run.steps is -1; it must be at least 0."),
        (b"run: {steps: many}", "Config key run.steps takes int, not 'many'."),
        (b"run: {batch_size: 0}", "Config key run.batch_size is 0; it must be at least 1."),
        (b"run: {save_every: 0}", "Config key run.save_every is 0"),
        (b"run: {log_every: 0}", "Config key run.log_every is 0"),
        (b"data: {num_points: 0}", "Config key data.num_points is 0"),
        (b"data: {datasets: []}", "Config key data.datasets is empty; name one or more"),
        (b"optim: {lr: .nan}", "Config key optim.lr takes a number, not nan."),
        (b"model: {language: {dtype: float33}}", "Config key model.language.dtype is 'float33'; choose bfloat16"),
        (b"model: {views: {source: sky}}", "Config key model.views.source is 'sky'; choose posed"),
    ],
)
def test_recipes(content: bytes, words: str, refused: Refused):
    (refused.folder / "recipe.yaml").write_bytes(content)
    assert words in refused("sft", "--config", "recipe.yaml")


def test_a_folder_is_no_recipe(refused: Refused):
    assert "is a folder where a file is expected" in refused("sft", "--config", refused.folder)


# Scans -----------------------------------------------------------------------------------------------------------


def write_npz(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


def single_array(folder: Path) -> Path:
    np.save(folder / "array.npy", np.zeros((5, 3)))
    return (folder / "array.npy").rename(folder / "array.npz")


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def cloud(path: Path, points_N3: np.ndarray) -> Path:
    factory.write_ply(path, points_N3.astype(np.float32))
    return path


def cut_cloud(folder: Path) -> Path:
    whole = cloud(folder / "cut.ply", np.ones((100, 3))).read_bytes()
    return written(folder / "cut.ply", whole[:-600])


def cut_archive(folder: Path) -> Path:
    whole = write_npz(folder / "cut.npz", points=np.ones((100, 3))).read_bytes()
    return written(folder / "cut.npz", whole[: len(whole) // 2])


def bomb(folder: Path) -> Path:
    """A few hundred bytes that say of themselves that they unpack to 24 GiB."""
    path = folder / "bomb.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("xyz.npy", npy_header((2**31, 3)) + bytes(999))
        archive.infolist()[0].file_size = 24 << 30
    return path


def boast(folder: Path) -> Path:
    """An array that says it has more points than any memory holds."""
    path = folder / "boast.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("xyz.npy", npy_header((10**13, 3)) + bytes(999))
    return path


def npy_header(shape: tuple[int, ...]) -> bytes:
    content = io.BytesIO()
    np.lib.format.write_array_header_1_0(content, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return content.getvalue()


def boasting_ply(kind: str) -> Callable[[Path], Path]:
    """A PLY whose header promises ten thousand million points."""
    header = f"ply\nformat {kind} 1.0\nelement vertex 10000000000\n"
    header += "".join(f"property float {axis}\n" for axis in "xyz") + "end_header\n1 2 3\n"
    return lambda folder: written(folder / "a.ply", header.encode())


def renamed_cloud(folder: Path, name: str) -> Path:
    return cloud(folder / "a.ply", np.eye(3)).rename(folder / name)


SCANS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "truncated ply": (cut_cloud, "is not a whole PLY file"),
    "truncated npz": (cut_archive, "is not a whole .npz file"),
    "text as ply": (lambda folder: written(folder / "a.ply", b"hello"), "is not a whole PLY file"),
    "unknown format": (lambda folder: written(folder / "a.xyz", b"1 2 3"), "is of no format that we read"),
    "empty ply": (lambda folder: cloud(folder / "a.ply", np.zeros((0, 3))), "is an empty cloud"),
    "empty npz": (lambda folder: write_npz(folder / "a.npz", points=np.zeros((0, 3))), "is an empty cloud"),
    "nan ply": (lambda folder: cloud(folder / "a.ply", np.full((9, 3), np.nan)), "no point with finite coordinates"),
    "nan npz": (lambda folder: write_npz(folder / "a.npz", xyz=np.full((9, 3), np.nan)), "no point with finite"),
    "one place": (lambda folder: cloud(folder / "a.ply", np.ones((9, 3))), "its points span 0 units"),
    "light years": (lambda folder: cloud(folder / "a.ply", 1e30 * np.eye(3)), "is no room"),
    "no points": (lambda folder: write_npz(folder / "a.npz", mask=np.zeros(3)), "has no array xyz or points"),
    "words": (lambda folder: write_npz(folder / "a.npz", xyz=np.array([["a", "b", "c"]])), "are numbers, not <U1"),
    "objects": (
        lambda folder: write_npz(folder / "a.npz", xyz=np.array([[{}, {}, {}]])),
        "holds Python objects; points and colours are numbers",
    ),
    "flat": (lambda folder: write_npz(folder / "a.npz", xyz=np.zeros((5, 2))), "not [N, 3]"),
    "one array": (single_array, "holds a single array"),
    "broken mesh": (lambda folder: written(folder / "a.glb", b"glTF\x02"), "is not a readable mesh"),
    "zip bomb": (bomb, "would unpack to 24.0 GiB; that is no scan of a room"),
    "boasting npz": (boast, "is not a whole .npz file"),
    "boasting binary ply": (boasting_ply("binary_little_endian"), "is not a whole PLY file"),
    "boasting text ply": (boasting_ply("ascii"), "is not a whole PLY file"),
    "ply called npz": (lambda folder: renamed_cloud(folder, "a.npz"), "it looks like a .ply file, so name it a.ply"),
    "ply called las": (lambda folder: renamed_cloud(folder, "a.las"), "it looks like a .ply file, so name it a.ply"),
    "npz called ply": (
        lambda folder: write_npz(folder / "b.npz", xyz=np.eye(3)).rename(folder / "b.ply"),
        "it looks like a .npz file, so name it b.npz",
    ),
    "record3d": (lambda folder: written(folder / "a.r3d", b"PK"), "export it from the app as PLY"),
    "a folder": (lambda folder: folder, "is neither a raw ScanNet scan nor a folder of posed frames"),
}


@pytest.mark.parametrize("case", SCANS)
def test_infer_on_what_is_no_scan(case: str, refused: Refused, run: Path):
    make, words = SCANS[case]
    path = make(refused.folder)
    assert words in refused("infer", "--scene", path, "--ask", "Where is the chair?", "--model", run, "--out", "out")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--ask", ""], "A question is empty; write it after --ask"),
        (["--ask", "Where?", "--ask", "  "], "A question is empty"),
        ([], "There is no question; give one or more with --ask"),
        (["--questions", "none.txt"], "There is no question file at none.txt"),
        (["--questions", "binary.txt"], "binary.txt is not a text file in UTF-8"),
        (["--questions", "blank.txt"], "There is no question"),
        (["--ask", "Where?", "--task", "qaa"], "Unknown task 'qaa'; choose one of dense_caption"),
        (["--ask", "Where?", "--task", "object_caption"], "asks about a box, not a question"),
        (["--ask", "Where?", "--task", "caption"], "asks about a box, not a question"),
        (["--ask", "Where?", "--task", "describe"], "describes the whole room; leave questions and boxes out"),
        (["--ask", "Where?", "--situation", " "], "--situation, which says where you stand"),
        (["--ask", "Where?", "--task", "situated"], "--situation, which says where you stand"),
        (["--ask", "Where?", "--align", "none", "--height", "2.5"], "go with --align auto"),
        (["--ask", "Where?", "--chat"], "--chat asks for its questions itself"),
        (["--ask", "Where?", "--model", "lab/none"], "the hub gives no model of that name"),
        (["--ask", "Where?", "--model", "none"], "There is no model at none"),
        (["--ask", "Where?", "--model", "blank.txt"], "blank.txt is a file; name the folder of a model"),
        (["--ask", "Where?", "--out", "blank.txt"], "blank.txt is a file; name a folder"),
        (["--ask", "Where?", "--out", "blank.txt/more"], "blank.txt is a file; name a folder"),
        (["--ask", "Where?", "--out", "/proc/none/more"], "Nothing can be written to /proc/none/more"),
        (["--chat", "--out", "/proc/none/more"], "Nothing can be written to /proc/none/more"),
    ],
)
def test_infer_with_wrong_arguments(argv: list[str], words: str, refused: Refused, run: Path, prepared: Path):
    (refused.folder / "binary.txt").write_bytes(b"\xff\xfe?")
    (refused.folder / "blank.txt").write_text("\n\n")
    model = [] if "--model" in argv else ["--model", run]
    assert words in refused("infer", "--scene", prepared / "scans" / SCENE, *model, *argv)


# prepare ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "Name a run folder or predictions.jsonl to look at, a scan with --scene, or one with --views."),
        (["--ask", "Where?"], "go with --views SCENE"),
        (
            ["--views", "gone", "--ask", "Where?"],
            "There is no scan at gone, and no prepared scene data/rooms/prepared",
        ),
        (["--views", "SCENE"], "There is no question for the views"),
        (["--views", "SCENE", "--ask", " "], "A question is empty"),
        (["--views", "SCENE", "--ask", "Where?", "--source", "sky"], "source is 'sky'; choose posed"),
        (["--views", "SCENE", "--ask", "Where?", "--source", "none"], "Source 'none' makes no views"),
        (["--views", "SCENE", "--ask", "Where?", "--encoder", "gone"], "Cannot load the encoder 'gone'"),
        (["--views", "SCENE", "--ask", "Where?", "--model", "RUN"], "This model takes no views"),
        (["--views", "SCENE", "--ask", "Where?", "--model", "gone"], "There is no model at gone"),
        (["--views", "SCENE", "--ask", "Where?", "--save", "a.rrd"], "show predictions or a scan; name one"),
        (["--model", "RUN"], "--model goes with --scene SCAN, for what it detects, or with --views SCENE."),
        (["--scene", "SCENE", "--views", "SCENE"], "--scene and --views show different things"),
        (
            ["--scene", "SCENE", "--html", "a.html"],
            "--html reports on predictions; a scan alone is shown with --room.",
        ),
        (["--scene", "gone", "--top", "a.png"], "There is no scan at gone, and no prepared scene data/rooms/prepared"),
        (["--scene", "SCENE", "--top", "a.txt"], "a.txt is no name of a picture; end it in .png, .jpg, .jpeg."),
        (["--scene", "SCENE", "--export", "a.txt"], "a.txt: boxes are written as .npz or .json"),
        (["--scene", "SCENE", "--room", "a.html", "--model", "gone"], "There is no model at gone"),
        (["gone.npz", "--top", "a.png"], "gone.npz holds boxes alone; name the scan that they are in with --scene."),
        (["gone.npz", "--scene", "SCENE", "--top", "a.png"], "There is no file of boxes at gone.npz"),
        (["SCENE", "--scene", "SCENE", "--top", "a.png"], "neither corners nor centers, sizes and headings"),
        (["gone.npz", "--scene", "SCENE", "--html", "a.html"], "--html reports on predictions; boxes are shown with"),
        (["gone.npz", "--scene", "SCENE", "--model", "RUN"], "--model detects boxes, and gone.npz holds some"),
        (["gone.json", "--scene", "SCENE", "--model", "RUN"], "--model detects boxes, and gone.json holds some"),
        (["--scene", "SCENE", "--align", "none", "--up", "y"], "go with --align auto; --align none takes the scan"),
        (["RUN", "--from-video"], "say how a scan is read; name it with --scene or --views."),
    ],
)
def test_view_of_views_with_wrong_arguments(argv: list[str], words: str, refused: Refused, run: Path, prepared: Path):
    places = {"SCENE": str(prepared / "prepared" / "scene0000_00.npz"), "RUN": str(run)}
    assert words in refused("view", *[places.get(word, word) for word in argv])


def break_mesh(points_N3: np.ndarray) -> Callable[[Path], object]:
    return lambda scan: cloud(scan / f"{SCENE}_vh_clean_2.ply", points_N3)


def cut_mesh(scan: Path) -> None:
    path = scan / f"{SCENE}_vh_clean_2.ply"
    path.write_bytes(path.read_bytes()[:3000])


def unknown_label(scan: Path) -> None:
    path = scan / f"{SCENE}.aggregation.json"
    path.write_text(path.read_text().replace('"table"', '"zeppelin"'))


BROKEN_SCANS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing mesh": (lambda scan: (scan / f"{SCENE}_vh_clean_2.ply").unlink(), "There is no mesh at"),
    "truncated mesh": (cut_mesh, "is not a whole PLY file"),
    "empty mesh": (break_mesh(np.zeros((0, 3))), "is an empty cloud"),
    "nan mesh": (break_mesh(np.full((9, 3), np.nan)), "9 vertices with NaN or infinite coordinates"),
    "truncated json": (lambda scan: next(scan.glob("*.segs.json")).write_text('{"segI'), "is not whole JSON"),
    "other json": (lambda scan: next(scan.glob("*.segs.json")).write_text("[1]"), "is not in ScanNet's form"),
    "words": (lambda scan: next(scan.glob("*.segs.json")).write_text('{"segIndices":["a"]}'), "not in ScanNet's form"),
    "unknown label": (unknown_label, "label 'zeppelin' of object 3 is not in the label table; add a row"),
    "alignment": (lambda scan: (scan / f"{SCENE}.txt").write_text("axisAlignment = 1 2"), "is not 16 numbers"),
    "lost pose": (lambda scan: (scan / "pose" / "0.txt").unlink(), "There is no file"),
}


@pytest.mark.parametrize("case", BROKEN_SCANS)
def test_a_broken_scan_is_named_and_not_prepared(case: str, refused: Refused, root: Path):
    harm, words = BROKEN_SCANS[case]
    prepared = {path.name for path in (root / "prepared").iterdir() if SCENE not in path.name}
    for path in (root / "prepared").glob(f"{SCENE}.*"):
        path.unlink()
    harm(root / "scans" / SCENE)
    said = refused("prepare", "--root", root, "--workers", "1", others=1)
    reason, summary = said.splitlines()
    assert reason.startswith(f"{SCENE}: ") and words in reason
    assert "1 of the scans could not be prepared, for the reasons above (scene0000_00); mend" in summary
    assert {path.name for path in (root / "prepared").iterdir()} == prepared


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda root: (root / "scannetv2-labels.combined.tsv").unlink(), "There is no label table at"),
        (lambda root: (root / "scannetv2-labels.combined.tsv").write_bytes(b"\xff\xfe"), "not a text file in UTF-8"),
        (lambda root: (root / "scannetv2_train.txt").unlink(), "There is no split file"),
        (lambda root: (root / "scannetv2_train.txt").write_text(""), "There are no scans"),
    ],
)
def test_prepare_with_a_broken_root(harm: Callable[[Path], object], words: str, refused: Refused, root: Path):
    harm(root)
    assert words in refused("prepare", "--root", root, "--split", "train", "--workers", "1")


# Annotations -----------------------------------------------------------------------------------------------------

ANNOTATIONS = {
    "scanrefer": "ScanRefer_filtered_train.json",
    "scanqa": "ScanQA_v1.0_train.json",
    "sqa3d": "v1_balanced_questions_train_scannetv2.json",
    "dialogue": "3d_llm_embodied_dialogue_filtered_train.json",
    "scene30k": "Scene-30K.jsonl",
}


@pytest.mark.parametrize("dataset", ANNOTATIONS)
def test_an_annotation_names_an_unknown_scene(dataset: str, refused: Refused, root: Path, run_settings):
    path = root / "annotations" / ANNOTATIONS[dataset]
    path.write_text(path.read_text().replace(SCENE, "scene0777_00"))
    said = refused(*run_settings(root, "run", f"data.datasets={dataset}"))
    assert f"{path.name}, row 1 names scene scene0777_00, which is not prepared" in said


@pytest.mark.parametrize(
    ("dataset", "old", "new"),
    [
        ("scanrefer", '"object_id": "0"', '"object_id": "77"'),
        ("scanqa", '"object_ids": [3]', '"object_ids": [77]'),
        ("scene30k", '"object_ids": [0]', '"object_ids": [77]'),
    ],
)
def test_an_annotation_names_an_unknown_object(
    dataset: str, old: str, new: str, refused: Refused, root: Path, run_settings
):
    path = root / "annotations" / ANNOTATIONS[dataset]
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    said = refused(*run_settings(root, "run", f"data.datasets={dataset}"))
    assert "names object 77, which scene scene0000_00 does not have; check that annotations and scans belong" in said


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda row: row.pop("scene_id"), "row 1: the field 'scene_id' is missing"),
        (lambda row: row.update(scene_id=" "), "row 1: 'scene_id' is empty"),
        (lambda row: row.update(question=""), "row 1: 'question' is empty"),
        (lambda row: row.update(question=5), "row 1: 'question' is int, not str"),
        (lambda row: row.update(answers=[]), "row 1 has no answer"),
    ],
)
def test_a_question_without_scene_or_words(change, words: str, refused: Refused, root: Path, run_settings):
    def apply(rows):
        change(rows[0])
        return rows

    rewrite_json(root / "annotations" / ANNOTATIONS["scanqa"], apply)
    assert words in refused(*run_settings(root, "run"))


@pytest.mark.parametrize(
    ("name", "content", "dataset", "words"),
    [
        (ANNOTATIONS["scanqa"], b'[{"scene', "scanqa", "is not whole JSON"),
        (ANNOTATIONS["scanqa"], b"{}", "scanqa", "does not hold a list of records"),
        (ANNOTATIONS["scanqa"], b"[]", "scanqa", "No samples of scanqa in split train"),
        ("Scene-30K.jsonl", b'{"scene', "scene30k", "row 1: not JSON"),
        ("nr3d.csv", b"\xff\xfe\x00", "nr3d", "is not UTF-8 at byte 0"),
        ("nr3d.csv", b"a,b\n1,2\n", "nr3d", "lacks the column"),
    ],
)
def test_a_broken_annotation_file(
    name: str, content: bytes, dataset: str, words: str, refused: Refused, root: Path, run_settings
):
    (root / "annotations" / name).write_bytes(content)
    assert words in refused(*run_settings(root, "run", f"data.datasets={dataset}"))


def test_sqa3d_files_of_two_releases(refused: Refused, root: Path, run_settings):
    path = root / "annotations" / "v1_balanced_sqa_annotations_train_scannetv2.json"
    path.write_text(path.read_text().replace(SCENE, "scene0777_00"))
    said = refused(*run_settings(root, "run", "data.datasets=sqa3d"))
    assert "is about scene0000_00; use files of one release" in said


# Runs and models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["data.root=nope"], "There are no prepared scenes in nope/prepared; run `python main.py prepare"),
        (["data.datasets=scanreffer"], "Unknown data set 'scanreffer'; did you mean 'scanrefer'?"),
        (["data.datasets=scene30k", "data.train_split=trian"], "There is no split file"),
        (["run.device=gpu"], "The device is 'gpu'; choose auto, cpu or cuda."),
        (["run.device=mps"], "The device is 'mps'; choose auto, cpu or cuda."),
        (["optim.max_grad_norm=-1"], "optim.max_grad_norm is -1.0; it must not be below 0."),
        (["optim.lr=-1e-3"], "optim.lr is -0.001; it must not be below 0."),
        (["data.cached_scenes=-1"], "cached_scenes is -1; it must be at least 0."),
        (["data.datasets=[scanqa,scanqa]"], "datasets names scanqa twice; name it once, and give it more turns by"),
        (["model.encoder.num_queries=0"], "num_queries is 0; it must be at least 1."),
        (["optim.schedule=stairs"], "Unknown optim.schedule 'stairs'; choose cosine or constant."),
        (["pointers=arrow"], "pointers is 'arrow'; choose name or box."),
        (["model.encoder.pretrained=none"], "There is no scene encoder at none"),
        (["model.language.model=/none"], "Cannot load the language model '/none': there is no such folder"),
        (["init=none"], "There is no model at none"),
    ],
)
def test_sft_with_wrong_settings(more: list[str], words: str, refused: Refused, prepared: Path, run_settings):
    assert words in refused(*run_settings(prepared, "run", *more))


def test_a_run_dir_that_is_a_file(refused: Refused, prepared: Path, run_settings):
    (refused.folder / "taken").write_text("x")
    assert "taken needs a folder, but a file is in the way" in refused(*run_settings(prepared, "taken"))


def test_a_run_dir_in_use(refused: Refused, prepared: Path, run: Path, run_settings):
    before = snapshot(run)
    said = refused(*run_settings(prepared, run))
    assert "already holds checkpoints; pass --resume to go on, or set another run.dir." in said
    said = refused(*run_settings(prepared, run, "run.steps=0", "model.encoder.width=32"), "--resume")
    assert "another configuration (model.encoder.width: 16 -> 32)" in said
    assert snapshot(run) == before


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("state.safetensors", b"PK", "state.safetensors is missing or broken; delete that checkpoint"),
        ("state.safetensors", None, "state.safetensors is missing or broken"),
        ("state.json", b"{", "state.json is missing or broken; delete that checkpoint"),
        ("state.json", None, "state.json is missing or broken"),
        ("config.yaml", b"{{", "config.yaml is broken; delete that checkpoint"),
        ("config.yaml", None, "has no config.yaml"),
    ],
)
def test_a_broken_checkpoint_to_resume(
    name: str, content: bytes | None, words: str, refused: Refused, prepared: Path, run: Path, run_settings
):
    copy = Path(shutil.copytree(run, refused.folder / "copy"))
    path = copy / "checkpoints" / "step-000000" / name
    path.unlink() if content is None else path.write_bytes(content)
    assert words in refused(*run_settings(prepared, copy, "run.steps=0"), "--resume")


def change_config(path: Path, **values: object) -> None:
    def apply(config):
        (config.get("text_config") or config).update(values)
        return config

    rewrite_json(path, apply)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def widen(path: Path) -> None:
    """Double the first axis of every matrix: weights of another size."""
    state = load_file(path)
    save_file({name: value.repeat(2, *[1] * (value.dim() - 1)) for name, value in state.items()}, path)


def drop_weight(path: Path) -> None:
    state = load_file(path)
    state.pop(sorted(state)[0])
    save_file(state, path, metadata={"format": "pt"})


MODELS: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty folder": (lambda model: [shutil.rmtree(model), model.mkdir()], "is not a 3D-R1 model: it has no scene_vlm"),
    "broken json": (lambda model: truncate(model / "scene_vlm.json"), "scene_vlm.json is broken"),
    "bare json": (lambda model: (model / "scene_vlm.json").write_text('{"format": 1}'), "scene_vlm.json lacks"),
    "no connector": (lambda model: (model / "connector.safetensors").unlink(), "There are no connector weights"),
    "cut connector": (lambda model: truncate(model / "connector.safetensors"), "is truncated or no safetensors"),
    "other connector": (lambda model: widen(model / "connector.safetensors"), "a checkpoint of another model size"),
    "no encoder": (lambda model: shutil.rmtree(model / "scene_encoder"), "There is no scene encoder"),
    "no encoder's configuration": (
        lambda model: (model / "scene_encoder" / "config.json").unlink(),
        "scene_encoder/config.json; copy the whole folder again",
    ),
    "no tokenizer": (
        lambda model: (model / "language_model" / "tokenizer.json").unlink(),
        "(there is no tokenizer.json); give a whole Qwen2.5-VL checkpoint",
    ),
    "cut encoder": (lambda model: truncate(model / "scene_encoder" / "model.safetensors"), "truncated or no"),
    "other encoder": (
        lambda model: rewrite_json(model / "scene_encoder" / "config.json", lambda config: {**config, "width": 32}),
        "a checkpoint of another model size",
    ),
    "no language model": (lambda model: shutil.rmtree(model / "language_model"), "there is no such folder"),
    "no language weights": (
        lambda model: (model / "language_model" / "model.safetensors").unlink(),
        "Cannot load the language model",
    ),
    "cut language weights": (
        lambda model: truncate(model / "language_model" / "model.safetensors"),
        "Cannot load the language model",
    ),
    "lost language weight": (
        lambda model: drop_weight(model / "language_model" / "model.safetensors"),
        "its weights lack",
    ),
    "other language model": (
        lambda model: change_config(model / "language_model" / "config.json", intermediate_size=48),
        "a checkpoint of another model size",
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_infer_with_a_model_that_is_not_whole(case: str, refused: Refused, model: Path, prepared: Path):
    harm, words = MODELS[case]
    harm(model)
    scene = prepared / "prepared" / f"{SCENE}.npz"
    assert words in refused("infer", "--scene", scene, "--ask", "Where?", "--model", model, "--out", "out")


def test_a_base_model_of_another_size(refused: Refused, model: Path, prepared: Path):
    from threedr1.models.tiny import TinySize, build_tiny

    size = TinySize(vocab_size=300, width=32, layers=1, heads=2, kv_heads=1)
    other = build_tiny(refused.folder / "other", ["two words"], size=size)
    rewrite_json(model / "scene_vlm.json", lambda description: {**description, "language_model": str(other)})
    scene = prepared / "prepared" / f"{SCENE}.npz"
    said = refused("infer", "--scene", scene, "--ask", "Where?", "--model", model)
    assert "was trained on a language model of width 64 with 2 blocks, but" in said and "name the right base" in said


def test_an_encoder_of_another_size(refused: Refused, run: Path, prepared: Path, run_settings):
    encoder = model_of(run) / "scene_encoder"
    more = [f"model.encoder.pretrained={encoder}", "model.encoder.width=32"]
    said = refused(*run_settings(prepared, "run", *more))
    assert "has width 16, but the configuration says 32" in said


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ([], "GRPO starts from an SFT model: set init to the run folder that `sft` wrote."),
        (["init=none"], "There is no model at none"),
        (["init=RUN", "loss.loss_type=ppo"], "Config key loss.loss_type is 'ppo'; choose one of grpo"),
        (["init=RUN", "rollout.max_new_tokens=0"], "rollout.max_new_tokens is 0; it must be at least 1."),
        (["init=RUN", "rollout.temperature=0"], "rollout.temperature is 0.0; it must be above 0."),
        (["init=RUN", "reward.names=[formatt]", "reward.weights=[1.0]"], "Unknown reward 'formatt'; did you mean"),
        (["init=RUN", "reward.weights=[1.0]"], "There are 3 rewards but 1 weights."),
    ],
)
def test_grpo(more: list[str], words: str, refused: Refused, run: Path, prepared: Path):
    settings = [setting.replace("RUN", str(run)) for setting in more]
    encoder = "reward.semantic_encoder=all-MiniLM-L6-v2"
    assert words in refused("grpo", "--set", "run.dir=grpo", f"data.root={prepared}", encoder, *settings)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ([], "Name the model to evaluate"),
        (["model=none"], "There is no model at none"),
        (["model=RUN", "scorers.qa=best"], "Task qa has no scorer 'best'; its scorers are exact"),
        (["model=RUN", "scorers.qaa=exact"], "Unknown task 'qaa'"),
        (["model=RUN", "scorers.scanqa=exact,best", "data.datasets=scanqa"], "Task qa has no scorer 'best'"),
        (["model=RUN", "scorers.grounding=nr3d_nearest", "data.datasets=scanrefer"], "scanrefer names no distractors"),
        (["model=RUN", "scorers.dense_caption=oracle_leo"], "oracle_leo takes captions of given objects"),
        (["model=RUN", "data.eval_splits={sqa: test}"], "Unknown data set 'sqa'; did you mean 'sqa3d'?"),
        (["model=RUN", "data.missing=ignore"], "missing is 'ignore'; choose error or skip."),
        (["model=RUN", "data.datasets=scanqua"], "Unknown data set 'scanqua'; did you mean 'scanqa'?"),
        (["model=RUN", "data.datasets=scene30k", "data.eval_split=vla"], "There is no split file"),
        (["model=RUN", "answers=mine"], "answers is 'mine'; choose model or most-frequent."),
    ],
)
def test_eval(more: list[str], words: str, refused: Refused, run: Path, prepared: Path):
    settings = [setting.replace("RUN", str(run)) for setting in more]
    assert words in refused("eval", "--set", "run.dir=eval", f"data.root={prepared}", *settings)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"PK\x03\x04", "is not a whole prepared scene"),
        (b"", "is not a whole prepared scene"),
    ],
)
def test_a_broken_prepared_scene(content: bytes, words: str, refused: Refused, root: Path, run_settings):
    (root / "prepared" / "index.json").unlink()
    (root / "prepared" / f"{SCENE}.npz").write_bytes(content)
    said = refused(*run_settings(root, "run"))
    assert words in said and "run `python main.py prepare` again" in said


def test_an_unprepared_root(refused: Refused, root: Path, run_settings):
    shutil.rmtree(root / "prepared")
    assert "run `python main.py prepare" in refused(*run_settings(root, "run"))
    assert "run `python main.py prepare" in refused("synthesize", "--root", root, "--out", "chains.jsonl")


# Predictions -----------------------------------------------------------------------------------------------------

ROW = {"sample_id": "a", "task": "qa", "scene_id": SCENE, "question": "Where?", "text": "here", "references": ["here"]}


def row(**changes: object) -> bytes:
    return json.dumps({**ROW, **changes}).encode()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (row()[:40], "predictions.jsonl, line 1: not JSON"),
        (row() + b"\n[1]\n", "predictions.jsonl, line 2: not a JSON object"),
        (b'{"task": "qa"}', "missing sample_id, scene_id, question, text"),
        (row(colour="red"), "unknown colour (put extras under meta)"),
        (row(text=5), "predictions.jsonl, line 1 (a), text: must be a text, not 5"),
        (row(references=[5]), "references: must be a list of texts"),
        (row(meta=5), "meta: must be an object, not 5"),
        (row(meta={"axis_align": [[1, 0, 0, 0]]}), "meta.axis_align: must be four rows of four finite numbers"),
        (row(meta={"axis_align": [[0, 0, 0, float("nan")]] * 4}), "meta.axis_align: must be four rows of four finite"),
        (row(boxes=[[1, 2]]), "boxes: a box must be 6 or 7 finite numbers"),
        (row(boxes=[[float("nan")] * 7]), "boxes: a box must be 6 or 7 finite numbers"),
        (b"\xff\xfe", "is not a text file in UTF-8"),
        (b"", "There is nothing to score: no predictions of task qa"),
    ],
)
def test_broken_predictions(content: bytes, words: str, refused: Refused):
    (refused.folder / "predictions.jsonl").write_bytes(content)
    assert words in refused("score", "--task", "qa", "--predictions", "predictions.jsonl")
    if content:
        refused("view", "predictions.jsonl", "--html", "report.html")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--task", "qaa"], "Unknown task 'qaa'; tasks with scorers are"),
        (["--task", "qa", "--scorer", "best"], "Task qa has no scorer 'best'; its scorers are"),
        (["--task", "planning"], "There is nothing to score: no predictions of task planning."),
        (["--task", "qa", "--references", "none.json"], "There is no file none.json"),
        (["--task", "qa", "--references", "object.json"], "must hold a list of JSON objects"),
        (["--task", "qa", "--references", "a.json", "--data", "b"], "Both --references and --data are given"),
        (["--task", "qa", "--data", "b", "--dataset", "scanqa"], "need all of --data, --dataset and --split"),
        (["--task", "qa", "--split", "val"], "need all of --data, --dataset and --split"),
        (
            ["--task", "qa", "--data", "b", "--dataset", "scanqa", "--split", "val"],
            "There are no prepared scenes in b",
        ),
        (["--task", "qa", "--clip-model", "a"], "--clip-model and --images go with --scorer clip."),
        (["--task", "qa", "--scorer", "clip"], "The scorer clip is for object_caption, not for qa."),
        (["--task", "object_caption", "--scorer", "clip"], "The scorer clip needs --clip-model"),
    ],
)
def test_score_with_wrong_arguments(argv: list[str], words: str, refused: Refused):
    (refused.folder / "predictions.jsonl").write_bytes(row())
    (refused.folder / "object.json").write_text('{"a": 1}')
    assert words in refused("score", "--predictions", "predictions.jsonl", *argv)


def test_missing_predictions(refused: Refused):
    assert "There is no prediction file at none.jsonl" in refused(
        "score", "--task", "qa", "--predictions", "none.jsonl"
    )
    assert "nothing to report on under none" in refused("view", "none", "--html", "report.html")


# Making things ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["rooms", "--out", "rooms", "--train", "0", "--val", "0"], "Ask for at least one room"),
        (["tiny", "--out", "file", "--corpus", "corpus"], "file is a file; name a folder to write the model to."),
        (["rooms", "--out", "file", "--train", "1", "--val", "0", "--workers", "1"], "but a file is in the way"),
        (["tiny", "--out", "tiny", "--corpus", "corpus", "--names", "1001"], "--names 1001 leaves too few of 2000"),
        (["tiny", "--out", "tiny", "--corpus", "none"], "There are no annotation files under none/annotations"),
        (["tiny", "--out", "tiny", "--corpus", "corpus"], "broken.json is not whole JSON"),
        (["synthesize", "--root", "none", "--out", "chains.jsonl"], "There are no prepared scenes in none/prepared"),
        (["names", "--model", "corpus", "--out", "new"], "Cannot load the language model 'corpus'"),
        (["names", "--model", "corpus", "--out", "file"], "file is there already; name a new folder."),
    ],
)
def test_making_things(argv: list[str], words: str, refused: Refused):
    (refused.folder / "file").write_text("x")
    (refused.folder / "corpus" / "annotations").mkdir(parents=True)
    (refused.folder / "corpus" / "annotations" / "broken.json").write_text("[")
    assert words in refused(*argv)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["rooms", "--out", "rooms", "--train", "-1"], "argument --train: '-1' is no whole number of at least 0"),
        (["rooms", "--out", "rooms", "--workers", "0"], "argument --workers: '0' is no whole number of at least 1"),
        (["rooms", "--out", "rooms", "--seed", "x"], "argument --seed: 'x' is no whole number of at least 0"),
        (["rooms"], "required: --out; see threedr1 rooms --help."),
        (["synthesize", "--root", ".", "--out", "a.jsonl", "--workers", "0"], "argument --workers"),
        (["prepare", "--root", ".", "--split", "tarin"], "invalid choice: 'tarin' (choose from"),
        (["bench", "nothing"], "invalid choice: 'nothing'"),
    ],
)
def test_wrong_words_on_the_command_line(argv: list[str], words: str, refused: Refused):
    assert words in refused(*argv, status=2)


def test_the_doctor_reports_everything_at_once(root: Path, capsys: pytest.CaptureFixture[str]):
    (root / "scannetv2-labels.combined.tsv").write_text("nothing")
    (root / "annotations" / ANNOTATIONS["scanqa"]).write_text("[")
    assert cli.main(["doctor", "--root", str(root)]) == 1
    output = capsys.readouterr()
    assert output.err == ""
    errors = [line for line in output.out.splitlines() if line.startswith("[error]")]
    assert any("is not ScanNet's label table" in line for line in errors)
    assert any("scanqa (train)" in line and "is not whole JSON" in line for line in errors)
