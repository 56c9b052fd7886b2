// Operations on rows of activations that no weight matrix takes part in. Rows are f32 where they are sums, and bf16 where
// products take them; both begin at multiples of `stride` numbers, which is a multiple of eight.
#include "formats.cuh"

// y[t] = table[tokens[t]]. One block a row.
extern "C" __global__ void embed(const Matrix table, const unsigned* __restrict__ tokens, float* __restrict__ y, int y_stride,
                                 int width) {
    begin_after_previous_kernel();
    const size_t row = blockIdx.x;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        y[row * y_stride + i] = __bfloat162float(number_at(table, tokens[row], i));
    }
}

// y = weight, in bf16, for the products of many rows; zeros between a row's end and the next one. One block a row.
extern "C" __global__ void unpack_weight(const Matrix weight, __nv_bfloat16* __restrict__ y, int y_stride, int columns) {
    begin_after_previous_kernel();
    const size_t row = blockIdx.x;
    for (int i = threadIdx.x; i < y_stride; i += blockDim.x) {
        y[row * y_stride + i] = i < columns ? number_at(weight, row, i) : __float2bfloat16(0.0f);
    }
}

// y[t] = x[rows[t]], rows of `words` times four bytes. One block a row.
extern "C" __global__ void select_rows(const unsigned* __restrict__ x, const unsigned* __restrict__ rows,
                                       unsigned* __restrict__ y, int words) {
    begin_after_previous_kernel();
    const size_t row = blockIdx.x, from = rows[row];
    for (int i = threadIdx.x; i < words; i += blockDim.x) y[row * words + i] = x[from * words + i];
}

// y = x / sqrt(mean(x^2) + eps) * weight, as bf16. One block a row.
extern "C" __global__ void rms_norm(const float* __restrict__ x, const float* __restrict__ weight,
                                    __nv_bfloat16* __restrict__ y, int stride, int width, float eps) {
    begin_after_previous_kernel();
    __shared__ float scratch[WARP];
    const float* from = x + static_cast<size_t>(blockIdx.x) * stride;
    float squares = 0.0f;
    for (int i = threadIdx.x; i < width; i += blockDim.x) squares += from[i] * from[i];
    const float scale = rsqrtf(block_sum(squares, scratch) / width + eps);
    __nv_bfloat16* to = y + static_cast<size_t>(blockIdx.x) * stride;
    for (int i = threadIdx.x; i < width; i += blockDim.x) to[i] = __float2bfloat16(from[i] * scale * weight[i]);
}

// y = (x - mean(x)) / sqrt(variance(x) + eps) * weight + bias, and the same as bf16: the residual goes on from the one, products take
// the other. One block a row.
extern "C" __global__ void layer_norm(const float* __restrict__ x, const float* __restrict__ weight, const float* __restrict__ bias,
                                      float* __restrict__ y, __nv_bfloat16* __restrict__ rounded, int stride, int width, float eps) {
    begin_after_previous_kernel();
    __shared__ float scratch[WARP];
    const size_t row = static_cast<size_t>(blockIdx.x) * stride;
    float sum = 0.0f, squares = 0.0f;
    for (int i = threadIdx.x; i < width; i += blockDim.x) sum += x[row + i];
    const float mean = block_sum(sum, scratch) / width;
    for (int i = threadIdx.x; i < width; i += blockDim.x) squares += (x[row + i] - mean) * (x[row + i] - mean);
    const float scale = rsqrtf(block_sum(squares, scratch) / width + eps);
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        const float normed = (x[row + i] - mean) * scale * weight[i] + bias[i];
        y[row + i] = normed, rounded[row + i] = __float2bfloat16(normed);
    }
}

// y = x / sqrt(mean(x^2) + eps) * weight for each head of `size` numbers by itself. One block a row, a warp a head at a time.
extern "C" __global__ void head_norm(const float* __restrict__ x, const float* __restrict__ weight, float* __restrict__ y, int stride,
                                     int width, int size, float eps) {
    begin_after_previous_kernel();
    const size_t row = static_cast<size_t>(blockIdx.x) * stride;
    const int lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    for (int head = threadIdx.x / WARP * size; head < width; head += warps * size) {
        float squares = 0.0f;
        for (int i = lane; i < size; i += WARP) squares += x[row + head + i] * x[row + head + i];
        const float scale = rsqrtf(warp_sum(squares) / size + eps);
        for (int i = lane; i < size; i += WARP) y[row + head + i] = x[row + head + i] * scale * weight[i];
    }
}

