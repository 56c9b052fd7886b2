// Tensor cores: the instructions that many rows' products need, and one warp's part of a product from shared memory.
// On a GPU they are inline PTX (sm_80 and later); emulator/tensor.h has the same functions for the emulator.
#pragma once

#include "common.cuh"

using bf16 = __nv_bfloat16;

#ifndef LONAS_EMULATED

__device__ __forceinline__ unsigned shared_address(const void* pointer) {
    return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// An address in shared memory, as the instructions below take it: for loops that would find it anew in every turn.
using Shared = unsigned;
__device__ __forceinline__ Shared shared_at(const void* pointer) {
    unsigned at = shared_address(pointer);
    asm volatile("" : "+r"(at));
    return at;
}

// sums (16, 8) += a (16, 16) b (16, 8), by the 32 lanes of a warp; which lane holds what is in the PTX manual under
// mma.m16n8k16. Not volatile: the compiler may move it between loads.
__device__ __forceinline__ void mma_m16n8k16(float (&sums)[4], const unsigned (&a)[4], unsigned b_low, unsigned b_high) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_low), "r"(b_high));
}

// Four or two matrices of 8 rows of 16 bytes from shared memory; lane i gives the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void ldmatrix_x4(unsigned (&to)[4], Shared row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(row));
}
__device__ __forceinline__ void ldmatrix_x4(unsigned (&to)[4], const void* row) { ldmatrix_x4(to, shared_address(row)); }
__device__ __forceinline__ void ldmatrix_x2(unsigned (&to)[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                 : "=r"(to[0]), "=r"(to[1])
                 : "r"(shared_address(row)));
}
__device__ __forceinline__ void ldmatrix_x4_trans(unsigned (&to)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row)));
}
__device__ __forceinline__ void ldmatrix_x2_trans(unsigned (&to)[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                 : "=r"(to[0]), "=r"(to[1])
                 : "r"(shared_address(row)));
}

// Copies `bytes` (0 to 16) from device memory to shared memory and fills up to 16 with zeros, while the thread goes on. Past
// the first-level cache: other blocks, not this one, need the same bytes again.
__device__ __forceinline__ void cp_async_16(Shared shared, const void* from, int bytes) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" : : "r"(shared), "l"(from), "r"(bytes));
}
__device__ __forceinline__ void cp_async_16(void* shared, const void* from, int bytes) { cp_async_16(shared_address(shared), from, bytes); }
// The same with 4 bytes or none.
__device__ __forceinline__ void cp_async_4(Shared shared, const void* from, int bytes) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" : : "r"(shared), "l"(from), "r"(bytes));
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until all but the newest groups of this thread's copies are done. The other threads' take a barrier after it.
template <int GROUPS_LEFT>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS_LEFT) : "memory");
}

#else

using Shared = unsigned char*;
inline Shared shared_at(const void* pointer) { return static_cast<Shared>(const_cast<void*>(pointer)); }

#endif

// Where a 16-byte chunk of a row stands in a shared tile whose rows are K numbers, counted in numbers. Chunks are permuted
// by row, so that the eight rows of a matrix that ldmatrix reads at one chunk lie in different banks, without padding.
template <int K>
__device__ __forceinline__ int swizzled(int row, int chunk) {
    constexpr int CHUNKS = K / 8, ROWS_IN_BANKS = CHUNKS < 8 ? 8 / CHUNKS : 1;
    static_assert(CHUNKS == 4 || CHUNKS % 8 == 0, "a row takes half of the banks, or all of them once or more");
    return row * K + (chunk ^ row / ROWS_IN_BANKS % (CHUNKS < 8 ? CHUNKS : 8)) * 8;
}

// Bytes to copy of the 16 at number `k` of a row that has `end` numbers: the rest is to be zero.
__device__ __forceinline__ int chunk_bytes(int k, int end) { return min(16, max(0, 2 * (end - k))); }

// A warp's part of a product of two shared tiles, K numbers deep: 16 M rows from `row` of `x`, 16 N rows of `w`, of which
// each group of GROUP stands `gap` rows after the one before it. sums[m][n] is that of 16 rows and 8 columns. Steps over K
// go upwards always: every sum is added up in the same order wherever its row and column stand in a tile. `meanwhile` is
// called once, while the first operands are on their way.
template <int K, int M, int N, int GROUP = N, class Meanwhile>
__device__ __forceinline__ void multiply_tiles(const bf16* x, int row, const bf16* w, int column, int gap,
                                               float (&sums)[M][2 * N][4], Meanwhile meanwhile) {
    const int lane = threadIdx.x % WARP;
    const int x_row = row + lane % 16, x_chunk = lane / 16;
    const int w_row = column + lane / 16 * 8 + lane % 8, w_chunk = lane / 8 % 2;
#pragma unroll
    for (int step = 0; step < K / 16; step++) {
        unsigned a[M][4], b[N][4];
#pragma unroll
        for (int m = 0; m < M; m++) ldmatrix_x4(a[m], x + swizzled<K>(x_row + 16 * m, x_chunk + 2 * step));
#pragma unroll
        for (int n = 0; n < N; n++) {
            const int at = w_row + n / GROUP * gap + n % GROUP * 16;
            ldmatrix_x4(b[n], w + swizzled<K>(at, w_chunk + 2 * step));
        }
        if (step == 0) meanwhile();
#pragma unroll
        for (int m = 0; m < M; m++) {
#pragma unroll
            for (int n = 0; n < N; n++) {
                mma_m16n8k16(sums[m][2 * n], a[m], b[n][0], b[n][1]);
                mma_m16n8k16(sums[m][2 * n + 1], a[m], b[n][2], b[n][3]);
            }
        }
    }
}
