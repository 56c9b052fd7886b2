// Attention with grouped queries over the paged pool of keys and values, for many rows of a sequence at a time, with tensor
// cores. For few rows: attend_few.cu.
//
// A block has a tile of rows of one sequence, with all the query heads of one key-value head: they read the same keys. It
// walks over the context in tiles of KEYS positions, which begin at multiples of KEYS wherever the rows stand, and keeps for
// each row the largest score so far, the sum of the weights relative to it, and the sum of the weighted values. A tile that a
// row does not see changes none of them: its weights are exact zeros, and everything is rescaled by exactly 1. So a row's
// result is the same bit for bit whatever rows stand beside it and wherever its prompt was cut, if keys and values are finite
// in all that the rows see. Of the pool's other memory nothing is read.
#include "attention.cuh"
#include "mma.cuh"

// How a block cuts its work: ROWS rows, each of one query head, of which a warp has 16 M; keys and values come in tiles of
// KEYS positions, through a ring of STAGES tiles in shared memory, all but one of them on their way.
template <int HEAD_, int WARPS_, int M_>
struct Cut {
    static constexpr int HEAD = HEAD_, M = M_, KEYS = 64, STAGES = 3;
    static constexpr int THREADS = WARPS_ * WARP, WARP_ROWS = 16 * M, ROWS = WARPS_ * WARP_ROWS;
    static constexpr int CHUNKS = HEAD / 8;               // of 16 bytes, in a tile's row
    static constexpr int ROWS_A_COPY = THREADS / CHUNKS;  // that all threads' 16 bytes fill
    static constexpr int STAGE = KEYS * HEAD;
    static constexpr int BYTES = (ROWS * HEAD + STAGES * STAGE) * static_cast<int>(sizeof(bf16));
    using Scores = float[M][KEYS / 8][4];
    using Weights = unsigned[M][KEYS / 16][4];  // pairs of bf16
    using Sums = float[M][HEAD / 8][4];
    static_assert(ROWS_A_COPY % 8 == 0, "a thread's chunks are permuted alike");
    static_assert(KEYS % ROWS_A_COPY == 0 && ROWS % ROWS_A_COPY == 0, "copies do not straddle a tile's end");
    static_assert(KEYS <= THREADS, "a thread looks up a position");
    static_assert(STAGES == 3, "what is copied beside the products with keys is keys, and values beside those with values");
};

// Consecutive rows of one sequence; `Tile` in src/backend/cuda/contexts.rs.
struct Tile {
    int row, count;  // the first one's place in q and y, and how many
    int start;       // its position
    int table;       // where the sequence's block table begins
    int last;        // the highest position that any row sees
};

// What every row sees of its sequence, and what distance costs.
struct Sight {
    int window;           // so many positions up to its own; 0 for all of them, or ALL for the sequence's last ones too
    const float* slopes;  // what the scores of query heads gain with each position further on; null for nothing
};
constexpr int ALL = -1;

// The rows of a block. Row `i` of the tile and head `h` of the group stand at i * group + h.
struct Span {
    int first, start;  // of row 0: which of q and y, and its position
    int table;         // where the sequence's block table begins
    int group, rows;   // query heads of a key-value head; rows times that
    int lowest, last;  // positions that any row sees
    bool all;          // every row sees the last

    __device__ __forceinline__ Span(const Tile& tile, const Heads& heads, const Sight& sight)
        : first(tile.row), start(tile.start), table(tile.table), group(heads.query / heads.kv), rows(tile.count * group),
          lowest(sight.window > 0 ? max(tile.start - sight.window + 1, 0) : 0), last(tile.last), all(sight.window == ALL) {}
    // Rows beyond the end have no queries; they see what the first row sees, so that their sums are numbers.
    __device__ __forceinline__ int position(int row) const { return start + (row < rows ? row / group : 0); }
};

// The pool's slot of a position, or -1 where no row sees it.
__device__ __forceinline__ int look_up(const int* tables, const Span& span, int position, int block_size) {
    if (position < span.lowest || position > span.last) return -1;
    const int block = position / block_size;
    return tables[span.table + block] * block_size + (position - block * block_size);
}

