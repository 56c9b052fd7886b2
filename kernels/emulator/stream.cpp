// Streams, events, copies and graphs. A stream runs each call at once and in the caller's thread, so order between
// streams is the order of the calls; a missing synchronisation cannot show here. A captured stream keeps its calls,
// and a graph replays them.

#include <string.h>

#include <chrono>
#include <memory>
#include <set>
#include <vector>

#include "driver.h"

namespace emulator {
namespace {

using Work = std::function<CUresult()>;
struct Capture {
    std::vector<Work> work;
    CUstream origin;
    bool broken = false;  // by a call that cannot be captured: told at the end, as the driver does
};
struct Stream {
    unsigned flags = CU_STREAM_NON_BLOCKING;
    std::shared_ptr<Capture> capture;
};
struct Event {
    unsigned flags;
    bool recorded = false;
    std::chrono::steady_clock::time_point time;
    std::weak_ptr<Capture> capture;  // of the stream it was recorded on
};
struct Graph {
    std::vector<Work> work;
};

std::set<Stream*> streams;
std::set<Event*> events;
std::set<Graph*> graphs;       // CUgraph
std::set<Graph*> executables;  // CUgraphExec

// The two default streams have no object, and cannot be captured.
bool is_default(CUstream stream) {
    return stream == nullptr || stream == CU_STREAM_LEGACY || stream == CU_STREAM_PER_THREAD;
}
Stream* find_stream(CUstream handle) {
    auto found = streams.find(reinterpret_cast<Stream*>(handle));
    return found == streams.end() ? nullptr : *found;
}
Event* find_event(CUevent handle) {
    auto found = events.find(reinterpret_cast<Event*>(handle));
    return found == events.end() ? nullptr : *found;
}
Graph* find_graph(const std::set<Graph*>& set, void* handle) {
    auto found = set.find(static_cast<Graph*>(handle));
    return found == set.end() ? nullptr : *found;
}

CUresult check_device_range(const char* call, CUdeviceptr address, size_t bytes) {
    if (bytes == 0 || is_device_range(address, bytes)) return CUDA_SUCCESS;
    return refuse(CUDA_ERROR_INVALID_VALUE, "%s of %zu bytes at %s", call, bytes, describe_address(address).c_str());
}
CUresult copy(const char* call, void* to, bool to_device, const void* from, bool from_device, size_t bytes) {
    if (bytes && (!to || !from)) return CUDA_ERROR_INVALID_VALUE;
    if (to_device)
        if (CUresult error = check_device_range(call, reinterpret_cast<CUdeviceptr>(to), bytes)) return error;
    if (from_device)
        if (CUresult error = check_device_range(call, reinterpret_cast<CUdeviceptr>(from), bytes)) return error;
    if (bytes) memmove(to, from, bytes);
    return CUDA_SUCCESS;
}
template <class T>
CUresult fill(CUdeviceptr address, T value, size_t count, CUstream stream) {
    return submit(stream, [=] {
        if (CUresult error = check_device_range("cuMemset", address, count * sizeof(T))) return error;
        for (size_t i = 0; i < count; ++i) reinterpret_cast<T*>(address)[i] = value;
        return CUDA_SUCCESS;
    });
}

}  // namespace

CUresult submit(CUstream handle, Work work) {
    if (is_default(handle)) {
        if (any_capture() && handle != CU_STREAM_PER_THREAD) {
            // The legacy stream waits for blocking streams, and those that are captured cannot be waited for.
            for (Stream* stream : streams)
                if (stream->capture && !(stream->flags & CU_STREAM_NON_BLOCKING))
                    return stream->capture->broken = true, refuse(CUDA_ERROR_STREAM_CAPTURE_IMPLICIT,
                                                                  "the default stream, while a blocking stream is captured");
        }
        return work();
    }
    Stream* stream = find_stream(handle);
    if (!stream) return refuse(CUDA_ERROR_INVALID_HANDLE, "a call on a stream that does not exist");
    if (!stream->capture) return work();
    stream->capture->work.push_back(std::move(work));
    return CUDA_SUCCESS;
}
CUresult outside_capture(CUstream handle) {
    if (is_default(handle)) return CUDA_SUCCESS;
    Stream* stream = find_stream(handle);
    if (!stream) return refuse(CUDA_ERROR_INVALID_HANDLE, "a call on a stream that does not exist");
    if (!stream->capture) return CUDA_SUCCESS;
    stream->capture->broken = true;
    return refuse(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "a captured stream cannot be waited for, nor allocate or free");
}
bool any_capture() {
    for (Stream* stream : streams)
        if (stream->capture) return true;
    return false;
}

}  // namespace emulator

