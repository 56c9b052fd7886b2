// The devices of the emulated driver: how many, what they are, their contexts; and the texts of errors.

#include "driver.h"

#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

namespace emulator {

std::recursive_mutex driver_lock;

namespace {

constexpr int kMaxDevices = 64;
bool initialized;
thread_local CUcontext current_context;  // the number of the device, plus one

uint64_t number(const char* variable, uint64_t otherwise) {
    const char* text = getenv(variable);
    if (!text || !*text) return otherwise;
    char* end = nullptr;
    const uint64_t value = strtoull(text, &end, 10);
    if (*end)
        fprintf(stderr, "lonas emulator: %s is \"%s\", which is not a number; taken as %llu\n", variable, text,
                static_cast<unsigned long long>(otherwise));
    return *end ? otherwise : value;
}
bool is_device(CUdevice device) { return device >= 0 && device < settings().devices; }

struct ErrorText {
    CUresult error;
    const char *name, *text;
};
#define LONAS_ERROR(name, text) {name, #name, text}
const ErrorText error_texts[] = {
    LONAS_ERROR(CUDA_SUCCESS, "no error"),
    LONAS_ERROR(CUDA_ERROR_INVALID_VALUE, "invalid argument"),
    LONAS_ERROR(CUDA_ERROR_OUT_OF_MEMORY, "out of memory"),
    LONAS_ERROR(CUDA_ERROR_NOT_INITIALIZED, "initialization error"),
    LONAS_ERROR(CUDA_ERROR_NO_DEVICE, "no CUDA-capable device is detected"),
    LONAS_ERROR(CUDA_ERROR_INVALID_DEVICE, "invalid device ordinal"),
    LONAS_ERROR(CUDA_ERROR_INVALID_IMAGE, "device kernel image is invalid"),
    LONAS_ERROR(CUDA_ERROR_INVALID_CONTEXT, "invalid device context"),
    LONAS_ERROR(CUDA_ERROR_INVALID_HANDLE, "invalid resource handle"),
    LONAS_ERROR(CUDA_ERROR_ILLEGAL_STATE, "the operation cannot be performed in the present state"),
    LONAS_ERROR(CUDA_ERROR_NOT_FOUND, "named symbol not found"),
    LONAS_ERROR(CUDA_ERROR_NOT_READY, "device not ready"),
    LONAS_ERROR(CUDA_ERROR_NOT_SUPPORTED, "operation not supported"),
    LONAS_ERROR(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "operation not permitted when stream is capturing"),
    LONAS_ERROR(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, "operation failed due to a previous error during capture"),
    LONAS_ERROR(CUDA_ERROR_STREAM_CAPTURE_UNMATCHED, "capture was not initiated in this stream"),
    LONAS_ERROR(CUDA_ERROR_STREAM_CAPTURE_IMPLICIT,
                "operation would make the legacy stream depend on a capturing blocking stream"),
    LONAS_ERROR(CUDA_ERROR_CAPTURED_EVENT, "operation not permitted on an event last recorded in a capturing stream"),
};
const ErrorText* find_error(CUresult error) {
    for (const ErrorText& entry : error_texts)
        if (entry.error == error) return &entry;
    return nullptr;
}

}  // namespace

const Settings& settings() {
    static const Settings read = [] {
        Settings value;
        value.devices = static_cast<int>(std::min<uint64_t>(number("LONAS_EMULATOR_DEVICES", 1), kMaxDevices));
        value.architecture = static_cast<int>(std::min<uint64_t>(number("LONAS_EMULATOR_ARCH", 90), 999));
        value.memory = number("LONAS_EMULATOR_MEMORY", uint64_t{8} << 30);
        value.seed = number("LONAS_EMULATOR_SEED", 0);
        return value;
    }();
    return read;
}

CUresult refuse(CUresult error, const char* format, ...) {
    char text[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof(text), format, arguments);
    va_end(arguments);
    const ErrorText* entry = find_error(error);
    fprintf(stderr, "lonas emulator: %s: %s\n", entry ? entry->name : "error", text);
    return error;
}

int current_device() { return static_cast<int>(reinterpret_cast<intptr_t>(current_context)) - 1; }

// CUDA C Programming Guide, table "Technical Specifications per Compute Capability".
size_t shared_memory_limit() {
    switch (settings().architecture) {
        case 70: return 96 << 10;
        case 75: return 64 << 10;
        case 80:
        case 87: return 163 << 10;
        case 86:
        case 89:
        case 120:
        case 121: return 99 << 10;
        default: return 227 << 10;
    }
}

}  // namespace emulator

using namespace emulator;

