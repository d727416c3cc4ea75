// SPDX-License-Identifier: Apache-2.0
#include "plan/prefix_groups.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <utility>

#include "core/error.h"

namespace fs {

namespace {

// The first index in [begin, end) where the tables differ, or end.
int32_t first_difference(const int32_t* a, const int32_t* b, int32_t begin, int32_t end) {
  constexpr int32_t kStep = 16;
  while (end - begin >= kStep && std::memcmp(a + begin, b + begin, kStep * sizeof(int32_t)) == 0)
    begin += kStep;
  while (begin < end && a[begin] == b[begin]) ++begin;
  return begin;
}

struct Range {
  int32_t begin, end;  // places
  int32_t depth;       // blocks that all requests in them share
};

}  // namespace

PrefixGroups find_prefix_groups(std::span<const int32_t> block_tables, int64_t row_length,
                                std::span<const int32_t> num_shareable, int block_size) {
  FS_CHECK(block_size >= 1, "prefix groups: block_size is " << block_size << "; must be at least 1");
  const auto num_requests = static_cast<int32_t>(num_shareable.size());
  FS_CHECK(static_cast<int64_t>(block_tables.size()) == num_requests * row_length,
           "prefix groups: " << block_tables.size() << " entries in the block tables of " << num_requests
                             << " requests with " << row_length << " blocks each");
  for (int32_t b = 0; b < num_requests; ++b) {
    FS_CHECK(num_shareable[b] >= 0 && num_shareable[b] <= row_length,
             "prefix groups: request " << b << " may share " << num_shareable[b] << " blocks; its table has "
                                       << row_length);
  }
  const auto table = [&](int32_t request) { return block_tables.data() + request * row_length; };

  PrefixGroups found;
  found.order.resize(num_shareable.size());
  std::iota(found.order.begin(), found.order.end(), 0);
  std::vector<std::pair<int32_t, int32_t>> keys;  // next block, request
  std::vector<Range> todo{{0, num_requests, 0}};  // a stack: the leftmost range on top
  std::vector<Range> children;
  while (!todo.empty()) {
    Range range = todo.back();
    todo.pop_back();
    if (range.end - range.begin < 2) continue;
    // How far all of them agree: that is the node.
    const int32_t first = found.order[range.begin];
    int32_t depth = num_shareable[first];
    for (int32_t place = range.begin + 1; place < range.end && depth > range.depth; ++place) {
      const int32_t request = found.order[place];
      depth = first_difference(table(first), table(request), range.depth,
                               std::min(depth, num_shareable[request]));
    }
    if (depth > range.depth) {
      found.groups.push_back({range.depth * block_size, depth * block_size, range.begin, range.end});
    }
    // They part here: those that go on with the same block become neighbours.
    keys.clear();
    for (int32_t place = range.begin; place < range.end; ++place) {
      const int32_t request = found.order[place];
      keys.emplace_back(num_shareable[request] > depth ? table(request)[depth] : -1, request);
    }
    std::sort(keys.begin(), keys.end());
    children.clear();
    for (int32_t begin = 0, end = 0; begin < range.end - range.begin; begin = end) {
      while (end < range.end - range.begin && keys[end].first == keys[begin].first) ++end;
      if (keys[begin].first >= 0) children.push_back({range.begin + begin, range.begin + end, depth});
    }
    for (int32_t i = 0; i < range.end - range.begin; ++i) found.order[range.begin + i] = keys[i].second;
    todo.insert(todo.end(), children.rbegin(), children.rend());
  }
  if (found.groups.empty()) std::iota(found.order.begin(), found.order.end(), 0);
  return found;
}

}  // namespace fs
