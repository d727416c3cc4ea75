// SPDX-License-Identifier: Apache-2.0
//
// Making a step's plan: what it costs the host. The floor is writing it: the bytes of items, merges and
// parts.
#include "floors.h"
#include "plan/attention_plan.h"

namespace {

using namespace fs;

// Decodes over a tree of three levels: all share 512 tokens, each eighth another 512, each pair another 256.
void plan_decodes(benchmark::State& state) {
  constexpr int kBlock = 32;
  constexpr int kBlocks = (512 + 512 + 256 + 64) / kBlock;
  const auto requests = static_cast<int32_t>(state.range(0));
  std::vector<int32_t> tables;
  for (int32_t r = 0; r < requests; ++r) {
    for (int32_t b = 0; b < kBlocks; ++b) {
      const int32_t owner = b < 16   ? 0
                            : b < 32 ? 1 + r * 8 / requests
                            : b < 40 ? 10 + r / 2
                                     : 10 + requests + r;
      tables.push_back(owner * kBlocks + b);
    }
  }
  const std::vector<int32_t> shareable(static_cast<size_t>(requests), kBlocks - 1);
  const std::vector<int32_t> seq_lens(static_cast<size_t>(requests), kBlocks * kBlock);
  std::vector<int32_t> query_start(static_cast<size_t>(requests) + 1);
  for (int32_t r = 0; r <= requests; ++r) query_start[static_cast<size_t>(r)] = r;
  AttentionPlanOptions options;
  options.block_size = kBlock;
  options.span = 8 * kBlock;
  options.group_size = 3;
  options.num_kv_heads = 3;
  options.num_workers = 2;
  size_t bytes = 0;
  int64_t spared = 0;
  for (auto _ : state) {
    const PrefixGroups prefixes = find_prefix_groups(tables, kBlocks, shareable, kBlock);
    const AttentionPlan plan(query_start, seq_lens, options, prefixes.groups);
    bytes = plan.items().size() * sizeof(AttentionItem) + plan.merges().size() * sizeof(AttentionMerge) +
            plan.parts().size() * sizeof(int32_t);
    spared = plan.num_tokens_spared();
    benchmark::DoNotOptimize(plan.items().data());
  }
  bench::report(state, static_cast<double>(bytes), 0, 0);
  state.counters["tokens_spared"] = static_cast<double>(spared);
}

}  // namespace

BENCHMARK(plan_decodes)
    ->ArgName("requests")
    ->Arg(1)
    ->Arg(32)
    ->Arg(64)
    ->Arg(512)
    ->Unit(benchmark::kMicrosecond);

int main(int argc, char** argv) {
  return fs::bench::run_main(argc, argv);
}