// Copies a key-value head's KEYS rows of the pool to a stage: zeros where no row sees a position, whose memory may hold
// anything, and beyond the head's size.
template <class C>
__device__ __forceinline__ void copy_tile(const bf16* pool, const int* slots, const Heads& heads, bf16* to) {
    // As if it were another each time: what comes of it would stay in registers that are needed for sums.
    int thread = threadIdx.x;
    asm volatile("" : "+r"(thread));
    const int row = thread / C::CHUNKS, chunk = thread % C::CHUNKS;
    const bool inside = chunk * 8 < heads.size;
    const char* from = reinterpret_cast<const char*>(pool + blockIdx.y * heads.size + chunk * 8);
    const unsigned slot_bytes = heads.kv * heads.size * sizeof(bf16);
    to += swizzled<C::HEAD>(row, chunk);
#pragma unroll
    for (int i = 0; i < C::KEYS; i += C::ROWS_A_COPY) {
        const int slot = slots[row + i];
        // Of unsigned numbers this is one instruction; where there is no slot nothing is read.
        const char* at = from + static_cast<size_t>(static_cast<unsigned>(slot)) * slot_bytes;
        cp_async_16(to + i * C::HEAD, at, inside && slot >= 0 ? 16 : 0);
    }
    cp_async_commit();
}

// The block's queries, times `scale` and rounded to bf16.
template <class C>
__device__ __forceinline__ void load_queries(const float* q, int q_stride, const Span& span, const Heads& heads, float scale,
                                             bf16* to) {
    const int first_row = threadIdx.x / C::CHUNKS, chunk = threadIdx.x % C::CHUNKS;
    for (int row = first_row; row < C::ROWS; row += C::ROWS_A_COPY) {
        uint4 bits = {0, 0, 0, 0};
        if (row < span.rows && chunk * 8 < heads.size) {
            const int at = row / span.group, head = blockIdx.y * span.group + row % span.group;
            float eight[8];
            load_eight(q + static_cast<size_t>(span.first + at) * q_stride + head * heads.size + chunk * 8, eight);
            __nv_bfloat162* pairs = reinterpret_cast<__nv_bfloat162*>(&bits);
#pragma unroll
            for (int i = 0; i < 4; i++) pairs[i] = __floats2bfloat162_rn(eight[2 * i] * scale, eight[2 * i + 1] * scale);
        }
        *reinterpret_cast<uint4*>(to + swizzled<C::HEAD>(row, chunk)) = bits;
    }
}

// What a lane keeps of its rows: those of 16 m + 8 half. The four lanes of a row each have the total of their own columns.
template <class C>
struct Softmax {
    float most[C::M][2], total[C::M][2];
};

// scores += queries times keys. Unlike multiply_tiles it holds the keys of few positions at a time: registers are scarce.
template <class C>
__device__ __forceinline__ void multiply_keys(const bf16* queries, const bf16* keys, typename C::Scores& scores) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int step = 0; step < C::HEAD / 16; step++) {
        unsigned a[C::M][4];
#pragma unroll
        for (int m = 0; m < C::M; m++) {
            ldmatrix_x4(a[m], queries + swizzled<C::HEAD>(16 * m + lane % 16, 2 * step + lane / 16));
        }
#pragma unroll
        for (int n = 0; n < C::KEYS / 16; n++) {
            unsigned b[4];
            ldmatrix_x4(b, keys + swizzled<C::HEAD>(16 * n + lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2));
#pragma unroll
            for (int m = 0; m < C::M; m++) {
                mma_m16n8k16(scores[m][2 * n], a[m], b[0], b[1]);
                mma_m16n8k16(scores[m][2 * n + 1], a[m], b[2], b[3]);
            }
        }
    }
}

// Takes away what comes after what a row sees. This lane's first row is `row`, and its scores [m][n] are those of the positions
// 8 n and 8 n + 1 from `position`. It comes for a block's last tiles only, so the rows' positions are found anew, in no register.
template <class C>
__device__ __forceinline__ void mask(typename C::Scores& scores, const Span& span, int row, int position) {
#pragma unroll
    for (int i = 0; i < 2 * C::M; i++) {
        const int ahead = (span.all ? span.last : span.position(row + 8 * i)) - position;
#pragma unroll
        for (int n = 0; n < C::KEYS / 8; n++) {
            float* pair = &scores[i / 2][n][i % 2 * 2];
            if (8 * n > ahead) pair[0] = -INFINITY;
            if (8 * n + 1 > ahead) pair[1] = -INFINITY;
        }
    }
}

