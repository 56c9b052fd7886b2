// The elastic low-rank product for few rows, one launch for up to three Linears of the same inputs:
//   y = W[:o,:i] x + b[:o] + B[:o,:r] (s A[:r,:i] x), each row with its own o, i, r and super-adapter.
//
// Decoding reads every weight once and does little with it, so what counts is that many loads are under way, from a
// kernel's first moment to its last. A block takes a tile of outputs and walks over the inputs; weights and inputs come
// through a ring of asynchronous copies, and so do adapters, but for the usual one (see `RANKS`). Weights do not depend on the
// kernel before, so a block asks for them before it waits for that one's results. See README.md for shapes, launches and bytes.
#include "few_tiles.cuh"

// Steps of a chunk that has numbers up to `end`.
__device__ __forceinline__ int steps_of(int end, int chunk) { return (min(CHUNK, end - chunk * CHUNK) + STEP - 1) / STEP; }

// One shrink: s A x for the rows of one super-adapter and a tile of its ranks, or a slice of the inputs' part of it: nobody is to wait
// for one block that walks over all inputs.
struct Shrink {
    int weight, adapter, first_rank;
    int slice, slices, first_chunk, end_chunk;
    unsigned* done;  // slices that are
};

// Walks over the slice's inputs; after it `desk` has the sums.
template <class R, int WEIGHTS, int ROWS, bool NORM>
__device__ __forceinline__ void multiply_slice(R& ring, Table<WEIGHTS, ROWS>& table, const AdapterEntry& entry, const Shrink& of,
                                               const Desk<ROWS>& desk) {
    constexpr int COUNT = TILE / WARPS;
    const int warp = threadIdx.x / WARP, group = warp % GROUPS, slice = warp / GROUPS;
    const RowCopies<COUNT> a(entry.a, entry.a_stride, of.first_rank + warp * COUNT, entry.rank, table.most_inp);
    for (int i = 0; i < STAGES - 1; i++) {
        if (of.first_chunk + i < of.end_chunk) a.copy(ring.slot(), (of.first_chunk + i) * CHUNK);
        ring.copied();
    }
    wait_for_previous_kernel();
    ring.to = 0;
    for (int i = 0; i < STAGES - 1; i++) {
        if (of.first_chunk + i < of.end_chunk) ring.copy_inputs(of.first_chunk + i);
        ring.copied();
    }
    if (NORM && of.first_chunk < of.end_chunk) ring.norm_inputs(table, of.first_chunk * PIECES, of.end_chunk * PIECES);
    float sums[R::N][4] = {};
    const Places places(group * OUTPUTS, slice, slice * (STEP / 8));
    for (int chunk = of.first_chunk; chunk < of.end_chunk; chunk++) {
        ring.wait();
        if (chunk + STAGES - 1 < of.end_chunk) {
            a.copy(ring.slot(), (chunk + STAGES - 1) * CHUNK);
            ring.copy_inputs(chunk + STAGES - 1);
        }
        ring.copied();
        if (slice < steps_of(ring.inp, chunk)) {
            Shared x[R::N];
            ring.rows_of(chunk, x);
            multiply_bf16(ring.shared + ring.from, places, x, sums);
        }
        ring.computed();
    }
    desk.put(slice, group, sums);
    __syncthreads();
}

