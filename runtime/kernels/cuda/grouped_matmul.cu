// Grouped matrix products for Hopper: warp-specialised, persistent, fed by the tensor memory accelerator, in pairs of
// blocks that share half of what they read.
//
// Legend: R rows in expert order, each expert's rows padded with zero rows to a multiple of 128; E experts; N and K the
// sizes of an expert's matrix; a tile is 128 x BN of the result, by steps of 128 bytes along the reduction.
//
// A pair of blocks computes two tiles of one expert at a time: two that lie one below the other and read the same
// columns, or, for the last of an odd number, two side by side that read the same rows. Each block loads half of what
// both need and sends it to both, so that a pair reads 512 rows and columns a step instead of 768. In a block, one
// thread loads into a ring of shared-memory stages, and two warpgroups each hold 64 x BN in registers; while the tensor
// cores multiply, they write the tile before. Because padding rows are zero and aligned, no tile holds two experts, no
// row needs a mask, and a reduction over an expert's rows may run over its padding.
//
// With EDGES the sizes of a matrix are multiples of 64, and the last tiles reach beyond them: what they load there is zero
// or the next expert's, and is not written.
//
// Operands of 8 bits all lie with the reduction along their rows, as the tensor cores want them: transposed rows (TN)
// are given as [N, R]. The tensor cores sum their products with about 14 bits; with SPLIT a step's sum is added to a sum
// in fp32 instead, for which a tile takes half its columns at a time.
//
// With BLOCKS, and SPLIT, each 128 elements of a row of the left operand have a scale of their own; so have 128 x 128 elements
// of a matrix, and 128 elements of each of TN's right rows. A step's sum is scaled as it is added.
//
// With THIN, of NT and NN in bf16, the last steps of a tile are another product's, whose depth is small: low-rank adapters
// beside an expert's matrix. Its depth needn't be a multiple of a step: what lies beyond it in its rows is loaded as zeros.
//
// The host writes in front of this text the constants BN, STAGES, GROUP, KIND, EPILOGUE, EDGES, THIN, BITS, SPLIT, BLOCKS
// and WIDTH, the columns of one product, and how a product of this width names its operands: WGMMA_SHAPE, WGMMA_TYPES, ACC_NAMES,
// ACC_OPERANDS and ACC_NEXT.

#include "grouped_output.cuh"

constexpr int BOX_BYTES = 64 * 128;
constexpr int A_BYTES = 2 * BOX_BYTES;
constexpr int B_BYTES = BN / 64 * BOX_BYTES;
constexpr int STAGE_BYTES = A_BYTES + B_BYTES;
constexpr int NUM_WARPS = 8;  // that multiply
// Scales of a stage: of 128 rows, and where columns have them one by one, of BN columns.
constexpr int NUM_SCALES = !BLOCKS ? 0 : KIND == TN ? 128 + BN : 128;

struct Shared {
    char stages[STAGES][STAGE_BYTES];
    char slices[NUM_WARPS][NUM_SLICES][SLICE_BYTES];
#if BLOCKS
    float scales[STAGES][NUM_SCALES];
#endif
    u64 ready[STAGES], empty[STAGES];
    u32 ends[1];  // [E], as many as were asked for
};

__device__ __forceinline__ void load_step(
    const Arguments& args, const Job& job, int k, u32 rank, char* stage, u64& ready) {
    bool thin = THIN && k >= args.depth;
    const TensorMap &left = thin ? args.thin_left : args.left, &right = thin ? args.thin_right : args.right;
    if (thin) k -= args.depth;
    // Of what both blocks read, each loads the half with its rank.
#pragma unroll
    for (u32 half = 0; half < 2; ++half) {
        if (!job.stacked && half != rank) continue;
        int m = job.row + 64 * half;
        char* to = stage + half * BOX_BYTES;
        if (KIND == TN && BITS == 8) load(left, job.start + k, m, to, ready, !job.stacked);
        else if (KIND == TN) load(left, m, job.start + k, to, ready, !job.stacked);
        else load(left, k, m, to, ready, !job.stacked);
    }
    int matrix = job.expert * (thin && KIND == NN ? args.thin : args.rows_per_expert);
#pragma unroll
    for (u32 half = 0; half < 2; ++half) {
        if (job.stacked && half != rank) continue;
        char* to = stage + A_BYTES + half * (B_BYTES / 2);
        int column = job.column + half * (BN / 2);
        if (EPILOGUE == SWIGLU) column = job.column / 2 + half * (args.rows_per_expert / 2);  // half gate, half up
        if (BITS == 8 && KIND == TN) {
            load(right, job.start + k, column, to, ready, job.stacked);
        } else if (KIND == NT) {
            load(right, k, matrix + column, to, ready, job.stacked);
        } else {
            int row = KIND == TN ? job.start + k : matrix + k;
#pragma unroll
            for (int box = 0; box < BN / 128; ++box)
                load(right, column + 64 * box, row, to + box * BOX_BYTES, ready, job.stacked);
        }
    }
}