// The same of what comes before a row's window. It may be all of a tile that comes before any that the row sees, whose largest score
// must be a number: beside any other this one weighs nothing, and what it has summed up is taken away.
constexpr float LEAST = -1e30f;
template <class C>
__device__ __forceinline__ void mask_before(typename C::Scores& scores, const Span& span, int window, int row, int position) {
#pragma unroll
    for (int i = 0; i < 2 * C::M; i++) {
        const int begins = span.position(row + 8 * i) - window + 1 - position;
#pragma unroll
        for (int n = 0; n < C::KEYS / 8; n++) {
            float* pair = &scores[i / 2][n][i % 2 * 2];
            if (8 * n < begins) pair[0] = LEAST;
            if (8 * n + 1 < begins) pair[1] = LEAST;
        }
    }
}

// Adds what distance costs, likewise.
template <class C>
__device__ __forceinline__ void add_distance(typename C::Scores& scores, const Span& span, const float* slopes, int row,
                                             int position) {
#pragma unroll
    for (int i = 0; i < 2 * C::M; i++) {
        const int at = row + 8 * i, head = blockIdx.y * span.group + at % span.group;
        const float slope = LOG2_E * slopes[head];
        const int ahead = position - span.position(at);
#pragma unroll
        for (int n = 0; n < C::KEYS / 8; n++) {
            float* pair = &scores[i / 2][n][i % 2 * 2];
            pair[0] += slope * (ahead + 8 * n), pair[1] += slope * (ahead + 8 * n + 1);
        }
    }
}

__device__ __forceinline__ unsigned round_pair(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const unsigned*>(&pair);
}

// Turns scores, which count powers of two, into weights relative to the largest score so far, and rescales the sums to that.
// The largest is a number from the first tile on: every row sees a position of it, or has LEAST there. A lane's scores stand as mma
// wants its left operand.
template <class C>
__device__ __forceinline__ void weigh(const typename C::Scores& scores, Softmax<C>& rows, typename C::Weights& weights,
                                      typename C::Sums& sums) {
#pragma unroll
    for (int m = 0; m < C::M; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float most = rows.most[m][half];
#pragma unroll
            for (int n = 0; n < C::KEYS / 8; n++) most = fmaxf(most, fmaxf(scores[m][n][2 * half], scores[m][n][2 * half + 1]));
            most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, 1));
            most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, 2));
            const float rescale = exp2_fast(rows.most[m][half] - most);
            float total = 0.0f;
#pragma unroll
            for (int n = 0; n < C::KEYS / 8; n++) {
                const float one = exp2_fast(scores[m][n][2 * half] - most), two = exp2_fast(scores[m][n][2 * half + 1] - most);
                weights[m][n / 2][n % 2 * 2 + half] = round_pair(one, two);
                total += one + two;
            }
            rows.most[m][half] = most;
            rows.total[m][half] = rows.total[m][half] * rescale + total;
            // Late in a context new largest scores are rare, and to rescale by 1 changes nothing.
            if (!__any_sync(ALL_LANES, rescale != 1.0f)) continue;
#pragma unroll
            for (int n = 0; n < C::HEAD / 8; n++) sums[m][n][2 * half] *= rescale, sums[m][n][2 * half + 1] *= rescale;
        }
    }
}

// sums += weights times values; ldmatrix turns the values.
template <class C>
__device__ __forceinline__ void add_values(const typename C::Weights& weights, const bf16* values, typename C::Sums& sums) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int step = 0; step < C::KEYS / 16; step++) {
#pragma unroll
        for (int n = 0; n < C::HEAD / 16; n++) {
            unsigned b[4];
            ldmatrix_x4_trans(b, values + swizzled<C::HEAD>(16 * step + lane % 16, 2 * n + lane / 16));
#pragma unroll
            for (int m = 0; m < C::M; m++) {
                mma_m16n8k16(sums[m][2 * n], weights[m][step], b[0], b[1]);
                mma_m16n8k16(sums[m][2 * n + 1], weights[m][step], b[2], b[3]);
            }
        }
    }
}

