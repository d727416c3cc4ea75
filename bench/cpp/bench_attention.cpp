// SPDX-License-Identifier: Apache-2.0
//
// attention over a paged cache with 9 query and 3 KV heads of 64: decodes, chunks of prompts, shared
// prefixes. Caches rotate over as many layers as exceed the processor's caches, so that decodes read memory.
#include <cstring>

#include "core/isa.h"
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
constexpr int64_t kRotatedBytes = int64_t{512} << 20;

struct Setting {
  int64_t requests;
  int64_t new_tokens;     // of each request, the last ones
  int64_t context;        // of each request
  int64_t shared = 0;     // tokens of these that all requests have in common
  bool one_copy = false;  // of the shared tokens
  DType dtype = DType::bf16;
};

// The arguments of a call, and the memory that they lie in.
class Step {
 public:
  explicit Step(const Setting& setting)
      : setting_(setting),
        blocks_((setting.context + kBlock - 1) / kBlock),
        shared_blocks_(setting.one_copy ? setting.shared / kBlock : 0),
        num_blocks_(shared_blocks_ + setting.requests * (blocks_ - shared_blocks_)),
        tables_(make_tables()),
        plan_(make_plan()),
        q_(DType::f32, {rows(), kHeads, kDim}),
        out_(DType::f32, {rows(), kHeads, kDim}),
        workspace_(DType::f32, {plan_.workspace_floats(kHeads, kDim)}) {
    const int64_t layers = setting.new_tokens == 1 ? kRotatedBytes / cache_bytes() + 1 : 1;
    for (int64_t layer = 0; layer < layers; ++layer) {
      caches_.emplace_back(setting.dtype, std::vector{num_blocks_, int64_t{2}, kKvHeads, kBlock, kDim});
    }
  }

  void run() {
    Attention op{};
    op.out = out_;
    op.q = q_;
    op.kv_cache = caches_[layer_];
    op.block_tables = bench::view_of(tables_.data(), {setting_.requests, blocks_});
    const auto count = [](const auto& list) { return static_cast<int64_t>(list.size()); };
    op.items = bench::view_of(reinterpret_cast<const int32_t*>(plan_.items().data()),
                              {count(plan_.items()), kItemFields});
    op.merges = bench::view_of(reinterpret_cast<const int32_t*>(plan_.merges().data()),
                               {count(plan_.merges()), kMergeFields});
    op.parts = bench::view_of(plan_.parts().data(), {count(plan_.parts())});
    op.workspace = workspace_;
    op.scale = 0.125f;
    op.span = kSpan;
    fs::run(op);
    layer_ = (layer_ + 1) % caches_.size();
  }

  // What any implementation has to read and write, and to multiply.
  double bytes() const { return static_cast<double>(cache_bytes() + 2 * rows() * kHeads * kDim * 4); }
  double flops() const {
    double visible = 0;  // (row, key) pairs
    for (int64_t i = 0; i < setting_.new_tokens; ++i) {
      visible += static_cast<double>(setting_.context - setting_.new_tokens + 1 + i);
    }
    return 4.0 * static_cast<double>(setting_.requests * kHeads * kDim) * visible;
  }
  int num_shared_items() const { return plan_.num_shared_items(); }

 private:
  int64_t rows() const { return setting_.requests * setting_.new_tokens; }
  int64_t cache_bytes() const {
    return num_blocks_ * 2 * kKvHeads * kBlock * kDim * (setting_.dtype == DType::f32 ? 4 : 2);
  }

  std::vector<int32_t> make_tables() const {
    std::vector<int32_t> tables;
    for (int64_t r = 0; r < setting_.requests; ++r) {
      for (int64_t b = 0; b < blocks_; ++b) {
        const int64_t own = shared_blocks_ + r * (blocks_ - shared_blocks_) + b - shared_blocks_;
        tables.push_back(static_cast<int32_t>(b < shared_blocks_ ? b : own));
      }
    }
    return tables;
  }

