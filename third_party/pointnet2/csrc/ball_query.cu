// Ball query: a warp a centre.
//
// Small scenes are scanned in index order, with an exit as soon as the row is full. In larger ones the points are first
// sorted into a hash table of cells a little wider than the radius, so that a ball lies in 27 cells; their hits come in any
// order and are ranked by index afterwards. A ball with more hits than the list holds falls back to the scan, which then
// fills its row soon.
#include <climits>

#include "common.cuh"

namespace pn2 {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kListed = 256;  // hits of a ball that are ranked
constexpr int kScanThreads = 1024;
constexpr int64_t kSmallScene = 2048;  // below, building the table costs more than it saves

struct Cell {
    int x, y, z;
};

// A hit's true offset is below radius * (1 + 2^-22) on each axis, and cells are wider by 1e-5, so that cell numbers, taken
// in double precision, differ by one at most. Clamping keeps that: it is monotone and moves nothing further apart.
__device__ __forceinline__ int cell_number(float value, double cells_per_unit) {
    const double number = floor((double)value * cells_per_unit);
    return (int)fmin(fmax(number, -1e9), 1e9);
}

__device__ __forceinline__ Cell cell_of(float x, float y, float z, double cells_per_unit) {
    return {cell_number(x, cells_per_unit), cell_number(y, cells_per_unit), cell_number(z, cells_per_unit)};
}

__device__ __forceinline__ unsigned bucket_of(Cell cell, unsigned mask) {
    unsigned hash = (unsigned)cell.x * 0x9E3779B1u + (unsigned)cell.y * 0x85EBCA77u + (unsigned)cell.z * 0xC2B2AE3Du;
    hash ^= hash >> 15;
    hash *= 0x2C1B3C6Du;
    hash ^= hash >> 13;
    return hash & mask;
}

struct Table {
    unsigned* counts;  // [B, buckets]
    unsigned* starts;  // [B, buckets], in `sorted` of the scene
    unsigned* cursors; // [B], how much of the scene's `sorted` is given away
    float4* sorted;    // [B, N]: x, y, z and the bits of the index
    unsigned buckets;  // a power of two
};

int64_t buckets_for(int64_t N) {
    int64_t buckets = 1024;
    while (buckets < N) buckets *= 2;
    return buckets;
}

Table table_in(void* workspace, int64_t B, int64_t N) {
    const int64_t buckets = buckets_for(N);
    char* bytes = static_cast<char*>(workspace);
    Table table;
    table.buckets = buckets;
    table.counts = reinterpret_cast<unsigned*>(bytes);
    table.cursors = table.counts + B * buckets;  // zeroed together with the counts
    bytes += align_up((B * buckets + B) * sizeof(unsigned));
    table.starts = reinterpret_cast<unsigned*>(bytes);
    bytes += align_up(B * buckets * sizeof(unsigned));
    table.sorted = reinterpret_cast<float4*>(bytes);
    return table;
}

__global__ void __launch_bounds__(kThreads)
    count_cells(const float* points, int64_t N, double cells_per_unit, Table table) {
    const int64_t i = (int64_t)blockIdx.x * kThreads + threadIdx.x;
    if (i >= N) return;
    const float* point = points + ((int64_t)blockIdx.y * N + i) * 3;
    const Cell cell = cell_of(point[0], point[1], point[2], cells_per_unit);
    atomicAdd(table.counts + (int64_t)blockIdx.y * table.buckets + bucket_of(cell, table.buckets - 1), 1u);
}

// Gives each bucket its part of `sorted`. Which part is of no account, so that blocks take turns by one atomic each.
// Afterwards `counts` holds where the next point of the bucket goes, and `starts` where the bucket begins.
__global__ void __launch_bounds__(kScanThreads) place_buckets(Table table) {
    __shared__ unsigned of_warps[32];
    __shared__ unsigned base;
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    const int64_t bucket = (int64_t)blockIdx.y * table.buckets + blockIdx.x * kScanThreads + threadIdx.x;
    const unsigned count = table.counts[bucket];
    unsigned sum = count;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
        const unsigned lower = __shfl_up_sync(kAllLanes, sum, distance);
        if (lane >= distance) sum += lower;
    }
    if (lane == 31) of_warps[warp] = sum;
    __syncthreads();
    if (warp == 0) {
        const unsigned own = of_warps[lane];
        unsigned total = own;
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) {
            const unsigned lower = __shfl_up_sync(kAllLanes, total, distance);
            if (lane >= distance) total += lower;
        }
        of_warps[lane] = total - own;
        if (lane == 31) base = atomicAdd(table.cursors + blockIdx.y, total);
    }
    __syncthreads();
    const unsigned start = base + of_warps[warp] + sum - count;
    table.starts[bucket] = start;
    table.counts[bucket] = start;
}

