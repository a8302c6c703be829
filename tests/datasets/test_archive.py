"""Mapped .npz files: what NumPy reads is what is mapped, old files are read, broken ones are errors."""

import io
import zipfile
import zlib

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as extra

from threedr1.datasets.archive import ALIGNMENT, read_arrays, write_arrays

ARRAYS = {
    "points": np.arange(30, dtype=np.float32).reshape(10, 3),
    "odd": np.arange(7, dtype=np.uint8),
    "none": np.zeros((0, 7), np.float32),
    "transposed": np.arange(6, dtype=np.float64).reshape(2, 3).T,
    "scalar": np.array(5, np.int32),
}


def is_mapped(array: np.ndarray) -> bool:
    base = array
    while isinstance(base, np.ndarray) and base.base is not None:
        base = base.base
    return not isinstance(base, np.ndarray)


def test_members_are_aligned_and_mapped_and_writing_stays_in_memory(tmp_path):
    path = tmp_path / "a.npz"
    write_arrays(path, ARRAYS)
    mapped, read = read_arrays(path, mapped=True), read_arrays(path)
    with np.load(path) as numpys:
        for name, array in ARRAYS.items():
            for found in (mapped[name], read[name], numpys[name]):
                np.testing.assert_array_equal(found, array)
                assert found.dtype == array.dtype and found.shape == array.shape
    assert mapped["points"].ctypes.data % ALIGNMENT == 0 and mapped["scalar"].ctypes.data % ALIGNMENT == 0
    assert is_mapped(mapped["points"])
    mapped["odd"][0] = 99  # PyTorch wants arrays that can be written to
    assert read_arrays(path, mapped=True)["odd"][0] == read_arrays(path)["odd"][0] == 0
    path.unlink()
    assert mapped["points"][9, 2] == 29, "a file that is replaced stays readable for those who mapped it"


def test_equal_arrays_make_equal_files(tmp_path):
    for name in ("a.npz", "b.npz"):
        write_arrays(tmp_path / name, ARRAYS)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_files_of_numpy_itself_are_read_too(tmp_path, save):
    save(tmp_path / "a.npz", **ARRAYS)
    found = read_arrays(tmp_path / "a.npz", mapped=True)
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found[name], array)


@settings(max_examples=60, deadline=None)
@given(
    array=extra.arrays(st.sampled_from([np.uint8, np.int32, np.float32, np.float64]), extra.array_shapes(min_side=0))
)
def test_any_array_comes_back(tmp_path_factory, array):
    path = tmp_path_factory.mktemp("any") / "a.npz"
    write_arrays(path, {"first": np.zeros(3, np.uint8), "array": array})
    np.testing.assert_array_equal(read_arrays(path, mapped=True)["array"], array)


@example(position=410, value=98, length=0)  # a name of the header becomes bytes
@settings(max_examples=300, deadline=None)
@given(position=st.integers(0, 3000), value=st.integers(0, 255), length=st.integers(0, 3000))
def test_damaged_files_are_errors_or_arrays_and_never_a_crash(tmp_path_factory, position, value, length):
    path = tmp_path_factory.mktemp("damaged") / "a.npz"
    write_arrays(path, ARRAYS)
    content = bytearray(path.read_bytes())
    content[position % len(content)] = value
    path.write_bytes(bytes(content[: max(1, len(content) - length)]) if length % 2 else bytes(content))
    try:
        found = read_arrays(path, mapped=True)
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error):
        return
    assert all(isinstance(array.sum(), np.generic) for array in found.values())


@pytest.mark.parametrize("mapped", [True, False])
def test_a_broken_header_in_a_sound_archive_names_the_member(tmp_path, mapped):
    content = io.BytesIO()
    np.save(content, np.arange(3.0))
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("points.npy", content.getvalue().replace(b" 'fortran", b"b'fortran"))
    with pytest.raises(ValueError, match="points.npy has a broken header"):
        read_arrays(tmp_path / "a.npz", mapped=mapped)


def test_a_member_that_states_more_than_it_holds_is_refused(tmp_path):
    content = io.BytesIO()
    np.save(content, np.zeros(10))
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("points.npy", content.getvalue()[:-8])
    with pytest.raises(ValueError, match="cut short"):
        read_arrays(tmp_path / "a.npz", mapped=True)
