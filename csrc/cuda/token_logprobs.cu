// SPDX-License-Identifier: Apache-2.0
//
// Log-softmax and rank of one token of each row, and the row's L most likely tokens. One block per row; a
// grid of as many blocks as the workspace has rows. Two passes over the logits: the largest; then the
// normaliser, the rank and, by a bound from the first pass, a short list that holds the L largest. The
// normaliser is summed in one fixed order: four floats per thread, then doubles over the threads.
//
// Bytes per row at least: V logits, once; the second pass reads L2. Bound: memory latency of one
// multiprocessor per row.
//
// ptxas: token_logprobs_kernel <= 64 registers, 1024 threads
#include "cuda/launch.cuh"
#include "cuda/logits_row.cuh"
#include "cuda/select.cuh"

namespace fs::cuda {

namespace {

struct LogprobArgs {
  float* logprobs;
  int32_t* ranks;
  int32_t* top_ids;
  float* top_logprobs;
  const float* logits;
  int64_t stride;
  int64_t num_rows;
  int vocab, num_top;
  const int32_t* token_ids;
  float* workspace;
  int64_t workspace_stride;
};

struct Scratch {
  SelectScratch select;
  // One for each reduction of a row, so that no barrier is needed between two of them.
  uint64_t for_scan[kMaxWarps];
  double for_sum[kMaxWarps];
  int for_rank[kMaxWarps];
  double log_sum;
  TokenListScratch list;
  int top_count;
};

__device__ __forceinline__ float logprob_of(float logit, double log_sum) {
  return static_cast<float>(static_cast<double>(logit) - log_sum);
}

__device__ __forceinline__ void write_failed_row(const LogprobArgs& args, int64_t b) {
  const float nan = __uint_as_float(0x7fc00000u);
  if (threadIdx.x == 0) {
    args.logprobs[b] = nan;
    args.ranks[b] = 0;
  }
  for (int i = static_cast<int>(threadIdx.x); i < args.num_top; i += kRowThreads) {
    args.top_ids[b * args.num_top + i] = -1;
    args.top_logprobs[b * args.num_top + i] = nan;
  }
}

// The listed tokens hold the num_top first ones of the order: writes those, each at its rank, which is
// counted: quadratic in num_top, which is small or rare. `top` has room for num_top keys.
__device__ __forceinline__ void write_top(const LogprobArgs& args, int64_t b, const TokenList& list,
                                          uint64_t best, uint64_t* top, Scratch& scratch) {
  uint64_t cut = 0;
  if (args.num_top < list.size()) {
    cut = find_cut(
        static_cast<uint32_t>(args.num_top), list.range(best), 64, scratch.select,
        [&](const auto& f) { list.visit([&](int id, float logit) { f(token_key(logit, id), 1u); }); });
  }
  list.visit([&](int id, float logit) {
    const uint64_t key = token_key(logit, id);
    if (key >= cut) top[atomicAdd(&scratch.top_count, 1)] = key;
  });
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < args.num_top; i += kRowThreads) {
    const uint64_t key = top[i];
    int rank = 0;
    for (int j = 0; j < args.num_top; ++j) rank += top[j] > key ? 1 : 0;
    args.top_ids[b * args.num_top + rank] = id_of_key(key);
    args.top_logprobs[b * args.num_top + rank] = logprob_of(logit_of_key(key), scratch.log_sum);
  }
}

__device__ __forceinline__ void logprobs_of_row(const LogprobArgs& args, int64_t b, float* workspace,
                                                Scratch& scratch) {
  const LogitsRow row{args.logits + b * args.stride, args.vocab};
  TokenList list(workspace, args.vocab, scratch.list);
  if (threadIdx.x == 0) scratch.top_count = 0;
  const RowScan found = scan_row(row, scratch.for_scan);
  const float max = logit_of_key(found.best);
  if (!found.sound || max == kMinusInfinity) return write_failed_row(args, b);

  const int id = args.token_ids[b];
  const bool known = id >= 0 && id < args.vocab;
  const uint64_t own_key = known ? token_key(row.logits[id], id) : ~uint64_t{0};
  const uint32_t bound = args.num_top > 0 ? bound_of_top_k(found.own_max, args.num_top, scratch.select) : ~0u;
  float sums[4] = {};
  int before = 0;
  row.visit_by_warps([&](int index, const Quad& quad) {
    const auto exists = [&](int i) { return 4 * index + i < args.vocab; };
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sums[i] += exp2_approx((quad.x[i] - max) * kLog2E);
      before += exists(i) && token_key(quad.x[i], 4 * index + i) > own_key ? 1 : 0;
    }
    list.add(index, quad, [&](int i, float logit) { return exists(i) && order_key(logit) >= bound; });
  });
  const double sum =
      block_reduce(static_cast<double>(sums[0] + sums[1]) + static_cast<double>(sums[2] + sums[3]), 0.0,
                   scratch.for_sum, [](double x, double y) { return x + y; });
  before = block_reduce(before, 0, scratch.for_rank, [](int x, int y) { return x + y; });
  if (threadIdx.x == 0) {
    const double log_sum = static_cast<double>(max) + log(sum);
    scratch.log_sum = log_sum;
    args.logprobs[b] = known ? logprob_of(row.logits[id], log_sum) : __uint_as_float(0x7fc00000u);
    args.ranks[b] = known ? 1 + before : 0;
  }
  list.finish();  // and log_sum is there
  if (args.num_top > 0) {
    // The list leaves room for the second only because it then holds all tokens.
    auto* in_memory =
        reinterpret_cast<uint64_t*>(workspace + 4 * static_cast<int64_t>(args.vocab)) - args.num_top;
    auto* in_shared = reinterpret_cast<uint64_t*>(scratch.select.mass);
    write_top(args, b, list, found.best, args.num_top <= kRowThreads ? in_shared : in_memory, scratch);
  }
}

