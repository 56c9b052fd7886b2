// Device memory: host pages between two guard pages, so that a kernel which leaves an allocation faults at once.
//
// An allocation ends, to within 16 bytes, at its upper guard page; what lies between is filled with 0xff and looked at
// after every launch, as are the bytes just before it. Contents start as 0xff: NaN in every float format. Freed
// memory stays mapped without access for a while, so that use after free faults as well.

#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <deque>
#include <map>

#include "driver.h"

namespace emulator {
namespace {

constexpr uint64_t kPage = 4096;
constexpr uint64_t kAlignment = 16;       // the widest access of a thread; a larger one would weaken the upper guard
constexpr uint64_t kMarginChecked = 256;  // of the bytes before an allocation, after each launch
constexpr uint64_t kPoisonBytes = uint64_t{16} << 20;  // mapped over and over for large allocations
constexpr uint64_t kQuarantineBytes = uint64_t{512} << 20;
constexpr size_t kQuarantineCount = 4096;  // each holds one or two of the 65530 mappings a process may have

struct Allocation {
    uint64_t begin, size, map, map_bytes;
    int device;
    bool freed;
    uint64_t end() const { return begin + size; }
    uint64_t data_begin() const { return map + kPage; }
    uint64_t data_end() const { return map + map_bytes - kPage; }
};

std::map<uint64_t, Allocation> allocations;  // by begin, freed ones in quarantine too
std::deque<uint64_t> quarantine;             // the begins of those, oldest first
uint64_t quarantined_bytes;
std::map<int, uint64_t> used;  // bytes, by device

uint64_t round_up(uint64_t value, uint64_t unit) { return (value + unit - 1) / unit * unit; }

// The live allocation that contains `address` or ends there.
const Allocation* find(uint64_t address) {
    auto after = allocations.upper_bound(address);
    if (after == allocations.begin()) return nullptr;
    const Allocation& candidate = std::prev(after)->second;
    return !candidate.freed && address <= candidate.end() ? &candidate : nullptr;
}

void check_margin(uint64_t from, uint64_t to) {
    for (uint64_t address = from; address < to; ++address)
        if (*reinterpret_cast<unsigned char*>(address) != 0xff)
            fail("a write outside of an allocation, " + describe_address(address));
}
void check_margins_of(const Allocation& allocation, uint64_t before) {
    const uint64_t slack = allocation.begin - allocation.data_begin();
    check_margin(allocation.begin - std::min(before, slack), allocation.begin);
    check_margin(allocation.end(), allocation.data_end());
}

// A file of nothing but 0xff. Mapped privately, it is poison that costs memory only where it is written: a cache that
// takes all of the device's memory does not take all of the machine's.
int poison_file() {
    static const int file = [] {
        const int made = memfd_create("lonas-poison", MFD_CLOEXEC);
        const std::string poison(kPoisonBytes, '\xff');
        if (made < 0 || write(made, poison.data(), poison.size()) != static_cast<ssize_t>(poison.size()))
            fail("no file of poison");
        return made;
    }();
    return file;
}
bool map_poisoned(unsigned char* data, uint64_t bytes) {
    if (bytes < kPoisonBytes / 16) {
        if (mprotect(data, bytes, PROT_READ | PROT_WRITE) != 0) return false;
        memset(data, 0xff, bytes);
        return true;
    }
    for (uint64_t at = 0; at < bytes; at += kPoisonBytes) {
        const int flags = MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE;
        const size_t piece = std::min(kPoisonBytes, bytes - at);
        if (mmap(data + at, piece, PROT_READ | PROT_WRITE, flags, poison_file(), 0) == MAP_FAILED) return false;
    }
    return true;
}

CUresult allocate(CUdeviceptr* out, uint64_t bytes) {
    const int device = current_device();
    if (!out) return CUDA_ERROR_INVALID_VALUE;
    if (device < 0) return refuse(CUDA_ERROR_INVALID_CONTEXT, "an allocation without a current context");
    // What the device would take: it hands out pieces of 512 bytes.
    const uint64_t total = settings().memory, left = total - std::min(total, used[device]);
    if (bytes > left || round_up(bytes, 512) > left) return CUDA_ERROR_OUT_OF_MEMORY;
    Allocation allocation{};
    allocation.size = bytes;
    allocation.device = device;
    allocation.map_bytes = round_up(round_up(bytes, kAlignment), kPage) + 2 * kPage;
    void* map = mmap(nullptr, allocation.map_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (map == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
    allocation.map = reinterpret_cast<uint64_t>(map);
    auto* data = reinterpret_cast<unsigned char*>(allocation.data_begin());
    if (!map_poisoned(data, allocation.data_end() - allocation.data_begin())) {
        munmap(map, allocation.map_bytes);
        return refuse(CUDA_ERROR_OUT_OF_MEMORY, "the system gives no memory for %llu bytes",
                      static_cast<unsigned long long>(bytes));
    }
    allocation.begin = allocation.data_end() - round_up(bytes, kAlignment);
    used[device] += round_up(bytes, 512);
    allocations[allocation.begin] = allocation;
    *out = allocation.begin;
    return CUDA_SUCCESS;
}

CUresult release(CUdeviceptr pointer) {
    if (pointer == 0) return CUDA_SUCCESS;
    auto found = allocations.find(pointer);
    if (found == allocations.end())
        return refuse(CUDA_ERROR_INVALID_VALUE, "a free of 0x%llx, which is no allocation", pointer);
    Allocation& allocation = found->second;
    if (allocation.freed) return refuse(CUDA_ERROR_INVALID_VALUE, "a second free of 0x%llx", pointer);
    check_margins_of(allocation, kPage);
    used[allocation.device] -= round_up(allocation.size, 512);
    allocation.freed = true;
    // Mapped anew, so that the memory behind it goes back to the system.
    mmap(reinterpret_cast<void*>(allocation.map), allocation.map_bytes, PROT_NONE,
         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    quarantine.push_back(pointer);
    quarantined_bytes += allocation.map_bytes;
    // The newest stays, however large it is.
    while (quarantine.size() > 1 && (quarantined_bytes > kQuarantineBytes || quarantine.size() > kQuarantineCount)) {
        auto oldest = allocations.find(quarantine.front());
        quarantine.pop_front();
        munmap(reinterpret_cast<void*>(oldest->second.map), oldest->second.map_bytes);
        quarantined_bytes -= oldest->second.map_bytes;
        allocations.erase(oldest);
    }
    return CUDA_SUCCESS;
}

struct sigaction former[65];

void on_fault(int signal, siginfo_t* info, void* context) {
    if (!on_kernel_thread()) {  // not ours: put the former handler back and let the fault happen again
        sigaction(signal, &former[signal], nullptr);
        return;
    }
    // A second fault, in here, ends the process rather than looping.
    std::signal(signal, SIG_DFL);
    const char* kind = "access";
    const void* code = nullptr;
#if defined(__x86_64__) && defined(REG_ERR)
    kind = static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_ERR] & 2 ? "write" : "read";
    code = reinterpret_cast<const char*>(static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP]) + 1;
#else
    (void)context;
#endif
    const std::string line = source_line(code);
    if (signal == SIGFPE) fail("an integer division by zero" + line);
    // -fsanitize=alignment answers a misaligned access with an illegal instruction.
    if (signal == SIGILL)
        fail("a misaligned access" + line + ": a vector load or store whose address is not a multiple of its size");
    fail(std::string("an illegal ") + kind + line + " of " + describe_address(reinterpret_cast<uint64_t>(info->si_addr)));
}

}  // namespace

void install_fault_handler() {
    struct sigaction action {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    for (int signal : {SIGSEGV, SIGBUS, SIGFPE, SIGILL}) sigaction(signal, &action, &former[signal]);
}

bool is_device_range(uint64_t address, size_t bytes) {
    const Allocation* allocation = find(address);
    return allocation && bytes <= allocation->end() - address;
}

void check_margins() {
    for (const auto& entry : allocations)
        if (!entry.second.freed) check_margins_of(entry.second, kMarginChecked);
}

std::string describe_address(uint64_t address) {
    char text[256];
    snprintf(text, sizeof(text), "address 0x%llx", static_cast<unsigned long long>(address));
    const std::string block_memory = describe_block_memory(address);
    if (!block_memory.empty()) return text + (", " + block_memory);
    const Allocation* nearest = nullptr;
    uint64_t least = UINT64_MAX;
    for (const auto& entry : allocations) {
        const Allocation& candidate = entry.second;
        const uint64_t distance = address < candidate.begin   ? candidate.begin - address
                                  : address < candidate.end() ? 0
                                                              : address - candidate.end() + 1;
        if (distance < least) least = distance, nearest = &candidate;
    }
    if (!nearest) return text + std::string(", and there is no allocation");
    const long long offset = static_cast<long long>(address - nearest->begin);
    snprintf(text + strlen(text), sizeof(text) - strlen(text), ", offset %lld of %s allocation of %llu bytes at 0x%llx",
             offset, nearest->freed ? "a freed" : "an", static_cast<unsigned long long>(nearest->size),
             static_cast<unsigned long long>(nearest->begin));
    if (least == 0) return text;
    const bool past = address >= nearest->end();
    snprintf(text + strlen(text), sizeof(text) - strlen(text), ": %llu bytes %s",
             static_cast<unsigned long long>(past ? least - 1 : least), past ? "past its end" : "before its beginning");
    return text;
}

}  // namespace emulator

using namespace emulator;

LONAS_API cuMemAlloc_v2(CUdeviceptr* pointer, size_t bytes) {
    Lock lock(driver_lock);
    if (bytes == 0) return CUDA_ERROR_INVALID_VALUE;
    if (any_capture()) return refuse(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "cuMemAlloc while a stream is captured");
    return allocate(pointer, bytes);
}
LONAS_API cuMemFree_v2(CUdeviceptr pointer) {
    Lock lock(driver_lock);
    if (any_capture()) return refuse(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "cuMemFree while a stream is captured");
    return release(pointer);
}
LONAS_API cuMemAllocAsync(CUdeviceptr* pointer, size_t bytes, CUstream stream) {
    Lock lock(driver_lock);
    if (CUresult error = outside_capture(stream)) return error;
    if (bytes == 0 && pointer) return *pointer = 0, CUDA_SUCCESS;
    return allocate(pointer, bytes);
}
LONAS_API cuMemFreeAsync(CUdeviceptr pointer, CUstream stream) {
    Lock lock(driver_lock);
    if (CUresult error = outside_capture(stream)) return error;
    return release(pointer);
}
LONAS_API cuMemAllocFromPoolAsync(CUdeviceptr* pointer, size_t bytes, CUmemoryPool, CUstream stream) {
    return cuMemAllocAsync(pointer, bytes, stream);
}
LONAS_API cuMemGetInfo_v2(size_t* free_bytes, size_t* total_bytes) {
    Lock lock(driver_lock);
    const int device = current_device();
    if (device < 0) return CUDA_ERROR_INVALID_CONTEXT;
    if (!free_bytes || !total_bytes) return CUDA_ERROR_INVALID_VALUE;
    *total_bytes = settings().memory;
    *free_bytes = *total_bytes - std::min<uint64_t>(*total_bytes, used[device]);
    return CUDA_SUCCESS;
}

LONAS_API cuMemHostAlloc(void** pointer, size_t bytes, unsigned) {
    if (!pointer || bytes == 0) return CUDA_ERROR_INVALID_VALUE;
    *pointer = aligned_alloc(kPage, round_up(bytes, kPage));
    return *pointer ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}
LONAS_API cuMemAllocHost_v2(void** pointer, size_t bytes) { return cuMemHostAlloc(pointer, bytes, 0); }
LONAS_API cuMemFreeHost(void* pointer) { return free(pointer), CUDA_SUCCESS; }
