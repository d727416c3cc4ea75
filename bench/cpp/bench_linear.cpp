// SPDX-License-Identifier: Apache-2.0
//
// linear with bfloat16 weights, in the shapes of a 135M Llama. Weights rotate over 160 MB of copies, as a
// model's layers do.
#include "floors.h"
#include "layout/panel.h"
#include "ops/ops.h"

namespace {

void linear(benchmark::State& state) {
  using namespace fs;
  const int64_t tokens = state.range(0);
  const int64_t rows = state.range(1);
  const int64_t depth = state.range(2);
  const int64_t weight_bytes = rows * depth * 2;
  std::vector<bench::Owned> weights;
  for (int64_t used = 0; used < (int64_t{160} << 20); used += weight_bytes) {
    weights.emplace_back(DType::bf16, std::vector{num_panels(rows), padded_depth(depth), kPanelRows}, 0.1f);
  }
  const bench::Owned x(DType::f32, {tokens, depth});
  const bench::Owned out(DType::f32, {tokens, rows});
  const bench::Owned workspace(DType::u8, {linear_workspace_bytes(tokens, depth, DType::bf16)});
  size_t next = 0;
  for (auto _ : state) {
    run(Linear{out, x, weights[next], {}, workspace, {}});
    next = (next + 1) % weights.size();
  }
  const auto flops = static_cast<double>(2 * tokens * rows * depth);
  bench::report(state, static_cast<double>(weight_bytes + 4 * tokens * (rows + depth)), flops,
                bench::floors().bf16_flops_per_s);
}

}  // namespace

BENCHMARK(linear)
    ->ArgNames({"tokens", "rows", "depth"})
    ->ArgsProduct({{1, 8, 32, 64, 512}, {960}, {576}})
    ->ArgsProduct({{1, 8, 32, 64, 512}, {3072}, {576}})
    ->ArgsProduct({{1, 8, 32, 64, 512}, {576}, {1536}})
    ->ArgsProduct({{1, 32, 64}, {49152}, {576}})
    ->UseRealTime();

int main(int argc, char** argv) {
  return fs::bench::run_main(argc, argv);
}
