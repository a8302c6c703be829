"""PLY files, ascii or binary: vertices, colours and triangles.

Shapes: V vertices, F triangles.
"""

import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import orjson
from plyfile import PlyData, PlyElementParseError, PlyHeaderParseError, PlyParseError

_COLOR_NAMES = (("red", "green", "blue"), ("r", "g", "b"), ("diffuse_red", "diffuse_green", "diffuse_blue"))
_KINDS = {
    name: np.dtype(kind)
    for names, kind in (
        (("char", "int8"), "i1"),
        (("uchar", "uint8"), "u1"),
        (("short", "int16"), "i2"),
        (("ushort", "uint16"), "u2"),
        (("int", "int32"), "i4"),
        (("uint", "uint32"), "u4"),
        (("float", "float32"), "f4"),
        (("double", "float64"), "f8"),
    )
    for name in names
}
_FACE_LISTS = ("vertex_indices", "vertex_index")
_HEADER_BYTES = 65536
_BLOCK_BYTES = 1 << 23  # of a text that is parsed at once: some 50 MB of Python's numbers
_LETTERS = b"0123456789+-.eE \n"
_COMMAS = bytes.maketrans(b" \n", b",,")
_NOTES = rb"(?:(?:comment|obj_info)[^\n]*\n)*"
# vertices of single numbers, then perhaps faces that are a list of corners and nothing else
_PLAIN = re.compile(
    rb"ply\nformat ascii 1\.0\n" + _NOTES + rb"element vertex (?P<vertices>\d{1,10})\n"
    rb"(?P<properties>(?:property (?!list)\w+ \w+\n)+)" + _NOTES + rb"(?:element face (?P<faces>\d{1,10})\n"
    rb"property list \w+ \w+ (?:vertex_indices|vertex_index)\n)?" + _NOTES
)


@dataclass
class PlyMesh:
    """What a PLY file holds. `colors_V3` is None where the file has none; `faces_F3` may be empty.

    Where faces alone have colours, a vertex has the mean of those that meet in it.
    """

    vertices_V3: np.ndarray  # float32, or float64 where the file has doubles; its own units and frame
    colors_V3: np.ndarray | None  # uint8
    faces_F3: np.ndarray  # int32


def read_ply(path: str | Path, *, with_faces: bool = True) -> PlyMesh:
    """Read a PLY file.

    Raises:
        ValueError: missing, truncated or not a PLY file, or without vertices.
    """
    path = Path(path)
    try:
        mesh = read_plain_text(path, with_faces=with_faces)
        if mesh is not None:
            return mesh
        ply = _read(path)
    except FileNotFoundError:
        raise ValueError(f"There is no mesh at {path}; copy the scan's PLY file there.") from None
    except (
        PlyHeaderParseError,
        PlyParseError,
        UnicodeDecodeError,
        ValueError,
        EOFError,
        MemoryError,
        OverflowError,
    ) as error:
        raise ValueError(f"{path} is not a whole PLY file ({error}); copy it again from its source.") from None
    if "vertex" not in ply or not {"x", "y", "z"} <= set(ply["vertex"].data.dtype.names or ()):
        raise ValueError(f"{path} has no vertices with x, y and z; it is not a point cloud or a mesh.")
    vertex = ply["vertex"].data
    vertices_V3 = np.stack([vertex[axis] for axis in "xyz"], axis=1)
    vertices_V3 = vertices_V3.astype(_precision(vertices_V3.dtype))
    if len(vertices_V3) == 0:
        raise ValueError(f"{path} is an empty cloud: it has 0 vertices. Export it again from the scanning software.")
    faces_F3 = _faces(ply, path) if with_faces else np.zeros((0, 3), np.int32)
    if len(faces_F3) and (faces_F3.min() < 0 or faces_F3.max() >= len(vertices_V3)):
        raise ValueError(f"{path} has faces that name vertices it does not have; copy it again from its source.")
    colors_V3 = _colors(vertex)
    if colors_V3 is None and len(faces_F3):
        colors_V3 = _colors_of_faces(ply["face"].data, faces_F3, len(vertices_V3))
    return PlyMesh(vertices_V3, colors_V3, faces_F3)


