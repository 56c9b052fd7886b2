// The elastic low-rank product of few_rows.cu for large weights in bf16 and up to eight rows, on compute capability 9.0:
//   y = W[:o,:i] x + b[:o] + B[:o,:r] (s A[:r,:i] x), each row with its own o, i, r and super-adapter.
//
// A multiprocessor has one block, and all of the launch's outputs are dealt out to the blocks, so that each has as many bytes to read as the
// others. Weights come through a ring of slots by the bulk copy engine, 2 KB of a row at a time: of 1 KB an H200 reads 7 % less, of
// 512 bytes half. Weights do not depend on the kernel before, so the ring is full when that one's results are there.
#include "few_tiles.cuh"
#include "wgmma.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(LONAS_EMULATED)
#define LONAS_STREAMS 1
#endif

// Inputs of a slot; bytes from row to row of one, so that what a tensor core's lanes read together lies in different banks.
constexpr int SPAN = 1024, PITCH = 2 * SPAN + 16, SLOT_BYTES = OUTPUTS * PITCH;
constexpr int ROWS = COLUMNS, MOST_SLOTS = 6;
// Inputs of a slot that are a warp's.
constexpr int OF_WARP = SPAN / WARPS;
// The warps that multiply, and one that copies: so neither waits for the other's next step.
constexpr int ALL_THREADS = THREADS + WARP;

// How a block's shared memory is laid out, after the ring; `Streamed` in src/backend/cuda/few.rs. `row_bytes`: of a row of inputs; `units`:
// the most tiles of outputs that a block has; `ranks`: of the launch, a multiple of 32.
struct Room {
    int slots, row_bytes, units, ranks;
};

// The weights of the next such launch: up to two matrices, of each of which a tile takes `rows` rows of `row_bytes`; no matrices where
// there is none. `Ahead` in src/backend/cuda/streamed.rs.
struct Ahead {
    const unsigned char* of[2];
    int rows, row_bytes, tiles, own_tiles;
};

#ifdef LONAS_STREAMS

// What a slot's barriers tell: that its copies are there, and that all warps have read it.
struct Barriers {
    unsigned long long full[MOST_SLOTS], empty[MOST_SLOTS];
};

#ifndef LONAS_EMULATED

// All threads that multiply.
#define MEET() asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory")

__device__ __forceinline__ void make(Barriers& barriers) {
    if (threadIdx.x == 0) {
        for (int i = 0; i < MOST_SLOTS; i++) barrier_init(barriers.full + i, 1), barrier_init(barriers.empty + i, WARPS);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        fence_shared_writes();
    }
    __syncthreads();
}
__device__ __forceinline__ void expect_bytes(unsigned long long* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
__device__ __forceinline__ void copy_row(Shared to, const void* from, int bytes, unsigned long long* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from), "r"(bytes),
                 "r"(shared_address(barrier))
                 : "memory");
}

#else

// The emulator has no such barriers and no engine that copies: the first warp copies pieces of 16 bytes between barriers of all, and the
// last warp leaves the block.
#define MEET() __syncthreads()
inline void make(Barriers&) { __syncthreads(); }
inline void expect_bytes(unsigned long long*, int) {}
inline void copy_row(Shared to, const void* from, int bytes, unsigned long long*) {
    for (int at = 0; at < bytes; at += 16) cp_async_16(to + at, static_cast<const unsigned char*>(from) + at, 16);
    cp_async_commit();
}

#endif

// What a block knows of the rows, of every Linear of the launch.
struct Rows {
    SegmentRow of[MOST_PARTS][ROWS];
    int most_out[MOST_PARTS], most_inp, most_rank;
    int adapter, adapters;  // the last one that a row has, and whether there are others: 0, 1, or 2 for more
    float squares[WARPS][ROWS];
};