// At least one block per multiprocessor: left to itself ptxas aims at two on sm_100, and spills.
__global__ void __launch_bounds__(kRowThreads, 1) token_logprobs_kernel(const LogprobArgs args) {
  __shared__ Scratch scratch;
  float* workspace = args.workspace + blockIdx.x * args.workspace_stride;
  for (int64_t b = blockIdx.x; b < args.num_rows; b += gridDim.x) {
    logprobs_of_row(args, b, workspace, scratch);
    __syncthreads();  // the next row reuses the scratch
  }
}

void token_logprobs(const TokenLogprobs& op, const OpContext& context) {
  const int64_t num_rows = op.logits.shape[0];
  const int64_t vocab = op.logits.shape[1];
  const int64_t num_top = op.top_ids.shape[1];
  FS_CHECK(vocab >= 1 && vocab < (int64_t{1} << 30),
           "token_logprobs: the vocabulary has " << vocab << " tokens");
  FS_CHECK(num_top <= vocab, "token_logprobs: the " << num_top
                                                    << " largest are asked for; the vocabulary has " << vocab
                                                    << " tokens");
  FS_CHECK(op.workspace.shape[0] >= 1,
           "token_logprobs: workspace has no rows; each lets one row of logits be worked on at a time");
  FS_CHECK(reinterpret_cast<uintptr_t>(op.workspace.data) % 16 == 0,
           "token_logprobs: workspace is not aligned to 16 bytes");
  if (num_rows == 0) return;
  LogprobArgs args{};
  args.logprobs = op.logprobs.ptr<float>();
  args.ranks = op.ranks.ptr<int32_t>();
  args.top_ids = op.top_ids.ptr<int32_t>();
  args.top_logprobs = op.top_logprobs.ptr<float>();
  args.logits = op.logits.ptr<const float>();
  args.stride = op.logits.stride[0];
  args.num_rows = num_rows;
  args.vocab = static_cast<int>(vocab);
  args.num_top = static_cast<int>(num_top);
  args.token_ids = op.token_ids.ptr<const int32_t>();
  args.workspace = op.workspace.ptr<float>();
  args.workspace_stride = op.workspace.shape[1];
  const int64_t blocks = num_rows < op.workspace.shape[0] ? num_rows : op.workspace.shape[0];
  token_logprobs_kernel<<<static_cast<unsigned>(blocks), kRowThreads, 0, stream_of(context)>>>(args);
  check_launch("token_logprobs");
}

}  // namespace

FS_REGISTER_CUDA(TokenLogprobs, token_logprobs, DType::f32)

}  // namespace fs::cuda
