// The paged key-value pool, and causal attention with grouped queries over it.
//
// Of each layer the pool has keys, then values, each [slot][kv head][D]; slot = block * block_size + place in the block.
#include "mma.cuh"

// Where a row's sequence keeps its context; `AttentionRow` in src/backend/cuda/contexts.rs. Its block table is
// `tables[table..]`, and it sees positions `0..=position`.
struct AttentionRow {
    int table, position;
};

constexpr int min_of(int a, int b) { return a < b ? a : b; }

// Positions that one block takes: a longer context is split over several. Results depend on it, and on nothing else. In bytes
// it is 64 KiB of keys and values at most, so that two or three blocks are on a multiprocessor at a time. `few` in
// src/backend/cuda/attention.rs knows how many there are.
constexpr int MOST_POSITIONS = 128, MOST_BYTES = 64 << 10, BLOCK_WARPS = 8;
constexpr float LOG2_E = 1.44269504f;

// How a block cuts its work: LANES lanes have a position's head, eight numbers each, for HEADS query heads at a time. WIDE: the
// head's size is a multiple of eight.
template <typename T_, int LANES_, int HEADS_, bool WIDE_>
struct Cut {
    using T = T_;
    static constexpr bool WIDE = WIDE_;
    static constexpr int LANES = LANES_, HEADS = HEADS_, WARPS = BLOCK_WARPS, THREADS = WARPS * WARP, WIDTH = 8 * LANES;
    static constexpr int CHUNK = min_of(MOST_POSITIONS, MOST_BYTES / (2 * WIDTH * static_cast<int>(sizeof(T))));
    static constexpr int ABREAST = WARP / LANES;                // positions that a warp loads at once
    static constexpr int LOADS = CHUNK / (WARPS * ABREAST);     // that each lane makes, of keys and of values
    static constexpr int SAME = LANES / LOADS;                  // lanes that end up with the same position's score
    static constexpr int WORDS = 8 * static_cast<int>(sizeof(T)) / 16;  // of 16 bytes, in a lane's eight numbers
    static_assert(LOADS >= 1 && LOADS <= LANES && LOADS * ABREAST <= WARP, "a lane looks up one position");
};