__device__ __forceinline__ void describe(Rows& known, const Parts& parts, int part_count, int rows) {
    const int lane = threadIdx.x % WARP;
    if (threadIdx.x < WARP) {
        int most_inp = 0, most_rank = 0, adapter = -1;
        for (int n = 0; n < part_count; n++) {
            const Part& part = parts.of[n];
            SegmentRow size = {0, 0, 0, -1};
            if (lane < rows) size = part.sizes ? part.sizes[lane] : SegmentRow{part.out, part.inp, 0, -1};
            if (lane < ROWS) known.of[n][lane] = size;
            const int most_out = warp_max(size.out);
            if (lane == 0) known.most_out[n] = most_out;
            most_inp = max(most_inp, size.inp), most_rank = max(most_rank, size.rank);
            if (size.rank > 0) adapter = size.adapter;
        }
        const int highest = warp_max(adapter);
        const bool others = __ballot_sync(ALL_LANES, adapter >= 0 && adapter != highest) != 0;
        most_inp = warp_max(most_inp), most_rank = warp_max(most_rank);
        if (lane == 0) {
            known.most_inp = most_inp, known.most_rank = most_rank;
            known.adapter = highest, known.adapters = highest < 0 ? 0 : others ? 2 : 1;
        }
    }
    __syncthreads();
}

// What a block multiplies next: sixteen rows of a matrix, or eight of gate and of up, by the inputs from `begin` to `end`.
struct Unit {
    int part, first, adapter;  // of A, where it is one of a super-adapter's ranks; else -1
    int begin, end;
};

// The order of a block's units: its shrinks, then its tiles of outputs. Tiles are dealt out from the last block down; blocks that get one
// less than others shrink, if that is not more work. All blocks run at once, so that all may wait for all shrinks; but on the
// emulator, which runs one after the other, where the first does all of them.
template <int WEIGHTS>
struct Deal {
    static constexpr int OF_WEIGHT = OUTPUTS / WEIGHTS;

    const Parts& parts;
    const Rows& known;
    int part_count, tiles, shrinkers, shrinks, own_shrinks, own_tiles;

    __device__ __forceinline__ Deal(const Parts& parts, const Rows& known, int part_count)
        : parts(parts), known(known), part_count(part_count), tiles(0), shrinks(0) {
        const int blocks = gridDim.x, block = blockIdx.x;
        for (int n = 0; n < part_count; n++) shrinks += shrinks_of(n);
        for (int n = 0; n < (WEIGHTS == 2 ? 1 : part_count); n++) tiles += tiles_of(n);
        [[maybe_unused]] const int of_tile = spans(), free = blocks - tiles % blocks;
#ifdef LONAS_EMULATED
        shrinkers = 1;
#else
        shrinkers = shrinks <= free * of_tile ? free : blocks;
#endif
        own_shrinks = block < shrinkers ? (shrinks - block + shrinkers - 1) / shrinkers : 0;
        own_tiles = (tiles - (blocks - 1 - block) + blocks - 1) / blocks;
    }
    __device__ __forceinline__ int spans() const { return (known.most_inp + SPAN - 1) / SPAN; }
    __device__ __forceinline__ int tiles_of(int part) const { return (known.most_out[part] + OF_WEIGHT - 1) / OF_WEIGHT; }
    // By the weight, not by the rows: so ranks are added up in the same order whatever the batch's widths.
    __device__ __forceinline__ int slices_of(int part) const { return (parts.of[part].inp + SPAN - 1) / SPAN; }
    __device__ __forceinline__ int shrinks_of(int part) const {
        return parts.of[part].adapter_count * (parts.of[part].rank / OUTPUTS) * slices_of(part);
    }

    // Whether a row has such ranks.
    __device__ __forceinline__ bool takes_part(const Unit& unit) const {
        bool any = false;
        for (int row = 0; row < ROWS; row++) {
            const SegmentRow& size = known.of[unit.part][row];
            any = any || (size.adapter == unit.adapter && size.rank > unit.first);
        }
        return any;
    }

    __device__ __forceinline__ int units() const { return own_shrinks + own_tiles; }
    __device__ __forceinline__ Unit unit(int index) const {
        const int block = blockIdx.x, blocks = gridDim.x;
        int part = 0;
        if (index < own_shrinks) {
            int at = block + index * shrinkers;
            for (; at >= shrinks_of(part); part++) at -= shrinks_of(part);
            const int slices = slices_of(part), of_adapter = parts.of[part].rank / OUTPUTS, number = at / slices, slice = at % slices;
            const int begin = slice * SPAN;
            const Unit unit = {part, number % of_adapter * OUTPUTS, number / of_adapter, begin, min(begin + SPAN, known.most_inp)};
            return takes_part(unit) ? unit : Unit{unit.part, unit.first, unit.adapter, begin, begin};
        }
        int at = blocks - 1 - block + (index - own_shrinks) * blocks;
        for (; WEIGHTS == 1 && at >= tiles_of(part); part++) at -= tiles_of(part);
        return {part, at * OF_WEIGHT, -1, 0, known.most_inp};
    }
};

