// What few_rows.cu is made of: what a launch is given, tiles of weights and of rows in shared memory, how they are copied there,
// and what tensor cores do with them.
#pragma once

#include "common.cuh"
#include "formats.cuh"
#include "mma.cuh"

// Outputs of a warp, the height of a tensor core's left matrix; rows, the width of its right one; inputs that a warp takes at a time.
constexpr int OUTPUTS = 16, COLUMNS = 8, STEP = 64;
// A block's warps: two groups of 16 outputs (of one Linear, or of gate and of up), each with a warp for every quarter of a stage's inputs.
constexpr int GROUPS = 2, SLICES = 4, WARPS = GROUPS * SLICES, THREADS = WARPS * WARP, TILE = GROUPS * OUTPUTS;
// Inputs of a stage, bytes of its rows in bf16, and 16-byte pieces of them: a lane's.
constexpr int CHUNK = SLICES * STEP, ROW_BYTES = 2 * CHUNK, PIECES = CHUNK / 8, WEIGHT_BYTES = TILE * ROW_BYTES;
static_assert(PIECES == WARP, "a warp copies a row");
// Slots of the ring.
constexpr int STAGES = 3;
// Linears of one launch.
constexpr int MOST_PARTS = 3;

// One Linear of a launch; `Part` in src/backend/cuda/few.rs. `sizes` null: all rows take the whole of `w (out, inp)`
// without an adapter. `shrunk (rows, rank)`: what the shrinks leave for the expands; `rank`, a multiple of 32, is the highest.
// `partial (slice, rows, rank)`: what they leave for one another, where several share the inputs.
struct Part {
    const void* w;
    const void* scales;
    const float* bias;
    const SegmentRow* sizes;
    const AdapterEntry* adapters;
    __nv_bfloat16* shrunk;
    float* partial;
    void* y;
    int w_stride, out, inp, y_stride, adapter_count, rank;
};

struct Parts {
    Part of[MOST_PARTS];
};

// What a launch's blocks agree by, all zero before it and after it: shrinks that are done, blocks that have left, and of each shrink
// the slices of the inputs that are.
struct Counters {
    unsigned shrunk, left, slices[];
};

// The rows' inputs. With a `norm` they are f32 and to be multiplied with it; else bf16.
struct Inputs {
    const void* x;
    const float* norm;
    int stride, width, rows;
    float eps;
};

// Where a 16-byte piece of a row stands in a tile: permuted so that what a tensor core's lanes read together lies in different banks.
__device__ __forceinline__ int swizzled_piece(int row, int piece) { return piece ^ (row & 7); }
// The same of weights in 8 and 4 bits, of which lanes read four pieces of two rows, or two of four.
template <int FORMAT>
__device__ __forceinline__ int swizzled_weight(int row, int piece) {
    return FORMAT == BF16 ? swizzled_piece(row, piece) : piece ^ (FORMAT == INT8 ? (row & 1) << 2 : (row & 3) << 1);
}

// What a block knows of its rows, in shared memory.
template <int WEIGHTS, int ROWS>
struct Table {
    SegmentRow rows[WEIGHTS][ROWS];
    int adapters[ROWS], adapter_count;  // each once
    int most_out, most_inp, most_rank;
    float squares[WARPS][ROWS];
};

// Reads the sizes of the rows from `first` on.
template <int WEIGHTS, int ROWS>
__device__ __forceinline__ void describe(Table<WEIGHTS, ROWS>& table, const Part* parts, int first, int rows) {
    const int lane = threadIdx.x % WARP;
    if (threadIdx.x < WARP) {
        SegmentRow most = {0, 0, 0, -1};
#pragma unroll
        for (int n = 0; n < WEIGHTS; n++) {
            SegmentRow size = {0, 0, 0, -1};
            if (lane < rows) size = parts[n].sizes ? parts[n].sizes[first + lane] : SegmentRow{parts[n].out, parts[n].inp, 0, -1};
            if (lane < ROWS) table.rows[n][lane] = size;
            most.out = max(most.out, size.out), most.inp = max(most.inp, size.inp), most.rank = max(most.rank, size.rank);
            if (size.rank > 0) most.adapter = size.adapter;
        }
        unsigned left = __ballot_sync(ALL_LANES, most.rank > 0);
        int count = 0;
        while (left != 0) {
            const int adapter = __shfl_sync(ALL_LANES, most.adapter, __ffs(left) - 1);
            left &= ~__ballot_sync(ALL_LANES, most.rank > 0 && most.adapter == adapter);
            if (lane == 0) table.adapters[count] = adapter;
            count++;
        }
        most = {warp_max(most.out), warp_max(most.inp), warp_max(most.rank), 0};
        if (lane == 0) {
            table.most_out = most.out, table.most_inp = most.inp, table.most_rank = most.rank;
            table.adapter_count = count;
        }
    }
    __syncthreads();
}

