// SPDX-License-Identifier: Apache-2.0
#include "plan/step_arrays.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <utility>

#include "core/error.h"

namespace fs {

namespace {

constexpr int64_t kPiece = 4;  // int32 numbers: 16 bytes

// The next larger of a few numbers of rows.
int64_t padded_rows(int64_t rows) {
  if (rows <= 8) return static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(rows)));
  return (rows + 7) / 8 * 8;
}

int64_t power_above(int64_t count) {
  return int64_t{1} << std::bit_width(static_cast<uint64_t>(count));
}

}  // namespace

StepArrays::StepArrays(StepArraysOptions options) : options_(std::move(options)) {
  FS_CHECK(options_.attention.block_size >= 1,
           "step arrays: block_size is " << options_.attention.block_size << "; must be at least 1");
  FS_CHECK(!options_.windows.empty(), "step arrays: no attention window is given; 0 is one");
}

// Returns the length of the longest block table.
int64_t StepArrays::check(std::span<const StepRequest> requests) const {
  FS_CHECK(!requests.empty(), "step arrays: a step has at least one request");
  size_t longest = 0;
  for (size_t i = 0; i < requests.size(); ++i) {
    const StepRequest& request = requests[i];
    const int64_t end = request.start + static_cast<int64_t>(request.token_ids.size());
    const int64_t held = static_cast<int64_t>(request.block_ids.size()) * options_.attention.block_size;
    FS_CHECK(request.start >= 0 && end > request.start && end <= held && end <= INT32_MAX,
             "step arrays: request " << i << " is to compute tokens " << request.start << " to " << end
                                     << "; its " << request.block_ids.size() << " blocks hold " << held);
    longest = std::max(longest, request.block_ids.size());
  }
  return static_cast<int64_t>(longest);
}

void StepArrays::build(std::span<const StepRequest> requests, int num_workers) {
  const int64_t width = check(requests);
  const auto num_requests = static_cast<int64_t>(requests.size());
  const int block_size = options_.attention.block_size;
  tables_.assign(static_cast<size_t>(num_requests * width), -1);
  shareable_.clear();
  for (int64_t i = 0; i < num_requests; ++i) {
    const StepRequest& request = requests[static_cast<size_t>(i)];
    std::copy(request.block_ids.begin(), request.block_ids.end(), tables_.begin() + i * width);
    // Shared is what a request only reads: whole blocks before its first row.
    shareable_.push_back(static_cast<int32_t>(request.start / block_size));
  }
  const PrefixGroups found = find_prefix_groups(tables_, width, shareable_, block_size);
  place_rows(requests, found.order);

  const int64_t num_tokens = query_start_.back();
  is_recordable_ = num_tokens == num_requests && sample_rows_.size() == requests.size() &&
                   num_requests <= options_.max_decodes;
  const bool padded = is_recordable_ && options_.fixed_shapes;
  const int64_t rows = padded ? std::min(padded_rows(num_tokens), options_.max_decodes) : num_tokens;
  const int64_t columns = padded ? static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(width))) : width;

  numbers_.clear();
  arrays_.clear();
  begins_.clear();
  add_tokens(requests, found.order, rows);
  int32_t* table = add(padded ? rows : num_requests, columns, -1);
  for (const int32_t request : found.order) {
    std::copy_n(tables_.begin() + request * width, width, table);
    table += columns;
  }
  int32_t* sample_rows = add(padded ? rows : static_cast<int64_t>(sample_rows_.size()), 0, 0);
  std::copy(sample_rows_.begin(), sample_rows_.end(), sample_rows);
  num_slots_ = num_merges_ = 0;
  AttentionPlanOptions attention = options_.attention;
  attention.num_workers = num_workers;
  for (size_t w = 0; w < options_.windows.size(); ++w) {
    attention.window = options_.windows[w];
    const AttentionPlan plan(query_start_, seq_lens_, attention, found.groups);
    if (w == 0) num_kv_tokens_spared_ += plan.num_tokens_spared();
    add_attention(plan, padded);
  }
}

