// SPDX-License-Identifier: Apache-2.0
#include "plan/shared_prefixes.h"

#include <algorithm>

#include "core/error.h"

namespace fs {

namespace {

// An item more costs about as much as this many tokens.
constexpr int64_t kTokensPerItem = 64;

struct Ancestor {
  const PrefixGroup* group;
  int32_t shared_end;  // up to here its readers share
};

int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

}  // namespace

std::vector<PrefixGroup> choose_shared_prefixes(std::span<const PrefixGroup> groups,
                                                std::span<const int32_t> query_start,
                                                std::span<const int32_t> seq_lens,
                                                const AttentionPlanOptions& options) {
  const auto num_requests = static_cast<int32_t>(seq_lens.size());
  const int64_t rows_per_item = std::max(1, options.rows_per_item / options.group_size);
  const int64_t rows_per_shared_item = std::max(1, options.rows_per_shared_item / options.group_size);
  std::vector<PrefixGroup> shared;
  std::vector<Ancestor> ancestors;
  for (size_t i = 0; i < groups.size(); ++i) {
    const PrefixGroup& group = groups[i];
    while (!ancestors.empty() && ancestors.back().group->request_end <= group.request_begin)
      ancestors.pop_back();
    const PrefixGroup* parent = ancestors.empty() ? nullptr : ancestors.back().group;
    FS_CHECK(group.request_begin >= 0 && group.request_begin < group.request_end &&
                 group.request_end <= num_requests,
             "attention plan: groups[" << i << "] has requests " << group.request_begin << " to "
                                       << group.request_end << " of " << num_requests);
    FS_CHECK(group.kv_begin == (parent == nullptr ? 0 : parent->kv_end) && group.kv_begin < group.kv_end,
             "attention plan: groups[" << i << "] has KV tokens " << group.kv_begin << " to " << group.kv_end
                                       << "; must begin where its parent ends, at "
                                       << (parent == nullptr ? 0 : parent->kv_end));
    const bool in_order = parent != nullptr ? group.request_begin >= parent->request_begin &&
                                                  group.request_end <= parent->request_end
                                            : i == 0 || group.request_begin >= groups[i - 1].request_begin;
    FS_CHECK(in_order, "attention plan: groups[" << i << "] with requests " << group.request_begin << " to "
                                                 << group.request_end << " is not in depth-first order");

    const int32_t begin = ancestors.empty() ? 0 : ancestors.back().shared_end;
    const int32_t end = group.kv_end / options.span * options.span;
    int64_t unshared_passes = 0;
    int64_t partials = 0;  // of one query head, which there would not be else
    bool all_see_all = true;
    for (int32_t b = group.request_begin; b < group.request_end; ++b) {
      const int32_t num_rows = query_start[b + 1] - query_start[b];
      if (num_rows == 0) continue;
      FS_CHECK(seq_lens[b] - num_rows >= group.kv_end,
               "attention plan: request " << b << " shares " << group.kv_end << " tokens in groups[" << i
                                          << "]; its rows begin at token " << seq_lens[b] - num_rows
                                          << " and must come after them");
      unshared_passes += divide_up(num_rows, rows_per_item);
      // Rows that share anything store all later spans as partials too. An ancestor has paid for that.
      if (begin == 0) partials += num_rows * (1 + divide_up(seq_lens[b] - end, options.span));
      all_see_all = all_see_all && (options.window == 0 || seq_lens[b] <= options.window);
    }
    const int64_t num_rows = query_start[group.request_end] - query_start[group.request_begin];
    const int64_t shared_passes = divide_up(num_rows, rows_per_shared_item);
    const int64_t saved = (unshared_passes - shared_passes) * (end - begin);
    const int64_t spent =
        shared_passes * kTokensPerItem + partials * options.group_size * options.tokens_per_partial;
    const bool is_shared = end > begin && all_see_all && saved > spent;
    if (is_shared) shared.push_back({begin, end, group.request_begin, group.request_end});
    ancestors.push_back({&group, is_shared ? end : begin});
  }
  return shared;
}

}  // namespace fs
