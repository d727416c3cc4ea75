// SPDX-License-Identifier: Apache-2.0
//
// out = x @ weight.T + bias over weights packed into panels of 32 output rows (layout/panel.h), and the gated
// form of it.
#include <cstring>
#include <type_traits>

#include "core/thread_pool.h"
#include "cpu/gate.h"
#include "cpu/linear_check.h"
#include "cpu/linear_tile.h"
#include "cpu/panel_ranges.h"
#include "cpu/weights.h"
#include "ops/ops.h"

namespace fs::FS_ISA {

namespace {

// Tokens in a register tile, and vectors of output rows beside that many tokens.
#if defined(FS_SIMD_AVX512)
constexpr int kMaxTokens = 6;  // 2 x 6 accumulators: a whole panel, and enough chains for the latency
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

constexpr int64_t kBlockDepth = 256;  // k between which several tiles share weights in L1

template <class W, class X>
struct Product {
  float* out;
  int64_t out_stride;
  const W* packed;
  const X* x;
  int64_t x_stride;
  const float* bias;
  int64_t num_tokens, num_rows, depth;
  int64_t first_token = 0, first_row = 0;  // those that `out` begins with

  // Weights that a tile asks for on its way.
  struct Later {
    const char* begin;
    int64_t bytes;
  };

  template <int M>
  void tile_rows(int64_t panel, int64_t token, Span k, Later later) const {
    constexpr int R = vectors_of(M);
    constexpr int64_t kPasses = kPanelRows / (R * kLanes);
    constexpr int64_t kDepthStep = std::is_same_v<W, bf16> ? 2 : 1;
    const int64_t steps = k.size() > kDepthStep ? (k.size() + kDepthStep - 1) / kDepthStep : 1;
    for (int64_t pass = 0; pass < kPasses; ++pass) {
      const int64_t n = panel * kPanelRows + pass * R * kLanes;
      if (n >= num_rows) break;
      linear_tile<R, M>(Tile<W, X>{
          .out = out + (token - first_token) * out_stride + n - first_row,
          .out_stride = out_stride,
          .num_rows = num_rows - n,
          .w = packed + panel_offset(n, k.begin, depth, std::is_same_v<W, bf16>),
          .x = x + token * x_stride + k.begin,
          .x_stride = x_stride,
          .depth = k.size(),
          .resume = k.begin > 0,
          .bias = bias == nullptr || k.end < depth ? nullptr : bias + n,
          .later = {later.begin + later.bytes / kPasses * pass, later.bytes / (kPasses * steps)},
      });
    }
  }

  template <int M = kMaxTokens>
  void tile_tokens(int64_t panel, Span tokens, Span k, Later later) const {
    if constexpr (M > 1) {
      if (tokens.size() < M) return tile_tokens<M - 1>(panel, tokens, k, later);
    }
    tile_rows<M>(panel, tokens.begin, k, later);
  }

  // A panel for a block of tokens. Together the tiles that share weights prefetch another panel's, so that
  // memory and multipliers work at the same time.
  void multiply_panel(int64_t panel, int64_t next, Span tokens) const {
    const int64_t num_tiles = (tokens.size() + kMaxTokens - 1) / kMaxTokens;
    const int64_t step = num_tiles > 1 ? kBlockDepth : depth;
    for (int64_t k = 0; k == 0 || k < depth; k += step) {
      const Span range{k, k + step < depth ? k + step : depth};
      const auto* weights =
          reinterpret_cast<const char*>(packed + kPanelRows * (next * padded_depth(depth) + range.begin));
      const int64_t bytes = range.size() * kPanelRows * static_cast<int64_t>(sizeof(W)) / num_tiles;
      for (int64_t i = 0; i < num_tiles; ++i) {
        const Span tile = part(tokens.size(), num_tiles, i);
        tile_tokens(panel, {tokens.begin + tile.begin, tokens.begin + tile.end}, range,
                    {weights + i * bytes, bytes});
      }
    }
  }

  // f(panel, the next one, tokens)
  template <class F>
  void each_panel(const F& f) const {
    const auto range = [&](Span panels, Span tokens) {
      for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
        f(panel, panel + 1 < panels.end ? panel + 1 : panel, tokens);
      }
    };
    for_panel_ranges(num_panels(num_rows), num_tokens, depth * static_cast<int64_t>(sizeof(X)) + 1,
                     kPanelRows * depth, kMaxTokens, range);
  }

  void run() const {
    each_panel([&](int64_t panel, int64_t next, Span tokens) { multiply_panel(panel, next, tokens); });
  }

  void run_gated() const {
    constexpr int64_t kBlock = 8 * kMaxTokens;
    each_panel([&](int64_t panel, int64_t next, Span tokens) {
      for (int64_t t = tokens.begin; t < tokens.end; t += kBlock) {
        const Span block{t, t + kBlock < tokens.end ? t + kBlock : tokens.end};
        float results[kBlock * kPanelRows];
        Product ungated = *this;
        ungated.out = results;
        ungated.out_stride = kPanelRows;
        ungated.first_token = t;
        ungated.first_row = panel * kPanelRows;
        ungated.multiply_panel(panel, next, block);
        gate_rows(out + t * out_stride + panel * kGatedRows, out_stride, results, block.size());
      }
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

template <class Op>
void linear(const Op& op, const OpContext&) {
  constexpr bool kIsGated = std::is_same_v<Op, LinearGated>;
  const int64_t num_rows = weight_rows(op), depth = op.x.shape[1];
  check_linear(op);
  check_float32(op);
  const float* bias = nullptr;
  if constexpr (!kIsGated) {
    if (op.bias.defined()) bias = op.bias.template ptr<const float>();
  }
  visit_weights(op.packed.dtype, [&](auto* tag) {
    using W = std::remove_pointer_t<decltype(tag)>;
    auto* out = op.out.template ptr<float>();
    const auto* packed = op.packed.template ptr<const W>();
    const auto* x = op.x.template ptr<const float>();
    const auto run = [&](const auto* activations, int64_t x_stride) {
      using X = std::remove_cvref_t<decltype(*activations)>;
      const Product<W, X> product{out,  op.out.stride[0], packed,   activations, x_stride,
                                  bias, op.x.shape[0],    num_rows, depth};
      if constexpr (kIsGated) {
        product.run_gated();
      } else {
        product.run();
      }
    };
#if defined(FS_SIMD_BF16)
    if constexpr (std::is_same_v<W, bf16>) {
      auto* rounded = op.workspace.template ptr<bf16>();
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

FS_REGISTER_CPU(Linear, linear<Linear>, kWeights)
FS_REGISTER_CPU(LinearGated, linear<LinearGated>, kWeights)

}  // namespace fs::FS_ISA