// Who finishes the last slice adds them up, always in the same order, and leaves the ranks for the expands.
template <class R, int WEIGHTS, int ROWS, bool NORM>
__device__ void shrink(R& ring, Table<WEIGHTS, ROWS>& table, const Part& part, const Shrink& of, float* slices, unsigned* shrunk) {
    __shared__ bool last;
    bool any = false;
    for (int row = 0; row < ring.rows; row++) {
        const SegmentRow& size = table.rows[of.weight][row];
        any = any || (size.adapter == of.adapter && size.rank > of.first_rank);
    }
    const Desk<ROWS> desk = {slices};
    const AdapterEntry entry = part.adapters[of.adapter];
    Shrink own = of;
    if (!any) own.end_chunk = own.first_chunk;
    multiply_slice<R, WEIGHTS, ROWS, NORM>(ring, table, entry, own, desk);
    const size_t of_slice = static_cast<size_t>(ring.inputs.rows) * part.rank;
    float* partial = part.partial + static_cast<size_t>(ring.first) * part.rank + of.first_rank;
    if (of.slices > 1) {
        for (int at = threadIdx.x; any && at < ring.rows * TILE; at += THREADS) {
            const int row = at / TILE, rank = at % TILE;
            // The other rows' places belong to other shrinks.
            if (table.rows[of.weight][row].adapter != of.adapter) continue;
            partial[of.slice * of_slice + row * part.rank + rank] = desk.total(rank / OUTPUTS, row, rank % OUTPUTS);
        }
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) {
            last = atomicAdd(of.done, 1u) + 1 == static_cast<unsigned>(of.slices);
            if (last) *of.done = 0;
        }
        __syncthreads();
        if (!last) return;
        __threadfence();
    }
    for (int at = threadIdx.x; any && at < ring.rows * TILE; at += THREADS) {
        const int row = at / TILE, rank = of.first_rank + at % TILE;
        const SegmentRow& size = table.rows[of.weight][row];
        if (size.adapter != of.adapter || size.rank == 0) continue;
        float sum = of.slices == 1 ? desk.total(at % TILE / OUTPUTS, row, at % OUTPUTS) : 0.0f;
        for (int slice = 0; of.slices > 1 && slice < of.slices; slice++) {
            sum += __ldcg(partial + slice * of_slice + row * part.rank + at % TILE);
        }
        part.shrunk[static_cast<size_t>(ring.first + row) * part.rank + rank] = __float2bfloat16(rank < size.rank ? entry.scale * sum : 0.0f);
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) atomicAdd(shrunk, 1u);
}

// The usual adapter, one for all rows and of few ranks, does not go through the ring: its tile of B is asked for with the first weights
// and the rows' ranks as soon as they are there, each in rows of RANKS numbers.
constexpr int RANKS = 64, RANK_BYTES = 2 * RANKS;

// A tile of outputs of one Linear, or of gate and up together.
template <class R, int FORMAT, int WEIGHTS, int ROWS, bool NORM>
struct Expand {
    static constexpr int OF_WEIGHT = TILE / WEIGHTS, OF_RANKS = CHUNK / WEIGHTS;
    static constexpr int COUNT = TILE / WARPS, RANK_PIECES = RANKS / 8;
    static constexpr int RESULTS = (ROWS * OF_WEIGHT + THREADS - 1) / THREADS, ROWS_AT_ONCE = THREADS / OF_WEIGHT;
    static_assert(TILE * RANK_PIECES == THREADS, "a thread copies a piece of the tile of B");

    R& ring;
    Table<WEIGHTS, ROWS>& table;
    const Part* parts;
    int first_output;
    const unsigned* counter;  // of the shrinks, and how many there are
    unsigned shrinks;
    float* slices;
    unsigned char *b_tile, *rank_tiles;  // of the usual adapter
    bool usual;
    int chunks = 0, start = 0;  // of W, and the first one
    int of_b = 0, b_tiles = 0;  // stages over B; tiles of ranks of one super-adapter

    // Each tile begins elsewhere, so that not all of them read the same columns at the same time, which few of the memory's channels
    // may hold. Where depends on the whole weight: so a row's sums are added up in the same order whatever the batch's widths.
    __device__ __forceinline__ int chunk_of(int step) const {
        const int chunk = step + start;
        return chunk < chunks ? chunk : chunk - chunks;
    }

    __device__ __forceinline__ void copy_usual_b() const {
        const int row = threadIdx.x / RANK_PIECES, piece = threadIdx.x % RANK_PIECES, output = first_output + row % OF_WEIGHT;
        const Part& part = parts[row / OF_WEIGHT];
        const AdapterEntry entry = part.adapters[table.adapters[0]];
        const bool has = entry.b && 8 * piece < entry.b_stride && output < min(part.out, table.most_out);
        cp_async_16(shared_at(b_tile) + row * RANK_BYTES + 16 * swizzled_piece(row, piece),
                    entry.b + static_cast<size_t>(output) * entry.b_stride + 8 * piece, has ? 16 : 0);
    }
    __device__ __forceinline__ void copy_usual_ranks() const {
        for (int at = threadIdx.x; at < WEIGHTS * ring.rows * RANK_PIECES; at += THREADS) {
            const int piece = at % RANK_PIECES, row = at / RANK_PIECES % ring.rows, weight = at / RANK_PIECES / ring.rows;
            const __nv_bfloat16* from = parts[weight].shrunk + static_cast<size_t>(ring.first + row) * parts[weight].rank + 8 * piece;
            cp_async_16(shared_at(rank_tiles) + (weight * ROWS + row) * RANK_BYTES + 16 * swizzled_piece(row, piece), from,
                        chunk_bytes(8 * piece, table.rows[weight][row].rank));
        }
    }

