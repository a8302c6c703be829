// A hash table of cubic cells over the points of each scene, for searches that look at the 27 cells around a place.
//
// Built by cells.cu in four launches, without waiting for the device: count, place, sort. Points of one bucket lie side by
// side, in no fixed order. Cells that share a bucket are seen together, so that a search finds more points than asked for,
// never fewer.
#pragma once

#include "common.cuh"

namespace pn2 {

struct Cell {
    int x, y, z;
};

struct CellTable {
    unsigned* ends;        // [B, buckets]: where in `sorted` of the scene a bucket ends
    unsigned* cursors;     // [B], how much of the scene's `sorted` is given away
    unsigned* starts;      // [B, buckets]
    float4* sorted;        // [B, N]: x, y, z and the bits of the index
    double* scales;        // [B]: cells per unit of the points
    unsigned buckets;      // a power of two
};

// Bytes of a table over N points of B scenes.
int64_t cell_table_bytes(int64_t B, int64_t N);

// Where a table lies in a workspace.
CellTable cell_table_in(void* workspace, int64_t B, int64_t N);

// Builds the table. `width` is the cells' edge; with 0 each scene gets a width of its own, at which about two points fall
// into a cell where they fill their bounding box evenly. Returns a cudaError_t.
int build_cell_table(const CellTable& table, const float* points, int64_t B, int64_t N, double width,
                     cudaStream_t stream);

// The number of a coordinate's cell on its axis. Taken in double precision, a rounding error is far smaller than one of the
// float distances. Clamping is monotone and moves no two cells further apart.
__device__ __forceinline__ int cell_number(float value, double scale) {
    return (int)fmin(fmax(floor((double)value * scale), -1e9), 1e9);
}

__device__ __forceinline__ Cell cell_of(float x, float y, float z, double scale) {
    return {cell_number(x, scale), cell_number(y, scale), cell_number(z, scale)};
}

__device__ __forceinline__ unsigned bucket_of(Cell cell, unsigned mask) {
    unsigned hash = (unsigned)cell.x * 0x9E3779B1u + (unsigned)cell.y * 0x85EBCA77u + (unsigned)cell.z * 0xC2B2AE3Du;
    hash ^= hash >> 15;
    hash *= 0x2C1B3C6Du;
    hash ^= hash >> 13;
    return hash & mask;
}

// The points in the 27 cells around a cell, numbered 0 to `total`. Made and read by whole warps.
class Surroundings {
  public:
    __device__ Surroundings(const CellTable& table, int64_t scene, Cell middle) {
        // Lane l < 27 looks up one cell. Two cells may share a bucket, which is then visited once.
        const int lane = threadIdx.x & 31;
        const Cell cell = {middle.x + lane % 3 - 1, middle.y + lane / 3 % 3 - 1, middle.z + lane / 9 - 1};
        const unsigned bucket = lane < 27 ? bucket_of(cell, table.buckets - 1) : table.buckets + lane;
        const bool first_with_it = __ffs(__match_any_sync(kAllLanes, bucket)) - 1 == lane;
        unsigned start = 0, count = 0;
        if (lane < 27 && first_with_it) {
            start = table.starts[scene * table.buckets + bucket];
            count = table.ends[scene * table.buckets + bucket] - start;
        }
        end_ = count;  // inclusive sum over the lanes
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) {
            const unsigned lower = __shfl_up_sync(kAllLanes, end_, distance);
            if (lane >= distance) end_ += lower;
        }
        total_ = __shfl_sync(kAllLanes, end_, 31);
        shift_ = start - (end_ - count);
    }

    __device__ unsigned total() const { return total_; }

    // Where in the scene's `sorted` point `number` lies; each lane asks for its own, any where there are fewer.
    __device__ unsigned place_of(unsigned number) const {
        int owner = 0;  // the first lane whose `end_` is above the number
#pragma unroll
        for (int step = 16; step > 0; step /= 2) {
            const unsigned below = __shfl_sync(kAllLanes, end_, owner + step - 1);
            if (below <= number) owner += step;
        }
        return number + __shfl_sync(kAllLanes, shift_, owner);
    }

  private:
    unsigned end_, total_;
    unsigned shift_;  // modulo 2^32: number of a point -> place in `sorted`
};

}  // namespace pn2
