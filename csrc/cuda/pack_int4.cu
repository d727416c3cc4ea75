// SPDX-License-Identifier: Apache-2.0
//
// Codes, scales and zero points or minimums to the panels of layout/int4_fragment.h. Done once per weight:
// one thread per 32-bit word of the result, written in order, gathers what belongs there.
//
// ptxas: pack_int4_kernel <= 64 registers, 256 threads
#include "cuda/launch.cuh"
#include "layout/int4_fragment.h"

namespace fs::cuda {

namespace {

constexpr int kThreads = 256;

struct Operands {
  uint32_t* packed;
  const uint8_t* codes;
  const uint16_t* scales;
  const uint8_t* zero_points;
  const uint16_t* minimums;
  int64_t codes_stride, num_rows, depth, group_size, num_groups;  // groups as given
  Int4Layout layout;
  int64_t num_words;
};

// The group, as given, that holds a stored one; -1 beyond K.
__device__ int64_t given_group(const Operands& op, int64_t stored) {
  if (op.layout.group_size == 0) return 0;
  const int64_t k = stored * op.layout.group_size;
  return k < op.depth ? k / op.group_size : -1;
}

__global__ void __launch_bounds__(kThreads) pack_int4_kernel(const Operands op) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= op.num_words) return;
  const int64_t panel_words = op.layout.panel_bytes() / 4;
  const int64_t first_row = at / panel_words * kInt4Rows;
  const int64_t byte = at % panel_words * 4;
  uint32_t word = 0;
  if (byte < op.layout.code_bytes) {
    for (int shift = 0; shift < 32; shift += 4) {
      const Int4Weight weight = int4_weight({byte, shift});
      const int64_t n = first_row + weight.row;
      // Padding is the code whose weight is zero in the symmetric form; others multiply zeros with it.
      const uint32_t code =
          n < op.num_rows && weight.k < op.depth ? op.codes[n * op.codes_stride + weight.k] & 15u : 8u;
      word |= code << shift;
    }
  } else {
    const bool is_scale = byte < op.layout.code_bytes + op.layout.scale_bytes;
    const bool bytes = !is_scale && op.zero_points != nullptr;
    const int64_t offset = byte - op.layout.code_bytes - (is_scale ? 0 : op.layout.scale_bytes);
    const int width = bytes ? 1 : 2;
    for (int i = 0; i < 4 / width; ++i) {
      const int64_t value = offset / width + i;
      const int64_t n = first_row + int4_scale_row(value % kInt4Rows);
      const int64_t group = given_group(op, value / kInt4Rows);
      if (n >= op.num_rows || group < 0) continue;
      const int64_t from = n * op.num_groups + group;
      const uint32_t found = bytes ? op.zero_points[from] : is_scale ? op.scales[from] : op.minimums[from];
      word |= found << (8 * width * i);
    }
  }
  op.packed[at] = word;
}

void pack_int4(const PackInt4& op, const OpContext& context) {
  const int64_t num_rows = op.codes.shape[0], depth = op.codes.shape[1], num_groups = op.scales.shape[1];
  check_groups("pack_int4", op.scales, depth, op.group_size);
  const Int4Form form = int4_form(op.zero_points, op.minimums);
  const Int4Layout layout = int4_layout(num_rows, depth, op.group_size, form);
  FS_CHECK(op.packed.shape[0] == layout.num_panels && op.packed.shape[1] == layout.panel_bytes(),
           "pack_int4: packed is " << describe(op.packed) << "; a weight of " << num_rows << " x " << depth
                                   << " in groups of " << op.group_size << " needs [" << layout.num_panels
                                   << ", " << layout.panel_bytes() << "]");
  Operands operands{};
  operands.packed = op.packed.ptr<uint32_t>();
  operands.codes = op.codes.ptr<const uint8_t>();
  operands.scales = op.scales.ptr<const uint16_t>();
  operands.zero_points = op.zero_points.defined() ? op.zero_points.ptr<const uint8_t>() : nullptr;
  operands.minimums = op.minimums.defined() ? op.minimums.ptr<const uint16_t>() : nullptr;
  operands.codes_stride = op.codes.stride[0];
  operands.num_rows = num_rows;
  operands.depth = depth;
  operands.group_size = op.group_size;
  operands.num_groups = num_groups;
  operands.layout = layout;
  operands.num_words = op.packed.numel() / 4;
  if (operands.num_words == 0) return;
  const int64_t blocks = ceil_div(operands.num_words, kThreads);
  FS_CHECK(blocks <= kMaxGridX, "pack_int4: " << num_rows << " x " << depth << " is too large");
  FS_CHECK(reinterpret_cast<uintptr_t>(op.packed.data) % 16 == 0,
           "pack_int4: packed is not aligned to 16 bytes");
  pack_int4_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream_of(context)>>>(operands);
  check_launch("pack_int4");
}

}  // namespace

FS_REGISTER_CUDA(PackInt4, pack_int4, DType::u8)

}  // namespace fs::cuda
