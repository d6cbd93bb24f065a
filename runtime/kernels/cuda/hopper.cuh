// Hopper's instructions: barriers, copies by the tensor memory accelerator, and products of a warpgroup.
// Source: the PTX ISA 9.0 (https://docs.nvidia.com/cuda/archive/13.0.0/parallel-thread-execution/), on mbarrier,
// cp.async.bulk.tensor, red, wgmma (matrix descriptors, layouts of accumulators) and stmatrix.

#pragma once

typedef unsigned int u32;
typedef unsigned long long u64;

struct alignas(64) TensorMap {
    char bytes[128];
};

__device__ __forceinline__ u32 address(const void* pointer) {
    return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

// ---- a pair of blocks (a cluster of two)

__device__ __forceinline__ u32 rank_in_pair() {
    u32 rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

__device__ __forceinline__ void sync_pair() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// ---- barriers in shared memory

__device__ __forceinline__ void init_barrier(u64& barrier, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address(&barrier)), "r"(count));
}

__device__ __forceinline__ void fence_barrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void wait(u64& barrier, u32 parity) {
    asm volatile(
        "{\n.reg .pred done;\nagain:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}" ::"r"(address(&barrier)),
        "r"(parity)
        : "memory");
}

// Arrive, and let the barrier wait for so many bytes as well.
__device__ __forceinline__ void expect(u64& barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(&barrier)), "r"(bytes)
                 : "memory");
}

// Arrive at the barrier in the same place of the block with this rank. Only what the tensor cores read precedes it, so
// it needs no release to the cluster, which would be a fence of the whole GPU.
__device__ __forceinline__ void arrive_at(u64& barrier, u32 rank) {
    asm volatile(
        "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(address(&barrier)),
        "r"(rank)
        : "memory");
}

// ---- copies

// Load a box and tell the barrier; `both` sends it to the same place in both blocks of the pair, and tells both.
__device__ __forceinline__ void load(const TensorMap& map, int column, int row, char* to, u64& barrier, bool both) {
    u32 destination = address(to), signal = address(&barrier);
    if (both) {
        asm volatile(
            "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
            " [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(destination),
            "l"(&map), "r"(column), "r"(row), "r"(signal), "h"(static_cast<unsigned short>(3))
            : "memory");
    } else {
        asm volatile(
            "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::
                "r"(destination), "l"(&map), "r"(column), "r"(row), "r"(signal)
            : "memory");
    }
}

// Load bytes that lie in a row, multiples of 16 of them from and to multiples of 16, and tell the barrier.
__device__ __forceinline__ void load_bytes(const void* from, int bytes, void* to, u64& barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     address(to)),
                 "l"(from), "r"(bytes), "r"(address(&barrier))
                 : "memory");
}

// Two numbers in shared memory; in its place among other reads, so that they don't all need registers at once.
__device__ __forceinline__ float2 read_pair(u32 from) {
    float2 pair;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(pair.x), "=f"(pair.y) : "r"(from) : "memory");
    return pair;
}

__device__ __forceinline__ void add_to_memory(float* to, uint4 values) {
    asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(__uint_as_float(values.x)),
                 "f"(__uint_as_float(values.y)), "f"(__uint_as_float(values.z)), "f"(__uint_as_float(values.w))
                 : "memory");
}

__device__ __forceinline__ void add_bf16_to_memory(char* to, uint4 values) {
    asm volatile("red.global.add.noftz.v4.bf16x2 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(values.x), "r"(values.y),
                 "r"(values.z), "r"(values.w)
                 : "memory");
}

// ---- 16 rows of 128 bytes in shared memory, swizzled as the tensor memory accelerator does it, for one warp

struct Slice {
    u32 at, lane;

    __device__ __forceinline__ u32 of_chunk(u32 row, u32 chunk) const {
        return at + row * 128 + (chunk ^ row % 8) * 16;
    }

