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

// Right: a product by tensor cores, of operands that came by cp.async. The numbers are small integers, so sums are exact.
__device__ float left(int row, int k) { return static_cast<float>((row * 5 + k * 3) % 7 - 3); }
__device__ float right(int k, int column) { return static_cast<float>((k * 2 + column * 11) % 5 - 2); }
extern "C" __global__ void tensor_cores(__nv_bfloat16* numbers, float* out) {
    __shared__ __align__(16) __nv_bfloat16 a[16][16], b[8][16], turned[16][8], cut[8];
    const int lane = threadIdx.x % 32;
    for (int i = lane; i < 256; i += 32) numbers[i] = __float2bfloat16(left(i / 16, i % 16));
    for (int i = lane; i < 128; i += 32) turned[i / 8][i % 8] = __float2bfloat16(right(i / 8, i % 8));
    for (int i = lane; i < 128; i += 32) b[i / 16][i % 16] = __float2bfloat16(right(i % 16, i / 16));
    __syncwarp();
    cp_async_16(&a[lane / 2][lane % 2 * 8], numbers + lane * 8, 16);
    cp_async_commit();
    if (lane == 0) cp_async_16(cut, numbers, 6);  // and five zeros
    cp_async_commit();
    cp_async_wait<0>();
    __syncwarp();
    unsigned rows[4], columns[2], same[2], quarters[4];
    ldmatrix_x4(rows, &a[lane % 16][lane / 16 * 8]);
    ldmatrix_x2(columns, &b[lane % 8][lane / 8 % 2 * 8]);
    ldmatrix_x2_trans(same, &turned[lane % 16][0]);
    ldmatrix_x4_trans(quarters, &a[lane % 16][lane / 16 * 8]);
    float sums[4] = {1.0f, 1.0f, 1.0f, 1.0f};
    mma_m16n8k16(sums, rows, columns[0], columns[1]);
    bool correct = columns[0] == same[0] && columns[1] == same[1];
    for (int i = 0; i < 4; i++) {
        float sum = 1.0f;
        for (int k = 0; k < 16; k++) sum += left(lane / 4 + i / 2 * 8, k) * right(k, lane % 4 * 2 + i % 2);
        correct = correct && sums[i] == sum;
        const __nv_bfloat16 transposed = a[lane % 4 * 2 + i % 2 * 8][lane / 4 + i / 2 * 8];
        correct = correct && (quarters[i] & 0xffffu) == __bfloat16_as_ushort(transposed);
    }
    for (int i = 0; i < 8; i++) correct = correct && __bfloat162float(cut[i]) == (i < 3 ? left(0, i) : 0.0f);
    out[threadIdx.x] = correct ? 1.0f : 0.0f;
}

// Each thread copies 16 bytes; then reads, in one way or another, what its neighbours have copied.
__device__ void copy_ones(float* shared, const float* in) {
    cp_async_16(shared + threadIdx.x % 64 * 4, in, 16);
    cp_async_commit();
}
extern "C" __global__ void missing_wait(const float* in, float* out) {
    __shared__ __align__(16) float numbers[256];
    copy_ones(numbers, in);
    __syncthreads();
    out[threadIdx.x] = numbers[threadIdx.x];  // not there yet
}
extern "C" __global__ void weak_wait(const float* in, float* out) {
    __shared__ __align__(16) float first[256], second[256];
    copy_ones(first, in);
    copy_ones(second, in);
    cp_async_wait<1>();
    __syncthreads();
    out[threadIdx.x] = first[threadIdx.x] + second[threadIdx.x] - 1.0f;  // the second is not
}
extern "C" __global__ void missing_barrier_after_wait(const float* in, float* out) {
    __shared__ __align__(16) float numbers[256];
    copy_ones(numbers, in);
    cp_async_wait<0>();
    unsigned four[4];
    ldmatrix_x4(four, numbers + (threadIdx.x + 32) % 64 * 4);  // the other warp's
    out[threadIdx.x] = __uint_as_float(four[0]);
}
extern "C" __global__ void missing_barrier_before_copy(const float* in, float* out) {
    __shared__ __align__(16) float numbers[256];
    copy_ones(numbers, in);
    cp_async_wait<0>();
    __syncthreads();
    unsigned four[4];
    ldmatrix_x4(four, numbers + threadIdx.x * 4);
    cp_async_16(numbers + (threadIdx.x + 32) % 64 * 4, in, 16);  // the other warp may not have read it
    out[threadIdx.x] = __uint_as_float(four[0]);
}
extern "C" __global__ void misaligned_ldmatrix(float* out) {
    __shared__ __align__(16) float numbers[256];
    for (int i = threadIdx.x; i < 256; i += blockDim.x) numbers[i] = 1.0f;
    __syncthreads();
    unsigned four[4];
    ldmatrix_x4(four, numbers + threadIdx.x % 32 * 4 + 2);  // 8 bytes too far
    out[threadIdx.x] = __uint_as_float(four[0]);
}
extern "C" __global__ void ldmatrix_of_device_memory(float* out) {
    unsigned two[2];
    ldmatrix_x2(two, out);  // never to shared memory
    out[threadIdx.x] = __uint_as_float(two[0]);
}
extern "C" __global__ void divergent_mma(float* out) {
    float sums[4] = {};
    const unsigned a[4] = {};
    if (threadIdx.x % 32 < 16) mma_m16n8k16(sums, a, 0, 0);
    __syncthreads();
    out[threadIdx.x] = sums[0] + 1.0f;
}
extern "C" __global__ void misaligned_copy(const float* in, float* out) {
    __shared__ __align__(16) float numbers[256];
    copy_ones(numbers, in + 1);
    cp_async_wait<0>();
    __syncthreads();
    out[threadIdx.x] = numbers[threadIdx.x];
}
extern "C" __global__ void copy_past_end(const float* in, float* out) {
    __shared__ __align__(16) float numbers[256];
    cp_async_16(numbers + threadIdx.x * 4, in + threadIdx.x * 4, 16);  // 1024 bytes of 256
    cp_async_commit();
    cp_async_wait<0>();
    out[threadIdx.x] = numbers[threadIdx.x * 4];
}

