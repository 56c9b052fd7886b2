// The elastic low-rank product of many rows, with tensor cores: y = W[:o,:i] x + b[:o] + B[:o,:r] s, s = scale A[:r,:i] x,
// each row with its own o, i, r and super-adapter. x, s, W, A and B are bf16, sums and y f32. For few rows: few_rows.cu.
//
// Every sum runs over K upwards in steps of 16, W's part first and the adapter's after it, in one accumulator. What a step
// has from beyond a row's sizes, or for another row's super-adapter, is an exact zero. So a row's result is the same bit for
// bit whatever rows stand beside it and whichever tile height is taken. W, A and B must be finite in all they hold.
#include "mma.cuh"

using bf16 = __nv_bfloat16;

// One Linear of a product. `sizes` null: all rows take the whole of W, without an adapter.
struct Factor {
    const bf16* w;
    int w_stride;
    const float* bias;
    const SegmentRow* sizes;
    const AdapterEntry* adapters;
    const bf16* s;
    int s_stride;
};

// How a block cuts a product: ROWS of x by COLUMNS of y, of FACTORS matrices side by side; warps WARP_ROWS by WARP_COLUMNS of
// them; STAGES tiles of K numbers in shared memory, all but one of them on their way.
template <int ROWS_, int COLUMNS_, int K_, int STAGES_, int WARP_ROWS_, int WARP_COLUMNS_, int FACTORS_>
struct Shape {
    static constexpr int ROWS = ROWS_, COLUMNS = COLUMNS_, K = K_, STAGES = STAGES_, FACTORS = FACTORS_;
    static constexpr int WARP_ROWS = WARP_ROWS_, WARP_COLUMNS = WARP_COLUMNS_;
    static constexpr int OUTPUTS = COLUMNS / FACTORS;  // columns of y, or of each factor
    static constexpr int THREADS = WARP * (ROWS / WARP_ROWS) * (COLUMNS / WARP_COLUMNS);
    static constexpr int M = WARP_ROWS / 16, N = WARP_COLUMNS / 16;
    static constexpr int CHUNKS = K / 8;                  // of 16 bytes, in a tile's row
    static constexpr int ROWS_A_COPY = THREADS / CHUNKS;  // that all threads' 16 bytes fill
    static constexpr int STAGE = (ROWS + COLUMNS) * K;
    static_assert(ROWS <= THREADS, "a thread describes a row");
    static_assert(ROWS % ROWS_A_COPY == 0 && OUTPUTS % ROWS_A_COPY == 0, "copies do not straddle a tile's end");
    static_assert(WARP_COLUMNS % (16 * FACTORS) == 0, "a warp has the same columns of each factor");
};

// The rows of a block, and the super-adapters among them; in shared memory.
template <class S>
struct Rows {
    struct Pass {
        const bf16* b;
        int b_stride, adapter;
    };
    int out[S::ROWS], inp[S::ROWS];
    int rank[S::FACTORS][S::ROWS], adapter[S::FACTORS][S::ROWS];  // rank 0: no adapter takes part
    Pass passes[S::FACTORS][S::ROWS];
    int pass_count[S::FACTORS];
    int most_out, most_inp, most_rank;
};

