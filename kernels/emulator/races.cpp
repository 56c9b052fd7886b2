// Data races in shared memory. The kernels are compiled with -fsanitize=thread, which calls a function here before
// each load and store; of that sanitizer nothing else is used.
//
// Two accesses of one byte by different threads, one of them a write, must be ordered: by __syncthreads, or by
// __syncwarp when both threads are of one warp. Shuffles and votes do not order memory, and neither does the order in
// which fibers happen to run. Only the last write and the last read of a place are remembered (a read also whether
// others came with it), so a race can be missed, but what is reported is one.

#include <string.h>

#include <vector>

#include "driver.h"

namespace emulator {
namespace {

// A place is two bytes, the size of a bf16; the bytes of it that an access touches are a mask.
constexpr uint64_t kPlace = 2;

struct Access {
    const void* code = nullptr;
    uint32_t epoch = 0, warp_epoch = 0;
    uint16_t thread = 0;
    uint8_t bytes = 0;
    bool atomic = false;
    bool other_lanes = false, other_warps = false;  // of reads: some came from elsewhere in the same interval
};
struct Cell {
    Access write, read;
    const void* copying = nullptr;  // the cp.async that is yet to write it
};

struct Region {
    uint64_t begin = 0, size = 0;
    std::vector<Cell> cells;
    void cover(const unsigned char* from, const unsigned char* to) {
        begin = reinterpret_cast<uint64_t>(from) / kPlace * kPlace;
        size = reinterpret_cast<uint64_t>(to) - begin;
        if (cells.size() < size / kPlace + 1) cells.resize(size / kPlace + 1);
    }
};
Region dynamic_region, static_region;

bool same_warp(unsigned a, unsigned b) { return a / kWarpSize == b / kWarpSize; }

// Whether `before` and an access of the current thread may happen in either order.
bool unordered(const Access& before, unsigned thread, uint8_t bytes) {
    if (before.epoch != barrier_epoch || !(before.bytes & bytes)) return false;
    if (before.other_warps) return true;
    if (!same_warp(before.thread, thread)) return true;
    if (before.warp_epoch != warp_epochs[thread / kWarpSize]) return false;
    return before.thread != thread || before.other_lanes;
}

std::string place_of(uint64_t address) {
    const bool dynamic = address - dynamic_region.begin < dynamic_region.size;
    return dynamic ? "dynamic shared memory, byte " + std::to_string(address - reinterpret_cast<uint64_t>(dynamic_shared))
                   : "static shared memory";
}

[[noreturn]] void report(const char* now, const char* then, const Access& before, uint64_t address, const void* code) {
    const unsigned x = before.thread % block_size.x, y = before.thread / block_size.x % block_size.y,
                   z = before.thread / block_size.x / block_size.y;
    fail("a race in " + place_of(address) + ": a " + now + source_line(code) + " and a " + then + source_line(before.code) +
         " by thread (" + std::to_string(x) + "," + std::to_string(y) + "," + std::to_string(z) +
         ") are not ordered by a barrier");
}

void note(Cell& cell, const Access& access, bool write, uint64_t address) {
    const unsigned thread = access.thread;
    if (cell.copying)
        fail("a race in " + place_of(address) + ": a " + (write ? "write" : "read") + source_line(access.code) +
             " of what a cp.async" + source_line(cell.copying) + " still writes: nobody has waited for it");
    const bool read_by_all = cell.read.epoch == barrier_epoch && cell.read.other_warps && !(access.bytes & ~cell.read.bytes);
    // The common case by far: a place that nobody writes in this interval, and of whose readers there is no more to know.
    if (!write && read_by_all && cell.write.epoch != barrier_epoch) return;
    if (!(access.atomic && cell.write.atomic) && unordered(cell.write, thread, access.bytes))
        report(write ? "write" : "read", "write", cell.write, address, access.code);
    if (write) {
        if (unordered(cell.read, thread, access.bytes)) report("write", "read", cell.read, address, access.code);
        cell.write = access;
        return;
    }
    Access& read = cell.read;
    if (read.epoch != access.epoch) {
        read = access;
        return;
    }
    const bool other_warps = read.other_warps || !same_warp(read.thread, thread);
    const bool other_lanes = read.warp_epoch == access.warp_epoch && (read.other_lanes || read.thread != thread);
    const uint8_t bytes = read.bytes | access.bytes;
    read = access;
    read.bytes = bytes;
    read.other_warps = other_warps;
    read.other_lanes = other_lanes;
}

__attribute__((noinline)) void shared_access(Region* region, uint64_t address, size_t size, bool write, bool atomic,
                                             const void* code) {
    Access now;
    now.code = code;
    now.epoch = barrier_epoch;
    now.thread = static_cast<uint16_t>(current->index);
    now.warp_epoch = warp_epochs[now.thread / kWarpSize];
    now.atomic = atomic;
    for (uint64_t at = address; at < address + size;) {
        const uint64_t offset = at - region->begin, place_end = region->begin + (offset / kPlace + 1) * kPlace;
        now.bytes = 0;
        for (; at < address + size && at < place_end; ++at) now.bytes |= 1u << (at - region->begin) % kPlace;
        if (offset / kPlace < region->cells.size()) note(region->cells[offset / kPlace], now, write, region->begin + offset);
    }
}

// Most accesses are of device memory and end here.
inline void access(const void* pointer, size_t size, bool write, bool atomic, const void* code) {
    const uint64_t address = reinterpret_cast<uint64_t>(pointer);
    if (address - dynamic_region.begin < dynamic_region.size)
        shared_access(&dynamic_region, address, size, write, atomic, code);
    else if (address - static_region.begin < static_region.size)
        shared_access(&static_region, address, size, write, atomic, code);
}

}  // namespace

void watch_shared(const unsigned char* dynamic_begin, const unsigned char* dynamic_end, const unsigned char* static_begin,
                  const unsigned char* static_end) {
    dynamic_region.cover(dynamic_begin, dynamic_end);
    static_region.cover(static_begin, static_end);
}
bool in_shared(const void* address, size_t size) {
    const auto inside = [&](const Region& region) {
        const uint64_t offset = reinterpret_cast<uint64_t>(address) - region.begin;
        return offset < region.size && size <= region.size - offset;
    };
    return inside(dynamic_region) || inside(static_region);
}
void note_shared(const void* address, size_t size, bool write, const void* code) {
    access(address, size, write, false, code);
}
void mark_copying(const void* address, size_t size, const void* code) {
    for (Region* region : {&dynamic_region, &static_region}) {
        const uint64_t offset = reinterpret_cast<uint64_t>(address) - region->begin;
        if (offset >= region->size) continue;
        for (size_t at = offset / kPlace; at < (offset + size) / kPlace; ++at) region->cells[at].copying = code;
        return;
    }
}
void note_atomic(const void* address, size_t size, const void* code) { access(address, size, true, true, code); }

}  // namespace emulator

