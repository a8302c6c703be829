/* Ball query and three nearest neighbours: walks down the tree that skip what lies too far away.
 *
 * Centres and queries are walked in the order of a curve of their own, so that one walk finds in cache what the last
 * one read, and three_nn starts from a bound that its predecessor's neighbours give.
 */
#include "cpu_tree.h"

#include <cmath>

namespace pn2 {
namespace {

inline bool finite(const Place& place) {
    return std::isfinite(place.x) && std::isfinite(place.y) && std::isfinite(place.z);
}

inline Place place_of(const float* points, int64_t number) {
    const float* point = points + 3 * number;
    return {point[0], point[1], point[2]};
}

/* Keeps the lowest indices of the hits it is given, in any order. */
class Hits {
  public:
    static constexpr int LANES = 16;
    static constexpr int64_t FEW = 96;  // hits that are sorted faster by counting the lower ones of each

    explicit Hits(int64_t wanted) : wanted_(wanted), capacity_(wanted * 2 + 64), found_(new int32_t[capacity_ + LANES]) {}

    void clear() {
        count_ = 0;
        limit_ = NO_POINT;
    }
    /* Only lower indices are still wanted. */
    int32_t limit() const { return limit_; }

    void add(int32_t index) {
        found_[count_] = index;
        count_ += index < limit_;
        if (count_ == capacity_) keep_wanted();
    }

    /* Writes `wanted` indices, ascending, padded with the first; zeros without a hit. */
    void write(int32_t* idx) {
        if (count_ > wanted_) keep_wanted();
        if (count_ <= FEW) {
            write_ranked(idx);
        } else {
            std::sort(found_.get(), found_.get() + count_);
            std::copy_n(found_.get(), count_, idx);
        }
        std::fill(idx + count_, idx + wanted_, count_ ? idx[0] : 0);
    }

  private:
    void write_ranked(int32_t* idx) {
        std::fill_n(found_.get() + count_, LANES, NO_POINT);  // the last lanes are computed, but not written
        for (int64_t start = 0; start < count_; start += LANES) {
            const int32_t* some = found_.get() + start;
            int32_t rank[LANES] = {};
            for (int64_t i = 0; i < count_; ++i)
                for (int lane = 0; lane < LANES; ++lane) rank[lane] += found_[i] < some[lane];
            const int64_t lanes = std::min<int64_t>(LANES, count_ - start);
            for (int64_t lane = 0; lane < lanes; ++lane) idx[rank[lane]] = some[lane];
        }
    }

    void keep_wanted() {
        std::nth_element(found_.get(), found_.get() + wanted_ - 1, found_.get() + count_);
        count_ = wanted_;
        limit_ = found_[wanted_ - 1];
    }

    int64_t wanted_, capacity_, count_ = 0;
    int32_t limit_ = NO_POINT;
    std::unique_ptr<int32_t[]> found_;
};

void collect_leaf(const Leaf& leaf, const Place& centre, float radius_squared, Hits& hits) {
    alignas(64) float distance[LEAF_SIZE];
    distances(leaf, centre, distance);
    for (uint32_t inside = lanes_within<LEAF_SIZE, false>(distance, radius_squared); inside; inside &= inside - 1)
        hits.add(leaf.index[__builtin_ctz(inside)]);
}

void collect(const Tree& tree, int level, int64_t number, const Place& centre, float radius_squared, Hits& hits) {
    const Group& group = tree.group(tree.offset(level) + number);
    alignas(64) float bound[FAN];
    lower_bounds(group, centre, bound);
    for (uint32_t open = lanes_within<FAN, false>(bound, radius_squared); open; open &= open - 1) {
        const int slot = __builtin_ctz(open);
        if (group.first[slot] >= hits.limit()) continue;
        const int64_t child = number * FAN + slot;
        if (level == 0)
            collect_leaf(tree.leaf(child), centre, radius_squared, hits);
        else
            collect(tree, level - 1, child, centre, radius_squared, hits);
    }
}

/* The three nearest points so far, ascending by squared distance, then index. Both are kept in one number, as the bits
 * of floats >= 0 compare as integers, so that a point is sorted in without a branch. */
class Nearest {
  public:
    /* All three as far as `bound`, so that points at exactly that distance are still taken. At an infinite distance
     * the index is 0 and nothing more is taken. */
    explicit Nearest(float bound) { std::fill_n(keys_, 3, key_of(bound, bound < INFINITE ? NO_POINT : 0)); }