// Reads the sizes of the rows from `first` on, one row a thread, and lists each factor's super-adapters once.
template <class S>
__device__ __forceinline__ void describe(Rows<S>& table, const Factor (&factors)[S::FACTORS], int first, int rows, int out,
                                         int inp) {
    const int at = threadIdx.x, row = first + at;
    if (at == 0) table.most_out = table.most_inp = table.most_rank = 0;
    if (at < S::FACTORS) table.pass_count[at] = 0;
    __syncthreads();
    SegmentRow most = {0, 0, 0, 0};
    if (at < S::ROWS) {
#pragma unroll
        for (int f = 0; f < S::FACTORS; f++) {
            SegmentRow size = {0, 0, 0, 0};
            if (row < rows) size = factors[f].sizes ? factors[f].sizes[row] : SegmentRow{out, inp, 0, 0};
            if (size.rank > 0 && !factors[f].adapters[size.adapter].b) size.rank = 0;
            if (f == 0) table.out[at] = most.out = size.out, table.inp[at] = most.inp = size.inp;
            table.rank[f][at] = size.rank;
            table.adapter[f][at] = size.adapter;
            most.rank = max(most.rank, size.rank);
        }
    }
    most = {warp_max(most.out), warp_max(most.inp), warp_max(most.rank), 0};
    if (at % WARP == 0) {
        atomicMax(&table.most_out, most.out);
        atomicMax(&table.most_inp, most.inp);
        atomicMax(&table.most_rank, most.rank);
    }
    __syncthreads();
    if (at < S::ROWS) {
#pragma unroll
        for (int f = 0; f < S::FACTORS; f++) {
            const int adapter = table.adapter[f][at];
            bool listed = table.rank[f][at] == 0;
            // Nearest first: neighbours are mostly of one segment.
            for (int other = at - 1; other >= 0 && !listed; other--) {
                listed = table.rank[f][other] > 0 && table.adapter[f][other] == adapter;
            }
            if (listed) continue;
            // In any order: to each row all passes but its own add zeros.
            const AdapterEntry entry = factors[f].adapters[adapter];
            table.passes[f][atomicAdd(&table.pass_count[f], 1)] = {entry.b, entry.b_stride, adapter};
        }
    }
    __syncthreads();
}

// Bytes of the chunk at `k` of a row that has `end` numbers; the rest of the chunk is to be zero.
__device__ __forceinline__ int chunk_bytes(int k, int end) { return 2 * min(8, max(0, end - k)); }

// Copies stages of a block's product to shared memory: the steps over W, then those over each super-adapter's B.
template <class S>
struct Stages {
    const Factor (&factors)[S::FACTORS];
    const Rows<S>& table;
    const bf16* x;
    int x_stride, first, column;  // the block's first row and column
    int row, chunk;               // this thread's own, of the first rows that are copied
    int main_steps, pass_steps, steps;
    int inp[S::ROWS / S::ROWS_A_COPY];

    __device__ __forceinline__ Stages(const Factor (&factors)[S::FACTORS], const Rows<S>& table, const bf16* x, int x_stride,
                                      int first, int column)
        : factors(factors), table(table), x(x), x_stride(x_stride), first(first), column(column) {
        row = threadIdx.x / S::CHUNKS;
        chunk = threadIdx.x % S::CHUNKS;
        main_steps = (table.most_inp + S::K - 1) / S::K;
        pass_steps = (table.most_rank + S::K - 1) / S::K;
        steps = main_steps;
#pragma unroll
        for (int f = 0; f < S::FACTORS; f++) steps += table.pass_count[f] * pass_steps;
        // No row has these columns: only zeros are to be written.
        if (column >= table.most_out) steps = 0;
#pragma unroll
        for (int i = 0; i < S::ROWS / S::ROWS_A_COPY; i++) inp[i] = table.inp[row + i * S::ROWS_A_COPY];
    }

    // The factor's part of a stage: rows `column..` of a matrix, zeros where it has none or its row ends. `present` false:
    // the other factor's turn.
    __device__ __forceinline__ void copy_columns(bf16* to, int f, const bf16* matrix, int stride, int k, bool present) const {
#pragma unroll
        for (int i = 0; i < S::OUTPUTS / S::ROWS_A_COPY; i++) {
            const int at = row + i * S::ROWS_A_COPY;
            const bool inside = present && column + at < table.most_out && k < stride;
            const bf16* from = inside ? matrix + static_cast<size_t>(column + at) * stride + k : matrix;
            cp_async_16(to + swizzled<S::K>(f * S::OUTPUTS + at, chunk), from, inside ? 16 : 0);
        }
    }

    __device__ __forceinline__ void copy_main(bf16* to, int step) const {
        const int k = step * S::K + 8 * chunk;
#pragma unroll
        for (int i = 0; i < S::ROWS / S::ROWS_A_COPY; i++) {
            const int at = row + i * S::ROWS_A_COPY, bytes = chunk_bytes(k, inp[i]);
            const bf16* from = bytes > 0 ? x + static_cast<size_t>(first + at) * x_stride + k : x;
            cp_async_16(to + swizzled<S::K>(at, chunk), from, bytes);
        }
#pragma unroll
        for (int f = 0; f < S::FACTORS; f++) {
            copy_columns(to + S::ROWS * S::K, f, factors[f].w, factors[f].w_stride, k, true);
        }
    }

