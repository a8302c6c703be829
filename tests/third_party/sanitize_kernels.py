"""Runs every CUDA kernel of the point operations at odd sizes, without PyTorch, and compares it with NumPy.

    compute-sanitizer --tool memcheck python tests/third_party/sanitize_kernels.py
    (also initcheck, racecheck and synccheck)

PyTorch would take minutes to load under a sanitizer, and its allocator would hide accesses beyond an array. Here every
array is an allocation of its own size, in memory that nothing has written yet. Needs a GPU, nvcc or a library built
earlier, and CUDA's runtime library. The exit code is 1 after a mismatch.

Shapes: B scenes, N points, M centres, S or K neighbours, C or F channels, P positions, X = 3 + F.
"""

import ctypes
import ctypes.util
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
POINTNET2 = Path(__file__).resolve().parents[2] / "third_party" / "pointnet2"
FLOAT32, FLOAT16, BFLOAT16 = 0, 1, 2  # PN2_FLOAT32 … of pointnet2.h
TO_DEVICE, TO_HOST = 1, 2  # cudaMemcpyKind
COMPUTE_MAJOR, COMPUTE_MINOR = 75, 76  # cudaDeviceAttr
RADIUS = np.float32(0.4)
SUM_TOLERANCE = 1e-5  # of the sum of absolute terms


class Gpu:
    """The library of the kernels, and the few functions of CUDA's runtime that feed it."""

    def __init__(self) -> None:
        self._runtime = ctypes.CDLL(ctypes.util.find_library("cudart") or "/usr/local/cuda/lib64/libcudart.so")
        self._library = ctypes.CDLL(str(self._find_library()))
        self._library.pn2_error.restype = ctypes.c_char_p
        self._allocated: list[ctypes.c_void_p] = []

    def _attribute(self, number: int) -> int:
        value = ctypes.c_int()
        self._check(self._runtime.cudaDeviceGetAttribute(ctypes.byref(value), number, 0))
        return value.value

    def _find_library(self) -> Path:
        spec = importlib.util.spec_from_file_location("build", POINTNET2 / "build.py")
        assert spec is not None and spec.loader is not None
        build = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(build)
        architecture = f"{self._attribute(COMPUTE_MAJOR)}{self._attribute(COMPUTE_MINOR)}"
        found = build.find_library("cuda", architecture)
        return found or build.build("cuda", build.cache_folder(), (architecture,))

    def _check(self, code: int) -> None:
        if code:
            raise RuntimeError(f"CUDA error {code}")

    def allocate(self, num_bytes: int) -> ctypes.c_void_p:
        pointer = ctypes.c_void_p()
        self._check(self._runtime.cudaMalloc(ctypes.byref(pointer), ctypes.c_size_t(max(1, num_bytes))))
        self._allocated.append(pointer)
        return pointer

    def put(self, values: Array) -> ctypes.c_void_p:
        values = np.ascontiguousarray(values)
        pointer = self.allocate(values.nbytes)
        source = values.ctypes.data_as(ctypes.c_void_p)
        self._check(self._runtime.cudaMemcpy(pointer, source, ctypes.c_size_t(values.nbytes), TO_DEVICE))
        return pointer

    def get(self, pointer: ctypes.c_void_p, shape: tuple[int, ...], dtype: Any) -> Array:
        values = np.empty(shape, dtype)
        target = values.ctypes.data_as(ctypes.c_void_p)
        self._check(self._runtime.cudaMemcpy(target, pointer, ctypes.c_size_t(values.nbytes), TO_HOST))
        return values

    def call(self, name: str, *arguments: Any) -> None:
        """One function of pointnet2.h on the default stream; whole numbers are passed as int64."""
        passed = [ctypes.c_int64(value) if isinstance(value, int) else value for value in arguments]
        code = getattr(self._library, f"pn2_{name}")(*passed, ctypes.c_int64(0))
        if code:
            raise RuntimeError(f"{name}: {self._library.pn2_error(code).decode()}")
        self._check(self._runtime.cudaDeviceSynchronize())

    def workspace(self, name: str, *sizes: int) -> ctypes.c_void_p:
        function = getattr(self._library, f"pn2_{name}_workspace")
        function.restype = ctypes.c_int64
        return self.allocate(function(*map(ctypes.c_int64, sizes)))

    def free(self) -> None:
        for pointer in self._allocated:
            self._check(self._runtime.cudaFree(pointer))
        self._allocated.clear()


def squared_distances(from_P3: Array, to_Q3: Array) -> Array:
    """Table [P, Q], each operation rounded to float32."""
    delta_PQ3 = from_P3[:, None] - to_Q3
    squares_PQ3 = delta_PQ3 * delta_PQ3
    return (squares_PQ3[..., 0] + squares_PQ3[..., 1]) + squares_PQ3[..., 2]


