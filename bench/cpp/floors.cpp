// SPDX-License-Identifier: Apache-2.0
#include "floors.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <new>
#include <string_view>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "core/isa.h"
#include "core/thread_pool.h"

namespace fs::bench {

namespace {

// The best of some runs, in seconds.
template <class F>
double best_time(int runs, const F& work) {
  double best = 1e9;
  for (int i = 0; i < runs; ++i) {
    const double begin = seconds();
    work();
    best = std::min(best, seconds() - begin);
  }
  return best;
}

// The or of whole lines; with kAhead, lines so many bytes ahead are asked for.
template <int kAhead>
uint64_t read_lines(const unsigned char* p, size_t bytes) {
  typedef uint64_t Lanes __attribute__((vector_size(64), aligned(64), may_alias));
  Lanes lanes[4] = {};
  for (size_t i = 0; i < bytes; i += sizeof(lanes)) {
    for (size_t j = 0; j < 4; ++j) {
      if constexpr (kAhead > 0) __builtin_prefetch(p + i + j * sizeof(Lanes) + kAhead, 0, 2);
      lanes[j] |= *reinterpret_cast<const Lanes*>(p + i + j * sizeof(Lanes));
    }
  }
  lanes[0] |= lanes[1] | lanes[2] | lanes[3];
  uint64_t total = 0;
  for (int j = 0; j < 8; ++j) total |= lanes[0][j];
  return total;
}

constexpr size_t kReadBytes = 512u << 20;

double measure_read(const unsigned char* memory) {
  constexpr int64_t kChunks = 256;
  std::vector<uint64_t> seen(kChunks);
  const auto read = [&](uint64_t (*lines)(const unsigned char*, size_t)) {
    return best_time(3, [&] {
      pool().parallel_for(kChunks, [&](int64_t chunk, int) {
        constexpr size_t kBytes = kReadBytes / kChunks;
        seen[static_cast<size_t>(chunk)] = lines(memory + kBytes * static_cast<size_t>(chunk), kBytes);
      });
      benchmark::DoNotOptimize(seen.data());
    });
  };
  return kReadBytes / std::min(read(read_lines<0>), read(read_lines<2048>));
}

double measure_read() {
  static const Memory memory = [] {
    Memory made = allocate(kReadBytes);
    std::memset(made.get(), 1, kReadBytes);
    return made;
  }();
  return measure_read(memory.get());
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
void dot_int8() {
  zero_sources();
  for (int i = 0; i < kLoops; ++i) {
    asm volatile(FS_TWELVE("vpdpbusd", "%%zmm12, %%zmm13, ", "%%zmm")::: FS_CLOBBERS);
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
  Floors floors{measure_read(), 0.0, 0.0, 0.0};
  const bool wide = isa_runs(Isa::avx512) && active_isa() >= Isa::avx512;
  if (wide) {
    floors.float_flops_per_s = measure_peak(fma_512, 12 * 16 * 2);
  } else if (isa_runs(Isa::avx2)) {
    floors.float_flops_per_s = measure_peak(fma_256, 12 * 8 * 2);
  }
  floors.bf16_flops_per_s = floors.int8_ops_per_s = floors.float_flops_per_s;
  if (wide && active_isa() >= Isa::avx512bf16) {
    floors.bf16_flops_per_s = std::max(floors.bf16_flops_per_s, measure_peak(dot_bf16, 12 * 32 * 2));
    floors.int8_ops_per_s = measure_peak(dot_int8, 12 * 64 * 2);
  }
  if (active_isa() == Isa::amxbf16) {
    floors.bf16_flops_per_s = std::max(floors.bf16_flops_per_s, measure_peak(tiles, 4 * 16 * 16 * 32 * 2));
  }
  return floors;
}

#else

Floors measure() {
  return {measure_read(), 0.0, 0.0, 0.0};  // no peak known: floors are those of memory
}

#endif

Floors& measured() {
  static Floors floors = measure();
  return floors;
}

}  // namespace

double seconds() {
  if (pool().num_threads() == 1) return static_cast<double>(std::clock()) / CLOCKS_PER_SEC;
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

const Floors& floors() {
  return measured();
}

void measure_read_again() {
  Floors& floors = measured();
  floors.read_bytes_per_s = std::max(floors.read_bytes_per_s, measure_read());
}

void report(benchmark::State& state, double bytes, double flops, double peak_flops_per_s) {
  using benchmark::Counter;
  const double by_memory = bytes / floors().read_bytes_per_s;
  const double by_product = peak_flops_per_s > 0 ? flops / peak_flops_per_s : 0.0;
  constexpr auto kRate = Counter::kIsIterationInvariantRate;
  if (bytes > 0) state.counters["GB/s"] = Counter(bytes / 1e9, kRate);
  if (flops > 0) state.counters["GFLOP/s"] = Counter(flops / 1e9, kRate);
  if (bytes > 0) state.counters["read_%"] = Counter(100 * by_memory, kRate);
  if (by_product > 0) state.counters["peak_%"] = Counter(100 * by_product, kRate);
  state.counters["floor_%"] = Counter(100 * std::max(by_memory, by_product), kRate);
}

void FreeMemory::operator()(unsigned char* memory) const {
  std::free(memory);
}

Memory allocate(size_t bytes) {
  constexpr size_t kPage = 2u << 20;
  const size_t alignment = bytes >= kPage ? kPage : 64;
  const size_t size = (bytes + alignment - 1) / alignment * alignment;
  Memory memory(static_cast<unsigned char*>(std::aligned_alloc(alignment, std::max(size, alignment))));
  if (memory == nullptr) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
  // Where the system has none they are ordinary.
  if (alignment == kPage) madvise(memory.get(), size, MADV_HUGEPAGE);
#endif
  return memory;
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
  memory_ = allocate(static_cast<size_t>(tensor_.bytes()));
  tensor_.data = memory_.get();
  if (dtype != DType::f32 && dtype != DType::bf16) {
    std::memset(memory_.get(), 0, static_cast<size_t>(tensor_.bytes()));
    return;
  }
  uint32_t random = 1;  // a linear congruential generator: caches of half a gigabyte are filled
  for (int64_t i = 0; i < stride; ++i) {
    random = random * 1664525u + 1013904223u;
    const float value = scale * (static_cast<float>(random) * 0x1p-31f - 1.0f);
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
  std::printf(
      "%s, %d threads; floors: read %.1f GB/s, float32 %.0f GFLOP/s, bf16 %.0f GFLOP/s, int8 %.0f GOP/s\n",
      name_of(active_isa()), pool().num_threads(), floors().read_bytes_per_s / 1e9,
      floors().float_flops_per_s / 1e9, floors().bf16_flops_per_s / 1e9, floors().int8_ops_per_s / 1e9);
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}

}  // namespace fs::bench
