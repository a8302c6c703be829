/* A cloud cut into small leaves along a space-filling curve, with boxes in groups of sixteen above them.
 *
 * Points near each other on the curve are near each other in space, so that runs of points make compact leaves. All
 * is kept as structures of arrays of fixed length, which compilers turn into vector instructions.
 *
 * The lower bound of the distances from a place to the points in a box takes the same float32 operations in the same
 * order as a distance. Rounding is monotone, so that it never exceeds any distance computed, and what it prunes cannot
 * change a result.
 */
#pragma once
#if defined(__AVX__) || defined(__SSE__)
#include <immintrin.h>
#endif

#include <limits>
#include <memory>
#include <utility>

#include "cpu_common.h"

namespace pn2 {

constexpr int LEAF_SIZE = 32;
constexpr int FAN = 16;  // children of a group
constexpr float INFINITE = std::numeric_limits<float>::infinity();
constexpr int32_t NO_POINT = std::numeric_limits<int32_t>::max();

struct Place {
    float x, y, z;
};

/* An array that grows, never keeps its content on growing, and is not cleared. */
template <class T>
class Buffer {
  public:
    T* resize(int64_t size) {
        if (size > capacity_) {
            data_.reset();
            capacity_ = 0;
            data_.reset(new T[static_cast<size_t>(size)]);
            capacity_ = size;
        }
        return data_.get();
    }
    T* get() const { return data_.get(); }

  private:
    std::unique_ptr<T[]> data_;
    int64_t capacity_ = 0;
};

/* Working memory of `curve_order`; kept, it saves allocations from one cloud to the next. */
struct CurveMemory {
    Buffer<float> points;
    Buffer<int32_t> chosen;
    Buffer<uint64_t> records, sorted;
    std::vector<std::pair<int64_t, int64_t>> crowded;
};

/* Writes the indices of points [num, 3] in the order of a Hilbert curve; equal points keep their order. */
void curve_order(const float* points, int64_t num, int32_t* order, CurveMemory& memory);

/* The boxes of sixteen leaves or groups, and the lowest index of a point in each. Slots without a child have an
 * infinite lower bound from every finite place. */
struct alignas(64) Group {
    float low[3][FAN], high[3][FAN];
    int32_t first[FAN];
};

struct alignas(64) Leaf {
    float x[LEAF_SIZE], y[LEAF_SIZE], z[LEAF_SIZE];  // infinite in the slots after the last point
    int32_t index[LEAF_SIZE];                        // NO_POINT there
};

inline float larger(float a, float b) { return a > b ? a : b; }
inline float smaller(float a, float b) { return a < b ? a : b; }

inline float squared_distance(float x, float y, float z, const Place& from) {
    const float dx = x - from.x, dy = y - from.y, dz = z - from.z;
    return (dx * dx + dy * dy) + dz * dz;
}

/* Squared distances [LEAF_SIZE] of the leaf's slots. */
inline void distances(const Leaf& leaf, const Place& from, float* distance) {
    for (int i = 0; i < LEAF_SIZE; ++i) distance[i] = squared_distance(leaf.x[i], leaf.y[i], leaf.z[i], from);
}

/* Bounds [FAN] that no squared distance from the place to a point of that child falls below. */
inline void lower_bounds(const Group& group, const Place& from, float* bound) {
    for (int slot = 0; slot < FAN; ++slot) {
        const float dx = larger(larger(group.low[0][slot] - from.x, from.x - group.high[0][slot]), 0.0f);
        const float dy = larger(larger(group.low[1][slot] - from.y, from.y - group.high[1][slot]), 0.0f);
        const float dz = larger(larger(group.low[2][slot] - from.z, from.z - group.high[2][slot]), 0.0f);
        bound[slot] = (dx * dx + dy * dy) + dz * dz;
    }
}

/* The lanes, as bits, whose value is below the limit, or at most the limit. Compilers have no good way of their own
 * from comparisons to bits. */
template <int COUNT, bool INCLUSIVE>
uint32_t lanes_within(const float* values, float limit) {
    static_assert(COUNT % 16 == 0 && COUNT <= 32, "");
    uint32_t lanes = 0;
#if defined(__AVX512F__)
    for (int i = 0; i < COUNT; i += 16) {
        constexpr int TEST = INCLUSIVE ? _CMP_LE_OQ : _CMP_LT_OQ;
        const __mmask16 part = _mm512_cmp_ps_mask(_mm512_loadu_ps(values + i), _mm512_set1_ps(limit), TEST);
        lanes |= static_cast<uint32_t>(part) << i;
    }
#elif defined(__AVX__)
    for (int i = 0; i < COUNT; i += 8) {
        constexpr int TEST = INCLUSIVE ? _CMP_LE_OQ : _CMP_LT_OQ;
        const __m256 part = _mm256_cmp_ps(_mm256_loadu_ps(values + i), _mm256_set1_ps(limit), TEST);
        lanes |= static_cast<uint32_t>(_mm256_movemask_ps(part)) << i;
    }
#elif defined(__SSE__)
    for (int i = 0; i < COUNT; i += 4) {
        const __m128 four = _mm_loadu_ps(values + i), bound = _mm_set1_ps(limit);
        const __m128 part = INCLUSIVE ? _mm_cmple_ps(four, bound) : _mm_cmplt_ps(four, bound);
        lanes |= static_cast<uint32_t>(_mm_movemask_ps(part)) << i;
    }
#else
    for (int i = 0; i < COUNT; ++i)
        lanes |= static_cast<uint32_t>(INCLUSIVE ? values[i] <= limit : values[i] < limit) << i;
#endif
    return lanes;
}

class Tree {
  public:
    /* Of points [num, 3], num >= 1. Memory of an earlier, larger cloud is used again. */
    void build(const float* points, int64_t num, CurveMemory& memory) {
        int32_t* order = order_.resize(num);
        curve_order(points, num, order, memory);
        num_leaves_ = (num + LEAF_SIZE - 1) / LEAF_SIZE;
        leaves_.resize(num_leaves_);
        offsets_.clear();
        int64_t num_groups = 0;
        for (int64_t children = num_leaves_; offsets_.empty() || children > 1;) {
            offsets_.push_back(num_groups);
            children = (children + FAN - 1) / FAN;
            num_groups += children;
        }
        groups_.resize(num_groups);
        num_groups_ = num_groups;
        for (int64_t leaf = 0; leaf < num_leaves_; ++leaf)
            fill_leaf(points, order + leaf * LEAF_SIZE, std::min<int64_t>(LEAF_SIZE, num - leaf * LEAF_SIZE), leaf);
        finish_level(0, num_leaves_);
        for (int level = 1; level <= top_level(); ++level) {
            const int64_t children = offsets_[level] - offsets_[level - 1];
            for (int64_t child = 0; child < children; ++child) enclose_group(level, child);
            finish_level(level, children);
        }
    }

