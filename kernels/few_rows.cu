// The elastic low-rank product for few rows, one launch for up to three Linears of the same inputs:
//   y = W[:o,:i] x + b[:o] + B[:o,:r] (s A[:r,:i] x), each row with its own o, i, r and super-adapter.
//
// Decoding reads every weight once and does little with it, so what counts is that many loads are under way: weights go
// from memory straight into the registers that the tensor cores take them from, 16 bytes a lane, and rows of all
// sub-networks share them. Blocks first take the shrinks s A x of the launch, then its expands; an expand multiplies W
// before it waits for the shrinks, so that nothing waits in practice. See README.md for shapes, launches and bytes.
#include "common.cuh"
#include "formats.cuh"
#include "mma.cuh"

// Warps of a block; each sums up its own eighth of the inputs, or several of them where warps take several outputs.
constexpr int WARPS = 8;
// Outputs of a warp: the height of a tensor core's left matrix. Rows of a tile: the width of its right one.
constexpr int OUTPUTS = 16, ROWS = 8;
// Linears of one launch.
constexpr int MOST_PARTS = 3;

// One Linear of a launch; `Part` in src/backend/cuda/few.rs. `sizes` null: all rows take the whole of `w (out, inp)`
// without an adapter. `shrunk (rows, rank)`: what the shrinks leave for the expands; `rank`, a multiple of 32, is the highest.
struct Part {
    const void* w;
    const void* scales;
    const float* bias;
    const SegmentRow* sizes;
    const AdapterEntry* adapters;
    __nv_bfloat16* shrunk;
    void* y;
    int w_stride, out, inp, y_stride, adapter_count, rank;
};

struct Parts {
    Part of[MOST_PARTS];
};

// What a launch's blocks agree by, all zero before it and after it.
struct Counters {
    unsigned taken, shrunk, left;
};

// The rows' inputs. With a `norm` they are f32 and to be multiplied with it; else bf16.
struct Inputs {
    const void* x;
    const float* norm;
    int stride, width, rows;
    float eps;
};

struct Fragments {
    unsigned of[2][2];  // of two multiplications, the right matrix's
};

// How a warp goes through the inputs of weights in a format: RUN consecutive ones a lane, 16 bytes of a row; LOADS of them a
// step. So a step is 128 bytes of a row in bf16, and 64 in 8 or 4 bits.
template <int FORMAT>
struct Walk {
    static constexpr int RUN = FORMAT == BF16 ? 8 : FORMAT == INT8 ? 16 : 32, LOADS = FORMAT == BF16 ? 2 : 1;
    static constexpr int STEP = 4 * RUN * LOADS, STRIDE = STEP * WARPS;
};

// Two outputs' weights, eight apart: a left matrix's.
template <int FORMAT>
struct Source {
    const unsigned char* rows[2];
    const void* scales[2];

    __device__ __forceinline__ void set(int i, const void* w, const void* scale, int row, int stride) {
        const size_t first = static_cast<size_t>(row) * stride;
        rows[i] = static_cast<const unsigned char*>(w) + bytes_of<FORMAT>(first);
        scales[i] = FORMAT == BF16 ? nullptr : static_cast<const __half*>(scale) + first / BLOCK * (FORMAT == INT4 ? 2 : 1);
    }
};

// The bits of two numbers, without the second or both where they lie beyond a row's inputs.
__device__ __forceinline__ unsigned keep(unsigned two, int left) {
    return left >= 2 ? two : left == 1 ? two & 0xffffu : 0u;
}

