// SPDX-License-Identifier: Apache-2.0
//
// Sampling over a vocabulary of 49,152 tokens. The floor is reading the logits once from memory; logits that
// the LM head has just written come from the cache, so more than 100 % is possible.
#include "core/thread_pool.h"
#include "floors.h"
#include "ops/ops.h"

namespace {

constexpr int64_t kVocab = 49152;

void sample(benchmark::State& state, float temperature, int32_t top_k, float top_p) {
  using namespace fs;
  const int64_t rows = state.range(0);
  const auto n = static_cast<size_t>(rows);
  const bench::Owned logits(DType::f32, {rows, kVocab}, 8.0f);
  const bench::Owned ids(DType::i32, {rows});
  const bench::Owned workspace(DType::f32, {pool().num_threads(), 4 * kVocab});
  const bench::Owned temperatures(DType::f32, {rows});
  const bench::Owned top_ps(DType::f32, {rows});
  const bench::Owned seeds(DType::i64, {rows});
  const std::vector<int32_t> top_ks(n, top_k);
  const std::vector<int32_t> positions(n, 7);
  for (int64_t i = 0; i < rows; ++i) {
    temperatures.ptr<float>()[i] = temperature;
    top_ps.ptr<float>()[i] = top_p;
    seeds.ptr<int64_t>()[i] = i;
  }
  Sample op{};
  op.token_ids = ids;
  op.logits = logits;
  op.workspace = workspace;
  if (temperature > 0) {
    op.temperature = temperatures;
    op.seeds = seeds;
    op.positions = bench::view_of(positions.data(), {rows});
    if (top_k > 0) op.top_k = bench::view_of(top_ks.data(), {rows});
    if (top_p < 1) op.top_p = top_ps;
  }
  for (auto _ : state) run(op);
  bench::report(state, static_cast<double>(rows * kVocab * 4), 0, 0);
}

}  // namespace

BENCHMARK_CAPTURE(sample, greedy, 0.0f, 0, 1.0f)->ArgName("rows")->Arg(1)->Arg(64)->UseRealTime();
BENCHMARK_CAPTURE(sample, temperature, 1.0f, 0, 1.0f)->ArgName("rows")->Arg(1)->Arg(64)->UseRealTime();
BENCHMARK_CAPTURE(sample, top_k_50, 1.0f, 50, 1.0f)->ArgName("rows")->Arg(1)->Arg(64)->UseRealTime();
BENCHMARK_CAPTURE(sample, top_p_0_9, 1.0f, 0, 0.9f)->ArgName("rows")->Arg(1)->Arg(64)->UseRealTime();

int main(int argc, char** argv) {
  return fs::bench::run_main(argc, argv);
}
