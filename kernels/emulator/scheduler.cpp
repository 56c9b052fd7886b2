// Runs the blocks of a grid, one after another by index, each CUDA thread as a fiber. The warps of a block and the
// lanes of a warp take turns in a shuffled order, so that a kernel which relies on an order, or lacks a barrier, shows.
// The order depends on the seed, the kernel and the block only: the same launch runs the same way every time.
//
// Stops the process, naming kernel, block and thread, on a barrier or a collective that not every thread reaches.

#define LONAS_FIBER_IMPLEMENTATION
#include <dlfcn.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "driver.h"
#include "fiber.h"

namespace emulator {

Fiber* current;
uint3 block_index;
dim3 block_size, grid_size;
unsigned char* dynamic_shared;
uint64_t* warp_values;
uint32_t barrier_epoch;
uint32_t warp_epochs[1024 / kWarpSize];

namespace {

constexpr int kMaxThreads = 1024;
constexpr size_t kPage = 4096;
constexpr size_t kStack = 128 << 10;  // memory is committed by the page, so a deep frame costs only what it touches
constexpr size_t kSharedRoom = 228 << 10;

const Kernel* kernel;
void** kernel_arguments;
pthread_t kernel_thread;
void* scheduler_stack;
unsigned char* stacks;      // kMaxThreads stacks, each above a guard page
unsigned char* shared_end;  // dynamic shared memory ends here, at a guard page
unsigned char signal_stack[64 << 10];
Fiber fibers[kMaxThreads];
uint64_t values[kMaxThreads / kWarpSize][kWarpSize];
int threads, warps, alive;

uint64_t mix(uint64_t x) {  // splitmix64
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}
uint64_t random_state;
unsigned random_below(unsigned n) {
    random_state = mix(random_state);
    return static_cast<unsigned>(random_state >> 32) % n;
}

const char* call_name(Call call) {
    switch (call) {
        case Call::SyncThreads: return "__syncthreads";
        case Call::SyncWarp: return "__syncwarp";
        case Call::Shuffle: return "__shfl_sync";
        case Call::ShuffleXor: return "__shfl_xor_sync";
        case Call::ShuffleDown: return "__shfl_down_sync";
        case Call::ShuffleUp: return "__shfl_up_sync";
        case Call::Vote: return "__ballot_sync, __any_sync or __all_sync";
        case Call::Multiply: return "mma";
        case Call::LoadMatrix4: return "ldmatrix.x4";
        case Call::LoadMatrix2: return "ldmatrix.x2";
        case Call::LoadMatrix4Trans: return "ldmatrix.x4.trans";
        case Call::LoadMatrix2Trans: return "ldmatrix.x2.trans";
        case Call::None: break;
    }
    return "nothing";
}
std::string triple(uint3 v) {
    return "(" + std::to_string(v.x) + "," + std::to_string(v.y) + "," + std::to_string(v.z) + ")";
}
std::string where(const Fiber& fiber) {
    const std::string thread = "thread " + triple(fiber.thread);
    if (fiber.state == State::Exited) return thread + " has returned";
    if (fiber.state == State::Runnable) return thread + " runs on";
    const char* slash = strrchr(fiber.place.file, '/');
    return thread + " waits in " + call_name(fiber.call) + " at " + (slash ? slash + 1 : fiber.place.file) + ":" +
           std::to_string(fiber.place.line);
}
[[noreturn]] void fail_at(Fiber& fiber, const std::string& what) {
    current = &fiber;
    fail(what);
}

void map_memory() {
    const size_t slot = kStack + kPage, shared_bytes = kSharedRoom + kPage;
    auto map = [](size_t bytes) {
        void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) fail("no memory for the stacks of " + std::to_string(kMaxThreads) + " threads");
        return static_cast<unsigned char*>(memory);
    };
    stacks = map(slot * kMaxThreads);
    for (int i = 0; i < kMaxThreads; ++i) mprotect(stacks + slot * i, kPage, PROT_NONE);
    shared_end = map(shared_bytes) + kSharedRoom;
    mprotect(shared_end, kPage, PROT_NONE);
}

void give_way() { switch_stack(&current->stack_pointer, scheduler_stack); }

void fiber_main() {
    kernel->call(kernel_arguments);
    current->state = State::Exited;
    --alive;
    give_way();
    abort();  // an exited fiber is never resumed
}

// Everything that a block starts from: fresh stacks, poisoned shared memory, its own order of warps.
void start_block(size_t shared_bytes) {
    memset(kernel->shared_begin, 0xff, kernel->shared_end - kernel->shared_begin);
    dynamic_shared = shared_end - (shared_bytes + 15) / 16 * 16;
    memset(dynamic_shared, 0xff, shared_end - dynamic_shared);
    ++barrier_epoch;
    alive = threads;
    for (int i = 0; i < threads; ++i) {
        Fiber& fiber = fibers[i];
        fiber.index = i;
        fiber.thread = make_uint3(i % block_size.x, i / block_size.x % block_size.y, i / (block_size.x * block_size.y));
        fiber.state = State::Runnable;
        // Tops at different distances from the page, or every stack would compete for the same cache sets.
        unsigned char* top = stacks + (kStack + kPage) * (i + 1) - i * 320 % kPage;
        fiber.stack_pointer = prepare_stack(top, fiber_main);
    }
}

// Lets every runnable lane of the warp run until it waits or returns. False when none was runnable.
bool run_lanes(int warp) {
    const int first = warp * kWarpSize, lanes = std::min(kWarpSize, threads - first);
    const int start = static_cast<int>(random_below(lanes));
    const bool backwards = random_below(2);
    bool ran = false;
    warp_values = values[warp];
    for (int step = 0; step < lanes; ++step) {
        Fiber& fiber = fibers[first + (backwards ? start + lanes - step : start + step) % lanes];
        if (fiber.state != State::Runnable) continue;
        current = &fiber;
        switch_stack(&scheduler_stack, fiber.stack_pointer);
        ran = true;
    }
    return ran;
}

// Releases the lanes of the warp whose collective is complete. Lanes that have returned do not take part.
bool release_collectives(int warp) {
    const int first = warp * kWarpSize, lanes = std::min(kWarpSize, threads - first);
    bool released = false;
    for (int lane = 0; lane < lanes; ++lane) {
        Fiber& leader = fibers[first + lane];
        if (leader.state != State::AtCollective) continue;
        bool complete = true;
        for (int other = 0; other < lanes && complete; ++other) {
            Fiber& fiber = fibers[first + other];
            if (!(leader.mask >> other & 1) || fiber.state == State::Exited) continue;
            complete = fiber.state == State::AtCollective && fiber.mask == leader.mask;
            if (complete && (fiber.call != leader.call || fiber.place.line != leader.place.line))
                fail_at(fiber, "divergent warp collective: " + where(fiber) + ", while " + where(leader));
        }
        if (!complete) continue;
        if (leader.call == Call::SyncWarp) ++warp_epochs[warp];
        for (int other = 0; other < kWarpSize; ++other) {
            if (!(leader.mask >> other & 1)) continue;
            const bool present = other < lanes && fibers[first + other].state == State::AtCollective;
            if (!present && leader.call >= Call::Multiply)
                fail_at(leader, where(leader) + ", which needs all 32 lanes of a warp: " +
                                    (other < lanes ? where(fibers[first + other]) : "the block is too small"));
            values[warp][other] = present ? fibers[first + other].given : ~uint64_t{0};
            if (present) fibers[first + other].state = State::Runnable;
        }
        if (leader.call >= Call::Multiply) run_on_warp(leader.call, fibers + first, values[warp]);
        released = true;
    }
    return released;
}

// All warps are stuck: either everyone stands at the same barrier, or the kernel is wrong.
void release_barrier() {
    Fiber* at_barrier = nullptr;
    for (int i = 0; i < threads; ++i) {
        Fiber& fiber = fibers[i];
        if (fiber.state == State::AtCollective) {
            std::string missing;
            for (int lane = 0; lane < kWarpSize && missing.empty(); ++lane) {
                const int index = i / kWarpSize * kWarpSize + lane;
                if (!(fiber.mask >> lane & 1) || index >= threads) continue;
                const Fiber& other = fibers[index];
                if (other.state != State::AtCollective || other.mask != fiber.mask) missing = where(other);
            }
            fail_at(fiber, "divergent warp collective: " + where(fiber) + ", but of its mask " + missing);
        }
        if (fiber.state == State::AtBarrier && !at_barrier) at_barrier = &fiber;
    }
    for (int i = 0; i < threads; ++i) {
        Fiber& fiber = fibers[i];
        const bool same = fiber.state == State::AtBarrier && fiber.place.line == at_barrier->place.line;
        if (!same) fail_at(*at_barrier, "divergent barrier: " + where(*at_barrier) + ", but " + where(fiber));
    }
    ++barrier_epoch;
    for (int i = 0; i < threads; ++i) fibers[i].state = State::Runnable;
}

void run_block(size_t shared_bytes) {
    start_block(shared_bytes);
    int order[kMaxThreads / kWarpSize];
    std::iota(order, order + warps, 0);
    while (alive) {
        for (int i = warps - 1; i > 0; --i) std::swap(order[i], order[random_below(i + 1)]);
        bool progress = false;
        for (int i = 0; i < warps; ++i) {
            // A warp runs on through its collectives, or gives way to the others between them, by a coin.
            while (run_lanes(order[i])) {
                progress = true;
                if (!release_collectives(order[i]) || random_below(2)) break;
            }
        }
        if (!progress && alive) release_barrier();
    }
    forget_copies(threads);
}

}  // namespace