LONAS_API cuInit(unsigned flags) {
    Lock lock(driver_lock);
    if (flags) return CUDA_ERROR_INVALID_VALUE;
    if (!initialized) install_fault_handler();
    initialized = true;
    return CUDA_SUCCESS;
}
LONAS_API cuDriverGetVersion(int* version) {
    return version ? (*version = CUDA_VERSION, CUDA_SUCCESS) : CUDA_ERROR_INVALID_VALUE;
}
LONAS_API cuDeviceGetCount(int* count) {
    Lock lock(driver_lock);
    if (!initialized) return CUDA_ERROR_NOT_INITIALIZED;
    return count ? (*count = settings().devices, CUDA_SUCCESS) : CUDA_ERROR_INVALID_VALUE;
}
LONAS_API cuDeviceGet(CUdevice* device, int ordinal) {
    Lock lock(driver_lock);
    if (!initialized) return CUDA_ERROR_NOT_INITIALIZED;
    if (!device) return CUDA_ERROR_INVALID_VALUE;
    return is_device(ordinal) ? (*device = ordinal, CUDA_SUCCESS) : CUDA_ERROR_INVALID_DEVICE;
}
LONAS_API cuDeviceGetName(char* name, int length, CUdevice device) {
    if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
    if (!name || length < 1) return CUDA_ERROR_INVALID_VALUE;
    snprintf(name, length, "lonas emulator (CPU)");
    return CUDA_SUCCESS;
}
LONAS_API cuDeviceGetUuid_v2(CUuuid* uuid, CUdevice device) {
    if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
    memset(uuid, 0, sizeof(*uuid));
    uuid->bytes[15] = static_cast<char>(device);
    return CUDA_SUCCESS;
}
#undef cuDeviceGetUuid
LONAS_API cuDeviceGetUuid(CUuuid* uuid, CUdevice device) { return cuDeviceGetUuid_v2(uuid, device); }
LONAS_API cuDeviceTotalMem_v2(size_t* bytes, CUdevice device) {
    if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
    return bytes ? (*bytes = settings().memory, CUDA_SUCCESS) : CUDA_ERROR_INVALID_VALUE;
}
LONAS_API cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
    if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
    if (!value) return CUDA_ERROR_INVALID_VALUE;
    const int shared = static_cast<int>(shared_memory_limit());
    switch (attribute) {
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = settings().architecture / 10; break;
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = settings().architecture % 10; break;
        case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 4; break;  // small: grids sized by it stay cheap
        case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = kWarpSize; break;
        case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
        case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X:
        case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y: *value = 1024; break;
        case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z: *value = 64; break;
        case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X: *value = 0x7fffffff; break;
        case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y:
        case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z: *value = 65535; break;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: *value = 48 << 10; break;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = shared; break;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = shared + 1024; break;
        case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR: *value = 2048; break;
        case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
        case CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED:  // so that callers allocate as they do on a real device
        case CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING: *value = 1; break;
        default: *value = 0;
    }
    return CUDA_SUCCESS;
}

LONAS_API cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
    if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
    return context ? (*context = reinterpret_cast<CUcontext>(intptr_t{device} + 1), CUDA_SUCCESS) : CUDA_ERROR_INVALID_VALUE;
}
LONAS_API cuDevicePrimaryCtxRelease_v2(CUdevice device) {
    return is_device(device) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}
LONAS_API cuCtxGetCurrent(CUcontext* context) {
    return context ? (*context = current_context, CUDA_SUCCESS) : CUDA_ERROR_INVALID_VALUE;
}
LONAS_API cuCtxSetCurrent(CUcontext context) {
    if (context && !is_device(static_cast<int>(reinterpret_cast<intptr_t>(context)) - 1)) return CUDA_ERROR_INVALID_CONTEXT;
    current_context = context;
    return CUDA_SUCCESS;
}
LONAS_API cuCtxGetDevice(CUdevice* device) {
    if (current_device() < 0) return CUDA_ERROR_INVALID_CONTEXT;
    return device ? (*device = current_device(), CUDA_SUCCESS) : CUDA_ERROR_INVALID_VALUE;
}
LONAS_API cuCtxSetFlags(unsigned) { return CUDA_SUCCESS; }
LONAS_API cuCtxGetStreamPriorityRange(int* least, int* greatest) {
    if (least) *least = 0;
    if (greatest) *greatest = 0;
    return CUDA_SUCCESS;
}
LONAS_API cuDeviceGetDefaultMemPool(CUmemoryPool* pool, CUdevice device) {
    if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
    return pool ? (*pool = reinterpret_cast<CUmemoryPool>(intptr_t{device} + 1), CUDA_SUCCESS) : CUDA_ERROR_INVALID_VALUE;
}
LONAS_API cuDeviceGetMemPool(CUmemoryPool* pool, CUdevice device) { return cuDeviceGetDefaultMemPool(pool, device); }
LONAS_API cuMemPoolSetAttribute(CUmemoryPool, CUmemPool_attribute, void*) { return CUDA_SUCCESS; }
LONAS_API cuMemPoolTrimTo(CUmemoryPool, size_t) { return CUDA_SUCCESS; }

LONAS_API cuGetErrorName(CUresult error, const char** name) {
    const ErrorText* entry = find_error(error);
    if (name) *name = entry ? entry->name : nullptr;
    return entry && name ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
LONAS_API cuGetErrorString(CUresult error, const char** text) {
    const ErrorText* entry = find_error(error);
    if (text) *text = entry ? entry->text : nullptr;
    return entry && text ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
