/* Furthest point sampling with exact pruning.
 *
 * Every leaf of the tree keeps its points' distances to the chosen ones, and every group the furthest point of each
 * child. A new sample changes nothing in a child whose lower bound reaches that point's distance. Distances are kept as
 * the bits of floats >= 0, which compare as integers.
 */
#include "cpu_tree.h"

namespace pn2 {
namespace {

constexpr int32_t NONE = -1;  // below every distance: slots without a point or child

struct alignas(64) Distances {
    int32_t nearest[LEAF_SIZE];
};

/* A point of largest distance, the lowest index on ties. */
struct Furthest {
    int32_t distance, index;
};

struct alignas(64) Children {
    int32_t distance[FAN], index[FAN];
};

/* The furthest of `count` candidates. */
template <int COUNT>
Furthest furthest_of(const int32_t* distance, const int32_t* index) {
    Furthest found{NONE, NO_POINT};
    for (int i = 0; i < COUNT; ++i) found.distance = std::max(found.distance, distance[i]);
    for (int i = 0; i < COUNT; ++i)
        found.index = std::min(found.index, distance[i] == found.distance ? index[i] : NO_POINT);
    return found;
}

class Sampler {
  public:
    void run(const float* points, int64_t num_points, int64_t num_samples, int32_t* idx) {
        if (num_samples == 0) return;
        tree_.build(points, num_points, memory_);
        reset(num_points);
        idx[0] = 0;
        for (int64_t step = 1; step < num_samples; ++step) {
            const float* last = points + 3 * static_cast<int64_t>(idx[step - 1]);
            const Furthest next = update_group(tree_.top_level(), 0, {last[0], last[1], last[2]});
            if (next.distance <= 0) {  // every position is taken, so that all points tie and the lowest index wins
                std::fill(idx + step, idx + num_samples, 0);
                return;
            }
            idx[step] = next.index;
        }
    }

  private:
    void reset(int64_t num_points) {
        Distances* distances = distances_.resize(tree_.num_leaves());
        Children* children = children_.resize(tree_.num_groups());
        const int32_t infinite = bits_of(INFINITE);
        for (int64_t leaf = 0; leaf < tree_.num_leaves(); ++leaf)
            for (int i = 0; i < LEAF_SIZE; ++i)
                distances[leaf].nearest[i] = leaf * LEAF_SIZE + i < num_points ? infinite : NONE;
        for (int64_t number = 0; number < tree_.num_groups(); ++number) {
            for (int slot = 0; slot < FAN; ++slot) {
                const int32_t first = tree_.group(number).first[slot];
                children[number].distance[slot] = first == NO_POINT ? NONE : infinite;
                children[number].index[slot] = first;
            }
        }
    }

    Furthest update_group(int level, int64_t number, const Place& sample) {
        const int64_t place = tree_.offset(level) + number;
        Children& children = children_.get()[place];
        float bound[FAN];
        lower_bounds(tree_.group(place), sample, bound);
        uint32_t open = 0;
        for (int slot = 0; slot < FAN; ++slot)
            open |= static_cast<uint32_t>(bits_of(bound[slot]) < children.distance[slot]) << slot;
        for (; open; open &= open - 1) {
            const int slot = __builtin_ctz(open);
            const int64_t child = number * FAN + slot;
            const Furthest found = level == 0 ? update_leaf(child, sample) : update_group(level - 1, child, sample);
            children.distance[slot] = found.distance;
            children.index[slot] = found.index;
        }
        return furthest_of<FAN>(children.distance, children.index);
    }

    Furthest update_leaf(int64_t number, const Place& sample) {
        const Leaf& leaf = tree_.leaf(number);
        int32_t* nearest = distances_.get()[number].nearest;
        for (int i = 0; i < LEAF_SIZE; ++i)
            nearest[i] = std::min(bits_of(squared_distance(leaf.x[i], leaf.y[i], leaf.z[i], sample)), nearest[i]);
        return furthest_of<LEAF_SIZE>(nearest, leaf.index);
    }

    CurveMemory memory_;
    Tree tree_;
    Buffer<Distances> distances_;
    Buffer<Children> children_;
};

}  // namespace
}  // namespace pn2

extern "C" {

int64_t pn2_furthest_point_sample_workspace(int64_t, int64_t, int64_t) { return 0; }

int pn2_furthest_point_sample(const float* points, int64_t B, int64_t N, int64_t M, int32_t* idx, void*,
                              intptr_t context) {
    return pn2::guarded([&] {
        pn2::parallel_for(B, context, 1, [&](int64_t begin, int64_t end) {
            pn2::Sampler sampler;
            for (int64_t scene = begin; scene < end; ++scene)
                sampler.run(points + scene * N * 3, N, M, idx + scene * M);
        });
        return pn2::OK;
    });
}

}  // extern "C"
