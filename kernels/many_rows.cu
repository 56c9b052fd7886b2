// The elastic low-rank product of many rows, with tensor cores: y = W[:o,:i] x + b[:o] + B[:o,:r] s, s = scale A[:r,:i] x,
// each row with its own o, i, r and super-adapter. x, s, W, A and B are bf16, sums and y f32. For few rows: few_rows.cu.
//
// Every sum runs over K upwards in steps of 16, W's part first and the adapter's after it, in one accumulator. What a step
// has from beyond a row's sizes, or for another row's super-adapter, is an exact zero. So a row's result is the same bit for
// bit whatever rows stand beside it and whichever tile height is taken. W, A and B must be finite in all they hold.
#include "many_rows.cuh"

// How a block cuts a product: ROWS of x by COLUMNS of W's rows, of FACTORS matrices side by side; a warp has WARP_ROWS by
// WARP_COLUMNS of them; STAGES tiles of K numbers in shared memory, all but one of them on their way.
template <int ROWS_, int COLUMNS_, int K_, int STAGES_, int WARP_ROWS_, int WARP_COLUMNS_, int FACTORS_>
struct Shape {
    static constexpr int ROWS = ROWS_, COLUMNS = COLUMNS_, K = K_, STAGES = STAGES_, FACTORS = FACTORS_;
    static constexpr int WARP_ROWS = WARP_ROWS_, WARP_COLUMNS = WARP_COLUMNS_;
    static constexpr int OUTPUTS = COLUMNS / FACTORS;  // columns of y, or of each factor
    static constexpr int THREADS = WARP * (ROWS / WARP_ROWS) * (COLUMNS / WARP_COLUMNS);
    static constexpr int M = WARP_ROWS / 16, N = WARP_COLUMNS / 16;
    static constexpr int CHUNKS = K / 8;                  // of 16 bytes, in a tile's row
    static constexpr int ROWS_A_COPY = THREADS / CHUNKS;  // that all threads' 16 bytes fill
    static constexpr int STAGE = (ROWS + COLUMNS) * K, BYTES = STAGES * STAGE * static_cast<int>(sizeof(bf16));
    static constexpr int BLOCKS = 256 / THREADS;  // that registers must leave room for on a multiprocessor
    static_assert(ROWS_A_COPY % 8 == 0, "a thread's chunks are permuted alike");
    static_assert(ROWS <= THREADS, "a thread describes a row");
    static_assert(ROWS % ROWS_A_COPY == 0 && OUTPUTS % ROWS_A_COPY == 0, "copies do not straddle a tile's end");
    static_assert(WARP_COLUMNS % (16 * FACTORS) == 0, "a warp has the same columns of each factor");
};

// The sums of a block; each warp has WARP_ROWS rows and as many columns of each factor as of the other.
template <class S>
__device__ __forceinline__ void product(Stages<S>&& stages, float (&sums)[S::M][2 * S::N][4]) {
    DYN_SHARED(uint4, memory);  // so aligned, as copies and matrices need it
    bf16* tiles = reinterpret_cast<bf16*>(memory);
    constexpr int ROW_WARPS = S::ROWS / S::WARP_ROWS;
    const int warp = threadIdx.x / WARP;
    const int row = warp % ROW_WARPS * S::WARP_ROWS, column = warp / ROW_WARPS * (S::WARP_COLUMNS / S::FACTORS);
    for (int stage = 0; stage < S::STAGES - 1; stage++) stages.copy_next(tiles);
    for (int step = 0; step < stages.steps; step++) {
        // After the barrier all threads' copies of this step are there, and nobody reads the stage before it any more.
        cp_async_wait<S::STAGES - 2>();
        __syncthreads();
        const bf16* x = tiles + step % S::STAGES * S::STAGE;
        multiply_tiles<S::K, S::M, S::N, S::N / S::FACTORS>(x, row, x + S::ROWS * S::K, column, S::OUTPUTS, sums,
                                                            [&] { stages.copy_next(tiles); });
    }
}

// Where this lane's sums stand: row in the block, column of y. sums[m][n] has columns 8 n and 8 n + 1 from there, in [0] and
// [1] those of row 16 m, in [2] and [3] those of row 16 m + 8.
template <class S>
__device__ __forceinline__ int2 own_place(int first_column) {
    constexpr int ROW_WARPS = S::ROWS / S::WARP_ROWS;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    return {warp % ROW_WARPS * S::WARP_ROWS + lane / 4,
            first_column + warp / ROW_WARPS * (S::WARP_COLUMNS / S::FACTORS) + lane % 4 * 2};
}

