// Three nearest neighbours.
//
// Few known points are looked through by every query's thread. More are first sorted into cells, and a warp looks through the
// 27 cells around its query. What lies outside them is further away than their border; where the third neighbour is not
// nearer than that, the warp looks through all points.
#include <climits>

#include "cells.cuh"

namespace pn2 {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int64_t kFewPoints = 768;  // up to here, cells would cost more than they save
constexpr int kTile = 1024;    // known points in shared memory at a time
constexpr int kQueries = 4;    // queries of a thread: one read of a known point serves them all

struct Nearest {
    float distance[3];
    int index[3];
};

__device__ __forceinline__ void insert(Nearest& nearest, float distance, int index) {
    // strict: known points come in ascending index, and the lower one stays in front on ties
    if (distance < nearest.distance[0]) {
        nearest.distance[2] = nearest.distance[1], nearest.index[2] = nearest.index[1];
        nearest.distance[1] = nearest.distance[0], nearest.index[1] = nearest.index[0];
        nearest.distance[0] = distance, nearest.index[0] = index;
    } else if (distance < nearest.distance[1]) {
        nearest.distance[2] = nearest.distance[1], nearest.index[2] = nearest.index[1];
        nearest.distance[1] = distance, nearest.index[1] = index;
    } else {
        nearest.distance[2] = distance, nearest.index[2] = index;
    }
}

template <int Q>
__global__ void __launch_bounds__(kThreads)
    three_nn(const float* query, const float* points, int64_t N, int64_t M, float* distance, int32_t* idx) {
    __shared__ float4 tile[kTile];
    const int64_t scene = blockIdx.y;
    query += scene * N * 3, points += scene * M * 3, distance += scene * N * 3, idx += scene * N * 3;
    const int64_t first = (int64_t)blockIdx.x * kThreads * Q + threadIdx.x;
    float x[Q], y[Q], z[Q];
    Nearest nearest[Q];
#pragma unroll
    for (int q = 0; q < Q; ++q) {
        const int64_t i = min(first + (int64_t)q * kThreads, N - 1);
        x[q] = query[3 * i], y[q] = query[3 * i + 1], z[q] = query[3 * i + 2];
        for (int rank = 0; rank < 3; ++rank) nearest[q].distance[rank] = INFINITY, nearest[q].index[rank] = 0;
    }
    for (int64_t start = 0; start < M; start += kTile) {
        const int count = min((int64_t)kTile, M - start);
        __syncthreads();
        for (int i = threadIdx.x; i < count; i += kThreads) {
            const float* point = points + 3 * (start + i);
            tile[i] = make_float4(point[0], point[1], point[2], 0.f);
        }
        __syncthreads();
#pragma unroll 4
        for (int i = 0; i < count; ++i) {
            const float4 point = tile[i];
#pragma unroll
            for (int q = 0; q < Q; ++q) {
                const float d = squared_distance(x[q], y[q], z[q], point.x, point.y, point.z);
                if (d < nearest[q].distance[2]) insert(nearest[q], d, (int)start + i);
            }
        }
    }
#pragma unroll
    for (int q = 0; q < Q; ++q) {
        const int64_t i = first + (int64_t)q * kThreads;
        if (i >= N) continue;
        for (int rank = 0; rank < 3; ++rank) {
            distance[3 * i + rank] = __fsqrt_rn(nearest[q].distance[rank]);
            idx[3 * i + rank] = nearest[q].index[rank];
        }
    }
}

// A neighbour as one number, smaller for the nearer one, and for the lower index on ties. Distances are not negative, so
// that their bits compare as integers.
__device__ __forceinline__ uint64_t key_of(float distance, int index) {
    return (uint64_t)__float_as_uint(distance) << 32 | (unsigned)index;
}

// The three smallest keys of a lane, ascending. Distances that are infinite or no number do not count.
struct Three {
    uint64_t keys[3] = {key_of(INFINITY, 0), key_of(INFINITY, 0), key_of(INFINITY, 0)};

    __device__ __forceinline__ void insert(uint64_t key) {
        if (key >= keys[2]) return;
        keys[2] = key;
        if (keys[2] < keys[1]) keys[2] = keys[1], keys[1] = key;
        if (keys[1] < keys[0]) keys[1] = keys[0], keys[0] = key;
    }

