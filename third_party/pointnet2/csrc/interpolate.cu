// Interpolation between three neighbours, and its gradients.
#include "common.cuh"

namespace pn2 {
namespace {

constexpr int kThreads = 256;
constexpr int kWideThreads = 1024;
constexpr int kChannels = 16;  // channels of a block, in groups of four that are read together

// A block keeps kChannels rows of features in shared memory, as float and with four channels side by side, so that
// one 16-byte read gathers four. The blocks of one scene and channel group share out the N positions.
template <typename T>
__global__ void __launch_bounds__(kWideThreads, 1)
    interpolate_staged(const T* features, const int32_t* idx, const float* weight, int64_t C, int64_t M, int64_t N,
                       int channels, T* out) {
    extern __shared__ float4 rows[];  // [channels / 4][M]
    const int64_t scene = blockIdx.z, first_channel = (int64_t)blockIdx.y * channels;
    const int groups = channels / 4;
    for (int group = 0; group < groups; ++group) {
        const int64_t channel = first_channel + 4 * group;
        const T* row = features + (scene * C + channel) * M;
#pragma unroll 2
        for (int64_t m = threadIdx.x; m < M; m += kWideThreads) {
            float4 four;
            four.x = channel < C ? to_float(row[m]) : 0.f;
            four.y = channel + 1 < C ? to_float(row[M + m]) : 0.f;
            four.z = channel + 2 < C ? to_float(row[2 * M + m]) : 0.f;
            four.w = channel + 3 < C ? to_float(row[3 * M + m]) : 0.f;
            rows[group * M + m] = four;
        }
    }
    __syncthreads();
    const int64_t step = (int64_t)gridDim.x * kWideThreads;
    for (int64_t n = (int64_t)blockIdx.x * kWideThreads + threadIdx.x; n < N; n += step) {
        const int64_t row = (scene * N + n) * 3;
        const int i0 = idx[row], i1 = idx[row + 1], i2 = idx[row + 2];
        const float w0 = weight[row], w1 = weight[row + 1], w2 = weight[row + 2];
        assert((unsigned)i0 < M && (unsigned)i1 < M && (unsigned)i2 < M && "an index lies outside the points");
        T* target = out + (scene * C + first_channel) * N + n;
#pragma unroll 1
        for (int group = 0; group < groups; ++group) {
            const float4* table = rows + group * M;
            const float4 a = table[i0], b = table[i1], c = table[i2];
            const float mixed[4] = {a.x * w0 + b.x * w1 + c.x * w2, a.y * w0 + b.y * w1 + c.y * w2,
                                    a.z * w0 + b.z * w1 + c.z * w2, a.w * w0 + b.w * w1 + c.w * w2};
#pragma unroll
            for (int j = 0; j < 4; ++j)
                if (first_channel + 4 * group + j < C) write_once(target + (4 * group + j) * N, from_float<T>(mixed[j]));
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
        const float mixed = to_float(table[i0]) * w0 + to_float(table[i1]) * w1 + to_float(table[i2]) * w2;
        write_once(out + (scene * C + channel) * N + n, from_float<T>(mixed));
    }
}

// Sums of the features' gradients, gathered in shared memory: [channels][M] floats a block.
template <typename T>
__global__ void __launch_bounds__(kWideThreads, 1)
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
#pragma unroll 1
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

// Blocks along N, each of which loads its rows anew: as many as keep the last round of blocks on the chip from being a
// small one. `rounds` times the work of a block is what the launch takes.
int splits_of(const Device& device, int64_t blocks, int64_t M, int64_t N) {
    const int64_t most = divide_up(N, kWideThreads);
    int64_t best = 1, least = INT64_MAX;
    for (int64_t splits = 1; splits <= most && splits <= 4 * (int64_t)device.processors; ++splits) {
        const int64_t rounds = divide_up(blocks * splits, device.processors);
        const int64_t cost = rounds * (divide_up(N, splits) + 2 * M);  // loading a row's element costs about two positions
        if (cost < least) least = cost, best = splits;
    }
    return best;
}

}  // namespace
}  // namespace pn2

using namespace pn2;

extern "C" {

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
            const cudaError_t error = allow_shared(interpolate_staged<T>, device.shared_bytes);
            if (error != cudaSuccess) return error;
            const int64_t chunks = divide_up(C, channels);
            const dim3 grid(splits_of(device, B * chunks, M, N), chunks, B);
            interpolate_staged<T><<<grid, kWideThreads, bytes, stream>>>(from, idx, weight, C, M, N, channels, to);
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
                const cudaError_t error = allow_shared(feature_gradient_staged<T>, device.shared_bytes);
                if (error != cudaSuccess) return error;
                const int64_t chunks = divide_up(C, channels);
                const dim3 grid(splits_of(device, B * chunks, M, N), chunks, B);
                feature_gradient_staged<T>
                    <<<grid, kWideThreads, bytes, stream>>>(from, idx, weight, C, M, N, channels, grad_features);
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