// A warpgroup's product of tiles with rows of 128 bytes: ones by ones, 64 numbers deep.
struct Tiles {
    __nv_bfloat16 *a, *b;
};
__device__ Tiles tiles_of_ones() {
    DYN_SHARED(uint4, memory);
    const size_t address = (reinterpret_cast<size_t>(memory) + 1023) / 1024 * 1024;
    const Tiles tiles = {reinterpret_cast<__nv_bfloat16*>(address), reinterpret_cast<__nv_bfloat16*>(address) + 64 * 64};
    for (int i = threadIdx.x; i < 2 * 64 * 64; i += blockDim.x) tiles.a[i] = __float2bfloat16(1.0f);
    return tiles;
}
__device__ void multiply(const Tiles& tiles, float (&sums)[32]) {
    const unsigned long long a = tile_descriptor(tiles.a), b = tile_descriptor(tiles.b);
    wgmma_fence();
    for (int i = 0; i < 4; i++) wgmma_m64k16<64>(sums, a + 2 * i, b + 2 * i);
    wgmma_commit();
}
// Right: which number stands where, in the swizzle, and which thread has which sum.
extern "C" __global__ void warpgroup(float* out) {
    const Tiles tiles = tiles_of_ones();
    __syncthreads();
    for (int i = threadIdx.x; i < 64 * 64; i += blockDim.x) {
        const int row = i / 64, k = i % 64, at = row * 64 + (k / 8 ^ row % 8) * 8 + k % 8;
        tiles.a[at] = __float2bfloat16(left(row, k));
        tiles.b[at] = __float2bfloat16(right(k, row));
    }
    fence_shared_writes();
    __syncthreads();
    float sums[32];
    for (float& sum : sums) sum = 1.0f;
    multiply(tiles, sums);
    wgmma_wait<0>();
    bool correct = true;
    for (int i = 0; i < 32; i++) {
        const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + i / 2 % 2 * 8;
        const int column = i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2;
        float sum = 1.0f;
        for (int k = 0; k < 64; k++) sum += left(row, k) * right(k, column);
        correct = correct && sums[i] == sum;
    }
    out[threadIdx.x] = correct ? 1.0f : 0.0f;
}
extern "C" __global__ void missing_wgmma_wait(float* out) {
    const Tiles tiles = tiles_of_ones();
    __syncthreads();
    float sums[32] = {};
    multiply(tiles, sums);
    out[threadIdx.x] = sums[0] / 64;  // not there yet
}
extern "C" __global__ void missing_barrier_before_wgmma(float* out) {
    const Tiles tiles = tiles_of_ones();
    float sums[32] = {};
    multiply(tiles, sums);  // what the others may not have written
    wgmma_wait<0>();
    out[threadIdx.x] = sums[0] / 64;
}
extern "C" __global__ void misaligned_tile(float* out) {
    Tiles tiles = tiles_of_ones();
    tiles.b += 8;
    __syncthreads();
    float sums[32] = {};
    multiply(tiles, sums);
    wgmma_wait<0>();
    out[threadIdx.x] = sums[0] / 64;
}
