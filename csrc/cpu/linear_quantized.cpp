// SPDX-License-Identifier: Apache-2.0
//
// out = x @ weight.T + bias over weights of 4 or 8 bits (layout/quantized_panel.h), and the gated forms of
// it.
//
// First the activations are made ready in the workspace, once for all panels (quantize_rows.h); then the
// tiles of quantized_tile.h run over blocks of tokens and ranges of panels.
//
// Bound: with few tokens memory, the packed bytes once; with many the multiply instructions, of which a block
// of 32 inputs needs 8 (int8 activations) or 16 (bf16) per token and 16 rows, and 2 or 3 more to scale the
// sum.
#include "cpu/gate.h"
#include "cpu/linear_check.h"
#include "cpu/panel_ranges.h"
#include "cpu/quantize_rows.h"
#include "cpu/quantized_tile.h"
#include "ops/ops.h"

namespace fs::FS_ISA {

namespace {

// Tokens in a register tile: sums of a block and sums so far, of two vectors of rows each.
#if defined(FS_SIMD_AVX512)
constexpr int kMaxTokens = 6;
#else
constexpr int kMaxTokens = 4;  // the sums so far stay in memory
#endif
constexpr int kVectorsOfHalf = 16 / kLanes;

// All tiles of a panel for M tokens: rows in pieces of V vectors of each half that a tile computes.
template <int kHalves, int V, class F>
void each_piece(const F& tile) {
  for (int first = 0; first < 32 / kHalves; first += V * kLanes) tile(first);
}

template <int M, class F>
[[gnu::always_inline]] inline void with_tokens(int64_t count, const F& f) {
  if constexpr (M > 1) {
    if (count < M) return with_tokens<M - 1>(count, f);
  }
  f(Index<M>{});
}

// tile(op, Index<M>, panel, token) over all tokens and panels, kMost tokens at a time.
template <int kMost, class Input, class F>
void run_tiles(const QuantizedProduct<Input>& op, int64_t num_tokens, const F& tile) {
  const auto range = [&](Span panels, Span tokens) {
    const int64_t num_tiles = (tokens.size() + kMost - 1) / kMost;
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
      for (int64_t i = 0; i < num_tiles; ++i) {
        const Span piece = part(tokens.size(), num_tiles, i);
        const int64_t token = tokens.begin + piece.begin;
        with_tokens<kMost>(piece.size(), [&](auto m) {
          if (!op.is_gated) return tile(op, m, panel, token);
          float results[m.value * QuantizedPanels::kRows];
          QuantizedProduct<Input> ungated = op;
          ungated.out = results;
          ungated.out_stride = QuantizedPanels::kRows;
          ungated.first_token = token;
          ungated.first_row = panel * QuantizedPanels::kRows;
          tile(ungated, m, panel, token);
          gate_rows(op.out + token * op.out_stride + panel * kGatedRows, op.out_stride, results, m.value);
        });
      }
    }
  };
  for_panel_ranges(op.panels.num_panels(), num_tokens, op.row_size * static_cast<int64_t>(sizeof(Input)) + 1,
                   QuantizedPanels::kRows * op.panels.padded_depth(), kMost, range);
}

template <class Products, bool kHasOffsets>
void run_blocks(const QuantizedProduct<typename Products::Input>& product, int64_t num_tokens) {
  constexpr int kMost = kMaxTokens / Products::kPlanes;  // every plane has sums of its own
  run_tiles<kMost>(product, num_tokens, [&](const auto& op, auto m, int64_t panel, int64_t token) {
    constexpr int V = m.value == 1 ? kVectorsOfHalf : 1;
    each_piece<Products::kHalves, V>(
        [&](int first) { block_tile<Products, kHasOffsets, V, m.value>(op, panel, first, token); });
  });
}

template <int kBits>
void run_dequantized(const QuantizedProduct<float>& product, int64_t num_tokens) {
  run_tiles<kMaxTokens>(product, num_tokens, [&](const auto& op, auto m, int64_t panel, int64_t token) {
    constexpr int V = m.value == 1 ? kVectorsOfHalf : 1;
    each_piece<kBits == 4 ? 2 : 1, V>(
        [&](int first) { dequantized_tile<kBits, V, m.value>(op, panel, first, token); });
  });
}

// The workspace: inputs, kPlanes numbers each, then two arrays of a number per row and block.
template <class Input, int kPlanes = 1>
struct Prepared {
  Input* x;
  float* first;
  void* second;

