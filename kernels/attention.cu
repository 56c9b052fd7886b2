// The paged key-value pool, and causal attention with grouped queries over it.
//
// Of each layer the pool has keys, then values, each [slot][kv head][D]; slot = block * block_size + place in the block.
#include "common.cuh"

// Where a row's sequence keeps its context; `AttentionRow` in src/backend/cuda/attention.rs. Its block table is
// `tables[table..]`, and it sees positions `0..=position`.
struct AttentionRow {
    int table, position;
};

constexpr int ATTENTION_WARPS = 4;
// The most numbers of a head that one lane holds: heads of up to 256.
constexpr int HELD = 8;

__device__ __forceinline__ float number(float x) { return x; }
__device__ __forceinline__ float number(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void put(float* to, float x) { *to = x; }
__device__ __forceinline__ void put(__nv_bfloat16* to, float x) { *to = __float2bfloat16(x); }

__device__ __forceinline__ size_t slot_of(const AttentionRow& row, const int* tables, int position, int block_size) {
    return static_cast<size_t>(tables[row.table + position / block_size]) * block_size + position % block_size;
}

// Writes this step's keys and values, `width = K D` numbers each, to their slots. One block a row.
template <typename T>
__device__ void store(const float* k, const float* v, const AttentionRow* rows, const int* tables, int block_size, int width,
                      T* keys, T* values) {
    const AttentionRow row = rows[blockIdx.x];
    const size_t to = slot_of(row, tables, row.position, block_size) * width, from = static_cast<size_t>(blockIdx.x) * width;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        put(keys + to + i, k[from + i]);
        put(values + to + i, v[from + i]);
    }
}

// One block a row and query head. Warps take every fourth position, each with a running maximum, as in online softmax
// (Milakov and Gimelshein 2018); at the end their parts are put together, always in the same order.
template <typename T>
__device__ void attend(const float* q, const AttentionRow* rows, const int* tables, int block_size, int heads, int kv_heads,
                       int size, float scale, const T* keys, const T* values, float* y) {
    __shared__ float maxima[ATTENTION_WARPS], totals[ATTENTION_WARPS];
    __shared__ float parts[ATTENTION_WARPS][HELD * WARP];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, head = blockIdx.y;
    const AttentionRow row = rows[blockIdx.x];
    const size_t at = (static_cast<size_t>(blockIdx.x) * heads + head) * size;
    float query[HELD], sums[HELD];
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        const int d = lane + i * WARP;
        query[i] = d < size ? q[at + d] * scale : 0.0f;
        sums[i] = 0.0f;
    }
    float maximum = -INFINITY, total = 0.0f;
    for (int position = warp; position <= row.position; position += ATTENTION_WARPS) {
        const size_t slot = slot_of(row, tables, position, block_size);
        const size_t from = (slot * kv_heads + head / (heads / kv_heads)) * size;
        float score = 0.0f;
#pragma unroll
        for (int i = 0; i < HELD; i++) {
            const int d = lane + i * WARP;
            if (d < size) score += query[i] * number(keys[from + d]);
        }
        score = warp_sum(score);
        const float highest = fmaxf(maximum, score), rescale = expf(maximum - highest), weight = expf(score - highest);
        maximum = highest;
        total = total * rescale + weight;
#pragma unroll
        for (int i = 0; i < HELD; i++) {
            const int d = lane + i * WARP;
            if (d < size) sums[i] = sums[i] * rescale + weight * number(values[from + d]);
        }
    }
    if (lane == 0) {
        maxima[warp] = maximum;
        totals[warp] = total;
    }
#pragma unroll
    for (int i = 0; i < HELD; i++) parts[warp][lane + i * WARP] = sums[i];
    __syncthreads();
    float highest = maxima[0], all = 0.0f;
    for (int w = 1; w < ATTENTION_WARPS; w++) highest = fmaxf(highest, maxima[w]);
    for (int w = 0; w < ATTENTION_WARPS; w++) all += totals[w] * expf(maxima[w] - highest);
    for (int d = threadIdx.x; d < size; d += blockDim.x) {
        float sum = 0.0f;
        for (int w = 0; w < ATTENTION_WARPS; w++) sum += parts[w][d] * expf(maxima[w] - highest);
        y[at + d] = sum / all;
    }
}

#define ATTENTION(NAME, T)                                                                                                 \
    extern "C" __global__ void store_##NAME(const float* k, const float* v, const AttentionRow* rows, const int* tables,   \
                                            int block_size, int width, T* keys, T* values) {                               \
        store<T>(k, v, rows, tables, block_size, width, keys, values);                                                     \
    }                                                                                                                      \
    extern "C" __global__ void __launch_bounds__(ATTENTION_WARPS* WARP)                                                    \
        attend_##NAME(const float* q, const AttentionRow* rows, const int* tables, int block_size, int heads, int kv_heads, \
                      int size, float scale, const T* keys, const T* values, float* y) {                                   \
        attend<T>(q, rows, tables, block_size, heads, kv_heads, size, scale, keys, values, y);                             \
    }

ATTENTION(f32, float)
ATTENTION(bf16, __nv_bfloat16)
