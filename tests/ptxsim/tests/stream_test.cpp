// SPDX-License-Identifier: Apache-2.0
// Streams, events, graphs and the host side of the runtime API.
#include "device.h"
#include "kernels.h"

using namespace ptxsim_test;

namespace {

class Streams : public Device {};

// Two streams, a copy that must follow an addition. Returns whether the result is right.
bool copy_follows_add(bool with_event) {
  cudaStream_t a, b;
  cudaEvent_t event;
  cudaStreamCreateWithFlags(&a, cudaStreamNonBlocking);
  cudaStreamCreateWithFlags(&b, cudaStreamNonBlocking);
  cudaEventCreate(&event);
  Buffer<float> x(std::vector<float>(300, 1.0f)), y(std::vector<float>(300, 0.0f));
  launch_add(x, 300, 2.0f, a);
  cudaEventRecord(event, a);
  if (with_event) cudaStreamWaitEvent(b, event, 0);
  launch_copy(x, y, 300, 1, b);
  EXPECT_EQ(cudaStreamSynchronize(b), cudaSuccess) << report();
  const float got = y.host()[17];
  EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  cudaEventDestroy(event);
  cudaStreamDestroy(a);
  cudaStreamDestroy(b);
  return got == 3.0f;
}

TEST_F(Streams, MissingEventShowsForSomeSeed) {
  bool wrong_without = false;
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    configure([&](auto& c) { c.seed = seed, c.random_streams = 1; });
    EXPECT_TRUE(copy_follows_add(true)) << seed;
    wrong_without = wrong_without || !copy_follows_add(false);
  }
  EXPECT_TRUE(wrong_without);
}

TEST_F(Streams, DefaultStreamOrdersBlockingStreams) {
  for (uint64_t seed = 1; seed <= 10; ++seed) {
    configure([&](auto& c) { c.seed = seed, c.random_streams = 1; });
    cudaStream_t s;
    ASSERT_EQ(cudaStreamCreate(&s), cudaSuccess);
    Buffer<float> x(std::vector<float>(100, 1.0f)), y(100);
    launch_add(x, 100, 1.0f, s);
    launch_copy(x, y, 100, 1, nullptr);  // waits for s
    launch_add(x, 100, 1.0f, s);         // waits for the copy
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    EXPECT_EQ(y.host()[5], 2.0f);
    EXPECT_EQ(x.host()[5], 3.0f);
    cudaStreamDestroy(s);
  }
}

TEST_F(Streams, GraphWithForkAndJoinReplays) {
  for (int random = 0; random < 2; ++random) {
    configure([&](auto& c) { c.seed = 3, c.random_streams = random; });
    cudaStream_t s, fork;
    cudaEvent_t begin, end;
    cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking);
    cudaStreamCreateWithFlags(&fork, cudaStreamNonBlocking);
    cudaEventCreate(&begin);
    cudaEventCreate(&end);
    Buffer<float> x(std::vector<float>(64, 0.0f)), y(std::vector<float>(64, 0.0f)),
        z(std::vector<float>(64, 0.0f));
    ASSERT_EQ(cudaStreamBeginCapture(s, cudaStreamCaptureModeGlobal), cudaSuccess);
    launch_add(x, 64, 1.0f, s);
    cudaEventRecord(begin, s);
    cudaStreamWaitEvent(fork, begin, 0);
    launch_copy(x, y, 64, 1, fork);
    cudaEventRecord(end, fork);
    launch_copy(x, z, 64, 1, s);
    cudaStreamWaitEvent(s, end, 0);
    launch_add(y, 64, 10.0f, s);
    cudaGraph_t graph;
    ASSERT_EQ(cudaStreamEndCapture(s, &graph), cudaSuccess);
    EXPECT_EQ(x.host()[0], 0.0f);  // capture runs nothing
    size_t nodes = 0;
    EXPECT_EQ(cudaGraphGetNodes(graph, nullptr, &nodes), cudaSuccess);
    EXPECT_EQ(nodes, 4u);
    cudaGraphExec_t exec;
    ASSERT_EQ(cudaGraphInstantiate(&exec, graph, 0), cudaSuccess);
    for (int i = 1; i <= 3; ++i) {
      EXPECT_EQ(cudaGraphLaunch(exec, s), cudaSuccess);
      EXPECT_EQ(cudaStreamSynchronize(s), cudaSuccess) << report();
      EXPECT_EQ(y.host()[1], static_cast<float>(i) + 10.0f);
      EXPECT_EQ(z.host()[1], static_cast<float>(i));
    }
    cudaGraphExecDestroy(exec);
    cudaGraphDestroy(graph);
    cudaStreamDestroy(fork);
    cudaStreamDestroy(s);
  }
}

TEST_F(Streams, UnjoinedCaptureIsAnError) {
  cudaStream_t s, fork;
  cudaEvent_t event;
  cudaStreamCreate(&s);
  cudaStreamCreate(&fork);
  cudaEventCreate(&event);
  Buffer<float> x(std::vector<float>(64, 0.0f));
  ASSERT_EQ(cudaStreamBeginCapture(s, cudaStreamCaptureModeGlobal), cudaSuccess);
  cudaEventRecord(event, s);
  cudaStreamWaitEvent(fork, event, 0);
  launch_add(x, 64, 1.0f, fork);
  cudaGraph_t graph;
  EXPECT_EQ(cudaStreamEndCapture(s, &graph), cudaErrorStreamCaptureUnjoined);
  cudaGetLastError();
  cudaStreamDestroy(s);
  cudaStreamDestroy(fork);
}

TEST_F(Streams, HostErrors) {
  void* p = nullptr;
  char small[8] = {};
  ASSERT_EQ(cudaMalloc(&p, 16), cudaSuccess);
  EXPECT_EQ(cudaMemcpy(p, small, 17, cudaMemcpyHostToDevice), cudaErrorInvalidValue);
  EXPECT_EQ(cudaMemcpy(small, small, 8, cudaMemcpyDeviceToHost),
            cudaErrorInvalidValue);  // the source is no device memory
  EXPECT_EQ(cudaGetLastError(), cudaErrorInvalidValue);
  EXPECT_EQ(cudaGetLastError(), cudaSuccess);
  EXPECT_EQ(cudaFree(static_cast<char*>(p) + 4), cudaErrorInvalidValue);
  EXPECT_EQ(cudaFree(p), cudaSuccess);
  EXPECT_EQ(cudaFree(p), cudaErrorInvalidValue);
  cudaGetLastError();
  EXPECT_STREQ(cudaGetErrorName(cudaErrorIllegalAddress), "cudaErrorIllegalAddress");
}

TEST_F(Streams, FreshMemoryIsPoison) {
  Buffer<unsigned> b(10);
  for (unsigned v : b.host()) EXPECT_EQ(v, 0xffffffffu);
}

TEST_F(Streams, DeviceProperties) {
  cudaDeviceProp p;
  ASSERT_EQ(cudaGetDeviceProperties(&p, 0), cudaSuccess);
  EXPECT_EQ(p.major, 8);
  EXPECT_EQ(p.warpSize, 32);
  int value = 0;
  EXPECT_EQ(cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, 0), cudaSuccess);
  EXPECT_EQ(value, p.multiProcessorCount);
  EXPECT_EQ(cudaSetDevice(1), cudaErrorInvalidDevice);
  cudaGetLastError();
}

}  // namespace
