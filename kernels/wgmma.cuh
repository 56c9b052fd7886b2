// Hopper's tensor cores: products by a warpgroup (four warps) whose both operands are tiles in shared memory, and the
// barriers by which copies and products wait for each other. sm_90a only.
#pragma once

#include "mma.cuh"

// Tiles for wgmma: rows of 64 bf16 (128 bytes) one after another, chunks of 16 bytes permuted by row (`swizzled<64>`), from a
// multiple of 1024 bytes on.

#if !defined(LONAS_EMULATED)

// Where a tile stands, as wgmma takes it (PTX manual, "Matrix Descriptor"): address / 16; from eight rows to the next eight
// 1024 bytes; the swizzle of 128 bytes. A product of 16 numbers of K later begins 32 bytes, that is 2, later.
__device__ __forceinline__ unsigned long long tile_descriptor(const bf16* tile) {
    return (shared_address(tile) & 0x3ffff) >> 4 | 1ull << 16 | 1024ull / 16 << 32 | 1ull << 62;
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Ordinary writes to shared memory become visible to wgmma, which reads past them.
__device__ __forceinline__ void fence_shared_writes() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// Before the first product on sums that other instructions wrote.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until all but the newest groups of this warpgroup's products are done.
template <int GROUPS_LEFT>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(GROUPS_LEFT) : "memory");
}

#define LONAS_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define LONAS_16(d, i) LONAS_4(d, i), LONAS_4(d, i + 4), LONAS_4(d, i + 8), LONAS_4(d, i + 12)
#define LONAS_32(d, i) LONAS_16(d, i), LONAS_16(d, i + 16)
#define LONAS_64(d, i) LONAS_32(d, i), LONAS_32(d, i + 32)

// d (64, N) += a (64, 16) b (N, 16)^T, both from shared memory. Warp w of the group has rows 16 w to 16 w + 15; d[4 n] and on is
// what mma_m16n8k16 calls its sums, of columns 8 n to 8 n + 7.
template <int N>
__device__ __forceinline__ void wgmma_m64k16(float (&d)[N / 2], unsigned long long a, unsigned long long b);
template <>
__device__ __forceinline__ void wgmma_m64k16<256>(float (&d)[128], unsigned long long a, unsigned long long b) {
    asm volatile(
        "{.reg .pred yes; setp.eq.b32 yes, 0, 0; "
        "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
        "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,"
        "%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,"
        "%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,"
        "%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,"
        "%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,"
        "%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
        "}, %128, %129, yes, 1, 1, 0, 0;}"
        : LONAS_64(d, 0), LONAS_64(d, 64)
        : "l"(a), "l"(b));
}
template <>
__device__ __forceinline__ void wgmma_m64k16<64>(float (&d)[32], unsigned long long a, unsigned long long b) {
    asm volatile(
        "{.reg .pred yes; setp.eq.b32 yes, 0, 0; "
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
        "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,"
        "%26,%27,%28,%29,%30,%31"
        "}, %32, %33, yes, 1, 1, 0, 0;}"
        : LONAS_32(d, 0)
        : "l"(a), "l"(b));
}

#undef LONAS_4
#undef LONAS_16
#undef LONAS_32
#undef LONAS_64

// A barrier in shared memory: it has phases, each over after so many arrivals.
__device__ __forceinline__ void barrier_init(unsigned long long* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_arrive(unsigned long long* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Arrives when all copies that this thread has begun are done.
__device__ __forceinline__ void barrier_arrive_copied(unsigned long long* barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Until the phase of this parity is over.
__device__ __forceinline__ void barrier_wait(unsigned long long* barrier, int parity) {
    unsigned done = 0;
    while (!done) {
        asm volatile(
            "{.reg .pred over; mbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2; selp.u32 %0, 1, 0, over;}"
            : "=r"(done)
            : "r"(shared_address(barrier)), "r"(parity)
            : "memory");
    }
}

#endif
#endif
