// SPDX-License-Identifier: Apache-2.0
// cp.async, bulk copies, mbarriers and vector atomics, one instruction form at a time, with copies landing
// late, early and at random.
#include "device.h"
#include "warp_case.h"

using namespace ptxsim_test;

namespace {

constexpr int kModes[] = {PTXSIM_ASYNC_LATE, PTXSIM_ASYNC_EARLY, PTXSIM_ASYNC_RANDOM};

class Async : public Device {};

std::vector<uint32_t> words(size_t n) {
  std::vector<uint32_t> v(n);
  for (size_t i = 0; i < n; ++i) v[i] = static_cast<uint32_t>(0x01010101u * (i + 1) ^ 0x5a00u);
  return v;
}
// The four bytes at `at` of the words' bytes, as far as `size` bytes from `begin` reach; zero beyond.
uint32_t filled(const std::vector<uint32_t>& memory, size_t begin, size_t size, size_t word) {
  uint8_t bytes[4] = {};
  for (size_t k = 0; k < 4; ++k)
    if (4 * word + k < size) bytes[k] = reinterpret_cast<const uint8_t*>(memory.data())[begin + 4 * word + k];
  uint32_t v;
  std::memcpy(&v, bytes, 4);
  return v;
}

// Lane l copies from %m + 16 l to %s + 16 l; %i0 is its source size or whether it ignores its source.
const std::string kLanePlaces =
    "shl.b32 %at, %lane, 4; add.u32 %at, %s, %at; mul.wide.u32 %x0, %lane, 16; add.s64 %x0, %m, %x0;\n"
    "st.shared.v4.b32 [%at], {-1, -1, -1, -1};\n";
const std::string kLoadBack = "ld.shared.v4.b32 {%o0, %o1, %o2, %o3}, [%at];";
const std::string kWaited = "cp.async.commit_group; cp.async.wait_group 0;\n" + kLoadBack;

TEST_F(Async, CopiesOfEachSizeFillTheRestWithZero) {
  const auto memory = words(128);
  for (int mode : kModes) {
    configure([&](auto& c) { c.async_mode = mode, c.seed = 3; });
    for (size_t size : {4u, 8u, 16u}) {
      Registers in(1);
      for (size_t l = 0; l < kWarp; ++l) in[0][l] = static_cast<uint32_t>(l % (size + 1));
      const std::string operation = size == 16 ? "cp.async.cg" : "cp.async.ca";
      const WarpResult r = run_warp_well(kLanePlaces + operation + ".shared.global.L2::128B [%at], [%x0], " +
                                             std::to_string(size) + ", %i0;\n" + kWaited,
                                         in, 4, memory);
      for (size_t l = 0; l < kWarp; ++l)
        for (size_t w = 0; w < 4; ++w)
          ASSERT_EQ(r.out[w][l], 4 * w < size ? filled(memory, 16 * l, in[0][l], w) : 0xffffffffu)
              << size << " lane " << l << " word " << w << " mode " << mode;
    }
  }
}

TEST_F(Async, IgnoredSourcesAndEmptySourcesAreNotTouched) {
  const auto memory = words(128);
  Registers in(1);
  for (size_t l = 0; l < kWarp; ++l) in[0][l] = l % 3 == 0;
  // Where the source is ignored, its address is outside all memory.
  const std::string places =
      kLanePlaces + "setp.ne.u32 %p0, %i0, 0; @%p0 mov.b64 %x0, 4096; selp.u32 %r0, 0, 16, %p0;\n";
  for (int mode : kModes)
    for (const char* copy : {"cp.async.cg.shared.global [%at], [%x0], 16, %p0;\n",
                             "cp.async.cg.shared.global [%at], [%x0], 16, %r0;\n",
                             "cp.async.cg.shared.global.L2::cache_hint [%at], [%x0], 16, %r0, %x1;\n"}) {
      configure([&](auto& c) { c.async_mode = mode; });
      const WarpResult r = run_warp_well(
          places + "createpolicy.fractional.L2::evict_first.b64 %x1, 1.0;\n" + copy + kWaited, in, 4, memory);
      for (size_t l = 0; l < kWarp; ++l)
        for (size_t w = 0; w < 4; ++w) ASSERT_EQ(r.out[w][l], l % 3 == 0 ? 0 : memory[4 * l + w]) << copy;
    }
  EXPECT_EQ(
      run_warp(kLanePlaces + "add.s64 %x0, %x0, 16; cp.async.cg.shared.global [%at], [%x0], 16;\n" + kWaited,
               {}, 4, memory)
          .error,
      cudaErrorIllegalAddress);
  EXPECT_NE(report().find("thread (31,0,0)"), std::string::npos) << report();
}

TEST_F(Async, BytesAreUndefinedUntilTheirGroupIsWaitedFor) {
  const auto memory = words(128);
  // Two groups; only the older one is waited for.
  const std::string body = kLanePlaces +
                           "cp.async.ca.shared.global [%at], [%x0], 8; cp.async.commit_group;\n"
                           "cp.async.ca.shared.global [%at+8], [%x0+8], 8; cp.async.commit_group;\n"
                           "cp.async.wait_group 1;\n" +
                           kLoadBack;
  for (int mode : {PTXSIM_ASYNC_LATE, PTXSIM_ASYNC_EARLY}) {
    configure([&](auto& c) { c.async_mode = mode; });
    const WarpResult r = run_warp_well(body, {}, 4, memory);
    for (size_t l = 0; l < kWarp; ++l)
      for (size_t w = 0; w < 4; ++w)
        ASSERT_EQ(r.out[w][l], w < 2 || mode == PTXSIM_ASYNC_EARLY ? memory[4 * l + w] : 0xffffffffu);
  }
  configure([](auto& c) { c.check_race = 1; });
  EXPECT_NE(run_warp(body, {}, 4, memory).error, cudaSuccess);
  EXPECT_NE(report().find("has not waited for"), std::string::npos) << report();
}

// ---- bulk copies: lane 0 fetches 512 bytes, all lanes wait for the mbarrier at %s + 2048
const std::string kInitBarrier =
    "add.u32 %r7, %s, 2048; setp.eq.u32 %p0, %lane, 0;\n"
    "@%p0 mbarrier.init.shared.b64 [%r7], 1; bar.sync 0;\n";
const std::string kBulkLoad =
    "@%p0 mbarrier.arrive.expect_tx.shared.b64 _, [%r7], 512;\n"
    "@%p0 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%s], [%m], 512, [%r7];\n";
const std::string kParityWait = "WAIT: mbarrier.try_wait.parity.shared.b64 %p1, [%r7], 0; @!%p1 bra WAIT;\n";
const std::string kLaneRow = "shl.b32 %at, %lane, 4; add.u32 %at, %s, %at;\n";

TEST_F(Async, BulkCopyArrivesWithItsMbarrier) {
  const auto memory = words(128);
  for (int mode : kModes)
    for (uint64_t seed : {0u, 1u, 2u}) {
      configure([&](auto& c) { c.async_mode = mode, c.seed = seed, c.check_race = 1; });
      const WarpResult r =
          run_warp_well(kInitBarrier + kBulkLoad + kParityWait + kLaneRow + kLoadBack, {}, 4, memory);
      for (size_t l = 0; l < kWarp; ++l)
        for (size_t w = 0; w < 4; ++w) ASSERT_EQ(r.out[w][l], memory[4 * l + w]);
    }
}
TEST_F(Async, BulkCopyReadWithoutTheWaitIsARace) {
  const auto memory = words(128);
  for (int mode : {PTXSIM_ASYNC_LATE, PTXSIM_ASYNC_EARLY}) {
    configure([&](auto& c) { c.async_mode = mode, c.check_race = 1; });
    const std::string body = kInitBarrier + kBulkLoad + "bar.sync 0;\n" + kLaneRow + kLoadBack + kParityWait;
    EXPECT_EQ(run_warp(body, {}, 4, memory).error, cudaErrorLaunchFailure);
    EXPECT_NE(report().find("race on shared memory"), std::string::npos) << report();
  }
}
TEST_F(Async, BulkStoreReachesGlobalMemory) {
  const Registers in = random_registers(4, 9);
  const std::string body =
      kLaneRow +
      "st.shared.v4.b32 [%at], {%i0, %i1, %i2, %i3}; fence.proxy.async.shared::cta; bar.sync 0;\n"
      "setp.eq.u32 %p0, %lane, 0;\n"
      "@%p0 cp.async.bulk.global.shared::cta.bulk_group [%m], [%s], 512;\n"
      "@%p0 cp.async.bulk.commit_group; @%p0 cp.async.bulk.wait_group 0;\n";
  for (int mode : kModes) {
    configure([&](auto& c) { c.async_mode = mode, c.check_race = 1; });
    const WarpResult r = run_warp_well(body, in, 0, std::vector<uint32_t>(128, 0));
    for (size_t l = 0; l < kWarp; ++l)
      for (size_t w = 0; w < 4; ++w) ASSERT_EQ(r.memory[4 * l + w], in[w][l]);
  }
  EXPECT_EQ(run_warp(body, in, 0, std::vector<uint32_t>(124, 0)).error, cudaErrorIllegalAddress);
  EXPECT_EQ(run_warp(kInitBarrier + kBulkLoad + "ret;", {}, 0, words(128)).error, cudaErrorLaunchFailure);
  EXPECT_NE(report().find("bulk copy into its shared memory was under way"), std::string::npos) << report();
}

TEST_F(Async, MbarrierCountsArrivalsBytesAndPhases) {
  // One thread at a time (lane 0) walks an mbarrier of three arrivals through its phases and writes down what
  // it sees.
  const std::string test = "mbarrier.test_wait.shared.b64 %p1, [%s], %x1;";
  const auto seen = [](int k) { return "selp.u32 %o" + std::to_string(k) + ", 1, 0, %p1;\n"; };
  const std::string body =
      "setp.ne.u32 %p0, %lane, 0; @%p0 bra OTHERS;\n"
      "mbarrier.init.shared.b64 [%s], 3;\n"
      "mbarrier.arrive.shared.b64 %x1, [%s];\n" +
      test + seen(0) +                                                  // one of three
      "mbarrier.arrive.shared.b64 _, [%s], 2;\n" + test + seen(1) +     // all: the phase is over
      "mbarrier.test_wait.parity.shared.b64 %p1, [%s], 1;" + seen(2) +  // the phase under way is not over
      "mbarrier.test_wait.parity.shared.b64 %p1, [%s], 0;" + seen(3) +  // the one before it is
      "mbarrier.arrive.expect_tx.shared.b64 %x1, [%s], 64;\n"
      "mbarrier.arrive.shared.b64 _, [%s], 2;\n" +
      test + seen(4) +  // 64 bytes are missing
      "mbarrier.complete_tx.shared::cta.relaxed.cta.b64 [%s], 64;\n" + test + seen(5) +
      "mbarrier.arrive_drop.shared.b64 %x1, [%s];\n"
      "mbarrier.arrive.shared.b64 _, [%s], 2;\n" +
      test + seen(6) +  // over, and from now on it is two
      "mbarrier.arrive.shared.b64 %x1, [%s], 2;\n" + test + seen(7) + "OTHERS:";
  const WarpResult r = run_warp_well(body, {}, 8);
  const uint32_t want[] = {0, 1, 0, 1, 0, 1, 1, 1};
  for (size_t k = 0; k < 8; ++k) EXPECT_EQ(r.out[k][0], want[k]) << k;
  EXPECT_NE(run_warp("setp.eq.u32 %p0, %lane, 0; @%p0 mbarrier.init.shared.b64 [%s], 3; bar.warp.sync -1;\n"
                     "mbarrier.arrive.shared.b64 _, [%s];",
                     {}, 0)
                .error,
            cudaErrorLaunchFailure);  // 32 arrivals are ten phases and two
  EXPECT_NE(run_warp("mbarrier.arrive.shared.b64 _, [%s];", {}, 0).error, cudaSuccess);
  EXPECT_NE(report().find("never initialised"), std::string::npos) << report();
}

// ---- atomics on vectors
TEST_F(Async, VectorAtomics) {
  Registers in(4);
  for (size_t k = 0; k < 4; ++k)
    for (size_t l = 0; l < kWarp; ++l) {
      const float v = static_cast<float>((l + 1) * (k + 1)) * 0.25f;  // every sum is exact
      std::memcpy(&in[k][l], &v, 4);
    }
  const WarpResult f = run_warp_well(
      "atom.global.gpu.relaxed.add.v4.f32 {%o0, %o1, %o2, %o3}, [%m], {%i0, %i1, %i2, %i3};\n"
      "red.global.add.v2.f32 [%m+16], {%i1, %i0};",
      in, 4, std::vector<uint32_t>(8, 0));
  const auto as_float = [](uint32_t b) {
    float v;
    std::memcpy(&v, &b, 4);
    return v;
  };
  for (size_t k = 0; k < 4; ++k) {
    EXPECT_EQ(as_float(f.memory[k]), 528.0f * 0.25f * static_cast<float>(k + 1));
    EXPECT_EQ(as_float(f.out[k][31]), 496.0f * 0.25f * static_cast<float>(k + 1));  // lanes in order
  }
  EXPECT_EQ(as_float(f.memory[4]), 264.0f);
  EXPECT_EQ(as_float(f.memory[5]), 132.0f);
  EXPECT_EQ(f.memory[6], 0u);

  const Registers ones(2, [] {
    Lanes lanes;
    lanes.fill(0x40003c00);  // 1 and 2 in f16
    return lanes;
  }());
  const WarpResult h =
      run_warp_well("red.global.add.noftz.v2.f16x2 [%m], {%i0, %i1};", ones, 0, {0, 0, 0, 0});
  EXPECT_EQ(h.memory, (std::vector<uint32_t>{0x54005000, 0x54005000, 0, 0}));  // 32 and 64
  EXPECT_EQ(
      run_warp("red.global.add.v4.f32 [%m+8], {%i0, %i0, %i0, %i0};", in, 0, std::vector<uint32_t>(8, 0))
          .error,
      cudaErrorMisalignedAddress);
}

}  // namespace