    // A step over the rank of one super-adapter: s, of its own rows only, and B.
    __device__ __forceinline__ void copy_pass(bf16* to, int step) const {
        int pass = step / pass_steps, mine = 0;
        const int k = step % pass_steps * S::K + 8 * chunk;
        if (S::FACTORS == 2 && pass >= table.pass_count[0]) {
            pass -= table.pass_count[0];
            mine = 1;
        }
        const typename Rows<S>::Pass& now = table.passes[mine][pass];
        const Factor& factor = factors[0];
        const bf16* s = S::FACTORS == 2 && mine ? factors[S::FACTORS - 1].s : factor.s;
        const int stride = S::FACTORS == 2 && mine ? factors[S::FACTORS - 1].s_stride : factor.s_stride;
#pragma unroll
        for (int i = 0; i < S::ROWS / S::ROWS_A_COPY; i++) {
            const int at = row + i * S::ROWS_A_COPY;
            const int bytes = table.adapter[mine][at] == now.adapter ? chunk_bytes(k, table.rank[mine][at]) : 0;
            const bf16* from = bytes > 0 ? s + static_cast<size_t>(first + at) * stride + k : s;
            cp_async_16(to + swizzled<S::K>(at, chunk), from, bytes);
        }
#pragma unroll
        for (int f = 0; f < S::FACTORS; f++) copy_columns(to + S::ROWS * S::K, f, now.b, now.b_stride, k, f == mine);
    }

    // A group of copies each time, an empty one after the last step: waits count groups.
    __device__ __forceinline__ void copy(bf16* tiles, int step) const {
        if (step < steps) {
            bf16* to = tiles + step % S::STAGES * S::STAGE;
            if (step < main_steps) {
                copy_main(to, step);
            } else {
                copy_pass(to, step - main_steps);
            }
        }
        cp_async_commit();
    }
};

// The sums of a block: of each warp 16 M rows from `row` and 8 columns for each n, all factors' first 8 N / FACTORS ... last.
template <class S>
__device__ __forceinline__ void product(const Stages<S>& stages, float (&sums)[S::M][2 * S::N][4]) {
    DYN_SHARED(bf16, tiles);
    constexpr int ROW_WARPS = S::ROWS / S::WARP_ROWS;
    const int warp = threadIdx.x / WARP;
    const int row = warp % ROW_WARPS * S::WARP_ROWS, column = warp / ROW_WARPS * (S::WARP_COLUMNS / S::FACTORS);
    for (int step = 0; step < S::STAGES - 1; step++) stages.copy(tiles, step);
    for (int step = 0; step < stages.steps; step++) {
        // After the barrier all threads' copies of this step are there, and nobody reads the stage before it any more.
        cp_async_wait<S::STAGES - 2>();
        __syncthreads();
        stages.copy(tiles, step + S::STAGES - 1);
        const bf16* x = tiles + step % S::STAGES * S::STAGE;
        multiply_tiles<S::K, S::M, S::N, S::N / S::FACTORS>(x, row, x + S::ROWS * S::K, column, S::OUTPUTS, sums);
    }
}

// Calls write(row in block, column of y, m, n, half) for each pair of columns that this lane has sums of, for each of the
// first factor's n: sums[m][n][2 * half] and the one after it.
template <class S, class Write>
__device__ __forceinline__ void for_outputs(int first_column, Write write) {
    constexpr int ROW_WARPS = S::ROWS / S::WARP_ROWS;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int row = warp % ROW_WARPS * S::WARP_ROWS + lane / 4;
    const int column = first_column + warp / ROW_WARPS * (S::WARP_COLUMNS / S::FACTORS) + lane % 4 * 2;
#pragma unroll
    for (int m = 0; m < S::M; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
#pragma unroll
            for (int n = 0; n < 2 * S::N / S::FACTORS; n++) write(row + 16 * m + 8 * half, column + 8 * n, m, n, half);
        }
    }
}