  Prepared(const Tensor& workspace, const Rows& rows)
      : x(workspace.ptr<Input>()),
        first(reinterpret_cast<float*>(x + rows.count * rows.num_blocks() * kBlock * kPlanes)),
        second(first + rows.count * rows.num_blocks()) {}
};

// Rounds to 8 bits, or to 12. zero_code: the code of weight 0 where all sums begin with -zero_code times the
// inputs' sum; 0: the sums of inputs are kept as real numbers instead.
template <class Products, bool kHasOffsets>
void run_integer(QuantizedProduct<int8_t> op, const Rows& rows, const Tensor& workspace, int zero_code) {
  constexpr int kPlanes = Products::kPlanes;
  const Prepared<int8_t, kPlanes> to(workspace, rows);
  const int64_t num_blocks = rows.num_blocks();
  rows.each_block([&](int64_t row, int64_t index, const float (&block)[kBlock]) {
    const int64_t at = row * num_blocks + index;
    const QuantizedBlock quantized = quantize_block<kPlanes>(to.x + at * kBlock * kPlanes, block);
    to.first[at] = quantized.scale;
    if (kHasOffsets) {
      static_cast<float*>(to.second)[at] = static_cast<float>(quantized.sum) * quantized.scale;
    } else {
      static_cast<int32_t*>(to.second)[at] = -zero_code * quantized.sum;
    }
  });
  op.x = to.x;
  op.row_size = num_blocks * kBlock * kPlanes;
  op.x_scales = to.first;
  op.offsets = kHasOffsets ? nullptr : static_cast<const int32_t*>(to.second);
  op.x_sums = kHasOffsets ? static_cast<const float*>(to.second) : nullptr;
  run_blocks<Products, kHasOffsets>(op, rows.count);
}

#if defined(FS_SIMD_BF16)
template <bool kHasOffsets>
void run_bf16(QuantizedProduct<bf16> op, const Rows& rows, const Tensor& workspace) {
  const Prepared<bf16> to(workspace, rows);
  const int64_t num_blocks = rows.num_blocks();
  rows.each_block([&](int64_t row, int64_t index, const float (&block)[kBlock]) {
    bf16* x = to.x + (row * num_blocks + index) * kBlock;
    for (int i = 0; i < kBlock; ++i) x[i ^ ((i & 1) != (i >> 1 & 1) ? 3 : 0)] = to_bf16(block[i]);
    float sum = 0.0f;
    for (int i = 0; i < kBlock; ++i) sum += to_float(x[i]);
    to.first[row * num_blocks + index] = sum;
  });
  op.x = to.x;
  op.x_sums = to.first;
  run_blocks<Bf16Products<!kHasOffsets>, kHasOffsets>(op, rows.count);
}
#endif

template <int kBits>
void run_float(QuantizedProduct<float> op, const Rows& rows, const Tensor& workspace) {
  const Prepared<float> to(workspace, rows);
  rows.each_block([&](int64_t row, int64_t index, const float (&block)[kBlock]) {
    std::memcpy(to.x + (row * rows.num_blocks() + index) * kBlock, block, sizeof(block));
  });
  op.x = to.x;
  run_dequantized<kBits>(op, rows.count);
}

template <class Op>
Rows rows_of(const Op& op, const int32_t* order) {
  return {op.x.template ptr<const float>(), op.x.stride[0], op.x.shape[0], op.x.shape[1], order};
}

template <class Input, class Op>
QuantizedProduct<Input> product_of(const Op& op, const QuantizedPanels& panels, bool zero_points) {
  QuantizedProduct<Input> product{.panels = panels,
                                  .packed = op.packed.template ptr<const uint8_t>(),
                                  .zero_points = zero_points,
                                  .x = nullptr,
                                  .row_size = panels.padded_depth(),
                                  .x_scales = nullptr,
                                  .offsets = nullptr,
                                  .x_sums = nullptr,
                                  .out = op.out.template ptr<float>(),
                                  .out_stride = op.out.stride[0],
                                  .bias = nullptr};
  if constexpr (requires { op.bias; }) {
    if (op.bias.defined()) product.bias = op.bias.template ptr<const float>();
  } else {
    product.is_gated = true;
  }
  return product;
}

// Int4 weights by integers, of which Products makes sums.
template <class Products>
void run_int4(const QuantizedProduct<int8_t>& product, const Rows& rows, const Tensor& workspace) {
  if (product.panels.has_offsets) {
    run_integer<Products, true>(product, rows, workspace, 0);
  } else {
    run_integer<Products, false>(product, rows, workspace, kSymmetricZero);
  }
}

template <class Op>
void linear_int4(const Op& op, const OpContext&) {
  check_float32(op);
  const auto [form, panels, order] = check_int4(op);
  const bool zero_points = form == Int4Form::zero_points;
  const Rows rows = rows_of(op, order);
  const auto integers = product_of<int8_t>(op, panels, zero_points);
  if (op.activation_bits == 8) return run_int4<IntegerProducts>(integers, rows, op.workspace);
  if (op.activation_bits == 12) return run_int4<WideProducts<IntegerProducts>>(integers, rows, op.workspace);
#if defined(FS_SIMD_BF16)
  const auto product = product_of<bf16>(op, panels, zero_points);
  if (panels.has_offsets) {
    run_bf16<true>(product, rows, op.workspace);
  } else {
    run_bf16<false>(product, rows, op.workspace);
  }
#else
  run_float<4>(product_of<float>(op, panels, zero_points), rows, op.workspace);
#endif
}

template <class Op>
void linear_int8(const Op& op, const OpContext&) {
  check_float32(op);
  const QuantizedPanels panels = check_int8(op);
  const Rows rows = rows_of(op, nullptr);
  if (op.activation_bits == 8) {
    run_integer<ByteProducts, false>(product_of<int8_t>(op, panels, false), rows, op.workspace, 128);
  } else if (op.activation_bits == 12) {
    run_integer<WideProducts<ByteProducts>, false>(product_of<int8_t>(op, panels, false), rows, op.workspace,
                                                   128);
  } else {
    run_float<8>(product_of<float>(op, panels, false), rows, op.workspace);
  }
}

}  // namespace

FS_REGISTER_CPU(LinearInt4, linear_int4<LinearInt4>, DType::u8)
FS_REGISTER_CPU(LinearInt4Gated, linear_int4<LinearInt4Gated>, DType::u8)
FS_REGISTER_CPU(LinearInt8, linear_int8<LinearInt8>, DType::u8)
FS_REGISTER_CPU(LinearInt8Gated, linear_int8<LinearInt8Gated>, DType::u8)

}  // namespace fs::FS_ISA