// Which rows each request has, and what comes of that.
void StepArrays::place_rows(std::span<const StepRequest> requests, std::span<const int32_t> order) {
  query_start_.assign(1, 0);
  seq_lens_.clear();
  row_starts_.resize(requests.size());
  for (const int32_t place : order) {
    const StepRequest& request = requests[static_cast<size_t>(place)];
    const auto count = static_cast<int32_t>(request.token_ids.size());
    row_starts_[static_cast<size_t>(place)] = query_start_.back();
    query_start_.push_back(query_start_.back() + count);
    seq_lens_.push_back(static_cast<int32_t>(request.start) + count);
    num_kv_tokens_ += seq_lens_.back();
  }
  sample_rows_.clear();
  for (size_t i = 0; i < requests.size(); ++i) {
    if (requests[i].samples)
      sample_rows_.push_back(row_starts_[i] + static_cast<int32_t>(requests[i].token_ids.size()) - 1);
  }
}

void StepArrays::add_tokens(std::span<const StepRequest> requests, std::span<const int32_t> order,
                            int64_t num_rows) {
  int32_t* token_ids = add(num_rows, 0, 0);
  for (const int32_t place : order) {
    const auto& given = requests[static_cast<size_t>(place)].token_ids;
    token_ids = std::copy(given.begin(), given.end(), token_ids);
  }
  int32_t* position = add(num_rows, 0, 0);
  for (const int32_t place : order) {
    const StepRequest& request = requests[static_cast<size_t>(place)];
    for (size_t i = 0; i < request.token_ids.size(); ++i) {
      *position++ = static_cast<int32_t>(request.start + static_cast<int64_t>(i));
    }
  }
  int32_t* slot = add(num_rows, 0, -1);
  const int64_t size = options_.attention.block_size;
  for (const int32_t place : order) {
    const StepRequest& request = requests[static_cast<size_t>(place)];
    const int64_t end = request.start + static_cast<int64_t>(request.token_ids.size());
    for (int64_t at = request.start; at < end; ++at) {
      *slot++ = static_cast<int32_t>(request.block_ids[static_cast<size_t>(at / size)] * size + at % size);
    }
  }
}

void StepArrays::add_attention(const AttentionPlan& plan, bool padded) {
  const auto append = [&]<class T>(const std::vector<T>& given, int64_t columns) {
    const auto rows = static_cast<int64_t>(given.size());
    int32_t* to = add(padded ? power_above(rows) : rows, columns, 0);
    if (rows > 0) std::memcpy(to, given.data(), given.size() * sizeof(T));
  };
  append(plan.items(), kItemFields);
  append(plan.merges(), kMergeFields);
  num_merges_ = std::max(num_merges_, arrays_.back().shape[0]);
  append(plan.parts(), 0);
  num_slots_ = std::max(num_slots_, plan.num_slots());
}

// A further array; what is returned is valid until the next one.
int32_t* StepArrays::add(int64_t rows, int64_t columns, int32_t filler) {
  Tensor array;
  array.dtype = DType::i32;
  array.present = true;
  array.ndim = columns == 0 ? 1 : 2;
  array.shape[0] = rows;
  array.shape[1] = columns;
  array.stride[0] = std::max<int64_t>(columns, 1);
  array.stride[1] = 1;
  const auto begin = numbers_.size();
  const int64_t count = array.numel();
  numbers_.resize(begin + static_cast<size_t>(std::max<int64_t>(1, (count + kPiece - 1) / kPiece) * kPiece),
                  filler);
  arrays_.push_back(array);
  begins_.push_back(static_cast<int64_t>(begin));
  return numbers_.data() + begin;
}

void StepArrays::write(const Tensor& memory) {
  FS_CHECK(memory.dtype == DType::i32 && memory.device == Device::cpu && memory.ndim == 1 &&
               memory.stride[0] == 1 && memory.shape[0] >= size(),
           "step arrays: memory is " << describe(memory) << "; must be at least " << size()
                                     << " contiguous int32 on cpu");
  std::memcpy(memory.data, numbers_.data(), numbers_.size() * sizeof(int32_t));
  for (size_t i = 0; i < arrays_.size(); ++i) arrays_[i].data = memory.ptr<int32_t>() + begins_[i];
}

}  // namespace fs
