// Farthest point sampling: M - 1 dependent steps, each a distance update of all points and an argmax over them.
//
// The classic kernel gives a scene one block, which leaves most of the chip idle. Here several blocks share a scene. Their
// threads keep points and distances in registers for all steps; what a step has to pass between blocks is one candidate
// each. There are two ways to pass it:
//
//   Cluster  (compute capability 9.0 on) blocks of one thread-block cluster write their candidate straight into each
//            other's shared memory, and the write itself completes the receiver's barrier: one trip a step.
//   Grid     (older GPUs, and scenes larger than a cluster's registers) blocks write candidates to global memory, each
//            step to fresh zeroed words, and poll for the others'.
//
// A candidate is (distance, index); the larger distance wins, then the lower index. Distances are not negative, so their
// bits compare as integers; places beyond the last point hold -1.
#include <algorithm>
#include <atomic>
#include <climits>
#include <cmath>
#include <limits>
#include <type_traits>

#include "common.cuh"

namespace pn2 {
namespace {

// Few threads with many places each: what a step costs beside its distances grows with the number of warps.
constexpr int kThreads = 256;
constexpr int kMaxPlaces = 50;  // of a thread: 200 of its 255 registers
constexpr int kMaxCluster = 16;
// One block has the whole of a multiprocessor.
constexpr int kWideThreads = 1024;
constexpr int kWidePlaces = 10;  // 40 of 64 registers

struct Candidate {
    int distance;  // bits of the float
    int index;
};

// The best candidate of a warp, known to all its lanes.
__device__ __forceinline__ Candidate warp_best(int distance, int index) {
    const int best = __reduce_max_sync(kAllLanes, distance);
    return {best, __reduce_min_sync(kAllLanes, distance == best ? index : INT_MAX)};
}

__device__ __forceinline__ unsigned shared_address(const void* pointer) {
    return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// The block's K * T points; place k of thread t holds point (k * blocks + block) * T + t of the scene.
template <int T, int K>
struct Points {
    float x[K], y[K], z[K], nearest[K];

    // Copies of the positions go to shared memory unless that is null.
    __device__ void load(const float* scene, int N, int block, int blocks, float* positions) {
#pragma unroll
        for (int k = 0; k < K; ++k) {
            const int i = (k * blocks + block) * T + threadIdx.x;
            const bool real = i < N;
            x[k] = real ? scene[3 * (int64_t)i] : 0.f;
            y[k] = real ? scene[3 * (int64_t)i + 1] : 0.f;
            z[k] = real ? scene[3 * (int64_t)i + 2] : 0.f;
            nearest[k] = real ? INFINITY : -1.f;
            if (positions == nullptr) continue;
            float* position = positions + 3 * (k * T + threadIdx.x);
            position[0] = x[k], position[1] = y[k], position[2] = z[k];
        }
    }

    // Takes in the new centre; the thread's best place. Places ascend in index, so the first of equals is kept.
    __device__ __forceinline__ Candidate update(float cx, float cy, float cz, int block, int blocks) {
        int best = INT_MIN, best_k = 0;
#pragma unroll
        for (int k = 0; k < K; ++k) {
            nearest[k] = fminf(nearest[k], squared_distance(x[k], y[k], z[k], cx, cy, cz));
            const int distance = __float_as_int(nearest[k]);
            if (distance > best) best = distance, best_k = k;
        }
        return {best, (best_k * blocks + block) * T + (int)threadIdx.x};
    }
};

// Where the block keeps point `index` of the scene in `positions`.
__device__ __forceinline__ int place_of(int index, int blocks) {
    const int group = index / kThreads;
    return group / blocks * kThreads + index % kThreads;
}

// The block's best candidate, known to every lane of the warps that call this after the barrier.
template <int T>
__device__ __forceinline__ Candidate block_best(const Candidate* of_warps) {
    static_assert(T <= 1024, "one warp reduces the candidates of a block");
    const int lane = threadIdx.x & 31;
    const Candidate mine = lane < T / 32 ? of_warps[lane] : Candidate{INT_MIN, INT_MAX};
    return warp_best(mine.distance, mine.index);
}

// ---- one block a scene

template <int T, int K>
__global__ void __launch_bounds__(T) sample_block(const float* points, int N, int M, int32_t* idx) {
    extern __shared__ float positions[];
    __shared__ Candidate of_warps[2][T / 32];
    const float* scene = points + (int64_t)blockIdx.x * N * 3;
    int32_t* chosen = idx + (int64_t)blockIdx.x * M;
    Points<T, K> mine;
    mine.load(scene, N, 0, 1, positions);
    __syncthreads();
    float cx = positions[0], cy = positions[1], cz = positions[2];
    if (threadIdx.x == 0) chosen[0] = 0;
    for (int step = 1; step < M; ++step) {
        const Candidate of_thread = mine.update(cx, cy, cz, 0, 1);
        const Candidate of_warp = warp_best(of_thread.distance, of_thread.index);
        if ((threadIdx.x & 31) == 0) of_warps[step & 1][threadIdx.x / 32] = of_warp;
        __syncthreads();  // one a step: the next step writes to the other half of of_warps
        const Candidate best = block_best<T>(of_warps[step & 1]);
        const float* position = positions + 3 * best.index;
        cx = position[0], cy = position[1], cz = position[2];
        if (threadIdx.x == 0) chosen[step] = best.index;
    }
}

// ---- a cluster of blocks a scene

struct alignas(16) Message {
    int distance;
    float x, y, z;
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

__device__ __forceinline__ unsigned cluster_rank() {
    unsigned rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

__device__ __forceinline__ unsigned cluster_blocks() {
    unsigned count;
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(count));
    return count;
}

__device__ __forceinline__ void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

__device__ __forceinline__ unsigned remote(unsigned address, unsigned rank) {
    unsigned mapped;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
    return mapped;
}

__device__ __forceinline__ void wait_phase(unsigned barrier, unsigned parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}" ::"r"(barrier), "r"(parity) : "memory");
}

#endif

template <int K>
__global__ void __launch_bounds__(kThreads) sample_cluster(const float* points, int N, int M, int32_t* idx) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    extern __shared__ float positions[];
    // Two of each: a block can be one step ahead of another, never two, since it needs that one's candidate to go on.
    __shared__ Candidate of_warps[2][kThreads / 32];
    __shared__ Message messages[2][kMaxCluster];
    __shared__ int indices[2][kMaxCluster];
    __shared__ alignas(8) uint64_t barriers[2];
    const unsigned rank = cluster_rank(), blocks = cluster_blocks();
    const int64_t scene_index = blockIdx.x / blocks;
    const float* scene = points + scene_index * N * 3;
    int32_t* chosen = idx + scene_index * M;
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;

    Points<kThreads, K> mine;
    mine.load(scene, N, rank, blocks, positions);
    float cx = scene[0], cy = scene[1], cz = scene[2];
    if (threadIdx.x == 0) {
        for (int half = 0; half < 2; ++half)
            asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&barriers[half])) : "memory");
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        if (rank == 0) chosen[0] = 0;
    }
    cluster_barrier();  // nobody sends before all barriers stand

    for (int step = 1; step < M; ++step) {
        const int half = step & 1;
        const unsigned parity = ((step - 1) >> 1) & 1, barrier = shared_address(&barriers[half]);
        const Candidate of_thread = mine.update(cx, cy, cz, rank, blocks);
        const Candidate of_warp = warp_best(of_thread.distance, of_thread.index);
        if (lane == 0) of_warps[half][warp] = of_warp;
        __syncthreads();
        if (warp == 0) {
            const Candidate best = block_best<kThreads>(of_warps[half]);
            if (lane == 0)
                asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier),
                             "r"(blocks * (unsigned)(sizeof(Message) + sizeof(int)))
                             : "memory");
            if (lane < blocks) {  // lane r writes to block r
                const float* position = positions + 3 * place_of(best.index, blocks);
                const unsigned to_barrier = remote(barrier, lane);
                asm volatile(
                    "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
                        remote(shared_address(&messages[half][rank]), lane)),
                    "r"(best.distance), "r"(__float_as_int(position[0])), "r"(__float_as_int(position[1])),
                    "r"(__float_as_int(position[2])), "r"(to_barrier)
                    : "memory");
                asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(
                                 remote(shared_address(&indices[half][rank]), lane)),
                             "r"(best.index), "r"(to_barrier)
                             : "memory");
            }
        }
        wait_phase(barrier, parity);
        const bool sent = lane < blocks;
        const int index = sent ? indices[half][lane] : INT_MAX;
        const Candidate best = warp_best(sent ? messages[half][lane].distance : INT_MIN, index);
        const int winner = __ffs(__ballot_sync(kAllLanes, index == best.index)) - 1;
        const Message& message = messages[half][winner];
        cx = message.x, cy = message.y, cz = message.z;
        if (threadIdx.x == 0 && rank == 0) chosen[step] = best.index;
    }
    cluster_barrier();  // nobody leaves while others still write to its shared memory
