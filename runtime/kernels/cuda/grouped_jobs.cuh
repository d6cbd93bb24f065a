// Which tiles a pair of blocks computes at a time: a job is two tiles of one expert.

#pragma once

#include "hopper.cuh"

// Rows times transposed matrices; rows times matrices; transposed rows times rows.
#define NT 0
#define NN 1
#define TN 2
enum { STORE, ADD, SWIGLU, STORE_FP32, ADD_BF16 };  // what becomes of a tile

struct Arguments {
    TensorMap left, right;
    TensorMap thin_left, thin_right;  // with THIN: rows [R, thin] and matrices of another product, which is added
    char* out;             // bf16, or with ADD and STORE_FP32 fp32
    char* act;             // with SWIGLU: [R, F], of the operands' width; null: not written
    const float* weights;  // with SWIGLU: [T, K] routing weights
    const int* slots;      // with SWIGLU: [R] which of them a row takes, -1 for padding
    const int* ends;       // [E] ends of the experts' rows
    // Of 8-bit operands, what the largest number of their format stands for: of the left one, and of the right one one
    // or one for each expert; and of `act`, with what its elements' absolute values are at most, as found.
    const float *left_bound, *right_bound, *act_bound;
    float* act_amax;
    int num_n, depth, rows_per_expert, num_experts, columns;  // num_n tiles side by side hold the columns of the result
    int bounds_per_expert;  // 1: right_bound is [E]
    float factor;           // 1 / (largest number of the left format x that of the right)
    int num_walkers;        // pairs of blocks that do jobs one after another; each further pair does one of the last jobs
    int thin;               // with THIN: its depth
    int left_pitch, right_pitch;  // with BLOCKS: from one row of scales to the next
};

static_assert(sizeof(Arguments) == 640, "as the host packs it");

constexpr int STEP = 128 * 8 / BITS;  // elements of a row of 128 bytes

constexpr int NO_JOB = 1 << 30;

struct Job {
    int index, expert;
    int row, column;   // of this block's tile; in the experts' rows, or with TN in the expert's matrix
    int start, steps;  // of the reduction, steps of STEP
    bool stacked;      // the pair's tiles lie one below the other and share columns; else side by side, and share rows
};

// Bring the experts' ends to shared memory, by one warp: the tiles up to each, and above 16 bits the pairs of them.
__device__ void load_ends(const Arguments& args, u32* ends, u32 lane) {
    u32 carry = 0;
    for (int first = 0; first < args.num_experts; first += 32) {
        int expert = first + lane;
        u32 tiles = 0, pairs = 0;
        if (expert < args.num_experts) {
            tiles = args.ends[expert] / 128;
            pairs = (tiles - (expert ? args.ends[expert - 1] / 128 : 0)) / 2;
        }
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) {
            u32 other = __shfl_up_sync(~0u, pairs, distance);
            if (lane >= distance) pairs += other;
        }
        pairs += carry;
        if (expert < args.num_experts) ends[expert] = pairs << 16 | tiles;
        carry = __shfl_sync(~0u, pairs, 31);
    }
}

// Jobs of so many pairs of tiles, one below the other, and so many tiles that have no such neighbour.
__device__ __forceinline__ int num_jobs(int pairs, int singles, int num_n) {
    return pairs * num_n + singles * ((num_n + 1) / 2);
}

__device__ __forceinline__ int num_jobs_until(u32 end, int num_n) {
    int tiles = end & 0xffff, pairs = end >> 16;
    return num_jobs(pairs, tiles - 2 * pairs, num_n);
}

// The job with this index, which is of `expert` or a later one; expert E if there is none.
__device__ __forceinline__ Job job_at(const Arguments& args, const u32* ends, int index, int expert, u32 rank) {
    Job job;
    if (index == NO_JOB) expert = args.num_experts;
    int num_n = args.num_n, inner, num_tiles = (args.rows_per_expert + (EDGES ? 127 : 0)) / 128;
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
    if (KIND != TN) job.row += begin;
    job.start = KIND == TN ? begin : 0;
    job.steps = (KIND == TN ? num_rows : args.depth) / STEP;
    if (THIN) job.steps += (args.thin + STEP - 1) / STEP;
    return job;
}

// The jobs of a pair of blocks. What the walkers do is fixed when they start: one that starts late, because another
// kernel has its multiprocessors, ends late. The last jobs are for pairs that begin wherever others have ended.
struct Walk {
    int first, stride, end;

    __device__ __forceinline__ Walk(const Arguments& args, const u32* ends) {
        int num_tiles = (args.rows_per_expert + (EDGES ? 127 : 0)) / 128;
        int total = KIND == TN ? args.num_experts * num_jobs(num_tiles / 2, num_tiles % 2, args.num_n)
                               : num_jobs_until(ends[args.num_experts - 1], args.num_n);
        int pair = blockIdx.x / 2, loose = gridDim.x / 2 - args.num_walkers, walked = max(0, total - loose);
        bool walks = pair < args.num_walkers;
        first = walks ? pair : walked + pair - args.num_walkers;
        stride = walks ? args.num_walkers : NO_JOB;
        end = walks ? walked : total;
        if (first >= end) first = NO_JOB;
    }

    __device__ __forceinline__ int after(int index) const { return index < end - stride ? index + stride : NO_JOB; }
};