__device__ __forceinline__ float number(float x) { return x; }
__device__ __forceinline__ float number(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void put(float* to, float x) { *to = x; }
__device__ __forceinline__ void put(__nv_bfloat16* to, float x) { *to = __float2bfloat16(x); }

// A number that is not waited for before it is needed, and whose load stays where it stands.
__device__ __forceinline__ int load_now(const int* from) {
#ifdef LONAS_EMULATED
    return *from;
#else
    int x;
    asm volatile("ld.global.b32 %0, [%1];" : "=r"(x) : "l"(from));
    return x;
#endif
}

__device__ __forceinline__ size_t slot_of(const AttentionRow& row, const int* tables, int position, int block_size) {
    return static_cast<size_t>(tables[row.table + position / block_size]) * block_size + position % block_size;
}

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

// The step's new keys and values, where `attend` itself is to write them: each row is then the only one of its sequence. Null
// where `store` did. Queries and keys are turned by `angles`, if there are any.
struct Fresh {
    const float *k, *v, *angles;
    int kv_stride;
};

// What a chunk leaves for those that put chunks together: its largest score and the sum of its weights for each chunk of a row
// and head, then the weighted values. There are at least two chunks where anything is left.
struct Partial {
    float* of;  // [row][head]: [chunk][2], [chunk][D]
    int chunks, size;

    __device__ __forceinline__ float* at(size_t row_and_head) const { return of + row_and_head * chunks * (size + 2); }
};

// A head's eight numbers from `d` on, those beyond its size zero.
template <bool WIDE>
__device__ __forceinline__ void take_eight(const float* head, int d, int size, float (&to)[8]) {
    if constexpr (WIDE) {
        if (d < size) return load_eight(head + d, to);
    }
#pragma unroll
    for (int i = 0; i < 8; i++) to[i] = !WIDE && d + i < size ? head[d + i] : 0.0f;
}

// How a lane's eight numbers of a head turn: each becomes itself times `cosine`, plus that half a head away times `sine`.
template <bool WIDE>
struct Turn {
    float cosine[8], sine[8];

    __device__ __forceinline__ void load(const float* angles, int d, int size) {
        const int half = size / 2;
        if constexpr (WIDE) {  // half of the head is a multiple of four
#pragma unroll
            for (int i = 0; i < 8; i += 4) {
                const bool lower = d + i < half;
                float4 a = {0.0f, 0.0f, 0.0f, 0.0f}, b = a;
                if (d < size) {
                    const float* pair = angles + (lower ? d + i : d + i - half);
                    // The sines of a head's angles begin after half a head.
                    a = *reinterpret_cast<const float4*>(pair), b = *reinterpret_cast<const float4*>(pair + half);
                }
                const float sign = lower ? -1.0f : 1.0f;
                cosine[i] = a.x, cosine[i + 1] = a.y, cosine[i + 2] = a.z, cosine[i + 3] = a.w;
                sine[i] = sign * b.x, sine[i + 1] = sign * b.y, sine[i + 2] = sign * b.z, sine[i + 3] = sign * b.w;
            }
        } else {
            for (int i = 0; i < 8; i++) {
                const bool lower = d + i < half, inside = d + i < size;
                const int pair = lower ? d + i : d + i - half;
                cosine[i] = inside ? angles[pair] : 0.0f;
                sine[i] = inside ? (lower ? -angles[half + pair] : angles[half + pair]) : 0.0f;
            }
        }
    }

    __device__ __forceinline__ void take(const float* head, int d, int size, float (&to)[8]) const {
        take_eight<WIDE>(head, d, size, to);
        const int half = size / 2;
        float away[8];
#pragma unroll
        for (int i = 0; i < 8; i += 4) {
            if constexpr (WIDE) {
                float4 four = {0.0f, 0.0f, 0.0f, 0.0f};
                if (d < size) four = *reinterpret_cast<const float4*>(head + (d + i < half ? d + i + half : d + i - half));
                away[i] = four.x, away[i + 1] = four.y, away[i + 2] = four.z, away[i + 3] = four.w;
            } else {
                for (int j = i; j < i + 4; j++) away[j] = d + j < size ? head[d + j < half ? d + j + half : d + j - half] : 0.0f;
            }
        }
#pragma unroll
        for (int i = 0; i < 8; i++) to[i] = fmaf(to[i], cosine[i], fmaf(away[i], sine[i], 0.0f));
    }
};

// Where a thread keeps the keys and values that it loads and nobody else reads: in shared memory, but without a barrier.
template <class C>
struct Kept {
    using T = typename C::T;
    uint4* staged;

    __device__ __forceinline__ uint4& at(int which, int i, int word) {
        return staged[((which * C::LOADS + i) * C::WORDS + word) * C::THREADS + threadIdx.x];
    }
    __device__ __forceinline__ void copy(int which, int i, const T* from, bool inside) {
#pragma unroll
        for (int word = 0; word < C::WORDS; word++) {
            cp_async_16(&at(which, i, word), from + word * (16 / sizeof(T)), inside ? 16 : 0);
        }
    }
    __device__ __forceinline__ void get(int which, int i, float (&eight)[8]) {
        if constexpr (C::WORDS == 1) {
            load_eight(reinterpret_cast<const __nv_bfloat16*>(&at(which, i, 0)), eight);
        } else {
#pragma unroll
            for (int word = 0; word < 2; word++) {
                const uint4 bits = at(which, i, word);
                eight[4 * word] = __uint_as_float(bits.x), eight[4 * word + 1] = __uint_as_float(bits.y);
                eight[4 * word + 2] = __uint_as_float(bits.z), eight[4 * word + 3] = __uint_as_float(bits.w);
            }
        }
    }
    __device__ __forceinline__ void put_eight(int which, int i, const float (&eight)[8]) {
        if constexpr (C::WORDS == 1) {
            unsigned pairs[4];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const __nv_bfloat162 two = __floats2bfloat162_rn(eight[2 * j], eight[2 * j + 1]);
                pairs[j] = reinterpret_cast<const unsigned&>(two);
            }
            at(which, i, 0) = {pairs[0], pairs[1], pairs[2], pairs[3]};
        } else {
#pragma unroll
            for (int word = 0; word < 2; word++) {
                at(which, i, word) = {__float_as_uint(eight[4 * word]), __float_as_uint(eight[4 * word + 1]),
                                      __float_as_uint(eight[4 * word + 2]), __float_as_uint(eight[4 * word + 3])};
            }
        }
    }
};