template <class S>
__device__ __forceinline__ void expand_many(const bf16* x, int x_stride, const Factor& factor, int out, int inp, int rows,
                                            float* y, int y_stride, bool onto) {
    __shared__ Rows<S> table;
    const Factor factors[1] = {factor};
    const int first = blockIdx.x * S::ROWS, first_column = blockIdx.y * S::OUTPUTS;
    describe<S>(table, factors, first, rows, out, inp);
    float sums[S::M][2 * S::N][4] = {};
    product<S>(Stages<S>(factors, table, x, x_stride, first, first_column), sums);
    // Two numbers in one store where every row allows it.
    const bool pairs = y_stride % 2 == 0 && reinterpret_cast<size_t>(y) % 8 == 0;
    for_outputs<S>(first_column, [&](int row, int column, int m, int n, int half) {
        if (first + row >= rows || column >= out) return;
        float* to = y + static_cast<size_t>(first + row) * y_stride + column;
        const int active = table.out[row];
        float value[2];
        for (int i = 0; i < 2; i++) {
            const bool inside = column + i < active;
            value[i] = inside ? sums[m][n][2 * half + i] + (factor.bias ? factor.bias[column + i] : 0.0f) : 0.0f;
        }
        if (pairs && column + 1 < out) {
            float2* both = reinterpret_cast<float2*>(to);
            const float2 before = onto ? *both : float2{0.0f, 0.0f};
            *both = {before.x + value[0], before.y + value[1]};
        } else {
            for (int i = 0; i < 2; i++) {
                if (column + i < out) to[i] = onto ? to[i] + value[i] : value[i];
            }
        }
    });
}

template <class S>
__device__ __forceinline__ void gate_up_many(const bf16* x, int x_stride, const Factor (&factors)[2], int out, int inp,
                                             int rows, bf16* h, int h_stride) {
    __shared__ Rows<S> table;
    const int first = blockIdx.x * S::ROWS, first_column = blockIdx.y * S::OUTPUTS;
    describe<S>(table, factors, first, rows, out, inp);
    float sums[S::M][2 * S::N][4] = {};
    product<S>(Stages<S>(factors, table, x, x_stride, first, first_column), sums);
    for_outputs<S>(first_column, [&](int row, int column, int m, int n, int half) {
        if (first + row >= rows || column >= out) return;
        float value[2];
        for (int i = 0; i < 2; i++) {
            const bool inside = column + i < table.out[row];
            float gate = sums[m][n][2 * half + i], up = sums[m][n + S::N][2 * half + i];
            if (inside && factors[0].bias) gate += factors[0].bias[column + i];
            if (inside && factors[1].bias) up += factors[1].bias[column + i];
            value[i] = inside ? gate / (1.0f + __expf(-gate)) * up : 0.0f;
        }
        // Where `out` is odd the second is written between the row's end and its stride.
        *reinterpret_cast<__nv_bfloat162*>(h + static_cast<size_t>(first + row) * h_stride + column) =
            __floats2bfloat162_rn(value[0], value[1]);
    });
}

// s = scale A x for a tile of rows of one super-adapter. There are few outputs and many inputs, so the warps of a block share K
// out: each takes every eighth tile of 32 numbers through a ring of stages of its own, and at the end their sums are added up
// in the order of warps. Which warp has which numbers depends on nothing else.
template <int ROWS_, int COLUMNS_>
struct ShrinkShape {
    static constexpr int ROWS = ROWS_, COLUMNS = COLUMNS_, K = 32, STAGES = 4, WARPS_A_BLOCK = 8;
    static constexpr int CHUNKS = K / 8, ROWS_A_COPY = WARP / CHUNKS;
    static constexpr int STAGE = (ROWS + COLUMNS) * K;
    static_assert(ROWS <= WARP, "a lane describes a row");
};