#else
    __trap();  // code for older GPUs, run on a newer one
#endif
}

// ---- a group of blocks a scene, through global memory

// A candidate as one word, larger for the better one. A word is its own flag: fresh words are zero, and a candidate's is
// not, as ~index is not. A block without points has distance -1, the least word.
__device__ __forceinline__ unsigned long long word_of(Candidate best) {
    return best.distance < 0 ? 1ull : (unsigned long long)best.distance << 32 | (unsigned)~best.index;
}

// Tells the other blocks this one's candidate and waits for theirs. Called by one warp; all its lanes learn the best.
__device__ __forceinline__ int exchange(unsigned long long* words, int block, int blocks, Candidate mine) {
    const int lane = threadIdx.x & 31;
    if (lane == 0) *(volatile unsigned long long*)(words + block) = word_of(mine);
    unsigned long long best = 0;
    for (int other = lane; other < blocks; other += 32) {
        unsigned long long word;
        do word = *(volatile unsigned long long*)(words + other);
        while (word == 0);
        if (word > best) best = word;
    }
    const unsigned distance = __reduce_max_sync(kAllLanes, (unsigned)(best >> 32));
    return ~__reduce_max_sync(kAllLanes, best >> 32 == distance ? (unsigned)best : 0u);
}

// K = 0 keeps distances in global memory: any number of points.
template <int K>
__global__ void __launch_bounds__(kThreads)
    sample_grid(const float* points, int B, int N, int M, int blocks, int32_t* idx, unsigned long long* words,
                float* nearest) {
    __shared__ Candidate of_warps[kThreads / 32];
    __shared__ float center[3];
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    const int block = blockIdx.x % blocks, groups = gridDim.x / blocks;
    for (int64_t scene_index = blockIdx.x / blocks; scene_index < B; scene_index += groups) {
        const float* scene = points + scene_index * N * 3;
        int32_t* chosen = idx + scene_index * M;
        Points<kThreads, K == 0 ? 1 : K> mine;
        float* distances = nearest + scene_index * N;
        if constexpr (K == 0) {
            for (int i = block * kThreads + threadIdx.x; i < N; i += blocks * kThreads) distances[i] = INFINITY;
        } else {
            mine.load(scene, N, block, blocks, nullptr);
        }
        float cx = scene[0], cy = scene[1], cz = scene[2];
        if (threadIdx.x == 0 && block == 0) chosen[0] = 0;
        for (int step = 1; step < M; ++step) {
            Candidate of_thread{INT_MIN, INT_MAX};
            if constexpr (K == 0) {
                for (int i = block * kThreads + threadIdx.x; i < N; i += blocks * kThreads) {
                    const float* point = scene + 3 * (int64_t)i;
                    const float updated =
                        fminf(distances[i], squared_distance(point[0], point[1], point[2], cx, cy, cz));
                    distances[i] = updated;
                    if (__float_as_int(updated) > of_thread.distance) of_thread = {__float_as_int(updated), i};
                }
            } else {
                of_thread = mine.update(cx, cy, cz, block, blocks);
            }
            const Candidate of_warp = warp_best(of_thread.distance, of_thread.index);
            if (lane == 0) of_warps[warp] = of_warp;
            __syncthreads();
            if (warp == 0) {  // one warp polls: all of them would crowd the cache that holds the words
                const Candidate of_block = block_best<kThreads>(of_warps);
                const int best = exchange(words + (scene_index * M + step) * blocks, block, blocks, of_block);
                if (lane < 3) center[lane] = scene[3 * (int64_t)best + lane];
                if (lane == 0 && block == 0) chosen[step] = best;
            }
            __syncthreads();
            cx = center[0], cy = center[1], cz = center[2];
        }
    }
}