// Sums over lanes HIGH, HIGH / 2, .. LOW apart of N numbers each: halves of them go to either side while there are several, so
// that a lane is left with N / (2 HIGH / LOW) sums, or one. Its bit HIGH says whether they are of the upper half, and so on.
template <int N, int HIGH, int LOW, int MOST>
__device__ __forceinline__ void fold(float (&x)[MOST]) {
    if constexpr (HIGH >= LOW) {
        if constexpr (N > 1) {
            const bool upper = threadIdx.x & HIGH;
#pragma unroll
            for (int i = 0; i < N / 2; i++) {
                const float give = upper ? x[i] : x[i + N / 2], keep = upper ? x[i + N / 2] : x[i];
                x[i] = keep + __shfl_xor_sync(ALL_LANES, give, HIGH);
            }
            fold<N / 2, HIGH / 2, LOW>(x);
        } else {
            x[0] += __shfl_xor_sync(ALL_LANES, x[0], HIGH);
            fold<1, HIGH / 2, LOW>(x);
        }
    }
}

// What the warps of a block leave for each other.
template <class C>
struct Warps {
    float sums[C::WARPS][C::HEADS][C::WIDTH], maxima[C::WARPS][C::HEADS], totals[C::WARPS][C::HEADS];
};

// A warp's positions of the chunk, for HEADS heads: their weights relative to the largest, and the weighted values.
template <class C>
__device__ __forceinline__ void take_positions(const float (&queries)[C::HEADS][8], Kept<C>& kept, int length, Warps<C>& warps) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, part = lane / C::LANES, among = lane % C::LANES;
    float dots[C::HEADS][C::LOADS], weights[C::HEADS];
#pragma unroll
    for (int i = 0; i < C::LOADS; i++) {
        float eight[8];
        kept.get(0, i, eight);
#pragma unroll
        for (int h = 0; h < C::HEADS; h++) {
            dots[h][i] = 0.0f;
#pragma unroll
            for (int j = 0; j < 8; j++) dots[h][i] += queries[h][j] * eight[j];
        }
    }
    const bool present = (among / C::SAME * C::WARPS + warp) * C::ABREAST + part < length;
#pragma unroll
    for (int h = 0; h < C::HEADS; h++) {
        fold<C::LOADS, C::LANES / 2, 1>(dots[h]);
        const float score = present ? dots[h][0] : -INFINITY;
        float most = score;
        for (int lanes = WARP / 2; lanes >= C::SAME; lanes /= 2) most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, lanes));
        weights[h] = present ? exp2_fast(score - most) : 0.0f;
        float total = weights[h];
        for (int lanes = WARP / 2; lanes >= C::SAME; lanes /= 2) total += __shfl_xor_sync(ALL_LANES, total, lanes);
        if (lane == 0) warps.maxima[warp][h] = most, warps.totals[warp][h] = total;
    }
    cp_async_wait<0>();
    float sums[C::HEADS][8] = {};
#pragma unroll
    for (int i = 0; i < C::LOADS; i++) {
        float eight[8];
        kept.get(1, i, eight);
#pragma unroll
        for (int h = 0; h < C::HEADS; h++) {
            const float weight = __shfl_sync(ALL_LANES, weights[h], part * C::LANES + i * C::SAME);
#pragma unroll
            for (int j = 0; j < 8; j++) sums[h][j] += weight * eight[j];
        }
    }
#pragma unroll
    for (int h = 0; h < C::HEADS; h++) {
        fold<8, WARP / 2, C::LANES>(sums[h]);
        constexpr int LEFT = 8 / C::ABREAST;
#pragma unroll
        for (int j = 0; j < LEFT; j++) warps.sums[warp][h][8 * among + LEFT * part + j] = sums[h][j];
    }
}

// Puts the warps' positions together: into the row's result where that is all of its context, else for `combine`.
template <class C>
__device__ __forceinline__ void merge(const Warps<C>& warps, const Partial& partial, size_t row_and_head, int count, int size,
                                      int chunk, int chunks, __nv_bfloat16* y) {
    for (int i = threadIdx.x; i < count * C::WIDTH; i += C::THREADS) {
        const int h = i / C::WIDTH, d = i % C::WIDTH;
        if (d >= size) continue;
        float most = warps.maxima[0][h], total = 0.0f, sum = 0.0f;
#pragma unroll
        for (int warp = 1; warp < C::WARPS; warp++) most = fmaxf(most, warps.maxima[warp][h]);
#pragma unroll
        for (int warp = 0; warp < C::WARPS; warp++) {
            const float weight = exp2_fast(warps.maxima[warp][h] - most);
            total += weight * warps.totals[warp][h], sum += weight * warps.sums[warp][h][d];
        }
        if (chunks == 1) {
            y[h * size + d] = __float2bfloat16(sum / total);
        } else {
            float* of = partial.at(row_and_head + h);
            of[2 * partial.chunks + chunk * size + d] = sum;
            if (d == 0) of[2 * chunk] = most, of[2 * chunk + 1] = total;
        }
    }
}

