// What the parts of the emulated driver share. One lock guards everything: a launch holds it until the last block is
// done, so at most one kernel runs in the process, and streams run each call at once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <mutex>
#include <string>

#include <cuda.h>

#include "emulator.h"
#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

#define LONAS_API extern "C" __attribute__((visibility("default"))) CUresult

namespace emulator {

using Lock = std::lock_guard<std::recursive_mutex>;
extern std::recursive_mutex driver_lock;

// Settings, read from the environment once.
struct Settings {
    int devices;       // LONAS_EMULATOR_DEVICES
    int architecture;  // LONAS_EMULATOR_ARCH, 90 for 9.0
    size_t memory;     // LONAS_EMULATOR_MEMORY, bytes per device
    uint64_t seed;     // LONAS_EMULATOR_SEED
};
const Settings& settings();

// A line on stderr saying why a call is refused: an error code alone does not name the argument.
CUresult refuse(CUresult error, const char* format, ...) __attribute__((format(printf, 2, 3)));
// The device of the context that is current in this thread, or -1.
int current_device();
// The most dynamic shared memory that a kernel may ask for on this architecture.
size_t shared_memory_limit();

// driver memory
bool is_device_range(uint64_t address, size_t bytes);
// Aborts with a message when a byte beside an allocation was written.
void check_margins();
// Text on the allocation nearest to an address, for a message.
std::string describe_address(uint64_t address);
void install_fault_handler();

// A launch as a value, so that a graph can keep it: the arguments are copied.
struct Launch {
    const Kernel* kernel;
    dim3 grid, block;
    size_t dynamic_shared;
};
// Runs every block of a grid on the calling thread. The lock is held.
void run_grid(const Launch& launch, void** arguments);
// The kernel that runs now, or null; and text naming kernel, block, thread and seed.
const Kernel* running_kernel();
bool on_kernel_thread();
std::string describe_position();
// Text on an address in or just beside the running block's stacks and shared memory; empty for any other.
std::string describe_block_memory(uint64_t address);
[[noreturn]] void fail(const std::string& what);

// " at FILE:LINE" of an instruction in this library, when addr2line is there to tell; empty otherwise.
std::string source_line(const void* code);

// Order within a block, for the search for races: barriers passed since the process began, __syncwarps by warp.
extern uint32_t barrier_epoch;
extern uint32_t warp_epochs[1024 / kWarpSize];
void watch_shared(const unsigned char* dynamic_begin, const unsigned char* dynamic_end, const unsigned char* static_begin,
                  const unsigned char* static_end);
bool in_shared(const void* address, size_t size);
void note_shared(const void* address, size_t size, bool write, const void* code);
// From now on nobody may touch these bytes, because a cp.async of the instruction `code` writes them; null ends that.
void mark_copying(const void* address, size_t size, const void* code);

// What the lanes of a warp brought to a mma or ldmatrix, computed for all of them; `values` are their operands.
void run_on_warp(Call call, Fiber* lanes, const uint64_t* values);
// Drops the copies that the last block's threads did not wait for.
void forget_copies(int threads);

// Runs `work` now, or adds it to the graph that the stream is being captured into.
CUresult submit(CUstream stream, std::function<CUresult()> work);
// CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED while the stream is captured, as calls that cannot be in a graph answer.
CUresult outside_capture(CUstream stream);
bool any_capture();

}  // namespace emulator