using namespace emulator;

LONAS_API cuStreamCreate(CUstream* stream, unsigned flags) {
    Lock lock(driver_lock);
    if (!stream) return CUDA_ERROR_INVALID_VALUE;
    if (current_device() < 0) return refuse(CUDA_ERROR_INVALID_CONTEXT, "cuStreamCreate without a current context");
    auto* made = new Stream;
    made->flags = flags;
    *stream = reinterpret_cast<CUstream>(*streams.insert(made).first);
    return CUDA_SUCCESS;
}
LONAS_API cuStreamCreateWithPriority(CUstream* stream, unsigned flags, int) { return cuStreamCreate(stream, flags); }
LONAS_API cuStreamDestroy_v2(CUstream handle) {
    Lock lock(driver_lock);
    auto* stream = find_stream(handle);
    if (!stream) return CUDA_ERROR_INVALID_HANDLE;
    streams.erase(stream);
    delete stream;
    return CUDA_SUCCESS;
}
LONAS_API cuStreamSynchronize(CUstream stream) {
    Lock lock(driver_lock);
    return outside_capture(stream);
}
LONAS_API cuStreamQuery(CUstream stream) { return cuStreamSynchronize(stream); }
LONAS_API cuCtxSynchronize() {
    Lock lock(driver_lock);
    if (current_device() < 0) return CUDA_ERROR_INVALID_CONTEXT;
    return any_capture() ? refuse(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "cuCtxSynchronize while a stream is captured")
                         : CUDA_SUCCESS;
}
LONAS_API cuStreamWaitEvent(CUstream handle, CUevent event_handle, unsigned) {
    Lock lock(driver_lock);
    Event* event = find_event(event_handle);
    if (!event) return CUDA_ERROR_INVALID_HANDLE;
    Stream* stream = find_stream(handle);
    if (!stream) return is_default(handle) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
    // A stream that waits for a captured one joins its capture.
    auto capture = event->capture.lock();
    if (capture && !stream->capture) stream->capture = capture;
    return CUDA_SUCCESS;
}
LONAS_API cuLaunchHostFunc(CUstream stream, CUhostFn function, void* data) {
    Lock lock(driver_lock);
    if (!function) return CUDA_ERROR_INVALID_VALUE;
    return submit(stream, [=] { return function(data), CUDA_SUCCESS; });
}