def read_plain_text(path: Path, *, with_faces: bool = True) -> PlyMesh | None:
    """A text file of nothing but vertices and triangles, several times faster than plyfile reads it.

    None for any other file, most broken ones included: plyfile reads it, or says what is wrong with it.

    Raises:
        ValueError: a colour that its type does not hold, by its row.
    """
    layout = _plain_layout(path)
    if layout is None:
        return None
    kinds, vertices, faces, offset = layout
    names = list(kinds)
    faces = faces if with_faces else 0
    with path.open("rb") as stream:
        stream.seek(offset)
        values = _numbers(stream, vertices * len(names) + faces * 4, whole=with_faces)
    if values is None:
        return None
    values_VP = values[: vertices * len(names)].reshape(vertices, len(names))
    rows_F4 = values[vertices * len(names) :].reshape(faces, 4)
    if (rows_F4[:, 0] != 3).any():
        return None
    faces_F3 = rows_F4[:, 1:].astype(np.int32)
    if len(faces_F3) and (faces_F3.min() < 0 or faces_F3.max() >= vertices):
        return None
    precision = _precision(np.result_type(*(_KINDS[kinds[axis]] for axis in "xyz")))
    vertices_V3 = values_VP[:, [names.index(axis) for axis in "xyz"]].astype(precision)
    triple = next((triple for triple in _COLOR_NAMES if set(triple) <= set(names)), None)
    colors_V3 = None
    if triple is not None:
        values_V3 = values_VP[:, [names.index(name) for name in triple]]
        colors_V3 = to_uint8(_as_kind(values_V3, kinds[triple[0]]))
    return PlyMesh(vertices_V3, colors_V3, faces_F3)


def _precision(kind: np.dtype) -> type[np.floating]:
    """Of coordinates: surveyed ones of millions of metres are doubles, which float32 would round to half metres."""
    return np.float64 if kind == np.float64 else np.float32


def _as_kind(values_V3: np.ndarray, name: str) -> np.ndarray:
    """Numbers in a PLY type; ValueError names the first row with one that an integer type does not hold."""
    kind = _KINDS[name]
    if kind.kind in "iu":
        limits = np.iinfo(kind)
        held_V3 = (values_V3 >= limits.min) & (values_V3 <= limits.max) & (values_V3 == np.floor(values_V3))
        if not held_V3.all():
            row, column = np.argwhere(~held_V3)[0]
            raise ValueError(f"element 'vertex': row {row}: {values_V3[row, column]:g} is no {name}")
    return values_V3.astype(kind)


def _plain_layout(path: Path) -> tuple[dict[str, str], int, int, int] | None:
    """Types of a vertex' properties, numbers of vertices and faces, and where a plain text file's numbers begin."""
    with path.open("rb") as stream:
        header, end, after = stream.read(_HEADER_BYTES).partition(b"end_header")
    newline = next((mark for mark in (b"\n", b"\r\n") if after.startswith(mark)), None)
    if not end or newline is None:
        return None
    match = _PLAIN.fullmatch(header.replace(newline, b"\n"))
    if match is None:
        return None
    lines = [line.split() for line in match["properties"].decode("ascii").splitlines()]
    kinds = {name: kind for _, kind, name in lines}
    vertices, faces = int(match["vertices"]), int(match["faces"] or 0)
    alike = all(len({kinds[name] for name in triple if name in kinds}) < 2 for triple in _COLOR_NAMES)
    known = len(kinds) == len(lines) and alike and all(kind in _KINDS for kind in kinds.values())
    size = path.stat().st_size
    if not {"x", "y", "z"} <= set(kinds) or not known or not 0 < 2 * vertices * len(kinds) + 8 * faces <= size:
        return None
    return kinds, vertices, faces, len(header) + len(end) + len(newline)


def _numbers(stream: BinaryIO, count: int, *, whole: bool) -> np.ndarray | None:
    """The next `count` numbers of a text, float64, in blocks; None where there are fewer, or something else.

    Args:
        whole: nothing but white space may follow them.
    """
    values, filled, rest = np.empty(count), 0, b""
    while filled < count or whole:
        block = stream.read(_BLOCK_BYTES)
        text, rest = rest + block, b""
        if block:  # a number may go on in the next block
            end = max(text.rfind(b"\n"), text.rfind(b" ")) + 1
            text, rest = text[:end], text[end:]
        found = _parsed(text)
        if found is None or (whole and filled + len(found) > count):
            return None
        taken = min(len(found), count - filled)
        values[filled : filled + taken] = found[:taken]
        filled += taken
        if not block:
            break
    return values if filled == count else None


