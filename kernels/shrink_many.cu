// s = scale A[:r,:i] x of many rows, with tensor cores: the adapters' half of many_rows.cu's product, rounded to bf16.
//
// There are few outputs and many inputs, so the warps of a block share K out: each takes every eighth tile of 32 numbers
// through a ring of stages of its own, and at the end their sums are added up in the order of warps. Which warp has which
// numbers depends on nothing else, so that a row's result does not depend on the rows beside it, nor on the tile's height.
#include "mma.cuh"

template <int ROWS_, int COLUMNS_, int STAGES_>
struct ShrinkShape {
    static constexpr int ROWS = ROWS_, COLUMNS = COLUMNS_, K = 32, STAGES = STAGES_, WARPS_A_BLOCK = 8;
    static constexpr int CHUNKS = K / 8, ROWS_A_COPY = WARP / CHUNKS;
    static constexpr int STAGE = (ROWS + COLUMNS) * K;
    static constexpr int BYTES = WARPS_A_BLOCK * STAGES * STAGE * static_cast<int>(sizeof(bf16));
    static_assert(BYTES >= WARPS_A_BLOCK * ROWS * COLUMNS * static_cast<int>(sizeof(float)), "sums take the rings' place");
    static_assert(ROWS_A_COPY % 8 == 0, "a lane's chunks are permuted alike");
    static_assert(ROWS <= WARP, "a lane describes a row");
};

// Copies a warp's tiles to its ring, one after another: numbers of the rows of x, then of A's. A lane copies 16 bytes of
// every ROWS_A_COPYth row; where nothing is read, the address may lie anywhere.
template <class S>
struct Ring {
    static constexpr int X_COPIES = S::ROWS / S::ROWS_A_COPY, A_COPIES = S::COLUMNS / S::ROWS_A_COPY;
    bf16* tiles;
    int steps, step = 0;
    const bf16 *x, *a;  // where this lane's rows continue
    int x_step, a_step, k, x_end[X_COPIES], a_end[A_COPIES];

    // inp: of the row that is this lane's number; rank: of all rows.
    __device__ __forceinline__ Ring(bf16* all_tiles, const bf16* all_x, int x_stride, const AdapterEntry& adapter, int inp,
                                    int column, int rank) {
        const int warp = threadIdx.x / WARP, row = threadIdx.x % WARP / S::CHUNKS, chunk = threadIdx.x % S::CHUNKS;
        tiles = all_tiles + warp * S::STAGES * S::STAGE;
        // This warp's tiles of K numbers: warp, warp + 8, ... None where no row has these columns.
        const int all = column < rank ? (warp_max(inp) + S::K - 1) / S::K : 0;
        steps = max(0, (all - warp + S::WARPS_A_BLOCK - 1) / S::WARPS_A_BLOCK);
        k = warp * S::K + 8 * chunk;
        x = all_x + static_cast<size_t>(row) * x_stride + k;
        a = adapter.a + static_cast<size_t>(column + row) * adapter.a_stride + k;
        x_step = S::ROWS_A_COPY * x_stride;
        a_step = S::ROWS_A_COPY * adapter.a_stride;
#pragma unroll
        for (int i = 0; i < X_COPIES; i++) x_end[i] = __shfl_sync(ALL_LANES, inp, row + i * S::ROWS_A_COPY);
#pragma unroll
        for (int i = 0; i < A_COPIES; i++) a_end[i] = column + row + i * S::ROWS_A_COPY < rank ? adapter.a_stride : 0;
        tiles += swizzled<S::K>(row, chunk);
    }