// Writes the rows of this warp, of which `row` is this lane's first.
template <class C>
__device__ __forceinline__ void write_rows(const typename C::Sums& sums, const Softmax<C>& rows, const Span& span, int row,
                                           const Heads& heads, bf16* y, int y_stride) {
#pragma unroll
    for (int i = 0; i < 2 * C::M; i++) {
        float total = rows.total[i / 2][i % 2];
        total += __shfl_xor_sync(ALL_LANES, total, 1);
        total += __shfl_xor_sync(ALL_LANES, total, 2);
        const int at = row + 8 * i;
        if (at >= span.rows) continue;
        const int head = blockIdx.y * span.group + at % span.group;
        const float inverse = 1.0f / total;
        bf16* to = y + static_cast<size_t>(span.first + at / span.group) * y_stride + head * heads.size + threadIdx.x % 4 * 2;
#pragma unroll
        for (int n = 0; n < C::HEAD / 8; n++) {
            if (8 * n >= heads.size) break;
            const float* pair = &sums[i / 2][n][i % 2 * 2];
            // Adding zero makes 0 of -0: a tile that a row does not see would, and whether it comes depends on the tile.
            *reinterpret_cast<__nv_bfloat162*>(to + 8 * n) =
                __floats2bfloat162_rn(fmaf(pair[0], inverse, 0.0f), fmaf(pair[1], inverse, 0.0f));
        }
    }
}

template <class C>
__device__ __forceinline__ void attend_many(const float* q, int q_stride, const Tile& tile, const int* tables,
                                            const Sight& sight, const Heads& heads, float scale, const bf16* keys,
                                            const bf16* values, bf16* y, int y_stride) {
    DYN_SHARED(uint4, memory);  // so aligned, as copies and matrices need it
    __shared__ int slots[2][C::KEYS];
    bf16 *queries = reinterpret_cast<bf16*>(memory), *stages = queries + C::ROWS * C::HEAD;
    const int lane = threadIdx.x % WARP, warp_row = threadIdx.x / WARP * C::WARP_ROWS;
    const Span span(tile, heads, sight);
    // The first tile of positions that any row sees something of.
    const int begin = span.lowest / C::KEYS * C::KEYS;
    const unsigned steps = (span.last - begin) / C::KEYS + 1;
    const bool finds = threadIdx.x < C::KEYS;  // this thread looks up a position of each tile
    if (finds) {
        slots[0][threadIdx.x] = look_up(tables, span, begin + threadIdx.x, heads.block_size);
        slots[1][threadIdx.x] = look_up(tables, span, begin + C::KEYS + threadIdx.x, heads.block_size);
    }
    __syncthreads();
    copy_tile<C>(keys, slots[0], heads, stages);
    copy_tile<C>(values, slots[0], heads, stages + C::STAGE);
    // Scores are to count powers of two.
    load_queries<C>(q, q_stride, span, heads, scale * LOG2_E, queries);

    Softmax<C> rows;
#pragma unroll
    for (int i = 0; i < 2 * C::M; i++) {
        rows.most[i / 2][i % 2] = -INFINITY, rows.total[i / 2][i % 2] = 0.0f;
    }
    // The last position that any row of this warp sees, and up to where all rows of the block see everything.
    const int of_warp = span.all ? span.last : span.position(min(warp_row + C::WARP_ROWS, span.rows) - 1);
    const int highest = warp_row < span.rows ? of_warp : -1, seen_by_all = span.all ? span.last : span.start;
    typename C::Sums sums = {};
    // Stages have keys, then the values of the same positions, and so on. After the barrier before a stage all threads'
    // copies of it are there, and nobody reads the one before it any more: the stage after the next takes its memory.
    const auto next_stage = [&](const bf16* pool, unsigned stage) {
        cp_async_wait<C::STAGES - 2>();
        __syncthreads();
        if (stage / 2 + 1 < steps) {
            copy_tile<C>(pool, slots[(stage / 2 + 1) % 2], heads, stages + (stage + 2) % C::STAGES * C::STAGE);
        } else {
            cp_async_commit();  // an empty group: waits count groups
        }
        return stages + stage % C::STAGES * C::STAGE;
    };
    for (unsigned step = 0; step < steps; step++) {
        const int position = begin + step * C::KEYS;
        const bool seen = position <= highest;
        typename C::Weights weights;
        const bf16* at = next_stage(keys, 2 * step);
        // This step's own slots give way: the barrier has passed, and the copies from them were begun before it.
        if (finds) slots[step % 2][threadIdx.x] = look_up(tables, span, position + 2 * C::KEYS + threadIdx.x, heads.block_size);
        if (seen) {
            typename C::Scores scores = {};
            multiply_keys<C>(queries + warp_row * C::HEAD, at, scores);
            const int row = warp_row + lane / 4, own_position = position + lane % 4 * 2;
            if (sight.slopes) add_distance<C>(scores, span, sight.slopes, row, own_position);
            if (position + C::KEYS - 1 > seen_by_all) mask<C>(scores, span, row, own_position);
            if (sight.window > 0 && position <= span.last - sight.window) {
                mask_before<C>(scores, span, sight.window, row, own_position);
            }
            weigh<C>(scores, rows, weights, sums);
        }
        at = next_stage(values, 2 * step + 1);
        if (seen) add_values<C>(weights, at, sums);
    }
    write_rows<C>(sums, rows, span, warp_row + lane / 4, heads, y, y_stride);
}

