// SPDX-License-Identifier: Apache-2.0
//
// The next token of each row; the meaning of every filter is declared in ops/ops.h, and the arithmetic is
// that of layout/sampling.h and layout/philox.h, so that the CPU op picks the same token from the same
// logits.
//
// One block per row; a grid of as many blocks as the workspace has rows. Passes over the logits (V floats,
// from L2 after the first): greedy 1; temperature alone 2; top-k 2; top-p 3; one more, and V floats written,
// if the request changes its logits. What top-k and top-p choose from is first cut down by a bound to a list,
// which stays in shared memory while it is short. Bytes per row at least: V logits, once; bound: memory
// latency of one multiprocessor per row.
//
// What is out of range (the CPU op throws, a kernel cannot): ids outside the vocabulary are ignored, a mask
// that does not exist allows no token.
//
// ptxas: sample_kernel <= 64 registers, 1024 threads
#include "cuda/change_logits.cuh"
#include "cuda/launch.cuh"
#include "cuda/logits_row.cuh"
#include "cuda/select.cuh"
#include "layout/philox.h"

namespace fs::cuda {

namespace {

constexpr int32_t kUnsound = -1;
constexpr int32_t kNothingAllowed = -2;

struct SampleArgs {
  int32_t* token_ids;
  const float* logits;
  int64_t stride;
  int64_t num_rows;
  int vocab;
  const float* temperature;  // these five: nullptr if not given
  const int32_t* top_k;
  const float* top_p;
  const float* min_p;
  const int64_t* seeds;
  const int32_t* positions;
  LogitChanges changes;
  float* workspace;
  int64_t workspace_stride;
};

struct RowScale {
  float max;
  float per_logit;  // log2(e) / temperature
  float floor;      // tokens with a smaller log2 weight are excluded by min_p

  __device__ __forceinline__ float log2_weight(float logit) const {
    return rounded_mul(rounded_add(logit, -max), per_logit);
  }
  __device__ __forceinline__ bool keeps(float logit) const { return log2_weight(logit) >= floor; }
  __device__ __forceinline__ float weight(float logit) const {
    const float t = log2_weight(logit);
    return t >= floor ? power_of_two(t) : 0.0f;
  }
};

// The race of cpu/sample_race.h: the largest weight / noise wins, of equal ones the lowest id.
struct Race {
  uint64_t seed;
  uint32_t position;
  float best;
  uint64_t winner;  // key of score and id; 0: nobody yet