// Where a lane of the copying warp takes its row of a unit from, and how far it is.
template <int WEIGHTS>
struct Copier {
    const Deal<WEIGHTS>& deal;
    int index, begin, end;
    const __nv_bfloat16* row;

    __device__ __forceinline__ explicit Copier(const Deal<WEIGHTS>& deal) : deal(deal), index(-1), begin(0), end(0), row(nullptr) { next_unit(); }

    // Rows beyond a matrix's last are that one again: nobody looks at their results.
    __device__ __forceinline__ void next_unit() {
        for (index++; index < deal.units(); index++) {
            const Unit unit = deal.unit(index);
            begin = unit.begin, end = unit.end;
            if (begin >= end) continue;
            const int lane = threadIdx.x % OUTPUTS;
            if (unit.adapter >= 0) {
                const AdapterEntry entry = deal.parts.of[unit.part].adapters[unit.adapter];
                // A super-adapter that leaves the Linear alone, or has fewer ranks: anything that can be read will do.
                const Part& part = deal.parts.of[unit.part];
                row = entry.a && entry.rank > 0 ? entry.a + static_cast<size_t>(min(unit.first + lane, entry.rank - 1)) * entry.a_stride
                                                : static_cast<const __nv_bfloat16*>(part.w);
            } else {
                const Part& part = deal.parts.of[unit.part + lane / Deal<WEIGHTS>::OF_WEIGHT];
                const int output = min(unit.first + lane % Deal<WEIGHTS>::OF_WEIGHT, part.out - 1);
                row = static_cast<const __nv_bfloat16*>(part.w) + static_cast<size_t>(output) * part.w_stride;
            }
            return;
        }
    }
    // A span of the unit, by a whole warp.
    __device__ __forceinline__ void copy(Shared slot, unsigned long long* barrier) {
        if (index >= deal.units()) return;
        const int lane = threadIdx.x % WARP, bytes = (min(SPAN, end - begin) * 2 + 15) / 16 * 16;
        if (lane == 0) expect_bytes(barrier, OUTPUTS * bytes);
        __syncwarp();
        if (lane < OUTPUTS) copy_row(slot + lane * PITCH, row + begin, bytes, barrier);
        begin += SPAN;
        if (begin >= end) next_unit();
    }
};

// Numbers of inputs that lie in shared memory, with zeros after them up to what a step of tensor cores reads.
__device__ __forceinline__ int padded(int inp) { return (inp + 31) / 32 * 32; }

// A warp's part of a span: `w` the slot, `x` this lane's row of inputs at the span's begin.
__device__ __forceinline__ void multiply_span(Shared w, Shared x, int inputs, float (&sums)[2][4]) {
    constexpr int STEPS = OF_WARP / 32;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, left = inputs - warp * OF_WARP;
    const Shared a_at = w + lane % 16 * PITCH + warp * OF_WARP * 2 + lane / 16 * 16, b_at = x + warp * OF_WARP * 2 + lane / 8 * 16;
    unsigned b[STEPS][4], a[2 * STEPS][4];
    if (left >= OF_WARP) {
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            ldmatrix_x4(b[step], b_at + step * 64);
            ldmatrix_x4(a[2 * step], a_at + step * 64);
            ldmatrix_x4(a[2 * step + 1], a_at + step * 64 + 32);
        }
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            mma_m16n8k16(sums[0], a[2 * step], b[step][0], b[step][1]);
            mma_m16n8k16(sums[1], a[2 * step + 1], b[step][2], b[step][3]);
        }
        return;
    }
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        const int of_step = left - step * 32;
        if (of_step <= 0) break;
        ldmatrix_x4(b[0], b_at + step * 64);
        ldmatrix_x4(a[0], a_at + step * 64);
        // Beyond the weights that were copied may lie what is no number.
        if (of_step <= 8) a[0][2] = a[0][3] = 0;
        mma_m16n8k16(sums[0], a[0], b[0][0], b[0][1]);
        if (of_step <= 16) break;
        ldmatrix_x4(a[1], a_at + step * 64 + 32);
        if (of_step <= 24) a[1][2] = a[1][3] = 0;
        mma_m16n8k16(sums[1], a[1], b[0][2], b[0][3]);
    }
}

