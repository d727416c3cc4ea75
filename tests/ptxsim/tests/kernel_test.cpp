// SPDX-License-Identifier: Apache-2.0
// Whole kernels with known results: collectives, barriers, atomics, matrices, calls, printing, counters.
#include "kernels.h"

#include <cmath>
#include <cstring>
#include <numeric>
#include <random>

#include "device.h"

using namespace ptxsim_test;

namespace {

class Kernel : public Device {};

std::vector<int> numbers(int n) {
  std::vector<int> v(static_cast<size_t>(n));
  std::iota(v.begin(), v.end(), 0);
  return v;
}

TEST_F(Kernel, DynamicSharedMemoryIsAligned) {
  Buffer<int> out(std::vector<int>{-1});
  launch_shared_alignment(out);
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess) << report();
  EXPECT_EQ(out.host()[0], 0);
}

TEST_F(Kernel, WarpCollectives) {
  std::vector<int> in(32);
  std::mt19937 random(1);
  for (int& v : in) v = static_cast<int>(random() % 1000);
  Buffer<int> a(in), o(512);
  launch_warp_collectives(a, o);
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess) << report();
  const auto out = o.host();
  uint32_t ballot = 0;
  int sum = 0, largest = 0;
  for (int t = 0; t < 32; ++t)
    ballot |= static_cast<uint32_t>(in[t] & 1) << t, sum += in[t], largest = std::max(largest, in[t]);
  for (int t = 0; t < 32; ++t) {
    const int* r = &out[16 * t];
    EXPECT_EQ(r[0], in[t ^ 5]);
    EXPECT_EQ(r[1], in[t < 3 ? t : t - 3]);
    EXPECT_EQ(r[2], in[t + 7 < 32 ? t + 7 : t]);
    EXPECT_EQ(r[3], in[(t & 24) | (t * 3 & 7)]);
    EXPECT_EQ(static_cast<uint32_t>(r[4]), ballot);
    EXPECT_EQ(r[5] != 0, std::count(in.begin(), in.end(), 77) != 0);
    EXPECT_NE(r[6], 0);
    uint32_t same = 0;
    for (int k = 0; k < 32; ++k) same |= static_cast<uint32_t>((in[k] & 3) == (in[t] & 3)) << k;
    EXPECT_EQ(static_cast<uint32_t>(r[7]), same);
    EXPECT_EQ(r[8], sum);
    EXPECT_EQ(r[9], largest);
    EXPECT_EQ(r[10], t & 1 ? in[t ^ 2] : 0);
    EXPECT_EQ(r[11], in[(t & 15) < 15 ? t + 1 : t]);
    EXPECT_EQ(static_cast<uint32_t>(r[12]), 0xffffffffu);
    EXPECT_EQ(r[13], in[t ^ 1]);
    EXPECT_EQ(static_cast<uint32_t>(r[14]), 0xffffffffu);
    EXPECT_EQ(r[15], 1);
  }
}

TEST_F(Kernel, Atomics) {
  std::vector<int> words(16, 0);
  words[4] = -1;
  Buffer<int> w(words);
  launch_atomics(w);
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess) << report();
  words = w.host();
  EXPECT_EQ(words[0], 255 * 128);
  EXPECT_EQ(words[1], 255);
  EXPECT_EQ(words[2], -255);
  EXPECT_EQ(words[3], -1);
  EXPECT_EQ(words[4], 0);
  EXPECT_EQ(words[5], 0);
  EXPECT_EQ(words[6], 256 % 100);
  EXPECT_EQ(words[7], 44);
  float f;
  std::memcpy(&f, &words[8], 4);
  EXPECT_EQ(f, 128.0f);
  EXPECT_EQ(static_cast<uint32_t>(words[9]), 0x54005c00u);  // 64, 256
  EXPECT_EQ(words[10], 256);
  long long wide;
  std::memcpy(&wide, &words[12], 8);
  EXPECT_EQ(wide, 256ll << 31);
  double d;
  std::memcpy(&d, &words[14], 8);
  EXPECT_EQ(d, 32.0);
}

