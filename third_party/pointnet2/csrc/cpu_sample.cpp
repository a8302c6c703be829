/* Furthest point sampling with exact pruning.
 *
 * Every leaf of the tree keeps its points' distances to the chosen ones, and every group the largest of each child. A
 * new sample changes nothing in a child whose lower bound reaches that maximum, and the next sample is found by
 * following the maximum down. Distances are kept as the bits of floats >= 0, which compare as integers.
 */
#include "cpu_tree.h"

namespace pn2 {
namespace {

constexpr int32_t NONE = -1;  // below every distance: slots without a point or child

struct alignas(64) Distances {
    int32_t nearest[LEAF_SIZE];
};

struct alignas(64) Maxima {
    int32_t top[FAN];
};

class Sampler {
  public:
    void run(const float* points, int64_t num_points, int64_t num_samples, int32_t* idx) {
        if (num_samples == 0) return;
        tree_.build(points, num_points, memory_);
        reset(num_points);
        Place last{points[0], points[1], points[2]};
        idx[0] = 0;
        for (int64_t step = 1; step < num_samples; ++step) {
            const int32_t top = update_group(tree_.top_level(), 0, last);
            if (top <= 0) {  // every position is taken, so that all points tie and the lowest index wins
                std::fill(idx + step, idx + num_samples, 0);
                return;
            }
            idx[step] = NO_POINT;
            find(tree_.top_level(), 0, top, idx[step], last);
        }
    }

  private:
    void reset(int64_t num_points) {
        Distances* distances = distances_.resize(tree_.num_leaves());
        Maxima* maxima = maxima_.resize(tree_.num_groups());
        const int32_t infinite = bits_of(INFINITE);
        for (int64_t leaf = 0; leaf < tree_.num_leaves(); ++leaf)
            for (int i = 0; i < LEAF_SIZE; ++i)
                distances[leaf].nearest[i] = leaf * LEAF_SIZE + i < num_points ? infinite : NONE;
        for (int level = 0; level <= tree_.top_level(); ++level) {
            const int64_t end = level == tree_.top_level() ? tree_.num_groups() : tree_.offset(level + 1);
            for (int64_t number = tree_.offset(level); number < end; ++number)
                for (int slot = 0; slot < FAN; ++slot)
                    maxima[number].top[slot] =
                        tree_.group(level, number - tree_.offset(level)).first[slot] == NO_POINT ? NONE : infinite;
        }
    }

    /* The largest distance left below the group. */
    int32_t update_group(int level, int64_t number, const Place& sample) {
        int32_t* top = maxima_.get()[tree_.offset(level) + number].top;
        float bound[FAN];
        lower_bounds(tree_.group(level, number), sample, bound);
        uint32_t open = 0;
        for (int slot = 0; slot < FAN; ++slot) open |= static_cast<uint32_t>(bits_of(bound[slot]) < top[slot]) << slot;
        for (; open; open &= open - 1) {
            const int slot = __builtin_ctz(open);
            const int64_t child = number * FAN + slot;
            top[slot] = level == 0 ? update_leaf(child, sample) : update_group(level - 1, child, sample);
        }
        int32_t largest = NONE;
        for (int slot = 0; slot < FAN; ++slot) largest = std::max(largest, top[slot]);
        return largest;
    }

    int32_t update_leaf(int64_t number, const Place& sample) {
        const Leaf& leaf = tree_.leaf(number);
        int32_t* nearest = distances_.get()[number].nearest;
        int32_t largest = NONE;
        for (int i = 0; i < LEAF_SIZE; ++i) {
            const int32_t distance = bits_of(squared_distance(leaf.x[i], leaf.y[i], leaf.z[i], sample));
            nearest[i] = std::min(distance, nearest[i]);
            largest = std::max(largest, nearest[i]);
        }
        return largest;
    }

    /* The point of lowest index below the group whose distance is `top`, if lower than `best`. */
    void find(int level, int64_t number, int32_t top, int32_t& best, Place& place) const {
        const Maxima& maxima = maxima_.get()[tree_.offset(level) + number];
        for (int slot = 0; slot < FAN; ++slot) {
            if (maxima.top[slot] != top) continue;
            const int64_t child = number * FAN + slot;
            if (level > 0) {
                find(level - 1, child, top, best, place);
                continue;
            }
            const Leaf& leaf = tree_.leaf(child);
            const int32_t* nearest = distances_.get()[child].nearest;
            for (int i = 0; i < LEAF_SIZE; ++i) {
                if (nearest[i] != top || leaf.index[i] >= best) continue;
                best = leaf.index[i];
                place = {leaf.x[i], leaf.y[i], leaf.z[i]};
            }
        }
    }

    CurveMemory memory_;
    Tree tree_;
    Buffer<Distances> distances_;
    Buffer<Maxima> maxima_;
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