// All that a block has in shared memory after the ring.
struct Kept {
    unsigned char* x;
    float *totals, *before;  // [tile][row][output]: sums, and what results are added to
    float* ranks;            // [part][row][rank]
    __nv_bfloat16* b;        // [tile][output][rank]: of the usual super-adapter, the only one of all rows
};

template <int WEIGHTS, bool NORM>
struct Streamed {
    static constexpr int OF_WEIGHT = OUTPUTS / WEIGHTS;

    const Inputs& inputs;
    const Parts& parts;
    Rows& known;
    const Deal<WEIGHTS>& deal;
    const Room& room;
    const Kept& kept;
    float* desks;  // two of [warp][row][output]
    int part_count;

    // Asks for B's tiles, and for what results are added to; both are looked at after everything else.
    __device__ __forceinline__ bool usual() const { return known.adapters == 1; }
    __device__ __forceinline__ void copy_b() const {
        const int pieces = room.ranks / 8, all = deal.own_tiles * OUTPUTS * pieces;
        for (int at = threadIdx.x; at < all; at += THREADS) {
            const int piece = at % pieces, lane = at / pieces % OUTPUTS, tile = at / pieces / OUTPUTS;
            const Unit unit = deal.unit(deal.own_shrinks + tile);
            const Part& part = parts.of[unit.part + lane / OF_WEIGHT];
            const AdapterEntry entry = part.adapter_count > 0 ? part.adapters[known.adapter] : AdapterEntry{};
            const int output = unit.first + lane % OF_WEIGHT;
            const bool has = entry.b && 8 * piece < entry.b_stride && output < part.out;
            cp_async_16(reinterpret_cast<unsigned char*>(kept.b + (tile * OUTPUTS + lane) * room.ranks + 8 * piece),
                        has ? static_cast<const void*>(entry.b + static_cast<size_t>(output) * entry.b_stride + 8 * piece) : parts.of[0].w, has ? 16 : 0);
        }
    }

    // What results are added to, of this block's tiles.
    __device__ __forceinline__ void load_before() const {
        for (int at = threadIdx.x; at < deal.own_tiles * inputs.rows * OUTPUTS; at += THREADS) {
            const int lane = at % OUTPUTS, row = at / OUTPUTS % inputs.rows, tile = at / OUTPUTS / inputs.rows;
            const Unit unit = deal.unit(deal.own_shrinks + tile);
            const Part& part = parts.of[unit.part];
            if (unit.first + lane >= part.out) continue;
            kept.before[(tile * ROWS + row) * OUTPUTS + lane] =
                static_cast<const float*>(part.y)[static_cast<size_t>(row) * part.y_stride + unit.first + lane];
        }
    }

