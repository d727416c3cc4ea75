// SPDX-License-Identifier: Apache-2.0
//
// StepArrays: a step's integers as the flat arrays that a model's forward pass takes, one after another in
// one piece of memory. Made anew for every step; keeps its own memory from step to step.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "core/tensor.h"
#include "plan/attention_plan.h"

namespace fs {

// One request's share of a step: compute token_ids, which begin at position `start`.
struct StepRequest {
  std::span<const int32_t> token_ids;  // the new ones
  int64_t start = 0;
  bool samples = false;                // the last of them gives the request's next token
  std::span<const int32_t> block_ids;  // cover start + token_ids.size() tokens
};

struct StepArraysOptions {
  AttentionPlanOptions attention;  // of all windows; its `window` and `num_workers` are not used
  std::vector<int> windows;        // one plan for each
  // A step of decodes alone, of at most max_decodes requests, can be recorded. With fixed_shapes such steps
  // are padded to few sizes, for recordings that cannot take others than they were made with.
  int64_t max_decodes = 0;
  bool fixed_shapes = false;
};

// The arrays, by number; int32. Rows are the step's tokens, request after request. Requests stand depth-first
// in the tree of the prefixes that they share, so that the readers of a prefix are neighbours. A padding row
// is a token at position 0 that is written to no slot; a padding item or merge has no rows.
//   0  token_ids     [T]
//   1  positions     [T]
//   2  slot_mapping  [T]      block * block_size + offset of the token's key and value
//   3  block_tables  [B, MB]  -1 where a request has no block
//   4  sample_rows   [R]      the last row of each request that samples, in the order given
//   5 + 3 w, 6 + 3 w, 7 + 3 w  items [I, 10], merges [J, 5] and parts [P] of the plan for windows[w]
inline constexpr int kTokenIds = 0, kPositions = 1, kSlotMapping = 2, kBlockTables = 3, kSampleRows = 4,
                     kAttention = 5;

class StepArrays {
 public:
  // Throws fs::Error on options that no AttentionPlan takes, at the first step.
  explicit StepArrays(StepArraysOptions options);
  StepArrays(const StepArrays&) = delete;
  StepArrays& operator=(const StepArrays&) = delete;

  // `num_workers` as for an AttentionPlan. Throws fs::Error naming the request (by its place) and the values
  // if there are no requests, or one has no tokens, too few blocks or a negative number.
  void build(std::span<const StepRequest> requests, int num_workers);

  // Copies the arrays to `memory`, int32 of at least size(). That is where arrays() are from then on; the
  // memory is borrowed until the next step.
  void write(const Tensor& memory);

  int64_t size() const { return static_cast<int64_t>(numbers_.size()); }  // int32 numbers, gaps included
  // At 16-byte boundaries of the memory, at different addresses even if empty. Empty before the first step.
  const std::vector<Tensor>& arrays() const { return arrays_; }
  int64_t begin(size_t array) const { return begins_[array]; }

  // One token of each request, all sampled: such steps look alike, so one is recorded and run again.
  bool is_recordable() const { return is_recordable_; }
  bool fixed_shapes() const { return options_.fixed_shapes; }
  int64_t num_rows() const { return arrays_.empty() ? 0 : arrays_[kTokenIds].shape[0]; }  // with padding
  const std::vector<int32_t>& row_starts() const { return row_starts_; }  // first row of each request
  int64_t num_kv_tokens() const { return num_kv_tokens_; }  // of all requests of all steps so far
  // Of these, tokens of shared prefixes that need no second read, by the first window.
  int64_t num_kv_tokens_spared() const { return num_kv_tokens_spared_; }
  int64_t num_slots() const { return num_slots_; }    // of workspace, the most that a window needs
  int64_t num_merges() const { return num_merges_; }  // the most that a window has, with padding

 private:
  int64_t check(std::span<const StepRequest> requests) const;
  void place_rows(std::span<const StepRequest> requests, std::span<const int32_t> order);
  void add_tokens(std::span<const StepRequest> requests, std::span<const int32_t> order, int64_t num_rows);
  void add_attention(const AttentionPlan& plan, bool padded);
  int32_t* add(int64_t rows, int64_t columns, int32_t filler);  // columns 0: one dimension

  StepArraysOptions options_;
  std::vector<int32_t> numbers_;
  std::vector<Tensor> arrays_;
  std::vector<int64_t> begins_;
  std::vector<int32_t> tables_, shareable_, query_start_, seq_lens_, row_starts_, sample_rows_;
  bool is_recordable_ = false;
  int64_t num_kv_tokens_ = 0, num_kv_tokens_spared_ = 0, num_slots_ = 0, num_merges_ = 0;
};

}  // namespace fs
