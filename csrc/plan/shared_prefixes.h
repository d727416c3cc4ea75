// SPDX-License-Identifier: Apache-2.0
//
// Which of a step's common prefixes are read once for all their readers, and which by each reader for itself.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "plan/attention_plan.h"

namespace fs {

// The groups to share, cut to whole spans: a child begins where its closest shared ancestor ends (0: none).
// What is left out, each reader reads for itself.
//
// Sharing saves reads of KV and costs partial results. A node is shared if it saves more tokens than the
// partials of its readers' rows are worth; else its tokens are offered to its children. (FastTree makes the
// same choice; here its price is bytes.) Under a sliding window a node is shared only while all its readers
// see all of it. Throws fs::Error with the values if the groups are no tree in depth-first order, or if a row
// of a reader does not come after the group's tokens.
std::vector<PrefixGroup> choose_shared_prefixes(std::span<const PrefixGroup> groups,
                                                std::span<const int32_t> query_start,
                                                std::span<const int32_t> seq_lens,
                                                const AttentionPlanOptions& options);

}  // namespace fs
