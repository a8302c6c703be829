/* Gathers of feature rows and their gradient. A row is one channel of one scene; each row is written by one thread, in
 * the order of positions, so that sums are the same for any number of threads. */
#include "cpu_common.h"

namespace pn2 {
namespace {

constexpr int64_t BLOCK = 4;  // channels in one pass: the indices are read once, and sums of one do not wait for another

template <class T>
void gather(const T* features, const int32_t* idx, int64_t B, int64_t C, int64_t N, int64_t P, T* out,
            intptr_t threads) {
    parallel_for(B * C, threads, grain_of(P), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            const T* from = features + row * N;
            const int32_t* at = idx + row / C * P;
            T* to = out + row * P;
            for (int64_t p = 0; p < P; ++p) to[p] = from[at[p]];
        }
    });
}

template <class T, int64_t ROWS>
void add_rows(const T* grad, const int32_t* idx, int64_t N, int64_t P, float* sums) {
    for (int64_t p = 0; p < P; ++p)
        for (int64_t row = 0; row < ROWS; ++row) sums[row * N + idx[p]] += to_float(grad[row * P + p]);
}

template <class T>
void scatter(const T* grad, const int32_t* idx, int64_t B, int64_t C, int64_t N, int64_t P, float* sums,
             intptr_t threads) {
    const int64_t blocks = (C + BLOCK - 1) / BLOCK;  // of one scene
    parallel_for(B * blocks, threads, grain_of(P * BLOCK), [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block) {
            const int64_t scene = block / blocks, first = block % blocks * BLOCK, row = scene * C + first;
            const int32_t* at = idx + scene * P;
            if (first + BLOCK <= C) {
                add_rows<T, BLOCK>(grad + row * P, at, N, P, sums + row * N);
                continue;
            }
            for (int64_t last = row; last < (scene + 1) * C; ++last)
                add_rows<T, 1>(grad + last * P, at, N, P, sums + last * N);
        }
    });
}

template <class T>
int gather_elements(const void* features, const int32_t* idx, int64_t B, int64_t C, int64_t N, int64_t P, void* out,
                    intptr_t threads) {
    gather(static_cast<const T*>(features), idx, B, C, N, P, static_cast<T*>(out), threads);
    return OK;
}

}  // namespace
}  // namespace pn2

extern "C" {

int pn2_group(const void* features, const int32_t* idx, int64_t B, int64_t C, int64_t N, int64_t P, int element_size,
              void* out, intptr_t context) {
    using namespace pn2;
    return guarded([&]() -> int {
        if (!indices_fit(idx, B * P, N, context)) return BAD_INDEX;
        switch (element_size) {
            case 1:
                return gather_elements<uint8_t>(features, idx, B, C, N, P, out, context);
            case 2:
                return gather_elements<uint16_t>(features, idx, B, C, N, P, out, context);
            case 4:
                return gather_elements<uint32_t>(features, idx, B, C, N, P, out, context);
            case 8:
                return gather_elements<uint64_t>(features, idx, B, C, N, P, out, context);
            default:
                return BAD_TYPE;
        }
    });
}

int pn2_group_backward(const void* grad, const int32_t* idx, int64_t B, int64_t C, int64_t N, int64_t P, int dtype,
                       float* sums, intptr_t context) {
    using namespace pn2;
    return guarded([&]() -> int {
        if (!indices_fit(idx, B * P, N, context)) return BAD_INDEX;
        return with_type(dtype, [&](auto type) {
            scatter(static_cast<const decltype(type)*>(grad), idx, B, C, N, P, sums, context);
            return OK;
        });
    });
}

}  // extern "C"