// Where a thread copies a bf16 matrix to a tile from: a lane's piece of COUNT rows that follow each other, and where they go.
template <int COUNT>
struct RowCopies {
    const __nv_bfloat16* from;
    int stride, left, end;  // numbers from row to row; rows that there are; numbers of a row
    int places[COUNT];

    // The warp's rows `COUNT * warp..` of the tile stand at rows `row..` of the matrix, which has `rows` of them; zeros beyond, and from
    // number `end` on.
    __device__ __forceinline__ RowCopies(const __nv_bfloat16* matrix, int stride, int row, int rows, int end)
        : from(matrix + static_cast<size_t>(row) * stride + threadIdx.x % WARP * 8),
          stride(stride),
          left(rows - row),
          end(matrix ? end - static_cast<int>(threadIdx.x) % WARP * 8 : 0) {
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            const int to = threadIdx.x / WARP * COUNT + i;
            places[i] = to * ROW_BYTES + 16 * swizzled_piece(to, threadIdx.x % WARP);
        }
    }

    // Numbers `k..` of each.
    __device__ __forceinline__ void copy(Shared tile, int k) const {
        const int rows = k < end ? left : 0;
        const __nv_bfloat16* at = from + k;
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            cp_async_16(tile + places[i], at, i < rows ? 16 : 0);
            at += stride;
        }
    }
};

// The same of a weight in its format: of each Linear of the tile `TILE / WEIGHTS` outputs.
template <int FORMAT, int WEIGHTS>
struct WeightCopies {
    // 16-byte pieces and 4-byte words of scales of a row, and rows that all threads copy at once.
    static constexpr int OF_ROW = bytes_of<FORMAT>(CHUNK) / 16, ROWS_AT_ONCE = THREADS / OF_ROW, COPIES = TILE / ROWS_AT_ONCE;
    static constexpr int WORDS = CHUNK / BLOCK * (FORMAT == INT4 ? 4 : 2) / 4, OF_WORD = CHUNK / WORDS, WORD_COPIES = TILE * WORDS;
    static_assert(WORD_COPIES <= THREADS, "a word of scales a thread");

    const unsigned char* from[COPIES];
    const unsigned* words;
    unsigned has;  // the copies whose rows there are, and then the words
    int end, word_end;

    __device__ __forceinline__ WeightCopies(const Part* parts, int first_output, int outputs, int inputs) : has(0) {
        constexpr int OF_WEIGHT = TILE / WEIGHTS;
        const int piece = threadIdx.x % OF_ROW * (CHUNK / OF_ROW), word = threadIdx.x % WORDS * OF_WORD;
        end = inputs - piece, word_end = inputs - word;
#pragma unroll
        for (int i = 0; i < COPIES; i++) {
            const int row = threadIdx.x / OF_ROW + i * ROWS_AT_ONCE, output = first_output + row % OF_WEIGHT;
            const Part& part = parts[row / OF_WEIGHT];
            const size_t number = static_cast<size_t>(output) * part.w_stride + piece;
            from[i] = static_cast<const unsigned char*>(part.w) + bytes_of<FORMAT>(number);
            if (output < min(part.out, outputs)) has |= 1u << i;
        }
        const int row = threadIdx.x / WORDS % TILE, output = first_output + row % OF_WEIGHT;
        const Part& part = parts[row / OF_WEIGHT];
        words = static_cast<const unsigned*>(part.scales) + (static_cast<size_t>(output) * part.w_stride + word) / OF_WORD;
        if (static_cast<int>(threadIdx.x) < WORD_COPIES && output < min(part.out, outputs)) has |= 1u << COPIES;
    }

    __device__ __forceinline__ void copy(Shared tile, int chunk) const {
        const int k = chunk * CHUNK;
#pragma unroll
        for (int i = 0; i < COPIES; i++) {
            const int row = threadIdx.x / OF_ROW + i * ROWS_AT_ONCE;
            cp_async_16(tile + (row * OF_ROW + swizzled_weight<FORMAT>(row, threadIdx.x % OF_ROW)) * 16,
                        from[i] + bytes_of<FORMAT>(k), k < end && has >> i & 1 ? 16 : 0);
        }
        if (static_cast<int>(threadIdx.x) >= WORD_COPIES) return;
        cp_async_4(tile + TILE * OF_ROW * 16 + threadIdx.x * 4, words + chunk * WORDS, k < word_end && has >> COPIES & 1 ? 4 : 0);
    }
};
template <int WEIGHTS>
struct WeightCopies<BF16, WEIGHTS> {
    RowCopies<TILE / WARPS> rows;

