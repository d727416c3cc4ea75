// SPDX-License-Identifier: Apache-2.0
//
// PrefixTree: finding, caching and evicting prompts of blocks of 32 tokens. The floor is reading the prompt
// and what it is compared with once, at memory's read rate.
#include <numeric>

#include "floors.h"
#include "kv/prefix_tree.h"

namespace {

constexpr int kBlock = 32;

// A pool with a tree of `count` prompts that share their first half.
struct Cached {
  fs::BlockPool pool{1 << 15};
  fs::PrefixTree tree{pool, kBlock};
  std::vector<std::vector<int32_t>> prompts;

  Cached(int count, int blocks) {
    for (int i = 0; i < count; ++i) {
      std::vector<int32_t> prompt(static_cast<size_t>(blocks) * kBlock);
      std::iota(prompt.begin(), prompt.end(), 0);
      for (size_t t = prompt.size() / 2; t < prompt.size(); ++t) prompt[t] += i * 1000;
      insert(prompt);
      prompts.push_back(prompt);
    }
  }

  void insert(const std::vector<int32_t>& prompt) {
    fs::Chain found = tree.match(prompt);
    const size_t known = found.block_ids.size();
    std::vector<int32_t> ids(prompt.size() / kBlock - known);
    for (int32_t& id : ids) id = pool.allocate();
    const fs::Chain added = tree.insert(found.node, std::span(prompt).subspan(known * kBlock), ids);
    for (const int32_t id : found.block_ids) pool.unref(id);
    for (const int32_t id : added.block_ids) pool.unref(id);
  }
};

void count_blocks(benchmark::State& state, double blocks) {
  fs::bench::report(state, 2.0 * 4 * kBlock * blocks, 0, 0);
  state.counters["ns_per_block"] = benchmark::Counter(
      1e-9 * blocks, benchmark::Counter::kIsIterationInvariantRate | benchmark::Counter::kInvert);
}

void match(benchmark::State& state) {
  const auto blocks = static_cast<int>(state.range(0));
  Cached cached(64, blocks);
  size_t next = 0;
  for (auto _ : state) {
    const fs::Chain found = cached.tree.match(cached.prompts[next]);
    for (const int32_t id : found.block_ids) cached.pool.unref(id);
    next = (next + 1) % cached.prompts.size();
  }
  count_blocks(state, blocks);
}

void evict_and_insert(benchmark::State& state) {
  const auto blocks = static_cast<int>(state.range(0));
  Cached cached(64, blocks);
  size_t next = 0;
  for (auto _ : state) {
    cached.tree.evict(blocks / 2);
    cached.insert(cached.prompts[next]);
    next = (next + 1) % cached.prompts.size();
  }
  count_blocks(state, blocks);
}

}  // namespace

BENCHMARK(match)->ArgName("blocks")->Arg(4)->Arg(32)->Arg(256);
BENCHMARK(evict_and_insert)->ArgName("blocks")->Arg(4)->Arg(32)->Arg(256);

int main(int argc, char** argv) {
  return fs::bench::run_main(argc, argv);
}
