// Rotates a step's queries and keys, and writes its keys and values to the pool.
#include "attention.cuh"

// V numbers of a head, or one where heads have ugly sizes.
__device__ __forceinline__ void load_part(const float* from, float (&to)[1]) { to[0] = *from; }
__device__ __forceinline__ void load_part(const float* from, float (&to)[4]) {
    const float4 four = *reinterpret_cast<const float4*>(from);
    to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
}
template <typename T>
__device__ __forceinline__ void put_part(T* to, const float (&x)[1]) { put(to, x[0]); }
__device__ __forceinline__ void put_part(float* to, const float (&x)[4]) {
    *reinterpret_cast<float4*>(to) = {x[0], x[1], x[2], x[3]};
}
__device__ __forceinline__ void put_part(__nv_bfloat16* to, const float (&x)[4]) {
    const __nv_bfloat162 pairs[2] = {__floats2bfloat162_rn(x[0], x[1]), __floats2bfloat162_rn(x[2], x[3])};
    *reinterpret_cast<uint2*>(to) = {reinterpret_cast<const unsigned&>(pairs[0]), reinterpret_cast<const unsigned&>(pairs[1])};
}

// Writes this step's keys and values to their slots; where there are `angles`, rotates queries and keys first, the queries
// where they stand. Each thread has V pairs of numbers half a head apart: of the queries' heads, if they turn, the keys' and
// the values'. Blocks: a row each along x, its pairs along y.
template <typename T, int V>
__device__ __forceinline__ void store(float* q, int q_stride, const float* k, const float* v, int kv_stride, const float* angles,
                                      const AttentionRow* rows, const int* tables, const Heads& heads, T* keys, T* values) {
    const int half = (heads.size + 1) / 2, columns = half / V, first = angles ? 0 : heads.query;
    const int i = blockIdx.y * blockDim.x + threadIdx.x, head = first + i / columns, pair = i % columns * V;
    if (head >= heads.query + 2 * heads.kv) return;
    const AttentionRow row = rows[blockIdx.x];
    const bool is_query = head < heads.query, is_value = head >= heads.query + heads.kv;
    const int kv_head = is_query ? 0 : (head - heads.query) % heads.kv;
    float* own = q + static_cast<size_t>(blockIdx.x) * q_stride + (is_query ? head : 0) * heads.size;
    const float* fresh = (is_value ? v : k) + static_cast<size_t>(blockIdx.x) * kv_stride + kv_head * heads.size;
    const float* from = is_query ? own : fresh;
    const bool both = V > 1 || pair + half < heads.size;
    float low[V], high[V] = {};
    load_part(from + pair, low);
    if (both) load_part(from + pair + half, high);
    if (angles && !is_value) {  // D / 2 cosines of a row, then as many sines
        const float* by = angles + static_cast<size_t>(blockIdx.x) * heads.size + pair;
        float cosines[V], sines[V];
        load_part(by, cosines), load_part(by + half, sines);
#pragma unroll
        for (int j = 0; j < V; j++) {
            const float2 turned = rotate({low[j], high[j]}, cosines[j], sines[j]);
            low[j] = turned.x, high[j] = turned.y;
        }
    }
    if (is_query) {
        put_part(own + pair, low), put_part(own + pair + half, high);
        return;
    }
    T* to = is_value ? values : keys;
    to += (slot_of(row, tables, row.position, heads.block_size) * heads.kv + kv_head) * heads.size + pair;
    put_part(to, low);
    if (both) put_part(to + half, high);
}

#define STORE(NAME, T)                                                                                                           \
    extern "C" __global__ void store_##NAME(float* q, int q_stride, const float* k, const float* v, int kv_stride,               \
                                            const float* angles, const AttentionRow* rows, const int* tables,                    \
                                            const Heads heads, T* keys, T* values) {                                             \
        begin_after_previous_kernel();                                                                                           \
        if (heads.size % 8 == 0) store<T, 4>(q, q_stride, k, v, kv_stride, angles, rows, tables, heads, keys, values);           \
        else store<T, 1>(q, q_stride, k, v, kv_stride, angles, rows, tables, heads, keys, values);                               \
    }

STORE(f32, float)
STORE(bf16, __nv_bfloat16)
