// Gathers of features by index, offsets of neighbours from their centres, and the gradients of both.
#include "common.cuh"

namespace pn2 {
namespace {

constexpr int kThreads = 256;
constexpr int kStagedThreads = 1024;
constexpr int kNeighbors = 8;  // that one thread takes gradients from

template <typename T, int Count>
struct alignas(Count * sizeof(T)) Several {
    T value[Count];
};

// A thread copies four positions of a row: one wide read of indices, four gathers, one wide write. `table` may lie in
// shared or global memory. `wide` says that rows of P are aligned for it.
template <typename T>
__device__ __forceinline__ void gather_row(const T* table, const int32_t* idx, int64_t N, int64_t P, bool wide,
                                           int64_t first, int64_t step, T* out) {
    if (wide) {
        for (int64_t p = first; p < P / 4; p += step) {
            const int4 i = reinterpret_cast<const int4*>(idx)[p];
            assert((unsigned)i.x < N && (unsigned)i.y < N && (unsigned)i.z < N && (unsigned)i.w < N &&
                   "an index lies outside the points");
            reinterpret_cast<Several<T, 4>*>(out)[p] = {{table[i.x], table[i.y], table[i.z], table[i.w]}};
        }
    } else {
        for (int64_t p = first; p < P; p += step) {
            const int i = idx[p];
            assert((unsigned)i < N && "an index lies outside the points");
            out[p] = table[i];
        }
    }
}

// One row of features in shared memory: gathers from global memory would move 32 bytes for each element.
template <typename T>
__global__ void __launch_bounds__(kStagedThreads)
    group_staged(const T* features, const int32_t* idx, int64_t C, int64_t N, int64_t P, bool wide, T* out) {
    extern __shared__ __align__(16) unsigned char staged[];
    T* table = reinterpret_cast<T*>(staged);
    const int64_t row = blockIdx.y, scene = row / C;
    for (int64_t i = threadIdx.x; i < N; i += kStagedThreads) table[i] = features[row * N + i];
    __syncthreads();
    gather_row(table, idx + scene * P, N, P, wide, (int64_t)blockIdx.x * kStagedThreads + threadIdx.x,
               (int64_t)gridDim.x * kStagedThreads, out + row * P);
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    group_direct(const T* features, const int32_t* idx, int64_t rows, int64_t C, int64_t N, int64_t P, bool wide,
                 T* out) {
    for (int64_t row = blockIdx.y; row < rows; row += gridDim.y)
        gather_row(features + row * N, idx + row / C * P, N, P, wide, (int64_t)blockIdx.x * kThreads + threadIdx.x,
                   (int64_t)gridDim.x * kThreads, out + row * P);
}

// Adds a warp's values to sums[index]. Lanes with the first lane's index, as the padding of a ball's row has, are
// summed first: their atomics would queue up at one address. Idle lanes have index -1.
__device__ __forceinline__ void add_by_index(float* sums, int index, float value) {
    const int lane = threadIdx.x & 31;
    const int shared_index = __shfl_sync(kAllLanes, index, 0);
    const bool same = index == shared_index;
    if (__popc(__ballot_sync(kAllLanes, same)) > 2) {
        float total = same ? value : 0.f;
#pragma unroll
        for (int distance = 16; distance > 0; distance /= 2) total += __shfl_xor_sync(kAllLanes, total, distance);
        if (lane == 0 && index >= 0) atomicAdd(sums + index, total);
        if (!same && index >= 0) atomicAdd(sums + index, value);
    } else if (index >= 0) {
        atomicAdd(sums + index, value);
    }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    group_gradient(const T* grad, const int32_t* idx, int64_t rows, int64_t C, int64_t N, int64_t P, float* sums) {
    for (int64_t row = blockIdx.y; row < rows; row += gridDim.y) {
        const int64_t scene = row / C;
        // whole warps stay together: the bound is the block's first position
        for (int64_t start = (int64_t)blockIdx.x * kThreads; start < P; start += (int64_t)gridDim.x * kThreads) {
            const int64_t p = start + threadIdx.x;
            const int index = p < P ? idx[scene * P + p] : -1;
            assert((p >= P || (unsigned)index < N) && "an index lies outside the points");
            add_by_index(sums + row * N, index, p < P ? to_float(grad[row * P + p]) : 0.f);
        }
    }
}

// Division by a number that the host knows, as a product and a shift (Granlund and Montgomery 1994).
struct Divisor {
    uint64_t number;
    uint32_t factor;
    int shift;

    explicit Divisor(uint64_t number) : number(number), factor(0), shift(0) {
        if (number > UINT32_MAX) return;
        while ((uint64_t{1} << shift) < number) ++shift;
        factor = (uint32_t)(((uint64_t{1} << 32) * ((uint64_t{1} << shift) - number)) / number + 1);
    }

    __device__ __forceinline__ uint32_t operator()(uint32_t value) const {
        return (uint32_t)(((uint64_t)__umulhi(value, factor) + value) >> shift);
    }
    __device__ __forceinline__ uint64_t operator()(uint64_t value) const { return value / number; }
};

struct Offsets {
    Divisor width, neighbors, centers;  // 3 + F, K, M
    uint64_t count;                     // elements of the result
    int64_t N;
    unsigned F;
    float radius;
};

// A thread writes a few consecutive elements of the result, together. Neighbouring threads read one neighbour's row. I is
// the type that counts elements: 32-bit divisions are many times faster.
template <typename T, typename I>
__global__ void __launch_bounds__(kThreads)
    group_offsets(const float* points, const float* centers, const T* features, const int32_t* idx, Offsets sizes,
                  T* out) {
    constexpr int kElements = 16 / sizeof(T);
    const unsigned width = 3 + sizes.F;
    const I first = ((I)blockIdx.x * kThreads + threadIdx.x) * kElements;
    if (first >= (I)sizes.count) return;
    I position = sizes.width(first);
    unsigned column = (unsigned)(first - position * width);
    int64_t source = 0;  // row of the point
    I center = 0;
    Several<T, kElements> written;
#pragma unroll
    for (int element = 0; element < kElements; ++element) {
        if (element > 0 && ++column == width) column = 0, ++position;
        if (first + element >= (I)sizes.count) break;
        if (element == 0 || column == 0) {
            center = sizes.neighbors(position);
            const int index = idx[position];
            assert((unsigned)index < sizes.N && "an index lies outside the points");
            source = (int64_t)sizes.centers(center) * sizes.N + index;
        }
        if (column < 3) {
            const float offset = __fsub_rn(points[source * 3 + column], centers[(int64_t)center * 3 + column]);
            written.value[element] = from_float<T>(__fdiv_rn(offset, sizes.radius));
        } else {
            written.value[element] = features[source * sizes.F + column - 3];
        }
    }
    if (first + kElements <= (I)sizes.count) {
        *reinterpret_cast<Several<T, kElements>*>(out + first) = written;
    } else {
        for (int element = 0; first + element < (I)sizes.count; ++element) out[first + element] = written.value[element];
    }
}

// A thread sums one column over a few neighbours of one centre. What the first neighbour of the centre receives, often many
// times over in a padded row, is summed on the way.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    group_offsets_gradient(const T* grad, const int32_t* idx, int64_t N, int64_t M, int64_t K, int64_t F, float radius,
                           float* grad_points, float* grad_centers, float* grad_features) {
    const int64_t width = 3 + F, scene = blockIdx.y, parts = divide_up(K, kNeighbors);
    const int64_t item = (int64_t)blockIdx.x * kThreads + threadIdx.x;
    if (item >= M * parts * width) return;
    const int64_t part = item / width, column = item - part * width, m = part / parts, row = scene * M + m;
    const bool offset = column < 3;
    float* target = offset ? (grad_points == nullptr ? nullptr : grad_points + scene * N * 3 + column)
                           : (grad_features == nullptr ? nullptr : grad_features + scene * N * F + column - 3);
    const int64_t stride = offset ? 3 : F;
    if (target == nullptr && !(offset && grad_centers != nullptr)) return;
    const int first = idx[row * K];
    float of_first = 0.f, total = 0.f;
    const int64_t begin = (part - m * parts) * kNeighbors, end = min(begin + kNeighbors, K);
    for (int64_t k = begin; k < end; ++k) {
        const int index = idx[row * K + k];
        assert((unsigned)index < N && "an index lies outside the points");
        float g = to_float(grad[(row * K + k) * width + column]);
        if (offset) g = __fdiv_rn(g, radius);
        total += g;
        if (index == first)
            of_first += g;
        else if (target != nullptr)
            atomicAdd(target + index * stride, g);
    }
    if (target != nullptr && of_first != 0.f) atomicAdd(target + first * stride, of_first);
    if (offset && grad_centers != nullptr) atomicAdd(grad_centers + row * 3 + column, -total);
}

unsigned blocks_for(int64_t work, int per_block, int64_t most) {
    const int64_t blocks = divide_up(work, per_block);
    return blocks < 1 ? 1 : (blocks < most ? blocks : most);
}

template <typename T>
int group(const Device& device, const void* features, const int32_t* idx, int64_t B, int64_t C, int64_t N, int64_t P,
          void* out, cudaStream_t stream) {
    const T* from = static_cast<const T*>(features);
    T* to = static_cast<T*>(out);
    const int64_t rows = B * C, bytes = N * sizeof(T);
    const bool wide = P % 4 == 0 && reinterpret_cast<uintptr_t>(idx) % 16 == 0;
    // staging pays where blocks fill the chip and gather several times what they load
    const int64_t splits = rows >= device.processors ? 1 : device.processors / rows;
    if (bytes <= device.shared_bytes && rows <= 65535 && rows * splits * 2 > device.processors && P >= 2 * N * splits) {
        const cudaError_t error = allow_shared(group_staged<T>, device.shared_bytes);
        if (error != cudaSuccess) return error;
        group_staged<T><<<dim3(splits, rows), kStagedThreads, bytes, stream>>>(from, idx, C, N, P, wide, to);
    } else {
        const dim3 grid(blocks_for(wide ? P / 4 : P, kThreads, 65535), rows < 65535 ? rows : 65535);
        group_direct<T><<<grid, kThreads, 0, stream>>>(from, idx, rows, C, N, P, wide, to);
    }
    return cudaGetLastError();
}

}  // namespace
}  // namespace pn2

using namespace pn2;

extern "C" {

int pn2_group(const void* features, const int32_t* idx, int64_t B, int64_t C, int64_t N, int64_t P, int element_size,
              void* out, intptr_t context) {
    if (B == 0 || C == 0 || P == 0) return 0;
    Device device;
    if (const int error = current_device(&device)) return error;
    const cudaStream_t stream = stream_of(context);
    switch (element_size) {
        case 1: return group<uint8_t>(device, features, idx, B, C, N, P, out, stream);
        case 2: return group<uint16_t>(device, features, idx, B, C, N, P, out, stream);
        case 4: return group<uint32_t>(device, features, idx, B, C, N, P, out, stream);
        case 8: return group<uint64_t>(device, features, idx, B, C, N, P, out, stream);
        default: return cudaErrorInvalidValue;
    }
}

int pn2_group_backward(const void* grad, const int32_t* idx, int64_t B, int64_t C, int64_t N, int64_t P, int dtype,
                       float* sums, intptr_t context) {
    if (B == 0 || C == 0 || P == 0) return 0;
    return with_type(dtype, [&](auto type) -> int {
        using T = decltype(type);
        const int64_t rows = B * C;
        const dim3 grid(blocks_for(P, kThreads * 4, 65535), rows < 65535 ? rows : 65535);
        group_gradient<T><<<grid, kThreads, 0, stream_of(context)>>>(static_cast<const T*>(grad), idx, rows, C, N, P, sums);
        return cudaGetLastError();
    });
}

int pn2_group_offsets(const float* points, const float* centers, const void* features, const int32_t* idx, int64_t B,
                      int64_t N, int64_t M, int64_t K, int64_t F, float radius, int dtype, void* out,
                      intptr_t context) {
    if (B == 0 || M == 0 || K == 0) return 0;
    if (B * M > UINT32_MAX || K > UINT32_MAX || F > UINT32_MAX - 3) return cudaErrorInvalidValue;
    const Offsets sizes{Divisor(3 + F), Divisor(K), Divisor(M), (uint64_t)(B * M * K * (3 + F)), N, (unsigned)F, radius};
    return with_type(dtype, [&](auto type) -> int {
        using T = decltype(type);
        const int64_t blocks = divide_up(sizes.count, kThreads * 16 / sizeof(T));
        const bool narrow = sizes.count < UINT32_MAX - kThreads * 16;  // so that no thread's first element wraps around
        auto* kernel = narrow ? group_offsets<T, uint32_t> : group_offsets<T, uint64_t>;
        kernel<<<blocks, kThreads, 0, stream_of(context)>>>(points, centers, static_cast<const T*>(features), idx, sizes,
                                                            static_cast<T*>(out));
        return cudaGetLastError();
    });
}

int pn2_group_offsets_backward(const void* grad, const int32_t* idx, int64_t B, int64_t N, int64_t M, int64_t K,
                               int64_t F, float radius, int dtype, float* grad_points, float* grad_centers,
                               float* grad_features, intptr_t context) {
    if (B == 0 || M == 0 || K == 0) return 0;
    if (B > 65535) return cudaErrorInvalidValue;
    return with_type(dtype, [&](auto type) -> int {
        using T = decltype(type);
        const dim3 grid(divide_up(M * divide_up(K, kNeighbors) * (3 + F), kThreads), B);
        group_offsets_gradient<T><<<grid, kThreads, 0, stream_of(context)>>>(
            static_cast<const T*>(grad), idx, N, M, K, F, radius, grad_points, grad_centers, grad_features);
        return cudaGetLastError();
    });
}

}  // extern "C"