// Inputs k..k+8 of a row that has `inp` of them, as the tensor core takes them. The order of inputs within a step is our
// own: a lane takes eight consecutive ones of a row, and so it does of a weight. `squares` gains those of all of a row's
// numbers, beyond its inputs too, because that is what a norm is of.
template <bool NORM>
__device__ __forceinline__ Fragments inputs_at(const Inputs& inputs, int row, int inp, int k, float& squares) {
    Fragments to = {};
    if (row >= inputs.rows || k >= (NORM ? inputs.width : inp)) return to;
    const size_t at = static_cast<size_t>(row) * inputs.stride + k;
    unsigned two[4];
    if constexpr (NORM) {
        const float4* from = reinterpret_cast<const float4*>(static_cast<const float*>(inputs.x) + at);
        const float4* norm = reinterpret_cast<const float4*>(inputs.norm + k);
        const float4 x[2] = {from[0], from[1]}, by[2] = {norm[0], norm[1]};
        const float values[8] = {x[0].x, x[0].y, x[0].z, x[0].w, x[1].x, x[1].y, x[1].z, x[1].w};
        const float weights[8] = {by[0].x, by[0].y, by[0].z, by[0].w, by[1].x, by[1].y, by[1].z, by[1].w};
#pragma unroll
        for (int i = 0; i < 8; i++) squares += k + i < inputs.width ? values[i] * values[i] : 0.0f;
#pragma unroll
        for (int i = 0; i < 4; i++) two[i] = pack(values[2 * i] * weights[2 * i], values[2 * i + 1] * weights[2 * i + 1]);
    } else {
        const uint4 bits = *reinterpret_cast<const uint4*>(static_cast<const __nv_bfloat16*>(inputs.x) + at);
        two[0] = bits.x, two[1] = bits.y, two[2] = bits.z, two[3] = bits.w;
    }
#pragma unroll
    for (int i = 0; i < 4; i++) to.of[i / 2][i % 2] = keep(two[i], inp - k - 2 * i);
    return to;
}

// Inputs k..k+RUN of two outputs' weights as they lie in memory, with their scales; zeros from `end` on.
template <int FORMAT>
struct Loaded {
    uint4 bits[2];
    Scale<FORMAT> scales[2];

    __device__ __forceinline__ void load(const Source<FORMAT>& from, int k, int end) {
        bits[0] = bits[1] = {};
        scales[0] = scales[1] = {};
        if (k >= end) return;
        for (int i = 0; i < 2; i++) {
            bits[i] = load_once(from.rows[i] + bytes_of<FORMAT>(k));
            scales[i].load(from.scales[i], k / BLOCK);
        }
    }

    // Eight of the inputs: left matrices of two multiplications.
    __device__ __forceinline__ void eight(int which, unsigned (&to)[2][4]) const {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            unsigned pairs[4];
            unpack(bits[i], scales[i], which, pairs);
            to[0][i] = pairs[0], to[0][2 + i] = pairs[1], to[1][i] = pairs[2], to[1][2 + i] = pairs[3];
        }
    }
};

// Sums of a warp's outputs for a tile's rows, as the tensor cores leave them: number `e` of a lane is of output
// lane / 4 + e / 2 * 8 and row lane % 4 * 2 + e % 2.
template <int WEIGHTS, int TILES>
struct Sums {
    float of[WEIGHTS][TILES][4];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < WEIGHTS * TILES * 4; i++) (&of[0][0][0])[i] = 0.0f;
    }
    __device__ __forceinline__ void add(const Sums& other) {
#pragma unroll
        for (int i = 0; i < WEIGHTS * TILES * 4; i++) (&of[0][0][0])[i] += (&other.of[0][0][0])[i];
    }
};

// One eighth of the inputs: those of every eighth step from `slice` on.
template <int FORMAT, int WEIGHTS, int TILES, bool NORM>
__device__ __forceinline__ void multiply_slice(const Inputs& inputs, const Source<FORMAT> (&from)[WEIGHTS], int slice, int first,
                                               int end, const int (&inp)[TILES], Sums<WEIGHTS, TILES>& sums,
                                               float (&squares)[TILES]) {
    using Steps = Walk<FORMAT>;
    const int lane = threadIdx.x % WARP, most = NORM ? inputs.width : end;
    // Two steps' loads are under way at once, where registers allow it.
    [[maybe_unused]] constexpr int UNROLL = FORMAT == BF16 && WEIGHTS * TILES < 4 ? 2 : 1;
#pragma unroll UNROLL
    for (int step = slice * Steps::STEP; step < most; step += Steps::STRIDE) {
#pragma unroll
        for (int load = 0; load < Steps::LOADS; load++) {
            const int k = step + (load * 4 + lane % 4) * Steps::RUN;
            Loaded<FORMAT> loaded[WEIGHTS];
#pragma unroll
            for (int n = 0; n < WEIGHTS; n++) loaded[n].load(from[n], k, end);
#pragma unroll
            for (int eight = 0; eight < Steps::RUN / 8; eight++) {
                unsigned w[WEIGHTS][2][4];
#pragma unroll
                for (int n = 0; n < WEIGHTS; n++) loaded[n].eight(eight, w[n]);
#pragma unroll
                for (int tile = 0; tile < TILES; tile++) {
                    const int row = first + tile * ROWS + lane / 4;
                    const Fragments x = inputs_at<NORM>(inputs, row, inp[tile], k + 8 * eight, squares[tile]);
#pragma unroll
                    for (int n = 0; n < WEIGHTS; n++) {
                        mma_m16n8k16(sums.of[n][tile], w[n][0], x.of[0][0], x.of[0][1]);
                        mma_m16n8k16(sums.of[n][tile], w[n][1], x.of[1][0], x.of[1][1]);
                    }
                }
            }
        }
    }
}