// ---- choice

// Places of a thread whose positions the block's shared memory holds, at most `most`.
int64_t most_places(const Device& device, int threads, int64_t most) {
    const int64_t held = (device.shared_bytes - kStaticShared) / (3 * sizeof(float) * threads);
    return held < most ? held : most;
}

// Calls `body` with the smallest number of places a thread that is compiled and holds `needed`; Most is the largest.
template <int Most, int First, int... Others, typename Body>
int with_places_of(int64_t needed, Body body) {
    if constexpr (sizeof...(Others) == 0) {
        return body(std::integral_constant<int, Most>{});
    } else {
        if (First >= Most) return body(std::integral_constant<int, Most>{});
        if (needed <= First) return body(std::integral_constant<int, First < Most ? First : Most>{});
        return with_places_of<Most, Others...>(needed, body);
    }
}

template <int Most, typename Body>
int with_places(int64_t needed, Body body) {
    return with_places_of<Most, 1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 20, 25, 32, 40, Most>(needed, body);
}

template <int T, int K>
int launch_block(const float* points, int64_t B, int64_t N, int64_t M, int32_t* idx, cudaStream_t stream) {
    const int bytes = K * T * 3 * sizeof(float);
    const cudaError_t error = allow_shared(sample_block<T, K>, bytes);
    if (error != cudaSuccess) return error;
    sample_block<T, K><<<B, T, bytes, stream>>>(points, N, M, idx);
    return cudaGetLastError();
}