    int64_t num_leaves() const { return num_leaves_; }
    int64_t num_groups() const { return num_groups_; }
    /* The level of the root; groups of level 0 hold leaves. */
    int top_level() const { return static_cast<int>(offsets_.size()) - 1; }
    /* Where the level's groups begin among all; child c of its group g is leaf, or group of the level below, g * FAN + c. */
    int64_t offset(int level) const { return offsets_[level]; }
    const Group& group(int64_t place) const { return groups_.get()[place]; }
    const Leaf& leaf(int64_t number) const { return leaves_.get()[number]; }

  private:
    Group& slot_of(int level, int64_t child) { return groups_.get()[offsets_[level] + child / FAN]; }

    void fill_leaf(const float* points, const int32_t* order, int64_t count, int64_t number) {
        Leaf& leaf = leaves_.get()[number];
        for (int i = 0; i < LEAF_SIZE; ++i) {
            const int32_t index = order[i < count ? i : 0];
            const float* point = points + 3 * static_cast<int64_t>(index);
            leaf.x[i] = point[0];
            leaf.y[i] = point[1];
            leaf.z[i] = point[2];
            leaf.index[i] = index;
        }
        Group& group = slot_of(0, number);
        const int slot = static_cast<int>(number % FAN);
        const float* axes[3] = {leaf.x, leaf.y, leaf.z};
        for (int axis = 0; axis < 3; ++axis) enclose<LEAF_SIZE>(axes[axis], axes[axis], group, axis, slot);
        group.first[slot] = *std::min_element(leaf.index, leaf.index + LEAF_SIZE);
        for (int64_t i = count; i < LEAF_SIZE; ++i) {
            leaf.x[i] = leaf.y[i] = leaf.z[i] = INFINITE;
            leaf.index[i] = NO_POINT;
        }
    }

    void enclose_group(int level, int64_t child) {
        const Group& inner = groups_.get()[offsets_[level - 1] + child];
        Group& outer = slot_of(level, child);
        const int slot = static_cast<int>(child % FAN);
        for (int axis = 0; axis < 3; ++axis) enclose<FAN>(inner.low[axis], inner.high[axis], outer, axis, slot);
        outer.first[slot] = *std::min_element(inner.first, inner.first + FAN);
    }

    /* Halves the arrays until one value is left: the compiler may not reorder a plain running minimum of floats. What
     * is not a number stays outside, as nothing is ever near it. */
    template <int COUNT>
    static void enclose(const float* low_values, const float* high_values, Group& group, int axis, int slot) {
        float low[COUNT], high[COUNT];
        for (int i = 0; i < COUNT; ++i) {
            low[i] = low_values[i] <= INFINITE ? low_values[i] : INFINITE;
            high[i] = high_values[i] >= -INFINITE ? high_values[i] : -INFINITE;
        }
        for (int half = COUNT / 2; half > 0; half /= 2) {
            for (int i = 0; i < half; ++i) {
                low[i] = smaller(low[i], low[i + half]);
                high[i] = larger(high[i], high[i + half]);
            }
        }
        group.low[axis][slot] = low[0];
        group.high[axis][slot] = high[0];
    }

    /* Slots of a level's last group that have no child. */
    void finish_level(int level, int64_t children) {
        for (int64_t child = children; child % FAN != 0; ++child) {
            Group& group = slot_of(level, child);
            const int64_t slot = child % FAN;
            for (int axis = 0; axis < 3; ++axis) {
                group.low[axis][slot] = INFINITE;
                group.high[axis][slot] = -INFINITE;
            }
            group.first[slot] = NO_POINT;
        }
    }

    int64_t num_leaves_ = 0, num_groups_ = 0;
    std::vector<int64_t> offsets_;
    Buffer<int32_t> order_;
    Buffer<Leaf> leaves_;
    Buffer<Group> groups_;
};

}  // namespace pn2
