// Kernels that do one thing wrong each, and one that is right: selftest.sh proves that the emulator tells them apart.
#include "emulator.h"

#include <cuda_bf16.h>

// Right: the sum of n numbers by every kind of barrier and collective, as bf16 and by an atomic.
extern "C" __global__ void __launch_bounds__(256)
    correct(const float* numbers, int n, __nv_bfloat16* rounded, float* total) {
    DYN_SHARED(float, partial);
    __shared__ float result;
    float sum = 0.0f;
    for (int i = threadIdx.x; i < n; i += blockDim.x) sum += __ldg(numbers + i);
    for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x < 32) {
        float value = threadIdx.x < blockDim.x / 32 ? partial[threadIdx.x] : 0.0f;
        for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_down_sync(0xffffffffu, value, lanes);
        const bool all =
            __all_sync(0xffffffffu, 1) && !__any_sync(0xffffffffu, 0) && __ballot_sync(0xffffffffu, threadIdx.x == 3) == 8u;
        value = __shfl_sync(0xffffffffu, value, 0);
        if (threadIdx.x == 0) result = all ? value : 0.0f;
    }
    __syncthreads();
    if (threadIdx.x == blockDim.x - 1) {
        rounded[blockIdx.x] = __float2bfloat16(result);
        atomicAdd(total, result);
    }
}

// Each thread gives its neighbour a number through shared memory, without the barrier in between.
extern "C" __global__ void missing_barrier(float* out) {
    DYN_SHARED(float, numbers);
    numbers[threadIdx.x] = 1.0f;
    out[threadIdx.x] = numbers[(threadIdx.x + 32) % blockDim.x];
}
// The same within one warp, without __syncwarp.
extern "C" __global__ void missing_syncwarp(float* out) {
    __shared__ float numbers[32];
    numbers[threadIdx.x] = 1.0f;
    out[threadIdx.x] = numbers[31 - threadIdx.x];
}
// An atomic beside a plain access of the same number.
extern "C" __global__ void atomic_beside_plain(float* out) {
    __shared__ float sum;
    if (threadIdx.x == 0) sum = 0.0f;
    __syncthreads();
    if (threadIdx.x == 40) {
        sum += 1.0f;  // not atomic
    } else {
        atomicAdd(&sum, 1.0f);
    }
    __syncthreads();
    out[threadIdx.x] = sum / 64;
}
extern "C" __global__ void write_past_end(float* out, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i <= n) out[i] = 1.0f;  // one too many
}
extern "C" __global__ void write_before(float* out) { out[-1 - static_cast<int>(threadIdx.x)] = 1.0f; }
extern "C" __global__ void read_past_end(const float* in, int n, float* out) { out[threadIdx.x] = in[threadIdx.x + n]; }
extern "C" __global__ void shared_past_end(int n) {
    DYN_SHARED(float, numbers);
    numbers[threadIdx.x + n] = 1.0f;
}
extern "C" __global__ void uninitialised(float* out) {
    __shared__ float numbers[64];
    if (threadIdx.x < 63) numbers[threadIdx.x] = 1.0f;
    __syncthreads();
    out[threadIdx.x] = numbers[threadIdx.x];
}
// Shared memory of a template, from the block before too: each block must find it as NaN again.
template <int COUNT>
__device__ float left_by_last_block() {
    __shared__ float numbers[COUNT];
    const float found = numbers[threadIdx.x];
    __syncthreads();
    numbers[threadIdx.x] = 1.0f;
    return found;
}
extern "C" __global__ void uninitialised_in_template(float* out) {
    const float found = left_by_last_block<64>();
    out[threadIdx.x] = isnan(found) ? out[threadIdx.x] : 1.0f;
}
template <int COUNT>
__device__ float missing_in_template() {
    __shared__ float numbers[COUNT];
    numbers[threadIdx.x] = 1.0f;
    return numbers[COUNT - 1 - threadIdx.x];
}
extern "C" __global__ void missing_barrier_in_template(float* out) { out[threadIdx.x] = missing_in_template<64>(); }
extern "C" __global__ void divergent_shuffle(float* out) {
    float value = 1.0f;
    if (threadIdx.x < 16) value += __shfl_xor_sync(0xffffffffu, value, 1);
    __syncthreads();
    out[threadIdx.x] = value;
}
extern "C" __global__ void divergent_barrier(float* out) {
    if (threadIdx.x < 32)
        __syncthreads();
    else
        __syncthreads();
    out[threadIdx.x] = 1.0f;
}
extern "C" __global__ void barrier_after_return(float* out, int n) {
    if (static_cast<int>(threadIdx.x) >= n) return;
    __syncthreads();
    out[threadIdx.x] = 1.0f;
}
extern "C" __global__ void misaligned(const float* in, float* out) {
    const float4 four = *reinterpret_cast<const float4*>(in + 1);
    out[threadIdx.x] = four.x;
}
extern "C" __global__ void write_one(float* out) { out[threadIdx.x] = 1.0f; }
extern "C" __global__ void write_through_table(float* const* table) { table[0][threadIdx.x] = 1.0f; }
