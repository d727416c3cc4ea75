// SPDX-License-Identifier: Apache-2.0
//
// attention over a bfloat16 cache with 9 query and 3 KV heads of 64: decodes, chunks of prompts, shared
// prefixes. Caches rotate over several layers, so that decodes read memory.
#include "core/thread_pool.h"
#include "floors.h"
#include "ops/ops.h"
#include "plan/attention_plan.h"

namespace {

using namespace fs;

constexpr int64_t kHeads = 9;
constexpr int64_t kKvHeads = 3;
constexpr int64_t kDim = 64;
constexpr int64_t kBlock = 32;
constexpr int64_t kSpan = 8 * kBlock;

struct Setting {
  int64_t requests;
  int64_t new_tokens;  // of each request, the last ones
  int64_t context;     // of each request
  int64_t shared;      // tokens of these that all requests have in common
  bool one_copy;       // of the shared tokens
};

void attend(benchmark::State& state, const Setting& setting) {
  const int64_t blocks = (setting.context + kBlock - 1) / kBlock;
  const int64_t shared_blocks = setting.one_copy ? setting.shared / kBlock : 0;
  const int64_t num_blocks = shared_blocks + setting.requests * (blocks - shared_blocks);
  const auto n = static_cast<size_t>(setting.requests);
  std::vector<int32_t> tables(n * static_cast<size_t>(blocks));
  for (int64_t r = 0; r < setting.requests; ++r) {
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t own = shared_blocks + r * (blocks - shared_blocks) + b - shared_blocks;
      tables[static_cast<size_t>(r * blocks + b)] = static_cast<int32_t>(b < shared_blocks ? b : own);
    }
  }
  std::vector<int32_t> query_start(n + 1);
  for (size_t r = 0; r <= n; ++r)
    query_start[r] = static_cast<int32_t>(r) * static_cast<int32_t>(setting.new_tokens);
  const std::vector<int32_t> seq_lens(n, static_cast<int32_t>(setting.context));
  AttentionPlanOptions options;
  options.block_size = kBlock;
  options.span = kSpan;
  options.group_size = kHeads / kKvHeads;
  options.num_kv_heads = kKvHeads;
  options.num_workers = pool().num_threads();
  const std::vector<int32_t> shareable(n, static_cast<int32_t>(shared_blocks));
  const PrefixGroups prefixes = find_prefix_groups(tables, blocks, shareable, kBlock);
  const AttentionPlan plan(query_start, seq_lens, options, prefixes.groups);

  const int64_t rows = setting.requests * setting.new_tokens;
  const int64_t cache_bytes = num_blocks * 2 * kKvHeads * kBlock * kDim * 2;
  std::vector<bench::Owned> caches;
  do {
    caches.emplace_back(DType::bf16, std::vector{num_blocks, int64_t{2}, kKvHeads, kBlock, kDim});
  } while (static_cast<int64_t>(caches.size()) * cache_bytes < (int64_t{160} << 20) && caches.size() < 30);
  const bench::Owned q(DType::f32, {rows, kHeads, kDim});
  const bench::Owned out(DType::f32, {rows, kHeads, kDim});
  const bench::Owned workspace(DType::f32, {plan.workspace_floats(kHeads, kDim)});
  const auto items = static_cast<int64_t>(plan.items().size());
  const auto merges = static_cast<int64_t>(plan.merges().size());
  const auto parts = static_cast<int64_t>(plan.parts().size());
  Attention op{};
  op.out = out;
  op.q = q;
  op.block_tables = bench::view_of(tables.data(), {setting.requests, blocks});
  op.items = bench::view_of(reinterpret_cast<const int32_t*>(plan.items().data()), {items, kItemFields});
  op.merges = bench::view_of(reinterpret_cast<const int32_t*>(plan.merges().data()), {merges, kMergeFields});
  op.parts = bench::view_of(plan.parts().data(), {parts});
  op.workspace = workspace;
  op.scale = 0.125f;
  op.span = kSpan;
  size_t layer = 0;
  for (auto _ : state) {
    op.kv_cache = caches[layer];
    run(op);
    layer = (layer + 1) % caches.size();
  }
  double visible = 0;  // (row, key) pairs
  for (int64_t i = 0; i < setting.new_tokens; ++i) {
    visible += static_cast<double>(setting.context - setting.new_tokens + 1 + i);
  }
  const double flops = 4.0 * static_cast<double>(setting.requests * kHeads * kDim) * visible;
  bench::report(state, static_cast<double>(cache_bytes + 2 * rows * kHeads * kDim * 4), flops,
                bench::floors().bf16_flops_per_s);
  state.counters["shared_items"] = plan.num_shared_items();
}

}  // namespace

BENCHMARK_CAPTURE(attend, decode_1x4096, Setting{1, 1, 4096, 0, false})->UseRealTime();
BENCHMARK_CAPTURE(attend, decode_8x4096, Setting{8, 1, 4096, 0, false})->UseRealTime();
BENCHMARK_CAPTURE(attend, decode_64x192, Setting{64, 1, 192, 0, false})->UseRealTime();
BENCHMARK_CAPTURE(attend, decode_64x1088_copies, Setting{64, 1, 1088, 1024, false})->UseRealTime();
BENCHMARK_CAPTURE(attend, decode_64x1088_shared_1024, Setting{64, 1, 1088, 1024, true})->UseRealTime();
BENCHMARK_CAPTURE(attend, prefill_512, Setting{1, 512, 512, 0, false})->UseRealTime();
BENCHMARK_CAPTURE(attend, prefill_2048, Setting{1, 2048, 2048, 0, false})->UseRealTime();

int main(int argc, char** argv) {
  return fs::bench::run_main(argc, argv);
}
