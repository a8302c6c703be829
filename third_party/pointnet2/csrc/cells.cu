// Builds the tables of cells.cuh.
#include "cells.cuh"

namespace pn2 {
namespace {

constexpr int kThreads = 256;
constexpr int kWideThreads = 1024;
constexpr int kMeasured = 4096;  // points of a scene that its extent is taken from
constexpr double kPointsOfCell = 2.0;

int64_t buckets_for(int64_t N) {
    int64_t buckets = 1024;
    while (buckets < N) buckets *= 2;
    return buckets;
}

__global__ void set_scales(double* scales, int64_t B, double scale) {
    const int64_t scene = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (scene < B) scales[scene] = scale;
}

// The edge at which cells of N points that fill these extents hold kPointsOfCell on average. Points whose extent along an
// axis is less than that edge lie in one layer of cells, and are counted as a plane, or as a line.
__device__ double edge_for(double a, double b, double c, double N) {
    const double largest = fmax(a, fmax(b, c)), smallest = fmin(a, fmin(b, c));
    const double middle = fmax(fmin(a, b), fmin(fmax(a, b), c));
    const double share = kPointsOfCell / N;
    const double of_volume = cbrt(largest * middle * smallest * share);
    if (smallest >= of_volume) return of_volume;
    const double of_plane = sqrt(largest * middle * share);
    return middle >= of_plane ? of_plane : largest * share;
}

// The value that half of a warp's values do not exceed.
__device__ __forceinline__ float warp_median(float value) {
    const int lane = threadIdx.x & 31;
    int rank = 0;
    for (int other = 0; other < 32; ++other) {
        const float its = __shfl_sync(kAllLanes, value, other);
        rank += its < value || (its == value && other < lane);
    }
    const unsigned found = __ballot_sync(kAllLanes, rank == 16);
    return __shfl_sync(kAllLanes, value, found ? __ffs(found) - 1 : 0);  // values that are no numbers have no rank
}

// A block a scene. Each warp takes the extent of some points, and the scene's is their median, which a few points far away
// from all others do not move.
__global__ void __launch_bounds__(kWideThreads) measure_scales(const float* points, int64_t N, double* scales) {
    __shared__ float lows[3][32], highs[3][32];
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    const float* scene = points + (int64_t)blockIdx.x * N * 3;
    const int64_t stride = N <= kMeasured ? 1 : N / kMeasured;
    float low[3] = {INFINITY, INFINITY, INFINITY}, high[3] = {-INFINITY, -INFINITY, -INFINITY};
    for (int64_t i = threadIdx.x * stride; i < N; i += kWideThreads * stride) {
        for (int axis = 0; axis < 3; ++axis) {
            low[axis] = fminf(low[axis], scene[3 * i + axis]);
            high[axis] = fmaxf(high[axis], scene[3 * i + axis]);
        }
    }
    for (int axis = 0; axis < 3; ++axis) {
#pragma unroll
        for (int distance = 16; distance > 0; distance /= 2) {
            low[axis] = fminf(low[axis], __shfl_xor_sync(kAllLanes, low[axis], distance));
            high[axis] = fmaxf(high[axis], __shfl_xor_sync(kAllLanes, high[axis], distance));
        }
        if (lane == 0) lows[axis][warp] = low[axis], highs[axis][warp] = high[axis];
    }
    __syncthreads();
    if (warp != 0) return;
    double extent[3];
    for (int axis = 0; axis < 3; ++axis)
        extent[axis] = fmax(0.0, (double)warp_median(highs[axis][lane]) - warp_median(lows[axis][lane]));
    const double edge = edge_for(extent[0], extent[1], extent[2], (double)N);
    if (lane == 0) scales[blockIdx.x] = edge > 0 ? 1 / edge : 1;
}

__global__ void __launch_bounds__(kThreads) count_cells(const float* points, int64_t N, CellTable table) {
    const int64_t i = (int64_t)blockIdx.x * kThreads + threadIdx.x, scene = blockIdx.y;
    if (i >= N) return;
    const float* point = points + (scene * N + i) * 3;
    const Cell cell = cell_of(point[0], point[1], point[2], table.scales[scene]);
    atomicAdd(table.ends + scene * table.buckets + bucket_of(cell, table.buckets - 1), 1u);
}

// Gives each bucket its part of `sorted`. Which part is of no account, so that blocks take turns by one atomic each.
// Afterwards `starts` and `ends` both say where the bucket begins; sort_points counts `ends` up.
__global__ void __launch_bounds__(kWideThreads) place_buckets(CellTable table) {
    __shared__ unsigned of_warps[32];
    __shared__ unsigned base;
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    const int64_t bucket = (int64_t)blockIdx.y * table.buckets + blockIdx.x * kWideThreads + threadIdx.x;
    const unsigned count = table.ends[bucket];
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
    table.ends[bucket] = start;
}

__global__ void __launch_bounds__(kThreads) sort_points(const float* points, int64_t N, CellTable table) {
    const int64_t i = (int64_t)blockIdx.x * kThreads + threadIdx.x, scene = blockIdx.y;
    if (i >= N) return;
    const float* point = points + (scene * N + i) * 3;
    const float x = point[0], y = point[1], z = point[2];
    const unsigned bucket = bucket_of(cell_of(x, y, z, table.scales[scene]), table.buckets - 1);
    const unsigned place = atomicAdd(table.ends + scene * table.buckets + bucket, 1u);
    table.sorted[scene * N + place] = make_float4(x, y, z, __int_as_float((int)i));
}

}  // namespace

int64_t cell_table_bytes(int64_t B, int64_t N) {
    const int64_t buckets = buckets_for(N);
    return align_up((B * buckets + B) * sizeof(unsigned)) + align_up(B * buckets * sizeof(unsigned)) +
           align_up(B * N * sizeof(float4)) + B * sizeof(double);
}

CellTable cell_table_in(void* workspace, int64_t B, int64_t N) {
    const int64_t buckets = buckets_for(N);
    char* bytes = static_cast<char*>(workspace);
    CellTable table;
    table.buckets = buckets;
    table.ends = reinterpret_cast<unsigned*>(bytes);
    table.cursors = table.ends + B * buckets;  // zeroed together with the counts
    bytes += align_up((B * buckets + B) * sizeof(unsigned));
    table.starts = reinterpret_cast<unsigned*>(bytes);
    bytes += align_up(B * buckets * sizeof(unsigned));
    table.sorted = reinterpret_cast<float4*>(bytes);
    bytes += align_up(B * N * sizeof(float4));
    table.scales = reinterpret_cast<double*>(bytes);
    return table;
}

int build_cell_table(const CellTable& table, const float* points, int64_t B, int64_t N, double width,
                     cudaStream_t stream) {
    const cudaError_t error =
        cudaMemsetAsync(table.ends, 0, (B * (int64_t)table.buckets + B) * sizeof(unsigned), stream);
    if (error != cudaSuccess) return error;
    const dim3 all_points(divide_up(N, kThreads), B), all_buckets(table.buckets / kWideThreads, B);
    if (width > 0)
        set_scales<<<divide_up(B, kThreads), kThreads, 0, stream>>>(table.scales, B, 1 / width);
    else
        measure_scales<<<B, kWideThreads, 0, stream>>>(points, N, table.scales);
    count_cells<<<all_points, kThreads, 0, stream>>>(points, N, table);
    place_buckets<<<all_buckets, kWideThreads, 0, stream>>>(table);
    sort_points<<<all_points, kThreads, 0, stream>>>(points, N, table);
    return cudaGetLastError();
}

}  // namespace pn2
