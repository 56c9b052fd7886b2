// Modules, functions and launches: which kernels there are, what a launch may ask for, how its arguments are kept.
// A module's image is not read: it must look like one, and its functions are those compiled into this library.

#include <string.h>

#include <map>
#include <memory>
#include <set>
#include <vector>

#include "driver.h"

namespace emulator {
namespace {

constexpr unsigned kMaxBlock = 1024, kMaxBlockZ = 64, kMaxGridX = 0x7fffffff, kMaxGridYZ = 65535;
constexpr unsigned kDefaultShared = 48 << 10;

std::map<std::string, Kernel>& kernels() {  // filled by static constructors, so it must not be one itself
    static std::map<std::string, Kernel> map;
    return map;
}

struct Function {
    const Kernel* kernel;
    unsigned shared_allowed = kDefaultShared;
};
struct Module {
    std::map<std::string, std::unique_ptr<Function>> functions;
};
std::set<Module*> modules;
std::set<Function*> functions;

Function* find_function(CUfunction handle) {
    auto found = functions.find(reinterpret_cast<Function*>(handle));
    return found == functions.end() ? nullptr : *found;
}

CUresult check_limits(const Function& function, dim3 grid, dim3 block, unsigned shared) {
    const char* name = function.kernel->name;
    const uint64_t threads = uint64_t{block.x} * block.y * block.z;
    if (!grid.x || !grid.y || !grid.z || !threads)
        return refuse(CUDA_ERROR_INVALID_VALUE, "%s: a grid (%u,%u,%u) of blocks (%u,%u,%u) is empty", name, grid.x, grid.y,
                      grid.z, block.x, block.y, block.z);
    if (grid.x > kMaxGridX || grid.y > kMaxGridYZ || grid.z > kMaxGridYZ)
        return refuse(CUDA_ERROR_INVALID_VALUE, "%s: a grid of (%u,%u,%u); at most (%u,%u,%u)", name, grid.x, grid.y, grid.z,
                      kMaxGridX, kMaxGridYZ, kMaxGridYZ);
    if (block.x > kMaxBlock || block.y > kMaxBlock || block.z > kMaxBlockZ || threads > kMaxBlock)
        return refuse(CUDA_ERROR_INVALID_VALUE, "%s: a block of (%u,%u,%u); at most %u threads, %u deep", name, block.x,
                      block.y, block.z, kMaxBlock, kMaxBlockZ);
    if (threads > function.kernel->max_threads)
        return refuse(CUDA_ERROR_INVALID_VALUE, "%s: %llu threads, but __launch_bounds__(%u)", name,
                      static_cast<unsigned long long>(threads), function.kernel->max_threads);
    if (shared > function.shared_allowed)
        return refuse(CUDA_ERROR_INVALID_VALUE, "%s: %u bytes of dynamic shared memory; its attribute allows %u", name,
                      shared, function.shared_allowed);
    return CUDA_SUCCESS;
}

// A pointer that no kernel could follow is better told here than by a fault somewhere in the middle.
void check_pointers(const Kernel& kernel, void** arguments) {
    for (int i = 0; i < kernel.arguments; ++i) {
        if (!kernel.argument_is_pointer[i]) continue;
        uint64_t address;
        memcpy(&address, arguments[i], sizeof(address));
        if (address && !is_device_range(address, 0))
            fail(std::string(kernel.name) + ": argument " + std::to_string(i) +
                 " (from 0) is not device memory: " + describe_address(address));
    }
}

// The arguments of a launch, copied: the caller's die before a graph is replayed.
struct Arguments {
    std::vector<std::vector<unsigned char>> values;
    Arguments(const Kernel& kernel, void** arguments) {
        for (int i = 0; i < kernel.arguments; ++i) {
            auto* bytes = static_cast<unsigned char*>(arguments[i]);
            values.emplace_back(bytes, bytes + kernel.argument_sizes[i]);
        }
    }
    std::vector<void*> pointers() {
        std::vector<void*> list;
        for (auto& value : values) list.push_back(value.data());
        return list;
    }
};

bool looks_like_image(const void* image) {
    const auto* bytes = static_cast<const unsigned char*>(image);
    static const unsigned char fatbin[] = {0x50, 0xed, 0x55, 0xba};
    if (memcmp(bytes, fatbin, 4) == 0 || memcmp(bytes,
                                                "\x7f"
                                                "ELF",
                                                4) == 0)
        return true;
    while (*bytes == ' ' || *bytes == '\n' || *bytes == '\r' || *bytes == '\t') ++bytes;
    return bytes[0] == '.' || (bytes[0] == '/' && (bytes[1] == '/' || bytes[1] == '*'));  // PTX text
}

}  // namespace

void register_kernel(const Kernel& kernel) {
    if (kernels().count(kernel.name)) fail(std::string("two kernels are called ") + kernel.name);
    kernels()[kernel.name] = kernel;
}

}  // namespace emulator

using namespace emulator;