def cloud(rng: np.random.Generator, num_scenes: int, num_points: int, kind: str = "uniform") -> Array:
    points_BN3 = rng.random((num_scenes, num_points, 3), dtype=np.float32) * np.float32([6, 5, 2.7])
    if kind == "equal":
        points_BN3[:] = np.float32([1, 2, 3])
    elif kind == "spread":  # most queries find fewer than three points in the cells around them
        points_BN3 = np.float32(10.0) ** rng.uniform(-2, 4, points_BN3.shape).astype(np.float32)
    return points_BN3


def rounded(values: Array, dtype: int) -> Array:
    """The bytes of float32 values in an element type."""
    if dtype == FLOAT32:
        return values
    if dtype == FLOAT16:
        return values.astype(np.float16)
    bits = values.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def exact(values: Array) -> Array:
    """Float64 values of such bytes."""
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return values.astype(np.float64)


def close(found: Array, wanted: Array, terms: Array) -> bool:
    epsilon = {"float16": 2.0**-11, "uint16": 2.0**-8}.get(found.dtype.name, 0.0)
    bound = SUM_TOLERANCE * terms + epsilon * np.abs(wanted) + 1e-7
    return bool((np.abs(exact(found) - wanted) <= bound).all())


def added(terms_BPC: Array, idx_BP: Array, count: int) -> Array:
    """Sums [B, count, C] of the terms of each index."""
    sums_BNC = np.zeros((len(idx_BP), count, terms_BPC.shape[2]))
    for sums_NC, idx_P, terms_PC in zip(sums_BNC, idx_BP, terms_BPC, strict=True):
        np.add.at(sums_NC, idx_P, terms_PC)
    return sums_BNC