// What the compiler calls. The names and their meaning are those of the sanitizer's own runtime, which is not linked.
#define LONAS_HOOK(name, size, write)    \
    extern "C" void name(void* address); \
    extern "C" void name(void* address) { emulator::access(address, size, write, false, __builtin_return_address(0)); }
#define LONAS_HOOKS(size)                                \
    LONAS_HOOK(__tsan_read##size, size, false)           \
    LONAS_HOOK(__tsan_write##size, size, true)           \
    LONAS_HOOK(__tsan_unaligned_read##size, size, false) \
    LONAS_HOOK(__tsan_unaligned_write##size, size, true)
LONAS_HOOKS(1)
LONAS_HOOKS(2)
LONAS_HOOKS(4)
LONAS_HOOKS(8)
LONAS_HOOKS(16)
extern "C" {
void __tsan_init();
void __tsan_func_entry(void*);
void __tsan_func_exit();
void __tsan_vptr_update(void**, void*);
void __tsan_read_range(void* address, size_t size);
void __tsan_write_range(void* address, size_t size);
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_read_range(void* address, size_t size) {
    emulator::access(address, size, false, false, __builtin_return_address(0));
}
void __tsan_write_range(void* address, size_t size) {
    emulator::access(address, size, true, false, __builtin_return_address(0));
}
}
