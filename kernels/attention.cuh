// The paged key-value pool, and what a row sees of it.
//
// Of each layer the pool has keys, then values, each [slot][kv head][D]; slot = block * block_size + place in the block.
#pragma once

#include "common.cuh"

// Scores are to count powers of two.
constexpr float LOG2_E = 1.4426950408889634f;

// Where a row's sequence keeps its context, and what the row sees of it; `AttentionRow` in src/backend/cuda/contexts.rs. Its block
// table is `tables[table..]`, it stands at `position`, and it sees the positions from `first` to `last`, its own among them.
struct alignas(16) AttentionRow {
    int table, position, first, last;
};

__device__ __forceinline__ size_t slot_of(const AttentionRow& row, const int* tables, int position, int block_size) {
    return static_cast<size_t>(tables[row.table + position / block_size]) * block_size + position % block_size;
}

__device__ __forceinline__ float number(float x) { return x; }
__device__ __forceinline__ float number(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void put(float* to, float x) { *to = x; }
__device__ __forceinline__ void put(__nv_bfloat16* to, float x) { *to = __float2bfloat16(x); }
