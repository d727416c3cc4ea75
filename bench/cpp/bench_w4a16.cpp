// SPDX-License-Identifier: Apache-2.0
//
// linear_int4 in the layer shapes of the demo model, of an 8B and of a 70B model, with activations of 16 bits
// and of 8. Weights (scales and minimums, groups of 32) rotate over more than 1 GB, so that they come from
// memory. "x_bf16": how many times as long `linear` over bfloat16 weights takes, measured right after.
//
//   bench_w4a16 --threads=1 --benchmark_filter='float.*/tokens:1/'
#include <algorithm>

#include "floors.h"
#include "layout/int4.h"
#include "layout/panel.h"
#include "layout/quantized_panel.h"
#include "ops/ops.h"

namespace {

using namespace fs;

constexpr int64_t kGroup = 32;
constexpr size_t kRotateBytes = size_t{1200} << 20;

// Weights of any kind: every float16 in it is 0.16, every bfloat16 2.6e-9.
unsigned char* weight_memory() {
  static const bench::Memory memory = [] {
    bench::Memory made = bench::allocate(kRotateBytes);
    std::fill_n(made.get(), kRotateBytes, static_cast<unsigned char>(0x31));
    return made;
  }();
  return memory.get();
}

// One weight again and again, each time from another place.
class Rotated {
 public:
  Rotated(DType dtype, std::vector<int64_t> shape) {
    tensor_.dtype = dtype;
    tensor_.present = true;
    tensor_.ndim = static_cast<int>(shape.size());
    int64_t stride = 1;
    for (int d = tensor_.ndim - 1; d >= 0; --d) {
      tensor_.shape[d] = shape[static_cast<size_t>(d)];
      tensor_.stride[d] = stride;
      stride *= tensor_.shape[d];
    }
    count_ = std::max<size_t>(1, kRotateBytes / bytes());
  }

  size_t bytes() const { return static_cast<size_t>(tensor_.bytes()); }
  const Tensor& next() {
    index_ = (index_ + 1) % count_;
    tensor_.data = weight_memory() + index_ * bytes();
    return tensor_;
  }

 private:
  Tensor tensor_;
  size_t count_ = 1, index_ = 0;
};

// Seconds of `linear` over bfloat16 weights.
double bf16_seconds(const Tensor& out, const Tensor& x) {
  const int64_t tokens = x.shape[0], depth = x.shape[1], rows = out.shape[1];
  Rotated weights(DType::bf16, {num_panels(rows), padded_depth(depth), kPanelRows});
  const bench::Owned workspace(DType::u8, {linear_workspace_bytes(tokens, depth, DType::bf16)});
  run(Linear{out, x, weights.next(), {}, workspace, {}});
  const double begin = bench::seconds();
  int count = 0;
  while (count < 3 || bench::seconds() - begin < 0.2) {
    run(Linear{out, x, weights.next(), {}, workspace, {}});
    ++count;
  }
  return (bench::seconds() - begin) / count;
}

void linear_int4(benchmark::State& state, int64_t activation_bits) {
  const int64_t tokens = state.range(0);
  const int64_t rows = state.range(1);
  const int64_t depth = state.range(2);
  const QuantizedPanels panels{rows, depth, kGroup, 4, true};
  Rotated weights(DType::u8, {panels.num_panels(), panels.panel_bytes()});
  const bench::Owned x(DType::f32, {tokens, depth});
  const bench::Owned out(DType::f32, {tokens, rows});
  const bench::Owned workspace(DType::u8, {quantized_workspace_bytes(tokens, depth, activation_bits)});
  const auto call = [&] {
    const auto form = static_cast<int64_t>(Int4Form::minimums);
    run(LinearInt4{out, x, weights.next(), {}, {}, workspace, {}, kGroup, form, activation_bits});
  };
  bench::measure_read_again();
  call();
  const double begin = bench::seconds();
  for (auto _ : state) call();
  const double each = (bench::seconds() - begin) / static_cast<double>(state.iterations());
  const bench::Floors& floors = bench::floors();
  bench::report(state,
                static_cast<double>(weights.bytes()) + static_cast<double>(4 * tokens * (rows + depth)),
                static_cast<double>(2 * tokens * rows * depth),
                activation_bits == 16 ? floors.bf16_flops_per_s : floors.int8_ops_per_s);
  state.counters["x_bf16"] = bf16_seconds(out, x) / each;
}

void shapes(benchmark::internal::Benchmark* benchmark) {
  constexpr int64_t kShapes[][2] = {{960, 576},    {576, 576},   {3072, 576},   {576, 1536},     // demo
                                    {6144, 4096},  {4096, 4096}, {14336, 4096}, {4096, 14336},   // 8B
                                    {10240, 8192}, {8192, 8192}, {28672, 8192}, {8192, 28672}};  // 70B
  benchmark->ArgNames({"tokens", "rows", "depth"})->UseRealTime();
  for (const auto& [rows, depth] : kShapes) {
    for (const int64_t tokens : {1, 2, 4, 8, 16, 32, 64, 128, 256, 512})
      benchmark->Args({tokens, rows, depth});
  }
}

}  // namespace

BENCHMARK_CAPTURE(linear_int4, float_activations, 16)->Apply(shapes);
BENCHMARK_CAPTURE(linear_int4, int12_activations, 12)->Apply(shapes);
BENCHMARK_CAPTURE(linear_int4, int8_activations, 8)->Apply(shapes);

int main(int argc, char** argv) {
  return fs::bench::run_main(argc, argv);
}
