// Ball query: a warp a centre.
//
// Small scenes are scanned in index order, with an exit as soon as the row is full. In larger ones the points are first
// sorted into cells a little wider than the radius, so that a ball lies in 27 of them; their hits come in any order and are
// ranked by index afterwards. A ball with more hits than the list holds falls back to the scan, which then fills its row
// soon.
#include <climits>

#include "cells.cuh"

namespace pn2 {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kListed = 256;           // hits of a ball that are ranked
constexpr int64_t kSmallScene = 2048;  // below, building the table costs more than it saves
constexpr float kSmallRadius = 1e-15f;  // below, squares lose digits to underflow, and the next lines do not hold
// A hit's true offset is below radius * (1 + 2^-22) on each axis. Cells are wider by more than that and the rounding of
// their numbers, so that the numbers differ by one at most.
constexpr double kCellsOfRadius = 1.0 + 1e-5;

// Pads a row of which the first `found` entries are written.
__device__ __forceinline__ void pad(int32_t* row, int found, int first, int S, int lane) {
    for (int slot = found + lane; slot < S; slot += 32) row[slot] = first;
}

__device__ void scan_in_order(const float* scene, int64_t N, float qx, float qy, float qz, float radius_squared,
                              int S, int32_t* row, int lane) {
    int found = 0, first = 0;
    for (int64_t start = 0; start < N && found < S; start += 32) {
        const int64_t i = start + lane;
        bool hit = false;
        if (i < N) {
            const float* point = scene + 3 * i;
            hit = squared_distance(point[0], point[1], point[2], qx, qy, qz) < radius_squared;
        }
        const unsigned hits = __ballot_sync(kAllLanes, hit);
        if (hits == 0) continue;
        if (found == 0) first = (int)start + __ffs(hits) - 1;
        const int slot = found + __popc(hits & ((1u << lane) - 1));
        if (hit && slot < S) row[slot] = (int)i;
        found += __popc(hits);
    }
    pad(row, found < S ? found : S, first, S, lane);
}

__global__ void __launch_bounds__(kThreads)
    query_by_scan(const float* points, const float* centers, int64_t N, int64_t M, int S, float radius_squared,
                  int32_t* idx) {
    const int64_t m = (int64_t)blockIdx.x * kWarps + threadIdx.x / 32;
    if (m >= M) return;
    const int64_t row = (int64_t)blockIdx.y * M + m;
    const float* center = centers + 3 * row;
    scan_in_order(points + (int64_t)blockIdx.y * N * 3, N, center[0], center[1], center[2], radius_squared, S,
                  idx + row * S, threadIdx.x & 31);
}

__global__ void __launch_bounds__(kThreads)
    query_by_cells(const float* points, const float* centers, int64_t N, int64_t M, int S, float radius_squared,
                   CellTable table, int32_t* idx) {
    __shared__ int lists[kWarps][kListed];
    const int lane = threadIdx.x & 31;
    int* list = lists[threadIdx.x / 32];
    const int64_t m = (int64_t)blockIdx.x * kWarps + threadIdx.x / 32;
    if (m >= M) return;  // a whole warp
    const int64_t scene = blockIdx.y;
    const float* center = centers + 3 * (scene * M + m);
    const float qx = center[0], qy = center[1], qz = center[2];
    int32_t* row = idx + (scene * M + m) * S;

    const Surroundings near(table, scene, cell_of(qx, qy, qz, table.scales[scene]));
    const float4* sorted = table.sorted + scene * N;
    int found = 0;
    for (unsigned base = 0; base < near.total() && found <= kListed; base += 32) {
        const unsigned place = near.place_of(base + lane);
        bool hit = false;
        int index = 0;
        if (base + lane < near.total()) {
            const float4 point = sorted[place];
            index = __float_as_int(point.w);
            hit = squared_distance(point.x, point.y, point.z, qx, qy, qz) < radius_squared;
        }
        const unsigned hits = __ballot_sync(kAllLanes, hit);
        const int slot = found + __popc(hits & ((1u << lane) - 1));
        if (hit && slot < kListed) list[slot] = index;
        found += __popc(hits);
    }
    if (found > kListed) {
        scan_in_order(points + scene * N * 3, N, qx, qy, qz, radius_squared, S, row, lane);
        return;
    }
    __syncwarp();
    int first = INT_MAX;
    for (int entry = lane; entry < found; entry += 32) {
        const int index = list[entry];
        int rank = 0;
        for (int other = 0; other < found; ++other) rank += list[other] < index;
        if (rank < S) row[rank] = index;
        first = min(first, index);
    }
    first = found ? __reduce_min_sync(kAllLanes, first) : 0;
    pad(row, found < S ? found : S, first, S, lane);
}

bool uses_cells(int64_t N) { return N > kSmallScene; }

}  // namespace
}  // namespace pn2

using namespace pn2;

extern "C" {

int64_t pn2_ball_query_workspace(int64_t B, int64_t N, int64_t M, int64_t) {
    return uses_cells(N) && B > 0 && M > 0 ? cell_table_bytes(B, N) : 0;
}

int pn2_ball_query(const float* points, const float* centers, int64_t B, int64_t N, int64_t M, int64_t S, float radius,
                   int32_t* idx, void* workspace, intptr_t context) {
    if (B == 0 || M == 0) return 0;
    if (N > INT_MAX || B > 65535) return cudaErrorInvalidValue;
    const cudaStream_t stream = stream_of(context);
    const float radius_squared = radius * radius;
    const dim3 queries(divide_up(M, kWarps), B);
    if (!uses_cells(N) || radius < kSmallRadius) {
        query_by_scan<<<queries, kThreads, 0, stream>>>(points, centers, N, M, S, radius_squared, idx);
        return cudaGetLastError();
    }
    const CellTable table = cell_table_in(workspace, B, N);
    if (const int error = build_cell_table(table, points, B, N, radius * kCellsOfRadius, stream)) return error;
    query_by_cells<<<queries, kThreads, 0, stream>>>(points, centers, N, M, S, radius_squared, table, idx);
    return cudaGetLastError();
}

}  // extern "C"