class Cases:
    """What each function of the library gives, beside NumPy's result."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.rng = gpu, np.random.default_rng(0)

    def furthest(self, B: int, N: int, M: int, kind: str = "uniform") -> bool:
        points_BN3 = cloud(self.rng, B, N, kind)
        idx = self.gpu.allocate(4 * B * M)
        workspace = self.gpu.workspace("furthest_point_sample", B, N, M)
        self.gpu.call("furthest_point_sample", self.gpu.put(points_BN3), B, N, M, idx, workspace)
        wanted_BM = np.zeros((B, M), np.int32)
        nearest_BN = np.full((B, N), np.inf, np.float32)
        for step in range(1, M):
            for scene, last in enumerate(wanted_BM[:, step - 1]):
                table_1N = squared_distances(points_BN3[scene, last : last + 1], points_BN3[scene])
                nearest_BN[scene] = np.minimum(nearest_BN[scene], table_1N[0])
            wanted_BM[:, step] = nearest_BN.argmax(1)
        return np.array_equal(self.gpu.get(idx, (B, M), np.int32), wanted_BM)

    def ball(self, B: int, N: int, M: int, S: int, kind: str = "uniform") -> bool:
        points_BN3, centers_BM3 = cloud(self.rng, B, N, kind), cloud(self.rng, B, M, kind)
        idx = self.gpu.allocate(4 * B * M * S)
        inputs = (self.gpu.put(points_BN3), self.gpu.put(centers_BM3), B, N, M, S, ctypes.c_float(float(RADIUS)))
        self.gpu.call("ball_query", *inputs, idx, self.gpu.workspace("ball_query", B, N, M, S))
        wanted_BMS = np.zeros((B, M, S), np.int32)
        for wanted_MS, points_N3, centers_M3 in zip(wanted_BMS, points_BN3, centers_BM3, strict=True):
            for row_S, near_N in zip(
                wanted_MS, squared_distances(centers_M3, points_N3) < RADIUS * RADIUS, strict=True
            ):
                hits = np.flatnonzero(near_N)[:S]
                if len(hits):
                    row_S[:] = hits[0]
                    row_S[: len(hits)] = hits
        return np.array_equal(self.gpu.get(idx, (B, M, S), np.int32), wanted_BMS)

    def nearest(self, B: int, N: int, M: int, kind: str = "uniform") -> bool:
        query_BN3, points_BM3 = cloud(self.rng, B, N, kind), cloud(self.rng, B, M, kind)
        distance, idx = self.gpu.allocate(12 * B * N), self.gpu.allocate(12 * B * N)
        workspace = self.gpu.workspace("three_nn", B, N, M)
        self.gpu.call("three_nn", self.gpu.put(query_BN3), self.gpu.put(points_BM3), B, N, M, distance, idx, workspace)
        wanted_BN3 = np.zeros((B, N, 3), np.int32)
        squared_BN3 = np.full((B, N, 3), np.inf, np.float32)
        for scene in range(B):
            table_NM = squared_distances(query_BN3[scene], points_BM3[scene])
            order_N3 = np.argsort(table_NM, axis=1, kind="stable")[:, :3]
            wanted_BN3[scene, :, : min(M, 3)] = order_N3
            squared_BN3[scene, :, : min(M, 3)] = np.take_along_axis(table_NM, order_N3, 1)
        found = self.gpu.get(distance, (B, N, 3), np.float32)
        same = np.array_equal(self.gpu.get(idx, (B, N, 3), np.int32), wanted_BN3)
        return same and np.array_equal(found, np.sqrt(squared_BN3))

    def group(self, B: int, C: int, N: int, P: int, size: int) -> bool:
        features_BCN = self.rng.integers(0, 255, (B, C, N, size), dtype=np.uint8)
        idx_BP = self.rng.integers(0, N, (B, P), dtype=np.int32)
        out = self.gpu.allocate(B * C * P * size)
        inputs = (self.gpu.put(features_BCN), self.gpu.put(idx_BP), B, C, N, P)
        self.gpu.call("group", *inputs, ctypes.c_int(size), out)
        wanted = np.stack([rows[:, idx_P] for rows, idx_P in zip(features_BCN, idx_BP, strict=True)])
        return np.array_equal(self.gpu.get(out, (B, C, P, size), np.uint8), wanted)

    def group_backward(self, B: int, C: int, N: int, P: int, dtype: int) -> bool:
        grad_BCP = rounded(self.rng.normal(size=(B, C, P)).astype(np.float32), dtype)
        idx_BP = self.rng.integers(0, N, (B, P), dtype=np.int32)
        idx_BP[:, P // 2 :] = idx_BP[:, :1]  # as the padding of a ball
        sums = self.gpu.put(np.zeros((B, C, N), np.float32))
        inputs = (self.gpu.put(grad_BCP), self.gpu.put(idx_BP), B, C, N, P)
        self.gpu.call("group_backward", *inputs, ctypes.c_int(dtype), sums)
        terms_BPC = exact(grad_BCP).transpose(0, 2, 1)
        wanted, terms = (added(part, idx_BP, N).transpose(0, 2, 1) for part in (terms_BPC, np.abs(terms_BPC)))
        return close(self.gpu.get(sums, (B, C, N), np.float32), wanted, terms)

    def interpolate(self, B: int, C: int, M: int, N: int, dtype: int) -> bool:
        features_BCM = rounded(self.rng.normal(size=(B, C, M)).astype(np.float32), dtype)
        grad_BCN = rounded(self.rng.normal(size=(B, C, N)).astype(np.float32), dtype)
        idx_BN3 = self.rng.integers(0, M, (B, N, 3), dtype=np.int32)
        weight_BN3 = self.rng.random((B, N, 3), dtype=np.float32)
        out = self.gpu.allocate(grad_BCN.nbytes)
        features, idx, weight = (self.gpu.put(values) for values in (features_BCM, idx_BN3, weight_BN3))
        self.gpu.call("interpolate", features, idx, weight, B, C, M, N, ctypes.c_int(dtype), out)
        taken_BCN3 = np.stack([exact(rows)[:, idx_N3] for rows, idx_N3 in zip(features_BCM, idx_BN3, strict=True)])
        terms_BCN3 = taken_BCN3 * weight_BN3[:, None]
        found = self.gpu.get(out, grad_BCN.shape, grad_BCN.dtype)
        right = close(found, terms_BCN3.sum(-1), np.abs(terms_BCN3).sum(-1))

        sums, grad_weight = (self.gpu.put(np.zeros(shape, np.float32)) for shape in ((B, C, M), (B, N, 3)))
        inputs = (self.gpu.put(grad_BCN), features, idx, weight, B, C, M, N, ctypes.c_int(dtype))
        self.gpu.call("interpolate_backward", *inputs, sums, grad_weight)
        spread_BCN3 = exact(grad_BCN)[..., None] * weight_BN3[:, None]
        spread_BPC = spread_BCN3.reshape(B, C, -1).transpose(0, 2, 1)
        flat_BP = idx_BN3.reshape(B, -1)
        wanted, terms = (added(part, flat_BP, M).transpose(0, 2, 1) for part in (spread_BPC, np.abs(spread_BPC)))
        right &= close(self.gpu.get(sums, (B, C, M), np.float32), wanted, terms)
        products_BCN3 = exact(grad_BCN)[..., None] * taken_BCN3
        found = self.gpu.get(grad_weight, (B, N, 3), np.float32)
        return right and close(found, products_BCN3.sum(1), np.abs(products_BCN3).sum(1))

    def offsets(self, B: int, N: int, M: int, K: int, F: int, dtype: int) -> bool:
        points_BN3, centers_BM3 = cloud(self.rng, B, N), cloud(self.rng, B, M)
        features_BNF = rounded(self.rng.normal(size=(B, N, F)).astype(np.float32), dtype)
        grad_BMKX = rounded(self.rng.normal(size=(B, M, K, 3 + F)).astype(np.float32), dtype)
        idx_BMK = self.rng.integers(0, N, (B, M, K), dtype=np.int32)
        out = self.gpu.allocate(grad_BMKX.nbytes)
        sizes = (B, N, M, K, F, ctypes.c_float(float(RADIUS)), ctypes.c_int(dtype))
        idx, features = self.gpu.put(idx_BMK), self.gpu.put(features_BNF) if F else None
        self.gpu.call("group_offsets", self.gpu.put(points_BN3), self.gpu.put(centers_BM3), features, idx, *sizes, out)
        scenes = range(B)
        near_BMK3 = np.stack([points_BN3[b].astype(np.float64)[idx_BMK[b]] for b in scenes])
        offset_BMK3 = (near_BMK3 - centers_BM3[:, :, None]) / float(RADIUS)
        wanted = np.concatenate([offset_BMK3, np.stack([exact(features_BNF[b])[idx_BMK[b]] for b in scenes])], -1)
        right = close(self.gpu.get(out, grad_BMKX.shape, grad_BMKX.dtype), wanted, np.abs(wanted))

        shapes = ((B, N, 3), (B, M, 3), (B, N, F))
        sums = [self.gpu.put(np.zeros(shape, np.float32)) for shape in shapes]
        outputs = [*sums[:2], sums[2] if F else None]
        self.gpu.call("group_offsets_backward", self.gpu.put(grad_BMKX), idx, *sizes, *outputs)
        exact_BMKX = exact(grad_BMKX)
        exact_BMKX[..., :3] /= float(RADIUS)
        terms_BPX, flat_BP = exact_BMKX.reshape(B, M * K, -1), idx_BMK.reshape(B, -1)
        wanted, terms = added(terms_BPX, flat_BP, N), added(np.abs(terms_BPX), flat_BP, N)
        of_points, of_centers, of_features = (
            self.gpu.get(part, shape, np.float32) for part, shape in zip(sums, shapes, strict=True)
        )
        right &= close(of_points, wanted[..., :3], terms[..., :3])
        right &= close(of_features, wanted[..., 3:], terms[..., 3:])
        offsets_BMK3 = exact_BMKX[..., :3]
        return right and close(of_centers, -offsets_BMK3.sum(2), np.abs(offsets_BMK3).sum(2))

    def all(self) -> Iterator[tuple[str, Callable[..., bool], tuple[Any, ...]]]:
        """Every kernel, and every way through it that its host code chooses."""
        for case in (
            *((1, 1, 3), (2, 129, 33), (3, 1025, 31), (1, 4097, 5, "equal")),  # a block a scene
            *((1, 12_001, 9), (40, 16_385, 4), (1, 200_001, 3)),  # clusters
            *((1, 300_001, 4), (5, 700_001, 3), (1, 1_800_001, 3)),  # a grid, several scenes in turn, global memory
        ):
            yield "furthest", self.furthest, case
        for case in ((1, 1, 1, 1), (2, 1001, 33, 7), (2, 4097, 31, 65), (1, 4097, 3, 5, "equal")):
            yield "ball", self.ball, case
        for case in (
            *((1, 1, 1), (2, 33, 2), (2, 257, 130), (1, 600_001, 5)),  # by all points
            *((2, 1025, 1001), (1, 257, 2049, "equal"), (1, 257, 2049, "spread")),  # by cells
        ):
            yield "nearest", self.nearest, case
        for size in (1, 2, 4, 8):
            for case in ((2, 3, 33, 31), (1, 5, 127, 64), (16, 16, 33, 4096)):
                yield "group", self.group, (*case, size)
        for dtype in (FLOAT32, FLOAT16, BFLOAT16):
            for case in ((2, 3, 33, 31), (1, 5, 127, 1030)):
                yield "group_backward", self.group_backward, (*case, dtype)
            for case in ((2, 5, 1000, 33), (2, 21, 33, 1000), (1, 3, 70_001, 70_001)):
                yield "interpolate", self.interpolate, (*case, dtype)
            for case in ((2, 127, 31, 7, 5), (1, 3, 1, 1, 0), (2, 33, 129, 3, 16)):
                yield "offsets", self.offsets, (*case, dtype)


def main() -> int:
    gpu, wrong = Gpu(), 0
    for name, check, arguments in Cases(gpu).all():
        right = check(*arguments)
        gpu.free()
        wrong += not right
        sys.stdout.write(f"{'ok' if right else 'WRONG':5} {name} {arguments}\n")
        sys.stdout.flush()
    sys.stdout.write(f"{wrong} cases are wrong\n" if wrong else "all cases are right\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
