// SPDX-License-Identifier: Apache-2.0
//
// The register tiles of `linear_int4` and `linear_int8`: vectors of output rows of a panel times M tokens,
// over all k.
//
// Every output element is one chain of additions in ascending order of the blocks of 32 inputs, in every tile
// shape: which tile computes an element, and beside which others, cannot change its bits.
#pragma once

#include "core/simd.h"
#include "cpu/code_products.h"
#include "cpu/linear_tile.h"    // each, load_rows
#include "cpu/quantize_rows.h"  // kBlock
#include "layout/quantized_panel.h"

namespace fs::FS_ISA {

// A product as a whole. Activations are rows of row_size numbers, whose blocks follow one another.
template <class Input>
struct QuantizedProduct {
  QuantizedPanels panels;
  const uint8_t* packed;
  bool zero_points;  // panels.has_offsets: these are zero points, not minimums
  const Input* x;
  int64_t row_size;
  // Per row and block; null where the arithmetic has none.
  const float* x_scales;   // of int8 inputs
  const int32_t* offsets;  // integers that the sums of products begin with
  const float* x_sums;     // sums of inputs as real numbers, for zero points and minimums
  float* out;
  int64_t out_stride;
  const float* bias;
  bool is_gated = false;                   // pairs of results become one (gate.h)
  int64_t first_token = 0, first_row = 0;  // those that `out` begins with