// `SLICES` eighths from `slice` on, added up as a binary tree, so that sums come out the same whoever adds them.
template <int SLICES, int FORMAT, int WEIGHTS, int TILES, bool NORM>
__device__ __forceinline__ void multiply(const Inputs& inputs, const Source<FORMAT> (&from)[WEIGHTS], int slice, int first, int end,
                                         const int (&inp)[TILES], Sums<WEIGHTS, TILES>& sums, float (&squares)[TILES]) {
    if constexpr (SLICES == 1) {
        sums.clear();
        multiply_slice<FORMAT, WEIGHTS, TILES, NORM>(inputs, from, slice, first, end, inp, sums, squares);
    } else {
        multiply<SLICES / 2, FORMAT, WEIGHTS, TILES, NORM>(inputs, from, slice, first, end, inp, sums, squares);
        Sums<WEIGHTS, TILES> second;
        multiply<SLICES / 2, FORMAT, WEIGHTS, TILES, NORM>(inputs, from, slice + SLICES / 2, first, end, inp, second, squares);
        sums.add(second);
    }
}

// What a lane knows of the row of its number: sizes, and whether it is one at all.
__device__ __forceinline__ SegmentRow size_of(const Part& part, int row, bool present) {
    if (!present) return {0, 0, 0, -1};
    return part.sizes ? part.sizes[row] : SegmentRow{part.out, part.inp, 0, -1};
}

// Where a block adds up what its warps have summed: by warp, then the adapters' part by group.
template <int WEIGHTS, int TILES, int GROUPS>
struct Desk {
    static constexpr int NUMBERS = WEIGHTS * TILES * 4 * WARP, OF_GROUP = WARPS / GROUPS;
    float sums[WARPS][NUMBERS], adapted[GROUPS][NUMBERS], squares[WARPS][ROWS];

    __device__ __forceinline__ void put(float (&to)[NUMBERS], const Sums<WEIGHTS, TILES>& from) {
#pragma unroll
        for (int i = 0; i < WEIGHTS * TILES * 4; i++) to[i * WARP + threadIdx.x % WARP] = (&from.of[0][0][0])[i];
    }
    // A number of a group, over all slices of the inputs.
    __device__ __forceinline__ float total(int group, int number) const {
        float parts[OF_GROUP];
#pragma unroll
        for (int i = 0; i < OF_GROUP; i++) parts[i] = sums[group * OF_GROUP + i][number];
#pragma unroll
        for (int width = 1; width < OF_GROUP; width *= 2) {
#pragma unroll
            for (int i = 0; i < OF_GROUP; i += 2 * width) parts[i] += parts[i + width];
        }
        return parts[0];
    }
    // 1 / sqrt(mean of the squares of a row's inputs + eps)
    __device__ __forceinline__ float norm_of(int row, const Inputs& inputs) const {
        float all = 0.0f;
#pragma unroll
        for (int warp = 0; warp < WARPS; warp++) all += squares[warp][row];
        return rsqrtf(all / inputs.width + inputs.eps);
    }
};

// The output and the row, counted within a block, of a number of a group's sums.
template <int TILES>
__device__ __forceinline__ int2 place_of(int number) {
    const int lane = number % WARP, e = number / WARP % 4, tile = number / WARP / 4 % TILES;
    return {lane / 4 + e / 2 * 8, tile * ROWS + lane % 4 * 2 + e % 2};
}