template <int K>
cudaLaunchConfig_t cluster_config(int64_t B, int blocks, cudaLaunchAttribute* attribute, cudaStream_t stream) {
    attribute->id = cudaLaunchAttributeClusterDimension;
    attribute->val.clusterDim = {(unsigned)blocks, 1, 1};
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(B * blocks);
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = K * kThreads * 3 * sizeof(float);
    config.stream = stream;
    config.attrs = attribute;
    config.numAttrs = 1;
    return config;
}

template <int K>
cudaError_t prepare_cluster(int blocks) {
    cudaError_t error = allow_shared(sample_cluster<K>, K * kThreads * 3 * sizeof(float));
    if (error == cudaSuccess && blocks > 8)
        error = cudaFuncSetAttribute(sample_cluster<K>, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    return error;
}

// How many clusters of this kind run at once; 0 where none does.
template <int K>
int active_clusters(int blocks) {
    cudaLaunchAttribute attribute;
    const cudaLaunchConfig_t config = cluster_config<K>(1, blocks, &attribute, nullptr);
    int count = 0;
    if (prepare_cluster<K>(blocks) != cudaSuccess ||
        cudaOccupancyMaxActiveClusters(&count, sample_cluster<K>, &config) != cudaSuccess) {
        cudaGetLastError();  // a size that the device does not offer is an answer, not a failure
        return 0;
    }
    return count;
}

template <int K>
int launch_cluster(const float* points, int64_t B, int64_t N, int64_t M, int blocks, int32_t* idx,
                   cudaStream_t stream) {
    const cudaError_t error = prepare_cluster<K>(blocks);
    if (error != cudaSuccess) return error;
    cudaLaunchAttribute attribute;
    const cudaLaunchConfig_t config = cluster_config<K>(B, blocks, &attribute, stream);
    return cudaLaunchKernelEx(&config, sample_cluster<K>, points, (int)N, (int)M, idx);
}

struct GridPlan {
    int places = 0, blocks = 0, groups = 0;  // places 0: distances in global memory
};

// As many blocks as run at once, one a multiprocessor: with more, the exchange costs more than the second block's work gains.
// They are shared out over the scenes, or over as many of them as their registers hold.
GridPlan plan_grid(const Device& device, int64_t B, int64_t N) {
    GridPlan plan;
    const int64_t least = divide_up(N, (int64_t)kThreads * kMaxPlaces);
    const int64_t most = divide_up(N, (int64_t)kThreads * 4);
    const int64_t groups = least <= device.processors ? device.processors / least : 1;
    plan.groups = B < groups ? B : groups;
    plan.blocks = device.processors / plan.groups;
    if (plan.blocks > most) plan.blocks = most;
    const int64_t needed = divide_up(N, (int64_t)plan.blocks * kThreads);
    plan.places = needed > kMaxPlaces ? 0 : (int)needed;
    return plan;
}

template <int K>
int launch_grid(const GridPlan& plan, const float* points, int64_t B, int64_t N, int64_t M, int32_t* idx,
                void* workspace, cudaStream_t stream) {
    const int64_t words_bytes = B * M * plan.blocks * sizeof(unsigned long long);
    auto* words = static_cast<unsigned long long*>(workspace);
    auto* nearest = reinterpret_cast<float*>(static_cast<char*>(workspace) + align_up(words_bytes));
    const cudaError_t error = cudaMemsetAsync(words, 0, words_bytes, stream);
    if (error != cudaSuccess) return error;
    int scenes = B, num_points = N, samples = M, blocks = plan.blocks;
    void* arguments[] = {&points, &scenes, &num_points, &samples, &blocks, &idx, &words, &nearest};
    return cudaLaunchCooperativeKernel(sample_grid<K>, dim3(plan.blocks * plan.groups), dim3(kThreads), arguments, 0,
                                       stream);
}

// Which way is the fastest, by estimates of a step in microseconds that were fitted to an H100. Elsewhere all terms change
// much alike.

enum class Way { kBlock, kCluster, kGrid };

struct Plan {
    Way way = Way::kGrid;
    int blocks = 0;  // of a cluster
    double step = std::numeric_limits<double>::infinity();

    void consider(Way other, double its_step, int its_blocks = 0) {
        if (its_step < step) way = other, step = its_step, blocks = its_blocks;
    }
};

double block_step(const Device& device, int64_t B, int places) {
    return divide_up(B, device.processors) * (0.21 + 0.061 * places);
}

double grid_step(const GridPlan& grid, int64_t B) {
    if (grid.places == 0) return 1000.0 * B;  // the last resort
    return divide_up(B, grid.groups) * (0.68 + 0.11 * std::sqrt((double)grid.blocks) + 0.0165 * grid.places);
}

// Clusters that share multiprocessors take turns; those that find no room wait for the end of others.
double cluster_step(const Device& device, int64_t B, int blocks, int places, int active) {
    const auto together = [&](int64_t clusters) {
        const double on_each = (double)(clusters * blocks) / device.processors;
        const double alone = 0.57 + 0.015 * places, turn = 0.14 + 0.023 * places;
        return alone + 0.06 * std::min(on_each, 1.0) + turn * std::max(on_each - 1.0, 0.0);
    };
    return B / active * together(active) + (B % active ? together(B % active) : 0.0);
}

void consider_clusters(const Device& device, int64_t B, int64_t N, Plan* plan) {
    // One answer a device and number of places; asking takes tens of microseconds. Filled alike by any thread.
    static std::atomic<int> known[kMaxDevices][5][kMaxPlaces + 1];
    for (int power = 4; power >= 1; --power) {
        const int blocks = 1 << power;
        const int64_t needed = divide_up(N, (int64_t)blocks * kThreads);
        if (needed > kMaxPlaces) break;
        with_places<kMaxPlaces>(needed, [&](auto K) {
            std::atomic<int>& answer = known[device.index][power][K.value];
            if (answer == 0) answer = 1 + active_clusters<K.value>(blocks);
            const int active = answer - 1;
            if (active > 0)
                plan->consider(Way::kCluster, cluster_step(device, B, blocks, K.value, active), blocks);
            return 0;
        });
    }
}

Plan choose(const Device& device, int64_t B, int64_t N) {
    Plan plan;
    plan.consider(Way::kGrid, grid_step(plan_grid(device, B, N), B));
    const int64_t places = divide_up(N, kWideThreads);
    if (places <= most_places(device, kWideThreads, kWidePlaces))
        plan.consider(Way::kBlock, block_step(device, B, places));
    if (device.major >= 9) consider_clusters(device, B, N, &plan);
    return plan;
}

}  // namespace
}  // namespace pn2

