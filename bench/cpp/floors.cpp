// SPDX-License-Identifier: Apache-2.0
#include "floors.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string_view>

#include "core/isa.h"
#include "core/thread_pool.h"

namespace fs::bench {

namespace {

using Clock = std::chrono::steady_clock;

// The best of some runs, in seconds.
template <class F>
double best_time(int runs, const F& work) {
  double best = 1e9;
  for (int i = 0; i < runs; ++i) {
    const auto begin = Clock::now();
    work();
    best = std::min(best, std::chrono::duration<double>(Clock::now() - begin).count());
  }
  return best;
}

double measure_read() {
  constexpr size_t kWords = (512u << 20) / sizeof(uint64_t);
  constexpr int64_t kChunks = 256;
  std::vector<uint64_t> memory(kWords, 1);
  std::vector<uint64_t> sums(kChunks);
  const double seconds = best_time(5, [&] {
    pool().parallel_for(kChunks, [&](int64_t chunk, int) {
      const uint64_t* p = memory.data() + kWords / kChunks * static_cast<size_t>(chunk);
      uint64_t lanes[16] = {};
      for (size_t i = 0; i < kWords / kChunks; i += 16) {
        for (size_t j = 0; j < 16; ++j) lanes[j] += p[i + j];
      }
      uint64_t total = 0;
      for (const uint64_t lane : lanes) total += lane;
      sums[static_cast<size_t>(chunk)] = total;
    });
    benchmark::DoNotOptimize(sums.data());
  });
  return kWords * sizeof(uint64_t) / seconds;
}

#if defined(__x86_64__)

#define FS_TWELVE(INSTRUCTION, SOURCES, R)                                                      \
  INSTRUCTION " " SOURCES R "0\n" INSTRUCTION " " SOURCES R "1\n" INSTRUCTION " " SOURCES R     \
              "2\n" INSTRUCTION " " SOURCES R "3\n" INSTRUCTION " " SOURCES R "4\n" INSTRUCTION \
              " " SOURCES R "5\n" INSTRUCTION " " SOURCES R "6\n" INSTRUCTION " " SOURCES R     \
              "7\n" INSTRUCTION " " SOURCES R "8\n" INSTRUCTION " " SOURCES R "9\n" INSTRUCTION \
              " " SOURCES R "10\n" INSTRUCTION " " SOURCES R "11\n"
#define FS_CLOBBERS                                                                                          \
  "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", \
      "xmm13"

constexpr int kLoops = 200000;

void zero_sources() {
  asm volatile("pxor %%xmm12, %%xmm12\npxor %%xmm13, %%xmm13\n" ::: "xmm12", "xmm13");
}
void fma_256() {
  zero_sources();
  for (int i = 0; i < kLoops; ++i) {
    asm volatile(FS_TWELVE("vfmadd231ps", "%%ymm12, %%ymm13, ", "%%ymm")::: FS_CLOBBERS);
  }
}
void fma_512() {
  zero_sources();
  for (int i = 0; i < kLoops; ++i) {
    asm volatile(FS_TWELVE("vfmadd231ps", "%%zmm12, %%zmm13, ", "%%zmm")::: FS_CLOBBERS);
  }
}
void dot_bf16() {
  zero_sources();
  for (int i = 0; i < kLoops; ++i) {
    asm volatile(FS_TWELVE("vdpbf16ps", "%%zmm12, %%zmm13, ", "%%zmm")::: FS_CLOBBERS);
  }
}
void tiles() {
  alignas(64) unsigned char shape[64] = {1};
  for (int i = 0; i < 8; ++i) {
    shape[16 + 2 * i] = 64;
    shape[48 + i] = 16;
  }
  asm volatile(
      "ldtilecfg %0\ntilezero %%tmm4\ntilezero %%tmm5\ntilezero %%tmm6\ntilezero %%tmm7" ::"m"(shape));
  for (int i = 0; i < kLoops; ++i) {
    asm volatile(
        "tdpbf16ps %tmm6, %tmm4, %tmm0\ntdpbf16ps %tmm7, %tmm4, %tmm1\n"
        "tdpbf16ps %tmm6, %tmm5, %tmm2\ntdpbf16ps %tmm7, %tmm5, %tmm3\n");
  }
  asm volatile("tilerelease");
}

// flops: of one loop of kLoops.
double measure_peak(void (*work)(), double flops) {
  const int threads = pool().num_threads();
  // Half a chunk per thread would measure waiting: several, of equal size.
  const double seconds =
      best_time(3, [&] { pool().parallel_for(threads * 4, [&](int64_t, int) { work(); }); });
  return threads * 4 * double{kLoops} * flops / seconds;
}

Floors measure() {
  Floors floors{measure_read(), 0.0, 0.0};
  const bool wide = isa_runs(Isa::avx512) && active_isa() >= Isa::avx512;
  if (wide) {
    floors.float_flops_per_s = measure_peak(fma_512, 12 * 16 * 2);
  } else if (isa_runs(Isa::avx2)) {
    floors.float_flops_per_s = measure_peak(fma_256, 12 * 8 * 2);
  }
  floors.bf16_flops_per_s = floors.float_flops_per_s;
  if (wide && active_isa() >= Isa::avx512bf16) {
    floors.bf16_flops_per_s = std::max(floors.bf16_flops_per_s, measure_peak(dot_bf16, 12 * 32 * 2));
  }
  if (active_isa() == Isa::amxbf16) {
    floors.bf16_flops_per_s = std::max(floors.bf16_flops_per_s, measure_peak(tiles, 4 * 16 * 16 * 32 * 2));
  }
  return floors;
}

#else

Floors measure() {
  return {measure_read(), 0.0, 0.0};  // no peak known: floors are those of memory
}

#endif

}  // namespace

const Floors& floors() {
  static const Floors measured = measure();
  return measured;
}

void report(benchmark::State& state, double bytes, double flops, double peak_flops_per_s) {
  using benchmark::Counter;
  const double by_memory = bytes / floors().read_bytes_per_s;
  const double by_product = peak_flops_per_s > 0 ? flops / peak_flops_per_s : 0.0;
  constexpr auto kRate = Counter::kIsIterationInvariantRate;
  if (bytes > 0) state.counters["GB/s"] = Counter(bytes / 1e9, kRate);
  if (flops > 0) state.counters["GFLOP/s"] = Counter(flops / 1e9, kRate);
  state.counters["floor_%"] = Counter(100 * std::max(by_memory, by_product), kRate);
}

Owned::Owned(DType dtype, std::vector<int64_t> shape, float scale) {
  tensor_.dtype = dtype;
  tensor_.present = true;
  tensor_.ndim = static_cast<int>(shape.size());
  int64_t stride = 1;
  for (int d = tensor_.ndim - 1; d >= 0; --d) {
    tensor_.shape[d] = shape[static_cast<size_t>(d)];
    tensor_.stride[d] = stride;
    stride *= tensor_.shape[d];
  }
  bytes_.resize(static_cast<size_t>(tensor_.bytes()) + 64);
  auto address = reinterpret_cast<uintptr_t>(bytes_.data());
  tensor_.data = reinterpret_cast<void*>((address + 63) / 64 * 64);
  std::mt19937 random(1);
  for (int64_t i = 0; i < stride; ++i) {
    const float value = scale * (static_cast<float>(random()) * 0x1p-31f - 1.0f);
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    if (dtype == DType::f32) tensor_.ptr<float>()[i] = value;
    if (dtype == DType::bf16) tensor_.ptr<uint16_t>()[i] = static_cast<uint16_t>(bits >> 16);
  }
}

Tensor view_of(const int32_t* data, std::vector<int64_t> shape) {
  Tensor tensor;
  tensor.data = const_cast<int32_t*>(data);
  tensor.dtype = DType::i32;
  tensor.present = true;
  tensor.ndim = static_cast<int>(shape.size());
  int64_t stride = 1;
  for (int d = tensor.ndim - 1; d >= 0; --d) {
    tensor.shape[d] = shape[static_cast<size_t>(d)];
    tensor.stride[d] = stride;
    stride *= tensor.shape[d];
  }
  return tensor;
}

int run_main(int argc, char** argv) {
  constexpr std::string_view kThreads = "--threads=";
  if (argc > 1 && std::string_view(argv[1]).starts_with(kThreads)) {
    set_num_threads(std::atoi(argv[1] + kThreads.size()));
    argv[1] = argv[0];
    ++argv;
    --argc;
  }
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 2;
  std::printf("%s, %d threads; floors: read %.1f GB/s, float32 %.0f GFLOP/s, bf16 %.0f GFLOP/s\n",
              name_of(active_isa()), pool().num_threads(), floors().read_bytes_per_s / 1e9,
              floors().float_flops_per_s / 1e9, floors().bf16_flops_per_s / 1e9);
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}

}  // namespace fs::bench