  AttentionPlan make_plan() const {
    const auto n = static_cast<size_t>(setting_.requests);
    std::vector<int32_t> query_start(n + 1);
    for (size_t r = 0; r <= n; ++r) {
      query_start[r] = static_cast<int32_t>(r) * static_cast<int32_t>(setting_.new_tokens);
    }
    const std::vector<int32_t> seq_lens(n, static_cast<int32_t>(setting_.context));
    AttentionPlanOptions options;
    options.block_size = kBlock;
    options.span = kSpan;
    options.group_size = kHeads / kKvHeads;
    options.num_kv_heads = kKvHeads;
    options.num_workers = pool().num_threads();
    options.rows_per_token_read = active_isa() == Isa::amxbf16 && setting_.dtype == DType::bf16 ? 48 : 4;
    const std::vector<int32_t> shareable(n, static_cast<int32_t>(shared_blocks_));
    return {query_start, seq_lens, options, find_prefix_groups(tables_, blocks_, shareable, kBlock).groups};
  }

  Setting setting_;
  int64_t blocks_, shared_blocks_, num_blocks_;
  std::vector<int32_t> tables_;
  AttentionPlan plan_;
  bench::Owned q_, out_, workspace_;
  std::vector<bench::Owned> caches_;
  size_t layer_ = 0;
};

void attend(benchmark::State& state, const Setting& setting) {
  Step step(setting);
  step.run();
  bench::measure_read_again();
  for (auto _ : state) {
    const double begin = bench::seconds();
    step.run();
    state.SetIterationTime(bench::seconds() - begin);
  }
  const bench::Floors& floors = bench::floors();
  bench::report(state, step.bytes(), step.flops(),
                setting.dtype == DType::f32 ? floors.float_flops_per_s : floors.bf16_flops_per_s);
  state.counters["shared_items"] = step.num_shared_items();
}

// How much faster 64 decodes over a shared prefix are with one copy of it than with 64, in turns.
void sharing(benchmark::State& state) {
  Step copies({64, 1, 1088, 1024, false});
  Step shared({64, 1, 1088, 1024, true});
  double of_copies = 0;
  double of_shared = 0;
  for (auto _ : state) {
    const double begin = bench::seconds();
    copies.run();
    const double middle = bench::seconds();
    shared.run();
    const double end = bench::seconds();
    of_copies += middle - begin;
    of_shared += end - middle;
    state.SetIterationTime(end - begin);
  }
  state.counters["copies/shared"] = of_copies / of_shared;
}

}  // namespace

BENCHMARK_CAPTURE(attend, decode_1x4096, Setting{1, 1, 4096})->UseManualTime();
BENCHMARK_CAPTURE(attend, decode_16x4096, Setting{16, 1, 4096})->UseManualTime();
BENCHMARK_CAPTURE(attend, decode_16x4096_f32, Setting{16, 1, 4096, 0, false, DType::f32})->UseManualTime();
BENCHMARK_CAPTURE(attend, decode_64x192, Setting{64, 1, 192})->UseManualTime();
BENCHMARK_CAPTURE(attend, decode_64x1088_copies, Setting{64, 1, 1088, 1024, false})->UseManualTime();
BENCHMARK_CAPTURE(attend, decode_64x1088_shared_1024, Setting{64, 1, 1088, 1024, true})->UseManualTime();
BENCHMARK(sharing)->UseManualTime();
BENCHMARK_CAPTURE(attend, prefill_512, Setting{1, 512, 512})->UseManualTime();
BENCHMARK_CAPTURE(attend, prefill_2048, Setting{1, 2048, 2048})->UseManualTime();
BENCHMARK_CAPTURE(attend, prefill_2048_f32, Setting{1, 2048, 2048, 0, false, DType::f32})->UseManualTime();

int main(int argc, char** argv) {
  return fs::bench::run_main(argc, argv);
}