    void add(float distance, int32_t index) {
        const uint64_t key = key_of(distance, index), second = std::max(keys_[0], key);
        keys_[0] = std::min(keys_[0], key);
        const uint64_t third = std::max(keys_[1], second);
        keys_[1] = std::min(keys_[1], second);
        keys_[2] = std::min(keys_[2], third);
    }

    float distance(int rank) const { return float_of(static_cast<uint32_t>(keys_[rank] >> 32)); }
    int32_t index(int rank) const { return static_cast<int32_t>(keys_[rank] & 0xffffffffu); }

  private:
    static uint64_t key_of(float distance, int32_t index) {
        return static_cast<uint64_t>(static_cast<uint32_t>(bits_of(distance))) << 32 | static_cast<uint32_t>(index);
    }

    uint64_t keys_[3];
};

void approach_leaf(const Leaf& leaf, const Place& query, Nearest& nearest) {
    alignas(64) float distance[LEAF_SIZE];
    distances(leaf, query, distance);
    for (uint32_t close = lanes_within<LEAF_SIZE, true>(distance, nearest.distance(2)); close; close &= close - 1) {
        const int i = __builtin_ctz(close);
        nearest.add(distance[i], leaf.index[i]);
    }
}

void approach(const Tree& tree, int level, int64_t number, const Place& query, Nearest& nearest) {
    const Group& group = tree.group(tree.offset(level) + number);
    alignas(64) float bound[FAN];
    lower_bounds(group, query, bound);
    const float limit = std::min(nearest.distance(2), std::numeric_limits<float>::max());
    for (uint32_t open = lanes_within<FAN, true>(bound, limit); open; open &= open - 1) {
        const int slot = __builtin_ctz(open);
        if (bound[slot] > nearest.distance(2)) continue;
        if (bound[slot] == nearest.distance(2) && group.first[slot] >= nearest.index(2)) continue;
        const int64_t child = number * FAN + slot;
        if (level == 0)
            approach_leaf(tree.leaf(child), query, nearest);
        else
            approach(tree, level - 1, child, query, nearest);
    }
}

/* An upper bound of the query's third smallest squared distance: that of three points which were near another one. */
float bound_from(const float* points, const Nearest& previous, const Place& query) {
    float bound = 0;
    for (int rank = 0; rank < 3; ++rank) {
        const Place point = place_of(points, previous.index(rank));
        bound = larger(bound, squared_distance(point.x, point.y, point.z, query));
    }
    return bound;
}

void find_three(const Tree& tree, const float* points, const float* queries, const int32_t* order, int64_t count,
                float* distance, int32_t* idx) {
    Nearest nearest(INFINITE);
    for (int64_t i = 0; i < count; ++i) {
        const int64_t number = order[i];
        const Place query = place_of(queries, number);
        const bool searchable = finite(query), known = nearest.distance(2) < INFINITE;
        nearest = Nearest(searchable && known ? bound_from(points, nearest, query) : INFINITE);
        if (searchable) approach(tree, tree.top_level(), 0, query, nearest);
        for (int rank = 0; rank < 3; ++rank) {
            distance[number * 3 + rank] = std::sqrt(nearest.distance(rank));
            idx[number * 3 + rank] = nearest.index(rank);
        }
    }
}

/* Prepares up to `threads` scenes at a time, then searches ranges of all of their items: work for every thread, and
 * memory for few trees. prepare(scene, slot), search(scene, slot, begin, end). */
template <class Prepare, class Search>
void in_waves(int64_t scenes, int64_t items, intptr_t threads, const Prepare& prepare, const Search& search) {
    const int64_t wave = std::max<int64_t>(1, std::min<int64_t>(threads, scenes));
    constexpr int64_t GRAIN = 128;
    const int64_t ranges = (items + GRAIN - 1) / GRAIN;
    for (int64_t first = 0; first < scenes; first += wave) {
        const int64_t slots = std::min(wave, scenes - first);
        parallel_for(slots, threads, 1, [&](int64_t begin, int64_t end) {
            for (int64_t slot = begin; slot < end; ++slot) prepare(first + slot, slot);
        });
        parallel_for(slots * ranges, threads, 1, [&](int64_t begin, int64_t end) {
            for (int64_t task = begin; task < end;) {  // neighbouring ranges of one scene in one go
                const int64_t slot = task / ranges, last = std::min(end, (slot + 1) * ranges);
                search(first + slot, slot, (task - slot * ranges) * GRAIN,
                       std::min(items, (last - slot * ranges) * GRAIN));
                task = last;
            }
        });
    }
}

struct Prepared {
    CurveMemory memory;
    Tree tree;
    Buffer<int32_t> order;
};

std::vector<Prepared> slots_for(int64_t scenes, intptr_t threads) {
    return std::vector<Prepared>(static_cast<size_t>(std::max<int64_t>(1, std::min<int64_t>(threads, scenes))));
}

}  // namespace
}  // namespace pn2