#if BLOCKS
// Scales of a step. Columns outside the result have the last ones'.
__device__ __forceinline__ void load_scales(const Arguments& args, const Job& job, int step, float* to, u64& ready) {
    long block = job.start / STEP + step;
    load_bytes(args.left_bound + block * args.left_pitch + job.row, 128 * 4, to, ready);
#if KIND == TN
#pragma unroll
    for (int first = 0; first < BN; first += 128) {
        int column = min(job.column + first, args.columns - 128);
        load_bytes(args.right_bound + block * args.right_pitch + column, 128 * 4, to + 128 + first, ready);
    }
#endif
}
#endif

// One thread.
__device__ __forceinline__ void load_all(const Arguments& args, Shared& shared, u32 rank) {
    int stage = 0;
    u32 parity = 1;
    Walk walk(args, shared.ends);
    Job job = job_at(args, shared.ends, walk.first, 0, rank);
    while (job.expert < args.num_experts) {
        for (int i = 0; i < job.steps; ++i) {
            wait(shared.empty[stage], parity);
            expect(shared.ready[stage], STAGE_BYTES + 4 * NUM_SCALES);
#if BLOCKS
            load_scales(args, job, i, shared.scales[stage], shared.ready[stage]);
#endif
            load_step(args, job, STEP * i, rank, shared.stages[stage], shared.ready[stage]);
            if (++stage == STAGES) stage = 0, parity ^= 1;
        }
        job = job_at(args, shared.ends, walk.after(job.index), job.expert, rank);
    }
}

template <int FRESH>
__device__ __forceinline__ void multiply_step(float (&acc)[WIDTH / 2], const char* a, const char* b) {
    constexpr int a_outer = BITS == 16 && KIND == TN, b_outer = BITS == 16 && KIND != NT;
    // bytes from 32 bytes of the reduction to the next
    constexpr u32 a_next = a_outer ? 16 * 128 : 32, b_next = b_outer ? 16 * 128 : 32;
    u64 a_desc = descriptor(a, BOX_BYTES), b_desc = descriptor(b, BOX_BYTES);
    start_products();
    multiply_32_bytes<a_outer, b_outer, !FRESH>(acc, a_desc, b_desc);
#pragma unroll
    for (int k = 1; k < 4; ++k)
        multiply_32_bytes<a_outer, b_outer, 1>(acc, a_desc + k * (a_next >> 4), b_desc + k * (b_next >> 4));
    commit_products();
}

#if !SPLIT
// Two warpgroups, 64 rows of the tile each.
__device__ __forceinline__ void multiply_all(const Arguments& args, Shared& shared, u32 rank, int warp, u32 lane) {
    int stage = 0;
    u32 parity = 0;
    Output output{args, shared.slices[warp], lane};
    Walk walk(args, shared.ends);
    Job job = job_at(args, shared.ends, walk.first, 0, rank);
    while (true) {
        bool last = job.expert == args.num_experts;  // nothing to multiply, but perhaps to write
        int steps = last ? 0 : job.steps, before = 0;
        Job next = job;
        if (steps == 0 && !last) next = job_at(args, shared.ends, walk.after(job.index), job.expert, rank);
        float acc[NUM_ACC];
#pragma unroll
        for (int i = 0; i < NUM_ACC; ++i) acc[i] = 0.f;
        output.plan(steps);
        for (int i = 0; i < steps || !output.done(); ++i) {
            if (i < steps) {
                wait(shared.ready[stage], parity);
                const char* tiles = shared.stages[stage];
                multiply_step<0>(acc, tiles + warp / 4 * BOX_BYTES, tiles + A_BYTES);
                if (i == 0) next = job_at(args, shared.ends, walk.after(job.index), job.expert, rank);
            }
            wait_products<1>(acc);
            // The step before this one is done: its stage is free for what both blocks load. Each warp tells both.
            if (i > 0 && i < steps && lane < 2) arrive_at(shared.empty[before], lane);
            if (i < steps) {
                before = stage;
                if (++stage == STAGES) stage = 0, parity ^= 1;
            }
            output.advance(i);
        }
        wait_products<0>(acc);
        if (steps > 0 && lane < 2) arrive_at(shared.empty[before], lane);
        if (last) return;
        if (job.column < args.columns) output.take(acc, job, warp);
        job = next;
    }
}

#else
// The scales of a matrix' blocks that a tile needs, a step ahead.
struct MatrixScales {
    const float* from[BN / 128];
    float current[BN / 128], next[BN / 128];

    __device__ __forceinline__ MatrixScales(const Arguments& args, const Job& job) {
        long matrix = long(job.expert) * (args.rows_per_expert / 128);
#pragma unroll
        for (int n = 0; n < BN / 128; ++n) {
            int block = min(job.column / 128 + n, args.columns / 128 - 1);
            from[n] = args.right_bound + (matrix + block) * args.right_pitch;
            next[n] = job.steps ? __ldg(from[n]) : 0.f;
        }
    }

    __device__ __forceinline__ void advance(int step, int steps) {
#pragma unroll
        for (int n = 0; n < BN / 128; ++n) {
            current[n] = next[n];
            if (step + 1 < steps) next[n] = __ldg(from[n] + step + 1);
        }
    }
};