LONAS_API cuEventCreate(CUevent* event, unsigned flags) {
    Lock lock(driver_lock);
    if (!event) return CUDA_ERROR_INVALID_VALUE;
    auto* made = new Event;
    made->flags = flags;
    *event = reinterpret_cast<CUevent>(*events.insert(made).first);
    return CUDA_SUCCESS;
}
LONAS_API cuEventDestroy_v2(CUevent handle) {
    Lock lock(driver_lock);
    Event* event = find_event(handle);
    if (!event) return CUDA_ERROR_INVALID_HANDLE;
    events.erase(event);
    delete event;
    return CUDA_SUCCESS;
}
LONAS_API cuEventRecord(CUevent handle, CUstream stream_handle) {
    Lock lock(driver_lock);
    Event* event = find_event(handle);
    Stream* stream = find_stream(stream_handle);
    if (!event || (!stream && !is_default(stream_handle))) return CUDA_ERROR_INVALID_HANDLE;
    event->capture.reset();
    if (stream && stream->capture) return event->capture = stream->capture, CUDA_SUCCESS;
    event->recorded = true;
    event->time = std::chrono::steady_clock::now();
    return CUDA_SUCCESS;
}
LONAS_API cuEventSynchronize(CUevent handle) {
    Lock lock(driver_lock);
    Event* event = find_event(handle);
    if (!event) return CUDA_ERROR_INVALID_HANDLE;
    return event->capture.expired() ? CUDA_SUCCESS : CUDA_ERROR_CAPTURED_EVENT;
}
LONAS_API cuEventQuery(CUevent handle) { return cuEventSynchronize(handle); }
LONAS_API cuEventElapsedTime_v2(float* milliseconds, CUevent from_handle, CUevent to_handle) {
    Lock lock(driver_lock);
    Event *from = find_event(from_handle), *to = find_event(to_handle);
    if (!milliseconds) return CUDA_ERROR_INVALID_VALUE;
    for (Event* event : {from, to})
        if (!event || !event->recorded || event->flags & CU_EVENT_DISABLE_TIMING) return CUDA_ERROR_INVALID_HANDLE;
    *milliseconds = std::chrono::duration<float, std::milli>(to->time - from->time).count();
    return CUDA_SUCCESS;
}
#undef cuEventElapsedTime
LONAS_API cuEventElapsedTime(float* milliseconds, CUevent from, CUevent to) {
    return cuEventElapsedTime_v2(milliseconds, from, to);
}

LONAS_API cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void* from, size_t bytes, CUstream stream) {
    Lock lock(driver_lock);
    return submit(stream, [=] { return copy("cuMemcpyHtoD", reinterpret_cast<void*>(to), true, from, false, bytes); });
}
LONAS_API cuMemcpyDtoHAsync_v2(void* to, CUdeviceptr from, size_t bytes, CUstream stream) {
    Lock lock(driver_lock);
    return submit(stream, [=] { return copy("cuMemcpyDtoH", to, false, reinterpret_cast<void*>(from), true, bytes); });
}
LONAS_API cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
    Lock lock(driver_lock);
    return submit(stream, [=] {
        return copy("cuMemcpyDtoD", reinterpret_cast<void*>(to), true, reinterpret_cast<void*>(from), true, bytes);
    });
}
LONAS_API cuMemcpyPeerAsync(CUdeviceptr to, CUcontext, CUdeviceptr from, CUcontext, size_t bytes, CUstream stream) {
    return cuMemcpyDtoDAsync_v2(to, from, bytes, stream);
}
LONAS_API cuMemcpyHtoD_v2(CUdeviceptr to, const void* from, size_t bytes) {
    return cuMemcpyHtoDAsync_v2(to, from, bytes, nullptr);
}
LONAS_API cuMemcpyDtoH_v2(void* to, CUdeviceptr from, size_t bytes) {
    return cuMemcpyDtoHAsync_v2(to, from, bytes, nullptr);
}
LONAS_API cuMemcpyDtoD_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes) {
    return cuMemcpyDtoDAsync_v2(to, from, bytes, nullptr);
}
LONAS_API cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t count, CUstream stream) {
    Lock lock(driver_lock);
    return fill(to, value, count, stream);
}
LONAS_API cuMemsetD16Async(CUdeviceptr to, unsigned short value, size_t count, CUstream stream) {
    Lock lock(driver_lock);
    return to % sizeof(value) ? CUDA_ERROR_INVALID_VALUE : fill(to, value, count, stream);
}
LONAS_API cuMemsetD32Async(CUdeviceptr to, unsigned value, size_t count, CUstream stream) {
    Lock lock(driver_lock);
    return to % sizeof(value) ? CUDA_ERROR_INVALID_VALUE : fill(to, value, count, stream);
}
LONAS_API cuMemsetD8_v2(CUdeviceptr to, unsigned char value, size_t count) {
    return cuMemsetD8Async(to, value, count, nullptr);
}
LONAS_API cuMemsetD16_v2(CUdeviceptr to, unsigned short value, size_t count) {
    return cuMemsetD16Async(to, value, count, nullptr);
}
LONAS_API cuMemsetD32_v2(CUdeviceptr to, unsigned value, size_t count) {
    return cuMemsetD32Async(to, value, count, nullptr);
}

