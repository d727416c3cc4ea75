// SPDX-License-Identifier: Apache-2.0
//
// The next token of each row. Declared, with the exact meaning of every filter, in ops/ops.h.
//
// Work per row: one pass over the logits for the maxima of blocks; greedy needs no more. Top-k takes from
// them a lower bound of the k-th logit and looks only into blocks above it. Top-p needs the total mass, one
// pass of exponentials, and from it knows a mass below which no token can be in the prefix. Without either,
// one pass of exponentials and noise. Rows run in parallel, a row on one thread: 49,152 tokens take tens of
// microseconds.
#include "cpu/parallel.h"
#include "cpu/sample_logits.h"
#include "cpu/sample_race.h"
#include "cpu/sample_scan.h"
#include "cpu/sample_select.h"
#include "ops/ops.h"

namespace fs::FS_ISA {

namespace {

constexpr int32_t kUnsound = -1;
constexpr int32_t kNothingAllowed = -2;

struct RowScale {
  float max;
  float per_logit;  // log2(e) / temperature
  float floor;      // tokens with a smaller log2 weight are excluded by min_p

  float log2_weight(float logit) const { return (logit - max) * per_logit; }
  float weight(float logit) const {
    const float t = log2_weight(logit);
    return zero_unless(t >= floor, power_of_two(t));
  }
};

struct Row {
  const float* logits;
  int64_t vocab;
  const float* block_max;
  RowScale scale;

  // The weights of a block; 0 past the end of the vocabulary.
  void weigh_block(int64_t begin, float* weights) const {
    if (begin + kBlock <= vocab) {
      for (int64_t i = 0; i < kBlock; ++i) weights[i] = scale.weight(logits[begin + i]);
    } else {
      for (int64_t i = 0; i < kBlock; ++i) {
        weights[i] = begin + i < vocab ? scale.weight(logits[begin + i]) : 0.0f;
      }
    }
  }