    // A stage over B: each Linear's ranks in its part of a row.
    __device__ void copy_b(int stage) const {
        const int tile = stage % b_tiles, row = threadIdx.x / WARP * COUNT, weight = row / OF_WEIGHT;
        const AdapterEntry entry = parts[weight].adapters[table.adapters[stage / b_tiles]];
        const RowCopies<COUNT> b(entry.b, entry.b_stride, first_output + row % OF_WEIGHT, min(parts[weight].out, table.most_out),
                                 min(entry.b_stride, (tile + 1) * OF_RANKS));
        b.copy(ring.slot(), tile * OF_RANKS);
    }
    __device__ void copy_ranks(int stage) const {
        const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, weight = WEIGHTS * lane / WARP;
        const int rank = stage % b_tiles * OF_RANKS + 8 * lane % OF_RANKS, adapter = table.adapters[stage / b_tiles];
        wait_for(counter, shrinks);
        for (int row = warp; row < ring.rows; row += WARPS) {
            const SegmentRow& size = table.rows[weight][row];
            const __nv_bfloat16* from = parts[weight].shrunk + static_cast<size_t>(ring.first + row) * parts[weight].rank + rank;
            cp_async_16(ring.slot_inputs() + row * ROW_BYTES + 16 * swizzled_piece(row, lane), from,
                        size.adapter == adapter ? chunk_bytes(rank, size.rank) : 0);
        }
    }
    // The weights, or the inputs, of a stage.
    __device__ __forceinline__ void copy_weights(const WeightCopies<FORMAT, WEIGHTS>& w, int stage) const {
        if (stage < chunks) {
            w.copy(ring.slot(), chunk_of(stage));
        } else if (stage < chunks + of_b) {
            copy_b(stage - chunks);
        }
    }
    __device__ __forceinline__ void copy_inputs(int stage) const {
        if (stage < chunks) {
            ring.copy_inputs(chunk_of(stage));
        } else if (stage < chunks + of_b) {
            copy_ranks(stage - chunks);
        }
    }

    // Starts the copies of the first stages: of weights at once, of inputs after the kernel before.
    __device__ __forceinline__ void begin(const WeightCopies<FORMAT, WEIGHTS>& w) {
        for (int i = 0; i < STAGES - 1; i++) {
            copy_weights(w, i);
            if (i == 0 && usual) copy_usual_b();
            ring.copied();
        }
        wait_for_previous_kernel();
        ring.to = 0;
        for (int i = 0; i < STAGES - 1; i++) {
            copy_inputs(i);
            ring.copied();
        }
        if constexpr (NORM) ring.norm_inputs(table);
    }
    // A stage over W.
    __device__ __forceinline__ void multiply(int chunk, int group, int slice, const Places& places, float (&sums)[R::N][4]) {
        if (slice < steps_of(ring.inp, chunk)) {
            if constexpr (FORMAT == BF16) {
                Shared x[R::N];
                ring.rows_of(chunk, x);
                multiply_bf16(ring.shared + ring.from, places, x, sums);
            } else {
                const unsigned char* x[R::N];
                ring.quarter_rows_of(chunk, x);
                multiply_blocks<FORMAT>(ring.memory + ring.from, group * OUTPUTS, x, slice, sums);
            }
        }
        ring.computed();
    }
    // All stages over W. The shrinks are looked after two stages before the ranks are asked for, and those while the last stages
    // are on their way, so that nothing waits for either.
    __device__ __forceinline__ void multiply_all(const WeightCopies<FORMAT, WEIGHTS>& w, int group, int slice, const Places& places,
                                                 float (&sums)[R::N][4]) {
        const int ask_at = max(chunks - STAGES, 0), look_at = max(ask_at - 2, 0);
        unsigned shrunk = 0;
        int chunk = chunk_of(0), next = STAGES - 1 < chunks ? chunk_of(STAGES - 1) : 0, stage = 0;
        for (; stage + STAGES - 1 < chunks; stage++) {
            ring.wait();
            w.copy(ring.slot(), next);
            ring.copy_inputs(next);
            if (usual && stage == look_at) shrunk = counted(counter);
            if (usual && stage == ask_at) {
                if (shrunk < shrinks) wait_for(counter, shrinks);
                copy_usual_ranks();
            }
            ring.copied();
            multiply(chunk, group, slice, places, sums);
            chunk = chunk + 1 == chunks ? 0 : chunk + 1;
            next = next + 1 == chunks ? 0 : next + 1;
        }
        for (; stage < chunks; stage++) {
            ring.wait();
            copy_weights(w, stage + STAGES - 1);
            copy_inputs(stage + STAGES - 1);
            if (usual && stage == ask_at && ask_at + STAGES - 1 >= chunks) {
                wait_for(counter, shrinks);
                copy_usual_ranks();
            }
            ring.copied();
            multiply(chunk_of(stage), group, slice, places, sums);
        }
    }

