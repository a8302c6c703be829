/* The order of a cloud's points along a Hilbert curve: quantised coordinates, keys, a radix sort.
 *
 * Cells that hold many points (a cluster in a wide cloud, one far outlier) are ordered again by a curve of their own.
 * A round divides the longest side by hundreds, so that there are few rounds for any float32 coordinates.
 */
#include "cpu_tree.h"

#include <numeric>
#include <utility>

namespace pn2 {
namespace {

constexpr int AXIS_BITS = 10, KEY_BITS = 3 * AXIS_BITS;
constexpr int DIGIT_BITS = 10, DIGITS = 1 << DIGIT_BITS, PASSES = KEY_BITS / DIGIT_BITS;
constexpr float LAST_CELL = (1 << AXIS_BITS) - 1;
constexpr int64_t CROWD = 256;      // points in one cell that are left in their order
constexpr int64_t FEW = 512;        // points below which clearing the radix sort's counters costs more than sorting

struct Frame {
    float low[3];
    float scale;  // cells a unit; 0 where all finite points are equal
};

Frame frame_of(const float* points, int64_t num) {
    constexpr float LARGEST = std::numeric_limits<float>::max();
    constexpr int LANES = 48;  // the lane of a number, modulo 3, is its axis
    float low[LANES], high[LANES];
    std::fill_n(low, LANES, LARGEST);
    std::fill_n(high, LANES, -LARGEST);
    const auto enclose = [&](const float* values, int lanes) {
        for (int lane = 0; lane < lanes; ++lane) {
            const float value = values[lane];
            const bool finite = value >= -LARGEST && value <= LARGEST;
            low[lane] = smaller(finite ? value : LARGEST, low[lane]);
            high[lane] = larger(finite ? value : -LARGEST, high[lane]);
        }
    };
    int64_t start = 0;
    for (; start + LANES <= 3 * num; start += LANES) enclose(points + start, LANES);
    enclose(points + start, static_cast<int>(3 * num - start));
    Frame frame{};
    double side = 0;
    for (int axis = 0; axis < 3; ++axis) {
        float top = -LARGEST;
        frame.low[axis] = LARGEST;
        for (int lane = axis; lane < LANES; lane += 3) {
            frame.low[axis] = smaller(low[lane], frame.low[axis]);
            top = larger(high[lane], top);
        }
        side = std::max(side, static_cast<double>(top) - static_cast<double>(frame.low[axis]));
    }
    const double scale = side > 0 ? static_cast<double>(LAST_CELL) / side : 0;
    frame.scale = scale <= static_cast<double>(LARGEST) ? static_cast<float>(scale) : 0.0f;
    return frame;
}

inline uint32_t cell_of(float value, float low, float scale) {
    float cell = (value - low) * scale;
    cell = cell < LAST_CELL ? cell : LAST_CELL;  // written so that what is not a number falls into a cell, too
    cell = cell > 0.0f ? cell : 0.0f;
    return static_cast<uint32_t>(static_cast<int32_t>(cell));
}

/* Moves each bit to three times its place. */
inline uint32_t spread(uint32_t bits) {
    bits = (bits | (bits << 16)) & 0x030000ffu;
    bits = (bits | (bits << 8)) & 0x0300f00fu;
    bits = (bits | (bits << 4)) & 0x030c30c3u;
    return (bits | (bits << 2)) & 0x09249249u;
}

/* Position on the Hilbert curve of a cell: J. Skilling, "Programming the Hilbert curve", AIP Conf. Proc. 707 (2004),
 * with masks in the place of branches so that many cells are computed at once. */
inline uint32_t hilbert_key(uint32_t x, uint32_t y, uint32_t z) {
    for (int bit = AXIS_BITS - 1; bit > 0; --bit) {
        const uint32_t below = (1u << bit) - 1;
        x ^= below & (0u - ((x >> bit) & 1u));
        const uint32_t set_y = 0u - ((y >> bit) & 1u), swap_y = (x ^ y) & below & ~set_y;
        x ^= (below & set_y) | swap_y;
        y ^= swap_y;
        const uint32_t set_z = 0u - ((z >> bit) & 1u), swap_z = (x ^ z) & below & ~set_z;
        x ^= (below & set_z) | swap_z;
        z ^= swap_z;
    }
    y ^= x;
    z ^= y;
    uint32_t flip = 0;
    for (int bit = AXIS_BITS - 1; bit > 0; --bit) flip ^= ((1u << bit) - 1) & (0u - ((z >> bit) & 1u));
    return (spread(x ^ flip) << 2) | (spread(y ^ flip) << 1) | spread(z ^ flip);
}

void sort_records(uint64_t* records, uint64_t* sorted, int64_t num) {
    if (num < FEW) {
        std::sort(records, records + num);  // the low half is the position, so this keeps the order of equal keys
        return;
    }
    uint32_t ends[PASSES][DIGITS] = {};
    for (int64_t i = 0; i < num; ++i)
        for (int pass = 0; pass < PASSES; ++pass) ++ends[pass][(records[i] >> (32 + pass * DIGIT_BITS)) % DIGITS];
    uint64_t* from = records;
    uint64_t* to = sorted;
    for (int pass = 0; pass < PASSES; ++pass) {
        uint32_t total = 0;
        for (uint32_t& end : ends[pass]) total += std::exchange(end, total);
        for (int64_t i = 0; i < num; ++i) to[ends[pass][(from[i] >> (32 + pass * DIGIT_BITS)) % DIGITS]++] = from[i];
        std::swap(from, to);
    }
    if (from != records) std::copy_n(from, num, records);
}

/* Sorts records (key, number) of points [num, 3] that are numbered in their order; false where all are equal. */
bool sort_along_curve(const float* points, int64_t num, CurveMemory& memory) {
    const Frame frame = frame_of(points, num);
    if (frame.scale == 0.0f) return false;
    uint64_t* records = memory.records.resize(num);
    for (int64_t i = 0; i < num; ++i) {
        const float* point = points + 3 * i;
        const uint32_t key =
            hilbert_key(cell_of(point[0], frame.low[0], frame.scale), cell_of(point[1], frame.low[1], frame.scale),
                        cell_of(point[2], frame.low[2], frame.scale));
        records[i] = static_cast<uint64_t>(key) << 32 | static_cast<uint64_t>(i);
    }
    sort_records(records, memory.sorted.resize(num), num);
    return true;
}

/* Notes the runs of equal keys that hold too many points; the first record is that of place `start`. */
void note_crowds(const uint64_t* records, int64_t start, int64_t num, CurveMemory& memory) {
    for (int64_t begin = 0; begin + CROWD < num;) {
        if (records[begin] >> 32 != records[begin + CROWD] >> 32) {
            ++begin;
            continue;
        }
        int64_t end = begin + CROWD;
        while (end < num && records[end] >> 32 == records[begin] >> 32) ++end;
        memory.crowded.emplace_back(start + begin, end - begin);
        begin = end;
    }
}

}  // namespace

void curve_order(const float* points, int64_t num, int32_t* order, CurveMemory& memory) {
    memory.crowded.clear();
    if (!sort_along_curve(points, num, memory)) {
        std::iota(order, order + num, 0);
        return;
    }
    for (int64_t i = 0; i < num; ++i) order[i] = static_cast<int32_t>(memory.records.get()[i] & 0xffffffffu);
    note_crowds(memory.records.get(), 0, num, memory);
    while (!memory.crowded.empty()) {
        const auto [start, count] = memory.crowded.back();
        memory.crowded.pop_back();
        int32_t* chosen = memory.chosen.resize(count);
        float* crowd = memory.points.resize(3 * count);
        std::copy_n(order + start, count, chosen);
        for (int64_t i = 0; i < count; ++i) std::copy_n(points + 3 * static_cast<int64_t>(chosen[i]), 3, crowd + 3 * i);
        if (!sort_along_curve(crowd, count, memory)) continue;
        const uint64_t* records = memory.records.get();
        for (int64_t i = 0; i < count; ++i) order[start + i] = chosen[records[i] & 0xffffffffu];
        note_crowds(records, start, count, memory);
    }
}

}  // namespace pn2