TEST_F(Kernel, NamedBarriers) {
  configure([](auto& c) { c.check_race = 1; });
  for (uint64_t seed = 0; seed < 6; ++seed) {
    configure([&](auto& c) { c.seed = seed; });
    Buffer<int> o(32);
    launch_named_barriers(o);
    ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess) << report();
    for (int l = 0; l < 32; ++l) EXPECT_EQ(o.host()[l], 4500 + 10 * (31 - l));
  }
}

TEST_F(Kernel, LockTakenByEveryLane) {
  for (uint64_t seed = 0; seed < 4; ++seed) {
    configure([&](auto& c) { c.seed = seed; });
    Buffer<int> lock(std::vector<int>{0}), sum(std::vector<int>{0});
    launch_lock(lock, sum, 5);
    ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess) << report();
    EXPECT_EQ(sum.host()[0], 320);
  }
}

TEST_F(Kernel, GridBarrier) {
  for (int race = 0; race < 2; ++race) {
    configure([&](auto& c) { c.check_race = c.check_global_race = c.weak_memory = race; });
    Buffer<int> in(numbers(1000)), partial(16), out(1);
    launch_grid_sum(in, partial, out, 1000, 16);
    ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess) << report();
    EXPECT_EQ(out.host()[0], 499500);
  }
}

TEST_F(Kernel, CooperativeLaunchThatCannotBeResident) {
  Buffer<int> in(numbers(10)), partial(100000), out(1);
  launch_grid_sum(in, partial, out, 10, 100000);
  EXPECT_EQ(cudaGetLastError(), cudaErrorCooperativeLaunchTooLarge);
}

// An sm_80 multiprocessor has 2,048 threads, 32 blocks and 164 KB of shared memory, of which each block costs
// 1 KB more than it asks for.
TEST_F(Kernel, AttributesAndOccupancy) {
  const void* kernel = transpose_kernel();
  cudaFuncAttributes attributes;
  ASSERT_EQ(cudaFuncGetAttributes(&attributes, kernel), cudaSuccess);
  EXPECT_EQ(attributes.sharedSizeBytes, 4096u);
  EXPECT_EQ(attributes.maxThreadsPerBlock, 1024);
  EXPECT_EQ(attributes.localSizeBytes, 0u);

  const auto blocks = [&](int threads, size_t dynamic_shared) {
    int count = -1;
    EXPECT_EQ(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel, threads, dynamic_shared),
              cudaSuccess);
    return count;
  };
  EXPECT_EQ(blocks(256, 0), 8);
  EXPECT_EQ(blocks(1024, 0), 2);
  EXPECT_EQ(blocks(32, 0), 32);
  EXPECT_EQ(blocks(32, 60'000), 2);
  EXPECT_EQ(blocks(32, 80'000), 1);

  EXPECT_EQ(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 100'000), cudaSuccess);
  ASSERT_EQ(cudaFuncGetAttributes(&attributes, kernel), cudaSuccess);
  EXPECT_EQ(attributes.maxDynamicSharedSizeBytes, 100'000);
  EXPECT_EQ(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 163 * 1024),
            cudaErrorInvalidValue);  // with the static bytes it is too much
  cudaGetLastError();
  EXPECT_EQ(cudaFuncGetAttributes(&attributes, &attributes), cudaErrorInvalidDeviceFunction);
  cudaGetLastError();
}

TEST_F(Kernel, LastBlockSums) {
  for (uint64_t seed = 0; seed < 4; ++seed) {
    configure([&](auto& c) { c.seed = seed, c.check_global_race = 1, c.weak_memory = 1; });
    Buffer<int> in(numbers(1000)), partial(7), out(1);
    Buffer<unsigned> counter(std::vector<unsigned>{0});
    launch_last_block_sum(in, partial, counter, out, 1000, 7, true);
    ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess) << report();
    EXPECT_EQ(out.host()[0], 499500);
  }
}

TEST_F(Kernel, MbarrierPipelineIsRaceFree) {
  for (int mode : {PTXSIM_ASYNC_LATE, PTXSIM_ASYNC_EARLY, PTXSIM_ASYNC_RANDOM})
    for (uint64_t seed = 0; seed < 4; ++seed) {
      configure([&](auto& c) { c.async_mode = mode, c.seed = seed, c.check_race = 1; });
      Buffer<int> in(numbers(8 * 128)), out(8 * 128);
      launch_mbarrier(Mbarrier::Correct, in, out, 8);
      ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess) << report();
      const auto o = out.host();
      for (int i = 0; i < 8 * 128; ++i) ASSERT_EQ(o[i], i / 128 * 128 + 127 - i % 128) << i;
    }
}

TEST_F(Kernel, FatBinariesOfEveryCompression) {
  for (const auto launch : {launch_compressed_size, launch_compressed_speed, launch_compressed_none}) {
    Buffer<int> data(1024);
    launch(data);
    ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess) << report();
    EXPECT_EQ(data.host(), numbers(1024));
  }
}

TEST_F(Kernel, CallsAndSwitch) {
  Buffer<int> in(numbers(500)), out(500);
  launch_switch(in, out, 500);
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess) << report();
  const auto o = out.host();
  const auto squared = [](int x) { return x * x + 1; };
  for (int v = 0; v < 500; ++v) {
    const int want[] = {v + 1,  v * 2, squared(v) + squared(v + 1), v ^ 0x55, v - 100, squared(v), ~v,
                        v << 3, 0};
    EXPECT_EQ(o[v], want[v % 9]) << v;
  }
}