    // B t, by the first slice of each group.
    __device__ __forceinline__ void add_usual(int group, int slice, float (&sums)[R::N][4]) const {
        cp_async_wait<0>();
        __syncthreads();
        if (slice > 0) return;
        const int lane = threadIdx.x % WARP, w_row = group * OUTPUTS + lane % 16, weight = WEIGHTS == 2 ? group : 0;
        const Shared w = shared_at(b_tile) + w_row * RANK_BYTES, t = shared_at(rank_tiles) + weight * ROWS * RANK_BYTES;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            if (half * (RANKS / 2) >= table.most_rank) break;
            unsigned a[2][4];
#pragma unroll
            for (int i = 0; i < 2; i++) ldmatrix_x4(a[i], w + 16 * swizzled_piece(w_row, 4 * half + 2 * i + lane / 16));
#pragma unroll
            for (int n = 0; n < R::N; n++) {
                const int row = min(lane % 8 + 8 * n, ring.rows - 1);
                unsigned b[4];
                ldmatrix_x4(b, t + row * RANK_BYTES + 16 * swizzled_piece(row, 4 * half + lane / 8));
                mma_m16n8k16(sums[n], a[0], b[0], b[1]);
                mma_m16n8k16(sums[n], a[1], b[2], b[3]);
            }
        }
    }
    // The same through the ring, for each of the rows' super-adapters.
    __device__ void add_adapters(int group, int slice, float (&sums)[R::N][4]) {
        const int weight = WEIGHTS == 2 ? group : 0;
        for (int at = 0; at < of_b; at++) {
            ring.wait();
            if (at + STAGES - 1 < of_b) copy_b(at + STAGES - 1), copy_ranks(at + STAGES - 1);
            ring.copied();
            if (slice * STEP < min(OF_RANKS, table.most_rank - at % b_tiles * OF_RANKS)) {
                Shared x[R::N];
#pragma unroll
                for (int n = 0; n < R::N; n++) x[n] = ring.shared + ring.from + WEIGHT_BYTES + ring.x_rows[n];
                // B stands at the beginning of its rows, the ranks at their Linear's part.
                Places places(group * OUTPUTS, slice, weight * (OF_RANKS / 8) + slice * (STEP / 8));
                multiply_bf16(ring.shared + ring.from, places, x, sums);
            }
            ring.computed();
        }
    }

    __device__ __forceinline__ void run(bool onto) {
        const int warp = threadIdx.x / WARP, group = warp % GROUPS, slice = warp / GROUPS;
        const WeightCopies<FORMAT, WEIGHTS> w(parts, first_output, table.most_out, table.most_inp);
        begin(w);
        const int output = first_output + threadIdx.x % OF_WEIGHT, first_row = threadIdx.x / OF_WEIGHT;
        float before[RESULTS] = {};
        // Asked for early, where registers allow it.
        if (FORMAT == BF16 && onto) read_before(output, first_row, before);
        float sums[R::N][4] = {};
        multiply_all(w, group, slice, Places(group * OUTPUTS, slice, slice * (STEP / 8)), sums);
        if (FORMAT != BF16 && onto) read_before(output, first_row, before);
        if (usual) {
            add_usual(group, slice, sums);
        } else {
            add_adapters(group, slice, sums);
        }
        const Desk<ROWS> desk = {slices};
        desk.put(slice, group, sums);
        __syncthreads();
#pragma unroll
        for (int i = 0; i < RESULTS; i++) {
            const int row = first_row + i * ROWS_AT_ONCE;
            if (row < ring.rows && output < parts[0].out) write(desk, row, output, before[i]);
        }
    }

    // What results are added to; a thread has an output of some rows.
    __device__ __forceinline__ void read_before(int output, int first_row, float (&before)[RESULTS]) const {
        if (WEIGHTS == 2 || output >= parts[0].out) return;
        const float* y = static_cast<const float*>(parts[0].y) + static_cast<size_t>(ring.first) * parts[0].y_stride + output;
#pragma unroll
        for (int i = 0; i < RESULTS; i++) {
            const int row = first_row + i * ROWS_AT_ONCE;
            if (row < ring.rows) before[i] = y[static_cast<size_t>(row) * parts[0].y_stride];
        }
    }

    __device__ __forceinline__ void write(const Desk<ROWS>& desk, int row, int output, float before) const {
        const Part& part = parts[0];
        const float norm = NORM ? norm_of(row) : 1.0f;
        float values[WEIGHTS];
#pragma unroll
        for (int n = 0; n < WEIGHTS; n++) {
            const float* bias = parts[n].bias;
            const int of_tile = n * OF_WEIGHT + output - first_output;
            const float sum = norm * desk.total(of_tile / OUTPUTS, row, of_tile % OUTPUTS);
            values[n] = output < table.rows[n][row].out ? sum + (bias ? bias[output] : 0.0f) : 0.0f;
        }
        const size_t at = static_cast<size_t>(ring.first + row) * part.y_stride + output;
        if constexpr (WEIGHTS == 2) {
            static_cast<__nv_bfloat16*>(part.y)[at] = __float2bfloat16(silu(values[0]) * values[1]);
        } else {
            static_cast<float*>(part.y)[at] = before + values[0];
        }
    }

    // 1 / sqrt(mean of the squares of a row's inputs + eps)
    __device__ __forceinline__ float norm_of(int row) const {
        float all = 0.0f;
#pragma unroll
        for (int warp = 0; warp < WARPS; warp++) all += table.squares[warp][row];
        return rsqrtf(all / ring.inputs.width + ring.inputs.eps);
    }
};

