// What the CUDA files share. Only CUDA's own headers are included anywhere here.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cassert>
#include <cstdint>
#include <mutex>

#include "pointnet2.h"

namespace pn2 {

constexpr unsigned kAllLanes = 0xffffffffu;

__host__ __device__ inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t align_up(int64_t bytes) { return (bytes + 255) / 256 * 256; }

inline cudaStream_t stream_of(intptr_t context) { return reinterpret_cast<cudaStream_t>(context); }

constexpr int kMaxDevices = 64;

struct Device {
    int index = 0, major = 0, processors = 0;
    int shared_bytes = 0;  // that a block may ask for
};

// Properties of the current device, asked once: cudaGetDeviceProperties takes milliseconds.
inline cudaError_t current_device(Device* found) {
    static Device known[kMaxDevices];
    static std::mutex writing;
    int index = 0;
    cudaError_t error = cudaGetDevice(&index);
    if (error != cudaSuccess) return error;
    if (index >= kMaxDevices) return cudaErrorInvalidDevice;
    const std::lock_guard<std::mutex> lock(writing);
    Device device = known[index];
    if (device.processors == 0) {
        device.index = index;
        if ((error = cudaDeviceGetAttribute(&device.major, cudaDevAttrComputeCapabilityMajor, index))) return error;
        if ((error = cudaDeviceGetAttribute(&device.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index)))
            return error;
        if ((error = cudaDeviceGetAttribute(&device.processors, cudaDevAttrMultiProcessorCount, index))) return error;
        known[index] = device;
    }
    *found = device;
    return cudaSuccess;
}

// Left to the variables that kernels declare in shared memory.
constexpr int kStaticShared = 2 * 1024;

// Shared memory beyond 48 KiB, the kernel's own variables included, has to be allowed first. What is allowed belongs to the
// kernel, not to the launch: where launches of one kernel differ, all of them allow the most there is (`shared_bytes`), as
// another thread may be between its two calls.
template <typename Kernel>
cudaError_t allow_shared(Kernel* kernel, int bytes) {
    if (bytes <= 48 * 1024 - kStaticShared) return cudaSuccess;
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

// (dx*dx + dy*dy) + dz*dz, rounded after each operation: the indices depend on it.
__device__ __forceinline__ float squared_distance(float ax, float ay, float az, float bx, float by, float bz) {
    const float dx = __fsub_rn(ax, bx), dy = __fsub_rn(ay, by), dz = __fsub_rn(az, bz);
    return __fadd_rn(__fadd_rn(__fmul_rn(dx, dx), __fmul_rn(dy, dy)), __fmul_rn(dz, dz));
}

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
    return value;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float value) {
    return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
    return __float2bfloat16_rn(value);
}

// Writes what this launch does not read again, so that it drives nothing out of the cache.
__device__ __forceinline__ void write_once(float* target, float value) { __stcs(target, value); }
__device__ __forceinline__ void write_once(__half* target, __half value) { __stcs(target, value); }
__device__ __forceinline__ void write_once(__nv_bfloat16* target, __nv_bfloat16 value) { __stcs(target, value); }

// Calls `body` with a value of the element type that `dtype` names.
template <typename Body>
int with_type(int dtype, Body body) {
    switch (dtype) {
        case PN2_FLOAT32: return body(float{});
        case PN2_FLOAT16: return body(__half{});
        case PN2_BFLOAT16: return body(__nv_bfloat16{});
        default: return cudaErrorInvalidValue;
    }
}

}  // namespace pn2
