// The elastic low-rank product y = W[:o,:i] x + b[:o] + s B[:o,:r] (A[:r,:i] x), each row with its own o, i, r and
// super-adapter: `shrink` computes t = s A x for all rows, `expand` the rest, with B t as a few more inputs of W's rows.
// See README.md for shapes, launches and bytes.
#include "common.cuh"

// Outputs of a warp and warps of a block.
constexpr int OUTPUTS = 2, WARPS = 8, BLOCK_OUTPUTS = OUTPUTS * WARPS;
// Inputs that are staged in shared memory at a time, and those that a warp takes in one step: a lane takes eight.
constexpr int STAGE = 512, STEP = 8 * WARP;

// Copies inputs `start..start + STAGE` of `count` rows to shared memory. What lies beyond a row's own inputs is zero, and so
// adds nothing to its sums: rows of every width can stand side by side. `sizes` null: all rows take `inp` inputs.
template <int ROWS>
__device__ void stage(const float* x, int width, int row, int count, const SegmentRow* sizes, int inp, int start, float* to) {
    for (int at = threadIdx.x; at < ROWS * STAGE; at += blockDim.x) {
        const int r = at / STAGE, k = start + at % STAGE;
        const int active = r >= count ? 0 : sizes ? sizes[row + r].inp : inp;
        to[at] = k < active ? x[static_cast<size_t>(row + r) * width + k] : 0.0f;
    }
}

// Adds the products of a stage with OUTPUTS rows of a weight. Each lane adds up its own inputs, in the same order whatever
// rows stand beside: results do not depend on the batch.
template <int ROWS>
__device__ void multiply(const __nv_bfloat16* const (&weights)[OUTPUTS], int start, int end, const float* inputs,
                         float (&sums)[OUTPUTS][ROWS]) {
    const int lane = threadIdx.x % WARP;
    for (int step = start + 8 * lane; step < end; step += STEP) {
        float w[OUTPUTS][8];
        for (int n = 0; n < OUTPUTS; n++) {
            if (weights[n]) {
                load_eight(weights[n] + step, w[n]);
            } else {
                for (int i = 0; i < 8; i++) w[n][i] = 0.0f;
            }
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const float4* x = reinterpret_cast<const float4*>(inputs + r * STAGE + (step - start));
            const float4 a = x[0], b = x[1];
            const float values[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
            for (int n = 0; n < OUTPUTS; n++) {
#pragma unroll
                for (int i = 0; i < 8; i++) sums[n][r] += w[n][i] * values[i];
            }
        }
    }
}

// The widest of `count` rows; `what` chooses the size.
__device__ __forceinline__ int widest(const SegmentRow* sizes, int row, int count, int SegmentRow::*what) {
    int most = 0;
    for (int r = 0; r < count; r++) most = max(most, sizes[row + r].*what);
    return most;
}

template <int ROWS>
__device__ __forceinline__ void shrink(const float* x, int width, int first, int count, const SegmentRow* sizes,
                       const AdapterEntry* adapters, float* t, int t_width) {
    DYN_SHARED(float, inputs);
    const int lane = threadIdx.x % WARP, output = (blockIdx.x * WARPS + threadIdx.x / WARP) * OUTPUTS;
    const AdapterEntry& adapter = adapters[sizes[first].adapter];
    const int rank = adapter.a ? widest(sizes, first, count, &SegmentRow::rank) : 0;
    const int inp = widest(sizes, first, count, &SegmentRow::inp);
    if (static_cast<int>(blockIdx.x) * BLOCK_OUTPUTS >= rank) return;
    const __nv_bfloat16* weights[OUTPUTS];
    for (int n = 0; n < OUTPUTS; n++) {
        weights[n] = output + n < rank ? adapter.a + static_cast<size_t>(output + n) * adapter.a_stride : nullptr;
    }
    float sums[OUTPUTS][ROWS] = {};
    for (int start = 0; start < inp; start += STAGE) {
        __syncthreads();
        stage<ROWS>(x, width, first, count, sizes, 0, start, inputs);
        __syncthreads();
        multiply<ROWS>(weights, start, min(inp, start + STAGE), inputs, sums);
    }
#pragma unroll
    for (int n = 0; n < OUTPUTS; n++) {
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const float sum = warp_sum(sums[n][r]);
            if (lane == 0 && r < count && output + n < rank) {
                t[static_cast<size_t>(first + r) * t_width + output + n] = adapter.scale * sum;
            }
        }
    }
}

