// What a kernel sees of CUDA when it is compiled for the CPU: the built-in variables, barriers, warp collectives,
// atomics and fast maths; tensor cores and asynchronous copies are in tensor.h. Included through common.cuh in place of
// the CUDA runtime, when LONAS_EMULATED is defined.
//
// Every CUDA thread of a block is a fiber, the block runs on one operating system thread, and a fiber gives way only
// at a barrier or a collective; so atomics need no locks here. How fibers are ordered is in scheduler.cpp; this file
// knows nothing of devices, streams or memory.
#pragma once

#include <math.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <type_traits>
#include <utility>

#include <vector_types.h>

#include <vector_functions.h>

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __constant__
#undef __grid_constant__
#undef __launch_bounds__
#define __device__
#define __host__
#define __constant__ static
#define __grid_constant__
// A static without a value, which build.sh puts into a section of the source file's own; the scheduler fills that with
// NaN before each block. (A section attribute would be shorter, but g++ drops it inside of templates.) Marked as used,
// or the compiler takes an array that is never written for zeros.
#define __shared__ static __attribute__((used))
#ifndef LONAS_LIST_KERNELS  // build.sh finds the kernels by these two words in the preprocessed text
#define __global__
#define __launch_bounds__(...)
#endif
#define DYN_SHARED(type, name) type* name = reinterpret_cast<type*>(emulator::dynamic_shared)

// For what is the emulator's own work rather than the kernel's: the search for races leaves it out.
#define LONAS_UNWATCHED __attribute__((no_sanitize("thread")))

namespace emulator {

constexpr int kWarpSize = 32;
constexpr unsigned kFullMask = 0xffffffffu;

// What a fiber waits for: the call, where it stands in the source, and the lanes that must take part.
enum class Call : uint8_t {
    None,
    SyncThreads,
    SyncWarp,
    Shuffle,
    ShuffleXor,
    ShuffleDown,
    ShuffleUp,
    Vote,
    // From here on those whose lanes give the address of their operands: run_on_warp computes them.
    Multiply,
    LoadMatrix4,
    LoadMatrix2,
    LoadMatrix4Trans,
    LoadMatrix2Trans
};
struct Place {
    const char* file;
    int line;
};

enum class State : uint8_t { Runnable, AtBarrier, AtCollective, Exited };
struct Fiber {
    void* stack_pointer;
    uint3 thread;
    int index;  // linear in the block
    State state;
    Call call;
    Place place;
    unsigned mask;
    uint64_t given;  // what this lane brings to the collective
};

// Of the block that runs now. One block runs at a time in the whole process: the driver's lock sees to it.
extern Fiber* current;
extern uint3 block_index;
extern dim3 block_size, grid_size;
extern unsigned char* dynamic_shared;
extern uint64_t* warp_values;  // by lane, what the current fiber's warp brought to the collective that has returned

void barrier(Place place);
void collective(Call call, unsigned mask, uint64_t value, Place place);
void note_atomic(const void* address, size_t size, const void* code);  // for the search for races
[[noreturn]] void source_outside_mask(int source, Place place);

LONAS_UNWATCHED inline int lane() { return current->index % kWarpSize; }

// A warp collective over `mask`; the value of lane `source`, which the lane itself computes.
template <class T>
LONAS_UNWATCHED T shuffle(Call call, unsigned mask, T value, int source, Place place) {
    static_assert(std::is_trivially_copyable<T>::value && sizeof(T) <= sizeof(uint64_t), "a shuffle moves up to 8 bytes");
    if (!(mask >> source & 1)) source_outside_mask(source, place);
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(T));
    collective(call, mask, bits, place);
    memcpy(&value, &warp_values[source], sizeof(T));
    return value;
}

// A kernel as the driver sees it: how it is called with the array of argument addresses that cuLaunchKernel gets.
struct Kernel {
    const char* name;
    void (*call)(void** arguments);
    int arguments;
    const size_t* argument_sizes;
    const bool* argument_is_pointer;
    unsigned max_threads;  // from __launch_bounds__
    unsigned char *shared_begin, *shared_end;
};
void register_kernel(const Kernel& kernel);

