// SPDX-License-Identifier: Apache-2.0
#include "work_graph.h"

#include <algorithm>

namespace ptxsim {

void Graph::run(bool shuffled) const {
  if (!shuffled) {
    for (const GraphNode& n : nodes) n.work();
    return;
  }
  static uint64_t runs = 0;
  Random random(config().seed + 77 * ++runs);
  std::vector<bool> done(nodes.size(), false);
  for (size_t left = nodes.size(); left != 0; --left) {
    std::vector<size_t> ready;
    for (size_t i = 0; i < nodes.size(); ++i)
      if (!done[i] &&
          std::all_of(nodes[i].after.begin(), nodes[i].after.end(), [&](size_t p) { return done[p]; }))
        ready.push_back(i);
    const size_t pick = ready[random.below(ready.size())];
    nodes[pick].work();
    done[pick] = true;
  }
}

uint64_t Pending::add(Work work, std::vector<uint64_t> after) {
  std::erase_if(after, [&](uint64_t id) { return done(id); });
  items_[next_] = {std::move(work), std::move(after)};
  return next_++;
}

void Pending::run_one() {
  std::vector<uint64_t> ready;
  for (const auto& [id, item] : items_)
    if (std::all_of(item.after.begin(), item.after.end(), [&](uint64_t p) { return done(p); }))
      ready.push_back(id);
  Random random(config().seed + 1000003 * ++choice_);
  const uint64_t pick = ready[random.below(ready.size())];
  const Work work = std::move(items_[pick].work);
  items_.erase(pick);
  work();
}

void Pending::run_until(uint64_t id) {
  while (!done(id)) run_one();
}

}  // namespace ptxsim