// A thread's number of rows of `width` numbers, and whether it is one: not beyond all, nor between a row's end and the next one.
__device__ __forceinline__ bool number_of_rows(size_t& at, size_t count, int width, int stride) {
    at = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    return at < count && static_cast<int>(at % stride) < width;
}

// The same numbers in the other form, or in this one; rows of x may be a part of wider ones, `x_stride` from one to the next.
extern "C" __global__ void to_bf16(const float* __restrict__ x, int x_stride, __nv_bfloat16* __restrict__ y, size_t count, int width,
                                   int stride) {
    begin_after_previous_kernel();
    size_t at;
    if (number_of_rows(at, count, width, stride)) y[at] = __float2bfloat16(x[at / stride * x_stride + at % stride]);
}
extern "C" __global__ void to_f32(const __nv_bfloat16* __restrict__ x, int x_stride, float* __restrict__ y, size_t count, int width,
                                  int stride) {
    begin_after_previous_kernel();
    size_t at;
    if (number_of_rows(at, count, width, stride)) y[at] = __bfloat162float(x[at / stride * x_stride + at % stride]);
}
extern "C" __global__ void copy_f32(const float* __restrict__ x, int x_stride, float* __restrict__ y, size_t count, int width,
                                    int stride) {
    begin_after_previous_kernel();
    size_t at;
    if (number_of_rows(at, count, width, stride)) y[at] = x[at / stride * x_stride + at % stride];
}

// x += y
extern "C" __global__ void add_rows(float* __restrict__ x, const float* __restrict__ y, size_t count, int width, int stride) {
    begin_after_previous_kernel();
    size_t at;
    if (number_of_rows(at, count, width, stride)) x[at] += y[at];
}

// y = silu(gate) * up, as bf16; zero where a row's sub-network is not active, because gate is.
extern "C" __global__ void silu_multiply(const float* __restrict__ gate, const float* __restrict__ up,
                                         __nv_bfloat16* __restrict__ y, size_t count, int width, int stride) {
    begin_after_previous_kernel();
    size_t at;
    if (number_of_rows(at, count, width, stride)) y[at] = __float2bfloat16(silu(gate[at]) * up[at]);
}

// `Activation` in src/backend/mod.rs.
enum Activation { GELU = 0, GELU_TANH = 1, TANH = 2, RELU = 3 };

// y = activation(x), as bf16; zero stays zero.
extern "C" __global__ void activate(const float* __restrict__ x, __nv_bfloat16* __restrict__ y, size_t count, int width, int stride,
                                    int activation) {
    begin_after_previous_kernel();
    size_t at;
    if (!number_of_rows(at, count, width, stride)) return;
    const float number = x[at];
    float active;
    if (activation == GELU) {
        active = 0.5f * number * (1.0f + erff(number * 0.70710678f));  // 1 / sqrt(2)
    } else if (activation == GELU_TANH) {
        active = 0.5f * number * (1.0f + tanhf(0.79788456f * (number + 0.044715f * number * number * number)));  // sqrt(2 / pi)
    } else if (activation == TANH) {
        active = tanhf(number);
    } else {
        active = number < 0.0f ? 0.0f : number;  // a NaN stays one
    }
    y[at] = __float2bfloat16(active);
}

// Rotates each head of x (T, heads * D) by its row's angles, of which `angles` holds D / 2 cosines, then as many sines; the two halves of a head pair up. One block a row.
extern "C" __global__ void rotary(float* __restrict__ x, int stride, const float* __restrict__ angles, int width, int half) {
    begin_after_previous_kernel();
    float* row = x + static_cast<size_t>(blockIdx.x) * stride;
    const float* by = angles + static_cast<size_t>(blockIdx.x) * 2 * half;
    for (int i = threadIdx.x; i < width / 2; i += blockDim.x) {
        const int at = i / half * 2 * half + i % half, pair = i % half;
        const float2 turned = rotate({row[at], row[at + half]}, by[pair], by[half + pair]);
        row[at] = turned.x;
        row[at + half] = turned.y;
    }
}
