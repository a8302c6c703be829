/* What the parts of the CPU library share: return codes, worker threads, half-precision numbers. */
#pragma once
#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#include "pointnet2.h"

namespace pn2 {

enum Code { OK = 0, NO_MEMORY = 1, BAD_INDEX = PN2_BAD_INDEX, BAD_TYPE = 3, FAILED = 4 };

/* The result of `body`, which returns a code; exceptions become codes, as none may cross the C interface. */
template <class Body>
int guarded(const Body& body) noexcept {
    try {
        return body();
    } catch (const std::bad_alloc&) {
        return NO_MEMORY;
    } catch (...) {
        return FAILED;
    }
}

/* Calls body(begin, end) on ranges that cover [0, count) once, on at most `threads` threads, this one included.
 *
 * Ranges hold `grain` items (the last one fewer), or all items where one thread does the work. Which thread takes
 * which range is left to chance, so a body writes only what belongs to its items. Rethrows what a body throws. */
template <class Body>
void parallel_for(int64_t count, intptr_t threads, int64_t grain, const Body& body) {
    const int64_t chunks = (count + grain - 1) / grain;
    if (threads <= 1 || chunks <= 1) {
        if (count > 0) body(int64_t{0}, count);
        return;
    }
    std::atomic<int64_t> next{0};
    std::exception_ptr failure;
    std::mutex failure_lock;
    const auto work = [&]() noexcept {
        try {
            for (int64_t chunk = next++; chunk < chunks; chunk = next++)
                body(chunk * grain, std::min(count, (chunk + 1) * grain));
        } catch (...) {
            const std::lock_guard<std::mutex> hold(failure_lock);
            failure = std::current_exception();
            next = chunks;
        }
    };
    const size_t extra = static_cast<size_t>(std::min<int64_t>(threads, chunks) - 1);
    std::vector<std::thread> workers;
    workers.reserve(extra);
    try {
        while (workers.size() < extra) workers.emplace_back(work);
    } catch (const std::exception&) {
        // The system has no thread left to give: those that run share the work, and the result is the same.
    }
    work();
    for (std::thread& worker : workers) worker.join();
    if (failure) std::rethrow_exception(failure);
}

/* Items of `cost` elementary steps each that are worth a thread's while. */
inline int64_t grain_of(int64_t cost) { return std::max<int64_t>(1, (int64_t{1} << 16) / std::max<int64_t>(1, cost)); }

/* Whether all indices lie in [0, limit). */
bool indices_fit(const int32_t* idx, int64_t count, int64_t limit, intptr_t threads);

inline int32_t bits_of(float value) {
    int32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

struct Half {
    uint16_t bits;
};

struct BFloat16 {
    uint16_t bits;
};

inline float to_float(float value) { return value; }

inline float to_float(BFloat16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }

/* Works on bits, as not every compiler knows the type; no step takes or gives a subnormal float, which a caller may
 * have told the processor to flush to zero. */
inline float to_float(Half value) {
    const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fffu) << 13;
    const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
    const uint32_t normal = magnitude + (112u << 23);
    const uint32_t special = magnitude + (224u << 23);  // infinity, not a number
    const uint32_t subnormal = static_cast<uint32_t>(bits_of(float_of(magnitude + (113u << 23)) - float_of(113u << 23)));
    const uint32_t small = magnitude < (1u << 23) ? subnormal : normal;
    return float_of((magnitude >= (31u << 23) ? special : small) | sign);
}

template <class T>
T from_float(float value);

template <>
inline float from_float<float>(float value) {
    return value;
}

template <>
inline BFloat16 from_float<BFloat16>(float value) {
    const uint32_t bits = static_cast<uint32_t>(bits_of(value));
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
    const bool number = (bits & 0x7fffffffu) <= 0x7f800000u;
    return {static_cast<uint16_t>(number ? rounded : (bits >> 16) | 0x40u)};
}

template <>
inline Half from_float<Half>(float value) {
    const uint32_t bits = static_cast<uint32_t>(bits_of(value));
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // Adding one half aligns the last bit of a subnormal result with that of the sum, which rounds to nearest even.
    const uint32_t aligned = static_cast<uint32_t>(bits_of(float_of(magnitude) + 0.5f)) - (126u << 23);
    const uint32_t small = magnitude < (113u << 23) ? aligned : normal;
    const uint32_t large = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    return {static_cast<uint16_t>((magnitude >= (143u << 23) ? large : small) | sign)};
}

/* body(T{}) for the element type that `dtype` names. */
template <class Body>
int with_type(int dtype, const Body& body) {
    switch (dtype) {
        case PN2_FLOAT32:
            return body(float{});
        case PN2_FLOAT16:
            return body(Half{});
        case PN2_BFLOAT16:
            return body(BFloat16{});
        default:
            return BAD_TYPE;
    }
}

}  // namespace pn2
