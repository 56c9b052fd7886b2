// The products of many_rows.cu with Hopper's wgmma, which multiplies twice as fast as mma: the same elastic low-rank product of
// many rows, y = W[:o,:i] x + b[:o] + B[:o,:r] s, for up to three Linears of one x, and silu(gate) * up of two.
//
// Sums run as they do there: over K upwards in steps of 16, W's part first and the adapter's after it, in one accumulator, so
// that a row's result is the same bit for bit whatever rows stand beside it and whichever tile is taken.
#include "many_rows.cuh"
#include "wgmma.cuh"

// How a block cuts a product: ROWS of x, 64 for each warpgroup that multiplies, by COLUMNS of W's rows, of FACTORS matrices side
// by side; STAGES tiles of 64 numbers of K in shared memory. COPIERS 0: all threads copy too; else so many threads, ahead of
// the others, do nothing but copy.
template <int ROWS_, int COLUMNS_, int STAGES_, int COPIERS_, int FACTORS_>
struct GroupShape {
    static constexpr int ROWS = ROWS_, COLUMNS = COLUMNS_, K = 64, STAGES = STAGES_, FACTORS = FACTORS_, COPIERS = COPIERS_;
    static constexpr int GROUP = 4 * WARP;
    static constexpr int OUTPUTS = COLUMNS / FACTORS;  // columns of y, or of each factor
    static constexpr int THREADS = ROWS / 64 * GROUP + COPIERS;
    static constexpr int SUMS = COLUMNS / 2;  // of a thread
    static constexpr int CHUNKS = K / 8;      // of 16 bytes, in a tile's row
    static constexpr int ROWS_A_COPY = (COPIERS ? COPIERS : THREADS) / CHUNKS;  // that all copiers' 16 bytes fill
    static constexpr int STAGE = (ROWS + COLUMNS) * K;
    static constexpr int ALIGNMENT = 1024;  // of a tile, for its swizzle
    static constexpr int BYTES = STAGES * STAGE * static_cast<int>(sizeof(bf16)) + ALIGNMENT;
    // That are to run on a multiprocessor at once, as shared memory, with a block's tables, and registers allow.
    static constexpr int BLOCKS = 2 * (BYTES + 8192) <= 227 * 1024 && 2 * THREADS * (SUMS + 64) <= 65536 ? 2 : 1;
    static_assert(ROWS_A_COPY % 8 == 0, "a thread's chunks are permuted alike");
    static_assert(ROWS <= THREADS, "a thread describes a row");
    static_assert(ROWS % ROWS_A_COPY == 0 && OUTPUTS % ROWS_A_COPY == 0, "copies do not straddle a tile's end");
    static_assert(ROWS % 64 == 0 && OUTPUTS % 8 == 0, "as wgmma has its tiles");
};

// One Linear of a launch, and where its results go; `products` in src/backend/cuda/many.rs.
struct Product {
    Factor factor;
    float* y;
    int out, inp, y_stride;
};
constexpr int MOST_PRODUCTS = 3;
struct Products {
    Product of[MOST_PRODUCTS];
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(LONAS_EMULATED)

// Which tile is a block's: bands of 16 tiles of rows, in each of which columns are taken one after another. Blocks that run
// together have few rows and few columns, and read them from the second-level cache.
__device__ __forceinline__ int2 tile_of_block(int row_tiles, int column_tiles) {
    constexpr int BAND = 16;
    const int band = blockIdx.x / (BAND * column_tiles), at = blockIdx.x % (BAND * column_tiles);
    const int height = min(BAND, row_tiles - band * BAND);
    return {band * BAND + at % height, at / height};
}

template <class S>
__device__ __forceinline__ bf16* aligned_tiles() {
    DYN_SHARED(uint4, memory);
    const size_t address = reinterpret_cast<size_t>(memory);
    return reinterpret_cast<bf16*>((address + S::ALIGNMENT - 1) / S::ALIGNMENT * S::ALIGNMENT);
}

// Begins a step's product: a warpgroup's 64 rows by all columns.
template <class S>
__device__ __forceinline__ void begin_step(const bf16* stage, int group, float (&sums)[S::SUMS]) {
    const unsigned long long x = tile_descriptor(stage + group * 64 * S::K), w = tile_descriptor(stage + S::ROWS * S::K);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < S::K / 16; i++) wgmma_m64k16<S::COLUMNS>(sums, x + 2 * i, w + 2 * i);
    wgmma_commit();
}