extern "C" {

int64_t pn2_ball_query_workspace(int64_t, int64_t, int64_t, int64_t) { return 0; }

int pn2_ball_query(const float* points, const float* centers, int64_t B, int64_t N, int64_t M, int64_t S, float radius,
                   int32_t* idx, void*, intptr_t context) {
    using namespace pn2;
    return guarded([&] {
        if (M == 0) return OK;
        const float radius_squared = radius * radius;
        std::vector<Prepared> slots = slots_for(B, context);
        const auto prepare = [&](int64_t scene, int64_t slot) {
            Prepared& mine = slots[slot];
            mine.tree.build(points + scene * N * 3, N, mine.memory);
            curve_order(centers + scene * M * 3, M, mine.order.resize(M), mine.memory);
        };
        in_waves(B, M, context, prepare, [&](int64_t scene, int64_t slot, int64_t begin, int64_t end) {
            const Tree& tree = slots[slot].tree;
            Hits hits(S);
            for (int64_t i = begin; i < end; ++i) {
                const int64_t number = slots[slot].order.get()[i];
                const Place centre = place_of(centers + scene * M * 3, number);
                hits.clear();
                if (finite(centre)) collect(tree, tree.top_level(), 0, centre, radius_squared, hits);
                hits.write(idx + (scene * M + number) * S);
            }
        });
        return OK;
    });
}

int64_t pn2_three_nn_workspace(int64_t, int64_t, int64_t) { return 0; }

int pn2_three_nn(const float* query, const float* points, int64_t B, int64_t N, int64_t M, float* distance,
                 int32_t* idx, void*, intptr_t context) {
    using namespace pn2;
    return guarded([&] {
        if (N == 0) return OK;
        std::vector<Prepared> slots = slots_for(B, context);
        const auto prepare = [&](int64_t scene, int64_t slot) {
            Prepared& mine = slots[slot];
            mine.tree.build(points + scene * M * 3, M, mine.memory);
            curve_order(query + scene * N * 3, N, mine.order.resize(N), mine.memory);
        };
        in_waves(B, N, context, prepare, [&](int64_t scene, int64_t slot, int64_t begin, int64_t end) {
            find_three(slots[slot].tree, points + scene * M * 3, query + scene * N * 3,
                       slots[slot].order.get() + begin, end - begin, distance + scene * N * 3, idx + scene * N * 3);
        });
        return OK;
    });
}

}  // extern "C"