// shrunk = s A x for the rows of one super-adapter, and a few of its ranks.
template <int TILES, int GROUPS, bool NORM, typename DESK>
__device__ void shrink(const Inputs& inputs, const Part& part, int adapter, int first_rank, int first, DESK& desk) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, group = warp / DESK::OF_GROUP;
    const SegmentRow size = size_of(part, first + lane, lane < TILES * ROWS && first + lane < inputs.rows);
    const unsigned mine = __ballot_sync(ALL_LANES, size.rank > 0 && size.adapter == adapter);
    if (mine == 0) return;
    const AdapterEntry entry = part.adapters[adapter];
    const bool is_mine = mine >> lane & 1;
    const int end = first_rank < warp_max(is_mine ? size.rank : 0) ? warp_max(is_mine ? size.inp : 0) : 0;
    int inp[TILES];
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) inp[tile] = __shfl_sync(ALL_LANES, is_mine ? size.inp : 0, tile * ROWS + lane / 4);
    const int rank = first_rank + group * OUTPUTS + lane / 4;
    Source<BF16> from[1];
    for (int i = 0; i < 2; i++) from[0].set(i, entry.a, nullptr, min(rank + 8 * i, entry.rank - 1), entry.a_stride);
    Sums<1, TILES> sums;
    float squares[TILES] = {};
    multiply<GROUPS, BF16, 1, TILES, NORM>(inputs, from, warp % DESK::OF_GROUP * GROUPS, first, end, inp, sums, squares);
    desk.put(desk.sums[warp], sums);
    __syncthreads();
    for (int at = threadIdx.x; at < GROUPS * DESK::NUMBERS; at += WARPS * WARP) {
        const int2 place = place_of<TILES>(at % DESK::NUMBERS);
        const int to = first_rank + at / DESK::NUMBERS * OUTPUTS + place.x;
        if (!(mine >> place.y & 1) || to >= part.rank) continue;
        const size_t row = first + place.y;
        const float value = to < part.sizes[row].rank ? entry.scale * desk.total(at / DESK::NUMBERS, at % DESK::NUMBERS) : 0.0f;
        part.shrunk[row * part.rank + to] = __float2bfloat16(value);
    }
}

// B t, each row with its own super-adapter: one pass over B for each of those that the rows have.
template <int TILES>
__device__ void add_adapters(const Part& part, const SegmentRow& size, int first, int output, float (&sums)[TILES][4]) {
    const int lane = threadIdx.x % WARP;
    unsigned left = __ballot_sync(ALL_LANES, size.rank > 0);
    while (left != 0) {
        const int adapter = __shfl_sync(ALL_LANES, size.adapter, __ffs(left) - 1);
        const unsigned mine = __ballot_sync(ALL_LANES, size.rank > 0 && size.adapter == adapter);
        left &= ~mine;
        const AdapterEntry& entry = part.adapters[adapter];
        Source<BF16> from;
        for (int i = 0; i < 2; i++) from.set(i, entry.b, nullptr, min(output + 8 * i, part.out - 1), entry.b_stride);
        for (int step = 0; step < part.rank; step += 32) {
            const int k = step + lane % 4 * 8;
            Loaded<BF16> loaded;
            loaded.load(from, k, entry.b_stride);
            unsigned b[2][4];
            loaded.eight(0, b);
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) {
                const int row = tile * ROWS + lane / 4;
                uint4 bits = {};
                if (mine >> row & 1) {
                    bits = *reinterpret_cast<const uint4*>(part.shrunk + static_cast<size_t>(first + row) * part.rank + k);
                }
                mma_m16n8k16(sums[tile], b[0], bits.x, bits.y);
                mma_m16n8k16(sums[tile], b[1], bits.z, bits.w);
            }
        }
    }
}

