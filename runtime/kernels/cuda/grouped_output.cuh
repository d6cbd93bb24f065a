// A finished tile on its way to memory.

#pragma once

#include "grouped_jobs.cuh"

constexpr int NUM_ACC = BN / 2;        // accumulators of a thread
constexpr int SLICE_BYTES = 16 * 128;  // what a warp writes at a time
constexpr int NUM_SLICES = BLOCKS ? 1 : 2;  // scales take the room of the second
constexpr int MAX_SPACING = 4;         // steps from one unit of output to the next
constexpr bool IN_FP32 = EPILOGUE == ADD || EPILOGUE == STORE_FP32;
constexpr bool AT_ONCE = IN_FP32 || SPLIT;  // there are no registers to keep a tile in

// A warp's 16 rows of a tile, rounded to bf16, and what remains to be done with them. That is done in units between the
// steps of the next tile, while the tensor cores are busy; only what registers have no room for, sums in fp32 and what
// is added up in fp32, is written at once.
struct Output {
    static constexpr int UNITS = AT_ONCE ? 0 : EPILOGUE == SWIGLU ? 3 * BN / 128 : BN / 64;

    const Arguments& args;
    char (*slices)[SLICE_BYTES];  // taken in turn
    u32 lane;
    int unit = UNITS, due = 0, spacing = 1;  // the next unit, its step, and the steps between two
    u32 packed[AT_ONCE ? 1 : NUM_ACC / 2];
    int row, column;
    float weight[2];  // routing weights of the thread's two rows
    float scale = 1.f;  // of the product, with 8-bit operands
    float amax = 0.f;   // of the activations so far
    u32 told = 0;       // what the device knows of it

    __device__ __forceinline__ Slice slice(int i) const { return {address(slices[i % NUM_SLICES]), lane}; }

    __device__ __forceinline__ bool done() const { return unit >= UNITS; }

    // Before a tile of so many steps.
    __device__ __forceinline__ void plan(int steps) {
        spacing = max(1, min(MAX_SPACING, (steps - 1) / max(UNITS, 1)));
    }

    // What is due at a step of the next tile.
    __device__ __forceinline__ void advance(int step) {
        if (done() || step != due) return;
        run_unit<0>();
        ++unit;
        due += spacing;
    }

    // A finished tile; the one before is done.
    __device__ __forceinline__ void take(const float (&acc)[NUM_ACC], const Job& job, int warp) {
        row = job.row + 16 * warp;
        if (EDGES && KIND == TN && row >= args.rows_per_expert) return;  // rows of nothing
        if (KIND == TN) row += job.expert * args.rows_per_expert;
        column = job.column;
        if (BITS == 8 && !BLOCKS) scale = args.factor * *args.left_bound * args.right_bound[job.expert * args.bounds_per_expert];
        if constexpr (IN_FP32) {
            write_fp32(acc);
        } else if constexpr (AT_ONCE) {
            write_bf16(acc);
        } else {
#pragma unroll
            for (int i = 0; i < NUM_ACC / 2; ++i) packed[i] = pack_bf16(acc[2 * i] * scale, acc[2 * i + 1] * scale);
            if (EPILOGUE == SWIGLU) {
                for (int i = 0; i < 2; ++i) {
                    int slot = args.slots[row + lane / 4 + 8 * i];
                    weight[i] = slot < 0 ? 0.f : args.weights[slot];
                }
            }
            unit = 0;
            due = 1;
        }
    }

