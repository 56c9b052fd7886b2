// What a training on a GPU does between its products: operations that, composed of a library's, would be a handful of kernels
// each, every one of which reads and writes all activations. Each is the twin of one in src/backend/reference/composed.rs, which
// says its formula. All numbers are f32, but for the results of products with a frozen weight.
#include "common.cuh"

constexpr int ELEMENTS = 256;  // threads of a block that goes over elements
constexpr int VOCABULARY_THREADS = 512;

// Murmur3's last mixing.
__device__ __forceinline__ unsigned mixed(unsigned h) {
    h ^= h >> 16;
    h *= 0x85ebca6bu;
    h ^= h >> 13;
    h *= 0xc2b2ae35u;
    return h ^ (h >> 16);
}

// Which elements dropout keeps: `Draw` in src/backend/reference/dropout.rs draws the same.
struct Draw {
    unsigned long long key, first;
    unsigned threshold;
    float scale;

    __device__ __forceinline__ float factor(size_t element) const {
        const unsigned long long at = first + element;
        const unsigned low = mixed(static_cast<unsigned>(at) ^ static_cast<unsigned>(key));
        const unsigned bits = mixed(low ^ static_cast<unsigned>(at >> 32) ^ static_cast<unsigned>(key >> 32));
        return bits >= threshold ? scale : 0.0f;
    }
};

#define FOR_EACH_ELEMENT(at, count)                                                                          \
    for (size_t at = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x; at < count;                 \
         at += static_cast<size_t>(gridDim.x) * blockDim.x)

// y = drop(x)
extern "C" __global__ __launch_bounds__(ELEMENTS) void train_dropped(const float* x, float* y, unsigned long long count,
                                                                     unsigned long long key, unsigned long long first,
                                                                     unsigned threshold, float scale) {
    const Draw draw = {key, first, threshold, scale};
    FOR_EACH_ELEMENT(at, count) y[at] = x[at] * draw.factor(at);
}

// y = base + factor adapted
extern "C" __global__ __launch_bounds__(ELEMENTS) void train_added(const __nv_bfloat16* base, const float* adapted, float* y,
                                                                   unsigned long long count, float factor) {
    FOR_EACH_ELEMENT(at, count) y[at] = __bfloat162float(base[at]) + factor * adapted[at];
}

// y = base + drop(through)
extern "C" __global__ __launch_bounds__(ELEMENTS) void train_added_dropped(const __nv_bfloat16* base, const float* through, float* y,
                                                                           unsigned long long count, unsigned long long key,
                                                                           unsigned long long first, unsigned threshold, float scale) {
    const Draw draw = {key, first, threshold, scale};
    FOR_EACH_ELEMENT(at, count) y[at] = __bfloat162float(base[at]) + through[at] * draw.factor(at);
}

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// y = silu(gate) up
extern "C" __global__ __launch_bounds__(ELEMENTS) void train_gated(const float* gate, const float* up, float* y,
                                                                   unsigned long long count) {
    FOR_EACH_ELEMENT(at, count) y[at] = gate[at] * sigmoid(gate[at]) * up[at];
}

extern "C" __global__ __launch_bounds__(ELEMENTS) void train_gated_back(const float* gate, const float* up, const float* dy,
                                                                        float* dgate, float* dup, unsigned long long count) {
    FOR_EACH_ELEMENT(at, count) {
        const float g = gate[at], s = sigmoid(g), d = dy[at];
        dgate[at] = d * up[at] * s * (1.0f + g * (1.0f - s));
        dup[at] = d * g * s;
    }
}

// Turns the pair (d, d + half) of each head by its row's angle d; `direction` is 1, or -1 for the way back. Sines and cosines are
// `(rows, half)`.
extern "C" __global__ __launch_bounds__(ELEMENTS) void train_turned(const float* x, const float* sines, const float* cosines, float* y,
                                                                    unsigned long long pairs, int heads, int half, float direction) {
    FOR_EACH_ELEMENT(pair, pairs) {
        const size_t head = pair / half, row = head / heads;
        const int d = static_cast<int>(pair % half);
        const size_t first = head * 2 * half + d;
        const float sine = sines[row * half + d] * direction, cosine = cosines[row * half + d];
        const float a = x[first], b = x[first + half];
        y[first] = a * cosine - b * sine;
        y[first + half] = b * cosine + a * sine;
    }
}