// What some of a row's chunks sum up to, for V numbers of a head.
template <int V>
struct Part {
    float most, total, sums[V];

    __device__ __forceinline__ void add(float other_most, float other_total, const float* others) {
        const float highest = fmaxf(most, other_most);
        const float rescale = exp2_fast(most - highest), weight = exp2_fast(other_most - highest);
        most = highest, total = total * rescale + weight * other_total;
#pragma unroll
        for (int i = 0; i < V; i++) sums[i] = sums[i] * rescale + weight * others[i];
    }
};

// Puts a row's chunks together, for the heads of a group, always in the same order: several threads share the chunks of V
// numbers of the result.
template <class C>
__device__ __forceinline__ void combine(const Partial& partial, size_t row_and_head, int group, int chunks, __nv_bfloat16* y) {
    constexpr int V = C::WIDE ? 4 : 1;
    __shared__ Part<V> shared[C::THREADS];
    const int size = partial.size, columns = group * size / V, parts = columns < C::THREADS ? C::THREADS / columns : 1;
    for (int from = 0; from < columns; from += C::THREADS) {
        const int part = threadIdx.x / columns, column = from + threadIdx.x % columns;
        Part<V> mine = {-INFINITY, 0.0f, {}};
        const bool has = part < parts && column < columns && part < chunks;
        if (has) {
            const int head = column * V / size, d = column * V % size;
            const float* of = partial.at(row_and_head + head);
            const float* values = of + 2 * partial.chunks + d;
#pragma unroll 4
            for (int chunk = part; chunk < chunks; chunk += parts) {
                const float2 weighs = *reinterpret_cast<const float2*>(of + 2 * chunk);
                float numbers[V];
                if constexpr (C::WIDE) {
                    const float4 four = *reinterpret_cast<const float4*>(values + static_cast<size_t>(chunk) * size);
                    numbers[0] = four.x, numbers[1] = four.y, numbers[2] = four.z, numbers[3] = four.w;
                } else {
                    numbers[0] = values[static_cast<size_t>(chunk) * size];
                }
                mine.add(weighs.x, weighs.y, numbers);
            }
        }
        if (parts > 1) {
            shared[threadIdx.x] = mine;
            __syncthreads();
            if (has && part == 0) {
                for (int other = 1; other < parts && other < chunks; other++) {
                    const Part<V>& its = shared[other * columns + threadIdx.x];
                    mine.add(its.most, its.total, its.sums);
                }
            }
        }
        if (has && part == 0) {
#pragma unroll
            for (int i = 0; i < V; i++) y[column * V + i] = __float2bfloat16(mine.sums[i] / mine.total);
        }
    }
}

// A row's queries for HEADS heads of a group, `from` on, turned by the row's angles if there are any.
template <class C>
__device__ __forceinline__ void load_queries(const float* q, const float* angles, int from, int group, int size,
                                             float (&queries)[C::HEADS][8]) {
    const int d = threadIdx.x % C::LANES * 8;
    Turn<C::WIDE> turn;
    if (angles) turn.load(angles, d, size);
#pragma unroll
    for (int h = 0; h < C::HEADS; h++) {
        const float* head = q + min(from + h, group - 1) * size;
        if (angles) turn.take(head, d, size, queries[h]);
        else take_eight<C::WIDE>(head, d, size, queries[h]);
    }
}

