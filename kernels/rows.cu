// Operations on rows of activations (f32, row-major) that no weight matrix takes part in.
#include "common.cuh"

// y[t] = table[tokens[t]]. One block a row.
extern "C" __global__ void embed(const __nv_bfloat16* __restrict__ table, int stride, const unsigned* __restrict__ tokens,
                                 float* __restrict__ y, int width) {
    const size_t row = blockIdx.x;
    const __nv_bfloat16* from = table + static_cast<size_t>(tokens[row]) * stride;
    for (int i = threadIdx.x; i < width; i += blockDim.x) y[row * width + i] = __bfloat162float(from[i]);
}

// y[t] = x[rows[t]]. One block a row.
extern "C" __global__ void select_rows(const float* __restrict__ x, const unsigned* __restrict__ rows, float* __restrict__ y,
                                       int width) {
    const size_t row = blockIdx.x, from = rows[row];
    for (int i = threadIdx.x; i < width; i += blockDim.x) y[row * width + i] = x[from * width + i];
}

// y = x / sqrt(mean(x^2) + eps) * weight. One block a row.
extern "C" __global__ void rms_norm(const float* __restrict__ x, const float* __restrict__ weight, float* __restrict__ y,
                                    int width, float eps) {
    __shared__ float scratch[WARP];
    const float* from = x + static_cast<size_t>(blockIdx.x) * width;
    float squares = 0.0f;
    for (int i = threadIdx.x; i < width; i += blockDim.x) squares += from[i] * from[i];
    const float scale = rsqrtf(block_sum(squares, scratch) / width + eps);
    float* to = y + static_cast<size_t>(blockIdx.x) * width;
    for (int i = threadIdx.x; i < width; i += blockDim.x) to[i] = from[i] * scale * weight[i];
}

// x += y
extern "C" __global__ void add_rows(float* __restrict__ x, const float* __restrict__ y, size_t count) {
    const size_t at = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at < count) x[at] += y[at];
}

// gate = silu(gate) * up; zero where a row's sub-network is not active, because gate is.
extern "C" __global__ void silu_multiply(float* __restrict__ gate, const float* __restrict__ up, size_t count) {
    const size_t at = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at < count) gate[at] = gate[at] / (1.0f + expf(-gate[at])) * up[at];
}

// Rotates each head of x (T, heads * D) by its row's angles, of which `angles` holds D / 2 cosines, then D / 2 sines; the two
// halves of a head pair up. One block a row.
extern "C" __global__ void rotary(float* __restrict__ x, const float* __restrict__ angles, int width, int half) {
    float* row = x + static_cast<size_t>(blockIdx.x) * width;
    const float* by = angles + static_cast<size_t>(blockIdx.x) * 2 * half;
    for (int i = threadIdx.x; i < width / 2; i += blockDim.x) {
        const int at = i / half * 2 * half + i % half, pair = i % half;
        const float first = row[at], second = row[at + half];
        row[at] = first * by[pair] - second * by[half + pair];
        row[at + half] = second * by[pair] + first * by[half + pair];
    }
}
