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
// row-major, their rows `a_stride` and `b_stride` numbers apart; null where the super-adapter leaves the Linear alone.
struct AdapterEntry {
    const __nv_bfloat16* a;
    const __nv_bfloat16* b;
    int a_stride, b_stride;
    float scale;
    int padding;
};

__device__ __forceinline__ float warp_sum(float x) {
    for (int lanes = WARP / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(ALL_LANES, x, lanes);
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

// Eight consecutive bf16 numbers from a 16-byte boundary, as f32.
__device__ __forceinline__ void load_eight(const __nv_bfloat16* from, float (&to)[8]) {
    const uint4 bits = *reinterpret_cast<const uint4*>(from);
    const unsigned words[4] = {bits.x, bits.y, bits.z, bits.w};
    for (int i = 0; i < 4; i++) {
        to[2 * i] = __uint_as_float(words[i] << 16);
        to[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
}
