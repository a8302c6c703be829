/* Neighbourhoods of a set abstraction, offsets and features side by side, and their gradients. */
#include "cpu_common.h"

namespace pn2 {
namespace {

template <class T>
void offsets(const float* points, const float* centers, const T* features, const int32_t* idx, int64_t B, int64_t N,
             int64_t M, int64_t K, int64_t F, float radius, T* out, intptr_t threads) {
    parallel_for(B * M, threads, grain_of(K * (3 + F)), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            const int64_t scene = row / M;
            const float* centre = centers + row * 3;
            T* to = out + row * K * (3 + F);
            for (int64_t k = row * K; k < (row + 1) * K; ++k, to += 3 + F) {
                const int64_t point = scene * N + idx[k];
                for (int axis = 0; axis < 3; ++axis)
                    to[axis] = from_float<T>((points[point * 3 + axis] - centre[axis]) / radius);
                if (F > 0) std::memcpy(to + 3, features + point * F, static_cast<size_t>(F) * sizeof(T));
            }
        }
    });
}

/* Sums of the points that many neighbourhoods share: every thread owns ranges of points and reads all indices, so that
 * each sum is taken in the order of positions. */
template <class T>
void add_to_points(const T* grad, const int32_t* idx, int64_t B, int64_t N, int64_t P, int64_t F, float radius,
                   float* grad_points, float* grad_features, intptr_t threads) {
    const int64_t wanted = threads > 1 && B > 0 ? (2 * threads + B - 1) / B : 1;  // ranges of a scene
    const int64_t ranges = std::max<int64_t>(1, std::min(wanted, N)), length = (N + ranges - 1) / ranges;
    parallel_for(B * ranges, threads, 1, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
            const int64_t scene = task / ranges, low = task % ranges * length, high = std::min(N, low + length);
            for (int64_t p = scene * P; p < (scene + 1) * P; ++p) {
                if (idx[p] < low || idx[p] >= high) continue;
                const T* from = grad + p * (3 + F);
                const int64_t point = scene * N + idx[p];
                if (grad_points != nullptr)
                    for (int axis = 0; axis < 3; ++axis) grad_points[point * 3 + axis] += to_float(from[axis]) / radius;
                if (grad_features != nullptr) {
                    float* to = grad_features + point * F;
                    for (int64_t f = 0; f < F; ++f) to[f] += to_float(from[3 + f]);
                }
            }
        }
    });
}

template <class T>
void add_to_centers(const T* grad, int64_t rows, int64_t K, int64_t F, float radius, float* grad_centers,
                    intptr_t threads) {
    parallel_for(rows, threads, grain_of(K * 3), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            float sum[3] = {};
            for (int64_t k = row * K; k < (row + 1) * K; ++k)
                for (int axis = 0; axis < 3; ++axis) sum[axis] += to_float(grad[k * (3 + F) + axis]) / radius;
            for (int axis = 0; axis < 3; ++axis) grad_centers[row * 3 + axis] -= sum[axis];
        }
    });
}

}  // namespace
}  // namespace pn2

extern "C" {

int pn2_group_offsets(const float* points, const float* centers, const void* features, const int32_t* idx, int64_t B,
                      int64_t N, int64_t M, int64_t K, int64_t F, float radius, int dtype, void* out,
                      intptr_t context) {
    using namespace pn2;
    return guarded([&]() -> int {
        if (!indices_fit(idx, B * M * K, N, context)) return BAD_INDEX;
        return with_type(dtype, [&](auto type) {
            using T = decltype(type);
            offsets(points, centers, static_cast<const T*>(features), idx, B, N, M, K, F, radius, static_cast<T*>(out),
                    context);
            return OK;
        });
    });
}

int pn2_group_offsets_backward(const void* grad, const int32_t* idx, int64_t B, int64_t N, int64_t M, int64_t K,
                               int64_t F, float radius, int dtype, float* grad_points, float* grad_centers,
                               float* grad_features, intptr_t context) {
    using namespace pn2;
    return guarded([&]() -> int {
        if (!indices_fit(idx, B * M * K, N, context)) return BAD_INDEX;
        return with_type(dtype, [&](auto type) {
            const auto* given = static_cast<const decltype(type)*>(grad);
            if (grad_points != nullptr || grad_features != nullptr)
                add_to_points(given, idx, B, N, M * K, F, radius, grad_points, grad_features, context);
            if (grad_centers != nullptr) add_to_centers(given, B * M, K, F, radius, grad_centers, context);
            return OK;
        });
    });
}

}  // extern "C"