  __device__ __forceinline__ void enter(int id, float weight, uint32_t noise) {
    if (!(weight > 0.0f)) return;
    // The noise is never below v, its uniform number: weight / v < best proves the loss without a logarithm.
    // The factor covers the roundings of this estimate.
    const float v = static_cast<float>(static_cast<int32_t>(noise >> 1)) * 0x1p-31f;
    if (!(v * best <= weight * 0x1.00001p0f)) return;
    const float score = __fdiv_rn(weight, exponential(noise));
    const uint64_t key = token_key(score, id);
    if (!(score > 0.0f) || key <= winner) return;
    winner = key;
    best = score;
  }
  __device__ __forceinline__ void enter(int id, float weight) {
    const Philox4x32 noise = sampling_noise(static_cast<uint32_t>(id) / 4, position, seed);
    const uint32_t low = id % 2 == 0 ? noise.word[0] : noise.word[1];
    const uint32_t high = id % 2 == 0 ? noise.word[2] : noise.word[3];
    enter(id, weight, id % 4 < 2 ? low : high);
  }
  // False if no token of weight at most `weight` can win any more: the noise is at least 2^-33.
  __device__ __forceinline__ bool is_open_to(float weight) const { return weight * 0x1.01p33f >= best; }
};

__device__ __forceinline__ uint64_t block_total(uint64_t x, uint64_t* scratch) {
  return block_reduce(x, uint64_t{0}, scratch, [](uint64_t a, uint64_t b) { return a + b; });
}

// The mass that a prefix must reach to hold the share top_p of `total`.
__device__ __forceinline__ uint64_t mass_for(float top_p, uint64_t total) {
  const auto target =
      static_cast<uint64_t>(ceil(__dmul_rn(static_cast<double>(top_p), static_cast<double>(total))));
  return target < 1 ? 1 : target < total ? target : total;
}

struct Scratch {
  SelectScratch select;
  // One for each reduction of a row, so that no barrier is needed between two of them.
  uint64_t for_scan[kMaxWarps];
  uint64_t for_mass[kMaxWarps];
  uint64_t for_winner[kMaxWarps];
  TokenListScratch list;
};

// Lets the listed tokens with key >= cut race, after top_p took its share of them. All keys are in `range`.
__device__ __forceinline__ void race_list(const TokenList& list, const KeyRange& range, const RowScale& scale,
                                          uint64_t cut, bool has_top_p, uint64_t target, Scratch& scratch,
                                          Race& race) {
  if (has_top_p) {
    const uint64_t cut_of_mass = find_cut(target, range, 64, scratch.select, [&](const auto& f) {
      list.visit([&](int id, float logit) {
        const uint64_t key = token_key(logit, id);
        if (key >= cut) f(key, mass_of(scale.weight(logit)));
      });
    });
    cut = cut_of_mass > cut ? cut_of_mass : cut;
  }
  list.visit([&](int id, float logit) {
    const float weight = scale.weight(logit);
    // A token without mass is never in the shortest prefix.
    if (token_key(logit, id) >= cut && (!has_top_p || mass_of(weight) > 0)) race.enter(id, weight);
  });
}

__device__ __forceinline__ void race_row(const LogitsRow& row, const RowScale& scale, uint64_t best,
                                         Race& race) {
  // The likeliest token first: the better the best so far, the more is ruled out without work.
  race.enter(id_of_key(best), 1.0f);
  row.visit([&](int index, const Quad& quad) {
    float weight[4];
    bool open = false;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      weight[i] = scale.weight(quad.x[i]);
      open = open || (weight[i] > 0.0f && race.is_open_to(weight[i]));
    }
    if (!open) return;
    const Philox4x32 noise = sampling_noise(static_cast<uint32_t>(index), race.position, race.seed);
#pragma unroll
    for (int i = 0; i < 4; ++i) race.enter(4 * index + i, weight[i], noise.word[i]);
  });
}

// The drawn token, in every thread.
__device__ __forceinline__ int draw(const SampleArgs& args, int64_t b, const LogitsRow& row,
                                    const RowScan& found, TokenList& list, Scratch& scratch) {
  const float min_p = args.min_p == nullptr ? 0.0f : args.min_p[b];
  const int top_k = args.top_k == nullptr ? 0 : args.top_k[b];
  const float top_p = args.top_p == nullptr ? 1.0f : args.top_p[b];
  const bool has_top_k = top_k > 0 && top_k < row.vocab;
  const bool has_top_p = top_p < 1.0f && row.vocab > 1;
  const RowScale scale{logit_of_key(found.best), __fdiv_rn(kLog2E, args.temperature[b]),
                       min_p > 0.0f ? log2_of(min_p) : -kLargestFloat};
  Race race{static_cast<uint64_t>(args.seeds[b]), static_cast<uint32_t>(args.positions[b]), 0.0f, 0};

  if (has_top_k) {
    const uint32_t bound = bound_of_top_k(found.own_max, top_k, scratch.select);
    row.visit_by_warps([&](int index, const Quad& quad) {
      list.add(index, quad,
               [&](int, float logit) { return order_key(logit) >= bound && scale.keeps(logit); });
    });
    list.finish();
    const KeyRange range = list.range(found.best);
    uint64_t cut = 0;
    if (top_k < list.size()) {
      cut = find_cut(static_cast<uint32_t>(top_k), range, 64, scratch.select, [&](const auto& f) {
        list.visit([&](int id, float logit) { f(token_key(logit, id), 1u); });
      });
    }
    uint64_t target = 0;
    if (has_top_p) {
      uint64_t mass = 0;
      list.visit([&](int id, float logit) {
        if (token_key(logit, id) >= cut) mass += mass_of(scale.weight(logit));
      });
      target = mass_for(top_p, block_total(mass, scratch.for_mass));
    }
    race_list(list, range, scale, cut, has_top_p, target, scratch, race);
  } else if (has_top_p) {
    uint64_t mass = 0;
    row.visit([&](int, const Quad& quad) {
#pragma unroll
      for (int i = 0; i < 4; ++i) mass += mass_of(scale.weight(quad.x[i]));
    });
    const uint64_t total = block_total(mass, scratch.for_mass);
    const uint64_t target = mass_for(top_p, total);
    // All tokens of mass below `least` together have less than vocab * least <= total - target: without them
    // the rest still reaches the target, so none of them is in the shortest prefix.
    const uint64_t spare = (total - target) / static_cast<uint64_t>(row.vocab);
    const uint64_t least = spare > 1 ? spare : 1;
    row.visit_by_warps([&](int index, const Quad& quad) {
      list.add(index, quad, [&](int, float logit) { return mass_of(scale.weight(logit)) >= least; });
    });
    list.finish();
    race_list(list, list.range(found.best), scale, 0, true, target, scratch, race);
  } else {
    race_row(row, scale, found.best, race);
  }
  const uint64_t winner = block_max_key(race.winner, scratch.for_winner);
  return winner == 0 ? kUnsound : id_of_key(winner);
}

__device__ __forceinline__ int sample_row(const SampleArgs& args, int64_t b, float* workspace,
                                          Scratch& scratch) {
  LogitsRow row{args.logits + b * args.stride, args.vocab};
  const int padded = (args.vocab + 3) / 4 * 4;
  TokenList list(workspace + padded, args.vocab, scratch.list);
  if (args.changes.any(b)) {
    if (!change_logits(args.changes, b, row, workspace)) return kUnsound;
    row = LogitsRow{workspace, args.vocab};
  }
  const RowScan found = scan_row(row, scratch.for_scan);
  if (!found.sound) return kUnsound;
  if (logit_of_key(found.best) == kMinusInfinity) return kNothingAllowed;
  const float temperature = args.temperature == nullptr ? 0.0f : args.temperature[b];
  if (temperature < kGreedyTemperature) return id_of_key(found.best);
  return draw(args, b, row, found, list, scratch);
}

__global__ void __launch_bounds__(kRowThreads) sample_kernel(const SampleArgs args) {
  __shared__ Scratch scratch;
  float* workspace = args.workspace + blockIdx.x * args.workspace_stride;
  for (int64_t b = blockIdx.x; b < args.num_rows; b += gridDim.x) {
    const int token_id = sample_row(args, b, workspace, scratch);
    if (threadIdx.x == 0) args.token_ids[b] = token_id;
    __syncthreads();  // the next row reuses the scratch
  }
}

RowList row_list(const Tensor& offsets, const Tensor& ids) {
  if (!offsets.defined()) return {nullptr, nullptr, 0};
  return {offsets.ptr<const int32_t>(), ids.ptr<const int32_t>(), static_cast<int>(ids.shape[0])};
}

template <class T>
const T* pointer(const Tensor& tensor) {
  return tensor.defined() ? tensor.ptr<const T>() : nullptr;
}

void check_together(const char* name, const Tensor& given, const char* other_name, const Tensor& other) {
  FS_CHECK(given.defined() == other.defined(), "sample: '" << (given.defined() ? name : other_name)
                                                           << "' is given without '"
                                                           << (given.defined() ? other_name : name) << "'");
}

// What the declaration cannot say, and what can be known without reading device memory.
void check(const Sample& op) {
  const int64_t vocab = op.logits.shape[1];
  const int64_t num_rows = op.logits.shape[0];
  FS_CHECK(vocab >= 1 && vocab < (int64_t{1} << 30), "sample: the vocabulary has " << vocab << " tokens");
  FS_CHECK(op.workspace.shape[0] >= 1,
           "sample: workspace has no rows; each lets one row of logits be sampled at a time");
  FS_CHECK(reinterpret_cast<uintptr_t>(op.workspace.data) % 16 == 0,
           "sample: workspace is not aligned to 16 bytes");
  check_together("temperature", op.temperature, "seeds", op.seeds);
  check_together("temperature", op.temperature, "positions", op.positions);
  check_together("seen_offsets", op.seen_offsets, "seen_ids", op.seen_ids);
  check_together("seen_offsets", op.seen_offsets, "seen_counts", op.seen_counts);
  check_together("seen_offsets", op.seen_offsets, "repetition_penalty", op.repetition_penalty);
  check_together("seen_offsets", op.seen_offsets, "frequency_penalty", op.frequency_penalty);
  check_together("seen_offsets", op.seen_offsets, "presence_penalty", op.presence_penalty);
  check_together("bias_offsets", op.bias_offsets, "bias_ids", op.bias_ids);
  check_together("bias_offsets", op.bias_offsets, "bias", op.bias);
  check_together("allowed", op.allowed, "allowed_rows", op.allowed_rows);
  for (const Tensor* offsets : {&op.seen_offsets, &op.bias_offsets}) {
    FS_CHECK(!offsets->defined() || offsets->shape[0] == num_rows + 1,
             "sample: " << (offsets == &op.seen_offsets ? "seen" : "bias") << "_offsets has "
                        << offsets->shape[0] << " entries; expected one more than the " << num_rows
                        << " rows");
  }
  FS_CHECK(!op.allowed.defined() || op.allowed.shape[1] == (vocab + 31) / 32,
           "sample: allowed has rows of " << op.allowed.shape[1] << " words; expected " << (vocab + 31) / 32
                                          << " for " << vocab << " tokens");
}

void sample(const Sample& op, const OpContext& context) {
  check(op);
  const int64_t num_rows = op.logits.shape[0];
  if (num_rows == 0) return;
  SampleArgs args{};
  args.token_ids = op.token_ids.ptr<int32_t>();
  args.logits = op.logits.ptr<const float>();
  args.stride = op.logits.stride[0];
  args.num_rows = num_rows;
  args.vocab = static_cast<int>(op.logits.shape[1]);
  args.temperature = pointer<float>(op.temperature);
  args.top_k = pointer<int32_t>(op.top_k);
  args.top_p = pointer<float>(op.top_p);
  args.min_p = pointer<float>(op.min_p);
  args.seeds = pointer<int64_t>(op.seeds);
  args.positions = pointer<int32_t>(op.positions);
  args.changes = {row_list(op.bias_offsets, op.bias_ids),
                  pointer<float>(op.bias),
                  row_list(op.seen_offsets, op.seen_ids),
                  pointer<int32_t>(op.seen_counts),
                  pointer<float>(op.repetition_penalty),
                  pointer<float>(op.frequency_penalty),
                  pointer<float>(op.presence_penalty),
                  pointer<uint32_t>(op.allowed),
                  pointer<int32_t>(op.allowed_rows),
                  op.allowed.defined() ? static_cast<int>(op.allowed.shape[0]) : 0,
                  op.allowed.defined() ? static_cast<int>(op.allowed.shape[1]) : 0};
  args.workspace = op.workspace.ptr<float>();
  args.workspace_stride = op.workspace.shape[1];
  const int64_t blocks = num_rows < op.workspace.shape[0] ? num_rows : op.workspace.shape[0];
  sample_kernel<<<static_cast<unsigned>(blocks), kRowThreads, 0, stream_of(context)>>>(args);
  check_launch("sample");
}

}  // namespace

FS_REGISTER_CUDA(Sample, sample, DType::f32)

}  // namespace fs::cuda
