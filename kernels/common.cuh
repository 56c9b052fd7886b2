// What all kernels share. The same sources are compiled by nvcc for a GPU and by a C++ compiler for the emulator.
#pragma once

#ifdef LONAS_EMULATED
#include "emulator/emulator.h"
#else
// Shared memory whose size the launch gives.
#define DYN_SHARED(type, name) extern __shared__ type name[]
#endif

#include <cuda_bf16.h>

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

// The active sizes of one row in one Linear: `o`, `i`, `r`, and which super-adapter; `SegmentRow` in
// src/backend/cuda/batch.rs.
struct SegmentRow {
    int out, inp, rank, adapter;
};

// One super-adapter's part in a Linear; `AdapterEntry` in src/backend/cuda/batch.rs. `a (R, inp)` and `b (out, R)` are
// row-major, their rows `a_stride` and `b_stride` numbers apart, `rank` is `R`; null where the super-adapter leaves the Linear alone.
struct AdapterEntry {
    const __nv_bfloat16* a;
    const __nv_bfloat16* b;
    int a_stride, b_stride;
    float scale;
    int rank;
};

// Heads of a layer, and the blocks of its key-value pool.
struct Heads {
    int query, kv, size, block_size;
};

__device__ __forceinline__ float warp_sum(float x) {
    for (int lanes = WARP / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(ALL_LANES, x, lanes);
    return x;
}

__device__ __forceinline__ int warp_max(int x) {
    for (int lanes = WARP / 2; lanes > 0; lanes /= 2) x = max(x, __shfl_xor_sync(ALL_LANES, x, lanes));
    return x;
}

// The sum over all threads of a block, in every thread; `scratch` holds a float for each warp. All threads must call it.
__device__ __forceinline__ float block_sum(float x, float* scratch) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    x = warp_sum(x);
    __syncthreads();
    if (lane == 0) scratch[warp] = x;
    __syncthreads();
    return warp_sum(lane < warps ? scratch[lane] : 0.0f);
}

__device__ __forceinline__ float silu(float x) { return x / (1.0f + expf(-x)); }

// Two numbers of a head, half a head apart, turned by an angle; rounded in the same places wherever it is done.
__device__ __forceinline__ float2 rotate(float2 pair, float cosine, float sine) {
    return {fmaf(pair.x, cosine, fmaf(pair.y, -sine, 0.0f)), fmaf(pair.y, cosine, fmaf(pair.x, sine, 0.0f))};
}

// What is read once leaves no trace in the first cache.
__device__ __forceinline__ uint4 load_once(const void* from) {
    const uint4* at = static_cast<const uint4*>(from);
#ifdef LONAS_EMULATED
    return *at;
#else
    uint4 bits;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
                 : "l"(at));
    return bits;
#endif
}

// Two to the power of x, 2^-22 off at most; 1 for 0, and 0 for minus infinity and for what f32 has no normal number for.
__device__ __forceinline__ float exp2_fast(float x) {
#ifdef LONAS_EMULATED
    return exp2f(x);
#else
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

// How far other blocks have counted, and what they wrote before they did is seen.
__device__ __forceinline__ unsigned counted(const unsigned* counter) {
#ifdef LONAS_EMULATED
    return *counter;
#else
    unsigned seen;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
    return seen;
#endif
}

// Waits until other blocks have counted so far. They must have begun: the emulator, which runs one block after the other, stops where
// they have not.
__device__ __forceinline__ void wait_for(const unsigned* counter, unsigned count) {
#ifdef LONAS_EMULATED
    if (*counter < count) __builtin_trap();
#else
    while (counted(counter) < count) {
    }
#endif
}

// A kernel that is started as a dependent of the one before it in the stream (programmatic dependent launch, from sm_90 on) may
// begin while that one's last blocks run. What it does before this wait must not depend on other kernels' results of the step; after
// it all of theirs are there. Every block of such a kernel waits, or the next one would not wait for what came before.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if !defined(LONAS_EMULATED) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// From when all blocks have said so, or have ended, the next kernel's blocks take what room there is.
__device__ __forceinline__ void let_next_kernel_begin() {
#if !defined(LONAS_EMULATED) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// What a kernel begins with that has nothing to do before.
__device__ __forceinline__ void begin_after_previous_kernel() {
    let_next_kernel_begin();
    wait_for_previous_kernel();
}

// Eight consecutive bf16 numbers from a 16-byte boundary, as f32.
__device__ __forceinline__ void load_eight(const __nv_bfloat16* from, float (&to)[8]) {
    const uint4 bits = *reinterpret_cast<const uint4*>(from);
    const unsigned words[4] = {bits.x, bits.y, bits.z, bits.w};
    for (int i = 0; i < 4; i++) {
        to[2 * i] = __uint_as_float(words[i] << 16);
        to[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
}
// Eight f32 numbers from a 16-byte boundary.
__device__ __forceinline__ void load_eight(const float* from, float (&to)[8]) {
    const float4 a = reinterpret_cast<const float4*>(from)[0], b = reinterpret_cast<const float4*>(from)[1];
    to[0] = a.x, to[1] = a.y, to[2] = a.z, to[3] = a.w, to[4] = b.x, to[5] = b.y, to[6] = b.z, to[7] = b.w;
}
