// One token chosen from a row of logits, as src/backend/draw.rs does it: edits, temperature, top-k, top-p, min-p, a draw.
//
// Nothing is sorted. What top-k and top-p keep is all from some logit on, and that logit is found digit by digit, from the
// bits of floats in an order that integers have too. Weights are whole numbers, so that their sums are the same in any
// order, and a seed gives the same token every time.
#include "common.cuh"

// How to choose from one row; `DrawRow` in src/backend/cuda/sample.rs. Its edits are `edits[first_edit..][..edit_count]`.
struct DrawRow {
    double uniform;
    int row, first_edit, edit_count, top_k;
    float temperature, top_p, min_p;
    int padding;
};

struct Edit {
    int token;
    float penalty, add;
};

constexpr int SAMPLE_THREADS = 1024, SAMPLE_WARPS = SAMPLE_THREADS / WARP;
constexpr int DIGIT_BITS = 8, DIGITS = 1 << DIGIT_BITS;
// The weight of the likeliest token: sums over any vocabulary fit into 64 bits, and what is less likely by 2^40 is impossible.
constexpr float UNIT = 1099511627776.0f;
constexpr unsigned NOTHING = 0xffffffffu;

using Sum = unsigned long long;

// In the order of floats.
__device__ __forceinline__ unsigned key_of(float x) {
    const unsigned bits = __float_as_uint(x);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ bool is_number(float x) { return (__float_as_uint(x) & 0x7f800000u) != 0x7f800000u; }

__device__ __forceinline__ Sum warp_total(Sum x) {
    for (int lanes = WARP / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(ALL_LANES, x, lanes);
    return x;
}

// A row with how its numbers weigh.
struct Weigher {
    const float* logits;
    float largest, scale, min_p;
    unsigned threshold;  // the key of the smallest logit that is kept

    __device__ __forceinline__ Sum weight(int token) const {
        const float logit = logits[token];
        if (!is_number(logit) || key_of(logit) < threshold) return 0;
        const float share = expf((logit - largest) * scale);
        return share >= min_p ? static_cast<Sum>(share * UNIT) : 0;
    }
};

struct SampleDesk {
    Sum histogram[DIGITS], by_warp[SAMPLE_WARPS];
    Sum found;
    unsigned prefix;
};

// The sum over all threads of a block, in every thread.
__device__ Sum block_total(Sum x, SampleDesk& desk) {
    x = warp_total(x);
    __syncthreads();
    if (threadIdx.x % WARP == 0) desk.by_warp[threadIdx.x / WARP] = x;
    __syncthreads();
    return warp_total(desk.by_warp[threadIdx.x % WARP]);
}

// The largest finite logit of a row and its token, of equal ones the first: the key above, the token's complement below.
__device__ Sum likeliest(const float* logits, int vocabulary, SampleDesk& desk) {
    Sum best = 0;
    for (int token = threadIdx.x; token < vocabulary; token += SAMPLE_THREADS) {
        const float logit = logits[token];
        if (is_number(logit)) best = max(best, static_cast<Sum>(key_of(logit)) << 32 | ~static_cast<unsigned>(token));
    }
    for (int lanes = WARP / 2; lanes > 0; lanes /= 2) best = max(best, __shfl_xor_sync(ALL_LANES, best, lanes));
    if (threadIdx.x % WARP == 0) desk.by_warp[threadIdx.x / WARP] = best;
    __syncthreads();
    best = desk.by_warp[threadIdx.x % WARP];
    for (int lanes = WARP / 2; lanes > 0; lanes /= 2) best = max(best, __shfl_xor_sync(ALL_LANES, best, lanes));
    return best;
}

// The largest key from which on kept tokens come to `enough`: each counts as one, or by its weight. 0 if all are less.
template <bool WEIGHTED>
__device__ unsigned threshold_of(const Weigher& row, int vocabulary, Sum enough, SampleDesk& desk) {
    unsigned prefix = 0;
    Sum above = 0;
    for (int shift = 32 - DIGIT_BITS; shift >= 0; shift -= DIGIT_BITS) {
        __syncthreads();
        for (int i = threadIdx.x; i < DIGITS; i += SAMPLE_THREADS) desk.histogram[i] = 0;
        __syncthreads();
        for (int token = threadIdx.x; token < vocabulary; token += SAMPLE_THREADS) {
            const Sum weight = row.weight(token);
            if (weight == 0) continue;
            const unsigned key = key_of(row.logits[token]);
            if (shift + DIGIT_BITS < 32 && key >> (shift + DIGIT_BITS) != prefix >> (shift + DIGIT_BITS)) continue;
            atomicAdd(&desk.histogram[key >> shift & (DIGITS - 1)], WEIGHTED ? weight : 1ull);
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            int digit = DIGITS - 1;
            for (; digit > 0 && above + desk.histogram[digit] < enough; digit--) above += desk.histogram[digit];
            desk.found = above;
            desk.prefix = prefix | static_cast<unsigned>(digit) << shift;
        }
        __syncthreads();
        above = desk.found, prefix = desk.prefix;
    }
    return prefix;
}

// The token within whose weight, counted from the first token on, `place` lies. Each warp has a part of the vocabulary.
__device__ void find(const Weigher& row, int vocabulary, double uniform, SampleDesk& desk, unsigned* to) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int part = (vocabulary + SAMPLE_WARPS - 1) / SAMPLE_WARPS, first = warp * part, end = min(first + part, vocabulary);
    Sum mine = 0;
    for (int token = first + lane; token < end; token += WARP) mine += row.weight(token);
    mine = warp_total(mine);
    __syncthreads();
    if (lane == 0) desk.by_warp[warp] = mine;
    __syncthreads();
    Sum before = 0, total = 0;
    for (int w = 0; w < SAMPLE_WARPS; w++) {
        before += w < warp ? desk.by_warp[w] : 0;
        total += desk.by_warp[w];
    }
    const Sum place = min(static_cast<Sum>(uniform * static_cast<double>(total)), total - 1);
    if (place < before || place >= before + mine) return;
    for (int start = first; start < end; start += WARP) {
        const Sum weight = start + lane < end ? row.weight(start + lane) : 0;
        Sum until = weight;
        for (int lanes = 1; lanes < WARP; lanes *= 2) {
            const Sum other = __shfl_up_sync(ALL_LANES, until, lanes);
            if (lane >= lanes) until += other;
        }
        const unsigned reached = __ballot_sync(ALL_LANES, before + until > place);
        if (reached != 0) {
            if (lane == __ffs(reached) - 1) *to = start + lane;
            return;
        }
        before += __shfl_sync(ALL_LANES, until, WARP - 1);
    }
}

constexpr float LARGEST_FLOAT = 3.402823466e38f;

// chosen[i]: the token that draws[i] takes from its row, or NOTHING if none is possible. Edits the row. One block a draw.
extern "C" __global__ void __launch_bounds__(SAMPLE_THREADS, 1)
    sample(float* logits, int stride, int vocabulary, const DrawRow* draws, const Edit* edits, unsigned* chosen) {
    __shared__ SampleDesk desk;
    begin_after_previous_kernel();
    const DrawRow draw = draws[blockIdx.x];
    float* row = logits + static_cast<size_t>(draw.row) * stride;
    for (int i = threadIdx.x; i < draw.edit_count; i += SAMPLE_THREADS) {
        const Edit edit = edits[draw.first_edit + i];
        if (static_cast<unsigned>(edit.token) >= static_cast<unsigned>(vocabulary)) continue;
        const float logit = row[edit.token];
        row[edit.token] = (logit > 0.0f ? logit / edit.penalty : logit * edit.penalty) + edit.add;
    }
    __syncthreads();
    const Sum best = likeliest(row, vocabulary, desk);
    unsigned* to = chosen + blockIdx.x;
    if (best == 0 || draw.temperature == 0.0f) {
        if (threadIdx.x == 0) *to = best == 0 ? NOTHING : ~static_cast<unsigned>(best);
        return;
    }
    // A temperature so low that its inverse is infinite would make no number of the best token's zero.
    const float sharpness = fminf(1.0f / draw.temperature, LARGEST_FLOAT);
    Weigher weigher = {row, row[~static_cast<unsigned>(best)], sharpness, draw.min_p, 0};
    if (draw.top_k > 0) weigher.threshold = threshold_of<false>(weigher, vocabulary, draw.top_k, desk);
    if (draw.top_p < 1.0f) {
        Sum mine = 0;
        for (int token = threadIdx.x; token < vocabulary; token += SAMPLE_THREADS) mine += weigher.weight(token);
        const double total = static_cast<double>(block_total(mine, desk));
        // However little is asked for, the best token has it.
        const Sum enough = max(static_cast<Sum>(draw.top_p * total), static_cast<Sum>(1));
        const unsigned threshold = threshold_of<true>(weigher, vocabulary, enough, desk);
        weigher.threshold = max(weigher.threshold, threshold);
    }
    find(weigher, vocabulary, draw.uniform, desk, to);
}

// A row, and a token of it; `Wanted` in src/backend/cuda/sample.rs.
struct Wanted {
    unsigned row, token;
};

constexpr int SUM_THREADS = 512;

// to[i]: the logarithm of the probability of wanted[i]'s token; minus infinity of one that is beyond the vocabulary or no number. What
// is no number in the row does not count. One block for each.
extern "C" __global__ void __launch_bounds__(SUM_THREADS)
    log_probabilities(const float* logits, int stride, int vocabulary, const Wanted* all, float* to) {
    __shared__ float scratch[SUM_THREADS / WARP];
    begin_after_previous_kernel();
    const Wanted wanted = all[blockIdx.x];
    const float* row = logits + static_cast<size_t>(wanted.row) * stride;
    float most = -INFINITY, sum = 0.0f;
    for (int token = threadIdx.x; token < vocabulary; token += SUM_THREADS) {
        const float logit = row[token];
        if (!is_number(logit)) continue;
        if (logit > most) {
            sum *= expf(most - logit);
            most = logit;
        }
        sum += expf(logit - most);
    }
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    float of_all = most;
    for (int lanes = WARP / 2; lanes > 0; lanes /= 2) of_all = fmaxf(of_all, __shfl_xor_sync(ALL_LANES, of_all, lanes));
    if (lane == 0) scratch[warp] = of_all;
    __syncthreads();
    for (int other = 0; other < SUM_THREADS / WARP; other++) of_all = fmaxf(of_all, scratch[other]);
    // Who saw no number has a sum of zero.
    sum = block_sum(sum > 0.0f ? sum * expf(most - of_all) : 0.0f, scratch);
    if (threadIdx.x != 0) return;
    const bool known = wanted.token < static_cast<unsigned>(vocabulary) && is_number(row[wanted.token]);
    to[blockIdx.x] = known ? row[wanted.token] - of_all - logf(sum) : -INFINITY;
}