    // All inputs, as far as a row has them and then zeros.
    __device__ __forceinline__ void load_inputs() const {
        const int pieces = room.row_bytes / 16 - 1;
        if constexpr (!NORM) {
            for (int at = threadIdx.x; at < inputs.rows * pieces; at += THREADS) {
                const int row = at / pieces, k = at % pieces * 8;
                const __nv_bfloat16* from = static_cast<const __nv_bfloat16*>(inputs.x) + static_cast<size_t>(row) * inputs.stride + k;
                const int bytes = chunk_bytes(k, known.of[0][row].inp);
                cp_async_16(kept.x + row * room.row_bytes + k * 2, bytes > 0 ? from : static_cast<const __nv_bfloat16*>(inputs.x), bytes);
            }
            return;
        }
        const int of_width = (inputs.width + 7) / 8, all = max(pieces, of_width);
        for (int row = 0; row < inputs.rows; row++) {
            const float* values_at = static_cast<const float*>(inputs.x) + static_cast<size_t>(row) * inputs.stride;
            float squares = 0.0f;
            for (int piece = threadIdx.x; piece < all; piece += THREADS) {
                float4 values[2] = {}, by[2] = {};
                if (piece < of_width) {
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        values[half] = reinterpret_cast<const float4*>(values_at)[2 * piece + half];
                        by[half] = __ldg(reinterpret_cast<const float4*>(inputs.norm) + 2 * piece + half);
                    }
                }
                const uint4 bits = normed_piece(values, by, 8 * piece, known.of[0][row].inp, inputs.width, squares);
                if (piece < pieces) *reinterpret_cast<uint4*>(kept.x + row * room.row_bytes + 16 * piece) = bits;
            }
            squares = warp_sum(squares);
            if (threadIdx.x % WARP == 0) known.squares[threadIdx.x / WARP][row] = squares;
        }
    }

    // What the warps left on a desk, of a thread's row and output.
    __device__ __forceinline__ float total(const float* desk) const {
        float sum = 0.0f;
#pragma unroll
        for (int warp = 0; warp < WARPS; warp++) sum += desk[warp * ROWS * OUTPUTS + threadIdx.x];
        return sum;
    }
    // Puts a unit away, after the barrier by which all warps are done with it.
    __device__ __forceinline__ void finish(int index, const float* desk, unsigned* shrunk) const {
        const int row = threadIdx.x / OUTPUTS, place = threadIdx.x % OUTPUTS;
        if (threadIdx.x >= ROWS * OUTPUTS) return;
        if (index >= deal.own_shrinks) {
            kept.totals[((index - deal.own_shrinks) * ROWS + row) * OUTPUTS + place] = total(desk);
            return;
        }
        const Unit unit = deal.unit(index);
        const Part& part = parts.of[unit.part];
        if (row < inputs.rows && known.of[unit.part][row].adapter == unit.adapter) {
            // None of inputs that no row has.
            const float sum = unit.begin < unit.end ? total(desk) : 0.0f;
            part.partial[(static_cast<size_t>(unit.begin / SPAN) * inputs.rows + row) * part.rank + unit.first + place] = sum;
        }
        __threadfence();
        __syncwarp();
        if (threadIdx.x % WARP == 0) atomicAdd(shrunk, 1u);
    }

    __device__ __forceinline__ void put(float* desk, const float (&sums)[2][4]) const {
        const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
        float* to = desk + warp * ROWS * OUTPUTS + lane / 4;
#pragma unroll
        for (int e = 0; e < 4; e++) to[(lane % 4 * 2 + e % 2) * OUTPUTS + e / 2 * 8] = sums[0][e] + sums[1][e];
    }

    // The ranks of all rows: what shrinks left, once all are done.
    __device__ __forceinline__ void load_ranks(const unsigned* shrunk) const {
        constexpr int ARRIVALS = ROWS * OUTPUTS / WARP;
        wait_for(shrunk, static_cast<unsigned>(deal.shrinks * ARRIVALS));
        for (int at = threadIdx.x; at < part_count * inputs.rows * room.ranks; at += THREADS) {
            const int rank = at % room.ranks, row = at / room.ranks % inputs.rows, n = at / room.ranks / inputs.rows;
            const Part& part = parts.of[n];
            const SegmentRow& size = known.of[n][row];
            float sum = 0.0f;
            if (rank < size.rank) {
                const size_t of_slice = static_cast<size_t>(inputs.rows) * part.rank;
                const float* from = part.partial + static_cast<size_t>(row) * part.rank + rank;
                for (int slice = 0; slice < deal.slices_of(n); slice++) sum += __ldcg(from + slice * of_slice);
                sum *= part.adapters[size.adapter].scale;
            }
            kept.ranks[(n * ROWS + row) * room.ranks + rank] = sum;
        }
        MEET();
    }

    // B t of one row and output of a tile.
    __device__ __forceinline__ float expanded(int n, int row, int tile, int lane, int output) const {
        const SegmentRow& size = known.of[n][row];
        if (size.rank == 0) return 0.0f;
        const float* t = kept.ranks + (n * ROWS + row) * room.ranks;
        const AdapterEntry entry = parts.of[n].adapters[size.adapter];
        const __nv_bfloat16* b = usual() ? kept.b + (tile * OUTPUTS + lane) * room.ranks : entry.b + static_cast<size_t>(output) * entry.b_stride;
        float sum = 0.0f;
        for (int rank = 0; rank < size.rank; rank += 8) {
            float eight[8];
            load_eight(b + rank, eight);
            // Ranks that the row does not have are zero.
#pragma unroll
            for (int i = 0; i < 8; i++) sum += eight[i] * t[rank + i];
        }
        return sum;
    }

    // 1 / sqrt(mean of the squares of a row's inputs + eps)
    __device__ __forceinline__ float norm_of(int row) const {
        if constexpr (!NORM) return 1.0f;
        float all = 0.0f;
#pragma unroll
        for (int warp = 0; warp < WARPS; warp++) all += known.squares[warp][row];
        return rsqrtf(all / inputs.width + inputs.eps);
    }

    __device__ __forceinline__ float value(int n, int row, int tile, int lane, int output) const {
        if (output >= known.of[n][row].out) return 0.0f;
        const float* bias = parts.of[n].bias;
        const float sum = kept.totals[(tile * ROWS + row) * OUTPUTS + lane] + expanded(n, row, tile, lane, output);
        return norm_of(row) * sum + (bias ? bias[output] : 0.0f);
    }

    __device__ __forceinline__ void write(const Part& part, int row, int output, float value) const {
        const size_t at = static_cast<size_t>(row) * part.y_stride + output;
        if constexpr (WEIGHTS == 2) {
            static_cast<__nv_bfloat16*>(part.y)[at] = __float2bfloat16(value);
        } else {
            static_cast<float*>(part.y)[at] = value;
        }
    }

    __device__ __forceinline__ void write_all(bool onto) const {
        const int of_tile = inputs.rows * OF_WEIGHT;
        for (int at = threadIdx.x; at < deal.own_tiles * of_tile; at += THREADS) {
            const int tile = at / of_tile, row = at % of_tile / OF_WEIGHT, lane = at % OF_WEIGHT;
            const Unit unit = deal.unit(deal.own_shrinks + tile);
            const int output = unit.first + lane;
            if (output >= parts.of[unit.part].out) continue;
            float of_output = value(unit.part, row, tile, lane, output);
            if constexpr (WEIGHTS == 2) of_output = silu(of_output) * value(1, row, tile, OF_WEIGHT + lane, output);
            if (WEIGHTS == 1 && onto) of_output += kept.before[(tile * ROWS + row) * OUTPUTS + lane];
            write(parts.of[unit.part], row, output, of_output);
        }
        // Zeros of outputs that no row has; where results are added to others, those stay.
        for (int n = 0; !onto && n < (WEIGHTS == 2 ? 1 : part_count); n++) {
            const Part& part = parts.of[n];
            const int first = deal.tiles_of(n) * OF_WEIGHT;
            for (int output = first + blockIdx.x * THREADS + threadIdx.x; output < part.out; output += gridDim.x * THREADS) {
                for (int row = 0; row < inputs.rows; row++) write(part, row, output, 0.0f);
            }
        }
    }

    // What does not wait for weights: B's tiles do not depend on the kernel before, inputs do.
    __device__ __forceinline__ void begin(bool onto) const {
        if (usual()) copy_b();
        wait_for_previous_kernel();
        load_inputs();
        cp_async_commit();
        if (WEIGHTS == 1 && onto) load_before();
        cp_async_wait<0>();
        MEET();
    }

    // The threads that multiply.
    __device__ __forceinline__ void run(Shared ring, [[maybe_unused]] Barriers& barriers, unsigned* shrunk, bool onto) {
#ifdef LONAS_EMULATED
        Copier<WEIGHTS> copier(deal);
#endif
        begin(onto);
        const Shared x = shared_at(kept.x) + min(static_cast<int>(threadIdx.x) % 8, inputs.rows - 1) * room.row_bytes;
        int slot = 0, desk = 0;
        [[maybe_unused]] int parity = 0;
        for (int index = 0; index < deal.units(); index++) {
            const Unit unit = deal.unit(index);
            float sums[2][4] = {};
            for (int begin = unit.begin; begin < unit.end; begin += SPAN) {
#ifdef LONAS_EMULATED
                MEET();
                if (threadIdx.x < WARP) copier.copy(ring + slot * SLOT_BYTES, nullptr);
                cp_async_wait<0>();
                MEET();
#else
                barrier_wait(barriers.full + slot, parity);
#endif
                multiply_span(ring + slot * SLOT_BYTES, x + begin * 2, min(SPAN, unit.end - begin), sums);
                __syncwarp();
#ifndef LONAS_EMULATED
                if (threadIdx.x % WARP == 0) barrier_arrive(barriers.empty + slot);
#endif
                if (++slot == room.slots) slot = 0, parity ^= 1;
            }
            // Desks take turns: who puts onto one again has met those that read it.
            put(desks + desk * WARPS * ROWS * OUTPUTS, sums);
            MEET();
            finish(index, desks + desk * WARPS * ROWS * OUTPUTS, shrunk);
            desk ^= 1;
        }
        MEET();
        if (known.adapters > 0) load_ranks(shrunk);
        write_all(onto);
    }
};