// A warp's stage: numbers `k..k + K` of the tile's rows and of A's. inp: of this lane's rows.
template <class S>
__device__ __forceinline__ void copy_shrink(bf16* to, const bf16* x, int x_stride, const int (&inp)[S::ROWS / S::ROWS_A_COPY],
                                            const AdapterEntry& adapter, int column, int rank, int k) {
    const int row = threadIdx.x % WARP / S::CHUNKS, chunk = threadIdx.x % S::CHUNKS;
    k += 8 * chunk;
#pragma unroll
    for (int i = 0; i < S::ROWS / S::ROWS_A_COPY; i++) {
        const int at = row + i * S::ROWS_A_COPY, bytes = chunk_bytes(k, inp[i]);
        cp_async_16(to + swizzled<S::K>(at, chunk), bytes > 0 ? x + static_cast<size_t>(at) * x_stride + k : x, bytes);
    }
#pragma unroll
    for (int i = 0; i < S::COLUMNS / S::ROWS_A_COPY; i++) {
        const int at = row + i * S::ROWS_A_COPY;
        const bool inside = column + at < rank && k < adapter.a_stride;
        const bf16* from = inside ? adapter.a + static_cast<size_t>(column + at) * adapter.a_stride + k : adapter.a;
        cp_async_16(to + S::ROWS * S::K + swizzled<S::K>(at, chunk), from, inside ? 16 : 0);
    }
}

// A warp's sums to shared memory, row-major.
template <class S>
__device__ __forceinline__ void keep_sums(const float (&sums)[S::ROWS / 16][S::COLUMNS / 8][4], float* to) {
    const int lane = threadIdx.x % WARP;
    for (int m = 0; m < S::ROWS / 16; m++) {
        for (int n = 0; n < S::COLUMNS / 8; n++) {
            for (int half = 0; half < 2; half++) {
                float* at = to + (16 * m + 8 * half + lane / 4) * S::COLUMNS + 8 * n + lane % 4 * 2;
                *reinterpret_cast<float2*>(at) = {sums[m][n][2 * half], sums[m][n][2 * half + 1]};
            }
        }
    }
}

template <class S>
__device__ __forceinline__ void shrink_many(const bf16* x, int x_stride, int2 tile, const SegmentRow* sizes,
                                            const AdapterEntry* adapters, bf16* s, int s_stride) {
    DYN_SHARED(bf16, tiles);
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, column = blockIdx.x * S::COLUMNS;
    x += static_cast<size_t>(tile.x) * x_stride;
    sizes += tile.x;
    const AdapterEntry adapter = adapters[sizes[0].adapter];
    const SegmentRow mine = lane < tile.y ? sizes[lane] : SegmentRow{0, 0, 0, 0};
    const int rank = adapter.a ? warp_max(mine.rank) : 0;
    int inp[S::ROWS / S::ROWS_A_COPY];
#pragma unroll
    for (int i = 0; i < S::ROWS / S::ROWS_A_COPY; i++) {
        inp[i] = __shfl_sync(ALL_LANES, mine.inp, lane / S::CHUNKS + i * S::ROWS_A_COPY);
    }
    // This warp's tiles of K numbers: warp, warp + 8, ... None where no row has these columns.
    const int all = column < rank ? (warp_max(mine.inp) + S::K - 1) / S::K : 0;
    const int steps = max(0, (all - warp + S::WARPS_A_BLOCK - 1) / S::WARPS_A_BLOCK);
    bf16* ring = tiles + warp * S::STAGES * S::STAGE;
    const auto copy = [&](int step) {
        if (step < steps) {
            const int k = (warp + step * S::WARPS_A_BLOCK) * S::K;
            copy_shrink<S>(ring + step % S::STAGES * S::STAGE, x, x_stride, inp, adapter, column, rank, k);
        }
        cp_async_commit();
    };
    float sums[S::ROWS / 16][S::COLUMNS / 8][4] = {};
    for (int step = 0; step < S::STAGES - 1; step++) copy(step);
    for (int step = 0; step < steps; step++) {
        cp_async_wait<S::STAGES - 2>();
        __syncwarp();
        copy(step + S::STAGES - 1);
        const bf16* now = ring + step % S::STAGES * S::STAGE;
        multiply_tiles<S::K, S::ROWS / 16, S::COLUMNS / 16>(now, 0, now + S::ROWS * S::K, 0, 0, sums);
    }
    // The sums take the place of the rings, which all warps must have left.
    float* partial = reinterpret_cast<float*>(tiles);
    __syncthreads();
    keep_sums<S>(sums, partial + warp * S::ROWS * S::COLUMNS);
    __syncthreads();
    for (int at = threadIdx.x; at < S::ROWS * S::COLUMNS; at += WARP * S::WARPS_A_BLOCK) {
        const int row = at / S::COLUMNS, c = column + at % S::COLUMNS;
        if (row >= tile.y || c >= s_stride) continue;
        float sum = 0.0f;
        for (int w = 0; w < S::WARPS_A_BLOCK; w++) sum += partial[w * S::ROWS * S::COLUMNS + at];
        const bool inside = adapter.a && c < sizes[row].rank;
        s[static_cast<size_t>(tile.x + row) * s_stride + c] = __float2bfloat16(inside ? adapter.scale * sum : 0.0f);
    }
}