// Slices that so many inputs are cut into: by the weight, so that ranks are added up in the same order whatever the batch's widths.
__device__ __forceinline__ int slices_of(int inp, int shrink_chunks) {
    const int chunks = (inp + CHUNK - 1) / CHUNK;
    return chunks <= shrink_chunks ? 1 : (chunks + shrink_chunks - 1) / shrink_chunks;
}

// Blocks of shrinks come first: whoever waits, waits for blocks that began before.
template <int FORMAT, int WEIGHTS, int ROWS, bool NORM>
__device__ __forceinline__ void work(const Inputs& inputs, const Parts& parts, int part_count, Counters* counters, int shrink_chunks,
                                     bool onto) {
    DYN_SHARED(uint4, memory);
    __shared__ Table<WEIGHTS, ROWS> table;
    __shared__ float slices[SLICES * Desk<ROWS>::NUMBERS];
    __shared__ uint4 b_tile[TILE * RANK_BYTES / 16], rank_tiles[WEIGHTS * ROWS * RANK_BYTES / 16];
    using ThisRing = Ring<ROWS, NORM>;
    using ThisExpand = Expand<ThisRing, FORMAT, WEIGHTS, ROWS, NORM>;
    let_next_kernel_begin();
    const int row_blocks = (inputs.rows + ROWS - 1) / ROWS, row_block = static_cast<int>(blockIdx.x) % row_blocks;
    int item = static_cast<int>(blockIdx.x) / row_blocks, part = 0;
    // Shrinks, the blocks that they take, and those of the parts before the block's own.
    int shrinks = 0, shrink_blocks = 0, before = 0;
    for (int n = 0; n < part_count; n++) {
        const int of_part = parts.of[n].adapter_count * (parts.of[n].rank / TILE);
        shrinks += of_part, shrink_blocks += of_part * slices_of(parts.of[n].inp, shrink_chunks);
    }
    const bool shrinking = item < shrink_blocks;
    if (shrinking) {
        for (;; part++) {
            const int of_part = parts.of[part].adapter_count * (parts.of[part].rank / TILE);
            const int blocks = of_part * slices_of(parts.of[part].inp, shrink_chunks);
            if (item < blocks) break;
            item -= blocks, before += of_part;
        }
    } else {
        item -= shrink_blocks;
        for (; WEIGHTS == 1 && item >= (parts.of[part].out + TILE - 1) / TILE; part++) item -= (parts.of[part].out + TILE - 1) / TILE;
    }
    const Part* of = WEIGHTS == 1 ? parts.of + part : parts.of;
    const int first = row_block * ROWS, rows = min(ROWS, inputs.rows - first);
    describe(table, of, first, rows);
    ThisRing ring(inputs, table, reinterpret_cast<unsigned char*>(memory), first, rows);
    if (shrinking) {
        const int weight = WEIGHTS == 1 ? 0 : part, slice_count = slices_of(of[weight].inp, shrink_chunks), tiles = of[weight].rank / TILE;
        const int number = item / slice_count, slice = item % slice_count;
        const Shrink own = {weight,
                            number / tiles,
                            number % tiles * TILE,
                            slice,
                            slice_count,
                            slice * shrink_chunks,
                            min(ring.chunks, (slice + 1) * shrink_chunks),
                            counters->slices + (before + number) * row_blocks + row_block};
        shrink<ThisRing, WEIGHTS, ROWS, NORM>(ring, table, of[weight], own, slices, &counters->shrunk);
    } else {
        const int first_output = item * (TILE / WEIGHTS);
        const bool idle = first_output >= table.most_out;
        const bool usual = !idle && table.adapter_count == 1 && table.most_rank <= RANKS && ring.chunks > 0;
        ThisExpand expand = {ring, table, of, first_output, &counters->shrunk, static_cast<unsigned>(shrinks * row_blocks), slices,
                             reinterpret_cast<unsigned char*>(b_tile), reinterpret_cast<unsigned char*>(rank_tiles), usual};
        expand.chunks = idle ? 0 : ring.chunks;
        expand.start = item % ((of->inp + CHUNK - 1) / CHUNK);
        if (expand.start >= expand.chunks) expand.start = 0;
        expand.b_tiles = (table.most_rank + ThisExpand::OF_RANKS - 1) / ThisExpand::OF_RANKS;
        expand.of_b = idle || usual ? 0 : table.adapter_count * expand.b_tiles;
        expand.run(onto);
    }
    // The last one to leave makes the counters ready for the next launch.
    if (shrinks > 0 && threadIdx.x == 0 && atomicAdd(&counters->left, 1u) == gridDim.x - 1) counters->shrunk = counters->left = 0;
}