// Outputs `first_output..` of one Linear, or of gate and up together.
template <int FORMAT, int WEIGHTS, int TILES, int GROUPS, bool NORM, typename DESK>
__device__ void expand(const Inputs& inputs, const Part* parts, int first_output, int first, const unsigned* shrunk,
                       unsigned shrinks, bool onto, DESK& desk) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, group = warp / DESK::OF_GROUP;
    const bool present = lane < TILES * ROWS && first + lane < inputs.rows;
    SegmentRow size[WEIGHTS];
    for (int n = 0; n < WEIGHTS; n++) size[n] = size_of(parts[n], first + lane, present);
    const int end = warp_max(size[0].inp), output = first_output + group * OUTPUTS + lane / 4;
    const bool idle = first_output >= warp_max(size[0].out);
    int inp[TILES];
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) inp[tile] = __shfl_sync(ALL_LANES, size[0].inp, tile * ROWS + lane / 4);
    if (!idle) {
        Source<FORMAT> from[WEIGHTS];
#pragma unroll
        for (int n = 0; n < WEIGHTS; n++) {
            const Part& part = parts[n];
            for (int i = 0; i < 2; i++) from[n].set(i, part.w, part.scales, min(output + 8 * i, part.out - 1), part.w_stride);
        }
        Sums<WEIGHTS, TILES> sums;
        float squares[TILES] = {};
        multiply<GROUPS, FORMAT, WEIGHTS, TILES, NORM>(inputs, from, warp % DESK::OF_GROUP * GROUPS, first, end, inp, sums, squares);
        desk.put(desk.sums[warp], sums);
        if constexpr (NORM) {
            static_assert(TILES == 1, "squares of one tile");
            for (int lanes = 1; lanes < 4; lanes *= 2) squares[0] += __shfl_xor_sync(ALL_LANES, squares[0], lanes);
            if (lane % 4 == 0) desk.squares[warp][lane / 4] = squares[0];
        }
        if (shrinks > 0 && threadIdx.x == 0) wait_for(shrunk, shrinks);
        __syncthreads();
        if (warp % DESK::OF_GROUP == 0) {
            sums.clear();
#pragma unroll
            for (int n = 0; n < WEIGHTS; n++) add_adapters<TILES>(parts[n], size[n], first, output, sums.of[n]);
            desk.put(desk.adapted[group], sums);
        }
        __syncthreads();
    }
    constexpr int OF_WEIGHT = DESK::NUMBERS / WEIGHTS;
    for (int at = threadIdx.x; at < GROUPS * OF_WEIGHT; at += WARPS * WARP) {
        const int of_group = at / OF_WEIGHT, number = at % OF_WEIGHT;
        const int2 place = place_of<TILES>(number);
        const int to = first_output + of_group * OUTPUTS + place.x, row = first + place.y;
        if (to >= parts[0].out || row >= inputs.rows) continue;
        float values[WEIGHTS] = {};
#pragma unroll
        for (int n = 0; n < WEIGHTS && !idle; n++) {
            const int of_weight = number + n * OF_WEIGHT;
            if (to >= (parts[n].sizes ? parts[n].sizes[row].out : parts[n].out)) continue;
            const float sum = desk.total(of_group, of_weight) + desk.adapted[of_group][of_weight];
            values[n] = (NORM ? sum * desk.norm_of(place.y, inputs) : sum) + (parts[n].bias ? parts[n].bias[to] : 0.0f);
        }
        const size_t y = static_cast<size_t>(row) * parts[0].y_stride + to;
        if constexpr (WEIGHTS == 2) {
            static_cast<__nv_bfloat16*>(parts[0].y)[y] = __float2bfloat16(silu(values[0]) * values[1]);
        } else {
            float* result = static_cast<float*>(parts[0].y) + y;
            *result = onto ? *result + values[0] : values[0];
        }
    }
}

