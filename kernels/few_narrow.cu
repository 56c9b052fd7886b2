// The elastic low-rank product of few_rows.cu for small weights, whose time is the way to memory and back and not the bytes: up to
// eight rows, one launch for up to three Linears, each row with its own o, i, r and super-adapter.
//
// A block has 16 outputs, or 16 of gate and 16 of up, and all that they take: it asks for its rows of W and for all of A before the kernel
// before has ended, then reads its inputs, shrinks for itself and expands. No block waits for another one, and after that kernel's
// end nothing is read but inputs. The order of sums is that of few_rows.cu: results are the same bit for bit.
#include "few_tiles.cuh"

// Rows of a launch, ranks of a super-adapter at most, and of those the 16-byte pieces.
constexpr int ROWS = COLUMNS, RANKS = 32, RANK_PIECES = RANKS / 8;
static_assert(RANKS == GROUPS * OUTPUTS && ROWS * RANKS == THREADS, "all warps shrink, and each thread has one of a weight's ranks");
// Chunks of inputs that few_rows.cu shrinks at once: those sums are added up by themselves first. `SHRINK_CHUNKS` in src/backend/cuda/few.rs.
constexpr int SHRINK_CHUNKS = 4;
// Chunks of a row with a norm that a warp takes: all rows have THREADS / WARP times as many together.
constexpr int NORMED_AT_ONCE = 3;

// As many rows of a matrix as the tile has, each `row_bytes` there; zeros beyond `there` rows and `end` numbers.
template <int TILE_ROWS>
__device__ __forceinline__ void copy_rows(Shared to, int row_bytes, const __nv_bfloat16* from, int stride, int there, int end) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
#pragma unroll
    for (int i = 0; i < TILE_ROWS / WARPS; i++) {
        const int row = warp + i * WARPS;
        const __nv_bfloat16* of_row = from + static_cast<size_t>(row) * stride;
        for (int piece = lane; 16 * piece < row_bytes; piece += WARP) {
            cp_async_16(to + row * row_bytes + 16 * swizzled_piece(row, piece), of_row + 8 * piece,
                        row < there && 8 * piece < end ? 16 : 0);
        }
    }
}

// Where a lane of a tensor core reads from, in tiles whose rows are `row_bytes`: `Places` of few_tiles.cuh.
struct Lane {
    int left[4], right[2];

    __device__ __forceinline__ Lane(int row_bytes, int slice, int rows) {
        const int lane = threadIdx.x % WARP, w_row = lane % 16, x_row = min(lane % 8, rows - 1), piece = slice * (STEP / 8);
#pragma unroll
        for (int i = 0; i < 4; i++) left[i] = w_row * row_bytes + 16 * swizzled_piece(w_row, piece + 2 * i + lane / 16);
#pragma unroll
        for (int i = 0; i < 2; i++) right[i] = x_row * row_bytes + 16 * swizzled_piece(x_row, piece + 4 * i + lane / 8);
    }
    // A step of rows, and of a left matrix.
    __device__ __forceinline__ void load(Shared x, unsigned (&b)[2][4]) const {
#pragma unroll
        for (int half = 0; half < 2; half++) ldmatrix_x4(b[half], x + right[half]);
    }
    __device__ __forceinline__ void load(Shared w, unsigned (&a)[4][4]) const {
#pragma unroll
        for (int i = 0; i < 4; i++) ldmatrix_x4(a[i], w + left[i]);
    }
};

// 16 outputs of one Linear, or of gate and up each.
template <int WEIGHTS, bool NORM>
struct Narrow {
    // Slices of a shrink's inputs: those of two weights are fewer.
    static constexpr int MOST_SLICES = WEIGHTS == 2 ? 1 : 2;
    using OfRows = Table<WEIGHTS, ROWS>;
    using Sums = Desk<ROWS>;