template <int ROWS>
__device__ void expand(const float* x, int width, const __nv_bfloat16* w, int w_stride, const float* bias, int out, int inp,
                       int rows, const SegmentRow* sizes, const AdapterEntry* adapters, const float* t, int t_width,
                       float* y, bool onto) {
    DYN_SHARED(float, inputs);
    const int lane = threadIdx.x % WARP, output = (blockIdx.x * WARPS + threadIdx.x / WARP) * OUTPUTS;
    const int first = blockIdx.y * ROWS, count = min(ROWS, rows - first);
    const int most_out = sizes ? widest(sizes, first, count, &SegmentRow::out) : out;
    const int most_inp = sizes ? widest(sizes, first, count, &SegmentRow::inp) : inp;
    const __nv_bfloat16* weights[OUTPUTS];
    for (int n = 0; n < OUTPUTS; n++) {
        weights[n] = output + n < most_out ? w + static_cast<size_t>(output + n) * w_stride : nullptr;
    }
    float sums[OUTPUTS][ROWS] = {};
    // No row of this block's outputs is active: only zeros are to be written.
    const bool idle = static_cast<int>(blockIdx.x) * BLOCK_OUTPUTS >= most_out;
    for (int start = 0; start < most_inp && !idle; start += STAGE) {
        __syncthreads();
        stage<ROWS>(x, width, first, count, sizes, inp, start, inputs);
        __syncthreads();
        multiply<ROWS>(weights, start, min(most_inp, start + STAGE), inputs, sums);
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        if (r >= count) continue;
        const SegmentRow size = sizes ? sizes[first + r] : SegmentRow{out, inp, 0, 0};
        const AdapterEntry* adapter = size.rank > 0 ? &adapters[size.adapter] : nullptr;
#pragma unroll
        for (int n = 0; n < OUTPUTS; n++) {
            const int o = output + n;
            if (o < size.out && adapter && adapter->b) {
                const __nv_bfloat16* b = adapter->b + static_cast<size_t>(o) * adapter->b_stride;
                const float* shrunk = t + static_cast<size_t>(first + r) * t_width;
                for (int k = lane; k < size.rank; k += WARP) sums[n][r] += __bfloat162float(b[k]) * shrunk[k];
            }
            const float sum = warp_sum(sums[n][r]);
            if (lane != 0 || o >= out) continue;
            float* to = y + static_cast<size_t>(first + r) * out + o;
            const float value = o < size.out ? sum + (bias ? bias[o] : 0.0f) : 0.0f;
            *to = onto ? *to + value : value;
        }
    }
}

// `tiles`: a first row and a count, at most ROWS, of rows that share a super-adapter; a tile for each blockIdx.y.
#define SHRINK(ROWS)                                                                                                        \
    extern "C" __global__ void __launch_bounds__(WARPS* WARP)                                                               \
        shrink_##ROWS(const float* x, int width, const int2* tiles, const SegmentRow* sizes, const AdapterEntry* adapters,  \
                      float* t, int t_width) {                                                                              \
        const int2 tile = tiles[blockIdx.y];                                                                                \
        shrink<ROWS>(x, width, tile.x, tile.y, sizes, adapters, t, t_width);                                                \
    }

// `sizes` null: all rows take the whole of `w (out, inp)`, without an adapter. `onto`: adds to `y` instead of writing it.
#define EXPAND(ROWS)                                                                                                        \
    extern "C" __global__ void __launch_bounds__(WARPS* WARP)                                                               \
        expand_##ROWS(const float* x, int width, const __nv_bfloat16* w, int w_stride, const float* bias, int out, int inp, \
                      int rows, const SegmentRow* sizes, const AdapterEntry* adapters, const float* t, int t_width,         \
                      float* y, int onto) {                                                                                 \
        expand<ROWS>(x, width, w, w_stride, bias, out, inp, rows, sizes, adapters, t, t_width, y, onto != 0);               \
    }

SHRINK(1)
SHRINK(2)
SHRINK(4)
SHRINK(8)
EXPAND(1)
EXPAND(2)
EXPAND(4)
EXPAND(8)