// Writes or adds a block's sums. `pairs`: the rows of y allow two numbers in one store. All that a row adds to is loaded
// before its stores, or each load would wait for the store before it.
template <class S>
__device__ __forceinline__ void write_sums(const float (&sums)[S::M][2 * S::N][4], const Rows<S>& table, const float* bias,
                                           int first, int rows, int first_column, int out, float* y, int y_stride,
                                           bool pairs, bool onto) {
    const int2 place = own_place<S>(first_column);
    const int column = place.y, left = out - column;  // columns from this lane's first one on
    float2 biases[2 * S::N];
#pragma unroll
    for (int n = 0; n < 2 * S::N; n++) biases[n] = bias_of(bias, column + 8 * n, out);
#pragma unroll
    for (int i = 0; i < 2 * S::M; i++) {
        const int row = place.x + 8 * i;
        if (first + row >= rows) continue;
        const int active = table.out[row] - column;
        float* to = y + static_cast<size_t>(first + row) * y_stride + column;
        float2 before[2 * S::N] = {};
        if (unknown(onto)) {
#pragma unroll
            for (int n = 0; n < 2 * S::N; n++) {
                before[n] = {8 * n < left ? to[8 * n] : 0.0f, 8 * n + 1 < left ? to[8 * n + 1] : 0.0f};
            }
        }
        const bool both = unknown(pairs);
#pragma unroll
        for (int n = 0; n < 2 * S::N; n++) {
            const float* sum = &sums[i / 2][n][i % 2 * 2];
            const float one = before[n].x + (8 * n < active ? sum[0] + biases[n].x : 0.0f);
            const float two = before[n].y + (8 * n + 1 < active ? sum[1] + biases[n].y : 0.0f);
            if (both && 8 * n + 1 < left) *reinterpret_cast<float2*>(to + 8 * n) = {one, two};
            if (!both && 8 * n < left) to[8 * n] = one;
            if (!both && 8 * n + 1 < left) to[8 * n + 1] = two;
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
    const bool pairs = out % 2 == 0 && y_stride % 2 == 0 && reinterpret_cast<size_t>(y) % 8 == 0;
    write_sums<S>(sums, table, factor.bias, first, rows, first_column, out, y, y_stride, pairs, onto);
}

template <class S>
__device__ __forceinline__ void gate_up_many(const bf16* x, int x_stride, const Factor (&factors)[2], int out, int inp,
                                             int rows, bf16* h, int h_stride) {
    __shared__ Rows<S> table;
    const int first = blockIdx.x * S::ROWS, first_column = blockIdx.y * S::OUTPUTS;
    describe<S>(table, factors, first, rows, out, inp);
    float sums[S::M][2 * S::N][4] = {};
    product<S>(Stages<S>(factors, table, x, x_stride, first, first_column), sums);
    const int2 place = own_place<S>(first_column);
    const int column = place.y;
    float2 gate_biases[S::N], up_biases[S::N];
#pragma unroll
    for (int n = 0; n < S::N; n++) {
        gate_biases[n] = bias_of(factors[0].bias, column + 8 * n, out);
        up_biases[n] = bias_of(factors[1].bias, column + 8 * n, out);
    }
#pragma unroll
    for (int i = 0; i < 2 * S::M; i++) {
        const int row = place.x + 8 * i;
        if (first + row >= rows) continue;
        const int active = table.out[row] - column;
        bf16* to = h + static_cast<size_t>(first + row) * h_stride + column;
#pragma unroll
        for (int n = 0; n < S::N; n++) {
            const float *gate = &sums[i / 2][n][i % 2 * 2], *up = &sums[i / 2][n + S::N][i % 2 * 2];
            const float one = silu_times(gate[0] + gate_biases[n].x, up[0] + up_biases[n].x);
            const float two = silu_times(gate[1] + gate_biases[n].y, up[1] + up_biases[n].y);
            if (8 * n >= out - column) continue;
            // Where `out` is odd the second is written between the row's end and its stride.
            *reinterpret_cast<__nv_bfloat162*>(to + 8 * n) =
                __floats2bfloat162_rn(8 * n < active ? one : 0.0f, 8 * n + 1 < active ? two : 0.0f);
        }
    }
}

// Tiles, and what a launch needs: THREADS, a grid of (rows / ROWS, out / OUTPUTS) rounded up, BYTES of dynamic shared
// memory. That is more than a launch may have unasked: cuFuncSetAttribute with MAX_DYNAMIC_SHARED_SIZE_BYTES goes before it.
//
// Warps of 64 by 64 need 8 loads (ldmatrix) for 32 products (mma), 3/4 of what shared memory gives while an A100's tensor
// cores take them; those of 64 by 32 would need all of it. They take 128 registers for sums, so eight warps fit a
// multiprocessor: two blocks of 128 by 128, or one of 128 by 256, which reads a quarter less from the second-level cache and
// needs twice the outputs to give every multiprocessor a tile. The smaller tiles are for batches that are bound by reading
// W: more blocks, more bytes on their way for each product, by rows of 128 bytes.
using Expand32 = Shape<32, 64, 64, 4, 16, 32, 1>;
using Expand64 = Shape<64, 64, 64, 4, 32, 32, 1>;
using Expand128 = Shape<128, 128, 32, 4, 64, 64, 1>;
using ExpandWide = Shape<128, 256, 32, 4, 64, 64, 1>;
using GateUp64 = Shape<64, 64, 64, 4, 32, 32, 2>;
using GateUp128 = Shape<128, 128, 32, 4, 64, 64, 2>;
using GateUpWide = Shape<128, 256, 32, 4, 64, 64, 2>;
static_assert(Expand32::THREADS == 128 && Expand32::OUTPUTS == 64 && Expand32::BYTES == 49152, "as it is launched");
static_assert(Expand64::THREADS == 128 && Expand64::OUTPUTS == 64 && Expand64::BYTES == 65536, "as it is launched");
static_assert(Expand128::THREADS == 128 && Expand128::OUTPUTS == 128 && Expand128::BYTES == 65536, "as it is launched");
static_assert(ExpandWide::THREADS == 256 && ExpandWide::OUTPUTS == 256 && ExpandWide::BYTES == 98304, "as it is launched");
static_assert(GateUp64::THREADS == 128 && GateUp64::OUTPUTS == 32 && GateUp64::BYTES == 65536, "as it is launched");
static_assert(GateUp128::THREADS == 128 && GateUp128::OUTPUTS == 64 && GateUp128::BYTES == 65536, "as it is launched");
static_assert(GateUpWide::THREADS == 256 && GateUpWide::OUTPUTS == 128 && GateUpWide::BYTES == 98304, "as it is launched");

// `onto`: adds to `y` instead of writing it.
#define EXPAND_MANY(NAME, SHAPE)                                                                                            \
    extern "C" __global__ void __launch_bounds__(SHAPE::THREADS, SHAPE::BLOCKS)                                             \
        NAME(const bf16* x, int x_stride, const Factor factor, int out, int inp, int rows, float* y, int y_stride,          \
             int onto) {                                                                                                    \
        begin_after_previous_kernel();                                                                                      \
        expand_many<SHAPE>(x, x_stride, factor, out, inp, rows, y, y_stride, onto != 0);                                    \
    }

// h = silu(gate) * up in bf16. A row's o and i must be the same in both; ranks and super-adapters need not be.
#define GATE_UP_MANY(NAME, SHAPE)                                                                                           \
    extern "C" __global__ void __launch_bounds__(SHAPE::THREADS, SHAPE::BLOCKS)                                             \
        NAME(const bf16* x, int x_stride, const Factor gate, const Factor up, int out, int inp, int rows, bf16* h,          \
             int h_stride) {                                                                                                \
        begin_after_previous_kernel();                                                                                      \
        const Factor factors[2] = {gate, up};                                                                               \
        gate_up_many<SHAPE>(x, x_stride, factors, out, inp, rows, h, h_stride);                                             \
    }

EXPAND_MANY(expand_many_32, Expand32)
EXPAND_MANY(expand_many_64, Expand64)
EXPAND_MANY(expand_many_128, Expand128)
EXPAND_MANY(expand_many_wide, ExpandWide)
GATE_UP_MANY(gate_up_many_64, GateUp64)
GATE_UP_MANY(gate_up_many_128, GateUp128)
GATE_UP_MANY(gate_up_many_wide, GateUpWide)
