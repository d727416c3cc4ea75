// SPDX-License-Identifier: Apache-2.0
#include "plan/prefix_analysis.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <tuple>

#include "core/error.h"

namespace fs {

namespace {

// The first index in [begin, end) where the prompts differ, or end.
int64_t first_difference(const int32_t* a, const int32_t* b, int64_t begin, int64_t end) {
  constexpr int64_t kStep = 16;
  while (end - begin >= kStep && std::memcmp(a + begin, b + begin, kStep * sizeof(int32_t)) == 0)
    begin += kStep;
  while (begin < end && a[begin] == b[begin]) ++begin;
  return begin;
}

// Where a prompt leaves the first one of its range.
struct Parting {
  int64_t length;  // tokens in common
  int64_t next;    // the token after them; -1: the prompt ends
  int64_t prompt;

  bool operator<(const Parting& other) const {
    return std::tuple(-length, next, prompt) < std::tuple(-other.length, other.next, other.prompt);
  }
};

struct Range {
  int64_t begin, end;  // places
  int64_t depth;       // tokens that all prompts in them share
};

}  // namespace

PrefixAnalysis::PrefixAnalysis(std::span<const int32_t> token_ids, std::span<const int64_t> starts,
                               int block_size, std::span<const int64_t> expected_output,
                               std::span<const int32_t> roots) {
  FS_CHECK(block_size >= 1, "prefix analysis: block_size is " << block_size << "; must be at least 1");
  FS_CHECK(!starts.empty() && starts.front() == 0 && starts.back() == static_cast<int64_t>(token_ids.size()),
           "prefix analysis: starts must begin with 0 and end with " << token_ids.size()
                                                                     << ", the number of token ids");
  const size_t num_prompts = starts.size() - 1;
  for (size_t i = 0; i < num_prompts; ++i) {
    FS_CHECK(starts[i] < starts[i + 1], "prefix analysis: prompt " << i << " has "
                                                                   << starts[i + 1] - starts[i]
                                                                   << " tokens; must have at least 1");
  }
  FS_CHECK(
      expected_output.empty() || expected_output.size() == num_prompts,
      "prefix analysis: " << expected_output.size() << " expected outputs for " << num_prompts << " prompts");
  for (const int64_t expected : expected_output) {
    FS_CHECK(expected >= 0, "prefix analysis: an expected output is " << expected << "; must be >= 0");
  }
  FS_CHECK(roots.empty() || roots.size() == num_prompts,
           "prefix analysis: " << roots.size() << " roots for " << num_prompts << " prompts");
  num_tokens_ = static_cast<int64_t>(token_ids.size());
  sort(token_ids, starts, roots);
  build(starts, block_size);
  arrange(starts, expected_output);
}

void PrefixAnalysis::sort(std::span<const int32_t> token_ids, std::span<const int64_t> starts,
                          std::span<const int32_t> roots) {
  const auto num_prompts = static_cast<int64_t>(starts.size()) - 1;
  order_.resize(num_prompts);
  common_.assign(num_prompts, 0);
  std::iota(order_.begin(), order_.end(), 0);
  std::vector<Range> todo;
  if (roots.empty()) {
    todo.push_back({0, num_prompts, 0});
  } else {
    std::stable_sort(order_.begin(), order_.end(), [&](int64_t a, int64_t b) { return roots[a] < roots[b]; });
    for (int64_t begin = 0, end = 0; begin < num_prompts; begin = end) {
      while (end < num_prompts && roots[order_[end]] == roots[order_[begin]]) ++end;
      todo.push_back({begin, end, 0});
    }
  }
  // A range is split by where its prompts leave the first of them. A prompt is compared with one other prompt
  // from the depth at which it came into the range to where it leaves, so no token is compared twice.
  std::vector<Parting> partings;
  while (!todo.empty()) {
    const Range range = todo.back();
    todo.pop_back();
    if (range.end - range.begin < 2) continue;
    const auto length = [&](int64_t prompt) { return starts[prompt + 1] - starts[prompt]; };
    const int64_t first = order_[range.begin];
    const int32_t* first_tokens = token_ids.data() + starts[first];
    partings.clear();
    for (int64_t place = range.begin + 1; place < range.end; ++place) {
      const int64_t prompt = order_[place];
      const int32_t* tokens = token_ids.data() + starts[prompt];
      const int64_t same =
          first_difference(first_tokens, tokens, range.depth, std::min(length(first), length(prompt)));
      partings.push_back({same, same < length(prompt) ? tokens[same] : -1, prompt});
    }
    std::sort(partings.begin(), partings.end());
    const int64_t base = range.begin + 1;
    const auto count = static_cast<int64_t>(partings.size());
    for (int64_t begin = 0, end = 0; begin < count; begin = end) {
      const Parting& head = partings[begin];
      for (; end < count && partings[end].length == head.length && partings[end].next == head.next; ++end) {
        order_[base + end] = partings[end].prompt;
        common_[base + end] = head.length;
      }
      if (head.next >= 0) todo.push_back({base + begin, base + end, head.length + 1});
    }
  }
}

void PrefixAnalysis::build(std::span<const int64_t> starts, int block_size) {
  const auto num_prompts = static_cast<int64_t>(order_.size());
  num_computed_ = min_computed_ = num_tokens_;
  parent_.assign(num_prompts + 1, -1);
  depth_.assign(1, 0);
  std::vector<int64_t> open{0};  // the nodes on the path to the present place
  for (int64_t place = 1; place <= num_prompts; ++place) {
    const int64_t raw = place < num_prompts ? common_[place] : 0;
    const int64_t shared = raw / block_size * block_size;
    num_computed_ -= shared;
    min_computed_ -= raw;
    if (place < num_prompts) {
      const int64_t before = order_[place - 1], prompt = order_[place];
      const int64_t length = starts[prompt + 1] - starts[prompt];
      if (raw == length && raw == starts[before + 1] - starts[before]) {  // equal: one row is computed again
        min_computed_ += 1;
        if (length % block_size == 0) num_computed_ += block_size;
      }
    }
    int64_t pending = place - 1;  // of which the parent is still to be found: first a leaf, then nodes
    while (depth_[open.back()] > shared) {
      parent_[pending] = open.back();
      pending = num_prompts + open.back();
      postorder_.push_back(open.back());
      open.pop_back();
    }
    if (depth_[open.back()] < shared) {
      open.push_back(static_cast<int64_t>(depth_.size()));
      depth_.push_back(shared);
      parent_.push_back(-1);
    }
    parent_[pending] = open.back();
  }
  postorder_.push_back(0);
}

void PrefixAnalysis::arrange(std::span<const int64_t> starts, std::span<const int64_t> expected_output) {
  const auto num_prompts = static_cast<int64_t>(order_.size());
  const auto num_nodes = static_cast<int64_t>(depth_.size());
  const auto length = [&](int64_t leaf) { return starts[order_[leaf] + 1] - starts[order_[leaf]]; };
  // What lies below each leaf and node.
  std::vector<int64_t> cost(num_prompts + num_nodes, 0);    // tokens to compute
  std::vector<int64_t> output(num_prompts + num_nodes, 0);  // tokens expected to be generated
  std::vector<int64_t> earliest(num_prompts + num_nodes, num_prompts);
  std::vector<int64_t> num_leaves(num_nodes, 0);
  std::vector<int64_t> first_child(num_nodes + 1,
                                   0);  // children of v: child[first_child[v], first_child[v+1])
  for (int64_t leaf = 0; leaf < num_prompts; ++leaf) {
    const int64_t v = parent_[leaf];
    cost[leaf] = std::max<int64_t>(1, length(leaf) - depth_[v]);
    output[leaf] = expected_output.empty() ? 0 : expected_output[order_[leaf]];
    earliest[leaf] = order_[leaf];
  }
  const auto hand_up = [&](int64_t child) {
    const int64_t v = parent_[child];
    cost[num_prompts + v] += cost[child];
    output[num_prompts + v] += output[child];
    earliest[num_prompts + v] = std::min(earliest[num_prompts + v], earliest[child]);
    num_leaves[v] += child < num_prompts ? 1 : num_leaves[child - num_prompts];
    ++first_child[v + 1];
  };
  for (int64_t leaf = 0; leaf < num_prompts; ++leaf) hand_up(leaf);
  for (const int64_t v : postorder_) {
    if (v == 0) continue;
    cost[num_prompts + v] += depth_[v] - depth_[parent_[num_prompts + v]];
    hand_up(num_prompts + v);
  }
  std::partial_sum(first_child.begin(), first_child.end(), first_child.begin());
  std::vector<int64_t> child(first_child.back());
  std::vector<int64_t> fill(first_child.begin(), first_child.end() - 1);
  for (int64_t leaf = 0; leaf < num_prompts; ++leaf) child[fill[parent_[leaf]]++] = leaf;
  for (int64_t v = 1; v < num_nodes; ++v) child[fill[parent_[num_prompts + v]]++] = num_prompts + v;

  // A prompt that ends where its node ends goes first: it computes its node's last block, which those after
  // it find, while it would have to compute that block again after them.
  const auto ends_here = [&](int64_t c) { return c < num_prompts && length(c) == depth_[parent_[c]]; };
  const auto before = [&](int64_t a, int64_t b) {
    if (ends_here(a) != ends_here(b)) return ends_here(a);
    const auto left = static_cast<double>(output[a]) * static_cast<double>(cost[b]);
    const auto right = static_cast<double>(output[b]) * static_cast<double>(cost[a]);
    return left != right ? left > right : earliest[a] < earliest[b];
  };
  for (int64_t v = 0; v < num_nodes; ++v) {
    std::sort(child.begin() + first_child[v], child.begin() + first_child[v + 1], before);
  }

  std::vector<int64_t> arranged;
  arranged.reserve(num_prompts);
  std::vector<int64_t> number(num_nodes, -1);  // of a node in nodes_
  node_of_.assign(num_prompts, -1);
  nodes_.reserve(num_nodes - 1);
  std::vector<int64_t> todo{num_prompts};
  while (!todo.empty()) {
    const int64_t next = todo.back();
    todo.pop_back();
    if (next < num_prompts) {
      arranged.push_back(order_[next]);
      node_of_[order_[next]] = number[parent_[next]];
      continue;
    }
    const int64_t v = next - num_prompts;
    if (v != 0) {
      const int64_t up = parent_[next];
      number[v] = static_cast<int64_t>(nodes_.size());
      nodes_.push_back({number[up], depth_[up], depth_[v], static_cast<int64_t>(arranged.size()),
                        num_leaves[v], first_child[v + 1] - first_child[v]});
    }
    todo.insert(todo.end(), std::make_reverse_iterator(child.begin() + first_child[v + 1]),
                std::make_reverse_iterator(child.begin() + first_child[v]));
  }
  order_ = std::move(arranged);
  common_ = {};
  parent_ = {};
  depth_ = {};
  postorder_ = {};
}

SingleLevelGroups PrefixAnalysis::single_level() const {
  const auto num_nodes = static_cast<int64_t>(nodes_.size());
  // Node v of the analysis is v + 1 here; 0 is the root. Prompts that are children of a node are only
  // counted.
  std::vector<int64_t> length(num_nodes + 1, 0), num_leaves(num_nodes + 1, 0), num_direct(num_nodes + 1, 0);
  std::vector<std::vector<int64_t>> children(num_nodes + 1);
  for (int64_t v = 1; v <= num_nodes; ++v) {
    length[v] = nodes_[v - 1].end - nodes_[v - 1].begin;
    num_leaves[v] = nodes_[v - 1].num_prompts;
    num_direct[v] = nodes_[v - 1].num_children;
    children[nodes_[v - 1].parent + 1].push_back(v);
  }
  for (int64_t v = 1; v <= num_nodes; ++v) num_direct[v] -= static_cast<int64_t>(children[v].size());
  std::vector<int64_t> home(num_nodes + 1);  // where the prompts of a node are: there, or at an ancestor
  std::iota(home.begin(), home.end(), 0);
  for (int64_t v = num_nodes; v >= 0; --v) {  // children have larger numbers: they come first
    std::vector<int64_t> own, moved;
    for (const int64_t c : children[v]) {
      std::vector<int64_t> kept;
      for (const int64_t g : children[c]) {
        if ((num_leaves[g] - 1) * length[g] > length[c]) {
          length[g] += length[c];
          num_leaves[c] -= num_leaves[g];
          moved.push_back(g);
        } else {
          kept.push_back(g);
        }
      }
      if (num_direct[c] == 0 && kept.size() == 1) {  // one child is left: the two become one node
        length[kept[0]] += length[c];
        own.push_back(kept[0]);
      } else if (num_direct[c] == 1 && kept.empty()) {  // one prompt is left: c was its alone
        home[c] = v;
        ++num_direct[v];
      } else if (num_direct[c] > 0 || !kept.empty()) {
        own.push_back(c);
      }
      children[c] = std::move(kept);
    }
    own.insert(own.end(), moved.begin(), moved.end());
    children[v] = std::move(own);
  }
  SingleLevelGroups found;
  found.group.assign(order_.size(), -1);
  std::vector<int64_t> group(num_nodes + 1, -1);
  std::vector<int64_t> todo;
  for (const int64_t top : children[0]) {
    todo.push_back(top);
    while (!todo.empty()) {
      const int64_t v = todo.back();
      todo.pop_back();
      group[v] = static_cast<int64_t>(found.prefix_length.size());
      todo.insert(todo.end(), children[v].begin(), children[v].end());
    }
    found.prefix_length.push_back(length[top]);
  }
  for (int64_t v = 1; v <= num_nodes; ++v) home[v] = home[v] == v ? v : home[home[v]];
  for (size_t prompt = 0; prompt < order_.size(); ++prompt) {
    found.group[prompt] = group[home[node_of_[prompt] + 1]];
  }
  return found;
}

}  // namespace fs
