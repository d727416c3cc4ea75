// SPDX-License-Identifier: Apache-2.0
//
// Codes, scales and zero points or minimums into the panels of layout/quantized_panel.h. Runs once per weight
// at load.
#include "core/simd.h"
#include "cpu/parallel.h"
#include "layout/quantized_panel.h"
#include "ops/ops.h"

namespace fs::FS_ISA {

namespace {

void check_packed(const char* op, const Tensor& packed, const QuantizedPanels& panels) {
  FS_CHECK(packed.shape[0] == panels.num_panels() && packed.shape[1] == panels.panel_bytes(),
           op << ": argument 'packed' is [" << packed.shape[0] << ", " << packed.shape[1] << "]; a weight ["
              << panels.num_rows << ", " << panels.depth << "] in groups of " << panels.group_size
              << " needs [" << panels.num_panels() << ", " << panels.panel_bytes() << "]");
}

// 0 to 16 as float16.
uint16_t small_integer(int value) {
  if (value == 0) return 0;
  const int exponent = 31 - __builtin_clz(static_cast<unsigned>(value));
  return static_cast<uint16_t>(((exponent + 15) << 10) | ((value << (10 - exponent)) & 0x3ff));
}

// One row of codes, four at a time: they are neighbours in a line, too. `flip` changes bits of each four. The
// row's bytes were zero.
void pack_row(uint8_t* packed, const QuantizedPanels& panels, int64_t n, const void* row, uint32_t flip) {
  const auto* codes = static_cast<const uint8_t*>(row);
  for (int64_t first = 0; first < panels.depth; first += QuantizedPanels::kBlock) {
    const QuantizedPanels::Place place = panels.code(n, first);
    uint8_t* line = packed + place.byte;
    for (int64_t k = first; k < first + QuantizedPanels::kBlock && k < panels.depth; k += 4) {
      const int64_t missing = panels.depth - k < 4 ? 4 - (panels.depth - k) : 0;
      uint32_t four = 0;
      uint32_t there;
      if (missing == 0) {
        std::memcpy(&four, codes + k, 4);
      } else {
        std::memcpy(&four, codes + k, static_cast<size_t>(4 - missing));
      }
      std::memcpy(&there, line, sizeof there);
      there |= (four ^ flip >> 8 * missing) << place.shift;  // a code of 4 bits stays in its byte
      std::memcpy(line, &there, sizeof there);
      line += panels.line_bytes();
    }
  }
}

template <class F>
void pack_panels(uint8_t* packed, const QuantizedPanels& panels, const Tensor& scales, const F& row) {
  parallel_rows(panels.num_panels(), 1, [&](int64_t panel, int64_t, int) {
    std::memset(packed + panel * panels.panel_bytes(), 0, static_cast<size_t>(panels.panel_bytes()));
    for (int64_t r = 0; r < QuantizedPanels::kRows; ++r) {
      const int64_t n = panel * QuantizedPanels::kRows + r;
      if (n >= panels.num_rows) return;
      for (int64_t g = 0; g < panels.num_groups(); ++g) {
        std::memcpy(packed + panels.scale_offset(n, g), scales.ptr<uint16_t>() + n * panels.num_groups() + g,
                    2);
      }
      row(n);
    }
  });
}

void pack_int4(const PackInt4& op, const OpContext&) {
  const Int4Form form = int4_form(op.zero_points, op.minimums);
  check_groups("pack_int4", op.scales, op.codes.shape[1], op.group_size);
  const QuantizedPanels panels{op.codes.shape[0], op.codes.shape[1], op.group_size, 4,
                               form != Int4Form::symmetric};
  check_packed("pack_int4", op.packed, panels);
  auto* packed = op.packed.ptr<uint8_t>();
  pack_panels(packed, panels, op.scales, [&](int64_t n) {
    pack_row(packed, panels, n, op.codes.ptr<const uint8_t>() + n * op.codes.stride[0], 0);
    for (int64_t g = 0; form != Int4Form::symmetric && g < panels.num_groups(); ++g) {
      const int64_t at = n * panels.num_groups() + g;
      const uint16_t value = form == Int4Form::minimums
                                 ? op.minimums.ptr<const uint16_t>()[at]
                                 : small_integer(op.zero_points.ptr<const uint8_t>()[at]);
      std::memcpy(packed + panels.zero_or_minimum_offset(n, g), &value, 2);
    }
  });
}

void pack_int8(const PackInt8& op, const OpContext&) {
  check_groups("pack_int8", op.scales, op.codes.shape[1], op.group_size);
  const QuantizedPanels panels{op.codes.shape[0], op.codes.shape[1], op.group_size, 8, false};
  check_packed("pack_int8", op.packed, panels);
  auto* packed = op.packed.ptr<uint8_t>();
  pack_panels(packed, panels, op.scales, [&](int64_t n) {
    pack_row(packed, panels, n, op.codes.ptr<const int8_t>() + n * op.codes.stride[0], 0x80808080);  // + 128
  });
}

}  // namespace

FS_REGISTER_CPU(PackInt4, pack_int4, DType::u8)
FS_REGISTER_CPU(PackInt8, pack_int8, DType::i8)

}  // namespace fs::FS_ISA
