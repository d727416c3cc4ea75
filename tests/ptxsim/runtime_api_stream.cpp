// SPDX-License-Identifier: Apache-2.0
// Streams, events, and graphs captured from streams.
//
// Normally work runs when it is issued. With PTXSIM_STREAMS=random it waits until something synchronises, and
// then runs in any order that stream order, events and the rules of the default stream allow: a dependency
// the program forgot shows as a wrong result for some seed.
#include <algorithm>
#include <chrono>
#include <set>

#include "work_graph.h"

using namespace ptxsim;
using Lock = std::lock_guard<std::recursive_mutex>;

struct CUstream_st {
  bool non_blocking = false;
  int priority = 0;
  uint64_t last = 0;            // newest pending work
  std::vector<uint64_t> waits;  // events to wait for before the next work
  struct Capture* capture = nullptr;
  std::vector<size_t> tail;  // captured nodes the next one comes after
};
struct Capture {
  Graph graph;
  CUstream_st* origin = nullptr;
  unsigned long long id = 0;
  std::set<CUstream_st*> members;
};
struct CUevent_st {
  uint64_t work = 0;  // pending work it stands for
  Capture* capture = nullptr;
  std::vector<size_t> tail;
  bool recorded = false;
  std::chrono::steady_clock::time_point time;
};
struct CUgraph_st {
  Graph graph;
};
struct CUgraphExec_st {
  Graph graph;
};

namespace {

struct Streams {
  Pending pending;
  CUstream_st legacy, per_thread;
  std::set<CUstream_st*> created;
  unsigned long long captures = 0;
};
Streams& streams() {
  static Streams* s = [] {
    auto* fresh = new Streams;
    fresh->per_thread.non_blocking = false;
    return fresh;
  }();
  return *s;
}

CUstream_st* resolve(cudaStream_t s) {
  if (s == nullptr || s == cudaStreamLegacy) return &streams().legacy;
  if (s == cudaStreamPerThread) return &streams().per_thread;
  return streams().created.count(s) ? s : nullptr;
}
std::vector<CUstream_st*> blocking_streams() {
  std::vector<CUstream_st*> out{&streams().per_thread};
  for (CUstream_st* s : streams().created)
    if (!s->non_blocking) out.push_back(s);
  return out;
}

bool random_order() {
  return config().random_streams != 0;
}

std::vector<uint64_t> predecessors(CUstream_st* s) {
  std::vector<uint64_t> after = std::move(s->waits);
  s->waits.clear();
  after.push_back(s->last);
  if (s == &streams().legacy) {
    for (CUstream_st* other : blocking_streams()) after.push_back(other->last);
  } else if (!s->non_blocking) {
    after.push_back(streams().legacy.last);
  }
  return after;
}

cudaError_t finish(CUstream_st* s) {
  if (random_order() || !streams().pending.empty()) {
    const std::vector<uint64_t> ids = predecessors(s);
    for (uint64_t id : ids) streams().pending.run_until(id);
  }
  return synchronised();
}

}  // namespace

namespace ptxsim {

bool is_capturing(cudaStream_t stream) {
  CUstream_st* s = resolve(stream);
  return s != nullptr && s->capture != nullptr;
}

void enqueue(cudaStream_t stream, Work work, const char*) {
  CUstream_st* s = resolve(stream);
  if (s == nullptr) s = &streams().legacy;
  if (s->capture != nullptr) {
    auto& nodes = s->capture->graph.nodes;
    nodes.push_back({std::move(work), s->tail});
    s->tail = {nodes.size() - 1};
    return;
  }
  if (!random_order() && streams().pending.empty()) return work();
  s->last = streams().pending.add(std::move(work), predecessors(s));
}
void finish_stream(cudaStream_t stream) {
  CUstream_st* s = resolve(stream);
  if (s != nullptr && s->capture == nullptr) finish(s);
}
void finish_all() {
  while (!streams().pending.empty()) streams().pending.run_one();
}

}  // namespace ptxsim