  private:
    // Write a slice to an array whose rows are `pitch` bytes apart, in whole lines. The lanes meet before, because each
    // reads what others put there, and after, because the slice is taken again.
    __device__ __forceinline__ void store(const Slice& slice, char* base, long pitch, long column_bytes) const {
        __syncwarp();
        char* to = base + (row + lane / 8) * pitch + column_bytes + lane % 8 * 16;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (EPILOGUE == ADD) add_to_memory(reinterpret_cast<float*>(to + 4 * i * pitch), slice.line(i));
            else if (EPILOGUE == ADD_BF16) add_bf16_to_memory(to + 4 * i * pitch, slice.line(i));
            else *reinterpret_cast<uint4*>(to + 4 * i * pitch) = slice.line(i);
        }
        __syncwarp();
    }

    __device__ __forceinline__ void write_fp32(const float (&acc)[NUM_ACC]) const {
#pragma unroll
        for (int part = 0; part < BN / 32; ++part) {
            if (EDGES && column + 32 * part >= args.columns) return;
#pragma unroll
            for (int block = 0; block < 4; ++block) {
                float values[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) values[i] = acc[16 * part + 4 * block + i] * scale;
                slice(part).put(block, values);
            }
            store(slice(part), args.out, args.columns * 4l, column * 4l + 128 * part);
        }
    }

    __device__ __forceinline__ void write_bf16(const float (&acc)[NUM_ACC]) const {
#pragma unroll
        for (int part = 0; part < BN / 64; ++part) {
            if (EDGES && column + 64 * part >= args.columns) return;
            u32 values[16];
#pragma unroll
            for (int i = 0; i < 16; ++i)
                values[i] = pack_bf16(acc[32 * part + 2 * i] * scale, acc[32 * part + 2 * i + 1] * scale);
            write(slice(part), values, args.columns * 2l, column * 2l + 128 * part);
        }
    }

    __device__ __forceinline__ void write(const Slice& slice, const u32* values, long pitch, long column_bytes) const {
#pragma unroll
        for (int block = 0; block < 4; ++block) slice.put(block, values + 4 * block);
        store(slice, args.out, pitch, column_bytes);
    }

    template <int UNIT>
    __device__ __forceinline__ void run_unit() {
        if constexpr (UNIT < UNITS) {
            if (unit != UNIT) return run_unit<UNIT + 1>();
            if constexpr (EPILOGUE == SWIGLU) run_swiglu(UNIT / 3, UNIT % 3);
            else if (!EDGES || column + 64 * UNIT < args.columns)
                write(slice(UNIT), packed + 16 * UNIT, args.columns * 2l, column * 2l + 128 * UNIT);
        }
    }

    // 64 columns of gate, of up, or of the activation.
    __device__ __forceinline__ void run_swiglu(int part, int what) {
        const u32 *gate = packed + 16 * part, *up = packed + NUM_ACC / 4 + 16 * part;
        long width_bytes = args.rows_per_expert, column_bytes = column + 128 * part;  // half the rows, half the columns
        if (what < 2) return write(slice(what), what ? up : gate, 2 * width_bytes, column_bytes + what * width_bytes);
        Slice to = slice(0);
        float act_scale = BITS == 8 && args.act ? 448.f / *args.act_bound : 1.f;
#pragma unroll
        for (int block = 0; block < 4; ++block) {
            u32 act[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float value[2];
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    float g = half_of(gate[4 * block + i], j), u = half_of(up[4 * block + i], j);
                    value[j] = __fdividef(g, 1.f + __expf(-g)) * u * weight[i % 2];
                    if (BITS == 8) amax = fmaxf(amax, fabsf(value[j]));
                }
                act[i] = BITS == 8 ? pack_e4m3(value[0] * act_scale, value[1] * act_scale)
                                   : pack_bf16(value[0], value[1]);
            }
            if (BITS == 8) to.put_bytes(block, act);
            else to.put(block, act);
        }
        if (BITS == 16) store(to, args.act, width_bytes, column_bytes);
        else if (args.act) store_bytes(to, args.act, width_bytes / 2, column_bytes / 2);
        if (BITS == 8 && part == BN / 128 - 1) found_amax();
    }

    // Write 16 rows of 64 bytes.
    __device__ __forceinline__ void store_bytes(const Slice& slice, char* base, long pitch, long column_bytes) const {
        __syncwarp();
        char* to = base + (row + lane / 4) * pitch + column_bytes + lane % 4 * 16;
#pragma unroll
        for (int i = 0; i < 2; ++i) *reinterpret_cast<uint4*>(to + 8 * i * pitch) = slice.line_of_64(i);
        __syncwarp();
    }

    // Numbers that aren't negative are ordered as their bits are.
    __device__ __forceinline__ void found_amax() {
        u32 most = __reduce_max_sync(~0u, __float_as_uint(amax));
        if (lane == 0 && most > told) atomicMax(reinterpret_cast<u32*>(args.act_amax), most);
        told = max(told, most);
    }
};