// All threads copy and multiply. While a step is multiplied the one before it may not be done yet, so copies go to the stage
// of the step before that.
template <class S>
__device__ __forceinline__ void product_together(Stages<S>& stages, bf16* tiles, float (&sums)[S::SUMS]) {
    const int group = threadIdx.x / S::GROUP;
    for (int stage = 0; stage < S::STAGES - 2; stage++) stages.copy_next(tiles);
    for (int step = 0, stage = 0; step < stages.steps; step++) {
        cp_async_wait<S::STAGES - 3>();
        fence_shared_writes();
        // After the barrier all threads' copies of this step are there, and all groups are done with the last step but one.
        __syncthreads();
        begin_step<S>(tiles + stage * S::STAGE, group, sums);
        stages.copy_next(tiles);
        wgmma_wait<1>();
        stage = stage + 1 == S::STAGES ? 0 : stage + 1;
    }
    wgmma_wait<0>();
}

#ifndef LONAS_EMULATED

// The stages' barriers: a phase of `full` is over when a step's copies are done, one of `empty` when its products are.
template <class S>
struct Barriers {
    unsigned long long full[S::STAGES], empty[S::STAGES];
    __device__ __forceinline__ void init() {
        if (threadIdx.x < S::STAGES) {
            barrier_init(full + threadIdx.x, S::COPIERS);
            barrier_init(empty + threadIdx.x, (S::THREADS - S::COPIERS) / WARP);
        }
    }
};

template <class S>
__device__ __forceinline__ void copy_all(Stages<S>& stages, bf16* tiles, Barriers<S>& barriers) {
    for (int step = 0, stage = 0, parity = 1; step < stages.steps; step++) {
        barrier_wait(barriers.empty + stage, parity);
        stages.copy_step(tiles + stage * S::STAGE);
        barrier_arrive_copied(barriers.full + stage);
        stage = stage + 1 == S::STAGES ? 0 : stage + 1;
        if (stage == 0) parity ^= 1;
    }
    // A block's shared memory must not go to another while copies to it are on their way.
    cp_async_commit();
    cp_async_wait<0>();
}

template <class S>
__device__ __forceinline__ void multiply_all(int steps, const bf16* tiles, Barriers<S>& barriers, float (&sums)[S::SUMS]) {
    const int group = (threadIdx.x - S::COPIERS) / S::GROUP;
    for (int step = 0, stage = 0, parity = 0, before = 0; step < steps; step++) {
        barrier_wait(barriers.full + stage, parity);
        fence_shared_writes();
        begin_step<S>(tiles + stage * S::STAGE, group, sums);
        wgmma_wait<1>();
        if (step > 0 && threadIdx.x % WARP == 0) barrier_arrive(barriers.empty + before);
        before = stage;
        stage = stage + 1 == S::STAGES ? 0 : stage + 1;
        if (stage == 0) parity ^= 1;
    }
    wgmma_wait<0>();
}

template <class S>
__device__ __forceinline__ void product_apart(Stages<S>& stages, bf16* tiles, float (&sums)[S::SUMS]) {
    __shared__ Barriers<S> barriers;
    barriers.init();
    __syncthreads();
    if (threadIdx.x < S::COPIERS) {
        copy_all<S>(stages, tiles, barriers);
    } else {
        multiply_all<S>(stages.steps, tiles, barriers, sums);
    }
}

#else

// The emulator has no barriers of phases: all wait for all, before and after each step.
template <class S>
void product_apart(Stages<S>& stages, bf16* tiles, float (&sums)[S::SUMS]) {
    const bool copies = threadIdx.x < S::COPIERS;
    for (int step = 0; step < stages.steps; step++) {
        bf16* stage = tiles + step % S::STAGES * S::STAGE;
        if (copies) {
            stages.copy_step(stage);
            cp_async_commit();
            cp_async_wait<0>();
        }
        __syncthreads();
        if (!copies) {
            begin_step<S>(stage, (threadIdx.x - S::COPIERS) / S::GROUP, sums);
            wgmma_wait<0>();
        }
        __syncthreads();
    }
}

#endif

// The sums of a block, in the threads that multiply; false in those that only copy.
template <class S>
__device__ __forceinline__ bool product(const Rows<S>& table, const Factor (&factors)[S::FACTORS], const bf16* x, int x_stride,
                                        int first, int first_column, float (&sums)[S::SUMS]) {
    bf16* tiles = aligned_tiles<S>();
#pragma unroll
    for (int i = 0; i < S::SUMS; i++) sums[i] = 0.0f;
    Stages<S> stages(factors, table, x, x_stride, first, first_column);
    if constexpr (S::COPIERS == 0) {
        product_together<S>(stages, tiles, sums);
    } else {
        product_apart<S>(stages, tiles, sums);
    }
    return static_cast<int>(threadIdx.x) >= S::COPIERS;
}