#ifndef LONAS_EMULATED
// Sends for the first tiles that this block's successor will have, as far as the second-level cache: until it runs and after the last
// copies of this one the memory would have nothing to do.
__device__ __forceinline__ void send_ahead(const Ahead& ahead) {
    constexpr int PIECE = 2048;
    const int bytes = ahead.rows * ahead.row_bytes, blocks = gridDim.x, block = blockIdx.x;
    for (int own = 0; own < ahead.own_tiles; own++) {
        const int tile = blocks - 1 - block + own * blocks;
        if (tile >= ahead.tiles) break;
        for (int n = 0; n < 2; n++) {
            if (!ahead.of[n]) break;
            const unsigned char* from = ahead.of[n] + static_cast<size_t>(tile) * bytes;
            for (int at = threadIdx.x % WARP * PIECE; at < bytes; at += WARP * PIECE) {
                asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from + at), "r"(min(PIECE, bytes - at)) : "memory");
            }
        }
    }
}

// The warp that copies: a slot is asked for again when all others have read it.
template <int WEIGHTS>
__device__ __forceinline__ void copy_all(const Deal<WEIGHTS>& deal, Shared ring, Barriers& barriers, int slots) {
    Copier<WEIGHTS> copier(deal);
    for (int slot = 0, parity = 1; copier.index < deal.units();) {
        barrier_wait(barriers.empty + slot, parity);
        copier.copy(ring + slot * SLOT_BYTES, barriers.full + slot);
        if (++slot == slots) slot = 0, parity ^= 1;
    }
}
#endif