    __device__ __forceinline__ WeightCopies(const Part* parts, int first_output, int outputs, int inputs)
        : WeightCopies(parts[threadIdx.x / (THREADS / WEIGHTS)], first_output, outputs, inputs) {}
    __device__ __forceinline__ WeightCopies(const Part& part, int first_output, int outputs, int inputs)
        : rows(static_cast<const __nv_bfloat16*>(part.w), part.w_stride,
               first_output + static_cast<int>(threadIdx.x) / WARP * (TILE / WARPS) % (TILE / WEIGHTS), min(part.out, outputs), inputs) {}
    __device__ __forceinline__ void copy(Shared tile, int chunk) const { rows.copy(tile, chunk * CHUNK); }
};

// Where a lane of a tensor core reads a step from: the rows of a left matrix of 16 rows from `row` on, and pieces of right ones, whose
// first is `piece`.
struct Places {
    int left[4], right[2];

    __device__ __forceinline__ Places(int row, int slice, int piece) {
        const int lane = threadIdx.x % WARP, at = row + lane % 16;
#pragma unroll
        for (int i = 0; i < 4; i++) left[i] = at * ROW_BYTES + 16 * swizzled_piece(at, slice * (STEP / 8) + 2 * i + lane / 16);
#pragma unroll
        for (int i = 0; i < 2; i++) right[i] = 16 * swizzled_piece(lane, piece + 4 * i + lane / 8);
    }
};

// One step of bf16: a left matrix and N right ones of eight rows; `x[n]`: this lane's row of each.
template <int N>
__device__ __forceinline__ void multiply_bf16(Shared w, const Places& places, const Shared (&x)[N], float (&sums)[N][4]) {
    unsigned a[4][4];
#pragma unroll
    for (int i = 0; i < 4; i++) ldmatrix_x4(a[i], w + places.left[i]);
#pragma unroll
    for (int half = 0; half < 2; half++) {
#pragma unroll
        for (int n = 0; n < N; n++) {
            unsigned b[4];
            ldmatrix_x4(b, x[n] + places.right[half]);
            mma_m16n8k16(sums[n], a[2 * half], b[0], b[1]);
            mma_m16n8k16(sums[n], a[2 * half + 1], b[2], b[3]);
        }
    }
}

// The same of weights in 8 or 4 bits. The order of inputs within a step is our own: a lane takes sixteen consecutive ones.
template <int FORMAT, int N>
__device__ __forceinline__ void multiply_blocks(const unsigned char* w, int row, const unsigned char* const (&x)[N], int slice,
                                                float (&sums)[N][4]) {
    constexpr int OF_ROW = bytes_of<FORMAT>(CHUNK) / 16, SCALE_BYTES = CHUNK / BLOCK * (FORMAT == INT4 ? 4 : 2);
    const int lane = threadIdx.x % WARP, group = lane / 4, part = lane % 4, numbers = slice * STEP + part * 16;
    uint4 bits[2] = {};
    Scale<FORMAT> scales[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int at = row + group + 8 * i;
        if constexpr (FORMAT == INT8) {
            bits[i] = *reinterpret_cast<const uint4*>(w + (at * OF_ROW + swizzled_weight<FORMAT>(at, numbers / 16)) * 16);
        } else {
            const unsigned char* piece = w + (at * OF_ROW + swizzled_weight<FORMAT>(at, numbers / 32)) * 16;
            const uint2 words = *reinterpret_cast<const uint2*>(piece + numbers / 16 % 2 * 8);
            bits[i].x = words.x, bits[i].y = words.y;
        }
        scales[i].load(w + TILE * OF_ROW * 16 + at * SCALE_BYTES, numbers / BLOCK);
    }
#pragma unroll
    for (int eight = 0; eight < 2; eight++) {
        unsigned pairs[2][4];
        unpack(bits[0], scales[0], eight, pairs[0]);
        unpack(bits[1], scales[1], eight, pairs[1]);
        const unsigned a[2][4] = {{pairs[0][0], pairs[1][0], pairs[0][1], pairs[1][1]}, {pairs[0][2], pairs[1][2], pairs[0][3], pairs[1][3]}};
        const int at = 16 * swizzled_piece(group, numbers / 8 + eight);
#pragma unroll
        for (int n = 0; n < N; n++) {
            const uint4 b = *reinterpret_cast<const uint4*>(x[n] + at);
            mma_m16n8k16(sums[n], a[0], b.x, b.y);
            mma_m16n8k16(sums[n], a[1], b.z, b.w);
        }
    }
}