// Where this thread's sums stand: row in the block, column in the tile. sums[4 n] and the next have columns 8 n and 8 n + 1 from
// there, the two after them the same of eight rows below.
template <class S>
__device__ __forceinline__ int2 own_place() {
    const int thread = threadIdx.x - S::COPIERS, lane = thread % WARP;
    return {thread / WARP * 16 + lane / 4, lane % 4 * 2};
}

// Writes or adds a block's sums. `pairs`: the rows of y allow two numbers in one store. What a row adds to is loaded eight
// columns' pairs at a time before their stores, or each load would wait for the store before it.
template <class S>
__device__ __forceinline__ void write_sums(const float (&sums)[S::SUMS], const Rows<S>& table, const Product& product,
                                           int first, int rows, int first_column, bool onto) {
    constexpr int BATCH = 8;
    static_assert(S::COLUMNS / 8 % BATCH == 0, "whole batches");
    const int2 place = own_place<S>();
    const int column = first_column + place.y, left = product.out - column;
    const bool pairs = product.out % 2 == 0 && product.y_stride % 2 == 0 && reinterpret_cast<size_t>(product.y) % 8 == 0;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = place.x + 8 * half;
        if (first + row >= rows) continue;
        const int active = table.out[row] - column;
        float* to = product.y + static_cast<size_t>(first + row) * product.y_stride + column;
#pragma unroll
        for (int batch = 0; batch < S::COLUMNS / 8; batch += BATCH) {
            float2 before[BATCH] = {};
            if (unknown(onto)) {
#pragma unroll
                for (int i = 0; i < BATCH; i++) {
                    const int n = batch + i;
                    before[i] = {8 * n < left ? to[8 * n] : 0.0f, 8 * n + 1 < left ? to[8 * n + 1] : 0.0f};
                }
            }
            const bool both = unknown(pairs);
#pragma unroll
            for (int i = 0; i < BATCH; i++) {
                const int n = batch + i;
                const float2 bias = bias_of(product.factor.bias, column + 8 * n, product.out);
                const float* sum = &sums[4 * n + 2 * half];
                const float one = before[i].x + (8 * n < active ? sum[0] + bias.x : 0.0f);
                const float two = before[i].y + (8 * n + 1 < active ? sum[1] + bias.y : 0.0f);
                if (both && 8 * n + 1 < left) *reinterpret_cast<float2*>(to + 8 * n) = {one, two};
                if (!both && 8 * n < left) to[8 * n] = one;
                if (!both && 8 * n + 1 < left) to[8 * n + 1] = two;
            }
        }
    }
}

template <class S>
__device__ __forceinline__ void expand_many(const bf16* x, int x_stride, const Products& products, int rows, bool onto) {
    __shared__ Rows<S> table;
    const int row_tiles = (rows + S::ROWS - 1) / S::ROWS;
    const int2 tile = tile_of_block(row_tiles, gridDim.x / row_tiles);
    // Linears stand side by side.
    int which = 0, column_tile = tile.y;
    for (int tiles; which < MOST_PRODUCTS - 1; which++, column_tile -= tiles) {
        tiles = (products.of[which].out + S::OUTPUTS - 1) / S::OUTPUTS;
        if (column_tile < tiles) break;
    }
    const Product own = products.of[which];
    const Factor factors[1] = {own.factor};
    const int first = tile.x * S::ROWS, first_column = column_tile * S::OUTPUTS;
    describe<S>(table, factors, first, rows, own.out, own.inp);
    float sums[S::SUMS];
    if (!product<S>(table, factors, x, x_stride, first, first_column, sums)) return;
    write_sums<S>(sums, table, own, first, rows, first_column, onto);
}