using namespace pn2;

extern "C" {

int64_t pn2_furthest_point_sample_workspace(int64_t B, int64_t N, int64_t M) {
    Device device;
    if (B == 0 || M == 0 || N < 1 || current_device(&device) != cudaSuccess) return 0;
    if (choose(device, B, N).way != Way::kGrid) return 0;
    const GridPlan grid = plan_grid(device, B, N);
    const int64_t words = align_up(B * M * grid.blocks * sizeof(unsigned long long));
    return words + (grid.places == 0 ? B * N * sizeof(float) : 0);
}

int pn2_furthest_point_sample(const float* points, int64_t B, int64_t N, int64_t M, int32_t* idx, void* workspace,
                              intptr_t context) {
    if (B == 0 || M == 0) return 0;
    // loops count points in steps of a whole grid
    if (N < 1 || N > INT_MAX - (1 << 20) || M > INT_MAX || B > INT_MAX) return cudaErrorInvalidValue;
    const cudaStream_t stream = stream_of(context);
    Device device;
    if (const int error = current_device(&device)) return error;
    const Plan plan = choose(device, B, N);
    if (plan.way == Way::kBlock && N <= 4 * kThreads)
        return with_places<4>(divide_up(N, kThreads), [&](auto K) {
            return launch_block<kThreads, K.value>(points, B, N, M, idx, stream);
        });
    if (plan.way == Way::kBlock)
        return with_places<kWidePlaces>(divide_up(N, kWideThreads), [&](auto K) {
            return launch_block<kWideThreads, K.value>(points, B, N, M, idx, stream);
        });
    if (plan.way == Way::kCluster)
        return with_places<kMaxPlaces>(divide_up(N, (int64_t)plan.blocks * kThreads), [&](auto K) {
            return launch_cluster<K.value>(points, B, N, M, plan.blocks, idx, stream);
        });
    const GridPlan grid = plan_grid(device, B, N);
    if (grid.places == 0) return launch_grid<0>(grid, points, B, N, M, idx, workspace, stream);
    return with_places<kMaxPlaces>(grid.places, [&](auto K) {
        return launch_grid<K.value>(grid, points, B, N, M, idx, workspace, stream);
    });
}

}  // extern "C"