TEST_F(Kernel, Print) {
  ::testing::internal::CaptureStdout();
  launch_print();
  EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess) << report();
  const std::string text = ::testing::internal::GetCapturedStdout();
  EXPECT_NE(text.find("thread 1 of block 1:  1.50 text 1099511627776\n"), std::string::npos) << text;
}

TEST_F(Kernel, CountersSeeCoalescing) {
  Buffer<float> in(4096), out(128);
  EXPECT_EQ(ptxsim_name_buffer(in, "source"), 0);
  launch_copy(in, out, 128, 1, nullptr);
  EXPECT_EQ(counter("load", "bytes"), 512);
  EXPECT_EQ(counter("load", "sectors"), 16);
  EXPECT_EQ(counter("store", "sectors"), 16);
  EXPECT_EQ(counter("source", "read"), 512);
  ptxsim_reset_counters();
  launch_copy(in, out, 128, 8, nullptr);
  EXPECT_EQ(counter("load", "bytes"), 512);
  EXPECT_EQ(counter("load", "sectors"), 128);
  EXPECT_EQ(counter("load", "ideal_sectors"), 16);
}

TEST_F(Kernel, CountersSeeBankConflicts) {
  std::vector<float> values(1024);
  std::iota(values.begin(), values.end(), 0.0f);
  Buffer<float> in(values), out(1024);
  for (bool padded : {false, true}) {
    ptxsim_reset_counters();
    launch_transpose(in, out, padded);
    ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess) << report();
    EXPECT_EQ(counter("shared", "wavefronts"), padded ? 32 : 32 * 32);
    EXPECT_EQ(counter("shared", "ideal"), 32);
    const auto o = out.host();
    for (int y = 0; y < 32; ++y)
      for (int x = 0; x < 32; ++x) ASSERT_EQ(o[32 * y + x], values[32 * x + y]);
  }
}

// ---- matrices
TEST_F(Kernel, Ldmatrix) {
  std::vector<unsigned short> in(256);
  std::iota(in.begin(), in.end(), 0);
  Buffer<unsigned short> a(in);
  Buffer<unsigned> plain(128), transposed(128);
  launch_ldmatrix(a, plain, transposed);
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess) << report();
  for (int i = 0; i < 4; ++i)
    for (int l = 0; l < 32; ++l) {
      const unsigned base = static_cast<unsigned>(64 * i), row = static_cast<unsigned>(l / 4),
                     column = static_cast<unsigned>(2 * (l % 4));
      EXPECT_EQ(plain.host()[32 * i + l], (base + 8 * row + column) | (base + 8 * row + column + 1) << 16);
      EXPECT_EQ(transposed.host()[32 * i + l], (base + 8 * column + row) | (base + 8 * (column + 1) + row)
                                                                               << 16);
    }
}