extern "C" {

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* out, unsigned flags, int priority) {
  const Lock lock(runtime().mutex);
  auto* s = new CUstream_st;
  s->non_blocking = (flags & cudaStreamNonBlocking) != 0;
  s->priority = priority;
  streams().created.insert(s);
  *out = s;
  return result(cudaSuccess);
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* out, unsigned flags) {
  return cudaStreamCreateWithPriority(out, flags, 0);
}
cudaError_t cudaStreamCreate(cudaStream_t* out) {
  return cudaStreamCreateWithPriority(out, 0, 0);
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  const Lock lock(runtime().mutex);
  CUstream_st* s = resolve(stream);
  if (s == nullptr || streams().created.erase(s) == 0) return result(cudaErrorInvalidResourceHandle);
  streams().pending.run_until(s->last);
  delete s;
  return result(cudaSuccess);
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  const Lock lock(runtime().mutex);
  CUstream_st* s = resolve(stream);
  if (s == nullptr) return result(cudaErrorInvalidResourceHandle);
  if (s->capture != nullptr) return result(cudaErrorStreamCaptureUnsupported);
  return finish(s);
}
cudaError_t cudaStreamQuery(cudaStream_t stream) {
  const Lock lock(runtime().mutex);
  CUstream_st* s = resolve(stream);
  if (s == nullptr) return result(cudaErrorInvalidResourceHandle);
  if (!streams().pending.done(s->last)) {
    streams().pending.run_one();
    if (!streams().pending.done(s->last)) return cudaErrorNotReady;
  }
  return synchronised();
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  const Lock lock(runtime().mutex);
  CUstream_st* s = resolve(stream);
  if (s == nullptr || event == nullptr) return result(cudaErrorInvalidResourceHandle);
  if (event->capture != nullptr) {  // the stream joins the capture
    s->capture = event->capture;
    event->capture->members.insert(s);
    s->tail.insert(s->tail.end(), event->tail.begin(), event->tail.end());
  } else {
    s->waits.push_back(event->work);
  }
  return result(cudaSuccess);
}
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int* priority) {
  const Lock lock(runtime().mutex);
  CUstream_st* s = resolve(stream);
  if (s == nullptr) return result(cudaErrorInvalidResourceHandle);
  *priority = s->priority;
  return result(cudaSuccess);
}
cudaError_t cudaStreamGetFlags(cudaStream_t stream, unsigned* flags) {
  const Lock lock(runtime().mutex);
  CUstream_st* s = resolve(stream);
  if (s == nullptr) return result(cudaErrorInvalidResourceHandle);
  *flags = s->non_blocking ? cudaStreamNonBlocking : cudaStreamDefault;
  return result(cudaSuccess);
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return result(cudaSuccess);
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t f, void* data) {
  const Lock lock(runtime().mutex);
  if (resolve(stream) == nullptr) return result(cudaErrorInvalidResourceHandle);
  enqueue(stream, [=] { f(data); }, "cudaLaunchHostFunc");
  return result(cudaSuccess);
}
cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t f, void* data, unsigned) {
  const Lock lock(runtime().mutex);
  if (resolve(stream) == nullptr) return result(cudaErrorInvalidResourceHandle);
  enqueue(stream, [=] { f(stream, runtime().fault, data); }, "cudaStreamAddCallback");
  return result(cudaSuccess);
}
cudaError_t cudaDeviceSynchronize() {
  const Lock lock(runtime().mutex);
  finish_all();
  std::fflush(stdout);
  return synchronised();
}

// ---- events
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* out, unsigned) {
  *out = new CUevent_st;
  return result(cudaSuccess);
}
cudaError_t cudaEventCreate(cudaEvent_t* out) {
  return cudaEventCreateWithFlags(out, 0);
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  const Lock lock(runtime().mutex);
  if (event == nullptr) return result(cudaErrorInvalidResourceHandle);
  finish_all();
  delete event;
  return result(cudaSuccess);
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  const Lock lock(runtime().mutex);
  CUstream_st* s = resolve(stream);
  if (event == nullptr || s == nullptr) return result(cudaErrorInvalidResourceHandle);
  event->recorded = true;
  event->capture = s->capture;
  if (s->capture != nullptr) {
    event->tail = s->tail;
    return result(cudaSuccess);
  }
  enqueue(stream, [event] { event->time = std::chrono::steady_clock::now(); }, "cudaEventRecord");
  event->work = s->last;
  return result(cudaSuccess);
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return cudaEventRecordWithFlags(event, stream, 0);
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  const Lock lock(runtime().mutex);
  if (event == nullptr) return result(cudaErrorInvalidResourceHandle);
  streams().pending.run_until(event->work);
  return synchronised();
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
  const Lock lock(runtime().mutex);
  if (event == nullptr) return result(cudaErrorInvalidResourceHandle);
  if (!streams().pending.done(event->work)) streams().pending.run_one();
  return streams().pending.done(event->work) ? synchronised() : cudaErrorNotReady;
}
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t start, cudaEvent_t end) {
  const Lock lock(runtime().mutex);
  if (start == nullptr || end == nullptr || !start->recorded || !end->recorded)
    return result(cudaErrorInvalidResourceHandle);
  if (!streams().pending.done(start->work) || !streams().pending.done(end->work))
    return result(cudaErrorNotReady);
  *ms = std::max(1e-3f, std::chrono::duration<float, std::milli>(end->time - start->time).count());
  return result(cudaSuccess);
}

