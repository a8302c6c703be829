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
#include <climits>
#include <type_traits>

#include "common.cuh"

namespace pn2 {
namespace {

#ifndef PN2_FPS_THREADS
#define PN2_FPS_THREADS 512
#endif
constexpr int kThreads = PN2_FPS_THREADS;
constexpr int kWarps = kThreads / 32;
constexpr int kMaxCluster = 16;
static_assert(kWarps <= 32, "one warp reduces the candidates of a block");

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

// The block's K * kThreads points; place k of thread t holds point (k * blocks + block) * kThreads + t of the scene.
template <int K>
struct Points {
    float x[K], y[K], z[K], nearest[K];

    __device__ void load(const float* scene, int N, int block, int blocks, float* positions) {
#pragma unroll
        for (int k = 0; k < K; ++k) {
            const int i = (k * blocks + block) * kThreads + threadIdx.x;
            const bool real = i < N;
            x[k] = real ? scene[3 * (int64_t)i] : 0.f;
            y[k] = real ? scene[3 * (int64_t)i + 1] : 0.f;
            z[k] = real ? scene[3 * (int64_t)i + 2] : 0.f;
            nearest[k] = real ? INFINITY : -1.f;
            float* position = positions + 3 * (k * kThreads + threadIdx.x);
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
        return {best, (best_k * blocks + block) * kThreads + (int)threadIdx.x};
    }
};

// Where the block keeps point `index` of the scene in `positions`.
__device__ __forceinline__ int place_of(int index, int blocks) {
    const int group = index / kThreads;
    return group / blocks * kThreads + index % kThreads;
}

// The block's best candidate, known to every lane of the warps that call this after the barrier.
__device__ __forceinline__ Candidate block_best(const Candidate* of_warps) {
    const int lane = threadIdx.x & 31;
    const Candidate mine = lane < kWarps ? of_warps[lane] : Candidate{INT_MIN, INT_MAX};
    return warp_best(mine.distance, mine.index);
}

// ---- one block a scene

template <int K>
__global__ void __launch_bounds__(kThreads) sample_block(const float* points, int N, int M, int32_t* idx) {
    extern __shared__ float positions[];
    __shared__ Candidate of_warps[2][kWarps];
    const float* scene = points + (int64_t)blockIdx.x * N * 3;
    int32_t* chosen = idx + (int64_t)blockIdx.x * M;
    Points<K> mine;
    mine.load(scene, N, 0, 1, positions);
    __syncthreads();
    float cx = positions[0], cy = positions[1], cz = positions[2];
    if (threadIdx.x == 0) chosen[0] = 0;
    for (int step = 1; step < M; ++step) {
        const Candidate of_thread = mine.update(cx, cy, cz, 0, 1);
        const Candidate of_warp = warp_best(of_thread.distance, of_thread.index);
        if ((threadIdx.x & 31) == 0) of_warps[step & 1][threadIdx.x / 32] = of_warp;
        __syncthreads();  // one a step: the next step writes to the other half of of_warps
        const Candidate best = block_best(of_warps[step & 1]);
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
    __shared__ Candidate of_warps[kWarps];
    // Two of each: a block can be one step ahead of another, never two, since it needs that one's candidate to go on.
    __shared__ Message messages[2][kMaxCluster];
    __shared__ int indices[2][kMaxCluster];
    __shared__ alignas(8) uint64_t barriers[2];
    const unsigned rank = cluster_rank(), blocks = cluster_blocks();
    const int64_t scene_index = blockIdx.x / blocks;
    const float* scene = points + scene_index * N * 3;
    int32_t* chosen = idx + scene_index * M;
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;

    Points<K> mine;
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
        if (lane == 0) of_warps[warp] = of_warp;
        __syncthreads();
        if (warp == 0) {
            const Candidate best = block_best(of_warps);
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
#endif
}

// ---- a group of blocks a scene, through global memory

// K = 0 keeps points and distances in global memory: any number of points.
template <int K>
__global__ void __launch_bounds__(kThreads)
    sample_grid(const float* points, int B, int N, int M, int blocks, int32_t* idx, unsigned long long* words,
                float* nearest) {
    __shared__ Candidate of_warps[2][kWarps];
    extern __shared__ float positions[];
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    const int block = blockIdx.x % blocks, groups = gridDim.x / blocks;
    for (int64_t scene_index = blockIdx.x / blocks; scene_index < B; scene_index += groups) {
        const float* scene = points + scene_index * N * 3;
        int32_t* chosen = idx + scene_index * M;
        Points<K == 0 ? 1 : K> mine;
        float* distances = nearest + scene_index * N;
        if constexpr (K == 0) {
            for (int i = block * kThreads + threadIdx.x; i < N; i += blocks * kThreads) distances[i] = INFINITY;
        } else {
            mine.load(scene, N, block, blocks, positions);
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
            if (lane == 0) of_warps[step & 1][warp] = of_warp;
            __syncthreads();
            // The word is its own flag: fresh words are zero, and a candidate's is not, as ~index is not. A block without
            // points sends distance -1 as the least possible word.
            unsigned long long* step_words = words + (scene_index * M + step) * blocks;
            if (warp == 0) {
                const Candidate best = block_best(of_warps[step & 1]);
                const unsigned long long word =
                    best.distance < 0 ? 1ull
                                      : (unsigned long long)best.distance << 32 | (unsigned)~best.index;
                if (lane == 0) *(volatile unsigned long long*)(step_words + block) = word;
            }
            int distance = INT_MIN, index = INT_MAX;
            for (int other = lane; other < blocks; other += 32) {
                unsigned long long word;
                do word = *(volatile unsigned long long*)(step_words + other);
                while (word == 0);
                const int its_distance = word == 1 ? INT_MIN : (int)(word >> 32);
                const int its_index = (int)~(unsigned)word;
                if (its_distance > distance || (its_distance == distance && its_index < index))
                    distance = its_distance, index = its_index;
            }
            const Candidate best = warp_best(distance, index);
            const float* point = scene + 3 * (int64_t)best.index;
            cx = point[0], cy = point[1], cz = point[2];
            if (threadIdx.x == 0 && block == 0) chosen[step] = best.index;
        }
    }
}

// ---- choice

constexpr int kMaxPlaces = 25;  // of a thread: 100 of its 128 registers

// Calls `body` with the smallest number of places a thread that is compiled and holds `needed`.
template <typename Body>
int with_places(int64_t needed, Body body) {
    if (needed <= 1) return body(std::integral_constant<int, 1>{});
    if (needed <= 2) return body(std::integral_constant<int, 2>{});
    if (needed <= 3) return body(std::integral_constant<int, 3>{});
    if (needed <= 5) return body(std::integral_constant<int, 5>{});
    if (needed <= 8) return body(std::integral_constant<int, 8>{});
    if (needed <= 10) return body(std::integral_constant<int, 10>{});
    if (needed <= 15) return body(std::integral_constant<int, 15>{});
    if (needed <= 20) return body(std::integral_constant<int, 20>{});
    return body(std::integral_constant<int, kMaxPlaces>{});
}

template <int K>
int launch_block(const float* points, int64_t B, int64_t N, int64_t M, int32_t* idx, cudaStream_t stream) {
    const int bytes = K * kThreads * 3 * sizeof(float);
    const cudaError_t error = allow_shared(sample_block<K>, bytes);
    if (error != cudaSuccess) return error;
    sample_block<K><<<B, kThreads, bytes, stream>>>(points, N, M, idx);
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

// Blocks of a cluster for a scene: the size with the least work on any multiprocessor; 0 where a cluster cannot hold it.
int choose_cluster(int64_t B, int64_t N) {
    // One answer a device and number of places; asking takes tens of microseconds. Filled alike by any thread.
    static int known[64][5][kMaxPlaces + 1];
    int index = 0;
    if (cudaGetDevice(&index) != cudaSuccess || index >= 64) return 0;
    int chosen = 0;
    int64_t least = INT64_MAX;
    for (int power = 4; power >= 1; --power) {
        const int blocks = 1 << power;
        const int64_t needed = divide_up(N, (int64_t)blocks * kThreads);
        if (needed > kMaxPlaces) break;
        int clusters = 0;
        const int places = with_places(needed, [&](auto K) {
            int& answer = known[index][power][K.value];
            if (answer == 0) answer = 1 + active_clusters<K.value>(blocks);
            clusters = answer - 1;
            return K.value;
        });
        if (clusters == 0) continue;
        // in units of a step: a place costs about 16 warps' instructions, an exchange about as much as 8 places
        const int64_t cost = divide_up(B, clusters) * (places + 8);
        if (cost < least) least = cost, chosen = blocks;
    }
    return chosen;
}

struct GridPlan {
    int places = 0, blocks = 0, groups = 0;  // places 0: global memory
};

// As many blocks as run at once, shared out over the scenes.
int plan_grid(int64_t B, int64_t N, GridPlan* plan) {
    Device device;
    const cudaError_t error = current_device(&device);
    if (error != cudaSuccess) return error;
    // one block a multiprocessor: with more, the exchange costs more than the second block's work gains
    const int64_t useful = divide_up(N, (int64_t)kThreads * 4);
    const int64_t groups = B < device.processors ? B : device.processors;
    int64_t blocks = device.processors / groups;
    if (blocks > useful) blocks = useful;
    const int64_t needed = divide_up(N, blocks * kThreads);
    plan->blocks = blocks, plan->groups = groups;
    plan->places = needed > kMaxPlaces ? 0 : (int)needed;
    return cudaSuccess;
}

template <int K>
int launch_grid(const GridPlan& plan, const float* points, int64_t B, int64_t N, int64_t M, int32_t* idx,
                void* workspace, cudaStream_t stream) {
    const int bytes = K * kThreads * 3 * sizeof(float);
    cudaError_t error = allow_shared(sample_grid<K>, bytes);
    if (error != cudaSuccess) return error;
    const int64_t words_bytes = B * M * plan.blocks * sizeof(unsigned long long);
    auto* words = static_cast<unsigned long long*>(workspace);
    auto* nearest = reinterpret_cast<float*>(static_cast<char*>(workspace) + align_up(words_bytes));
    if ((error = cudaMemsetAsync(words, 0, words_bytes, stream)) != cudaSuccess) return error;
    int scenes = B, num_points = N, samples = M, blocks = plan.blocks;
    void* arguments[] = {&points, &scenes, &num_points, &samples, &blocks, &idx, &words, &nearest};
    return cudaLaunchCooperativeKernel(sample_grid<K>, dim3(plan.blocks * plan.groups), dim3(kThreads), arguments,
                                       bytes, stream);
}

#ifndef PN2_FPS_BLOCK_PLACES
#define PN2_FPS_BLOCK_PLACES 8
#endif

enum class Plan { kBlock, kCluster, kGrid };

int choose(int64_t B, int64_t N, Plan* plan, int* cluster) {
    Device device;
    const cudaError_t error = current_device(&device);
    if (error != cudaSuccess) return error;
    *cluster = 0;
    *plan = Plan::kGrid;
    const bool small = N <= PN2_FPS_BLOCK_PLACES * kThreads;  // an exchange would cost more than it gains
    const bool many = B >= 2 * device.processors && N <= (device.major >= 9 ? 15 : 10) * kThreads;
    if (small || many) {
        *plan = Plan::kBlock;
    } else if (device.major >= 9 && (*cluster = choose_cluster(B, N)) > 0) {
        *plan = Plan::kCluster;
    }
    return cudaSuccess;
}

}  // namespace
}  // namespace pn2

using namespace pn2;

extern "C" {

int64_t pn2_furthest_point_sample_workspace(int64_t B, int64_t N, int64_t M) {
    Plan plan;
    GridPlan grid;
    int cluster;
    if (B == 0 || M == 0 || choose(B, N, &plan, &cluster) != cudaSuccess || plan != Plan::kGrid ||
        plan_grid(B, N, &grid) != cudaSuccess)
        return 0;
    const int64_t words = align_up(B * M * grid.blocks * sizeof(unsigned long long));
    return words + (grid.places == 0 ? B * N * sizeof(float) : 0);
}

int pn2_furthest_point_sample(const float* points, int64_t B, int64_t N, int64_t M, int32_t* idx, void* workspace,
                              intptr_t context) {
    if (B == 0 || M == 0) return 0;
    if (N > INT_MAX || M > INT_MAX || B > INT_MAX) return cudaErrorInvalidValue;
    const cudaStream_t stream = stream_of(context);
    Plan plan;
    int cluster;
    if (const int error = choose(B, N, &plan, &cluster)) return error;
    if (plan == Plan::kBlock)
        return with_places(divide_up(N, kThreads), [&](auto K) {
            return launch_block<K.value>(points, B, N, M, idx, stream);
        });
    if (plan == Plan::kCluster)
        return with_places(divide_up(N, (int64_t)cluster * kThreads), [&](auto K) {
            return launch_cluster<K.value>(points, B, N, M, cluster, idx, stream);
        });
    GridPlan grid;
    if (const int error = plan_grid(B, N, &grid)) return error;
    if (grid.places == 0) return launch_grid<0>(grid, points, B, N, M, idx, workspace, stream);
    return with_places(grid.places, [&](auto K) {
        return launch_grid<K.value>(grid, points, B, N, M, idx, workspace, stream);
    });
}

}  // extern "C"