// A block for each row of `width`: y = x / sqrt(mean(x^2) + eps) weight.
extern "C" __global__ __launch_bounds__(ELEMENTS) void train_rms_norm(const float* x, const float* weight, float* y, int width, float eps) {
    __shared__ float scratch[ELEMENTS / WARP];
    x += static_cast<size_t>(blockIdx.x) * width;
    y += static_cast<size_t>(blockIdx.x) * width;
    float squares = 0.0f;
    for (int at = threadIdx.x; at < width; at += blockDim.x) squares += x[at] * x[at];
    const float scale = 1.0f / sqrtf(block_sum(squares, scratch) / width + eps);
    for (int at = threadIdx.x; at < width; at += blockDim.x) y[at] = x[at] * scale * weight[at];
}

// With n = 1 / sqrt(mean(x^2) + eps) and g = weight dy: dx = n g - x n^3 mean(g x).
extern "C" __global__ __launch_bounds__(ELEMENTS) void train_rms_norm_back(const float* x, const float* weight, const float* dy, float* dx,
                                                                           int width, float eps) {
    __shared__ float scratch[ELEMENTS / WARP];
    x += static_cast<size_t>(blockIdx.x) * width;
    dy += static_cast<size_t>(blockIdx.x) * width;
    dx += static_cast<size_t>(blockIdx.x) * width;
    float squares = 0.0f, products = 0.0f;
    for (int at = threadIdx.x; at < width; at += blockDim.x) {
        squares += x[at] * x[at];
        products += weight[at] * dy[at] * x[at];
    }
    const float scale = 1.0f / sqrtf(block_sum(squares, scratch) / width + eps);
    const float along = scale * scale * scale * (block_sum(products, scratch) / width);
    for (int at = threadIdx.x; at < width; at += blockDim.x) dx[at] = scale * weight[at] * dy[at] - along * x[at];
}

__device__ __forceinline__ float warp_most(float x) {
    for (int lanes = WARP / 2; lanes > 0; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, lanes));
    return x;
}

// A warp's row of scores: `(heads, rows, positions)`, and what is added to them, `(biases, rows, positions)`, of head `h` the one of
// `h % biases`.
struct Scores {
    const float *x, *bias;
    int positions;
    float factor, most, total;

    __device__ __forceinline__ Scores(const float* all, const float* biases, size_t row, int rows, int count, int positions, float factor)
        : x(all + row * positions),
          bias(biases + (row / rows % count * rows + row % rows) * positions),
          positions(positions),
          factor(factor),
          most(-INFINITY),
          total(0.0f) {
        const int lane = threadIdx.x % WARP;
        for (int at = lane; at < positions; at += WARP) most = fmaxf(most, score(at));
        most = warp_most(most);
        for (int at = lane; at < positions; at += WARP) total += expf(score(at) - most);
        total = warp_sum(total);
    }

    __device__ __forceinline__ float score(int at) const { return x[at] * factor + bias[at]; }
    __device__ __forceinline__ float share(int at) const { return expf(score(at) - most) / total; }
};

// y = softmax(factor x + bias) of each row; a warp for each.
extern "C" __global__ __launch_bounds__(ELEMENTS) void train_softmax(const float* x, const float* biases, float* y, unsigned long long all,
                                                                     int rows, int count, int positions, float factor) {
    const size_t row = (static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x) / WARP;
    if (row >= all) return;
    const Scores scores(x, biases, row, rows, count, positions, factor);
    for (int at = threadIdx.x % WARP; at < positions; at += WARP) y[row * positions + at] = scores.share(at);
}

// dx = factor y (dy - sum(y dy))
extern "C" __global__ __launch_bounds__(ELEMENTS) void train_softmax_back(const float* x, const float* biases, const float* dy, float* dx,
                                                                          unsigned long long all, int rows, int count, int positions,
                                                                          float factor) {
    const size_t row = (static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x) / WARP;
    if (row >= all) return;
    const Scores scores(x, biases, row, rows, count, positions, factor);
    dy += row * positions;
    float along = 0.0f;
    for (int at = threadIdx.x % WARP; at < positions; at += WARP) along += scores.share(at) * dy[at];
    along = warp_sum(along);
    for (int at = threadIdx.x % WARP; at < positions; at += WARP) {
        dx[row * positions + at] = factor * scores.share(at) * (dy[at] - along);
    }
}

