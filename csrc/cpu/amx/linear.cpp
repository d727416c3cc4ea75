// SPDX-License-Identifier: Apache-2.0
//
// `linear` over bfloat16 weights, `linear_int4` and `linear_int8`, and the gated forms of these, on AMX's
// tile registers: for activations of 16 bits weights of 4 and 8 bits become bfloat16 a chunk at a time, in
// the L1 cache. Everything else is left to the kernels of avx512bf16.
#include "cpu/amx/product.h"

#include "cpu/amx/dequantize.h"
#include "cpu/amx/linear_integer.h"
#include "cpu/amx/one_token.h"
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
class PackedPanels {
 public:
  PackedPanels(const bf16* packed, int64_t depth) : packed_(packed), depth_(depth) {}

  static constexpr bool kMadeInPlace = false;
  const bf16* chunk(int64_t panel, Span blocks, bf16* buffer) const {
    const bf16* weights = at(panel, blocks.begin);
    if (blocks.end * kTileDepth <= padded_depth(depth_)) return weights;
    const int64_t held = padded_depth(depth_) - blocks.begin * kTileDepth;  // the rest are zeros
    std::memset(buffer, 0, static_cast<size_t>(blocks.size() * kTileDepth * kPanelRows) * sizeof(bf16));
    std::memcpy(buffer, weights, static_cast<size_t>(held * kPanelRows) * sizeof(bf16));
    return buffer;
  }

  // Blocks are where they lie and only asked for.
  class Maker {
   public:
    Maker(const PackedPanels& weights, int64_t panel)
        : p_(reinterpret_cast<const char*>(weights.at(panel, 0))) {}
    [[gnu::always_inline]] void next(bf16*) {
      constexpr int64_t kBytes = kTileDepth * kPanelRows * int64_t{sizeof(bf16)};
      for (int64_t line = 0; line < kBytes; line += 64) __builtin_prefetch(p_ + line, 0, 2);
      p_ += kBytes;
    }

   private:
    const char* p_;
  };

 private:
  const bf16* at(int64_t panel, int64_t block) const {
    return packed_ + (panel * padded_depth(depth_) + block * kTileDepth) * kPanelRows;
  }

  const bf16* packed_;
  int64_t depth_;
};

template <class Op>
Rows rows_of(const Op& op, const int32_t* order) {
  return {op.x.template ptr<const float>(), op.x.stride[0], op.x.shape[0], op.x.shape[1], order};
}

// Where float32 results of an op go.
template <class Op>
auto output_of(const Op& op) {
  const int64_t stride = op.out.stride[0], width = op.out.shape[1];
  if constexpr (requires { op.bias; }) {
    const float* bias = op.bias.defined() ? op.bias.template ptr<const float>() : nullptr;
    return TileOutput{op.out.template ptr<float>(), stride, width, bias};
  } else {
    return GatedTileOutput{op.out.template ptr<float>(), stride, width};
  }
}

// Calls f with where results go.
template <class Op, class F>
void with_output(const Op& op, const F& f) {
  if constexpr (!requires { op.bias; }) {
    if (op.out.dtype == DType::bf16) {
      return f(GatedTileOutput{op.out.template ptr<bf16>(), op.out.stride[0], op.out.shape[1]});
    }
  }
  f(output_of(op));
}

// Whether activations are bfloat16 already.
template <class Op>
bool is_rounded(const Op& op, const int32_t* order) {
  if (op.x.dtype == DType::f32) return false;
  FS_CHECK(op.x.shape[1] % kTileDepth == 0 && order == nullptr,
           Op::info.name << ": argument 'x' is bfloat16 [M, " << op.x.shape[1] << "]; multiples of "
                         << kTileDepth << " inputs in their own order are allowed, or float32");
  return true;
}