// Sends for a chunk's keys, then its values, all but those at `newest`. Each lane knows the `slot` of one position.
template <class C>
__device__ __forceinline__ void fetch(Kept<C>& kept, const typename C::T* keys, const typename C::T* values, int slot, int length,
                                      int newest, const Heads& heads) {
    const int warp = threadIdx.x / WARP, part = threadIdx.x % WARP / C::LANES, d = threadIdx.x % C::LANES * 8;
#pragma unroll
    for (int which = 0; which < 2; which++) {
        const typename C::T* pool = which ? values : keys;
#pragma unroll
        for (int i = 0; i < C::LOADS; i++) {
            const int place = (i * C::WARPS + warp) * C::ABREAST + part;
            const int its_slot = __shfl_sync(ALL_LANES, slot, i * C::ABREAST + part);
            const typename C::T* at = pool + (static_cast<size_t>(static_cast<unsigned>(its_slot)) * heads.kv + blockIdx.y) * heads.size;
            if (place == newest) continue;
            if constexpr (C::WIDE) {
                kept.copy(which, i, at + d, place < length && d < heads.size);
            } else {
                float eight[8];
#pragma unroll
                for (int j = 0; j < 8; j++) eight[j] = place < length && d + j < heads.size ? number(at[d + j]) : 0.0f;
                kept.put_eight(which, i, eight);
            }
        }
        cp_async_commit();
    }
}

// Writes the row's own key and value to the pool, and where copies of them would have come.
template <class C>
__device__ __forceinline__ void take_newest(Kept<C>& kept, const Fresh& fresh, const float* angles, typename C::T* keys,
                                            typename C::T* values, int slot, int newest, const Heads& heads) {
    const int warp = threadIdx.x / WARP, part = threadIdx.x % WARP / C::LANES, d = threadIdx.x % C::LANES * 8;
    const int i = newest / (C::WARPS * C::ABREAST), size = heads.size;
    const int its_slot = __shfl_sync(ALL_LANES, slot, i * C::ABREAST + part);
    if ((i * C::WARPS + warp) * C::ABREAST + part != newest) return;
    float key[8] = {}, value[8] = {};
    const size_t from = static_cast<size_t>(blockIdx.x) * fresh.kv_stride + blockIdx.y * size;
    if (d < size) {
        take_eight<C::WIDE>(fresh.v + from, d, size, value);
        if (angles) {
            Turn<C::WIDE> turn;
            turn.load(angles, d, size);
            turn.take(fresh.k + from, d, size, key);
        } else {
            take_eight<C::WIDE>(fresh.k + from, d, size, key);
        }
    }
    kept.put_eight(0, i, key), kept.put_eight(1, i, value);
    const size_t at = (static_cast<size_t>(static_cast<unsigned>(its_slot)) * heads.kv + blockIdx.y) * size + d;
    if constexpr (C::WIDE) {
        if (d >= size) return;
#pragma unroll
        for (int word = 0; word < C::WORDS; word++) {
            reinterpret_cast<uint4*>(keys + at)[word] = kept.at(0, i, word);
            reinterpret_cast<uint4*>(values + at)[word] = kept.at(1, i, word);
        }
    } else {
        for (int j = 0; j < 8 && d + j < size; j++) put(keys + at + j, key[j]), put(values + at + j, value[j]);
    }
}

// Counts a chunk as done; whether all are. Leaves the counter at zero, as it was found.
__device__ __forceinline__ bool is_last(unsigned* counter, int chunks) {
    __shared__ unsigned before;
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        before = atomicAdd(counter, 1u);
        __threadfence();
        if (before + 1 == static_cast<unsigned>(chunks)) *counter = 0;
    }
    __syncthreads();
    return before + 1 == static_cast<unsigned>(chunks);
}