// The logarithm of a row's sum of exponentials, in every thread of a block.
__device__ float log_sum(const float* row, int width, float* scratch) {
    float most = -INFINITY, total = 0.0f;
    for (int at = threadIdx.x; at < width; at += blockDim.x) {
        const float x = row[at];
        if (x > most) {
            total *= expf(most - x);
            most = x;
        }
        total += expf(x - most);
    }
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    float of_block = warp_most(most);
    __syncthreads();
    if (lane == 0) scratch[warp] = of_block;
    __syncthreads();
    of_block = warp_most(lane < warps ? scratch[lane] : -INFINITY);
    // A thread that saw nothing has a total of zero.
    total = block_sum(total > 0.0f ? total * expf(most - of_block) : 0.0f, scratch);
    return of_block + logf(total);
}

// A block for each row of logits: -log softmax(logits)[target].
extern "C" __global__ __launch_bounds__(VOCABULARY_THREADS) void train_cross_entropy(const float* logits, const unsigned* targets,
                                                                                     float* losses, int width) {
    __shared__ float scratch[VOCABULARY_THREADS / WARP];
    const float* row = logits + static_cast<size_t>(blockIdx.x) * width;
    const float total = log_sum(row, width, scratch);
    if (threadIdx.x == 0) losses[blockIdx.x] = total - row[targets[blockIdx.x]];
}

// weight / count (softmax(logits) - 1 at the target)
extern "C" __global__ __launch_bounds__(VOCABULARY_THREADS) void train_cross_entropy_back(const float* logits, const unsigned* targets,
                                                                                          const float* weight, float* gradient, int width,
                                                                                          float count) {
    __shared__ float scratch[VOCABULARY_THREADS / WARP];
    const size_t first = static_cast<size_t>(blockIdx.x) * width;
    const float total = log_sum(logits + first, width, scratch), factor = *weight / count;
    const unsigned target = targets[blockIdx.x];
    for (int at = threadIdx.x; at < width; at += blockDim.x) {
        gradient[first + at] = factor * (expf(logits[first + at] - total) - (static_cast<unsigned>(at) == target ? 1.0f : 0.0f));
    }
}

// A block for each row: KL(softmax(teacher) || softmax(logits)).
extern "C" __global__ __launch_bounds__(VOCABULARY_THREADS) void train_divergence(const float* teacher, const float* logits, float* losses,
                                                                                  int width) {
    __shared__ float scratch[VOCABULARY_THREADS / WARP];
    teacher += static_cast<size_t>(blockIdx.x) * width;
    logits += static_cast<size_t>(blockIdx.x) * width;
    const float of_teacher = log_sum(teacher, width, scratch), of_logits = log_sum(logits, width, scratch);
    float sum = 0.0f;
    for (int at = threadIdx.x; at < width; at += blockDim.x) {
        const float share = teacher[at] - of_teacher;
        sum += expf(share) * (share - (logits[at] - of_logits));
    }
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) losses[blockIdx.x] = sum;
}

// weight / count (softmax(logits) - softmax(teacher))
extern "C" __global__ __launch_bounds__(VOCABULARY_THREADS) void train_divergence_back(const float* teacher, const float* logits,
                                                                                       const float* weight, float* gradient, int width,
                                                                                       float count) {
    __shared__ float scratch[VOCABULARY_THREADS / WARP];
    const size_t first = static_cast<size_t>(blockIdx.x) * width;
    const float of_teacher = log_sum(teacher + first, width, scratch), of_logits = log_sum(logits + first, width, scratch);
    const float factor = *weight / count;
    for (int at = threadIdx.x; at < width; at += blockDim.x) {
        gradient[first + at] = factor * (expf(logits[first + at] - of_logits) - expf(teacher[first + at] - of_teacher));
    }
}