template <class Op>
void multiply(const Op& op, const int32_t* order, const auto& weights) {
  const int64_t num_tokens = op.x.shape[0], depth = op.x.shape[1];
  const TokenTiles tokens =
      is_rounded(op, order)
          ? TokenTiles{op.x.template ptr<const bf16>(), num_tokens, depth / kTileDepth, op.x.stride[0]}
          : round_to_tiles(op.workspace.template ptr<bf16>(), rows_of(op, order));
  with_output(op, [&](const auto& output) { multiply_on_tiles(tokens, weights, output); });
}

template <int kBits, class Op>
void multiply_quantized(const Op& op, const int32_t* order, const DequantizedPanels<kBits>& weights) {
  if (op.x.shape[0] != 1) return multiply(op, order, weights);
  auto* workspace = op.workspace.template ptr<float>();
  const float* x = is_rounded(op, order)
                       ? widen_token(workspace, op.x.template ptr<const bf16>(), op.x.shape[1])
                       : round_token(workspace, rows_of(op, order));
  with_output(op, [&](const auto& output) { multiply_one_token(x, weights, output); });
}

template <class Op>
void linear(const Op& op, const OpContext& context) {
  if (op.packed.dtype != DType::bf16) return run_below(op, context);
  check_linear(op);
  multiply(op, nullptr, PackedPanels{op.packed.template ptr<const bf16>(), op.x.shape[1]});
}

template <class Op>
void linear_int4(const Op& op, const OpContext& context) {
  const bool rounds = op.activation_bits != 16, wide = op.activation_bits == 12;
  if (rounds && op.x.shape[0] < least_tile_tokens(op.activation_bits)) return run_below(op, context);
  const auto [form, panels, order] = check_int4(op);
  const auto* packed = op.packed.template ptr<const uint8_t>();
  const bool zero_points = form == Int4Form::zero_points;
  if (!rounds) return multiply_quantized(op, order, DequantizedPanels<4>{panels, packed, zero_points});
  check_float32(op);
  const Rows rows = rows_of(op, order);
  if (panels.has_offsets) {
    const auto run = wide ? multiply_rounded<4, 2, true, decltype(output_of(op))>
                          : multiply_rounded<4, 1, true, decltype(output_of(op))>;
    run(rows, op.workspace, panels, packed, zero_points, output_of(op));
  } else {
    const auto run = wide ? multiply_rounded<4, 2, false, decltype(output_of(op))>
                          : multiply_rounded<4, 1, false, decltype(output_of(op))>;
    run(rows, op.workspace, panels, packed, false, output_of(op));
  }
}

template <class Op>
void linear_int8(const Op& op, const OpContext& context) {
  const bool rounds = op.activation_bits != 16;
  if (rounds && op.x.shape[0] < least_tile_tokens(op.activation_bits)) return run_below(op, context);
  const QuantizedPanels panels = check_int8(op);
  const auto* packed = op.packed.template ptr<const uint8_t>();
  if (!rounds) return multiply_quantized(op, nullptr, DequantizedPanels<8>{panels, packed, false});
  check_float32(op);
  const auto run = op.activation_bits == 12 ? multiply_rounded<8, 2, false, decltype(output_of(op))>
                                            : multiply_rounded<8, 1, false, decltype(output_of(op))>;
  run(rows_of(op, nullptr), op.workspace, panels, packed, false, output_of(op));
}

}  // namespace

FS_REGISTER_CPU(Linear, linear<Linear>, kWeights)
FS_REGISTER_CPU(LinearGated, linear<LinearGated>, kWeights)
FS_REGISTER_CPU(LinearInt4, linear_int4<LinearInt4>, DType::u8)
FS_REGISTER_CPU(LinearInt4Gated, linear_int4<LinearInt4Gated>, DType::u8)
FS_REGISTER_CPU(LinearInt8, linear_int8<LinearInt8>, DType::u8)
FS_REGISTER_CPU(LinearInt8Gated, linear_int8<LinearInt8Gated>, DType::u8)

}  // namespace fs::FS_ISA
