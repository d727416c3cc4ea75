// SPDX-License-Identifier: Apache-2.0
//
// out = x @ weight.T + bias over weights of 4 or 8 bits (layout/quantized_panel.h).
//
// First the activations are made ready in the workspace, once for all panels (quantize_rows.h); then the
// tiles of quantized_tile.h run over blocks of tokens and ranges of panels.
//
// Bound: with few tokens memory, the packed bytes once; with many the multiply instructions, of which a block
// of 32 inputs needs 8 (int8 activations) or 16 (bf16) per token and 16 rows, and 2 or 3 more to scale the
// sum.
#include "cpu/amx_quantized_tile.h"
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

// No tile wider than the ordinary ones.
struct NoWideTiles {
  static constexpr int kTokens = 1;
  struct Setup {};
  void operator()(int64_t, int64_t) const {}
};

// tile(Index<M>, panel, token) over everything but what wide(panel, token) takes, wide.kTokens at a time.
template <class Input, class Wide, class F>
void run_tiles(const QuantizedProduct<Input>& op, int64_t num_tokens, const Wide& wide, const F& tile) {
  const int64_t depth = op.panels.padded_depth();
  const auto range = [&](Span panels, Span units) {
    const int64_t end = units.end * Wide::kTokens;
    const Span tokens{units.begin * Wide::kTokens, end < num_tokens ? end : num_tokens};
    const int64_t num_wide = Wide::kTokens > 1 ? tokens.size() / Wide::kTokens : 0;
    const Span rest{tokens.begin + num_wide * Wide::kTokens, tokens.end};
    const int64_t num_tiles = (rest.size() + kMaxTokens - 1) / kMaxTokens;
    [[maybe_unused]] const typename Wide::Setup setup;
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
      for (int64_t i = 0; i < num_wide; ++i) wide(panel, tokens.begin + i * Wide::kTokens);
      for (int64_t i = 0; i < num_tiles; ++i) {
        const Span piece = part(rest.size(), num_tiles, i);
        with_tokens<kMaxTokens>(piece.size(), [&](auto m) { tile(m, panel, rest.begin + piece.begin); });
      }
    }
  };
  for_panel_ranges(op.panels.num_panels(), (num_tokens + Wide::kTokens - 1) / Wide::kTokens,
                   depth * static_cast<int64_t>(sizeof(Input)) * Wide::kTokens,
                   QuantizedPanels::kRows * depth * Wide::kTokens, Wide::kTokens > 1 ? 1 : kMaxTokens, range);
}

#if defined(FS_SIMD_AMX) && !defined(FS_SIMD_EMULATED)
template <class Products, bool kHasOffsets>
struct AmxTile {
  static constexpr int kTokens = kAmxTokens;
  using Setup = AmxTiles;
  const QuantizedProduct<int8_t>& op;

  void operator()(int64_t panel, int64_t token) const {
    amx_tile<Products, kHasOffsets>(op, panel, 0, token);
    amx_tile<Products, kHasOffsets>(op, panel, 1, token);
  }
};
#endif

template <class Products, bool kHasOffsets, class Wide = NoWideTiles>
void run_blocks(const QuantizedProduct<typename Products::Input>& op, int64_t num_tokens,
                const Wide& wide = {}) {
  run_tiles(op, num_tokens, wide, [&](auto m, int64_t panel, int64_t token) {
    constexpr int V = m.value == 1 ? kVectorsOfHalf : 1;
    each_piece<Products::kHalves, V>(
        [&](int first) { block_tile<Products, kHasOffsets, V, m.value>(op, panel, first, token); });
  });
}

template <int kBits>
void run_dequantized(const QuantizedProduct<float>& op, int64_t num_tokens) {
  run_tiles(op, num_tokens, NoWideTiles{}, [&](auto m, int64_t panel, int64_t token) {
    constexpr int V = m.value == 1 ? kVectorsOfHalf : 1;
    each_piece<kBits == 4 ? 2 : 1, V>(
        [&](int first) { dequantized_tile<kBits, V, m.value>(op, panel, first, token); });
  });
}

// The workspace: inputs, then two arrays of a number per row and block.
template <class Input>
struct Prepared {
  Input* x;
  float* first;
  void* second;

  Prepared(const Tensor& workspace, const Rows& rows)
      : x(workspace.ptr<Input>()),
        first(reinterpret_cast<float*>(x + rows.count * rows.num_blocks() * kBlock)),
        second(first + rows.count * rows.num_blocks()) {}
};