    const Inputs& inputs;
    const Part* parts;
    OfRows& table;
    int first_output, first_chunk, row_bytes;
    Shared w, a, x;    // tiles: WEIGHTS times OUTPUTS and RANKS rows, and the inputs
    unsigned char* x_memory;
    float* desks;      // for each weight and slice
    __nv_bfloat16 *b, *ranks;  // of each weight OUTPUTS and ROWS rows of RANKS numbers
    int chunks = 0, adapters = 0;
    float scales[WEIGHTS] = {};  // of the super-adapter whose A is in the tile

    __device__ __forceinline__ void copy_weights() const {
#pragma unroll
        for (int n = 0; n < WEIGHTS; n++) {
            const Part& part = parts[n];
            const __nv_bfloat16* from = static_cast<const __nv_bfloat16*>(part.w) + static_cast<size_t>(first_output) * part.w_stride;
            copy_rows<OUTPUTS>(w + n * OUTPUTS * row_bytes, row_bytes, from, part.w_stride, part.out - first_output, part.inp);
        }
        cp_async_commit();
    }

    __device__ __forceinline__ void copy_adapter(int adapter) {
#pragma unroll
        for (int n = 0; n < WEIGHTS; n++) {
            const Part& part = parts[n];
            AdapterEntry entry = {};
            if (adapter < part.adapter_count) entry = part.adapters[adapter];
            scales[n] = entry.scale;
            copy_rows<RANKS>(a + n * RANKS * row_bytes, row_bytes, entry.a, entry.a_stride, entry.rank, table.most_inp);
            const int row = threadIdx.x / RANK_PIECES, piece = threadIdx.x % RANK_PIECES, output = first_output + row;
            if (row >= OUTPUTS) continue;
            const bool has = 8 * piece < entry.b_stride && output < part.out;
            cp_async_16(shared_at(b + n * OUTPUTS * RANKS + swizzled<RANKS>(row, piece)),
                        entry.b + static_cast<size_t>(output) * entry.b_stride + 8 * piece, has ? 16 : 0);
        }
        cp_async_commit();
    }

    __device__ __forceinline__ void copy_inputs() const {
        const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
        // A warp a row, or several one.
        const int row = warp % inputs.rows, turn = warp / inputs.rows, turns = (WARPS - 1 - row) / inputs.rows + 1;
        const __nv_bfloat16* from = static_cast<const __nv_bfloat16*>(inputs.x) + static_cast<size_t>(row) * inputs.stride;
        const int inp = table.rows[0][row].inp;
        for (int piece = turn * WARP + lane; 16 * piece < row_bytes; piece += turns * WARP) {
            cp_async_16(x + row * row_bytes + 16 * swizzled_piece(row, piece), from + 8 * piece, chunk_bytes(8 * piece, inp));
        }
        cp_async_commit();
    }