__global__ void __launch_bounds__(kThreads)
    sort_points(const float* points, int64_t N, double cells_per_unit, Table table) {
    const int64_t i = (int64_t)blockIdx.x * kThreads + threadIdx.x;
    if (i >= N) return;
    const float* point = points + ((int64_t)blockIdx.y * N + i) * 3;
    const float x = point[0], y = point[1], z = point[2];
    const unsigned bucket = bucket_of(cell_of(x, y, z, cells_per_unit), table.buckets - 1);
    const unsigned place = atomicAdd(table.counts + (int64_t)blockIdx.y * table.buckets + bucket, 1u);
    table.sorted[(int64_t)blockIdx.y * N + place] = make_float4(x, y, z, __int_as_float((int)i));
}

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
                   double cells_per_unit, Table table, int32_t* idx) {
    __shared__ int lists[kWarps][kListed];
    const int lane = threadIdx.x & 31;
    int* list = lists[threadIdx.x / 32];
    const int64_t m = (int64_t)blockIdx.x * kWarps + threadIdx.x / 32;
    if (m >= M) return;  // a whole warp
    const int64_t scene = blockIdx.y;
    const float* center = centers + 3 * (scene * M + m);
    const float qx = center[0], qy = center[1], qz = center[2];
    int32_t* row = idx + (scene * M + m) * S;

    // Lane l < 27 looks up one cell. Two cells may share a bucket, which is then visited once.
    unsigned start = 0, count = 0;
    Cell cell = cell_of(qx, qy, qz, cells_per_unit);
    cell.x += lane % 3 - 1, cell.y += lane / 3 % 3 - 1, cell.z += lane / 9 - 1;
    const unsigned bucket = lane < 27 ? bucket_of(cell, table.buckets - 1) : table.buckets + lane;
    const bool first_with_it = __ffs(__match_any_sync(kAllLanes, bucket)) - 1 == lane;
    if (lane < 27 && first_with_it) {
        start = table.starts[scene * table.buckets + bucket];
        count = table.counts[scene * table.buckets + bucket] - start;  // sort_points has counted up to the end
    }
    unsigned end = count;  // inclusive sum over the lanes
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
        const unsigned lower = __shfl_up_sync(kAllLanes, end, distance);
        if (lane >= distance) end += lower;
    }
    const unsigned total = __shfl_sync(kAllLanes, end, 31);
    const unsigned shift = start - (end - count);  // modulo 2^32: candidate number -> place in `sorted`

    const float4* sorted = table.sorted + scene * N;
    int found = 0;
    for (unsigned base = 0; base < total && found <= kListed; base += 32) {
        const unsigned candidate = base + lane;
        int owner = 0;  // the first lane whose `end` is above the candidate's number
#pragma unroll
        for (int step = 16; step > 0; step /= 2) {
            const unsigned below = __shfl_sync(kAllLanes, end, owner + step - 1);
            if (below <= candidate) owner += step;
        }
        const unsigned place = candidate + __shfl_sync(kAllLanes, shift, owner & 31);
        bool hit = false;
        int index = 0;
        if (candidate < total) {
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
    if (!uses_cells(N) || B == 0 || M == 0) return 0;
    const int64_t buckets = buckets_for(N);
    return align_up((B * buckets + B) * sizeof(unsigned)) + align_up(B * buckets * sizeof(unsigned)) +
           B * N * sizeof(float4);
}

int pn2_ball_query(const float* points, const float* centers, int64_t B, int64_t N, int64_t M, int64_t S, float radius,
                   int32_t* idx, void* workspace, intptr_t context) {
    if (B == 0 || M == 0) return 0;
    if (N > INT_MAX || B > 65535) return cudaErrorInvalidValue;
    const cudaStream_t stream = stream_of(context);
    const float radius_squared = radius * radius;
    const dim3 queries(divide_up(M, kWarps), B);
    if (!uses_cells(N)) {
        query_by_scan<<<queries, kThreads, 0, stream>>>(points, centers, N, M, S, radius_squared, idx);
        return cudaGetLastError();
    }
    const Table table = table_in(workspace, B, N);
    const double cells_per_unit = 1.0 / ((double)radius * (1.0 + 1e-5));
    const cudaError_t error =
        cudaMemsetAsync(table.counts, 0, (B * (int64_t)table.buckets + B) * sizeof(unsigned), stream);
    if (error != cudaSuccess) return error;
    const dim3 all_points(divide_up(N, kThreads), B), all_buckets(table.buckets / kScanThreads, B);
    count_cells<<<all_points, kThreads, 0, stream>>>(points, N, cells_per_unit, table);
    place_buckets<<<all_buckets, kScanThreads, 0, stream>>>(table);
    sort_points<<<all_points, kThreads, 0, stream>>>(points, N, cells_per_unit, table);
    query_by_cells<<<queries, kThreads, 0, stream>>>(points, centers, N, M, S, radius_squared, cells_per_unit, table,
                                                     idx);
    return cudaGetLastError();
}

}  // extern "C"
