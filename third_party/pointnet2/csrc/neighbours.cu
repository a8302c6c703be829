// Three nearest neighbours, and the interpolation between them with its gradients.
#include "common.cuh"

namespace pn2 {
namespace {

constexpr int kThreads = 256;
constexpr int kTile = 1024;    // known points in shared memory at a time
constexpr int kQueries = 4;    // queries of a thread: one read of a known point serves them all
constexpr int kChannels = 16;  // channels of a block, in groups of four that are read together

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

// A block keeps kChannels rows of features in shared memory, as float and with four channels side by side, so that
// one 16-byte read gathers four. The blocks of one scene and channel group share out the N positions.
template <typename T>
__global__ void __launch_bounds__(1024)
    interpolate_staged(const T* features, const int32_t* idx, const float* weight, int64_t C, int64_t M, int64_t N,
                       int channels, T* out) {
    extern __shared__ float4 rows[];  // [channels / 4][M]
    const int64_t scene = blockIdx.z, first_channel = (int64_t)blockIdx.y * channels;
    const int groups = channels / 4;
    float* staged = reinterpret_cast<float*>(rows);
    for (int channel = 0; channel < channels; ++channel) {
        const bool real = first_channel + channel < C;
        const T* row = features + (scene * C + first_channel + channel) * M;
        float* target = staged + (channel / 4 * M) * 4 + channel % 4;
        for (int64_t m = threadIdx.x; m < M; m += blockDim.x) target[4 * m] = real ? to_float(row[m]) : 0.f;
    }
    __syncthreads();
    for (int64_t n = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; n < N; n += (int64_t)gridDim.x * blockDim.x) {
        const int64_t row = (scene * N + n) * 3;
        const int i0 = idx[row], i1 = idx[row + 1], i2 = idx[row + 2];
        const float w0 = weight[row], w1 = weight[row + 1], w2 = weight[row + 2];
        assert((unsigned)i0 < M && (unsigned)i1 < M && (unsigned)i2 < M && "an index lies outside the points");
        T* target = out + (scene * C + first_channel) * N + n;
        for (int group = 0; group < groups; ++group) {
            const float4* table = rows + group * M;
            const float4 a = table[i0], b = table[i1], c = table[i2];
            const float mixed[4] = {a.x * w0 + b.x * w1 + c.x * w2, a.y * w0 + b.y * w1 + c.y * w2,
                                    a.z * w0 + b.z * w1 + c.z * w2, a.w * w0 + b.w * w1 + c.w * w2};
#pragma unroll
            for (int j = 0; j < 4; ++j)
                if (first_channel + 4 * group + j < C) target[(4 * group + j) * N] = from_float<T>(mixed[j]);
        }
    }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    interpolate_direct(const T* features, const int32_t* idx, const float* weight, int64_t C, int64_t M, int64_t N,
                       T* out) {
    const int64_t n = (int64_t)blockIdx.x * kThreads + threadIdx.x;
    if (n >= N) return;
    const int64_t scene = blockIdx.z, row = (scene * N + n) * 3;
    const int i0 = idx[row], i1 = idx[row + 1], i2 = idx[row + 2];
    const float w0 = weight[row], w1 = weight[row + 1], w2 = weight[row + 2];
    assert((unsigned)i0 < M && (unsigned)i1 < M && (unsigned)i2 < M && "an index lies outside the points");
    const int64_t end = min(C, (int64_t)(blockIdx.y + 1) * kChannels);
    for (int64_t channel = (int64_t)blockIdx.y * kChannels; channel < end; ++channel) {
        const T* table = features + (scene * C + channel) * M;
        out[(scene * C + channel) * N + n] =
            from_float<T>(to_float(table[i0]) * w0 + to_float(table[i1]) * w1 + to_float(table[i2]) * w2);
    }
}

// Sums of the features' gradients, gathered in shared memory: [channels][M] floats a block.
template <typename T>
__global__ void __launch_bounds__(1024)
    feature_gradient_staged(const T* grad, const int32_t* idx, const float* weight, int64_t C, int64_t M, int64_t N,
                            int channels, float* sums) {
    extern __shared__ float staged_sums[];
    const int64_t scene = blockIdx.z, first_channel = (int64_t)blockIdx.y * channels;
    const int real_channels = min((int64_t)channels, C - first_channel);
    for (int64_t i = threadIdx.x; i < real_channels * M; i += blockDim.x) staged_sums[i] = 0.f;
    __syncthreads();
    for (int64_t n = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; n < N; n += (int64_t)gridDim.x * blockDim.x) {
        const int64_t row = (scene * N + n) * 3;
        const int i0 = idx[row], i1 = idx[row + 1], i2 = idx[row + 2];
        const float w0 = weight[row], w1 = weight[row + 1], w2 = weight[row + 2];
        assert((unsigned)i0 < M && (unsigned)i1 < M && (unsigned)i2 < M && "an index lies outside the points");
        for (int channel = 0; channel < real_channels; ++channel) {
            const float g = to_float(grad[(scene * C + first_channel + channel) * N + n]);
            float* target = staged_sums + channel * M;
            atomicAdd(target + i0, g * w0);
            atomicAdd(target + i1, g * w1);
            atomicAdd(target + i2, g * w2);
        }
    }
    __syncthreads();
    float* target = sums + (scene * C + first_channel) * M;
    for (int64_t i = threadIdx.x; i < real_channels * M; i += blockDim.x)
        if (staged_sums[i] != 0.f) atomicAdd(target + i, staged_sums[i]);
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    feature_gradient_direct(const T* grad, const int32_t* idx, const float* weight, int64_t C, int64_t M, int64_t N,
                            float* sums) {
    const int64_t n = (int64_t)blockIdx.x * kThreads + threadIdx.x;
    if (n >= N) return;
    const int64_t scene = blockIdx.z, row = (scene * N + n) * 3;
    const int64_t end = min(C, (int64_t)(blockIdx.y + 1) * kChannels);
    for (int64_t channel = (int64_t)blockIdx.y * kChannels; channel < end; ++channel) {
        const float g = to_float(grad[(scene * C + channel) * N + n]);
        float* target = sums + (scene * C + channel) * M;
        for (int j = 0; j < 3; ++j) {
            const int i = idx[row + j];
            assert((unsigned)i < M && "an index lies outside the points");
            atomicAdd(target + i, g * weight[row + j]);
        }
    }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    weight_gradient(const T* grad, const T* features, const int32_t* idx, int64_t C, int64_t M, int64_t N,
                    float* grad_weight) {
    const int64_t n = (int64_t)blockIdx.x * kThreads + threadIdx.x;
    if (n >= N) return;
    const int64_t scene = blockIdx.y, row = (scene * N + n) * 3;
    const int i0 = idx[row], i1 = idx[row + 1], i2 = idx[row + 2];
    assert((unsigned)i0 < M && (unsigned)i1 < M && (unsigned)i2 < M && "an index lies outside the points");
    float sum0 = 0.f, sum1 = 0.f, sum2 = 0.f;
    for (int64_t channel = 0; channel < C; ++channel) {
        const float g = to_float(grad[(scene * C + channel) * N + n]);
        const T* table = features + (scene * C + channel) * M;
        sum0 += g * to_float(table[i0]), sum1 += g * to_float(table[i1]), sum2 += g * to_float(table[i2]);
    }
    grad_weight[row] = sum0, grad_weight[row + 1] = sum1, grad_weight[row + 2] = sum2;
}

// Channels of which a block's shared memory holds a float row of M, at most kChannels, a multiple of four; 0 if none.
int staged_channels(const Device& device, int64_t C, int64_t M) {
    int64_t channels = device.shared_bytes / (M * (int64_t)sizeof(float)) / 4 * 4;
    if (channels > kChannels) channels = kChannels;
    const int64_t wanted = divide_up(C, 4) * 4;
    return channels < wanted ? channels : wanted;
}

// Blocks along N: enough to fill the chip, as each of them loads its rows anew.
int splits_of(const Device& device, int64_t blocks, int64_t N) {
    const int64_t wanted = divide_up(4 * (int64_t)device.processors, blocks), most = divide_up(N, 1024);
    return wanted < most ? wanted : most;
}

}  // namespace
}  // namespace pn2

using namespace pn2;

extern "C" {

int64_t pn2_three_nn_workspace(int64_t, int64_t, int64_t) { return 0; }

int pn2_three_nn(const float* query, const float* points, int64_t B, int64_t N, int64_t M, float* distance,
                 int32_t* idx, void*, intptr_t context) {
    if (B == 0 || N == 0) return 0;
    if (M > INT32_MAX || B > 65535) return cudaErrorInvalidValue;
    Device device;
    if (const int error = current_device(&device)) return error;
    const cudaStream_t stream = stream_of(context);
    if (B * N >= (int64_t)device.processors * 4 * kThreads * kQueries) {
        const dim3 grid(divide_up(N, kThreads * kQueries), B);
        three_nn<kQueries><<<grid, kThreads, 0, stream>>>(query, points, N, M, distance, idx);
    } else {
        const dim3 grid(divide_up(N, kThreads), B);
        three_nn<1><<<grid, kThreads, 0, stream>>>(query, points, N, M, distance, idx);
    }
    return cudaGetLastError();
}

int pn2_interpolate(const void* features, const int32_t* idx, const float* weight, int64_t B, int64_t C, int64_t M,
                    int64_t N, int dtype, void* out, intptr_t context) {
    if (B == 0 || C == 0 || N == 0) return 0;
    if (B > 65535) return cudaErrorInvalidValue;
    Device device;
    if (const int error = current_device(&device)) return error;
    const cudaStream_t stream = stream_of(context);
    return with_type(dtype, [&](auto type) -> int {
        using T = decltype(type);
        const T* from = static_cast<const T*>(features);
        T* to = static_cast<T*>(out);
        const int channels = M > 0 ? staged_channels(device, C, M) : 0;
        if (channels > 0 && N >= M) {  // else loading the rows costs more than the gathers
            const int bytes = channels * M * sizeof(float);
            const cudaError_t error = allow_shared(interpolate_staged<T>, bytes);
            if (error != cudaSuccess) return error;
            const int64_t chunks = divide_up(C, channels);
            const dim3 grid(splits_of(device, B * chunks, N), chunks, B);
            interpolate_staged<T><<<grid, 1024, bytes, stream>>>(from, idx, weight, C, M, N, channels, to);
        } else {
            const dim3 grid(divide_up(N, kThreads), divide_up(C, kChannels), B);
            interpolate_direct<T><<<grid, kThreads, 0, stream>>>(from, idx, weight, C, M, N, to);
        }
        return cudaGetLastError();
    });
}

int pn2_interpolate_backward(const void* grad, const void* features, const int32_t* idx, const float* weight,
                             int64_t B, int64_t C, int64_t M, int64_t N, int dtype, float* grad_features,
                             float* grad_weight, intptr_t context) {
    if (B == 0 || C == 0 || N == 0) return 0;
    if (B > 65535) return cudaErrorInvalidValue;
    Device device;
    if (const int error = current_device(&device)) return error;
    const cudaStream_t stream = stream_of(context);
    return with_type(dtype, [&](auto type) -> int {
        using T = decltype(type);
        const T* from = static_cast<const T*>(grad);
        if (grad_features != nullptr) {
            const int channels = M > 0 ? staged_channels(device, C, M) : 0;
            if (channels > 0 && N >= M) {
                const int bytes = channels * M * sizeof(float);
                const cudaError_t error = allow_shared(feature_gradient_staged<T>, bytes);
                if (error != cudaSuccess) return error;
                const int64_t chunks = divide_up(C, channels);
                const dim3 grid(splits_of(device, B * chunks, N), chunks, B);
                feature_gradient_staged<T>
                    <<<grid, 1024, bytes, stream>>>(from, idx, weight, C, M, N, channels, grad_features);
            } else {
                const dim3 grid(divide_up(N, kThreads), divide_up(C, kChannels), B);
                feature_gradient_direct<T>
                    <<<grid, kThreads, 0, stream>>>(from, idx, weight, C, M, N, grad_features);
            }
        }
        if (grad_weight != nullptr) {
            const dim3 grid(divide_up(N, kThreads), B);
            weight_gradient<T><<<grid, kThreads, 0, stream>>>(from, static_cast<const T*>(features), idx, C, M, N,
                                                              grad_weight);
        }
        return cudaGetLastError();
    });
}

}  // extern "C"
