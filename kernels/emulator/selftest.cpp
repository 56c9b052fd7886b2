// Runs one kernel of selftest.cu through the driver: selftest CASE. Prints "passed" when nothing was wrong, "wrong
// result" when the numbers were; a case that the emulator stops ends by its abort.

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmath>
#include <string>
#include <vector>

#include <cuda.h>

namespace {

void check(CUresult result, const char* what) {
    if (result == CUDA_SUCCESS) return;
    const char* name = nullptr;
    cuGetErrorName(result, &name);
    printf("%s: %s\n", what, name ? name : "?");
    exit(2);
}
#define CHECK(call) check(call, #call)

constexpr int kThreads = 64;
CUmodule module;
CUstream stream;

struct Buffer {
    CUdeviceptr pointer = 0;
    explicit Buffer(const std::vector<float>& numbers) {
        CHECK(cuMemAlloc(&pointer, numbers.size() * sizeof(float)));
        CHECK(cuMemcpyHtoD(pointer, numbers.data(), numbers.size() * sizeof(float)));
    }
};
std::vector<float> read(CUdeviceptr pointer, size_t count) {
    std::vector<float> numbers(count);
    CHECK(cuMemcpyDtoH(numbers.data(), pointer, count * sizeof(float)));
    return numbers;
}
void launch(const char* name, std::vector<void*> arguments, unsigned shared = 0, unsigned blocks = 1,
            unsigned threads = kThreads) {
    CUfunction function;
    CHECK(cuModuleGetFunction(&function, module, name));
    CHECK(cuLaunchKernel(function, blocks, 1, 1, threads, 1, 1, shared, stream, arguments.data(), nullptr));
}
int verdict(bool right) {
    puts(right ? "passed" : "wrong result");
    return right ? 0 : 1;
}

// The right kernel, first as it is, then captured into a graph and replayed twice.
int run_correct() {
    constexpr unsigned blocks = 5;
    std::vector<float> numbers(1000);
    float expected = 0.0f;
    for (size_t i = 0; i < numbers.size(); ++i) expected += numbers[i] = static_cast<float>(i % 7);
    Buffer input(numbers), rounded{std::vector<float>(blocks)}, total{std::vector<float>(1)};
    int n = static_cast<int>(numbers.size());
    std::vector<void*> arguments = {&input.pointer, &n, &rounded.pointer, &total.pointer};
    launch("correct", arguments, 8 * sizeof(float), blocks, 256);
    CHECK(cuStreamBeginCapture(stream, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL));
    launch("correct", arguments, 8 * sizeof(float), blocks, 256);
    CUgraph graph;
    CUgraphExec executable;
    CHECK(cuStreamEndCapture(stream, &graph));
    n = 0;  // a graph keeps the arguments it was captured with
    CHECK(cuGraphInstantiate(&executable, graph, 0));
    const bool captured = read(total.pointer, 1)[0] == blocks * expected;
    for (int replay = 0; replay < 2; ++replay) CHECK(cuGraphLaunch(executable, stream));
    CHECK(cuGraphExecDestroy(executable));
    CHECK(cuGraphDestroy(graph));
    CHECK(cuStreamSynchronize(stream));
    return verdict(captured && read(total.pointer, 1)[0] == 3 * blocks * expected);
}

// What the driver must refuse, by error code.
int run_limits() {
    CUfunction function;
    CHECK(cuModuleGetFunction(&function, module, "correct"));
    auto refused = [&](unsigned grid, unsigned threads, unsigned shared) {
        float number = 0.0f;
        void* arguments[] = {&number, &number, &number, &number};
        return cuLaunchKernel(function, grid, 1, 1, threads, 1, 1, shared, stream, arguments, nullptr) ==
               CUDA_ERROR_INVALID_VALUE;
    };
    bool right = refused(0, 32, 0) && refused(1, 1025, 0) && refused(1, 512, 0) && refused(1, 32, (48 << 10) + 1);
    CHECK(cuFuncSetAttribute(function, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, 227 << 10));
    right = right && refused(1, 32, (227 << 10) + 1);
    right = right && cuFuncSetAttribute(function, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, 228 << 10) ==
                         CUDA_ERROR_INVALID_VALUE;
    CUdeviceptr pointer;
    size_t free_bytes, total_bytes;
    CHECK(cuMemGetInfo(&free_bytes, &total_bytes));
    right = right && cuMemAlloc(&pointer, total_bytes + 1) == CUDA_ERROR_OUT_OF_MEMORY;
    // All there is at once: mapped, not committed, and poisoned to the last byte.
    CHECK(cuMemAlloc(&pointer, free_bytes));
    right = right && std::isnan(read(pointer, 1)[0]) && std::isnan(read(pointer + free_bytes - 4, 1)[0]);
    right = right && cuMemAlloc(&pointer, 1) == CUDA_ERROR_OUT_OF_MEMORY;
    CHECK(cuMemFree(pointer));
    CHECK(cuMemAlloc(&pointer, 6));
    char bytes[7] = {};
    right = right && cuMemcpyHtoD(pointer, bytes, 7) == CUDA_ERROR_INVALID_VALUE &&
            cuModuleGetFunction(&function, module, "absent") == CUDA_ERROR_NOT_FOUND;
    return verdict(right);
}

int run_wrong(const std::string& name) {
    // wgmma takes four warps, and tiles of 16 KiB with what aligns them.
    const bool group = name.find("wgmma") != name.npos || name == "warpgroup" || name == "misaligned_tile";
    const int threads = group ? 2 * kThreads : kThreads;
    Buffer out{std::vector<float>(threads)}, in{std::vector<float>(kThreads)};
    int n = kThreads, half = kThreads / 2;
    if (group)
        launch(name.c_str(), {&out.pointer}, 17 << 10, 1, threads);
    else if (name == "write_past_end")
        launch("write_past_end", {&out.pointer, &n}, 0, 2);
    else if (name == "write_before_far") {
        out.pointer -= 4096;
        launch("write_before", {&out.pointer});
    } else if (name == "read_past_end")
        launch("read_past_end", {&in.pointer, &n, &out.pointer});
    else if (name == "shared_past_end")
        launch("shared_past_end", {&n}, kThreads * sizeof(float));
    else if (name == "barrier_after_return")
        launch("barrier_after_return", {&out.pointer, &half});
    else if (name == "misaligned")
        launch("misaligned", {&in.pointer, &out.pointer});
    else if (name == "tensor_cores" || name == "missing_wait" || name == "weak_wait" ||
             name == "missing_barrier_after_wait" || name == "missing_barrier_before_copy" || name == "misaligned_copy" ||
             name == "copy_past_end") {
        Buffer ones{std::vector<float>(name == "tensor_cores" ? 128 : kThreads, 1.0f)};
        launch(name.c_str(), {&ones.pointer, &out.pointer}, 0, 1, name == "tensor_cores" ? 32 : kThreads);
    } else if (name == "missing_syncwarp")
        launch("missing_syncwarp", {&out.pointer}, 0, 1, 32);
    else if (name == "use_after_free") {
        CHECK(cuMemFree(out.pointer));
        launch("write_one", {&out.pointer});
    } else if (name == "use_after_free_in_table") {
        CHECK(cuMemcpyHtoD(in.pointer, &out.pointer, sizeof(out.pointer)));
        CHECK(cuMemFree(out.pointer));
        launch("write_through_table", {&in.pointer});
    } else if (name == "host_pointer") {
        out.pointer = reinterpret_cast<CUdeviceptr>(&n);
        launch("write_one", {&out.pointer});
    } else
        launch(name.c_str(), {&out.pointer}, kThreads * sizeof(float), name == "uninitialised_in_template" ? 3 : 1);
    const int written = name == "missing_syncwarp" || name == "tensor_cores" ? 32 : threads;
    for (float number : read(out.pointer, written))
        if (!(number == 1.0f)) return verdict(false);  // NaN is not equal either
    return verdict(true);
}

}  // namespace

int main(int count, char** arguments) {
    const std::string name = count > 1 ? arguments[1] : "correct";
    CUdevice device;
    CUcontext context;
    CHECK(cuInit(0));
    CHECK(cuDeviceGet(&device, 0));
    CHECK(cuDevicePrimaryCtxRetain(&context, device));
    CHECK(cuCtxSetCurrent(context));
    CHECK(cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING));
    CHECK(cuModuleLoadData(&module, ".version 9.0"));  // what looks like PTX: the image is not read
    if (name == "correct") return run_correct();
    if (name == "limits") return run_limits();
    return run_wrong(name);
}