float from_f16(uint16_t h) {
  const int e = h >> 10 & 31, m = h & 1023;
  const float v =
      e == 0 ? std::ldexp(static_cast<float>(m), -24) : std::ldexp(static_cast<float>(m + 1024), e - 25);
  return h & 0x8000 ? -v : v;
}
float from_bf16(uint16_t h) {
  const uint32_t b = static_cast<uint32_t>(h) << 16;
  float f;
  std::memcpy(&f, &b, 4);
  return f;
}

TEST_F(Kernel, Mma16Bit) {
  std::mt19937 random(7);
  for (Mma kind : {Mma::F16, Mma::Bf16, Mma::F16Accumulate, Mma::F16K8}) {
    std::vector<uint16_t> a(256), b(128);
    const bool bf16 = kind == Mma::Bf16;
    for (auto* m : {&a, &b})
      for (auto& v : *m)
        v = static_cast<uint16_t>((random() & 0x8000) |
                                  ((bf16 ? 0x3f00 : 0x3800) + (random() & (bf16 ? 0xff : 0xfff))));
    Buffer<uint16_t> da(a), db(b);
    Buffer<float> out(128);
    launch_mma(kind, da, db, out);
    ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess) << report();
    const auto got = out.host();
    for (int m = 0; m < 16; ++m)
      for (int n = 0; n < 8; ++n) {
        double want = 1, scale = 1;
        for (int k = 0; k < 16; ++k) {
          const double p = bf16 ? double{from_bf16(a[16 * m + k])} * from_bf16(b[16 * n + k])
                                : double{from_f16(a[16 * m + k])} * from_f16(b[16 * n + k]);
          want += p, scale += std::abs(p);
        }
        float v = got[8 * m + n];
        if (kind == Mma::F16Accumulate)
          v = from_f16(reinterpret_cast<const uint16_t*>(got.data())[8 * m + n]);
        EXPECT_NEAR(v, want, scale * (kind == Mma::F16Accumulate ? 1e-3 : 1e-6))
            << static_cast<int>(kind) << " " << m << " " << n;
      }
  }
}
TEST_F(Kernel, MmaTf32AndS8) {
  std::mt19937 random(8);
  std::vector<float> a(128), b(64);
  for (auto* m : {&a, &b})
    for (auto& v : *m)
      v = static_cast<float>(static_cast<int>(random() % 2048) - 1024) / 64;  // exact in tf32
  Buffer<float> da(a), db(b), out(128);
  launch_mma(Mma::Tf32, da, db, out);
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess) << report();
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 8; ++n) {
      float want = 1;
      for (int k = 0; k < 8; ++k) want += a[8 * m + k] * b[8 * n + k];
      EXPECT_NEAR(out.host()[8 * m + n], want, 1e-2);
    }
  std::vector<signed char> sa(512), sb(256);
  for (auto* m : {&sa, &sb})
    for (auto& v : *m) v = static_cast<signed char>(random());
  Buffer<signed char> dsa(sa), dsb(sb);
  Buffer<int> iout(128);
  launch_mma(Mma::S8, dsa, dsb, iout);
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess) << report();
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 8; ++n) {
      int want = 1;
      for (int k = 0; k < 32; ++k) want += sa[32 * m + k] * sb[32 * n + k];
      EXPECT_EQ(iout.host()[8 * m + n], want);
    }
}

TEST_F(Kernel, UnknownInstructionIsRefusedWithItsLine) {
  const char* ptx =
      ".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry k() {\n.reg .b32 "
      "%r<3>;\nfrobnicate.u32 %r1, %r2;\nret;\n}\n";
  const unsigned one[3] = {1, 1, 1};
  EXPECT_EQ(ptxsim_run_ptx(ptx, "k", one, one, 0, nullptr), cudaErrorInvalidPtx);
  EXPECT_NE(report().find("PTX line 6"), std::string::npos) << report();
  EXPECT_NE(report().find("frobnicate"), std::string::npos) << report();
}

}  // namespace
