// Tensor cores and asynchronous copies, as kernels/mma.cuh declares them for a GPU. Included by emulator.h; what they do
// here is in tensor.cpp. The names are the PTX instructions'.
#pragma once

// All 32 lanes of a warp together, and each with its own part of the matrices: sums (16, 8) += a (16, 16) b (16, 8).
void mma_m16n8k16(float (&sums)[4], const unsigned (&a)[4], unsigned b_low, unsigned b_high, LONAS_CALLER);

// Matrices of 8 rows of 16 bytes from shared memory; lane i gives the address of row i % 8 of matrix i / 8.
void ldmatrix_x4(unsigned (&to)[4], const void* row, LONAS_CALLER);
void ldmatrix_x2(unsigned (&to)[2], const void* row, LONAS_CALLER);
void ldmatrix_x4_trans(unsigned (&to)[4], const void* row, LONAS_CALLER);
void ldmatrix_x2_trans(unsigned (&to)[2], const void* row, LONAS_CALLER);

// Copies `bytes` from device memory and zeros up to 16 to shared memory, but not before the calling thread waits for it.
void cp_async_16(void* shared, const void* from, int bytes);
// The same with 4 bytes or none.
void cp_async_4(void* shared, const void* from, int bytes);
void cp_async_commit();
void cp_async_wait(int groups_left);
template <int GROUPS_LEFT>
void cp_async_wait() {
    cp_async_wait(GROUPS_LEFT);
}

// Products by a warpgroup from tiles in shared memory, as kernels/wgmma.cuh has them. Each thread adds to its own sums, not
// before it waits for the group they belong to.
unsigned long long tile_descriptor(const void* tile);
void wgmma(float* sums, int columns, unsigned long long a, unsigned long long b);
template <int N>
void wgmma_m64k16(float (&sums)[N / 2], unsigned long long a, unsigned long long b) {
    wgmma(sums, N, a, b);
}
inline void fence_shared_writes() {}
inline void wgmma_fence() {}
void wgmma_commit();
void wgmma_wait(int groups_left);
template <int GROUPS_LEFT>
void wgmma_wait() {
    wgmma_wait(GROUPS_LEFT);
}
