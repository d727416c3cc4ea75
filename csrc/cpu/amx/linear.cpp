// SPDX-License-Identifier: Apache-2.0
//
// `linear` over bfloat16 weights, and `linear_int4` and `linear_int8` with activations of 16 bits, on AMX's
// tile registers: weights of 4 and 8 bits become bfloat16 a chunk at a time, in the L1 cache. Everything else
// is left to the kernels of avx512bf16.
#include "cpu/amx/product.h"

#include "cpu/amx/dequantize.h"
#include "cpu/amx/few_tokens.h"
#include "cpu/linear_check.h"

namespace fs::FS_ISA {

namespace {

#if defined(FS_SIMD_EMULATED)
constexpr Isa kBelow = Isa::avx512bf16_emulated;
#else
constexpr Isa kBelow = Isa::avx512bf16;
#endif

template <class Op>
void run_below(const Op& op, const OpContext& context) {
  Slot<Op>::cpu[static_cast<int>(kBelow)].kernel(op, context);
}

// Weights as `pack_linear` leaves them.
struct PackedPanels {
  const bf16* packed;
  int64_t depth;

  [[gnu::always_inline]] const bf16* chunk(int64_t panel, int64_t block, int64_t count,
                                           WeightChunk& buffer) const {
    constexpr int64_t kAhead = 8 * 1024;  // bytes of the stream: memory is always asked for something
    const int64_t first = block * kTileDepth, elements = count * kTileDepth * kPanelRows;
    const bf16* weights = packed + (panel * padded_depth(depth) + first) * kPanelRows;
    const auto* bytes = reinterpret_cast<const char*>(weights);
    for (int64_t at = 0; at < elements * int64_t{sizeof(bf16)}; at += 64) {
      __builtin_prefetch(bytes + kAhead + at, 0, 2);
    }
    if (first + count * kTileDepth <= depth) return weights;
    const int64_t held = (padded_depth(depth) - first) * kPanelRows;  // the rest are zeros
    std::memset(buffer.value, 0, static_cast<size_t>(elements) * sizeof(bf16));
    std::memcpy(buffer.value, weights, static_cast<size_t>(held < elements ? held : elements) * sizeof(bf16));
    return buffer.value;
  }
};

template <class Op>
Rows rows_of(const Op& op, const int32_t* order) {
  return {op.x.template ptr<const float>(), op.x.stride[0], op.x.shape[0], op.x.shape[1], order};
}

template <class Op>
TileOutput output_of(const Op& op) {
  return {op.out.template ptr<float>(), op.out.stride[0], op.out.shape[1],
          op.bias.defined() ? op.bias.template ptr<const float>() : nullptr};
}

template <class Op>
void multiply(const Op& op, const int32_t* order, const auto& weights) {
  const TokenTiles tokens = round_to_tiles(op.workspace.template ptr<bf16>(), rows_of(op, order));
  multiply_on_tiles(tokens, weights, output_of(op));
}

template <int kBits, class Op>
void multiply_quantized(const Op& op, const int32_t* order, const DequantizedPanels<kBits>& weights) {
  if (op.x.shape[0] > kFewTokens) return multiply(op, order, weights);
  multiply_few_tokens(rows_of(op, order), op.workspace.template ptr<float>(), weights, output_of(op));
}

void linear(const Linear& op, const OpContext& context) {
  if (op.packed.dtype != DType::bf16) return run_below(op, context);
  check_linear(op);
  multiply(op, nullptr, PackedPanels{op.packed.ptr<const bf16>(), op.x.shape[1]});
}

void linear_int4(const LinearInt4& op, const OpContext& context) {
  if (op.activation_bits != 16) return run_below(op, context);
  const auto [form, panels, order] = check_int4(op);
  multiply_quantized(
      op, order, DequantizedPanels<4>{panels, op.packed.ptr<const uint8_t>(), form == Int4Form::zero_points});
}

void linear_int8(const LinearInt8& op, const OpContext& context) {
  if (op.activation_bits != 16) return run_below(op, context);
  multiply_quantized(op, nullptr,
                     DequantizedPanels<8>{check_int8(op), op.packed.ptr<const uint8_t>(), false});
}

}  // namespace

FS_REGISTER_CPU(Linear, linear, kWeights)
FS_REGISTER_CPU(LinearInt4, linear_int4, DType::u8)
FS_REGISTER_CPU(LinearInt8, linear_int8, DType::u8)

}  // namespace fs::FS_ISA
