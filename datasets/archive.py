"""Uncompressed .npz files whose arrays can be mapped into memory instead of being read.

An .npz file is a zip of .npy files. `write_arrays` stores each member as it is and pads the zip headers so that every
array begins at a multiple of 64 bytes; NumPy reads the result like any other. Processes that map one file share its
pages, and nothing is read before it is used.
"""

import io
import math
import mmap
import struct
import tokenize
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ..utils.files import write_whole

ALIGNMENT = 64  # bytes; .npy headers are padded to the same
_LOCAL_HEADER = 30  # bytes of a zip member's header before its name
_PADDING_ID = 0xD935  # the extra field that Android's zipalign writes


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write an .npz file atomically, the same bytes for the same arrays."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            member = zipfile.ZipInfo(f"{name}.npy")  # dated 1980: a date would make files of equal content differ
            member.extra = _padding(buffer.tell() + _LOCAL_HEADER + len(member.filename))
            content = io.BytesIO()
            np.lib.format.write_array(content, np.asarray(array), allow_pickle=False)
            archive.writestr(member, content.getbuffer())
    write_whole(path, buffer.getbuffer())


def _padding(position: int) -> bytes:
    """A zip extra field after which the position is a multiple of ALIGNMENT."""
    size = -position % ALIGNMENT
    if 0 < size < 4:  # an extra field has four bytes of its own
        size += ALIGNMENT
    return struct.pack("<HH", _PADDING_ID, size - 4) + bytes(size - 4) if size else b""


def read_arrays(path: Path, *, mapped: bool = False) -> dict[str, np.ndarray]:
    """All arrays of an .npz file.

    Args:
        mapped: map them, copy-on-write: what is written to them stays in this process and off the file. Every mapped
            file takes a file descriptor until its arrays are gone. Checksums are not verified. Arrays that cannot be
            mapped, being compressed or not aligned, are read.

    Raises:
        ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error: not a whole .npz file.
    """
    try:
        with path.open("rb") as stream, zipfile.ZipFile(stream) as archive:
            memory = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY) if mapped else None
            members = {member.filename.removesuffix(".npy"): member for member in archive.filelist}
            return {name: _array(archive, member, memory) for name, member in members.items()}
    except RuntimeError as error:  # zipfile's word for encryption and versions that it does not know
        raise ValueError(str(error)) from None


def _array(archive: zipfile.ZipFile, member: zipfile.ZipInfo, memory: mmap.mmap | None) -> np.ndarray:
    try:
        array = _mapped(member, memory) if memory is not None else None
        if array is not None:
            return array
        return np.lib.format.read_array(io.BytesIO(archive.read(member)), allow_pickle=False)
    except (tokenize.TokenError, SyntaxError, TypeError) as error:  # NumPy parses the header as Python
        raise ValueError(f"{member.filename} has a broken header: {error}") from None


def _mapped(member: zipfile.ZipInfo, memory: mmap.mmap) -> np.ndarray | None:
    """One member's array in the mapped file; None where it is compressed, empty or not aligned."""
    if member.compress_type != zipfile.ZIP_STORED:
        return None
    if not 0 <= member.header_offset <= len(memory) - _LOCAL_HEADER:
        raise ValueError(f"{member.filename} is said to lie outside the file")
    name_size, extra_size = struct.unpack_from("<HH", memory, member.header_offset + 26)
    start = member.header_offset + _LOCAL_HEADER + name_size + extra_size
    memory.seek(start)
    if np.lib.format.read_magic(memory) != (1, 0):
        return None
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(memory)
    size, offset = math.prod(shape), memory.tell()
    if (
        dtype.kind not in "biuf"
        or min(shape, default=0) < 0
        or offset + size * dtype.itemsize > start + member.file_size
    ):
        raise ValueError(f"{member.filename} is cut short or holds no numbers")
    if size == 0 or offset % dtype.alignment:
        return None
    return np.frombuffer(memory, dtype, size, offset).reshape(shape, order="F" if fortran else "C")
