// What the products of many rows share, whichever instruction multiplies: the tables of a block's rows, and the copies of its
// tiles to shared memory. A shape S says how many ROWS of x and OUTPUTS of each of FACTORS matrices a block has, how deep a
// step is (K numbers, CHUNKS of 16 bytes), and of which thread is which part of a copy (ROWS_A_COPY).
#pragma once

#include "mma.cuh"

// One Linear of a product; `Many` in src/backend/cuda/many.rs. `sizes` null: all rows take the whole of W, without an adapter.
struct Factor {
    const bf16* w;
    const float* bias;
    const SegmentRow* sizes;
    const AdapterEntry* adapters;
    const bf16* s;
    int w_stride, s_stride;
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
    int whole;  // every row's i is a multiple of eight
};

// Reads the sizes of the rows from `first` on, one row a thread, and lists each factor's super-adapters once.
template <class S>
__device__ __forceinline__ void describe(Rows<S>& table, const Factor (&factors)[S::FACTORS], int first, int rows, int out,
                                         int inp) {
    const int at = threadIdx.x, row = first + at;
    if (at == 0) table.most_out = table.most_inp = table.most_rank = 0, table.whole = 1;
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
    if (most.inp % 8 != 0) atomicAnd(&table.whole, 0);
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

// Steps of a block's product. Where no row has its columns, only zeros are to be written.
template <class S>
__device__ __forceinline__ int steps_of(const Rows<S>& table, int first_column) {
    if (first_column >= table.most_out) return 0;
    int passes = 0;
    for (int f = 0; f < S::FACTORS; f++) passes += table.pass_count[f];
    return (table.most_inp + S::K - 1) / S::K + passes * ((table.most_rank + S::K - 1) / S::K);
}

// Copies the stages of a block's product to shared memory, one after another: the steps over W, then those over each
// super-adapter's B. A thread copies 16 bytes of every ROWS_A_COPYth row. Nothing is read for what is to be zero, so its
// address may lie anywhere.
template <class S>
struct Stages {
    static constexpr int X_COPIES = S::ROWS / S::ROWS_A_COPY, W_COPIES = S::OUTPUTS / S::ROWS_A_COPY;
    const Factor (&factors)[S::FACTORS];
    const Rows<S>& table;
    int row, place;     // this thread's first row in a tile, and where in the tile its 16 bytes go
    int x_row, column;  // what that row is of x and of W
    int first_k;        // its numbers in a step
    int main_steps, pass_steps, steps;
    // The next step, and its stage. Of a step over W, where this thread's rows continue, and where they end.
    int step = 0, stage = 0, k;
    const bf16 *x, *w[S::FACTORS];
    int x_step, x_end[X_COPIES], w_end[S::FACTORS][W_COPIES];
    // Of a step over B: the factor, which of its super-adapters, and the step of those over that one's rank.
    int factor = 0, pass = 0, pass_step = 0;

    __device__ __forceinline__ Stages(const Factor (&factors)[S::FACTORS], const Rows<S>& table, const bf16* all_x,
                                      int x_stride, int first, int first_column)
        : factors(factors), table(table) {
        row = threadIdx.x / S::CHUNKS;
        place = swizzled<S::K>(row, threadIdx.x % S::CHUNKS);
        x_row = first + row;
        column = first_column + row;
        first_k = k = threadIdx.x % S::CHUNKS * 8;
        main_steps = (table.most_inp + S::K - 1) / S::K;
        pass_steps = (table.most_rank + S::K - 1) / S::K;
        steps = steps_of<S>(table, first_column);
        x = all_x + static_cast<size_t>(x_row) * x_stride + k;
        x_step = S::ROWS_A_COPY * x_stride;
#pragma unroll
        for (int i = 0; i < X_COPIES; i++) x_end[i] = table.inp[row + i * S::ROWS_A_COPY];
#pragma unroll
        for (int f = 0; f < S::FACTORS; f++) {
            w[f] = factors[f].w + static_cast<size_t>(column) * factors[f].w_stride + k;
#pragma unroll
            for (int i = 0; i < W_COPIES; i++) w_end[f][i] = has_column(i) ? factors[f].w_stride : 0;
        }
    }
    __device__ __forceinline__ bool has_column(int copy) const { return column + copy * S::ROWS_A_COPY < table.most_out; }

    // A step over W: its part of the columns, then of x. WHOLE: every row of x ends with a chunk. A copy of 16 bytes or none
    // takes a third of the instructions of one of some.
    __device__ __forceinline__ void copy_w(bf16* to) {
#pragma unroll
        for (int f = 0; f < S::FACTORS; f++) {
            const int step = S::ROWS_A_COPY * factors[f].w_stride;
#pragma unroll
            for (int i = 0; i < W_COPIES; i++) {
                bf16* tile = to + (S::ROWS + f * S::OUTPUTS + i * S::ROWS_A_COPY) * S::K;
                cp_async_16(tile, w[f] + i * step, k < w_end[f][i] ? 16 : 0);
            }
            w[f] += S::K;
        }
    }
    template <bool WHOLE>
    __device__ __forceinline__ void copy_x(bf16* to) {
#pragma unroll
        for (int i = 0; i < X_COPIES; i++) {
            const int bytes = WHOLE ? (k < x_end[i] ? 16 : 0) : chunk_bytes(k, x_end[i]);
            cp_async_16(to + i * S::ROWS_A_COPY * S::K, x + i * x_step, bytes);
        }
        x += S::K;
        k += S::K;
    }

    // A step over the rank of one super-adapter: s, of its own rows only, and B.
    __device__ __forceinline__ void copy_pass(bf16* to) {
        if (S::FACTORS == 2 && pass == table.pass_count[factor]) factor = 1, pass = 0;
        const typename Rows<S>::Pass now = table.passes[factor][pass];
        const bf16* s = factor ? factors[S::FACTORS - 1].s : factors[0].s;
        const int stride = factor ? factors[S::FACTORS - 1].s_stride : factors[0].s_stride;
        const int start = pass_step * S::K + first_k;
        s += static_cast<size_t>(x_row) * stride + start;
#pragma unroll
        for (int i = 0; i < X_COPIES; i++) {
            const int at = row + i * S::ROWS_A_COPY;
            const int bytes = table.adapter[factor][at] == now.adapter ? chunk_bytes(start, table.rank[factor][at]) : 0;
            cp_async_16(to + i * S::ROWS_A_COPY * S::K, s + i * S::ROWS_A_COPY * stride, bytes);
        }
        const bf16* b = now.b + static_cast<size_t>(column) * now.b_stride + start;
#pragma unroll
        for (int i = 0; i < S::FACTORS * W_COPIES; i++) {
            // The other factor's columns take no part.
            const bool inside = i / W_COPIES == factor && start < now.b_stride && has_column(i % W_COPIES);
            bf16* tile = to + (S::ROWS + i * S::ROWS_A_COPY) * S::K;
            cp_async_16(tile, b + i % W_COPIES * S::ROWS_A_COPY * now.b_stride, inside ? 16 : 0);
        }
        if (++pass_step == pass_steps) pass_step = 0, pass++;
    }

    // All of the next step; `to` is its stage.
    __device__ __forceinline__ void copy_step(bf16* to) {
        to += place;
        if (step >= main_steps) {
            copy_pass(to);
        } else {
            copy_w(to);
            if (table.whole) {
                copy_x<true>(to);
            } else {
                copy_x<false>(to);
            }
        }
        step++;
    }

    // A group of copies each time, an empty one after the last step: waits count groups.
    __device__ __forceinline__ void copy_next(bf16* tiles) {
        if (step < steps) {
            copy_step(tiles + stage * S::STAGE);
            stage = stage + 1 == S::STAGES ? 0 : stage + 1;
        }
        cp_async_commit();
    }
};

// The bias of two columns, of which `out` may leave one.
__device__ __forceinline__ float2 bias_of(const float* bias, int column, int out) {
    if (!bias || column >= out) return {0.0f, 0.0f};
    return {__ldg(bias + column), column + 1 < out ? __ldg(bias + column + 1) : 0.0f};
}

// The same number, but the compiler does not know it: it would write all the code below for every value of a flag.
__device__ __forceinline__ bool unknown(int flag) {
    asm volatile("" : "+r"(flag));
    return flag != 0;
}

// The fast forms err by two units of the last of 24 bits, and bf16 keeps eight.
__device__ __forceinline__ float silu_times(float gate, float up) { return __fdividef(gate, 1.0f + __expf(-gate)) * up; }
