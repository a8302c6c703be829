"""When Triton kernels are taken."""

import pytest

from threedr1.utils import kernels


@pytest.mark.parametrize(
    ("choice", "on_gpu", "installed", "taken"),
    [
        ("", True, True, True),
        ("", True, False, False),
        ("", False, True, False),
        ("torch", True, True, False),
        ("torch", True, False, False),
        ("triton", True, True, True),
        ("triton", False, True, True),
    ],
)
def test_a_gpu_takes_them_where_nothing_else_is_said(monkeypatch, choice, on_gpu, installed, taken):
    monkeypatch.setenv("THREEDR1_SOME", choice)
    monkeypatch.setattr(kernels, "has_triton", lambda: installed)
    assert kernels.takes_triton("THREEDR1_SOME", on_gpu) is taken


def test_what_cannot_be_had_is_refused(monkeypatch):
    monkeypatch.setattr(kernels, "has_triton", lambda: False)
    monkeypatch.setenv("THREEDR1_SOME", "triton")
    with pytest.raises(ValueError, match="THREEDR1_SOME=triton, but Triton is not installed"):
        kernels.takes_triton("THREEDR1_SOME", True)
    monkeypatch.setenv("THREEDR1_SOME", "cuda")
    with pytest.raises(ValueError, match="THREEDR1_SOME=cuda is not known"):
        kernels.takes_triton("THREEDR1_SOME", True)


def test_a_missing_triton_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda _: None)
    kernels.has_triton.cache_clear()
    try:
        assert not kernels.has_triton() and not kernels.has_triton()
        assert [record.message for record in caplog.records if "Triton is not installed" in record.message] == [
            "Triton is not installed: plain PyTorch takes the place of kernels, which is slower on a GPU."
        ]
    finally:
        kernels.has_triton.cache_clear()