LONAS_API cuModuleLoadData(CUmodule* module, const void* image) {
    Lock lock(driver_lock);
    if (!module || !image) return CUDA_ERROR_INVALID_VALUE;
    if (current_device() < 0) return refuse(CUDA_ERROR_INVALID_CONTEXT, "cuModuleLoadData without a current context");
    if (!looks_like_image(image)) return refuse(CUDA_ERROR_INVALID_IMAGE, "an image that is neither fatbin, cubin nor PTX");
    *module = reinterpret_cast<CUmodule>(*modules.insert(new Module).first);
    return CUDA_SUCCESS;
}
LONAS_API cuModuleUnload(CUmodule handle) {
    Lock lock(driver_lock);
    auto* module = reinterpret_cast<Module*>(handle);
    if (!modules.erase(module)) return CUDA_ERROR_INVALID_HANDLE;
    for (auto& entry : module->functions) functions.erase(entry.second.get());
    delete module;
    return CUDA_SUCCESS;
}
LONAS_API cuModuleGetFunction(CUfunction* function, CUmodule handle, const char* name) {
    Lock lock(driver_lock);
    auto* module = reinterpret_cast<Module*>(handle);
    if (!function || !name) return CUDA_ERROR_INVALID_VALUE;
    if (!modules.count(module)) return CUDA_ERROR_INVALID_HANDLE;
    auto kernel = kernels().find(name);
    if (kernel == kernels().end()) return refuse(CUDA_ERROR_NOT_FOUND, "there is no kernel %s", name);
    auto& entry = module->functions[name];
    if (!entry) entry.reset(new Function{&kernel->second});
    functions.insert(entry.get());
    *function = reinterpret_cast<CUfunction>(entry.get());
    return CUDA_SUCCESS;
}
LONAS_API cuModuleGetGlobal_v2(CUdeviceptr*, size_t*, CUmodule, const char*) { return CUDA_ERROR_NOT_FOUND; }

LONAS_API cuFuncSetAttribute(CUfunction handle, CUfunction_attribute attribute, int value) {
    Lock lock(driver_lock);
    Function* function = find_function(handle);
    if (!function) return CUDA_ERROR_INVALID_HANDLE;
    if (attribute == CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT) return CUDA_SUCCESS;
    if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return CUDA_ERROR_INVALID_VALUE;
    if (value < 0 || static_cast<size_t>(value) > shared_memory_limit())
        return refuse(CUDA_ERROR_INVALID_VALUE, "%s: %d bytes of dynamic shared memory; this device has %zu",
                      function->kernel->name, value, shared_memory_limit());
    function->shared_allowed = static_cast<unsigned>(value);
    return CUDA_SUCCESS;
}
LONAS_API cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction handle) {
    Lock lock(driver_lock);
    Function* function = find_function(handle);
    if (!function) return CUDA_ERROR_INVALID_HANDLE;
    if (!value) return CUDA_ERROR_INVALID_VALUE;
    switch (attribute) {
        case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = static_cast<int>(function->kernel->max_threads); break;
        case CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES: *value = static_cast<int>(function->shared_allowed); break;
        case CU_FUNC_ATTRIBUTE_PTX_VERSION:
        case CU_FUNC_ATTRIBUTE_BINARY_VERSION: *value = settings().architecture; break;
        default: *value = 0;  // registers, local and static shared memory: only nvcc knows
    }
    return CUDA_SUCCESS;
}
LONAS_API cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }

LONAS_API cuLaunchKernel(CUfunction handle, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                         unsigned block_y, unsigned block_z, unsigned shared, CUstream stream, void** arguments,
                         void** extra) {
    Lock lock(driver_lock);
    Function* function = find_function(handle);
    if (!function) return refuse(CUDA_ERROR_INVALID_HANDLE, "a launch of a function that is not loaded");
    if (current_device() < 0) return refuse(CUDA_ERROR_INVALID_CONTEXT, "a launch without a current context");
    const Launch launch{function->kernel, dim3(grid_x, grid_y, grid_z), dim3(block_x, block_y, block_z), shared};
    if (CUresult error = check_limits(*function, launch.grid, launch.block, shared)) return error;
    if (extra || (launch.kernel->arguments && !arguments))
        return refuse(CUDA_ERROR_INVALID_VALUE, "%s: arguments are passed by cuLaunchKernel's array only",
                      launch.kernel->name);
    auto kept = std::make_shared<Arguments>(*launch.kernel, arguments);
    return submit(stream, [launch, kept] {
        std::vector<void*> pointers = kept->pointers();
        check_pointers(*launch.kernel, pointers.data());
        run_grid(launch, pointers.data());
        return CUDA_SUCCESS;
    });
}

// Attributes say how a launch may overlap with others; here none does.
LONAS_API cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** arguments, void** extra) {
    if (!config) return refuse(CUDA_ERROR_INVALID_VALUE, "a launch without a configuration");
    for (unsigned i = 0; i < config->numAttrs; i++) {
        if (config->attrs[i].id != CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION)
            return refuse(CUDA_ERROR_NOT_SUPPORTED, "a launch with attribute %d", static_cast<int>(config->attrs[i].id));
    }
    return cuLaunchKernel(function, config->gridDimX, config->gridDimY, config->gridDimZ, config->blockDimX, config->blockDimY,
                          config->blockDimZ, config->sharedMemBytes, config->hStream, arguments, extra);
}

LONAS_API cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, CUfunction handle, int block_size, size_t shared) {
    Lock lock(driver_lock);
    if (!find_function(handle)) return CUDA_ERROR_INVALID_HANDLE;
    if (!blocks || block_size < 1 || block_size > static_cast<int>(kMaxBlock)) return CUDA_ERROR_INVALID_VALUE;
    // By threads and shared memory alone: registers are not known here.
    const int by_threads = 2048 / block_size, by_shared = static_cast<int>((shared_memory_limit() + 1024) / (shared + 1024));
    *blocks = by_threads < by_shared ? by_threads : by_shared;
    return CUDA_SUCCESS;
}
LONAS_API cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, CUfunction function, int block_size,
                                                               size_t shared, unsigned) {
    return cuOccupancyMaxActiveBlocksPerMultiprocessor(blocks, function, block_size, shared);
}