// Add what the sums of a step stand for.
__device__ __forceinline__ void add_scaled(float* acc, const float (&part)[WIDTH / 2], const float (&of_rows)[2], float scale) {
    float both[2] = {of_rows[0] * scale, of_rows[1] * scale};
#pragma unroll
    for (int i = 0; i < WIDTH / 2; ++i) acc[i] = fmaf(part[i], both[i / 2 % 2], acc[i]);
}

// The scales of a thread's columns, two of each 8, of which some are read ahead: a read takes longer than what is done with it.
struct ColumnScales {
    static constexpr int AHEAD = 4, NUM = WIDTH / 8;
    u32 from;
    float2 read[AHEAD];

    __device__ __forceinline__ explicit ColumnScales(u32 from) : from(from) {
#pragma unroll
        for (int block = 0; block < AHEAD; ++block) read[block] = read_pair(from + 32 * block);
    }

    __device__ __forceinline__ float2 take(int block) {
        float2 scale = read[block % AHEAD];
        if (block + AHEAD < NUM) read[block % AHEAD] = read_pair(from + 32 * (block + AHEAD));
        return scale;
    }
};

__device__ __forceinline__ void add_scaled(
    float* acc, const float (&part)[WIDTH / 2], const float (&of_rows)[2], ColumnScales of_columns) {
#pragma unroll
    for (int block = 0; block < WIDTH / 8; ++block) {
        float2 scale = of_columns.take(block);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            int i = 4 * block + 2 * half;
            acc[i] = fmaf(part[i] * scale.x, of_rows[half], acc[i]);
            acc[i + 1] = fmaf(part[i + 1] * scale.y, of_rows[half], acc[i + 1]);
        }
    }
}

// The same with sums in fp32: while one warpgroup adds, the other's products run.
__device__ __forceinline__ void multiply_all(const Arguments& args, Shared& shared, u32 rank, int warp, u32 lane) {
    int stage = 0;
    u32 parity = 0;
    Output output{args, shared.slices[warp], lane};
    Walk walk(args, shared.ends);
    Job job = job_at(args, shared.ends, walk.first, 0, rank);
    float part[WIDTH / 2];
    while (job.expert < args.num_experts) {
        float acc[NUM_ACC];
#pragma unroll
        for (int i = 0; i < NUM_ACC; ++i) acc[i] = 0.f;
#if BLOCKS && KIND != TN
        MatrixScales of_matrix(args, job);
#endif
        for (int step = 0; step < job.steps; ++step) {
            wait(shared.ready[stage], parity);
            const char* tiles = shared.stages[stage];
#if BLOCKS
            const float* scales = shared.scales[stage];
            float of_rows[2] = {scales[16 * warp + lane / 4], scales[16 * warp + lane / 4 + 8]};
#if KIND != TN
            of_matrix.advance(step, job.steps);
#endif
#endif
#pragma unroll
            for (int n = 0; n < BN / WIDTH; ++n) {
                multiply_step<1>(part, tiles + warp / 4 * BOX_BYTES, tiles + A_BYTES + n * WIDTH * 128);
#if BLOCKS && KIND == TN
                ColumnScales of_columns(address(scales + 128 + n * WIDTH + lane % 4 * 2));
#endif
                wait_products<0>(part);
                bool last = n == BN / WIDTH - 1;
                if (last && !(BLOCKS && KIND == TN) && lane < 2) arrive_at(shared.empty[stage], lane);
#if BLOCKS && KIND == TN
                add_scaled(acc + n * WIDTH / 2, part, of_rows, of_columns);
                if (last) {  // the columns' scales have been read
                    __syncwarp();
                    if (lane < 2) arrive_at(shared.empty[stage], lane);
                }
#elif BLOCKS
                add_scaled(acc + n * WIDTH / 2, part, of_rows, of_matrix.current[n]);
#else
#pragma unroll
                for (int i = 0; i < WIDTH / 2; ++i) acc[n * WIDTH / 2 + i] += part[i];
#endif
            }
            if (++stage == STAGES) stage = 0, parity ^= 1;
        }
        if (job.column < args.columns) output.take(acc, job, warp);
        job = job_at(args, shared.ends, walk.after(job.index), job.expert, rank);
    }
}
#endif

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(384, 1)
    grouped_matmul(const __grid_constant__ Arguments args) {
    extern __shared__ __align__(1024) char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, rank = rank_in_pair();
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) {
            init_barrier(shared.ready[i], 1);
            init_barrier(shared.empty[i], 2 * NUM_WARPS);
        }
        fence_barrier_init();
    }
    if (warp == 1) load_ends(args, shared.ends, lane);
    __syncthreads();
    sync_pair();
    if (warp >= NUM_WARPS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (warp == NUM_WARPS && lane == 0) load_all(args, shared, rank);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        multiply_all(args, shared, rank, warp, lane);
    }
    __syncwarp();
    sync_pair();  // until neither block writes to the other's shared memory any more
}