using Shrink16 = ShrinkShape<16, 16>;
using Shrink32 = ShrinkShape<32, 32>;
using Expand128 = Shape<128, 128, 32, 4, 64, 64, 1>;
using Expand64 = Shape<64, 64, 64, 4, 32, 32, 1>;
using Expand32 = Shape<32, 64, 64, 4, 16, 32, 1>;
using GateUp128 = Shape<128, 128, 32, 4, 64, 64, 2>;
using GateUp64 = Shape<64, 64, 64, 4, 32, 32, 2>;

// `tiles`: a first row and a count, at most the tile's height, of rows that share a super-adapter; a tile each blockIdx.y.
#define SHRINK_MANY(HEIGHT)                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256)                                                                        \
        shrink_many_##HEIGHT(const bf16* x, int x_stride, const int2* tiles, const SegmentRow* sizes,                        \
                             const AdapterEntry* adapters, bf16* s, int s_stride) {                                          \
        shrink_many<Shrink##HEIGHT>(x, x_stride, tiles[blockIdx.y], sizes, adapters, s, s_stride);                           \
    }

// `onto`: adds to `y` instead of writing it.
#define EXPAND_MANY(HEIGHT)                                                                                                  \
    extern "C" __global__ void __launch_bounds__(128, 2)                                                                     \
        expand_many_##HEIGHT(const bf16* x, int x_stride, const bf16* w, int w_stride, const float* bias, int out, int inp,  \
                             int rows, const SegmentRow* sizes, const AdapterEntry* adapters, const bf16* s, int s_stride,   \
                             float* y, int y_stride, int onto) {                                                             \
        expand_many<Expand##HEIGHT>(x, x_stride, {w, w_stride, bias, sizes, adapters, s, s_stride}, out, inp, rows, y,       \
                                    y_stride, onto != 0);                                                                    \
    }

// h = silu(gate) * up in bf16. A row's o and i must be the same in both; ranks and super-adapters need not be.
#define GATE_UP_MANY(HEIGHT)                                                                                                 \
    extern "C" __global__ void __launch_bounds__(128, 2) gate_up_many_##HEIGHT(                                              \
        const bf16* x, int x_stride, int out, int inp, int rows, const bf16* gate, int gate_stride, const float* gate_bias,  \
        const SegmentRow* gate_sizes, const AdapterEntry* gate_adapters, const bf16* gate_s, int gate_s_stride,              \
        const bf16* up, int up_stride, const float* up_bias, const SegmentRow* up_sizes, const AdapterEntry* up_adapters,    \
        const bf16* up_s, int up_s_stride, bf16* h, int h_stride) {                                                          \
        const Factor factors[2] = {{gate, gate_stride, gate_bias, gate_sizes, gate_adapters, gate_s, gate_s_stride},         \
                                   {up, up_stride, up_bias, up_sizes, up_adapters, up_s, up_s_stride}};                      \
        gate_up_many<GateUp##HEIGHT>(x, x_stride, factors, out, inp, rows, h, h_stride);                                     \
    }

SHRINK_MANY(16)
SHRINK_MANY(32)
EXPAND_MANY(128)
EXPAND_MANY(64)
EXPAND_MANY(32)
GATE_UP_MANY(128)
GATE_UP_MANY(64)
