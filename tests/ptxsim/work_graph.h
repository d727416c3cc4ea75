// SPDX-License-Identifier: Apache-2.0
// Work on streams, before it runs: pieces with the pieces they must wait for. Captured graphs are the same
// thing, replayed.
#pragma once

#include <cstdint>
#include <map>
#include <vector>

#include "runtime_state.h"

namespace ptxsim {

struct GraphNode {
  Work work;
  std::vector<size_t> after;  // indices of earlier nodes
};

// A graph, or the capture that builds one.
struct Graph {
  std::vector<GraphNode> nodes;
  // Runs every node after its predecessors, in the order of capture or shuffled.
  void run(bool shuffled) const;
};

// Work that waits for a synchronisation, when streams run in random order.
class Pending {
 public:
  uint64_t add(Work work, std::vector<uint64_t> after);
  bool done(uint64_t id) const { return items_.find(id) == items_.end(); }
  bool empty() const { return items_.empty(); }
  // Runs one piece whose predecessors are done, at random.
  void run_one();
  void run_until(uint64_t id);

 private:
  struct Item {
    Work work;
    std::vector<uint64_t> after;
  };
  std::map<uint64_t, Item> items_;
  uint64_t next_ = 1, choice_ = 0;
};

}  // namespace ptxsim
