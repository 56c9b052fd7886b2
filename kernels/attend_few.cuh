// What `attend` of attend_few.cu is made of: how a block cuts its work, where it keeps keys and values, how lanes add up.
#pragma once

#include "attention.cuh"
#include "mma.cuh"

constexpr int min_of(int a, int b) { return a < b ? a : b; }

// Positions that one block takes: a longer context is split over several. Results depend on it, and on nothing else. In bytes
// it is 64 KiB of keys and values at most, so that two or three blocks are on a multiprocessor at a time. `few` in
// src/backend/cuda/attention.rs knows how many there are.
constexpr int MOST_POSITIONS = 128, MOST_BYTES = 64 << 10, BLOCK_WARPS = 8;

// How a block cuts its work: LANES lanes have a position's head, eight numbers each, for HEADS query heads at a time. WIDE: the
// head's size is a multiple of eight.
template <typename T_, int LANES_, int HEADS_, bool WIDE_>
struct Cut {
    using T = T_;
    static constexpr bool WIDE = WIDE_;
    static constexpr int LANES = LANES_, HEADS = HEADS_, WARPS = BLOCK_WARPS, THREADS = WARPS * WARP, WIDTH = 8 * LANES;
    static constexpr int CHUNK = min_of(MOST_POSITIONS, MOST_BYTES / (2 * WIDTH * static_cast<int>(sizeof(T))));
    static constexpr int ABREAST = WARP / LANES;                // positions that a warp loads at once
    static constexpr int LOADS = CHUNK / (WARPS * ABREAST);     // that each lane makes, of keys and of values
    static constexpr int SAME = LANES / LOADS;                  // lanes that end up with the same position's score
    static constexpr int WORDS = 8 * static_cast<int>(sizeof(T)) / 16;  // of 16 bytes, in a lane's eight numbers
    static_assert(LOADS >= 1 && LOADS <= LANES && LOADS * ABREAST <= WARP, "a lane looks up one position");
};

// A number that is not waited for before it is needed, and whose load stays where it stands.
__device__ __forceinline__ int load_now(const int* from) {
#ifdef LONAS_EMULATED
    return *from;
#else
    int x;
    asm volatile("ld.global.b32 %0, [%1];" : "=r"(x) : "l"(from));
    return x;
#endif
}

// A head's eight numbers from `d` on, those beyond its size zero.
template <bool WIDE>
__device__ __forceinline__ void take_eight(const float* head, int d, int size, float (&to)[8]) {
    if constexpr (WIDE) {
        if (d < size) return load_eight(head + d, to);
    }
#pragma unroll
    for (int i = 0; i < 8; i++) to[i] = !WIDE && d + i < size ? head[d + i] : 0.0f;
}

// How a lane's eight numbers of a head turn: each becomes itself times `cosine`, plus that half a head away times `sine`.
template <bool WIDE>
struct Turn {
    float cosine[8], sine[8];

    __device__ __forceinline__ void load(const float* angles, int d, int size) {
        const int half = size / 2;
        if constexpr (WIDE) {  // half of the head is a multiple of four
#pragma unroll
            for (int i = 0; i < 8; i += 4) {
                const bool lower = d + i < half;
                float4 a = {0.0f, 0.0f, 0.0f, 0.0f}, b = a;
                if (d < size) {
                    const float* pair = angles + (lower ? d + i : d + i - half);
                    // The sines of a head's angles begin after half a head.
                    a = *reinterpret_cast<const float4*>(pair), b = *reinterpret_cast<const float4*>(pair + half);
                }
                const float sign = lower ? -1.0f : 1.0f;
                cosine[i] = a.x, cosine[i + 1] = a.y, cosine[i + 2] = a.z, cosine[i + 3] = a.w;
                sine[i] = sign * b.x, sine[i + 1] = sign * b.y, sine[i + 2] = sign * b.z, sine[i + 3] = sign * b.w;
            }
        } else {
            for (int i = 0; i < 8; i++) {
                const bool lower = d + i < half, inside = d + i < size;
                const int pair = lower ? d + i : d + i - half;
                cosine[i] = inside ? angles[pair] : 0.0f;
                sine[i] = inside ? (lower ? -angles[half + pair] : angles[half + pair]) : 0.0f;
            }
        }
    }