template <auto function, class Type = decltype(function)>
struct Signature;
template <auto function, class... Arguments>
struct Signature<function, void (*)(Arguments...)> {
    static constexpr size_t count = sizeof...(Arguments);
    // One more than needed: a kernel without arguments would make them empty.
    static constexpr size_t sizes[count + 1] = {sizeof(Arguments)..., 0};
    static constexpr bool is_pointer[count + 1] = {std::is_pointer<Arguments>::value..., false};
    template <size_t... index>
    LONAS_UNWATCHED static void spread(void** arguments, std::index_sequence<index...>) {
        (void)arguments;
        function(*static_cast<std::remove_reference_t<Arguments>*>(arguments[index])...);
    }
    LONAS_UNWATCHED static void call(void** arguments) { spread(arguments, std::make_index_sequence<count>{}); }
};

struct Registration {
    template <class S>
    Registration(S, const char* name, unsigned max_threads, unsigned char* shared_begin, unsigned char* shared_end) {
        register_kernel(
            {name, S::call, static_cast<int>(S::count), S::sizes, S::is_pointer, max_threads, shared_begin, shared_end});
    }
};

inline unsigned first_bound(unsigned threads, unsigned = 0, unsigned = 0) { return threads; }

}  // namespace emulator

#define threadIdx (::emulator::current->thread)
#define blockIdx (::emulator::block_index)
#define blockDim (::emulator::block_size)
#define gridDim (::emulator::grid_size)
constexpr int warpSize = emulator::kWarpSize;

// The last parameters are the caller's file and line: a message can then say where each thread waits.
#define LONAS_CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define LONAS_PLACE (emulator::Place{file, line})

LONAS_UNWATCHED inline void __syncthreads(LONAS_CALLER) { emulator::barrier(LONAS_PLACE); }
LONAS_UNWATCHED inline void __syncwarp(unsigned mask = emulator::kFullMask, LONAS_CALLER) {
    emulator::collective(emulator::Call::SyncWarp, mask, 0, LONAS_PLACE);
}

template <class T>
LONAS_UNWATCHED T __shfl_sync(unsigned mask, T value, int source, int width = 32, LONAS_CALLER) {
    const int first = emulator::lane() / width * width;
    return emulator::shuffle(emulator::Call::Shuffle, mask, value, first + (source & (width - 1)), LONAS_PLACE);
}
template <class T>
LONAS_UNWATCHED T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, LONAS_CALLER) {
    // The PTX rule: a source in a higher segment is out of range and gives back the lane's own value; a lower one is not.
    const int lane = emulator::lane(), source = lane ^ lanes;
    const int last = lane / width * width + width - 1;
    return emulator::shuffle(emulator::Call::ShuffleXor, mask, value, source > last ? lane : source, LONAS_PLACE);
}
template <class T>
LONAS_UNWATCHED T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, LONAS_CALLER) {
    const int lane = emulator::lane(), last = lane / width * width + width - 1;
    const bool inside = delta < 32 && lane + static_cast<int>(delta) <= last;
    return emulator::shuffle(emulator::Call::ShuffleDown, mask, value, inside ? lane + static_cast<int>(delta) : lane,
                             LONAS_PLACE);
}
template <class T>
LONAS_UNWATCHED T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, LONAS_CALLER) {
    const int lane = emulator::lane(), first = lane / width * width;
    const bool inside = delta < 32 && lane - static_cast<int>(delta) >= first;
    return emulator::shuffle(emulator::Call::ShuffleUp, mask, value, inside ? lane - static_cast<int>(delta) : lane,
                             LONAS_PLACE);
}
LONAS_UNWATCHED inline unsigned __ballot_sync(unsigned mask, int predicate, LONAS_CALLER) {
    emulator::collective(emulator::Call::Vote, mask, predicate != 0, LONAS_PLACE);
    unsigned votes = 0;
    for (int lane = 0; lane < emulator::kWarpSize; ++lane)
        if (mask >> lane & 1 && emulator::warp_values[lane] == 1) votes |= 1u << lane;
    return votes;
}
LONAS_UNWATCHED inline int __any_sync(unsigned mask, int predicate, LONAS_CALLER) {
    return __ballot_sync(mask, predicate, file, line) != 0;
}
LONAS_UNWATCHED inline int __all_sync(unsigned mask, int predicate, LONAS_CALLER) {
    return __ballot_sync(mask, !predicate, file, line) == 0;
}
inline int __syncthreads_or(int) = delete;  // not emulated: refused by the compiler rather than wrong
inline int __syncthreads_and(int) = delete;
inline int __syncthreads_count(int) = delete;
inline void __threadfence() {}
inline void __threadfence_block() {}

template <class T>
T __ldg(const T* address) {
    return *address;
}
template <class T>
T __ldcg(const T* address) {
    return *address;
}
template <class T>
T __ldcs(const T* address) {
    return *address;
}
template <class T>
void __stcs(T* address, T value) {
    *address = value;
}