void barrier(Place place) {
    current->call = Call::SyncThreads;
    current->place = place;
    current->state = State::AtBarrier;
    give_way();
}

void collective(Call call, unsigned mask, uint64_t value, Place place) {
    current->call = call;
    current->place = place;
    current->mask = mask;
    current->given = value;
    current->state = State::AtCollective;
    if (!(mask >> lane() & 1)) fail("a lane is not in its own mask: " + where(*current));
    give_way();
}

void source_outside_mask(int source, Place place) {
    const char* slash = strrchr(place.file, '/');
    fail(std::string("a shuffle at ") + (slash ? slash + 1 : place.file) + ":" + std::to_string(place.line) +
         " reads lane " + std::to_string(source) + ", which is not in its mask");
}

void run_grid(const Launch& launch, void** arguments) {
    if (!stacks) map_memory();
    kernel = launch.kernel;
    kernel_arguments = arguments;
    kernel_thread = pthread_self();
    grid_size = launch.grid;
    block_size = launch.block;
    threads = static_cast<int>(block_size.x * block_size.y * block_size.z);
    warps = (threads + kWarpSize - 1) / kWarpSize;
    uint64_t seed = mix(settings().seed);
    for (const char* letter = kernel->name; *letter; ++letter) seed = mix(seed ^ static_cast<unsigned char>(*letter));

    // A fault may come from a fiber whose stack is full, so the handler needs one of its own.
    stack_t handler_stack{}, former_stack{};
    handler_stack.ss_sp = signal_stack;
    handler_stack.ss_size = sizeof(signal_stack);
    sigaltstack(&handler_stack, &former_stack);
    watch_shared(shared_end - (launch.dynamic_shared + 15) / 16 * 16, shared_end, kernel->shared_begin, kernel->shared_end);
    const uint64_t blocks = uint64_t{grid_size.x} * grid_size.y * grid_size.z;
    // In the order of their indices, as GPUs begin them: a block may wait for one before it (`wait_for` in common.cuh).
    for (uint64_t block = 0; block < blocks; ++block) {
        block_index = make_uint3(block % grid_size.x, block / grid_size.x % grid_size.y, block / grid_size.x / grid_size.y);
        random_state = mix(seed ^ block);
        current = nullptr;
        run_block(launch.dynamic_shared);
    }
    current = nullptr;
    check_margins();
    kernel = nullptr;
    sigaltstack(&former_stack, nullptr);
}