  const Input* row(int64_t token) const { return x + token * row_size; }
};

// What the rows of a vector share in a group: weight = scale * code + offset.
struct GroupScale {
  vf scale, offset;
};
template <bool kHasOffsets>
[[gnu::always_inline]] inline GroupScale load_scale(const uint8_t* header, int row, bool zero_points) {
  const auto at = [](const uint8_t* p) FS_INLINE { return load(reinterpret_cast<const f16*>(p)); };
  const vf scale = at(header + 2 * row);
  if constexpr (kHasOffsets) {
    const vf second = at(header + QuantizedPanels::kHeader + 2 * row);
    return {scale, zero_points ? zero() - scale * second : second};
  } else {
    return {scale, zero()};
  }
}

// Results of rows [n, n + kLanes) for M tokens, which end with the weight's last row.
template <int M, class Input>
[[gnu::always_inline]] inline void store_rows(const vf* sums, const QuantizedProduct<Input>& op, int64_t n,
                                              int64_t token) {
  const int64_t rest = op.panels.num_rows - n;
  if (rest <= 0) return;
  const int count = rest < kLanes ? static_cast<int>(rest) : kLanes;
  vf bias = zero();
  if (op.bias != nullptr) bias = load_rows(op.bias + n, count);
  each<M>([&](auto m) FS_INLINE {
    float* target = op.out + (token + m.value - op.first_token) * op.out_stride + n - op.first_row;
    const vf sum = op.bias == nullptr ? sums[m.value] : sums[m.value] + bias;
    if (count == kLanes) {
      store(target, sum);
    } else {
      store_first(target, sum, count);
    }
  });
}

// Products::kHalves * V vectors of output rows, the first at row `first` of the panel's half. Per block of 32
// inputs the products are summed on their own, then scaled into the chain.
template <class Products, bool kHasOffsets, int V, int M>
void block_tile(const QuantizedProduct<typename Products::Input>& op, int64_t panel, int first,
                int64_t token) {
  constexpr int kVectors = Products::kHalves * V;
  constexpr int64_t kAhead = 2 * 1024;  // bytes of the stream: memory is always asked for something
  const QuantizedPanels panels = op.panels;
  const int64_t num_blocks = panels.num_blocks(), x_stride = op.row_size;
  const auto row_of = [&](int vector) FS_INLINE { return first + vector / V * 16 + vector % V * kLanes; };

  vf sums[kVectors * M];
  each<kVectors * M>([&](auto i) FS_INLINE { sums[i.value] = zero(); });
  const uint8_t* p = op.packed + panel * panels.panel_bytes();
  const auto* x = op.row(token);
  for (int64_t block = 0; block < num_blocks;) {
    GroupScale group[kVectors];
    each<kVectors>([&](auto i) FS_INLINE {
      group[i.value] = load_scale<kHasOffsets>(p, row_of(i.value), op.zero_points);
      if constexpr (Products::kHighScale != 1 && i.value / V == 1) {
        group[i.value].scale = group[i.value].scale * set1(1.0f / Products::kHighScale);
      }
    });
    p += panels.header_bytes();
    const int64_t end = block + panels.blocks_per_group();
    for (; block < end && block < num_blocks; ++block) {
      const int64_t at = token * num_blocks + block;  // + m * num_blocks
      typename Products::Sum products[kVectors * M];
      each<kVectors>([&](auto i) FS_INLINE {
        constexpr int kScale = i.value / V == 1 ? Products::kHighScale : 1;
        each<M>([&](auto m) FS_INLINE {
          const int32_t offset = op.offsets == nullptr ? 0 : op.offsets[at + m.value * num_blocks];
          products[i.value * M + m.value] = Products::begin(kScale * offset);
        });
      });
      const uint8_t* lines = p + (Products::kHalves == 1 ? first / 16 * 64 : 0) + first % 16 * 4;
      repeat<kBlock / 4>([&](int t) FS_INLINE {
        each<Products::kLineBytes / 64>([&](auto i) FS_INLINE {
          __builtin_prefetch(p + kAhead + t * Products::kLineBytes + i.value * 64, 0, 3);
        });
        Products::template add_line<V, M>(products, lines + t * Products::kLineBytes, x + 4 * t, x_stride);
      });
      p += panels.block_bytes();
      x += kBlock * Products::kPlanes;
      each<M>([&](auto m) FS_INLINE {
        const int64_t index = at + m.value * num_blocks;
        each<kVectors>([&](auto i) FS_INLINE {
          constexpr int kScale = i.value / V == 1 ? Products::kHighScale : 1;
          vf& sum = sums[i.value * M + m.value];
          const int32_t offset = op.offsets == nullptr ? 0 : op.offsets[index];
          const vf total = Products::total(products[i.value * M + m.value], kScale * offset);
          vf scale = group[i.value].scale;
          if constexpr (Products::kHasScales) scale = scale * set1(op.x_scales[index]);
          sum = fma(total, scale, sum);
          if constexpr (kHasOffsets) sum = fma(group[i.value].offset, set1(op.x_sums[index]), sum);
        });
      });
    }
  }
  each<kVectors>([&](auto i) FS_INLINE {
    store_rows<M>(sums + i.value * M, op, panel * QuantizedPanels::kRows + row_of(i.value), token);
  });
}

// float32 inputs times dequantised weights: the chain of `linear` over the same weights as float32. V vectors
// of output rows of each of the halves that share a line.
template <int kBits, int V, int M>
void dequantized_tile(const QuantizedProduct<float>& op, int64_t panel, int first, int64_t token) {
  constexpr int kHalves = kBits == 4 ? 2 : 1, kVectors = kHalves * V;
  constexpr int kZero = kBits == 4 ? kSymmetricZero : 128;
  const QuantizedPanels panels = op.panels;
  const int64_t num_blocks = panels.num_blocks(), x_stride = op.row_size;
  const auto row_of = [&](int vector) FS_INLINE { return first + vector / V * 16 + vector % V * kLanes; };

  vf sums[kVectors * M];
  each<kVectors * M>([&](auto i) FS_INLINE { sums[i.value] = zero(); });
  const uint8_t* p = op.packed + panel * panels.panel_bytes();
  const float* x = op.row(token);
  for (int64_t block = 0; block < num_blocks;) {
    GroupScale group[kVectors];
    each<kVectors>([&](auto i) FS_INLINE {
      if (panels.has_offsets) {
        group[i.value] = load_scale<true>(p, row_of(i.value), op.zero_points);
      } else {
        group[i.value] = load_scale<false>(p, row_of(i.value), false);
        group[i.value].offset = group[i.value].scale * set1(-kZero);
      }
    });
    p += panels.header_bytes();
    const int64_t end = block + panels.blocks_per_group();
    for (; block < end && block < num_blocks; ++block, p += panels.block_bytes()) {
      const uint8_t* line = p + (kHalves == 1 ? first / 16 * 64 : 0) + first % 16 * 4;
      for (int t = 0; t < kBlock / 4; ++t, line += panels.line_bytes(), x += 4) {
        each<4>([&](auto j) FS_INLINE {
          vf weights[kVectors];
          each<kVectors>([&](auto i) FS_INLINE {
            const vf codes =
                codes_of(line + i.value % V * 4 * kLanes, 8 * j.value + i.value / V * 4, (1 << kBits) - 1);
            weights[i.value] = fma(codes, group[i.value].scale, group[i.value].offset);
          });
          multiply_one<kVectors, M>(sums, weights, x + j.value, x_stride);
        });
      }
    }
  }
  each<kVectors>([&](auto i) FS_INLINE {
    store_rows<M>(sums + i.value * M, op, panel * QuantizedPanels::kRows + row_of(i.value), token);
  });
}

}  // namespace fs::FS_ISA