template <int WEIGHTS, bool NORM>
__device__ __forceinline__ void work(const Inputs& inputs, const Parts& parts, int part_count, Counters* counters, const Room& room, bool onto,
                                     [[maybe_unused]] const Ahead& ahead) {
    DYN_SHARED(uint4, memory);
    __shared__ Rows known;
    __shared__ float desks[2 * WARPS * ROWS * OUTPUTS];
    __shared__ Barriers barriers;
    let_next_kernel_begin();
    make(barriers);
    describe(known, parts, part_count, inputs.rows);
    const Deal<WEIGHTS> deal(parts, known, part_count);
    unsigned char* memory_at = reinterpret_cast<unsigned char*>(memory);
    const Shared ring = shared_at(memory_at);
    if (threadIdx.x >= THREADS) {
#ifdef LONAS_EMULATED
        emulator::leave_block();
#else
        copy_all(deal, ring, barriers, room.slots);
        send_ahead(ahead);
#endif
        return;
    }
    Kept kept;
    kept.x = memory_at + room.slots * SLOT_BYTES;
    kept.totals = reinterpret_cast<float*>(kept.x + inputs.rows * room.row_bytes);
    kept.before = kept.totals + room.units * ROWS * OUTPUTS;
    kept.ranks = kept.before + room.units * ROWS * OUTPUTS;
    kept.b = reinterpret_cast<__nv_bfloat16*>(kept.ranks + MOST_PARTS * ROWS * room.ranks);
    Streamed<WEIGHTS, NORM> streamed = {inputs, parts, known, deal, room, kept, desks, part_count};
    streamed.run(ring, barriers, &counters->shrunk, onto);
    // The last one to leave makes the counters ready for the next launch; it leaves after it has waited for all shrinks.
    MEET();
    if (deal.shrinks > 0 && threadIdx.x == 0 && atomicAdd(&counters->left, 1u) == gridDim.x - 1) counters->shrunk = counters->left = 0;
}

#endif

// Blocks: one a multiprocessor. Shared memory: `Room` says.
#ifdef LONAS_STREAMS
#define STREAMED_WORK(WEIGHTS, NORM) work<WEIGHTS, NORM>(inputs, parts, part_count, counters, room, onto != 0, ahead)
#else
#define STREAMED_WORK(WEIGHTS, NORM)
#endif
#define STREAMED(NAME, WEIGHTS, NORM)                                                                                                   \
    extern "C" __global__ void __launch_bounds__(ALL_THREADS, 1)                                                                             \
        NAME(const Inputs inputs, const Parts parts, int part_count, Counters* counters, const Room room, int onto, const Ahead ahead) { \
        STREAMED_WORK(WEIGHTS, NORM);                                                                                                    \
    }

STREAMED(streamed_linear_few, 1, false)
STREAMED(streamed_gate_up_few, 2, false)
STREAMED(streamed_normed_linear_few, 1, true)
STREAMED(streamed_normed_gate_up_few, 2, true)
