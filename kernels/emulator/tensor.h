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
void cp_async_commit();
void cp_async_wait(int groups_left);
template <int GROUPS_LEFT>
void cp_async_wait() {
    cp_async_wait(GROUPS_LEFT);
}