    // A piece of a row for each lane, and for each warp some of the rows' chunks.
    struct Normed {
        float4 values[NORMED_AT_ONCE][2], by[NORMED_AT_ONCE][2];
    };
    __device__ __forceinline__ int normed_chunks() const { return (max(row_bytes / 2, inputs.width) + CHUNK - 1) / CHUNK; }
    // What inputs are to be multiplied with, or the inputs themselves.
    __device__ __forceinline__ void load_normed(float4 (&to)[NORMED_AT_ONCE][2], bool values) const {
        const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, of_row = normed_chunks();
#pragma unroll
        for (int i = 0; i < NORMED_AT_ONCE; i++) {
            const int row = (warp + i * WARPS) / of_row, piece = (warp + i * WARPS) % of_row * PIECES + lane;
            const bool has = row < inputs.rows && 8 * piece < inputs.width;
            const float* from = values ? static_cast<const float*>(inputs.x) + static_cast<size_t>(row) * inputs.stride : inputs.norm;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                to[i][half] = has ? reinterpret_cast<const float4*>(from)[2 * piece + half] : float4{0.0f, 0.0f, 0.0f, 0.0f};
            }
        }
    }
    // All inputs times the norm's weights, and the squares of each row's numbers, beyond its inputs too, because that is what a norm is of.
    __device__ __forceinline__ void norm_inputs(const Normed& normed) const {
        const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, of_row = normed_chunks();
#pragma unroll
        for (int i = 0; i < NORMED_AT_ONCE; i++) {
            const int row = (warp + i * WARPS) / of_row, chunk = (warp + i * WARPS) % of_row, piece = chunk * PIECES + lane;
            if (row >= inputs.rows) break;
            float squares = 0.0f;
            const uint4 bits = normed_piece(normed.values[i], normed.by[i], 8 * piece, table.rows[0][row].inp, inputs.width, squares);
            if (16 * piece < row_bytes) *reinterpret_cast<uint4*>(x_memory + row * row_bytes + 16 * swizzled_piece(row, piece)) = bits;
            squares = warp_sum(squares);
            if (lane == 0) table.squares[chunk][row] = squares;
        }
    }
    // 1 / sqrt(mean of the squares of a row's inputs + eps)
    __device__ __forceinline__ float norm_of(int row) const {
        if constexpr (!NORM) return 1.0f;
        const int of_row = normed_chunks();
        float all = 0.0f;
        for (int chunk = 0; chunk < of_row; chunk++) all += table.squares[chunk][row];
        return rsqrtf(all / inputs.width + inputs.eps);
    }

    // W's tiles begin at different inputs in few_rows.cu.
    __device__ __forceinline__ int chunk_of(int step) const {
        const int chunk = step + first_chunk;
        return chunk < chunks ? chunk : chunk - chunks;
    }
    __device__ __forceinline__ bool has(int slice, int chunk) const { return chunk * CHUNK + slice * STEP < table.most_inp; }

    // A step over W, over A, or over both: sums that do not depend on each other take turns, as each waits for the one before.
    template <bool OF_W, bool OF_A>
    __device__ __forceinline__ void multiply(const Lane& lane, int chunk, int step, float (&sums)[4], float (&of_ranks)[WEIGHTS][4]) const {
        const int group = threadIdx.x / WARP % GROUPS;
        unsigned x_of_w[2][4], x_of_a[2][4], of_w[4][4], of_a[WEIGHTS][4][4];
        if constexpr (OF_W) {
            lane.load(x + chunk * ROW_BYTES, x_of_w);
            lane.load(w + group * OUTPUTS * row_bytes + chunk * ROW_BYTES, of_w);
        }
        if constexpr (OF_A) {
            lane.load(x + step * ROW_BYTES, x_of_a);
#pragma unroll
            for (int n = 0; n < WEIGHTS; n++) lane.load(a + (n * RANKS + group * OUTPUTS) * row_bytes + step * ROW_BYTES, of_a[n]);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if constexpr (OF_W) mma_m16n8k16(sums, of_w[i], x_of_w[i / 2][i % 2 * 2], x_of_w[i / 2][i % 2 * 2 + 1]);
            if constexpr (OF_A) {
#pragma unroll
                for (int n = 0; n < WEIGHTS; n++) {
                    mma_m16n8k16(of_ranks[n], of_a[n][i], x_of_a[i / 2][i % 2 * 2], x_of_a[i / 2][i % 2 * 2 + 1]);
                }
            }
        }
    }
    // Walks over the inputs: `sums` gets this warp's part of W x, and the desks that of A x.
    __device__ __forceinline__ void multiply_all(const Lane& lane, bool with_w, float (&sums)[4]) const {
        const int warp = threadIdx.x / WARP, group = warp % GROUPS, slice = warp / GROUPS;
        const bool expands = with_w && group < WEIGHTS;
        float of_ranks[WEIGHTS][4] = {};
        for (int step = 0; step < chunks; step++) {
            const int chunk = chunk_of(step);
            const bool of_w = expands && has(slice, chunk), of_a = adapters > 0 && has(slice, step);
            if (of_w && of_a) {
                multiply<true, true>(lane, chunk, step, sums, of_ranks);
            } else if (of_w) {
                multiply<true, false>(lane, chunk, step, sums, of_ranks);
            } else if (of_a) {
                multiply<false, true>(lane, chunk, step, sums, of_ranks);
            }
            if (adapters == 0 || ((step + 1) % SHRINK_CHUNKS > 0 && step + 1 < chunks)) continue;
#pragma unroll
            for (int n = 0; n < WEIGHTS; n++) {
                desk(n, step / SHRINK_CHUNKS).put(slice, group, reinterpret_cast<const float(&)[1][4]>(of_ranks[n]));
#pragma unroll
                for (float& sum : of_ranks[n]) sum = 0.0f;
            }
        }
    }
    __device__ __forceinline__ Sums desk(int weight, int slice) const {
        return {desks + (weight * MOST_SLICES + slice) * SLICES * Sums::NUMBERS};
    }

    // s A x of the rows of one super-adapter, zero for the others.
    __device__ __forceinline__ void leave_ranks(int adapter) const {
#pragma unroll
        for (int n = 0; n < WEIGHTS; n++) {
            const int rank = threadIdx.x % RANKS, row = threadIdx.x / RANKS;
            float value = 0.0f;
            if (row < inputs.rows && table.rows[n][row].adapter == adapter && rank < table.rows[n][row].rank) {
                float sum = desk(n, 0).total(rank / OUTPUTS, row, rank % OUTPUTS);
                if (MOST_SLICES > 1 && chunks > SHRINK_CHUNKS) sum += desk(n, 1).total(rank / OUTPUTS, row, rank % OUTPUTS);
                value = scales[n] * sum;
            }
            ranks[n * ROWS * RANKS + swizzled<RANKS>(row, rank / 8) + rank % 8] = __float2bfloat16(value);
        }
    }
    __device__ __forceinline__ void add_adapter(int weight, float (&sums)[4]) const {
        const int lane = threadIdx.x % WARP;
        unsigned left[2][4], right[4];
#pragma unroll
        for (int i = 0; i < 2; i++) ldmatrix_x4(left[i], b + weight * OUTPUTS * RANKS + swizzled<RANKS>(lane % 16, 2 * i + lane / 16));
        ldmatrix_x4(right, ranks + weight * ROWS * RANKS + swizzled<RANKS>(lane % 8, lane / 8));
        mma_m16n8k16(sums, left[0], right[0], right[1]);
        mma_m16n8k16(sums, left[1], right[2], right[3]);
    }

    __device__ __forceinline__ void run(bool onto) {
        const int warp = threadIdx.x / WARP, group = warp % GROUPS, slice = warp / GROUPS;
        const int row = threadIdx.x / OUTPUTS, output = first_output + threadIdx.x % OUTPUTS;
        const bool writes = row < inputs.rows && output < parts[0].out;
        copy_weights();
        describe(table, parts, 0, inputs.rows);
        if (first_output < table.most_out) chunks = (table.most_inp + CHUNK - 1) / CHUNK, adapters = table.adapter_count;
        if (first_chunk >= chunks) first_chunk = 0;
        if (adapters > 0) copy_adapter(table.adapters[0]);
        float bias[WEIGHTS] = {}, before = 0.0f;
        bool active[WEIGHTS];
#pragma unroll
        for (int n = 0; n < WEIGHTS; n++) {
            active[n] = writes && output < table.rows[n][row].out;
            if (active[n] && parts[n].bias) bias[n] = parts[n].bias[output];
        }
        Normed normed;
        if constexpr (NORM) load_normed(normed.by, false);
        wait_for_previous_kernel();
        if constexpr (NORM) {
            load_normed(normed.values, true);
        } else {
            copy_inputs();
        }
        const size_t at = static_cast<size_t>(row) * parts[0].y_stride + output;
        if (WEIGHTS == 1 && onto && writes) before = static_cast<const float*>(parts[0].y)[at];
        if constexpr (NORM) norm_inputs(normed);
        cp_async_wait<0>();
        __syncthreads();
        float sums[4] = {};
        const Lane lane(row_bytes, slice, inputs.rows);
        multiply_all(lane, true, sums);
        for (int i = 0; i < adapters; i++) {
            if (i > 0) {
                // Whoever read the adapter before is through with it.
                __syncthreads();
                copy_adapter(table.adapters[i]);
                cp_async_wait<0>();
                __syncthreads();
                multiply_all(lane, false, sums);
            }
            __syncthreads();
            leave_ranks(table.adapters[i]);
            __syncthreads();
            if (slice == 0 && group < WEIGHTS) add_adapter(group, sums);
        }
        if (group < WEIGHTS) desk(0, 0).put(slice, group, reinterpret_cast<const float(&)[1][4]>(sums));
        const float norm = writes ? norm_of(row) : 1.0f;
        __syncthreads();
        if (!writes) return;
        float values[WEIGHTS];
#pragma unroll
        for (int n = 0; n < WEIGHTS; n++) {
            const float sum = norm * desk(0, 0).total(n, row, output - first_output);
            values[n] = active[n] ? sum + (parts[n].bias ? bias[n] : 0.0f) : 0.0f;
        }
        if constexpr (WEIGHTS == 2) {
            static_cast<__nv_bfloat16*>(parts[0].y)[at] = __float2bfloat16(silu(values[0]) * values[1]);
        } else {
            static_cast<float*>(parts[0].y)[at] = before + values[0];
        }
    }
};

