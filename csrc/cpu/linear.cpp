// SPDX-License-Identifier: Apache-2.0
//
// out = x @ weight.T + bias over weights packed into panels of 32 output rows (layout/panel.h).
//
// The work is cut into blocks of tokens times ranges of panels, the same for any number of threads. A block's
// activations stay in the L2 cache while all weights pass by once.
#include <cstring>
#include <type_traits>

#include "core/thread_pool.h"
#include "cpu/linear_tile.h"
#include "cpu/weights.h"
#include "ops/ops.h"

namespace fs::FS_ISA {

namespace {

#if defined(FS_SIMD_AVX512)
constexpr int kMaxTokens = 12;  // 2 x 12 accumulators of 32 registers
constexpr int vectors_of(int) {
  return 2;
}
#elif defined(FS_SIMD_AVX2)
constexpr int kMaxTokens = 6;  // 2 x 6 accumulators of 16 registers
constexpr int vectors_of(int num_tokens) {
  return num_tokens <= 2 ? 4 : 2;
}
#else
constexpr int kMaxTokens = 4;
constexpr int vectors_of(int num_tokens) {
  return num_tokens == 1 ? 8 : 2;
}
#endif

constexpr int64_t kBlockBytes = 192 * 1024;  // activations of a block of tokens
constexpr int64_t kMaxChunks = 32;           // panel ranges per block of tokens
constexpr int64_t kMinChunkWork = 1 << 15;   // multiply-adds below which a range is not worth handing out

template <class W, class X>
struct Product {
  float* out;
  int64_t out_stride;
  const W* packed;
  const X* x;
  int64_t x_stride;
  const float* bias;
  int64_t num_tokens, num_rows, depth;

  // One panel for tokens [begin, begin + M).
  template <int M>
  void panel_tile(int64_t panel, int64_t begin) const {
    constexpr int R = vectors_of(M);
    constexpr bool paired = std::is_same_v<W, bf16>;
    const W* w = packed + panel * kPanelRows * padded_depth(depth);
    for (int64_t row = 0; row < kPanelRows; row += R * kLanes) {
      const int64_t n = panel * kPanelRows + row;
      if (n >= num_rows) break;
      linear_tile<R, M>(out + begin * out_stride + n, out_stride, w + row * (paired ? 2 : 1),
                        x + begin * x_stride, x_stride, depth, bias == nullptr ? nullptr : bias + n,
                        num_rows - n);
    }
  }

  template <int M = kMaxTokens>
  void dispatch(int64_t panel, int64_t begin, int64_t count) const {
    if constexpr (M > 1) {
      if (count < M) return dispatch<M - 1>(panel, begin, count);
    }
    panel_tile<M>(panel, begin);
  }

  // Tokens [begin, end) in tiles of equal size, give or take one.
  void panel_rows(int64_t panel, int64_t begin, int64_t end) const {
    const int64_t count = end - begin;
    const int64_t num_tiles = (count + kMaxTokens - 1) / kMaxTokens;
    for (int64_t tile = 0; tile < num_tiles; ++tile) {
      const int64_t from = begin + count * tile / num_tiles;
      dispatch(panel, from, begin + count * (tile + 1) / num_tiles - from);
    }
  }