// `shrink_chunks`: chunks of a slice of a shrink's inputs. Blocks: for each ROWS rows those of all shrinks, then those of all expands; see
// `work`. Shared memory: the ring's slots, then normed inputs.
#define FEW(NAME, FORMAT, WEIGHTS, ROWS, NORM)                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS, (ROWS) * ((FORMAT) == INT8 ? 2 : 1) >= 32 ? 1 : (ROWS) == 16 || (FORMAT) == INT8 ? 2 : 3)  \
        NAME(const Inputs inputs, const Parts parts, int part_count, Counters* counters, int shrink_chunks, int onto) { \
        work<FORMAT, WEIGHTS, ROWS, NORM>(inputs, parts, part_count, counters, shrink_chunks, onto != 0);         \
    }

#define FORMATS(NAME, WEIGHTS, ROWS, NORM)      \
    FEW(NAME, BF16, WEIGHTS, ROWS, NORM)        \
    FEW(NAME##_int8, INT8, WEIGHTS, ROWS, NORM) \
    FEW(NAME##_int4, INT4, WEIGHTS, ROWS, NORM)

FORMATS(linear_few_8, 1, 8, false)
FORMATS(linear_few_16, 1, 16, false)
FORMATS(linear_few_32, 1, 32, false)
FORMATS(gate_up_few_8, 2, 8, false)
FORMATS(gate_up_few_16, 2, 16, false)
FORMATS(gate_up_few_32, 2, 32, false)
FORMATS(normed_linear_few, 1, 8, true)
FORMATS(normed_gate_up_few, 2, 8, true)
