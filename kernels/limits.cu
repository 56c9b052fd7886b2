// What a GPU can do at most: loops of nothing but loads, or of multiply-adds on registers.
#include "mma.cuh"

// Reads `count` times 16 bytes. The result is only written where it is a number that it never is, so that the loads stay.
extern "C" __global__ void read_all(const uint4* __restrict__ from, size_t count, unsigned* to) {
    begin_after_previous_kernel();
    unsigned all = 0;
    for (size_t at = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x; at < count;
         at += static_cast<size_t>(gridDim.x) * blockDim.x) {
        const uint4 four = from[at];
        all |= (four.x ^ four.y ^ four.z ^ four.w) & 1;
    }
    if (all == 2) *to = all;
}

// Eight sums that do not wait for each other, `turns` times. Two operations each.
extern "C" __global__ void multiply_add(int turns, float factor, float* to) {
    begin_after_previous_kernel();
    float sums[8];
#pragma unroll
    for (int i = 0; i < 8; i++) sums[i] = static_cast<float>(threadIdx.x + i);
    for (int turn = 0; turn < turns; turn++) {
#pragma unroll
        for (int i = 0; i < 8; i++) sums[i] = sums[i] * factor + factor;
    }
    float all = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) all += sums[i];
    if (all == -1.0f) *to = all;
}

// The same with tensor cores: eight products of 16 x 8 x 16 bf16 numbers a turn and warp, each onto sums of its own.
extern "C" __global__ void multiply_add_tensors(int turns, float factor, float* to) {
    begin_after_previous_kernel();
    float sums[8][4] = {};
    const unsigned number = __float_as_uint(factor + threadIdx.x);
    const unsigned a[4] = {number, number, number, number};
    for (int turn = 0; turn < turns; turn++) {
#pragma unroll
        for (int i = 0; i < 8; i++) mma_m16n8k16(sums[i], a, number, number);
    }
    float all = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) all += sums[i][0] + sums[i][1] + sums[i][2] + sums[i][3];
    if (all == -1.0f) *to = all;
}
