/* The library's own functions, and the check of indices. The operations: cpu_sample.cpp, cpu_neighbours.cpp,
 * cpu_group.cpp, cpu_interpolate.cpp, cpu_offsets.cpp. */
#include "cpu_common.h"

namespace pn2 {

bool indices_fit(const int32_t* idx, int64_t count, int64_t limit, intptr_t threads) {
    // Negative ones become the largest numbers.
    const uint32_t bound = static_cast<uint32_t>(std::min<int64_t>(limit, int64_t{1} << 31));
    std::atomic<bool> fit{true};
    parallel_for(count, threads, grain_of(1) * 4, [&](int64_t begin, int64_t end) {
        uint32_t outside = 0;
        for (int64_t i = begin; i < end; ++i) outside |= static_cast<uint32_t>(idx[i]) >= bound;
        if (outside) fit = false;
    });
    return fit;
}

}  // namespace pn2

extern "C" {

int pn2_interface(void) { return PN2_INTERFACE; }

const char* pn2_error(int code) {
    switch (code) {
        case pn2::OK:
            return "no error";
        case pn2::NO_MEMORY:
            return "not enough memory";
        case pn2::BAD_INDEX:
            return "an index lies outside the points";
        case pn2::BAD_TYPE:
            return "the element type is not one of float32, float16 and bfloat16, or its size not 1, 2, 4 or 8 bytes";
        default:
            return "the C++ library failed";
    }
}

int pn2_usable(int) { return pn2::OK; }

}  // extern "C"
