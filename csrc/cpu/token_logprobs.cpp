// SPDX-License-Identifier: Apache-2.0
//
// Log-softmax and rank of one token of each row, and the row's L most likely tokens. The normaliser is summed
// in one fixed order: 16 interleaved float sums in each block of 64 tokens, the blocks one by one in double.
#include "cpu/parallel.h"
#include "cpu/sample_scan.h"
#include "cpu/sample_select.h"
#include "ops/ops.h"

namespace fs::FS_ISA {

namespace {

constexpr int kSums = 16;

double sum_of_weights(const float* row, int64_t vocab, const float* block_max, float max) {
  double total = 0.0;
  for (int64_t begin = 0; begin < vocab; begin += kBlock) {
    if (!((block_max[begin / kBlock] - max) * kLog2E >= -126.0f)) continue;
    float weights[kBlock] = {};
    const int64_t count = begin + kBlock <= vocab ? kBlock : vocab - begin;
    for (int64_t i = 0; i < count; ++i) weights[i] = row[begin + i];
    for (int64_t i = count; i < kBlock; ++i) weights[i] = kMinusInfinity;
    for (int64_t i = 0; i < kBlock; ++i) weights[i] = power_of_two((weights[i] - max) * kLog2E);
    float sums[kSums] = {};
    for (int64_t i = 0; i < kBlock; i += kSums) {
      for (int j = 0; j < kSums; ++j) sums[j] += weights[i + j];
    }
    double sum = 0.0;
    for (int j = 0; j < kSums; ++j) sum += static_cast<double>(sums[j]);
    total += sum;
  }
  return total;
}

int32_t rank_of(const float* row, int64_t vocab, int64_t id) {
  const float logit = row[id];
  int32_t before = 0;
  for (int64_t i = 0; i < id; ++i) before += row[i] >= logit;
  for (int64_t i = id + 1; i < vocab; ++i) before += row[i] > logit;
  return 1 + before;
}

// The first `count` ids of the row in the order (logit descending, id ascending).
class Ranking {
 public:
  Ranking(const float* row, int32_t* ids) : row_(row), ids_(ids) {}

  // Heap sort: bounded for any count, and in place.
  void sort(int64_t count) {
    for (int64_t i = count / 2; i-- > 0;) sift_down(i, count);
    for (int64_t end = count - 1; end > 0; --end) {
      const int32_t last = ids_[0];
      ids_[0] = ids_[end];
      ids_[end] = last;
      sift_down(0, end);
    }
  }

 private:
  bool before(int32_t a, int32_t b) const { return row_[a] > row_[b] || (row_[a] == row_[b] && a < b); }

  void sift_down(int64_t parent, int64_t count) {
    const int32_t id = ids_[parent];
    while (true) {
      int64_t child = 2 * parent + 1;
      if (child >= count) break;
      if (child + 1 < count && before(ids_[child], ids_[child + 1])) ++child;
      if (!before(id, ids_[child])) break;
      ids_[parent] = ids_[child];
      parent = child;
    }
    ids_[parent] = id;
  }

  const float* row_;
  int32_t* ids_;
};

void rank_top(const float* row, int64_t vocab, const float* block_max, int64_t num_top,
              Candidates& candidates) {
  if (num_top == 0) return;
  const int64_t blocks = num_blocks(vocab);
  const float bound = bound_of_top_k(block_max, blocks, num_top);
  for (int64_t block = 0; block < blocks; ++block) {
    if (!(block_max[block] >= bound)) continue;
    const int64_t end = (block + 1) * kBlock < vocab ? (block + 1) * kBlock : vocab;
    for (int64_t id = block * kBlock; id < end; ++id) {
      if (row[id] >= bound) candidates.add(id, 0.0f);
    }
  }
  keep_top_k(candidates, row, num_top);
  Ranking(row, candidates.ids).sort(candidates.count);
}

void logprobs_of_row(const TokenLogprobs& op, int64_t b, float* workspace) {
  const int64_t vocab = op.logits.shape[1];
  const int64_t num_top = op.top_ids.shape[1];
  const float* row = op.logits.ptr<const float>() + b * op.logits.stride[0];
  float* block_max = workspace + vocab;
  Candidates candidates{reinterpret_cast<int32_t*>(workspace + 2 * vocab), workspace + 3 * vocab, 0};
  const int64_t id = op.token_ids.ptr<const int32_t>()[b];
  float& logprob = op.logprobs.ptr<float>()[b];
  int32_t& rank = op.ranks.ptr<int32_t>()[b];
  int32_t* top_ids = op.top_ids.ptr<int32_t>() + b * num_top;
  float* top_logprobs = op.top_logprobs.ptr<float>() + b * num_top;

  logprob = __builtin_nanf("");
  rank = 0;
  const Scan found = scan(row, vocab, block_max);
  if (!found.sound || found.max == kMinusInfinity) {
    for (int64_t i = 0; i < num_top; ++i) {
      top_ids[i] = -1;
      top_logprobs[i] = __builtin_nanf("");
    }
    return;
  }
  const double log_sum =
      static_cast<double>(found.max) + __builtin_log(sum_of_weights(row, vocab, block_max, found.max));
  const auto logprob_of = [&](int64_t i) {
    return static_cast<float>(static_cast<double>(row[i]) - log_sum);
  };
  if (id >= 0) {
    logprob = logprob_of(id);
    rank = rank_of(row, vocab, id);
  }
  rank_top(row, vocab, block_max, num_top, candidates);
  for (int64_t i = 0; i < num_top; ++i) {
    top_ids[i] = candidates.ids[i];
    top_logprobs[i] = logprob_of(candidates.ids[i]);
  }
}

void token_logprobs(const TokenLogprobs& op, const OpContext&) {
  const int64_t num_rows = op.logits.shape[0];
  const int64_t vocab = op.logits.shape[1];
  FS_CHECK(vocab >= 1 && vocab < (int64_t{1} << 31),
           "token_logprobs: the vocabulary has " << vocab << " tokens");
  FS_CHECK(op.top_ids.shape[1] <= vocab,
           "token_logprobs: the " << op.top_ids.shape[1] << " largest are asked for; the vocabulary has "
                                  << vocab << " tokens");
  FS_CHECK(op.workspace.shape[0] >= pool().num_threads(),
           "token_logprobs: workspace has " << op.workspace.shape[0] << " rows; expected one for each of the "
                                            << pool().num_threads() << " threads");
  for (int64_t b = 0; b < num_rows; ++b) {
    const int32_t id = op.token_ids.ptr<const int32_t>()[b];
    FS_CHECK(id >= -1 && id < vocab, "token_logprobs: token_ids[" << b << "] is " << id
                                                                  << "; the vocabulary has " << vocab
                                                                  << " tokens");
  }
  parallel_rows(num_rows, 1, [&](int64_t b, int64_t, int worker) {
    logprobs_of_row(op, b, op.workspace.ptr<float>() + worker * op.workspace.shape[1]);
  });
}

}  // namespace

FS_REGISTER_CPU(TokenLogprobs, token_logprobs, DType::f32)

}  // namespace fs::FS_ISA