    // The three smallest of a warp, for all its lanes.
    __device__ __forceinline__ void merge() {
        uint64_t merged[3];
#pragma unroll
        for (int rank = 0; rank < 3; ++rank) {
            const unsigned high = keys[0] >> 32, distance = __reduce_min_sync(kAllLanes, high);
            const unsigned index = __reduce_min_sync(kAllLanes, high == distance ? (unsigned)keys[0] : UINT_MAX);
            merged[rank] = (uint64_t)distance << 32 | index;
            if (keys[0] == merged[rank]) keys[0] = keys[1], keys[1] = keys[2], keys[2] = key_of(INFINITY, 0);
        }
#pragma unroll
        for (int rank = 0; rank < 3; ++rank) keys[rank] = merged[rank];
    }

    __device__ __forceinline__ float distance(int rank) const { return __uint_as_float(keys[rank] >> 32); }
};

// Squared distance, in units of the points, below which everything lies in the 27 cells around the query's; 0 if nothing is
// known. Far from the origin, and where squares underflow, numbers of cells and float distances say too little.
__device__ __forceinline__ double safe_distance(float x, float y, float z, Cell cell, double scale) {
    const double place[3] = {x * scale - cell.x, y * scale - cell.y, z * scale - cell.z};
    double inside = 1;
    for (double along : place) inside = fmin(inside, fmin(along, 1 - along));
    const double border = (1 + inside) / scale, squared = border * border * (1 - 1e-5);
    return border > 0 && squared > 1e-30 ? squared : 0;
}

__global__ void __launch_bounds__(kThreads)
    three_nn_by_cells(const float* query, const float* points, int64_t N, int64_t M, CellTable table, float* distance,
                      int32_t* idx) {
    const int lane = threadIdx.x & 31;
    const int64_t scene = blockIdx.y, n = (int64_t)blockIdx.x * kWarps + threadIdx.x / 32;
    if (n >= N) return;  // a whole warp
    const int64_t row = 3 * (scene * N + n);
    const float x = query[row], y = query[row + 1], z = query[row + 2];
    const double scale = table.scales[scene];
    const Cell cell = cell_of(x, y, z, scale);
    const Surroundings near(table, scene, cell);
    const float4* sorted = table.sorted + scene * M;
    Three nearest;
    for (unsigned base = 0; base < near.total(); base += 32) {
        const unsigned place = near.place_of(base + lane);
        if (base + lane >= near.total()) continue;
        const float4 point = sorted[place];
        nearest.insert(key_of(squared_distance(x, y, z, point.x, point.y, point.z), __float_as_int(point.w)));
    }
    nearest.merge();
    if (!(nearest.distance(2) < safe_distance(x, y, z, cell, scale))) {
        nearest = Three();
        for (int64_t i = lane; i < M; i += 32) {
            const float* point = points + 3 * (scene * M + i);
            nearest.insert(key_of(squared_distance(x, y, z, point[0], point[1], point[2]), (int)i));
        }
        nearest.merge();
    }
    if (lane < 3) {
        const uint64_t key = lane == 0 ? nearest.keys[0] : (lane == 1 ? nearest.keys[1] : nearest.keys[2]);
        distance[row + lane] = __fsqrt_rn(__uint_as_float(key >> 32));
        idx[row + lane] = (int)(unsigned)key;
    }
}

bool uses_cells(int64_t M) { return M > kFewPoints; }

}  // namespace
}  // namespace pn2

using namespace pn2;

extern "C" {

int64_t pn2_three_nn_workspace(int64_t B, int64_t N, int64_t M) {
    return uses_cells(M) && B > 0 && N > 0 ? cell_table_bytes(B, M) : 0;
}

int pn2_three_nn(const float* query, const float* points, int64_t B, int64_t N, int64_t M, float* distance,
                 int32_t* idx, void* workspace, intptr_t context) {
    if (B == 0 || N == 0) return 0;
    if (M > INT32_MAX || B > 65535) return cudaErrorInvalidValue;
    const cudaStream_t stream = stream_of(context);
    if (uses_cells(M)) {
        const CellTable table = cell_table_in(workspace, B, M);
        if (const int error = build_cell_table(table, points, B, M, 0, stream)) return error;
        const dim3 grid(divide_up(N, kWarps), B);
        three_nn_by_cells<<<grid, kThreads, 0, stream>>>(query, points, N, M, table, distance, idx);
        return cudaGetLastError();
    }
    Device device;
    if (const int error = current_device(&device)) return error;
    if (B * N >= (int64_t)device.processors * 4 * kThreads * kQueries) {
        const dim3 grid(divide_up(N, kThreads * kQueries), B);
        three_nn<kQueries><<<grid, kThreads, 0, stream>>>(query, points, N, M, distance, idx);
    } else {
        const dim3 grid(divide_up(N, kThreads), B);
        three_nn<1><<<grid, kThreads, 0, stream>>>(query, points, N, M, distance, idx);
    }
    return cudaGetLastError();
}

}  // extern "C"
