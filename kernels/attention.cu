// The paged key-value pool, and causal attention with grouped queries over it.
//
// Of each layer the pool has keys, then values, each [slot][kv head][D]; slot = block * block_size + place in the block.
#include "common.cuh"

// Where a row's sequence keeps its context; `AttentionRow` in src/backend/cuda/attention.rs. Its block table is
// `tables[table..]`, and it sees positions `0..=position`.
struct AttentionRow {
    int table, position;
};

constexpr int ATTENTION_THREADS = 128;
// Positions that one block takes: a longer context is split over several. Results depend on it, and on nothing else.
constexpr int CHUNK = 64;
// Query heads that a block takes at a time; those of a group read the same keys.
constexpr int AT_ONCE = 8;
// The largest head.
constexpr int LARGEST = 256;

__device__ __forceinline__ float number(float x) { return x; }
__device__ __forceinline__ float number(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void put(float* to, float x) { *to = x; }
__device__ __forceinline__ void put(__nv_bfloat16* to, float x) { *to = __float2bfloat16(x); }

__device__ __forceinline__ size_t slot_of(const AttentionRow& row, const int* tables, int position, int block_size) {
    return static_cast<size_t>(tables[row.table + position / block_size]) * block_size + position % block_size;
}

// Writes this step's keys and values to their slots; where there are `angles`, rotates queries and keys first, the queries
// where they stand. Clears the counters of `attend`. One block a row.
template <typename T>
__device__ void store(float* q, int q_stride, const float* k, const float* v, int kv_stride, const float* angles,
                      const AttentionRow* rows, const int* tables, const Heads& heads, T* keys, T* values, unsigned* counters) {
    const AttentionRow row = rows[blockIdx.x];
    const int width = heads.kv * heads.size, half = heads.size / 2;
    const size_t to = slot_of(row, tables, row.position, heads.block_size) * width;
    const size_t from = static_cast<size_t>(blockIdx.x) * kv_stride;
    if (angles) {  // D / 2 cosines of a row, then as many sines
        const float* by = angles + static_cast<size_t>(blockIdx.x) * heads.size;
        q += static_cast<size_t>(blockIdx.x) * q_stride;
        for (int i = threadIdx.x; i < (heads.query + heads.kv) * half; i += blockDim.x) {
            const int head = i / half, pair = i % half, at = head % heads.query * heads.size + pair;
            if (head < heads.query) {
                const float2 turned = rotate({q[at], q[at + half]}, by[pair], by[half + pair]);
                q[at] = turned.x, q[at + half] = turned.y;
            } else {
                const int of_key = (head - heads.query) * heads.size + pair;
                const float2 turned = rotate({k[from + of_key], k[from + of_key + half]}, by[pair], by[half + pair]);
                put(keys + to + of_key, turned.x), put(keys + to + of_key + half, turned.y);
            }
        }
    }
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        if (!angles) put(keys + to + i, k[from + i]);
        put(values + to + i, v[from + i]);
    }
    for (int head = threadIdx.x; head < heads.kv; head += blockDim.x) counters[blockIdx.x * heads.kv + head] = 0;
}

// What a chunk leaves for those that put chunks together: its largest score, the sum of its weights, and its weighted values.
struct Partial {
    float* of;  // [row][head][chunk][D + 2]
    int chunks, size;

    __device__ __forceinline__ float* at(size_t row, int heads, int head, int chunk) const {
        return of + ((row * heads + head) * chunks + chunk) * (size + 2);
    }
};

// Scores of a chunk's positions for some heads of a group: two threads a position, each half of the head.
template <typename T, bool WIDE>
__device__ void score(const T* keys, size_t slot, bool present, const Heads& heads, int kv_head, int count, float scale,
                      const float (*queries)[LARGEST], float (*scores)[CHUNK]) {
    const int position = threadIdx.x / 2, part = threadIdx.x % 2;
    float sums[AT_ONCE] = {};
    if (present) {
        const T* key = keys + (slot * heads.kv + kv_head) * heads.size;
        if constexpr (WIDE) {
            for (int d = 8 * part; d < heads.size; d += 16) {
                float eight[8];
                load_eight(key + d, eight);
#pragma unroll
                for (int h = 0; h < AT_ONCE; h++) {
                    if (h >= count) break;
#pragma unroll
                    for (int i = 0; i < 8; i++) sums[h] += queries[h][d + i] * eight[i];
                }
            }
        } else {
            for (int d = part; d < heads.size; d += 2) {
#pragma unroll
                for (int h = 0; h < AT_ONCE; h++) {
                    if (h < count) sums[h] += queries[h][d] * number(key[d]);
                }
            }
        }
    }
#pragma unroll
    for (int h = 0; h < AT_ONCE; h++) {
        const float sum = sums[h] + __shfl_xor_sync(ALL_LANES, sums[h], 1);
        if (part == 0 && h < count) scores[h][position] = present ? sum * scale : -INFINITY;
    }
}

// Turns scores into weights, relative to the largest; a warp a head.
__device__ __forceinline__ void weigh(float (*scores)[CHUNK], int count, float* maxima, float* totals) {
    const int lane = threadIdx.x % WARP;
    for (int h = threadIdx.x / WARP; h < count; h += ATTENTION_THREADS / WARP) {
        const float a = scores[h][lane], b = scores[h][lane + WARP];
        float most = fmaxf(a, b);
        for (int lanes = WARP / 2; lanes > 0; lanes /= 2) most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, lanes));
        const float of_a = expf(a - most), of_b = expf(b - most), total = warp_sum(of_a + of_b);
        scores[h][lane] = of_a, scores[h][lane + WARP] = of_b;
        if (lane == 0) maxima[h] = most, totals[h] = total;
    }
}