template <class S>
__device__ __forceinline__ void gate_up_many(const bf16* x, int x_stride, const Factor (&factors)[2], int out, int inp, int rows,
                                             bf16* h, int h_stride) {
    __shared__ Rows<S> table;
    const int row_tiles = (rows + S::ROWS - 1) / S::ROWS;
    const int2 tile = tile_of_block(row_tiles, gridDim.x / row_tiles);
    const int first = tile.x * S::ROWS, first_column = tile.y * S::OUTPUTS;
    describe<S>(table, factors, first, rows, out, inp);
    float sums[S::SUMS];
    if (!product<S>(table, factors, x, x_stride, first, first_column, sums)) return;
    const int2 place = own_place<S>();
    const int column = first_column + place.y;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = place.x + 8 * half;
        if (first + row >= rows) continue;
        const int active = table.out[row] - column;
        bf16* to = h + static_cast<size_t>(first + row) * h_stride + column;
#pragma unroll
        for (int n = 0; n < S::OUTPUTS / 8; n++) {
            if (8 * n >= out - column) continue;
            const float2 gate_bias = bias_of(factors[0].bias, column + 8 * n, out);
            const float2 up_bias = bias_of(factors[1].bias, column + 8 * n, out);
            const float *gate = &sums[4 * n + 2 * half], *up = &sums[4 * n + S::SUMS / 2 + 2 * half];
            const float one = silu_times(gate[0] + gate_bias.x, up[0] + up_bias.x);
            const float two = silu_times(gate[1] + gate_bias.y, up[1] + up_bias.y);
            // Where `out` is odd the second is written between the row's end and its stride.
            *reinterpret_cast<__nv_bfloat162*>(to + 8 * n) =
                __floats2bfloat162_rn(8 * n < active ? one : 0.0f, 8 * n + 1 < active ? two : 0.0f);
        }
    }
}

#define EXPAND_BODY(SHAPE) expand_many<SHAPE>(x, x_stride, products, rows, onto != 0)
#define GATE_UP_BODY(SHAPE)                                                                                                 \
    const Factor factors[2] = {gate, up};                                                                                   \
    gate_up_many<SHAPE>(x, x_stride, factors, out, inp, rows, h, h_stride)
#else
// Never started there.
#define EXPAND_BODY(SHAPE) __trap()
#define GATE_UP_BODY(SHAPE) __trap()
#endif

// Tiles; a launch needs THREADS, a block for each tile (of rows, times those of all its Linears' outputs), BYTES of dynamic
// shared memory, for which cuFuncSetAttribute with MAX_DYNAMIC_SHARED_SIZE_BYTES goes before it. The large tile reads least; the
// small one is for batches that are bound by reading W, and for weights with few outputs: more blocks, more bytes on their way.
using Expand256 = GroupShape<128, 256, 4, 128, 1>;
using Expand64 = GroupShape<64, 64, 6, 0, 1>;
using GateUp256 = GroupShape<128, 256, 4, 128, 2>;
using GateUp64 = GroupShape<64, 64, 6, 0, 2>;
static_assert(Expand256::THREADS == 384 && Expand256::OUTPUTS == 256 && Expand256::BYTES == 197632, "as it is launched");
static_assert(Expand64::THREADS == 128 && Expand64::OUTPUTS == 64 && Expand64::BYTES == 99328, "as it is launched");
static_assert(GateUp256::THREADS == 384 && GateUp256::OUTPUTS == 128 && GateUp256::BYTES == 197632, "as it is launched");
static_assert(GateUp64::THREADS == 128 && GateUp64::OUTPUTS == 32 && GateUp64::BYTES == 99328, "as it is launched");
static_assert(Expand64::BLOCKS == 2, "one waits while the other multiplies");

// `onto`: adds to `y` instead of writing it.
#define EXPAND_WGMMA(NAME, SHAPE)                                                                                           \
    extern "C" __global__ void __launch_bounds__(SHAPE::THREADS, SHAPE::BLOCKS)                                             \
        NAME(const bf16* x, int x_stride, const __grid_constant__ Products products, int rows, int onto) {                  \
        begin_after_previous_kernel();                                                                                      \
        EXPAND_BODY(SHAPE);                                                                                                 \
    }

// h = silu(gate) * up in bf16. A row's o and i must be the same in both; ranks and super-adapters need not be.
#define GATE_UP_WGMMA(NAME, SHAPE)                                                                                          \
    extern "C" __global__ void __launch_bounds__(SHAPE::THREADS, SHAPE::BLOCKS)                                             \
        NAME(const bf16* x, int x_stride, const __grid_constant__ Factor gate, const __grid_constant__ Factor up, int out,  \
             int inp, int rows, bf16* h, int h_stride) {                                                                    \
        begin_after_previous_kernel();                                                                                      \
        GATE_UP_BODY(SHAPE);                                                                                                \
    }

EXPAND_WGMMA(expand_many_wgmma_256, Expand256)
EXPAND_WGMMA(expand_many_wgmma_64, Expand64)
GATE_UP_WGMMA(gate_up_many_wgmma_256, GateUp256)
GATE_UP_WGMMA(gate_up_many_wgmma_64, GateUp64)