// What a block does, by the order in which blocks begin: who waits waits for blocks that have begun.
template <int FORMAT, int WEIGHTS, int TILES, int GROUPS, bool NORM>
__device__ __forceinline__ void work(const Inputs& inputs, const Parts& parts, int part_count, Counters* counters, bool onto) {
    using BlockDesk = Desk<WEIGHTS, TILES, GROUPS>;
    __shared__ BlockDesk desk;
    __shared__ unsigned taken;
    constexpr int BLOCK_OUTPUTS = GROUPS * OUTPUTS, BLOCK_ROWS = TILES * ROWS;
    if (threadIdx.x == 0) taken = atomicAdd(&counters->taken, 1u);
    __syncthreads();
    const int row_blocks = (inputs.rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
    int item = static_cast<int>(taken) / row_blocks, shrinks = 0;
    const int first = static_cast<int>(taken) % row_blocks * BLOCK_ROWS;
    for (int n = 0; n < part_count; n++) shrinks += parts.of[n].adapter_count * ((parts.of[n].rank + BLOCK_OUTPUTS - 1) / BLOCK_OUTPUTS);
    if (item < shrinks) {
        int part = 0;
        for (;; part++) {
            const int of_part = parts.of[part].adapter_count * ((parts.of[part].rank + BLOCK_OUTPUTS - 1) / BLOCK_OUTPUTS);
            if (item < of_part) break;
            item -= of_part;
        }
        const int of_adapter = (parts.of[part].rank + BLOCK_OUTPUTS - 1) / BLOCK_OUTPUTS;
        shrink<TILES, GROUPS, NORM>(inputs, parts.of[part], item / of_adapter, item % of_adapter * BLOCK_OUTPUTS, first,
                                    reinterpret_cast<Desk<1, TILES, GROUPS>&>(desk));
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) atomicAdd(&counters->shrunk, 1u);
    } else {
        item -= shrinks;
        int part = 0;
        for (; WEIGHTS == 1; part++) {
            const int of_part = (parts.of[part].out + BLOCK_OUTPUTS - 1) / BLOCK_OUTPUTS;
            if (item < of_part) break;
            item -= of_part;
        }
        expand<FORMAT, WEIGHTS, TILES, GROUPS, NORM>(inputs, parts.of + part, item * BLOCK_OUTPUTS, first, &counters->shrunk,
                                             static_cast<unsigned>(shrinks * row_blocks), onto, desk);
    }
    // The last one to leave makes the counters ready for the next launch.
    if (threadIdx.x == 0 && atomicAdd(&counters->left, 1u) == gridDim.x - 1) *counters = {};
}

// Blocks: for each BLOCK_ROWS rows those of all shrinks, then those of all expands; see `work`.
#define FEW(NAME, FORMAT, WEIGHTS, TILES, GROUPS, NORM)                                                              \
    extern "C" __global__ void __launch_bounds__(WARPS* WARP, (WEIGHTS) * (TILES) < 8 ? 2 : 1)                       \
        NAME(const Inputs inputs, const Parts parts, int part_count, Counters* counters, int onto) {                 \
        work<FORMAT, WEIGHTS, TILES, GROUPS, NORM>(inputs, parts, part_count, counters, onto != 0);                  \
    }

FEW(linear_few_8, BF16, 1, 1, 1, false)
FEW(linear_few_16, BF16, 1, 2, 2, false)
FEW(linear_few_32, BF16, 1, 4, 4, false)
FEW(gate_up_few_8, BF16, 2, 1, 1, false)
FEW(gate_up_few_16, BF16, 2, 2, 2, false)
FEW(gate_up_few_32, BF16, 2, 4, 2, false)
FEW(normed_linear_few, BF16, 1, 1, 1, true)
FEW(normed_gate_up_few, BF16, 2, 1, 1, true)

FEW(linear_few_8_int8, INT8, 1, 1, 1, false)
FEW(linear_few_16_int8, INT8, 1, 2, 2, false)
FEW(linear_few_32_int8, INT8, 1, 4, 4, false)
FEW(gate_up_few_8_int8, INT8, 2, 1, 1, false)
FEW(gate_up_few_16_int8, INT8, 2, 2, 2, false)
FEW(gate_up_few_32_int8, INT8, 2, 4, 2, false)
FEW(normed_linear_few_int8, INT8, 1, 1, 1, true)
FEW(normed_gate_up_few_int8, INT8, 2, 1, 1, true)

FEW(linear_few_8_int4, INT4, 1, 1, 1, false)
FEW(linear_few_16_int4, INT4, 1, 2, 2, false)
FEW(linear_few_32_int4, INT4, 1, 4, 4, false)
FEW(gate_up_few_8_int4, INT4, 2, 1, 1, false)
FEW(gate_up_few_16_int4, INT4, 2, 2, 2, false)
FEW(gate_up_few_32_int4, INT4, 2, 4, 2, false)
FEW(normed_linear_few_int4, INT4, 1, 1, 1, true)
FEW(normed_gate_up_few_int4, INT4, 2, 1, 1, true)
