// How base weights are kept, and how their numbers become bf16, which products take.
#pragma once

#include "common.cuh"

#include <cuda_fp16.h>

// INT8: one byte a number and a scale for each block of 32. INT4: half a byte, and a scale and a minimum for each block;
// number 2 i of a row is the lower half of its byte i. Scales and minimums are f16, as GGUF has them. The same numbers in
// `Form` of src/backend/cuda/weights.rs.
enum Format { BF16 = 0, INT8 = 1, INT4 = 2 };

// Numbers that share a scale.
constexpr int BLOCK = 32;

// Bytes of so many numbers.
template <int FORMAT>
__host__ __device__ constexpr size_t bytes_of(size_t numbers) {
    return FORMAT == BF16 ? 2 * numbers : FORMAT == INT8 ? numbers : numbers / 2;
}

__device__ __forceinline__ unsigned pack(float low, float high) {
    const __nv_bfloat162 two = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const unsigned&>(two);
}

// What the numbers of a block are multiplied with, and what is added.
template <int FORMAT>
struct Scale {
    float by, minimum;

    // Of a row's `scales`, the `block`-th.
    __device__ __forceinline__ void load(const void* scales, int block) {
        if constexpr (FORMAT == INT8) by = __half2float(static_cast<const __half*>(scales)[block]);
        if constexpr (FORMAT == INT4) {
            const __half2 both = static_cast<const __half2*>(scales)[block];
            by = __low2float(both), minimum = __high2float(both);
        }
    }
};
template <>
struct Scale<BF16> {
    __device__ __forceinline__ void load(const void*, int) {}
};

// Of the numbers that lie in 16 bytes, the `which`-th eight, in pairs of bf16.
template <int FORMAT>
__device__ __forceinline__ void unpack(const uint4& bits, const Scale<FORMAT>& scale, int which, unsigned (&pairs)[4]) {
    const unsigned words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if constexpr (FORMAT == BF16) {
            pairs[i] = words[i];
        } else if constexpr (FORMAT == INT8) {
            const unsigned two = words[2 * which + i / 2] >> i % 2 * 16;
            pairs[i] = pack(scale.by * static_cast<signed char>(two), scale.by * static_cast<signed char>(two >> 8));
        } else {
            const unsigned two = words[which] >> i * 8;
            pairs[i] = pack(scale.by * (two & 15) + scale.minimum, scale.by * (two >> 4 & 15) + scale.minimum);
        }
    }
}

// A weight matrix; `MatrixView` in src/backend/cuda/weights.rs. From one row to the next it is `stride` numbers.
struct Matrix {
    const void* values;
    const void* scales;
    int stride, format;
};

// One number, rounded as products have it.
__device__ __forceinline__ __nv_bfloat16 number_at(const Matrix& matrix, size_t row, int column) {
    const size_t at = row * matrix.stride + column, block = at / BLOCK;
    if (matrix.format == BF16) return static_cast<const __nv_bfloat16*>(matrix.values)[at];
    const __half* scales = static_cast<const __half*>(matrix.scales);
    if (matrix.format == INT8) return __float2bfloat16(__half2float(scales[block]) * static_cast<const signed char*>(matrix.values)[at]);
    const int quant = static_cast<const unsigned char*>(matrix.values)[at / 2] >> at % 2 * 4 & 15;
    return __float2bfloat16(__half2float(scales[2 * block]) * quant + __half2float(scales[2 * block + 1]));
}