  void run() const {
    if (num_tokens == 0 || num_rows == 0) return;
    const int64_t panels = num_panels(num_rows);
    int64_t block = kBlockBytes / (depth * static_cast<int64_t>(sizeof(X)) + 1);
    block = block < kMaxTokens ? kMaxTokens : block - block % kMaxTokens;
    const int64_t num_blocks = (num_tokens + block - 1) / block;

    const int64_t panel_work = kPanelRows * (depth + 1) * (num_tokens < block ? num_tokens : block);
    int64_t per_chunk = (panels + kMaxChunks - 1) / kMaxChunks;
    if (per_chunk * panel_work < kMinChunkWork) per_chunk = kMinChunkWork / panel_work + 1;
    const int64_t num_ranges = (panels + per_chunk - 1) / per_chunk;

    pool().parallel_for(num_blocks * num_ranges, [&](int64_t chunk, int) {
      const int64_t at = chunk / num_ranges;
      const int64_t range = chunk % num_ranges;
      const int64_t begin = num_tokens * at / num_blocks;
      const int64_t end = num_tokens * (at + 1) / num_blocks;
      const int64_t last = panels * (range + 1) / num_ranges;
      for (int64_t panel = panels * range / num_ranges; panel < last; ++panel) panel_rows(panel, begin, end);
    });
  }
};

#if defined(FS_SIMD_BF16)
// The activations rounded to bf16, rows padded with a zero to an even length.
void round_rows(bf16* rounded, const float* x, int64_t x_stride, int64_t num_tokens, int64_t depth) {
  const int64_t padded = padded_depth(depth);
  const int64_t per_chunk = (1 << 15) / (padded + 1) + 1;
  pool().parallel_for((num_tokens + per_chunk - 1) / per_chunk, [&](int64_t chunk, int) {
    const int64_t end = (chunk + 1) * per_chunk < num_tokens ? (chunk + 1) * per_chunk : num_tokens;
    for (int64_t t = chunk * per_chunk; t < end; ++t) {
      bf16* row = rounded + t * padded;
      for (int64_t k = 0; k < depth; ++k) row[k] = to_bf16(x[t * x_stride + k]);
      if (padded > depth) row[depth] = 0;
    }
  });
}
#endif

void check(const Linear& op, int64_t num_rows, int64_t depth) {
  FS_CHECK(op.packed.shape[0] == num_panels(num_rows) && op.packed.shape[1] == padded_depth(depth),
           "linear: argument 'packed' is [" << op.packed.shape[0] << ", " << op.packed.shape[1]
                                            << ", 32]; with out [M, " << num_rows << "] and x [M, " << depth
                                            << "] it must be [" << num_panels(num_rows) << ", "
                                            << padded_depth(depth) << ", 32]");
  const int64_t needed = linear_workspace_bytes(op.x.shape[0], depth, op.packed.dtype);
  FS_CHECK(op.workspace.shape[0] >= needed, "linear: argument 'workspace' has "
                                                << op.workspace.shape[0] << " bytes; needs " << needed
                                                << " for " << op.x.shape[0] << " rows of " << depth);
}

void linear(const Linear& op, const OpContext&) {
  const int64_t num_rows = op.out.shape[1];
  const int64_t depth = op.x.shape[1];
  check(op, num_rows, depth);
  const float* bias = op.bias.defined() ? op.bias.ptr<const float>() : nullptr;
  visit_weights(op.packed.dtype, [&](auto* tag) {
    using W = std::remove_pointer_t<decltype(tag)>;
    auto* out = op.out.ptr<float>();
    const auto* packed = op.packed.ptr<const W>();
    const auto* x = op.x.ptr<const float>();
    const auto run = [&](const auto* activations, int64_t x_stride) {
      using X = std::remove_cvref_t<decltype(*activations)>;
      Product<W, X>{out,  op.out.stride[0], packed,   activations, x_stride,
                    bias, op.x.shape[0],    num_rows, depth}
          .run();
    };
#if defined(FS_SIMD_BF16)
    if constexpr (std::is_same_v<W, bf16>) {
      auto* rounded = op.workspace.ptr<bf16>();
      round_rows(rounded, x, op.x.stride[0], op.x.shape[0], depth);
      run(const_cast<const bf16*>(rounded), padded_depth(depth));
    } else {
      run(x, op.x.stride[0]);
    }
#else
    run(x, op.x.stride[0]);
#endif
  });
}

}  // namespace

FS_REGISTER_CPU(Linear, linear, kWeights)

}  // namespace fs::FS_ISA