    // A 16 x 16 block in bf16, as a product's accumulators lie: of columns 0 to 7 the upper and lower rows, then of 8
    // to 15.
    __device__ __forceinline__ void put(int block, const u32* packed) const {
        asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                         of_chunk(lane % 16, 2 * block + lane / 16)),
                     "r"(packed[0]), "r"(packed[1]), "r"(packed[2]), "r"(packed[3])
                     : "memory");
    }

    // A 16 x 8 block in fp32.
    __device__ __forceinline__ void put(int block, const float* acc) const {
#pragma unroll
        for (int half = 0; half < 2; ++half)
            asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(
                             of_chunk(lane / 4 + 8 * half, 2 * block + lane % 4 / 2) + lane % 2 * 8),
                         "f"(acc[2 * half]), "f"(acc[2 * half + 1])
                         : "memory");
    }

    // Rows of 64 bytes: a 16 x 16 block in 8 bits, two numbers in each word, as `put` takes them.
    __device__ __forceinline__ void put_bytes(int block, const u32* packed) const {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            asm volatile("st.shared.u16 [%0], %1;" ::"r"(of_chunk_of_64(lane / 4 + i % 2 * 8, block) + i / 2 * 8 +
                                                         lane % 4 * 2),
                         "h"(static_cast<unsigned short>(packed[i]))
                         : "memory");
    }

    __device__ __forceinline__ u32 of_chunk_of_64(u32 row, u32 chunk) const {
        return at + row * 64 + (chunk ^ row / 2 % 4) * 16;
    }

    // The lane's 16 bytes of the rows 8 i to 8 i + 7.
    __device__ __forceinline__ uint4 line_of_64(int i) const { return read(of_chunk_of_64(8 * i + lane / 4, lane % 4)); }

    // The lane's 16 bytes of the rows 4 i to 4 i + 3.
    __device__ __forceinline__ uint4 line(int i) const { return read(of_chunk(4 * i + lane / 8, lane % 8)); }

    __device__ __forceinline__ uint4 read(u32 from) const {
        uint4 line;
        asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(line.x), "=r"(line.y), "=r"(line.z), "=r"(line.w)
                     : "r"(from)
                     : "memory");
        return line;
    }
};

// ---- products

// An operand: swizzled rows of 128 bytes; `next` is the distance in bytes of the next 64 along its outer dimension.
__device__ __forceinline__ u64 descriptor(const char* tile, u32 next) {
    u64 swizzle_128 = 1ull << 62, eight_rows = static_cast<u64>(1024 >> 4) << 32;
    return swizzle_128 | eight_rows | (static_cast<u64>(next >> 4) << 16) | ((address(tile) & 0x3FFFF) >> 4);
}

__device__ __forceinline__ void start_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Add a product of 64 x 32 bytes and 32 bytes x WIDTH, or with ADD 0 replace what the accumulators hold; the flags,
// which 8-bit operands don't have, say which operand lies with its outer dimension along the rows of 128 bytes.
template <int A_OUTER, int B_OUTER, int ADD>
__device__ __forceinline__ void multiply_32_bytes(float (&acc)[WIDTH / 2], u64 a, u64 b) {
#if BITS == 8
    static_assert(!A_OUTER && !B_OUTER, "8-bit operands lie along the reduction");
    asm volatile("wgmma.mma_async.sync.aligned." WGMMA_SHAPE ".f32." WGMMA_TYPES " {" ACC_NAMES "}, %" ACC_NEXT(0)
                 ", %" ACC_NEXT(1) ", %" ACC_NEXT(2) ", 1, 1;"
                 : ACC_OPERANDS
                 : "l"(a), "l"(b), "n"(ADD));
#else
    asm volatile("wgmma.mma_async.sync.aligned." WGMMA_SHAPE ".f32." WGMMA_TYPES " {" ACC_NAMES "}, %" ACC_NEXT(0)
                 ", %" ACC_NEXT(1) ", %" ACC_NEXT(2) ", 1, 1, %" ACC_NEXT(3) ", %" ACC_NEXT(4) ";"
                 : ACC_OPERANDS
                 : "l"(a), "l"(b), "n"(ADD), "n"(A_OUTER), "n"(B_OUTER));
#endif
}

// Until so many committed groups are left.
template <int PENDING>
__device__ __forceinline__ void wait_products(float (&acc)[WIDTH / 2]) {
    asm volatile("wgmma.wait_group.sync.aligned %" ACC_NEXT(0) ";" : ACC_OPERANDS : "n"(PENDING) : "memory");
}

__device__ __forceinline__ u32 pack_bf16(float low, float high) {
    u32 packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

// Two numbers in e4m3; larger ones than 448 become that.
__device__ __forceinline__ u32 pack_e4m3(float low, float high) {
    unsigned short packed;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(packed) : "f"(high), "f"(low));
    return packed;
}

__device__ __forceinline__ float half_of(u32 packed, int high) {
    return __uint_as_float(high ? packed & 0xffff0000u : packed << 16);
}