template <int WEIGHTS, bool NORM>
__device__ __forceinline__ void work(const Inputs& inputs, const Parts& parts, bool onto) {
    using This = Narrow<WEIGHTS, NORM>;
    DYN_SHARED(uint4, memory);
    __shared__ Table<WEIGHTS, ROWS> table;
    __shared__ float desks[WEIGHTS * This::MOST_SLICES * SLICES * Desk<ROWS>::NUMBERS];
    __shared__ uint4 b[WEIGHTS * OUTPUTS * RANK_PIECES], ranks[WEIGHTS * ROWS * RANK_PIECES];
    let_next_kernel_begin();
    int tile = static_cast<int>(blockIdx.x), part = 0;
    for (; WEIGHTS == 1 && tile >= (parts.of[part].out + OUTPUTS - 1) / OUTPUTS; part++) tile -= (parts.of[part].out + OUTPUTS - 1) / OUTPUTS;
    const Part* of = WEIGHTS == 1 ? parts.of + part : parts.of;
    const int row_bytes = (of->inp + STEP - 1) / STEP * STEP * 2, chunks = (of->inp + CHUNK - 1) / CHUNK;
    unsigned char* x = reinterpret_cast<unsigned char*>(memory) + WEIGHTS * (OUTPUTS + RANKS) * row_bytes;
    const Shared w_tile = shared_at(memory), a_tile = w_tile + WEIGHTS * OUTPUTS * row_bytes;
    This narrow = {inputs,
                   of,
                   table,
                   tile * OUTPUTS,
                   tile * OUTPUTS * WEIGHTS / TILE % chunks,
                   row_bytes,
                   w_tile,
                   a_tile,
                   shared_at(x),
                   x,
                   desks,
                   reinterpret_cast<__nv_bfloat16*>(b),
                   reinterpret_cast<__nv_bfloat16*>(ranks)};
    narrow.run(onto);
}

// Blocks: for each part those of its outputs; of gate and up, which take `parts` 0 and 1, those of one. Shared memory: W's rows, A's, inputs.
#define NARROW(NAME, WEIGHTS, NORM)                                                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) NAME(const Inputs inputs, const Parts parts, int onto) { \
        work<WEIGHTS, NORM>(inputs, parts, onto != 0);                                                                           \
    }

NARROW(narrow_linear_few, 1, false)
NARROW(narrow_gate_up_few, 2, false)
NARROW(narrow_normed_linear_few, 1, true)
NARROW(narrow_normed_gate_up_few, 2, true)