// Adds up what the slices of the inputs have summed, always in the same order: [slice][group][row][output].
template <int ROWS>
struct Desk {
    static constexpr int N = ROWS / COLUMNS, OF_GROUP = ROWS * OUTPUTS, NUMBERS = GROUPS * OF_GROUP;
    float* of;

    // As the tensor cores leave them: number `e` of a lane is of output lane / 4 + e / 2 * 8 and row lane % 4 * 2 + e % 2 of eight.
    __device__ __forceinline__ void put(int slice, int group, const float (&sums)[N][4]) const {
        const int lane = threadIdx.x % WARP;
        float* to = of + slice * NUMBERS + group * OF_GROUP + lane / 4;
#pragma unroll
        for (int n = 0; n < N; n++) {
#pragma unroll
            for (int e = 0; e < 4; e++) to[(n * COLUMNS + lane % 4 * 2 + e % 2) * OUTPUTS + e / 2 * 8] = sums[n][e];
        }
    }
    __device__ __forceinline__ float total(int group, int row, int output) const {
        const float* at = of + group * OF_GROUP + row * OUTPUTS + output;
        return (at[0] + at[NUMBERS]) + (at[2 * NUMBERS] + at[3 * NUMBERS]);
    }
};

// Numbers `k..k + 8` of a row times a norm's weights, zero from `inp` on; adds their squares, as far as the row is wide.
__device__ __forceinline__ uint4 normed_piece(const float4 (&values)[2], const float4 (&by)[2], int k, int inp, int width, float& squares) {
    unsigned two[4];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const float4 v = values[half], w = by[half];
        const int at = k + 4 * half, left = width - at;
        squares += (left > 0 ? v.x * v.x : 0.0f) + (left > 1 ? v.y * v.y : 0.0f) + (left > 2 ? v.z * v.z : 0.0f) +
                   (left > 3 ? v.w * v.w : 0.0f);
        two[2 * half] = pack(at < inp ? v.x * w.x : 0.0f, at + 1 < inp ? v.y * w.y : 0.0f);
        two[2 * half + 1] = pack(at + 2 < inp ? v.z * w.z : 0.0f, at + 3 < inp ? v.w * w.w : 0.0f);
    }
    return {two[0], two[1], two[2], two[3]};
}

// A block's ring and its inputs.
template <int ROWS, bool NORM>
struct Ring {
    static constexpr int ROW_COPIES = ROWS / WARPS, N = ROWS / COLUMNS;
    static_assert(ROWS % WARPS == 0, "each warp copies as many rows");

    const Inputs& inputs;
    unsigned char* memory;
    Shared shared;  // the same
    int slot_bytes, first, rows, inp, chunks;
    const __nv_bfloat16* x;  // this thread's piece of the first row that its warp copies
    int x_end[ROW_COPIES];   // numbers of those rows from there on
    int x_rows[N];           // where this lane's rows of a tile stand
    int to = 0, from = 0;    // slots, in bytes

    template <int WEIGHTS>
    __device__ __forceinline__ Ring(const Inputs& inputs, const Table<WEIGHTS, ROWS>& table, unsigned char* memory, int first, int rows)
        : inputs(inputs),
          memory(memory),
          shared(shared_at(memory)),
          slot_bytes(WEIGHT_BYTES + min(ROWS, inputs.rows) * ROW_BYTES),
          first(first),
          rows(rows),
          inp(table.most_inp),
          chunks((table.most_inp + CHUNK - 1) / CHUNK) {
        const int warp = threadIdx.x / WARP, k = threadIdx.x % WARP * 8;
        x = static_cast<const __nv_bfloat16*>(inputs.x) + static_cast<size_t>(first + warp) * inputs.stride + k;
#pragma unroll
        for (int i = 0; i < ROW_COPIES; i++) x_end[i] = warp + i * WARPS < rows ? table.rows[0][warp + i * WARPS].inp - k : -1;
#pragma unroll
        for (int n = 0; n < N; n++) x_rows[n] = min(static_cast<int>(threadIdx.x) % 8 + 8 * n, rows - 1) * ROW_BYTES;
    }