def _parsed(text: bytes) -> list[float] | np.ndarray | None:
    """Numbers between white space; None where something else stands there."""
    text = text.replace(b"\r\n", b"\n").replace(b" \n", b"\n").strip()
    if not text:
        return []
    if b"  " in text:
        text = b" ".join(text.split())
    if not text.translate(None, _LETTERS):  # nothing but numbers, so that nothing else of JSON is taken for one
        try:
            # as JSON: four times faster than NumPy's reading of texts, and the same numbers
            return orjson.loads(b"[" + text.translate(_COMMAS) + b"]")
        except orjson.JSONDecodeError:
            pass  # +1, .5, 007
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)  # how NumPy tells of what is no number
        try:
            return np.fromstring(text.decode("ascii", errors="replace"), dtype=np.float64, sep=" ")
        except (DeprecationWarning, ValueError):
            return None


def _read(path: Path) -> PlyData:
    with path.open("rb") as stream:
        header = stream.read(_HEADER_BYTES).partition(b"end_header")[0]
    name = next((name for name in _FACE_LISTS if f" {name}\n".encode() in header.replace(b"\r", b"")), None)
    if name is None or b"element face" not in header:
        return PlyData.read(str(path))
    try:
        # A stated list length lets plyfile map the faces instead of reading them one by one (30 times faster).
        return PlyData.read(str(path), known_list_len={"face": {name: 3}})
    except PlyElementParseError as error:
        if "unexpected list length" not in str(error):
            raise
        return PlyData.read(str(path))  # faces with more than three corners


def _colors(rows: np.ndarray) -> np.ndarray | None:
    names = set(rows.dtype.names or ())
    for triple in _COLOR_NAMES:
        if names.issuperset(triple):
            return to_uint8(np.stack([rows[name] for name in triple], axis=1))
    return None


def _colors_of_faces(face: np.ndarray, faces_F3: np.ndarray, num_vertices: int) -> np.ndarray | None:
    """Colours [V, 3] uint8 of vertices from those of the triangles that meet in them; black where none does."""
    colors = _colors(face)
    if colors is None:
        return None
    if len(colors) < len(faces_F3):  # polygons were cut into triangles
        corners = face[next(name for name in _FACE_LISTS if name in (face.dtype.names or ()))]
        colors = np.repeat(colors, [len(its) - 2 for its in corners], axis=0)
    sums_V3, counts_V = np.zeros((num_vertices, 3)), np.bincount(faces_F3.ravel(), minlength=num_vertices)
    for corner_F in faces_F3.T:
        np.add.at(sums_V3, corner_F, colors)
    return np.rint(sums_V3 / np.maximum(counts_V, 1)[:, None]).astype(np.uint8)


def to_uint8(colors_N3: np.ndarray) -> np.ndarray:
    """Colours as uint8: integers 0..255 as they are, 16-bit integers by their high byte, floats 0..1 times 255.

    Floats that go beyond 1 are read as 0..255.
    """
    colors_N3 = np.asarray(colors_N3)
    if colors_N3.dtype == np.uint8:
        return np.ascontiguousarray(colors_N3)
    if np.issubdtype(colors_N3.dtype, np.integer):
        top = int(colors_N3.max(initial=0))
        return (colors_N3 >> 8 if top > 255 else colors_N3).clip(0, 255).astype(np.uint8)
    values_N3 = np.nan_to_num(colors_N3.astype(np.float64))
    scale = 255.0 if values_N3.max(initial=0.0) <= 1.0 else 1.0
    return np.rint(values_N3 * scale).clip(0, 255).astype(np.uint8)


def _faces(ply: PlyData, path: Path) -> np.ndarray:
    if "face" not in ply or len(ply["face"].data) == 0:
        return np.zeros((0, 3), np.int32)
    data = ply["face"].data
    name = next((name for name in _FACE_LISTS if name in (data.dtype.names or ())), None)
    if name is None:
        return np.zeros((0, 3), np.int32)
    column = data[name]
    if column.dtype != object:
        return np.ascontiguousarray(column, dtype=np.int32)
    triangles: list[tuple[int, int, int]] = []
    for corners in column:
        if len(corners) < 3:
            raise ValueError(f"{path} has a face of {len(corners)} corners; repair the mesh first.")
        triangles += [(corners[0], corners[i], corners[i + 1]) for i in range(1, len(corners) - 1)]
    return np.asarray(triangles, dtype=np.int32)
