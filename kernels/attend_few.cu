// Attention with grouped queries over the paged pool of keys and values, for few rows of a sequence: each row by itself, its context
// split over blocks. For many rows: attend_many.cu.
#include "attend_few.cuh"

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

// What a row sees of a chunk: `count` places from `first` on. The chunk begins `ahead` of the row, most often below 0.
struct Seen {
    int first, count, ahead;

    // One comparison: what is before the first is beyond all as an unsigned number.
    __device__ __forceinline__ bool has(int place) const {
        return static_cast<unsigned>(place - first) < static_cast<unsigned>(count);
    }
};

// What the warps of a block leave for each other.
template <class C>
struct Warps {
    float sums[C::WARPS][C::HEADS][C::WIDTH], maxima[C::WARPS][C::HEADS], totals[C::WARPS][C::HEADS];
    float slopes[C::WARPS][C::HEADS];  // each warp its own, where it leaves them for itself: registers are scarce
};

// A warp's positions of the chunk, for HEADS heads: their weights relative to the largest, and the weighted values. Scores count
// powers of two; where they are `sloping`, a head's gain its slope times the distance.
template <class C>
__device__ __forceinline__ void take_positions(const float (&queries)[C::HEADS][8], bool sloping, Kept<C>& kept, const Seen& seen,
                                               Warps<C>& warps) {
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
    const int place = (among / C::SAME * C::WARPS + warp) * C::ABREAST + part;
    const bool present = seen.has(place);
#pragma unroll
    for (int h = 0; h < C::HEADS; h++) {
        fold<C::LOADS, C::LANES / 2, 1>(dots[h]);
        if (sloping) dots[h][0] += warps.slopes[warp][h] * (seen.ahead + place);
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

// Leaves the warp the slopes of HEADS heads of a group, as scores count; that of the last head again beyond it.
template <class C>
__device__ __forceinline__ void load_slopes(const float* of_group, int from, int group, Warps<C>& warps) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (lane < C::HEADS) warps.slopes[warp][lane] = LOG2_E * of_group[min(from + lane, group - 1)];
    __syncwarp();
}

// Sends for a chunk's keys, then its values, all but those at `newest`: zeros for what the row does not see, whose memory may hold
// anything. Each lane knows the `slot` of one position.
template <class C>
__device__ __forceinline__ void fetch(Kept<C>& kept, const typename C::T* keys, const typename C::T* values, int slot,
                                      const Seen& seen, int newest, const Heads& heads) {
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
                kept.copy(which, i, at + d, seen.has(place) && d < heads.size);
            } else {
                float eight[8];
#pragma unroll
                for (int j = 0; j < 8; j++) eight[j] = seen.has(place) && d + j < heads.size ? number(at[d + j]) : 0.0f;
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

// One block a row, key-value head and chunk of what the row sees of its context. The last of a row and head to finish puts the chunks
// together. Reads what it needs in three rounds: the row and its queries; the block table; keys and values. Where every row's block
// table is `table_stride` entries behind the last's, and every row sees its sequence from the first chunk on, that is one round
// less; 0 where it is not so. `slopes`: of the query heads, or null.
template <class C>
__device__ __forceinline__ void attend(const float* q, int q_stride, const AttentionRow* rows, const int* tables, int table_stride,
                                       const float* slopes, const Heads& heads, float scale, typename C::T* keys, typename C::T* values,
                                       const Fresh& fresh, const Partial& partial, unsigned* counters, __nv_bfloat16* y, int y_stride) {
    DYN_SHARED(uint4, staged);
    __shared__ Warps<C> warps;
    let_next_kernel_begin();
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int kv_head = blockIdx.y, chunk = blockIdx.z, group = heads.query / heads.kv, size = heads.size;
    // Each lane looks up one of its warp's positions.
    const int looks = lane % (C::LOADS * C::ABREAST);
    const int looks_at = (looks / C::ABREAST * C::WARPS + warp) * C::ABREAST + looks % C::ABREAST;
    int first = chunk * C::CHUNK, block = (first + looks_at) / heads.block_size, entry = 0;
    if (table_stride > 0) entry = load_now(tables + static_cast<size_t>(blockIdx.x) * table_stride + min(block, table_stride - 1));
    const AttentionRow row = rows[blockIdx.x];
    if (slopes) load_slopes<C>(slopes + kv_head * group, 0, group, warps);
    // So far only what came with the step; from here on also what the kernel before wrote.
    wait_for_previous_kernel();
    q += static_cast<size_t>(blockIdx.x) * q_stride + kv_head * group * size;
    const float* angles = fresh.k && fresh.angles ? fresh.angles + static_cast<size_t>(blockIdx.x) * size : nullptr;
    float queries[C::HEADS][8];
    load_queries<C>(q, angles, 0, group, size, queries);
    if (table_stride <= 0 && row.first >= C::CHUNK) {  // chunks count from the first one that the row sees
        first += row.first / C::CHUNK * C::CHUNK;
        block = (first + looks_at) / heads.block_size;
    }
    if (first > row.last) return;
    const int chunks = chunk + 1 + (row.last - first) / C::CHUNK;
    const int from_place = max(row.first - first, 0), end = min(C::CHUNK, row.last + 1 - first);
    const Seen seen = {from_place, end - from_place, first - row.position};
    if (table_stride <= 0 && looks_at < end) entry = tables[row.table + block];
    const int slot = entry * heads.block_size + (first + looks_at - block * heads.block_size);
    // The position that is written here, if it is in this chunk.
    const int newest = fresh.k ? row.position - first : C::CHUNK;
    Kept<C> kept = {staged};
    fetch<C>(kept, keys, values, slot, seen, newest, heads);
    if (newest < C::CHUNK) take_newest<C>(kept, fresh, angles, keys, values, slot, newest, heads);
    y += static_cast<size_t>(blockIdx.x) * y_stride + kv_head * group * size;
    const size_t row_and_head = static_cast<size_t>(blockIdx.x) * heads.query + kv_head * group;
    for (int from = 0; from < group; from += C::HEADS) {
        if (from > 0) {
            load_queries<C>(q, angles, from, group, size, queries);
            if (slopes) load_slopes<C>(slopes + kv_head * group, from, group, warps);
        }
#pragma unroll
        for (int h = 0; h < C::HEADS; h++) {
            for (int j = 0; j < 8; j++) queries[h][j] *= scale * LOG2_E;
        }
        if (from == 0) cp_async_wait<1>();
        else __syncthreads();
        take_positions<C>(queries, slopes != nullptr, kept, seen, warps);
        __syncthreads();
        merge<C>(warps, partial, row_and_head + from, min(C::HEADS, group - from), size, chunk, chunks, y + from * size);
    }
    if (chunks > 1 && is_last(&counters[blockIdx.x * heads.kv + kv_head], chunks)) combine<C>(partial, row_and_head, group, chunks, y);
}

// Names, and how many blocks are to fit on a multiprocessor, where keys and values allow it.
#define ATTENTION(NAME, BLOCKS, ...)                                                                                             \
    extern "C" __global__ void __launch_bounds__(BLOCK_WARPS * WARP, BLOCKS)                                                     \
        attend_##NAME(const float* q, int q_stride, const AttentionRow* rows, const int* tables, int table_stride,               \
                      const float* slopes, const Heads heads, float scale, typename Cut<__VA_ARGS__>::T* keys,                   \
                      typename Cut<__VA_ARGS__>::T* values, const Fresh fresh, const Partial partial, unsigned* counters,        \
                      __nv_bfloat16* y, int y_stride) {                                                                          \
        attend<Cut<__VA_ARGS__>>(q, q_stride, rows, tables, table_stride, slopes, heads, scale, keys, values, fresh, partial,    \
                                 counters, y, y_stride);                                                                         \
    }

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