LONAS_API cuStreamBeginCapture_v2(CUstream handle, CUstreamCaptureMode) {
    Lock lock(driver_lock);
    if (is_default(handle)) return refuse(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "the default stream cannot be captured");
    Stream* stream = find_stream(handle);
    if (!stream) return CUDA_ERROR_INVALID_HANDLE;
    if (stream->capture) return refuse(CUDA_ERROR_ILLEGAL_STATE, "a stream that is captured already");
    stream->capture = std::make_shared<Capture>();
    stream->capture->origin = handle;
    return CUDA_SUCCESS;
}
LONAS_API cuStreamEndCapture(CUstream handle, CUgraph* graph) {
    Lock lock(driver_lock);
    Stream* stream = find_stream(handle);
    if (!graph) return CUDA_ERROR_INVALID_VALUE;
    *graph = nullptr;
    if (!stream) return CUDA_ERROR_INVALID_HANDLE;
    if (!stream->capture) return refuse(CUDA_ERROR_ILLEGAL_STATE, "the end of a capture that has not begun");
    auto capture = stream->capture;
    if (capture->origin != handle)
        return refuse(CUDA_ERROR_STREAM_CAPTURE_UNMATCHED, "a capture ends on the stream where it began");
    for (Stream* other : streams)
        if (other->capture == capture) other->capture.reset();
    if (capture->broken) return refuse(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, "the capture was broken by an earlier call");
    *graph = reinterpret_cast<CUgraph>(*graphs.insert(new Graph{capture->work}).first);
    return CUDA_SUCCESS;
}
LONAS_API cuStreamIsCapturing(CUstream handle, CUstreamCaptureStatus* status) {
    Lock lock(driver_lock);
    if (!status) return CUDA_ERROR_INVALID_VALUE;
    Stream* stream = find_stream(handle);
    if (!stream && !is_default(handle)) return CUDA_ERROR_INVALID_HANDLE;
    const bool captured = stream && stream->capture;
    *status = !captured                 ? CU_STREAM_CAPTURE_STATUS_NONE
              : stream->capture->broken ? CU_STREAM_CAPTURE_STATUS_INVALIDATED
                                        : CU_STREAM_CAPTURE_STATUS_ACTIVE;
    return CUDA_SUCCESS;
}
LONAS_API cuGraphInstantiateWithFlags(CUgraphExec* executable, CUgraph handle, unsigned long long) {
    Lock lock(driver_lock);
    Graph* graph = find_graph(graphs, handle);
    if (!executable || !graph) return CUDA_ERROR_INVALID_VALUE;
    *executable = reinterpret_cast<CUgraphExec>(*executables.insert(new Graph(*graph)).first);
    return CUDA_SUCCESS;
}
LONAS_API cuGraphLaunch(CUgraphExec handle, CUstream stream) {
    Lock lock(driver_lock);
    Graph* graph = find_graph(executables, handle);
    if (!graph) return CUDA_ERROR_INVALID_VALUE;
    return submit(stream, [work = graph->work] {
        for (const Work& step : work)
            if (CUresult error = step()) return error;
        return CUDA_SUCCESS;
    });
}
LONAS_API cuGraphUpload(CUgraphExec handle, CUstream) {
    Lock lock(driver_lock);
    return find_graph(executables, handle) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
LONAS_API cuGraphExecDestroy(CUgraphExec handle) {
    Lock lock(driver_lock);
    Graph* graph = find_graph(executables, handle);
    return graph ? (executables.erase(graph), delete graph, CUDA_SUCCESS) : CUDA_ERROR_INVALID_VALUE;
}
LONAS_API cuGraphDestroy(CUgraph handle) {
    Lock lock(driver_lock);
    Graph* graph = find_graph(graphs, handle);
    return graph ? (graphs.erase(graph), delete graph, CUDA_SUCCESS) : CUDA_ERROR_INVALID_VALUE;
}