// Rounds to 8 bits. zero_code: the code of weight 0 where all sums begin with -zero_code times the inputs'
// sum; 0: the sums of inputs are kept as real numbers instead.
template <class Products, bool kHasOffsets>
void run_integer(QuantizedProduct<int8_t> op, const Rows& rows, const Tensor& workspace, int zero_code) {
  const Prepared<int8_t> to(workspace, rows);
  const int64_t num_blocks = rows.num_blocks();
#if defined(FS_SIMD_AMX) && !defined(FS_SIMD_EMULATED)
  const int64_t num_wide = rows.count - rows.count % kAmxTokens;
#else
  constexpr int64_t num_wide = 0;
#endif
  rows.each_block([&](int64_t row, int64_t index, const float (&block)[kBlock]) {
    int64_t at = row * num_blocks + index;
    if (row < num_wide)
      at = (row - row % 16) * num_blocks + index * 16 + row % 16;  // see amx_quantized_tile.h
    const QuantizedBlock quantized = quantize_block(to.x + at * kBlock, block);
    to.first[at] = quantized.scale;
    if (kHasOffsets) {
      static_cast<float*>(to.second)[at] = static_cast<float>(quantized.sum) * quantized.scale;
    } else {
      static_cast<int32_t*>(to.second)[at] = -zero_code * quantized.sum;
    }
  });
  op.x = to.x;
  op.x_scales = to.first;
  op.offsets = kHasOffsets ? nullptr : static_cast<const int32_t*>(to.second);
  op.x_sums = kHasOffsets ? static_cast<const float*>(to.second) : nullptr;
#if defined(FS_SIMD_AMX) && !defined(FS_SIMD_EMULATED)
  if (rows.count >= kAmxTokens) {
    return run_blocks<Products, kHasOffsets>(op, rows.count, AmxTile<Products, kHasOffsets>{op});
  }
#endif
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

void check(const char* op, const Tensor& packed, const QuantizedPanels& panels, const Tensor& workspace,
           int64_t num_tokens, int64_t activation_bits) {
  check_group_size(op, panels.depth, panels.group_size);
  check_activation_bits(op, activation_bits);
  FS_CHECK(packed.shape[0] == panels.num_panels() && packed.shape[1] == panels.panel_bytes(),
           op << ": argument 'packed' is [" << packed.shape[0] << ", " << packed.shape[1]
              << "]; with out [M, " << panels.num_rows << "], x [M, " << panels.depth << "] and groups of "
              << panels.group_size << " it must be [" << panels.num_panels() << ", " << panels.panel_bytes()
              << "]");
  const int64_t needed = quantized_workspace_bytes(num_tokens, panels.depth, activation_bits);
  FS_CHECK(workspace.shape[0] >= needed, op << ": argument 'workspace' has " << workspace.shape[0]
                                            << " bytes; needs " << needed << " for " << num_tokens
                                            << " rows of " << panels.depth);
}

template <class Op>
Rows rows_of(const Op& op, const int32_t* order) {
  return {op.x.template ptr<const float>(), op.x.stride[0], op.x.shape[0], op.x.shape[1], order};
}

template <class Input, class Op>
QuantizedProduct<Input> product_of(const Op& op, const QuantizedPanels& panels, bool zero_points) {
  return {panels,           op.packed.template ptr<const uint8_t>(),
          zero_points,      nullptr,
          nullptr,          nullptr,
          nullptr,          op.out.template ptr<float>(),
          op.out.stride[0], op.bias.defined() ? op.bias.template ptr<const float>() : nullptr};
}

void check_order(const int32_t* order, int64_t depth) {
  for (int64_t k = 0; order != nullptr && k < depth; ++k) {
    FS_CHECK(order[k] >= 0 && order[k] < depth,
             "linear_int4: input_order[" << k << "] is " << order[k] << "; inputs are 0 to " << depth - 1);
  }
}

void linear_int4(const LinearInt4& op, const OpContext&) {
  const Int4Form form = int4_form("linear_int4", op.form);
  const bool has_offsets = form != Int4Form::symmetric, zero_points = form == Int4Form::zero_points;
  const QuantizedPanels panels{op.out.shape[1], op.x.shape[1], op.group_size, 4, has_offsets};
  check("linear_int4", op.packed, panels, op.workspace, op.x.shape[0], op.activation_bits);
  const int32_t* order = op.input_order.defined() ? op.input_order.ptr<const int32_t>() : nullptr;
  check_order(order, panels.depth);
  const Rows rows = rows_of(op, order);
  if (op.activation_bits == 8) {
    const auto product = product_of<int8_t>(op, panels, zero_points);
    if (has_offsets) {
      run_integer<IntegerProducts, true>(product, rows, op.workspace, 0);
    } else {
      run_integer<IntegerProducts, false>(product, rows, op.workspace, kSymmetricZero);
    }
    return;
  }
#if defined(FS_SIMD_BF16)
  const auto product = product_of<bf16>(op, panels, zero_points);
  if (has_offsets) {
    run_bf16<true>(product, rows, op.workspace);
  } else {
    run_bf16<false>(product, rows, op.workspace);
  }
#else
  run_float<4>(product_of<float>(op, panels, zero_points), rows, op.workspace);
#endif
}

void linear_int8(const LinearInt8& op, const OpContext&) {
  const QuantizedPanels panels{op.out.shape[1], op.x.shape[1], op.group_size, 8, false};
  check("linear_int8", op.packed, panels, op.workspace, op.x.shape[0], op.activation_bits);
  const Rows rows = rows_of(op, nullptr);
  if (op.activation_bits == 8) {
    run_integer<ByteProducts, false>(product_of<int8_t>(op, panels, false), rows, op.workspace, 128);
  } else {
    run_float<8>(product_of<float>(op, panels, false), rows, op.workspace);
  }
}

}  // namespace

FS_REGISTER_CPU(LinearInt4, linear_int4, DType::u8)
FS_REGISTER_CPU(LinearInt8, linear_int8, DType::u8)

}  // namespace fs::FS_ISA