// Read-modify-write; fibers give way at barriers and collectives only, so nothing can come between.
template <class T, class Change>
LONAS_UNWATCHED T emulator_update(T* address, const void* code, Change change) {
    emulator::note_atomic(address, sizeof(T), code);
    const T old = *address;
    *address = change(old);
    return old;
}
#define LONAS_UPDATE(type, expression)                    \
    emulator_update(address, __builtin_return_address(0), \
                    [=](type old) LONAS_UNWATCHED -> type { return static_cast<void>(old), expression; })
#define LONAS_ATOMIC(name, type, expression) \
    LONAS_UNWATCHED inline type name(type* address, type value) { return LONAS_UPDATE(type, expression); }
#define LONAS_ATOMICS(type)                                                           \
    LONAS_ATOMIC(atomicAdd, type, old + value)                                        \
    LONAS_ATOMIC(atomicMax, type, old < value ? value : old)                          \
    LONAS_ATOMIC(atomicMin, type, value < old ? value : old)                          \
    LONAS_ATOMIC(atomicOr, type, old | value)                                         \
    LONAS_ATOMIC(atomicAnd, type, old& value)                                         \
    LONAS_ATOMIC(atomicExch, type, value)                                             \
    LONAS_UNWATCHED inline type atomicCAS(type* address, type expected, type value) { \
        return LONAS_UPDATE(type, old == expected ? value : old);                     \
    }
LONAS_ATOMICS(int)
LONAS_ATOMICS(unsigned)
LONAS_ATOMICS(unsigned long long)
LONAS_ATOMIC(atomicAdd, float, old + value)
LONAS_ATOMIC(atomicAdd, double, old + value)
LONAS_ATOMIC(atomicExch, float, value)
LONAS_ATOMIC(atomicSub, int, old - value)
LONAS_ATOMIC(atomicSub, unsigned, old - value)
LONAS_ATOMIC(atomicInc, unsigned, old >= value ? 0 : old + 1)
#undef LONAS_ATOMICS
#undef LONAS_ATOMIC
#undef LONAS_UPDATE

// The fast forms are exact to the last bit or two here: tolerances have to allow for the device's own error.
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __frsqrt_rn(float x) { return 1.0f / sqrtf(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline float __exp10f(float x) { return powf(10.0f, x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __sinf(float x) { return sinf(x); }
inline float __cosf(float x) { return cosf(x); }
inline void __sincosf(float x, float* sine, float* cosine) { *sine = sinf(x), *cosine = cosf(x); }
inline float __powf(float x, float y) { return powf(x, y); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }
inline int __float2int_rn(float x) { return static_cast<int>(nearbyintf(x)); }
inline int __float2int_rz(float x) { return static_cast<int>(x); }

template <class To, class From>
To emulator_bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "a cast of bits keeps the size");
    To to;
    memcpy(&to, &from, sizeof(To));
    return to;
}
inline float __int_as_float(int x) { return emulator_bits<float>(x); }
inline float __uint_as_float(unsigned x) { return emulator_bits<float>(x); }
inline int __float_as_int(float x) { return emulator_bits<int>(x); }
inline unsigned __float_as_uint(float x) { return emulator_bits<unsigned>(x); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __umulhi(unsigned x, unsigned y) { return static_cast<unsigned>(static_cast<uint64_t>(x) * y >> 32); }
inline int __dp4a(int a, int b, int c) {
    for (int byte = 0; byte < 4; ++byte) c += static_cast<int8_t>(a >> 8 * byte) * static_cast<int8_t>(b >> 8 * byte);
    return c;
}

inline int min(int x, int y) { return y < x ? y : x; }
inline int max(int x, int y) { return x < y ? y : x; }
inline unsigned min(unsigned x, unsigned y) { return y < x ? y : x; }
inline unsigned max(unsigned x, unsigned y) { return x < y ? y : x; }
inline long long min(long long x, long long y) { return y < x ? y : x; }
inline long long max(long long x, long long y) { return x < y ? y : x; }
inline size_t min(size_t x, size_t y) { return y < x ? y : x; }
inline size_t max(size_t x, size_t y) { return x < y ? y : x; }
inline unsigned long long min(unsigned long long x, unsigned long long y) { return y < x ? y : x; }
inline unsigned long long max(unsigned long long x, unsigned long long y) { return x < y ? y : x; }
inline float min(float x, float y) { return fminf(x, y); }
inline float max(float x, float y) { return fmaxf(x, y); }

#include "tensor.h"