const Kernel* running_kernel() { return kernel; }
bool on_kernel_thread() { return kernel && pthread_equal(kernel_thread, pthread_self()); }

std::string describe_position() {
    if (!kernel) return "no kernel";
    const std::string name = std::string("kernel ") + kernel->name;
    const std::string seed = " (seed " + std::to_string(settings().seed) + ")";
    if (!current) return name + seed;
    return name + ", block " + triple(block_index) + ", thread " + triple(current->thread) + seed;
}

std::string describe_block_memory(uint64_t address) {
    const uint64_t stacks_begin = reinterpret_cast<uint64_t>(stacks), shared = reinterpret_cast<uint64_t>(shared_end);
    if (!kernel) return "";
    if (address - stacks_begin < (kStack + kPage) * kMaxThreads)
        return "a thread's stack: more than " + std::to_string(kStack >> 10) +
               " KB of local variables, or an index outside of a local array";
    if (address - shared < kPage)
        return std::to_string(address - shared) + " bytes past the end of the block's " +
               std::to_string(shared_end - dynamic_shared) + " bytes of dynamic shared memory";
    return "";
}

std::string source_line(const void* code) {
    Dl_info library;
    if (!dladdr(code, &library) || !library.dli_fname) return "";
    // The byte before a return address belongs to the call.
    const size_t offset = static_cast<const char*>(code) - static_cast<const char*>(library.dli_fbase) - 1;
    char command[4200], line[512] = "";
    snprintf(command, sizeof(command), "addr2line -s -i -e '%s' 0x%zx 2>/dev/null", library.dli_fname, offset);
    FILE* output = popen(command, "r");
    if (!output) return "";
    // From the innermost inlined function outwards: the first line that is of a kernel's own source.
    std::string found;
    while (fgets(line, sizeof(line), output)) {
        line[strcspn(line, " \n")] = 0;
        const bool ours = strstr(line, ".kernels.cpp:") || strstr(line, "emulator.h:") || line[0] == '?';
        if (found.empty() && !ours) found = std::string(" at ") + line;
    }
    pclose(output);
    return found;
}

void fail(const std::string& what) {
    fprintf(stderr, "\nlonas emulator: %s\n  in %s\n", what.c_str(), describe_position().c_str());
    fflush(stderr);
    abort();
}

}  // namespace emulator