// ---- capture and graphs
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode) {
  const Lock lock(runtime().mutex);
  CUstream_st* s = resolve(stream);
  if (s == nullptr || s == &streams().legacy) return result(cudaErrorStreamCaptureUnsupported);
  if (s->capture != nullptr) return result(cudaErrorIllegalState);
  s->capture = new Capture;
  s->capture->origin = s;
  s->capture->id = ++streams().captures;
  s->capture->members.insert(s);
  s->tail.clear();
  return result(cudaSuccess);
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* out) {
  const Lock lock(runtime().mutex);
  CUstream_st* s = resolve(stream);
  *out = nullptr;
  if (s == nullptr || s->capture == nullptr) return result(cudaErrorIllegalState);
  if (s->capture->origin != s) return result(cudaErrorStreamCaptureUnmatched);
  Capture* capture = s->capture;
  // Every captured node must be an ancestor of the origin's tail: forked streams have to be joined.
  std::vector<bool> reached(capture->graph.nodes.size(), false);
  std::vector<size_t> work = s->tail;
  while (!work.empty()) {
    const size_t n = work.back();
    work.pop_back();
    if (reached[n]) continue;
    reached[n] = true;
    work.insert(work.end(), capture->graph.nodes[n].after.begin(), capture->graph.nodes[n].after.end());
  }
  const bool joined = std::all_of(reached.begin(), reached.end(), [](bool b) { return b; });
  for (CUstream_st* member : capture->members)
    if (resolve(member) != nullptr) member->capture = nullptr, member->tail.clear();
  if (joined) *out = new CUgraph_st{std::move(capture->graph)};
  delete capture;
  return result(joined ? cudaSuccess : cudaErrorStreamCaptureUnjoined);
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus* status) {
  const Lock lock(runtime().mutex);
  *status = is_capturing(stream) ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return result(cudaSuccess);
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus* status,
                                     unsigned long long* id, cudaGraph_t* graph,
                                     const cudaGraphNode_t** dependencies, const cudaGraphEdgeData** edges,
                                     size_t* count) {
  const Lock lock(runtime().mutex);
  CUstream_st* s = resolve(stream);
  const bool active = s != nullptr && s->capture != nullptr;
  *status = active ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  if (id != nullptr && active) *id = s->capture->id;
  if ((graph != nullptr || dependencies != nullptr || edges != nullptr || count != nullptr) && active)
    return result(cudaErrorNotSupported);
  return result(cudaSuccess);
}
cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode* mode) {
  static thread_local cudaStreamCaptureMode current = cudaStreamCaptureModeGlobal;
  std::swap(*mode, current);
  return result(cudaSuccess);
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* out, cudaGraph_t graph, unsigned long long) {
  if (graph == nullptr) return result(cudaErrorInvalidValue);
  *out = new CUgraphExec_st{graph->graph};
  return result(cudaSuccess);
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
  const Lock lock(runtime().mutex);
  if (exec == nullptr || resolve(stream) == nullptr) return result(cudaErrorInvalidValue);
  enqueue(stream, [graph = exec->graph] { graph.run(config().random_streams != 0); }, "cudaGraphLaunch");
  return result(cudaSuccess);
}
cudaError_t cudaGraphUpload(cudaGraphExec_t, cudaStream_t) {
  return result(cudaSuccess);
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count) {
  if (nodes != nullptr) return result(cudaErrorNotSupported);
  *count = graph->graph.nodes.size();
  return result(cudaSuccess);
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return result(cudaSuccess);
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  const Lock lock(runtime().mutex);
  finish_all();
  delete exec;
  return result(cudaSuccess);
}

}  // extern "C"