// What a launch needs: THREADS, a grid of (tiles, key-value heads), BYTES of dynamic shared memory; above 48 KB that is more
// than a launch may have unasked: cuFuncSetAttribute with MAX_DYNAMIC_SHARED_SIZE_BYTES goes before it.
//
// A tile has from 1 to ROWS / (query heads of a key-value head) rows, and there may be ROWS of those heads; longest contexts first
// leave the short ones to fill the end. Heads are multiples of eight numbers. q and the pool begin at 16 bytes and q_stride is a multiple of four;
// y begins at 4 bytes and y_stride is even.
//
// A tile of keys and values makes 128 operations a byte with 128 rows, for which an A100 at its peak would read 2.4 TB/s, half
// of what its second-level cache gives; 64 rows would need all of it. That all heads of a group are rows of a block changes
// nothing of this for a long prompt, but a short one fills tiles, and fewer scores are computed that a row does not see. A
// warp's 32 rows take 5 loads (ldmatrix) for 16 products (mma), 5/8 of what shared memory gives meanwhile; 16 rows would take
// all of it, but with heads of 256 no more have sums in registers. Of those, heads of 128 need 128 for sums and 64 for scores,
// two blocks a multiprocessor, and of its 164 KB on an A100 they take 163; heads of 64 have half the sums and three blocks.
using Attend64 = Cut<64, 4, 2>;
using Attend128 = Cut<128, 4, 2>;
using Attend256 = Cut<256, 8, 1>;
static_assert(Attend64::ROWS == 128 && Attend64::THREADS == 128 && Attend64::BYTES == 40960, "as it is launched");
static_assert(Attend128::ROWS == 128 && Attend128::THREADS == 128 && Attend128::BYTES == 81920, "as it is launched");
static_assert(Attend256::ROWS == 128 && Attend256::THREADS == 256 && Attend256::BYTES == 163840, "as it is launched");

#define ATTEND_MANY(NAME, CUT, BLOCKS)                                                                                     \
    extern "C" __global__ void __launch_bounds__(CUT::THREADS, BLOCKS)                                                     \
        NAME(const float* q, int q_stride, const Tile* tiles, const int* tables, const Sight sight, const Heads heads,     \
             float scale, const bf16* keys, const bf16* values, bf16* y, int y_stride) {                                   \
        begin_after_previous_kernel();                                                                                     \
        attend_many<CUT>(q, q_stride, tiles[blockIdx.x], tables, sight, heads, scale, keys, values, y, y_stride);          \
    }

ATTEND_MANY(attend_many_64, Attend64, 3)
ATTEND_MANY(attend_many_128, Attend128, 2)
ATTEND_MANY(attend_many_256, Attend256, 1)