// Puts a row's chunks together, for the heads of a group, always in the same order.
__device__ void combine(const Partial& partial, const Heads& heads, size_t row, int first_head, int count, int chunks,
                        __nv_bfloat16* y, int y_stride) {
    for (int i = threadIdx.x; i < count * heads.size; i += ATTENTION_THREADS) {
        const int head = first_head + i / heads.size, d = i % heads.size;
        float most = -INFINITY, total = 0.0f, sum = 0.0f;
        for (int chunk = 0; chunk < chunks; chunk++) {
            const float* part = partial.at(row, heads.query, head, chunk);
            const float highest = fmaxf(most, part[0]), rescale = expf(most - highest), weight = expf(part[0] - highest);
            most = highest;
            total = total * rescale + weight * part[1];
            sum = sum * rescale + weight * part[2 + d];
        }
        y[row * y_stride + head * heads.size + d] = __float2bfloat16(sum / total);
    }
}

// One block a row, key-value head and chunk of its context. The last of a row and head to finish puts the chunks together.
template <typename T, bool WIDE>
__device__ void attend(const float* q, int q_stride, const AttentionRow* rows, const int* tables, const Heads& heads, float scale,
                       const T* keys, const T* values, const Partial& partial, unsigned* counters, __nv_bfloat16* y, int y_stride) {
    __shared__ float queries[AT_ONCE][LARGEST], scores[AT_ONCE][CHUNK], maxima[AT_ONCE], totals[AT_ONCE];
    __shared__ size_t slots[CHUNK];
    __shared__ unsigned before;
    const int kv_head = blockIdx.y, chunk = blockIdx.z, group = heads.query / heads.kv, first = chunk * CHUNK;
    const AttentionRow row = rows[blockIdx.x];
    if (first > row.position) return;
    const int length = min(CHUNK, row.position + 1 - first), chunks = row.position / CHUNK + 1;
    if (static_cast<int>(threadIdx.x) < length) slots[threadIdx.x] = slot_of(row, tables, first + threadIdx.x, heads.block_size);
    for (int from = 0; from < group; from += AT_ONCE) {
        const int count = min(AT_ONCE, group - from), head = kv_head * group + from;
        __syncthreads();
        for (int i = threadIdx.x; i < count * heads.size; i += ATTENTION_THREADS) {
            queries[i / heads.size][i % heads.size] = q[static_cast<size_t>(blockIdx.x) * q_stride + head * heads.size + i];
        }
        __syncthreads();
        const bool present = static_cast<int>(threadIdx.x) / 2 < length;
        score<T, WIDE>(keys, present ? slots[threadIdx.x / 2] : 0, present, heads, kv_head, count, scale, queries, scores);
        __syncthreads();
        weigh(scores, count, maxima, totals);
        __syncthreads();
        for (int d = threadIdx.x; d < heads.size; d += ATTENTION_THREADS) {
            float sums[AT_ONCE] = {};
            for (int i = 0; i < length; i++) {
                const float value = number(values[(slots[i] * heads.kv + kv_head) * heads.size + d]);
#pragma unroll
                for (int h = 0; h < AT_ONCE; h++) sums[h] += h < count ? scores[h][i] * value : 0.0f;
            }
#pragma unroll
            for (int h = 0; h < AT_ONCE; h++) {
                if (h >= count) break;
                float* to = partial.at(blockIdx.x, heads.query, head + h, chunk);
                to[2 + d] = sums[h];
                if (d == 0) to[0] = maxima[h], to[1] = totals[h];
            }
        }
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) before = atomicAdd(&counters[blockIdx.x * heads.kv + kv_head], 1u);
    __syncthreads();
    if (before + 1 < static_cast<unsigned>(chunks)) return;
    __threadfence();
    combine(partial, heads, blockIdx.x, kv_head * group, group, chunks, y, y_stride);
}

#define ATTENTION(NAME, T, WIDE)                                                                                             \
    extern "C" __global__ void __launch_bounds__(ATTENTION_THREADS, 6)                                                       \
        attend_##NAME(const float* q, int q_stride, const AttentionRow* rows, const int* tables, const Heads heads,          \
                      float scale, const T* keys, const T* values, const Partial partial, unsigned* counters,                \
                      __nv_bfloat16* y, int y_stride) {                                                                      \
        attend<T, WIDE>(q, q_stride, rows, tables, heads, scale, keys, values, partial, counters, y, y_stride);              \
    }
#define STORE(NAME, T)                                                                                                       \
    extern "C" __global__ void store_##NAME(float* q, int q_stride, const float* k, const float* v, int kv_stride,           \
                                            const float* angles, const AttentionRow* rows, const int* tables,                \
                                            const Heads heads, T* keys, T* values, unsigned* counters) {                     \
        store<T>(q, q_stride, k, v, kv_stride, angles, rows, tables, heads, keys, values, counters);                         \
    }

STORE(f32, float)
STORE(bf16, __nv_bfloat16)
ATTENTION(f32, float, false)
ATTENTION(bf16, __nv_bfloat16, false)
// Where a head is a multiple of eight numbers.
ATTENTION(f32_wide, float, true)
ATTENTION(bf16_wide, __nv_bfloat16, true)
