// SPDX-License-Identifier: Apache-2.0
//
// BlockPool: a request takes blocks and gives them back. The floor is touching one record of 32 bytes per
// block at memory's read rate.
#include "floors.h"
#include "kv/block_pool.h"

namespace {

void allocate_and_unref(benchmark::State& state) {
  const auto count = static_cast<int>(state.range(0));
  fs::BlockPool pool(1 << 16);
  std::vector<int> ids(static_cast<size_t>(count));
  for (auto _ : state) {
    for (int& id : ids) id = pool.allocate();
    for (const int id : ids) pool.unref(id);
  }
  fs::bench::report(state, 2.0 * 32 * count, 0, 0);
  state.counters["ns_per_block"] = benchmark::Counter(
      1e-9 * count, benchmark::Counter::kIsIterationInvariantRate | benchmark::Counter::kInvert);
}

void share(benchmark::State& state) {
  fs::BlockPool pool(1 << 16);
  const int id = pool.allocate();
  for (auto _ : state) {
    pool.ref(id);
    pool.unref(id);
  }
  fs::bench::report(state, 2.0 * 32, 0, 0);
}

}  // namespace

BENCHMARK(allocate_and_unref)->ArgName("blocks")->Arg(1)->Arg(64)->Arg(4096);
BENCHMARK(share);

int main(int argc, char** argv) {
  return fs::bench::run_main(argc, argv);
}
