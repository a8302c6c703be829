"""What `python main.py doctor` says about the compiled parts."""

import importlib.machinery
import importlib.util
import json

import pytest
import torch

from threedr1 import main as cli
from threedr1.engine import environment
from threedr1.third_party import pointnet2
from threedr1.third_party.pointnet2 import backends, build


@pytest.fixture
def forget_backends():
    """Backends are looked for once a process; here again, and once more afterwards."""
    backends._load.cache_clear()
    yield
    backends._load.cache_clear()


def test_doctor_says_which_backend_is_active(monkeypatch, capsys):
    monkeypatch.setenv("THREEDR1_OPS", "torch")
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"{'point operations':22} cpu tensors: torch, set by THREEDR1_OPS" in lines


def test_doctor_says_why_there_is_no_faster_backend(monkeypatch, tmp_path, forget_backends):
    monkeypatch.delenv("THREEDR1_OPS", raising=False)
    monkeypatch.setenv("THREEDR1_JIT", "0")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "PREBUILT", tmp_path)
    (line,) = environment.describe_ops()
    assert line.startswith("cpu tensors: torch (no faster one: it is not built") and "THREEDR1_JIT=0" in line


def test_doctor_tells_of_the_gpu_too(monkeypatch, forget_backends):
    monkeypatch.delenv("THREEDR1_OPS", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu: (7, 5))
    on_cpu, on_gpu = environment.describe_ops()
    assert on_cpu.startswith("cpu tensors: ")
    assert on_gpu.startswith("cuda tensors: torch (no faster one: the kernels need a GPU of compute capability 8.0")


def test_gpus_of_one_machine_may_differ(monkeypatch, tmp_path, forget_backends):
    monkeypatch.delenv("THREEDR1_OPS", raising=False)
    monkeypatch.setenv("THREEDR1_JIT", "0")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "PREBUILT", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu: ((7, 5), (8, 6))[gpu])
    monkeypatch.setenv("THREEDR1_OPS", "cuda")
    with pytest.raises(ValueError, match="compute capability 8.0 or newer, not 7.5"):
        pointnet2.backend_name("cuda:0")
    with pytest.raises(ValueError, match="it is not built"):
        pointnet2.backend_name("cuda:1")


def test_a_second_line_stands_under_the_first(monkeypatch):
    monkeypatch.setattr(pointnet2, "describe_backends", lambda: ["cpu tensors: cpu", "cuda tensors: cuda"])
    rows = environment.describe_environment()
    first = rows.index(("point operations", "cpu tensors: cpu"))
    assert rows[first + 1] == ("", "cuda tensors: cuda")


@pytest.mark.gpu
def test_doctor_names_the_library_of_the_gpu(monkeypatch):
    if "cuda" not in pointnet2.available_backends():
        pytest.skip("this machine has no backend cuda")
    monkeypatch.delenv("THREEDR1_OPS", raising=False)
    assert environment.describe_ops()[1].startswith("cuda tensors: cuda (/")


def test_doctor_knows_the_compiled_loop_of_boxes(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package: None)
    assert environment.describe_boxes().startswith("plain torch (no faster one")
    spec = importlib.machinery.ModuleSpec("box_intersection", None, origin="/lib/box_intersection.so")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package: spec)
    assert environment.describe_boxes() == "compiled loop (/lib/box_intersection.so)"


def test_what_is_missing_here_is_found_with_its_fix(monkeypatch):
    monkeypatch.setattr(environment.shutil, "which", lambda name: None)
    monkeypatch.setattr(environment, "free_bytes", lambda path: 10**9)
    monkeypatch.setattr(environment, "REQUIRED", ("torch", "no-such-package"))
    findings = {finding.code: finding for finding in environment.check_environment()}
    assert set(findings) == {"package_missing", "java_missing", "disk_low"}
    assert findings["package_missing"].level == "error" and "no-such-package" in findings["package_missing"].message
    assert findings["java_missing"].level == findings["disk_low"].level == "warning"
    assert (findings["disk_low"].count, findings["disk_low"].expected) == (10**9, 5 * 10**9)


def test_doctor_without_a_root_says_how_to_get_started(capsys):
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "disk  " in text and text.index("bash script/quickstart.sh") < text.index("https://github.com/ScanNet")
    assert "main.py prepare" not in text


def test_doctor_prints_one_json_object(tmp_path, capsys):
    assert cli.main(["doctor", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert (content["schema"], content["status"], content["data"]) == (1, 0, None)
    assert {"python", "java", "disk"} <= {row["name"] for row in content["installation"]}
    assert cli.main(["doctor", "--json", "--root", str(tmp_path)]) == 1
    content = json.loads(capsys.readouterr().out)
    assert content["status"] == 1 and content["data"]["kind"] == "empty"
    assert [finding["code"] for finding in content["data"]["findings"]] == ["root_empty"]