// One block a row, key-value head and chunk of its context. The last of a row and head to finish puts the chunks together.
// Reads what it needs in three rounds: the row and its queries; the block table; keys and values. Where every row's block table
// is `table_stride` entries behind the last's, that is one round less; 0 where it is not.
template <class C>
__device__ __forceinline__ void attend(const float* q, int q_stride, const AttentionRow* rows, const int* tables, int table_stride,
                                       const Heads& heads, float scale, typename C::T* keys, typename C::T* values,
                                       const Fresh& fresh, const Partial& partial, unsigned* counters, __nv_bfloat16* y, int y_stride) {
    DYN_SHARED(uint4, staged);
    __shared__ Warps<C> warps;
    let_next_kernel_begin();
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int kv_head = blockIdx.y, chunk = blockIdx.z, group = heads.query / heads.kv, size = heads.size;
    // Each lane looks up one of its warp's positions.
    const int looks = lane % (C::LOADS * C::ABREAST);
    const int looks_at = (looks / C::ABREAST * C::WARPS + warp) * C::ABREAST + looks % C::ABREAST;
    const int first = chunk * C::CHUNK, block = (first + looks_at) / heads.block_size;
    int entry = 0;
    if (table_stride > 0) entry = load_now(tables + static_cast<size_t>(blockIdx.x) * table_stride + min(block, table_stride - 1));
    const AttentionRow row = rows[blockIdx.x];
    // So far only what came with the step; from here on also what the kernel before wrote.
    wait_for_previous_kernel();
    q += static_cast<size_t>(blockIdx.x) * q_stride + kv_head * group * size;
    const float* angles = fresh.k && fresh.angles ? fresh.angles + static_cast<size_t>(blockIdx.x) * size : nullptr;
    float queries[C::HEADS][8];
    load_queries<C>(q, angles, 0, group, size, queries);
    if (first > row.position) return;
    const int length = min(C::CHUNK, row.position + 1 - first), chunks = row.position / C::CHUNK + 1;
    if (table_stride <= 0 && looks_at < length) entry = tables[row.table + block];
    const int slot = entry * heads.block_size + (first + looks_at - block * heads.block_size);
    // The position that is written here, if it is in this chunk.
    const int newest = fresh.k ? row.position - first : C::CHUNK;
    Kept<C> kept = {staged};
    fetch<C>(kept, keys, values, slot, length, newest, heads);
    if (newest < C::CHUNK) take_newest<C>(kept, fresh, angles, keys, values, slot, newest, heads);
    y += static_cast<size_t>(blockIdx.x) * y_stride + kv_head * group * size;
    const size_t row_and_head = static_cast<size_t>(blockIdx.x) * heads.query + kv_head * group;
    for (int from = 0; from < group; from += C::HEADS) {
        if (from > 0) load_queries<C>(q, angles, from, group, size, queries);
#pragma unroll
        for (int h = 0; h < C::HEADS; h++) {
            for (int j = 0; j < 8; j++) queries[h][j] *= scale * LOG2_E;
        }
        if (from == 0) cp_async_wait<1>();
        else __syncthreads();
        take_positions<C>(queries, kept, length, warps);
        __syncthreads();
        merge<C>(warps, partial, row_and_head + from, min(C::HEADS, group - from), size, chunk, chunks, y + from * size);
    }
    if (chunks > 1 && is_last(&counters[blockIdx.x * heads.kv + kv_head], chunks)) combine<C>(partial, row_and_head, group, chunks, y);
}

// Names, and how many blocks are to fit on a multiprocessor, where keys and values allow it.
#define ATTENTION(NAME, BLOCKS, ...)                                                                                             \
    extern "C" __global__ void __launch_bounds__(BLOCK_WARPS * WARP, BLOCKS)                                                     \
        attend_##NAME(const float* q, int q_stride, const AttentionRow* rows, const int* tables, int table_stride,               \
                      const Heads heads, float scale, typename Cut<__VA_ARGS__>::T* keys, typename Cut<__VA_ARGS__>::T* values,  \
                      const Fresh fresh, const Partial partial, unsigned* counters, __nv_bfloat16* y, int y_stride) {            \
        attend<Cut<__VA_ARGS__>>(q, q_stride, rows, tables, table_stride, heads, scale, keys, values, fresh, partial, counters, \
                                 y, y_stride);                                                                                   \
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
// By the size of a head at most, and by the heads of a group: one, or several at a time.
ATTENTION(f32_64, 2, float, 8, 4, true)
ATTENTION(f32_128, 2, float, 16, 4, true)
ATTENTION(bf16_64, 3, __nv_bfloat16, 8, 1, true)
ATTENTION(bf16_128, 3, __nv_bfloat16, 16, 1, true)
ATTENTION(bf16_256, 3, __nv_bfloat16, 32, 1, true)
ATTENTION(bf16_64_grouped, 2, __nv_bfloat16, 8, 4, true)
ATTENTION(bf16_128_grouped, 2, __nv_bfloat16, 16, 4, true)
// Four heads of 256 at a time would take more shared memory than an sm_86 has.
ATTENTION(f32_256, 2, float, 32, 2, true)
ATTENTION(bf16_256_grouped, 2, __nv_bfloat16, 32, 2, true)
// Where a head is no multiple of eight numbers.
ATTENTION(f32_odd, 2, float, 32, 1, false)
ATTENTION(bf16_odd, 2, __nv_bfloat16, 32, 1, false)