    __device__ __forceinline__ void take(const float* head, int d, int size, float (&to)[8]) const {
        take_eight<WIDE>(head, d, size, to);
        const int half = size / 2;
        float away[8];
#pragma unroll
        for (int i = 0; i < 8; i += 4) {
            if constexpr (WIDE) {
                float4 four = {0.0f, 0.0f, 0.0f, 0.0f};
                if (d < size) four = *reinterpret_cast<const float4*>(head + (d + i < half ? d + i + half : d + i - half));
                away[i] = four.x, away[i + 1] = four.y, away[i + 2] = four.z, away[i + 3] = four.w;
            } else {
                for (int j = i; j < i + 4; j++) away[j] = d + j < size ? head[d + j < half ? d + j + half : d + j - half] : 0.0f;
            }
        }
#pragma unroll
        for (int i = 0; i < 8; i++) to[i] = fmaf(to[i], cosine[i], fmaf(away[i], sine[i], 0.0f));
    }
};

// Where a thread keeps the keys and values that it loads and nobody else reads: in shared memory, but without a barrier.
template <class C>
struct Kept {
    using T = typename C::T;
    uint4* staged;

    __device__ __forceinline__ uint4& at(int which, int i, int word) {
        return staged[((which * C::LOADS + i) * C::WORDS + word) * C::THREADS + threadIdx.x];
    }
    __device__ __forceinline__ void copy(int which, int i, const T* from, bool inside) {
#pragma unroll
        for (int word = 0; word < C::WORDS; word++) {
            cp_async_16(&at(which, i, word), from + word * (16 / sizeof(T)), inside ? 16 : 0);
        }
    }
    __device__ __forceinline__ void get(int which, int i, float (&eight)[8]) {
        if constexpr (C::WORDS == 1) {
            load_eight(reinterpret_cast<const __nv_bfloat16*>(&at(which, i, 0)), eight);
        } else {
#pragma unroll
            for (int word = 0; word < 2; word++) {
                const uint4 bits = at(which, i, word);
                eight[4 * word] = __uint_as_float(bits.x), eight[4 * word + 1] = __uint_as_float(bits.y);
                eight[4 * word + 2] = __uint_as_float(bits.z), eight[4 * word + 3] = __uint_as_float(bits.w);
            }
        }
    }
    __device__ __forceinline__ void put_eight(int which, int i, const float (&eight)[8]) {
        if constexpr (C::WORDS == 1) {
            unsigned pairs[4];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const __nv_bfloat162 two = __floats2bfloat162_rn(eight[2 * j], eight[2 * j + 1]);
                pairs[j] = reinterpret_cast<const unsigned&>(two);
            }
            at(which, i, 0) = {pairs[0], pairs[1], pairs[2], pairs[3]};
        } else {
#pragma unroll
            for (int word = 0; word < 2; word++) {
                at(which, i, word) = {__float_as_uint(eight[4 * word]), __float_as_uint(eight[4 * word + 1]),
                                      __float_as_uint(eight[4 * word + 2]), __float_as_uint(eight[4 * word + 3])};
            }
        }
    }
};

// Sums over lanes HIGH, HIGH / 2, .. LOW apart of N numbers each: halves of them go to either side while there are several, so
// that a lane is left with N / (2 HIGH / LOW) sums, or one. Its bit HIGH says whether they are of the upper half, and so on.
template <int N, int HIGH, int LOW, int MOST>
__device__ __forceinline__ void fold(float (&x)[MOST]) {
    if constexpr (HIGH >= LOW) {
        if constexpr (N > 1) {
            const bool upper = threadIdx.x & HIGH;
#pragma unroll
            for (int i = 0; i < N / 2; i++) {
                const float give = upper ? x[i] : x[i + N / 2], keep = upper ? x[i + N / 2] : x[i];
                x[i] = keep + __shfl_xor_sync(ALL_LANES, give, HIGH);
            }
            fold<N / 2, HIGH / 2, LOW>(x);
        } else {
            x[0] += __shfl_xor_sync(ALL_LANES, x[0], HIGH);
            fold<1, HIGH / 2, LOW>(x);
        }
    }
}