    __device__ __forceinline__ Shared slot() const { return shared + to; }
    __device__ __forceinline__ Shared slot_inputs() const { return shared + to + WEIGHT_BYTES; }
    // After the ring: normed inputs.
    __device__ __forceinline__ unsigned char* normed() const { return memory + STAGES * slot_bytes; }

    // A chunk of all rows' inputs into the next slot.
    __device__ __forceinline__ void copy_inputs(int chunk) const {
        if constexpr (NORM) return;
        const int warp = threadIdx.x / WARP, k = chunk * CHUNK;
#pragma unroll
        for (int i = 0; i < ROW_COPIES; i++) {
            const int row = warp + i * WARPS;
            if (row >= rows) break;
            cp_async_16(slot_inputs() + row * ROW_BYTES + 16 * swizzled_piece(warp, threadIdx.x % WARP),
                        x + static_cast<size_t>(i * WARPS) * inputs.stride + k, chunk_bytes(k, x_end[i]));
        }
    }
    __device__ __forceinline__ void copied() {
        cp_async_commit();
        to = to + slot_bytes == STAGES * slot_bytes ? 0 : to + slot_bytes;
    }
    __device__ __forceinline__ void computed() { from = from + slot_bytes == STAGES * slot_bytes ? 0 : from + slot_bytes; }
    // The stage that is to be computed is there, and the next slot is free.
    __device__ __forceinline__ void wait() const {
        cp_async_wait<STAGES - 2>();
        __syncthreads();
    }

    // This lane's row of each eight rows' inputs; of rows that there are not any other will do.
    __device__ __forceinline__ void rows_of(int chunk, Shared (&at)[N]) const {
        const Shared tile = shared + (NORM ? STAGES * slot_bytes + chunk * rows * ROW_BYTES : from + WEIGHT_BYTES);
#pragma unroll
        for (int n = 0; n < N; n++) at[n] = tile + x_rows[n];
    }
    // The same for lanes that read rows lane / 4.
    __device__ __forceinline__ void quarter_rows_of(int chunk, const unsigned char* (&at)[N]) const {
        const unsigned char* tile = memory + (NORM ? STAGES * slot_bytes + chunk * rows * ROW_BYTES : from + WEIGHT_BYTES);
#pragma unroll
        for (int n = 0; n < N; n++) at[n] = tile + min(static_cast<int>(threadIdx.x) % WARP / 4 + 8 * n, rows - 1) * ROW_BYTES;
    }

    // All inputs times the norm's weights, and the squares of each row's numbers, beyond its inputs too, because that is what a norm is of.
    // Or, for who needs no more, the inputs of some chunks.
    template <int WEIGHTS>
    __device__ __forceinline__ void norm_inputs(Table<WEIGHTS, ROWS>& table) const {
        norm_inputs(table, 0, max(chunks * PIECES, (inputs.width + 7) / 8));
    }
    template <int WEIGHTS>
    __device__ __forceinline__ void norm_inputs(Table<WEIGHTS, ROWS>& table, int first_piece, int end_piece) const {
        constexpr int AT_ONCE = 2;
        const int pieces = chunks * PIECES, of_width = (inputs.width + 7) / 8;
        for (int row = 0; row < rows; row++) {
            const float* values_at = static_cast<const float*>(inputs.x) + static_cast<size_t>(first + row) * inputs.stride;
            const int inp = table.rows[0][row].inp;
            float squares = 0.0f;
            for (int start = first_piece + threadIdx.x; start < end_piece; start += AT_ONCE * THREADS) {
                float4 values[AT_ONCE][2] = {}, by[AT_ONCE][2] = {};
#pragma unroll
                for (int i = 0; i < AT_ONCE; i++) {
                    const int piece = start + i * THREADS;
                    if (piece >= of_width) continue;
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        values[i][half] = reinterpret_cast<const float4*>(values_at)[2 * piece + half];
                        by[i][half] = __ldg(reinterpret_cast<const float4*>(inputs.norm) + 2 * piece + half);
                    }
                }
#pragma unroll
                for (int i = 0; i < AT_ONCE; i++) {
                    const int piece = start + i * THREADS, k = 8 * piece;
                    const uint4 bits = normed_piece(values[i], by[i], k, inp, inputs.width, squares);
                    if (piece >= pieces) continue;
                    unsigned char* tile = normed() + piece / PIECES * rows * ROW_BYTES + row * ROW_BYTES;
                    *reinterpret_cast<uint4*>(tile + 16 * swizzled_piece(row, piece % PIECES)) = bits;
                }
            }
            squares = warp_sum(squares);
            if (threadIdx.x % WARP == 0) table.squares[threadIdx.x / WARP][row] = squares;
        }
    }
};
