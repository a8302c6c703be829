/* Interpolation from three neighbours and its gradients. Every output element is summed by one thread in a fixed order,
 * so that results are the same for any number of threads. */
#include <memory>

#include "cpu_common.h"

namespace pn2 {
namespace {

constexpr int64_t CHUNK = 1024;  // queries whose neighbours stay in cache while all channels are computed
constexpr int64_t BLOCK = 4;     // channels in one pass over the neighbours: sums of one do not wait for another

/* The neighbours of up to CHUNK queries, taken apart so that loops over them become vector instructions. */
struct Neighbours {
    int32_t index[3][CHUNK];
    float weight[3][CHUNK];

    void read(const int32_t* idx, const float* weights, int64_t count) {
        for (int64_t j = 0; j < count; ++j) {
            for (int64_t k = 0; k < 3; ++k) {
                index[k][j] = idx[3 * j + k];
                weight[k][j] = weights[3 * j + k];
            }
        }
    }
};

/* Rows [rows, width] as float32: themselves, or a converted copy that `memory` holds. */
inline const float* in_float32(const float* values, int64_t, int64_t, std::unique_ptr<float[]>&, intptr_t) {
    return values;
}

template <class T>
const float* in_float32(const T* values, int64_t rows, int64_t width, std::unique_ptr<float[]>& memory,
                        intptr_t threads) {
    memory.reset(new float[static_cast<size_t>(rows * width)]);
    float* converted = memory.get();
    parallel_for(rows * width, threads, grain_of(1), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) converted[i] = to_float(values[i]);
    });
    return converted;
}

/* Calls body(scene, first query, number of queries, neighbours) for every chunk of every scene. */
template <class Body>
void for_chunks(const int32_t* idx, const float* weight, int64_t B, int64_t C, int64_t N, intptr_t threads,
                const Body& body) {
    const int64_t chunks = (N + CHUNK - 1) / CHUNK;
    parallel_for(B * chunks, threads, grain_of(CHUNK * C), [&](int64_t begin, int64_t end) {
        const std::unique_ptr<Neighbours> near(new Neighbours);
        for (int64_t chunk = begin; chunk < end; ++chunk) {
            const int64_t scene = chunk / chunks, first = chunk % chunks * CHUNK, count = std::min(CHUNK, N - first);
            near->read(idx + (scene * N + first) * 3, weight + (scene * N + first) * 3, count);
            body(scene, first, count, *near);
        }
    });
}

template <class T>
void interpolate(const T* features, const int32_t* idx, const float* weight, int64_t B, int64_t C, int64_t M,
                 int64_t N, T* out, intptr_t threads) {
    std::unique_ptr<float[]> memory;
    const float* exact = in_float32(features, B * C, M, memory, threads);
    for_chunks(idx, weight, B, C, N, threads,
               [&](int64_t scene, int64_t first, int64_t count, const Neighbours& near) {
                   for (int64_t row = scene * C; row < (scene + 1) * C; ++row) {
                       const float* from = exact + row * M;
                       T* to = out + row * N + first;
                       for (int64_t j = 0; j < count; ++j)
                           to[j] = from_float<T>((from[near.index[0][j]] * near.weight[0][j] +
                                                  from[near.index[1][j]] * near.weight[1][j]) +
                                                 from[near.index[2][j]] * near.weight[2][j]);
                   }
               });
}

template <class T, int64_t ROWS>
void add_rows(const T* grad, const int32_t* idx, const float* weight, int64_t M, int64_t N, float* sums) {
    for (int64_t n = 0; n < N; ++n)
        for (int64_t row = 0; row < ROWS; ++row) {
            const float value = to_float(grad[row * N + n]);
            for (int64_t k = 3 * n; k < 3 * n + 3; ++k) sums[row * M + idx[k]] += value * weight[k];
        }
}

template <class T>
void add_to_features(const T* grad, const int32_t* idx, const float* weight, int64_t B, int64_t C, int64_t M,
                     int64_t N, float* sums, intptr_t threads) {
    const int64_t blocks = (C + BLOCK - 1) / BLOCK;  // of one scene
    parallel_for(B * blocks, threads, grain_of(N * BLOCK), [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block) {
            const int64_t scene = block / blocks, first = block % blocks * BLOCK, row = scene * C + first;
            const int32_t* at = idx + scene * N * 3;
            const float* by = weight + scene * N * 3;
            if (first + BLOCK <= C) {
                add_rows<T, BLOCK>(grad + row * N, at, by, M, N, sums + row * M);
                continue;
            }
            for (int64_t last = row; last < (scene + 1) * C; ++last)
                add_rows<T, 1>(grad + last * N, at, by, M, N, sums + last * M);
        }
    });
}

template <class T>
void add_to_weights(const T* grad, const T* features, const int32_t* idx, const float* weight, int64_t B, int64_t C,
                    int64_t M, int64_t N, float* sums, intptr_t threads) {
    std::unique_ptr<float[]> memory;
    const float* exact = in_float32(features, B * C, M, memory, threads);
    for_chunks(idx, weight, B, C, N, threads,
               [&](int64_t scene, int64_t first, int64_t count, const Neighbours& near) {
                   float total[3][CHUNK] = {};
                   for (int64_t row = scene * C; row < (scene + 1) * C; ++row) {
                       const float* from = exact + row * M;
                       const T* given = grad + row * N + first;
                       for (int64_t j = 0; j < count; ++j) {
                           const float value = to_float(given[j]);
                           for (int k = 0; k < 3; ++k) total[k][j] += value * from[near.index[k][j]];
                       }
                   }
                   for (int64_t j = 0; j < count; ++j)
                       for (int k = 0; k < 3; ++k) sums[(scene * N + first + j) * 3 + k] += total[k][j];
               });
}

}  // namespace
}  // namespace pn2

extern "C" {

int pn2_interpolate(const void* features, const int32_t* idx, const float* weight, int64_t B, int64_t C, int64_t M,
                    int64_t N, int dtype, void* out, intptr_t context) {
    using namespace pn2;
    return guarded([&]() -> int {
        if (!indices_fit(idx, B * N * 3, M, context)) return BAD_INDEX;
        return with_type(dtype, [&](auto type) {
            using T = decltype(type);
            interpolate(static_cast<const T*>(features), idx, weight, B, C, M, N, static_cast<T*>(out), context);
            return OK;
        });
    });
}

int pn2_interpolate_backward(const void* grad, const void* features, const int32_t* idx, const float* weight,
                             int64_t B, int64_t C, int64_t M, int64_t N, int dtype, float* grad_features,
                             float* grad_weight, intptr_t context) {
    using namespace pn2;
    return guarded([&]() -> int {
        if (!indices_fit(idx, B * N * 3, M, context)) return BAD_INDEX;
        return with_type(dtype, [&](auto type) {
            using T = decltype(type);
            const T* given = static_cast<const T*>(grad);
            if (grad_weight != nullptr)  // first: it alone can run out of memory, and then nothing may be computed
                add_to_weights(given, static_cast<const T*>(features), idx, weight, B, C, M, N, grad_weight, context);
            if (grad_features != nullptr)
                add_to_features(given, idx, weight, B, C, M, N, grad_features, context);
            return OK;
        });
    });
}

}  // extern "C"
