// Which tiles a pair of blocks computes at a time: a job is two tiles of one expert.

#pragma once

#include "hopper.cuh"

enum { NT, NN, TN };          // rows times transposed matrices; rows times matrices; transposed rows times rows
enum { STORE, ADD, SWIGLU, STORE_FP32 };  // what becomes of a tile

struct Arguments {
    TensorMap left, right;
    char* out;             // bf16, or with ADD and STORE_FP32 fp32
    char* act;             // with SWIGLU: [R, F] bf16
    const float* weights;  // with SWIGLU: [T, K] routing weights
    const int* slots;      // [R] which of them a row takes, -1 for padding
    const int* ends;       // [E] ends of the experts' rows
    int num_n, depth, rows_per_expert, num_experts;
};

static_assert(sizeof(Arguments) == 320, "as the host packs it");

struct Job {
    int index, expert;
    int row, column;   // of this block's tile; in the experts' rows, or with TN in the expert's matrix
    int start, steps;  // of the reduction, steps of 64
    bool stacked;      // the pair's tiles lie one below the other and share columns; else side by side, and share rows
    bool half;         // the lower half of the tile's rows are padding: nothing to multiply
};

// Of an expert whose last 64 rows are padding.
constexpr u32 HALF = 1u << 31;

// Bring the experts' ends to shared memory, by one warp: the tiles up to each, above 16 bits the pairs of them, and HALF.
__device__ void load_ends(const Arguments& args, u32* ends, u32 lane) {
    u32 carry = 0;
    for (int first = 0; first < args.num_experts; first += 32) {
        int expert = first + lane;
        u32 tiles = 0, pairs = 0, half = 0;
        if (expert < args.num_experts) {
            u32 before = expert ? args.ends[expert - 1] / 128 : 0;
            tiles = args.ends[expert] / 128;
            pairs = (tiles - before) / 2;
            // An expert's padding comes after its rows.
            if (tiles > before && args.slots[128 * tiles - 64] < 0) half = HALF;
        }
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) {
            u32 other = __shfl_up_sync(~0u, pairs, distance);
            if (lane >= distance) pairs += other;
        }
        pairs += carry;
        if (expert < args.num_experts) ends[expert] = half | pairs << 16 | tiles;
        carry = __shfl_sync(~0u, pairs, 31);
    }
}

// Jobs of so many pairs of tiles, one below the other, and so many tiles that have no such neighbour.
__device__ __forceinline__ int num_jobs(int pairs, int singles, int num_n) {
    return pairs * num_n + singles * ((num_n + 1) / 2);
}

__device__ __forceinline__ int num_jobs_until(u32 end, int num_n) {
    int tiles = end & 0xffff, pairs = (end & ~HALF) >> 16;
    return num_jobs(pairs, tiles - 2 * pairs, num_n);
}

// The job with this index, which is of `expert` or a later one; expert E if there is none.
__device__ __forceinline__ Job job_at(const Arguments& args, const u32* ends, int index, int expert, u32 rank) {
    Job job;
    int num_n = args.num_n, inner, num_tiles = args.rows_per_expert / 128;
    if (KIND == TN) {
        int per_expert = num_jobs(num_tiles / 2, num_tiles % 2, num_n);
        expert = min(index / per_expert, args.num_experts);
        inner = index - expert * per_expert;
    } else {
        while (expert < args.num_experts && index >= num_jobs_until(ends[expert], num_n)) ++expert;
    }
    job.index = index;
    job.expert = expert;
    if (expert == args.num_experts) return job;
    u32 before = expert ? ends[expert - 1] : 0;
    int begin = (before & 0xffff) * 128, num_rows = (ends[expert] & 0xffff) * 128 - begin;
    if (KIND != TN) {
        inner = index - num_jobs_until(before, num_n);
        num_tiles = num_rows / 128;
    }
    int num_pairs = num_tiles / 2;
    job.stacked = inner < num_pairs * num_n;
    if (job.stacked) {
        // Groups of pairs along the rows: what runs at one time shares operands in the L2 cache.
        int group = inner / (GROUP * num_n), height = min(GROUP, num_pairs - group * GROUP);
        inner -= group * GROUP * num_n;
        int n = inner / height;
        job.row = 256 * (group * GROUP + inner - n * height) + 128 * rank;
        job.column = n * BN;
    } else {
        // With an odd number of columns of tiles, the last job's second tile lies outside: computed, and not written.
        job.row = 128 * (num_tiles - 1);
        job.column = (2 * (inner - num_pairs * num_n) + rank) * BN;
    }
    bool half = ends[expert] & HALF;
    if (KIND != TN) job.row += begin;
    job.half = KIND != TN && half && job.row + 128 == begin + num_rows;
    job.start = KIND == TN ? begin : 0;
    job.steps = KIND == TN ? num_rows / 64 - half : args.depth / 64;
    return job;
}