  // Calls f(begin, weights) for the blocks that hold a token of log2 weight at least `least`, and perhaps
  // others.
  template <class F>
  void visit_blocks(float least, const F& f) const {
    const float limit = least > scale.floor ? least : scale.floor;
    for (int64_t begin = 0; begin < vocab; begin += kBlock) {
      if (!(scale.log2_weight(block_max[begin / kBlock]) >= limit)) continue;
      float weights[kBlock];
      weigh_block(begin, weights);
      f(begin, weights);
    }
  }
};

// Weights below 2^-31 have mass 0; one lower, because the exponential has an error.
constexpr float kLeastLog2Mass = -32.0f;

uint64_t total_mass(const Row& row) {
  uint64_t total = 0;
  row.visit_blocks(kLeastLog2Mass, [&](int64_t, const float* weights) {
    uint64_t sum = 0;
    for (int64_t i = 0; i < kBlock; ++i) sum += mass_of(weights[i]);
    total += sum;
  });
  return total;
}

uint64_t total_mass(const Candidates& candidates) {
  uint64_t total = 0;
  for (int64_t i = 0; i < candidates.count; ++i) total += mass_of(candidates.weights[i]);
  return total;
}

void collect_top_k(const Row& row, int64_t k, Candidates& candidates) {
  const float bound = bound_of_top_k(row.block_max, num_blocks(row.vocab), k);
  row.visit_blocks(row.scale.log2_weight(bound), [&](int64_t begin, const float* weights) {
    const int64_t end = begin + kBlock < row.vocab ? begin + kBlock : row.vocab;
    for (int64_t id = begin; id < end; ++id) {
      if (row.logits[id] >= bound && row.scale.log2_weight(row.logits[id]) >= row.scale.floor) {
        candidates.add(id, weights[id - begin]);
      }
    }
  });
  keep_top_k(candidates, row.logits, k);
}

void collect_top_p(const Row& row, float top_p, Candidates& candidates) {
  const uint64_t total = total_mass(row);
  const uint64_t target = mass_for(top_p, total);
  // All tokens of mass below `least` together have less than vocab * least <= total - target: without them
  // the rest still reaches the target, so none of them is in the shortest prefix.
  const uint64_t spare = (total - target) / static_cast<uint64_t>(row.vocab);
  const uint64_t least = spare > 1 ? spare : 1;
  const float least_log2 = log2_of(static_cast<float>(least)) + kLeastLog2Mass;
  row.visit_blocks(least_log2, [&](int64_t begin, const float* weights) {
    for (int64_t i = 0; i < kBlock; ++i) {
      if (mass_of(weights[i]) >= least) candidates.add(begin + i, weights[i]);
    }
  });
  keep_top_p(candidates, row.logits, target);
}

int32_t draw(const Sample& op, int64_t b, const Row& row, Candidates candidates) {
  const int64_t top_k = op.top_k.defined() ? op.top_k.ptr<const int32_t>()[b] : 0;
  const float top_p = op.top_p.defined() ? op.top_p.ptr<const float>()[b] : 1.0f;
  Race race(static_cast<uint64_t>(op.seeds.ptr<const int64_t>()[b]), op.positions.ptr<const int32_t>()[b]);
  if (top_k > 0 && top_k < row.vocab) {
    collect_top_k(row, top_k, candidates);
    if (top_p < 1.0f) keep_top_p(candidates, row.logits, mass_for(top_p, total_mass(candidates)));
    race.run(candidates);
  } else if (top_p < 1.0f) {
    collect_top_p(row, top_p, candidates);
    race.run(candidates);
  } else {
    // The likeliest token first: the better the best so far, the more is ruled out without work.
    candidates.add(first_of_max(row.logits, row.vocab, row.block_max, row.scale.max), 1.0f);
    race.run(candidates);
    for (int64_t begin = 0; begin < row.vocab; begin += kBlock) {
      if (!race.is_open_to(row.scale.weight(row.block_max[begin / kBlock]))) continue;
      float weights[kBlock];
      row.weigh_block(begin, weights);
      race.run_block(begin, weights);
    }
  }
  return race.winner();
}

int32_t sample_row(const Sample& op, int64_t b, float* workspace) {
  const int64_t vocab = op.logits.shape[1];
  float* changed = workspace;
  float* block_max = workspace + vocab;
  Candidates candidates{reinterpret_cast<int32_t*>(workspace + 2 * vocab), workspace + 3 * vocab, 0};

  const float* logits = op.logits.ptr<const float>() + b * op.logits.stride[0];
  if (changes_logits(op, b)) {
    if (!is_sound(logits, vocab)) return kUnsound;
    change_logits(op, b, logits, changed);
    logits = changed;
  }
  const Scan found = scan(logits, vocab, block_max);
  if (!found.sound) return kUnsound;
  if (found.max == kMinusInfinity) return kNothingAllowed;

  const float temperature = op.temperature.defined() ? op.temperature.ptr<const float>()[b] : 0.0f;
  if (temperature < kGreedyTemperature) return first_of_max(logits, vocab, block_max, found.max);
  const float min_p = op.min_p.defined() ? op.min_p.ptr<const float>()[b] : 0.0f;
  const float floor = min_p > 0.0f ? log2_of(min_p) : -kLargestFloat;
  return draw(op, b, {logits, vocab, block_max, {found.max, kLog2E / temperature, floor}}, candidates);
}

// --- what the declaration cannot say ---

void check_list(const char* name, const Tensor& offsets, const Tensor& ids, int64_t num_rows, int64_t vocab) {
  if (!offsets.defined()) return;
  const auto* offset = offsets.ptr<const int32_t>();
  const auto* id = ids.ptr<const int32_t>();
  const int64_t count = ids.shape[0];
  FS_CHECK(offsets.shape[0] == num_rows + 1, "sample: " << name << "_offsets has " << offsets.shape[0]
                                                        << " entries; expected one more than the " << num_rows
                                                        << " rows");
  FS_CHECK(offset[0] == 0 && offset[num_rows] == count, "sample: " << name << "_offsets run from "
                                                                   << offset[0] << " to " << offset[num_rows]
                                                                   << "; expected 0 to " << count);
  for (int64_t b = 0; b < num_rows; ++b) {
    FS_CHECK(offset[b] <= offset[b + 1], "sample: " << name << "_offsets[" << b + 1 << "] is "
                                                    << offset[b + 1] << ", below the offset before it, "
                                                    << offset[b]);
  }
  for (int64_t i = 0; i < count; ++i) {
    FS_CHECK(id[i] >= 0 && id[i] < vocab, "sample: " << name << "_ids[" << i << "] is " << id[i]
                                                     << "; the vocabulary has " << vocab << " tokens");
  }
}

void check_values(const char* name, const Tensor& values, float low, float high, const char* allowed) {
  if (!values.defined()) return;
  for (int64_t b = 0; b < values.shape[0]; ++b) {
    const float value = values.ptr<const float>()[b];
    FS_CHECK(value >= low && value <= high, "sample: " << name << "[" << b << "] is "
                                                       << static_cast<double>(value)
                                                       << "; allowed: " << allowed);
  }
}

void check_together(const char* name, const Tensor& given, const char* other_name, const Tensor& other) {
  FS_CHECK(given.defined() == other.defined(), "sample: '" << (given.defined() ? name : other_name)
                                                           << "' is given without '"
                                                           << (given.defined() ? other_name : name) << "'");
}

void check(const Sample& op) {
  const int64_t num_rows = op.logits.shape[0];
  const int64_t vocab = op.logits.shape[1];
  FS_CHECK(vocab >= 1 && vocab < (int64_t{1} << 31), "sample: the vocabulary has " << vocab << " tokens");
  FS_CHECK(op.workspace.shape[0] >= pool().num_threads(),
           "sample: workspace has " << op.workspace.shape[0] << " rows; expected one for each of the "
                                    << pool().num_threads() << " threads");
  check_together("temperature", op.temperature, "seeds", op.seeds);
  check_together("temperature", op.temperature, "positions", op.positions);
  check_values("temperature", op.temperature, 0.0f, kLargestFloat, "0 (greedy) or a positive number");
  check_values("top_p", op.top_p, 0x1p-149f, 1.0f, "above 0, at most 1");
  check_values("min_p", op.min_p, 0.0f, 1.0f, "0 to 1");
  for (int64_t b = 0; op.top_k.defined() && b < num_rows; ++b) {
    const int32_t k = op.top_k.ptr<const int32_t>()[b];
    FS_CHECK(k >= 0, "sample: top_k[" << b << "] is " << k << "; allowed: 0 (all) or a positive number");
  }

  check_together("seen_offsets", op.seen_offsets, "seen_ids", op.seen_ids);
  check_together("seen_offsets", op.seen_offsets, "seen_counts", op.seen_counts);
  check_together("seen_offsets", op.seen_offsets, "repetition_penalty", op.repetition_penalty);
  check_together("seen_offsets", op.seen_offsets, "frequency_penalty", op.frequency_penalty);
  check_together("seen_offsets", op.seen_offsets, "presence_penalty", op.presence_penalty);
  check_values("repetition_penalty", op.repetition_penalty, 0x1p-149f, kLargestFloat, "a positive number");
  check_values("frequency_penalty", op.frequency_penalty, -kLargestFloat, kLargestFloat, "a finite number");
  check_values("presence_penalty", op.presence_penalty, -kLargestFloat, kLargestFloat, "a finite number");
  check_list("seen", op.seen_offsets, op.seen_ids, num_rows, vocab);

  check_together("bias_offsets", op.bias_offsets, "bias_ids", op.bias_ids);
  check_together("bias_offsets", op.bias_offsets, "bias", op.bias);
  check_list("bias", op.bias_offsets, op.bias_ids, num_rows, vocab);

  check_together("allowed", op.allowed, "allowed_rows", op.allowed_rows);
  if (!op.allowed.defined()) return;
  FS_CHECK(op.allowed.shape[1] == (vocab + 31) / 32,
           "sample: allowed has rows of " << op.allowed.shape[1] << " words; expected " << (vocab + 31) / 32
                                          << " for " << vocab << " tokens");
  for (int64_t b = 0; b < num_rows; ++b) {
    const int32_t index = op.allowed_rows.ptr<const int32_t>()[b];
    FS_CHECK(index >= -1 && index < op.allowed.shape[0],
             "sample: allowed_rows[" << b << "] is " << index << "; allowed: -1 (all tokens) to "
                                     << op.allowed.shape[0] - 1);
  }
}

void sample(const Sample& op, const OpContext&) {
  check(op);
  auto* token_ids = op.token_ids.ptr<int32_t>();
  parallel_rows(op.logits.shape[0], 1, [&](int64_t b, int64_t, int worker) {
    token_ids[b] = sample_row(op, b, op.workspace.ptr<float>() + worker * op.workspace.shape[1]);
  });
}

}  // namespace

FS_REGISTER_CPU(Sample, sample, DType::f32)

}  // namespace fs::FS_ISA
