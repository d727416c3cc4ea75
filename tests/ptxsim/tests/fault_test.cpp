// SPDX-License-Identifier: Apache-2.0
// Planted faults: each check must catch its own, name the place, and leave a correct kernel alone.
#include "device.h"
#include "kernels.h"

using namespace ptxsim_test;

namespace {

class Faults : public Device {};

// Runs a planted fault; returns the error of the next synchronisation.
cudaError_t run(Fault fault, int blocks = 1) {
  int* data = nullptr;
  EXPECT_EQ(cudaMalloc(reinterpret_cast<void**>(&data), 256 * sizeof(int)), cudaSuccess);
  EXPECT_EQ(cudaMemset(data, 0, 256 * sizeof(int)), cudaSuccess);
  EXPECT_EQ(ptxsim_name_buffer(data, "victim"), 0);
  launch_fault_on(fault, data, 256, blocks);
  const cudaError_t error = cudaDeviceSynchronize();
  return error;
}
void expect_report(std::initializer_list<const char*> parts) {
  for (const char* part : parts)
    EXPECT_NE(report().find(part), std::string::npos) << "missing \"" << part << "\" in:\n" << report();
}

TEST_F(Faults, CorrectKernelPassesEveryCheck) {
  for (uint64_t seed = 0; seed < 3; ++seed) {
    configure([&](auto& c) { c.seed = seed, c.check_race = c.check_global_race = c.weak_memory = 1; });
    EXPECT_EQ(run(Fault::None, 3), cudaSuccess);
    EXPECT_EQ(report(), "");
  }
}
TEST_F(Faults, GlobalOverrun) {
  EXPECT_EQ(run(Fault::GlobalOverrun), cudaErrorIllegalAddress);
  expect_report({"faulty", "block (0,0,0)", "thread (37,0,0)", "writes 4 bytes",
                 "0 bytes after the end of 'victim'", "PTX line", "st.global", "kernels.cu:"});
}
TEST_F(Faults, ErrorIsStickyUntilReset) {
  EXPECT_EQ(run(Fault::GlobalOverrun), cudaErrorIllegalAddress);
  void* p = nullptr;
  EXPECT_EQ(cudaMalloc(&p, 4), cudaErrorIllegalAddress);
  EXPECT_EQ(cudaGetLastError(), cudaErrorIllegalAddress);
  ptxsim_clear_report();
  EXPECT_EQ(run(Fault::None), cudaSuccess);
}
TEST_F(Faults, NullPointer) {
  EXPECT_EQ(run(Fault::GlobalNull), cudaErrorIllegalAddress);
  expect_report({"thread (3,0,0)", "a null pointer"});
}
TEST_F(Faults, UseAfterFree) {
  int* data = nullptr;
  ASSERT_EQ(cudaMalloc(reinterpret_cast<void**>(&data), 256), cudaSuccess);
  ASSERT_EQ(cudaFree(data), cudaSuccess);
  launch_fault(Fault::None, data, 0);
  EXPECT_EQ(cudaDeviceSynchronize(), cudaErrorIllegalAddress);
  expect_report({"memory that was freed"});
}
TEST_F(Faults, SharedOverrun) {
  EXPECT_EQ(run(Fault::SharedOverrun), cudaErrorIllegalAddress);
  expect_report({"thread (5,0,0)", "shared address", "bytes of shared memory"});
}
TEST_F(Faults, LocalOverrun) {
  EXPECT_EQ(run(Fault::LocalOverrun), cudaErrorIllegalAddress);
  expect_report({"local address"});
}
TEST_F(Faults, Misaligned) {
  EXPECT_EQ(run(Fault::Misaligned), cudaErrorMisalignedAddress);
  expect_report({"thread (9,0,0)", "8 bytes at the misaligned address"});
}
TEST_F(Faults, UninitialisedShared) {
  EXPECT_EQ(run(Fault::UninitialisedShared), cudaErrorLaunchFailure);
  expect_report({"thread (32,0,0)", "offset 128 that nobody has written"});
}
TEST_F(Faults, Trap) {
  EXPECT_EQ(run(Fault::Trap), cudaErrorLaunchFailure);
  expect_report({"thread (11,0,0)", "trap"});
}
TEST_F(Faults, Assert) {
  EXPECT_EQ(run(Fault::Assert), cudaErrorAssert);
  expect_report({"assertion failed: t + n < 90", "kernels.cu"});
}
TEST_F(Faults, BarrierNobodyCompletes) {
  EXPECT_EQ(run(Fault::DivergentBarrier), cudaErrorLaunchTimeout);
  expect_report({"deadlock", "warp 0", "waits at barrier 1", "warp 1", "waits at barrier 2"});
}
TEST_F(Faults, SpinThatNeverEnds) {
  EXPECT_EQ(run(Fault::SpinForever), cudaErrorLaunchTimeout);
  expect_report({"deadlock", "poll"});
}
TEST_F(Faults, SyncwarpMaskWithoutCaller) {
  EXPECT_EQ(run(Fault::ReservedMask), cudaErrorLaunchFailure);
  expect_report({"mask leaves it out"});
}

// ---- races: silent without the detector, named with it
struct Planted {
  Fault fault;
  int blocks;
  bool global;
  const char* word;
};
class Races : public Device, public ::testing::WithParamInterface<Planted> {};
TEST_P(Races, Found) {
  const Planted p = GetParam();
  for (uint64_t seed = 0; seed < 3; ++seed) {
    configure([&](auto& c) {
      c.seed = seed, c.check_uninit = 0, c.check_race = !p.global, c.check_global_race = p.global;
    });
    EXPECT_EQ(run(p.fault, p.blocks), cudaErrorLaunchFailure) << seed;
    expect_report({"race on", p.word, "now:", "before:", "kernels.cu:"});
    EXPECT_GE(ptxsim_num_faults(), 1u);
    ptxsim_clear_report();
  }
}
INSTANTIATE_TEST_SUITE_P(Planted, Races,
                         ::testing::Values(Planted{Fault::MissingSyncthreads, 1, false, "shared"},
                                           Planted{Fault::MissingSyncwarp, 1, false, "shared"},
                                           Planted{Fault::SharedWriteWrite, 1, false, "written"},
                                           Planted{Fault::BlocksWriteSame, 2, true, "'victim'"},
                                           Planted{Fault::BlocksReadWritten, 2, true, "'victim'"}));

// ---- the async-copy pipeline and its mutants
constexpr int kTiles = 5;
bool pipeline_result_is_right(Pipeline mutant) {
  std::vector<float> in(kTiles * kTileFloats);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<float>(i);
  Buffer<float> a(in), b(in.size());
  launch_pipeline(mutant, a, b, kTiles);
  if (cudaDeviceSynchronize() != cudaSuccess) return false;
  const auto out = b.host();
  for (int i = 0; i < kTiles * kTileFloats; ++i)
    if (out[static_cast<size_t>(i)] !=
        static_cast<float>(i / kTileFloats * kTileFloats + kTileFloats - 1 - i % kTileFloats) + 1.0f)
      return false;
  return true;
}

TEST_F(Faults, CorrectPipelinePassesEveryMode) {
  for (int mode : {PTXSIM_ASYNC_LATE, PTXSIM_ASYNC_EARLY, PTXSIM_ASYNC_RANDOM})
    for (uint64_t seed = 0; seed < 5; ++seed) {
      configure([&](auto& c) {
        c.async_mode = mode, c.seed = seed, c.check_race = c.check_global_race = c.weak_memory = 1;
      });
      EXPECT_TRUE(pipeline_result_is_right(Pipeline::Correct)) << mode << " " << seed << report();
    }
}
class Mutants : public Device, public ::testing::WithParamInterface<int> {};
TEST_P(Mutants, KilledByTheRaceDetectorInEveryMode) {
  for (int mode : {PTXSIM_ASYNC_LATE, PTXSIM_ASYNC_EARLY}) {
    configure([&](auto& c) { c.async_mode = mode, c.check_race = 1, c.check_uninit = 0; });
    EXPECT_FALSE(pipeline_result_is_right(static_cast<Pipeline>(GetParam()))) << mode;
    expect_report({"race on shared memory"});
    ptxsim_clear_report();
  }
}
TEST_P(Mutants, KilledByWrongResultsOfLateOrEarlyCopies) {
  bool killed = false;
  for (int mode : {PTXSIM_ASYNC_LATE, PTXSIM_ASYNC_EARLY}) {
    configure([&](auto& c) { c.async_mode = mode; });
    killed = killed || !pipeline_result_is_right(static_cast<Pipeline>(GetParam()));
  }
  EXPECT_TRUE(killed);
}
INSTANTIATE_TEST_SUITE_P(Pipeline, Mutants, ::testing::Range(1, static_cast<int>(Pipeline::NumMutants)));

TEST_F(Faults, MbarrierPipelineMutants) {
  for (Mbarrier mutant : {Mbarrier::NoWaitFull, Mbarrier::NoWaitEmpty, Mbarrier::NoBarrierAfterInit})
    for (int mode : {PTXSIM_ASYNC_LATE, PTXSIM_ASYNC_EARLY}) {
      // With the check of uninitialised memory the first and the last are found by that already.
      configure([&](auto& c) { c.async_mode = mode, c.check_race = 1, c.check_uninit = 0; });
      Buffer<int> in(1024), out(1024);
      launch_mbarrier(mutant, in, out, mutant == Mbarrier::NoWaitFull ? 2 : 3);
      EXPECT_NE(cudaDeviceSynchronize(), cudaSuccess)
          << static_cast<int>(mutant) << mode;  // some deadlock as well
      expect_report({"race on shared memory"});
      ptxsim_clear_report();
    }
}

// ---- weak memory
TEST_F(Faults, MissingOrNarrowFenceBetweenBlocks) {
  for (Fence fence : {Fence::None, Fence::Block, Fence::Device})
    for (bool weak : {false, true}) {
      configure([&](auto& c) { c.weak_memory = weak; });
      Buffer<int> data(std::vector<int>{0}), flag(std::vector<int>{0}), out(std::vector<int>{0});
      launch_message(data, flag, out, fence);
      ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess) << report();
      EXPECT_EQ(out.host()[0], fence == Fence::Device || !weak ? 42 : 0) << static_cast<int>(fence) << weak;
    }
}
TEST_F(Faults, MissingOrNarrowFenceIsAGlobalRace) {
  for (Fence fence : {Fence::None, Fence::Block, Fence::Device}) {
    configure([](auto& c) { c.check_global_race = 1; });
    Buffer<int> data(std::vector<int>{0}), flag(std::vector<int>{0}), out(std::vector<int>{0});
    launch_message(data, flag, out, fence);
    EXPECT_EQ(cudaDeviceSynchronize(), fence == Fence::Device ? cudaSuccess : cudaErrorLaunchFailure)
        << static_cast<int>(fence) << report();
    ptxsim_clear_report();
  }
  for (bool with_fences : {false, true}) {
    Buffer<int> data(std::vector<int>{0}), flag(std::vector<int>{0}), out(std::vector<int>{0});
    launch_message_in_block(data, flag, out, with_fences);
    EXPECT_EQ(cudaDeviceSynchronize(), with_fences ? cudaSuccess : cudaErrorLaunchFailure) << report();
    ptxsim_clear_report();
  }
  configure([](auto& c) { c.check_global_race = c.ignore_order = 1; });
  Buffer<int> data(std::vector<int>{0}), flag(std::vector<int>{0}), received(std::vector<int>{0});
  launch_message(data, flag, received, Fence::Device);
  EXPECT_EQ(cudaDeviceSynchronize(), cudaErrorLaunchFailure) << "an ignored fence";
  ptxsim_clear_report();
  configure([](auto& c) { c.check_global_race = 1, c.ignore_order = 0; });
  Buffer<int> in(std::vector<int>(1000, 1)), partial(7), out(1);
  Buffer<unsigned> counter(std::vector<unsigned>{0});
  launch_last_block_sum(in, partial, counter, out, 1000, 7, false);
  EXPECT_EQ(cudaDeviceSynchronize(), cudaErrorLaunchFailure);
  expect_report({"race on global memory"});
}

}  // namespace