    // A group of copies each time, an empty one after the last step: waits count groups.
    __device__ __forceinline__ void copy_next() {
        if (step < steps) {
            bf16* to = tiles + step++ % S::STAGES * S::STAGE;
#pragma unroll
            for (int i = 0; i < X_COPIES; i++) {
                cp_async_16(to + i * S::ROWS_A_COPY * S::K, x + i * x_step, chunk_bytes(k, x_end[i]));
            }
#pragma unroll
            for (int i = 0; i < A_COPIES; i++) {
                cp_async_16(to + (S::ROWS + i * S::ROWS_A_COPY) * S::K, a + i * a_step, k < a_end[i] ? 16 : 0);
            }
            x += S::WARPS_A_BLOCK * S::K;
            a += S::WARPS_A_BLOCK * S::K;
            k += S::WARPS_A_BLOCK * S::K;
        }
        cp_async_commit();
    }
};

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
    DYN_SHARED(uint4, memory);  // so aligned, as copies and matrices need it
    bf16* tiles = reinterpret_cast<bf16*>(memory);
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, column = blockIdx.x * S::COLUMNS;
    sizes += tile.x;
    const AdapterEntry adapter = adapters[sizes[0].adapter];
    const SegmentRow mine = lane < tile.y ? sizes[lane] : SegmentRow{0, 0, 0, 0};
    const int rank = adapter.a ? warp_max(mine.rank) : 0;
    Ring<S> ring(tiles, x + static_cast<size_t>(tile.x) * x_stride, x_stride, adapter, mine.inp, column, rank);
    float sums[S::ROWS / 16][S::COLUMNS / 8][4] = {};
    for (int stage = 0; stage < S::STAGES - 1; stage++) ring.copy_next();
    for (int step = 0; step < ring.steps; step++) {
        cp_async_wait<S::STAGES - 2>();
        __syncwarp();
        const bf16* now = tiles + (warp * S::STAGES + step % S::STAGES) * S::STAGE;
        multiply_tiles<S::K, S::ROWS / 16, S::COLUMNS / 16>(now, 0, now + S::ROWS * S::K, 0, 0, sums,
                                                            [&] { ring.copy_next(); });
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

// One Linear's part; `Shrink` in src/backend/cuda/many.rs. `tiles`: a first row and a count, at most ROWS, of rows that share a
// super-adapter.
struct Shrink {
    const int2* tiles;
    const SegmentRow* sizes;
    const AdapterEntry* adapters;
    bf16* s;
    int s_stride, tile_count;
};
constexpr int MOST_SHRINKS = 3;
struct Shrinks {
    Shrink of[MOST_SHRINKS];
};

// Of up to three Linears of one x, which a launch on its own would leave most of a GPU idle. 256 threads; a grid of (the widest
// s_stride / COLUMNS rounded up, the most tiles, Linears); BYTES of dynamic shared memory, for which cuFuncSetAttribute with
// MAX_DYNAMIC_SHARED_SIZE_BYTES goes before it. The smaller shape has four times the blocks, so that few rows fill a GPU; the
// larger one reads x and A half as often.
using Shrink16 = ShrinkShape<16, 16, 4>;
using Shrink32 = ShrinkShape<32, 32, 3>;
static_assert(Shrink16::BYTES == 65536 && Shrink32::BYTES == 98304, "as it is launched");

#define SHRINK_MANY(NAME, SHAPE)                                                                                            \
    extern "C" __global__ void __launch_bounds__(256)                                                                       \
        NAME(const bf16* x, int x_stride, const __grid_constant__ Shrinks shrinks) {                                        \
        begin_after_previous_kernel();                                                                                      \
        const Shrink& own = shrinks.of[blockIdx.z];                                                                         \
        const int tile = blockIdx.y, column = blockIdx.x * SHAPE::COLUMNS;                                                  \
        if (tile >= own.tile_count || column >= own.s_stride) return;                                                       \
        shrink_many<SHAPE>(x, x_stride, own.tiles[tile], own.sizes, own.adapters, own.s, own.s_stride);                     \
    }

SHRINK_MANY(shrink_many_16, Shrink16)
SHRINK_MANY(shrink_many_32, Shrink32)
