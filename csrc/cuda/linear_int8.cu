// SPDX-License-Identifier: Apache-2.0
//
// Matrix product with 8-bit weights in groups of 32 inputs that share a scale (linear_tile.cuh,
// layout/int8_fragment.h).
//
// Codes become operands exactly (dequantize.cuh). A group's products are summed on the tensor cores from
// zero, and the sum is scaled in float32, by FMA into the running sum: scales keep their full precision for
// both activation formats.
//
// Bytes at least: N K codes and their scales once per row of tiles, M K activations once per column of tiles
// (L2), M N outputs. Bound: memory up to 32 rows or so, then instructions and tensor cores.
//
// ptxas: linear_int8_kernel <= 255 registers, 128 threads
// ptxas: pack_int8_kernel <= 40 registers, 256 threads
#include "cuda/dequantize.cuh"
#include "cuda/linear_tile.cuh"
#include "layout/int4.h"
#include "layout/int8_fragment.h"

namespace fs::cuda {

namespace {

using linear_tile::kProducts;
using linear_tile::kSteps;
using linear_tile::Operands;
static_assert(linear_tile::kPanelColumns == kInt8Rows && linear_tile::kStageDepth == kInt8Depth);

constexpr int kGroupSteps = kInt8Group / 16;
constexpr int kGroups = kSteps / kGroupSteps;  // of a stage

__device__ __forceinline__ uint32_t word_of(const uint4& words, int i) {
  return i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w;
}

template <class T>
class Weights {
 public:
  static constexpr float kStep = CodeFormat<T>::kStep;
  struct Stage {
    uint4 codes[kSteps];
    uint4 scales[kGroups];  // of the columns of this lane's sums
  };

  __device__ __forceinline__ Weights(const Operands<T>& op, int panel, int end_stage)
      : panel_(panel_of(op, panel)), end_(end_stage) {}
  __device__ __forceinline__ void load(Stage& to, int stage) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const uint8_t* from = panel_ + stage * kInt8StageBytes;
#pragma unroll
    for (int i = 0; i < kSteps + kGroups; ++i) {
      uint4& words = i < kSteps ? to.codes[i] : to.scales[i - kSteps];
      const int64_t at =
          i < kSteps ? i * 512 + lane * 16 : kInt8CodeBytes + (i - kSteps) * 64 + lane % 4 * 16;
      words = uint4{0, 0, 0, 0};
      if (stage < end_) words = __ldcs(reinterpret_cast<const uint4*>(from + at));
    }
  }
  template <int kTiles>
  __device__ __forceinline__ void multiply(linear_tile::Sums<kTiles>& sums, const Stage& weights,
                                           uint32_t ring) const {
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      uint32_t b[kGroupSteps][kProducts][2];
      float scales[kProducts][2];
#pragma unroll
      for (int product = 0; product < kProducts; ++product) {
#pragma unroll
        for (int step = 0; step < kGroupSteps; ++step) {
          dequantize_bytes<T>(b[step][product], word_of(weights.codes[group * kGroupSteps + step], product));
        }
        const uint32_t pair = word_of(weights.scales[group], product);
        scales[product][0] = to_float(f16{static_cast<uint16_t>(pair)});
        scales[product][1] = to_float(f16{static_cast<uint16_t>(pair >> 16)});
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        __syncwarp();  // or the compiler begins with all tiles at once, and has no registers for that
        float products[kProducts][4] = {};
#pragma unroll
        for (int step = 0; step < kGroupSteps; ++step) {
          uint32_t a[4];
          linear_tile::load_activations(a, ring, tile, group * kGroupSteps + step);
#pragma unroll
          for (int product = 0; product < kProducts; ++product) {
            multiply_add<T>(products[product], a, b[step][product][0], b[step][product][1]);
          }
        }
#pragma unroll
        for (int i = 0; i < kProducts * 4; ++i) {
          float& sum = sums[tile][i / 4][i % 4];
          sum = __fmaf_rn(scales[i / 4][i % 2], products[i / 4][i % 4], sum);
        }
      }
    }
  }

 private:
  const uint8_t* panel_;
  int end_;
};

template <class T, int kTiles>
__global__ void __launch_bounds__(linear_tile::kThreads) linear_int8_kernel(const Operands<T> op) {
  linear_tile::multiply_tiles<T, kTiles, Weights<T>>(op);
}

template <class T, int kTiles>
void launch(Operands<T> op, int num_multiprocessors, cudaStream_t stream) {
  const dim3 grid = stripe_grid(op.work, op.num_rows, kTiles * 16, num_multiprocessors);
  linear_int8_kernel<T, kTiles><<<grid, linear_tile::kThreads, 0, stream>>>(op);
}

template <class T>
void linear_of(const LinearInt8& op, cudaStream_t stream) {
  const int multiprocessors =
      device_attribute("linear_int8", cudaDevAttrMultiProcessorCount, op.x.device_index);
  Operands<T> operands = linear_tile::make_operands<T>(op, multiprocessors);
  operands.packed = op.packed.ptr<const uint8_t>();
  operands.panel_bytes = op.packed.shape[1];
  if (operands.num_rows <= 16) return launch<T, 1>(operands, multiprocessors, stream);
  if (operands.num_rows <= 32) return launch<T, 2>(operands, multiprocessors, stream);
  launch<T, 3>(operands, multiprocessors, stream);  // 64 rows would spill registers
}

void check_packed(const char* op_name, const Tensor& packed, int64_t num_rows, int64_t depth) {
  FS_CHECK(packed.shape[0] == int8_num_panels(num_rows) && packed.shape[1] == int8_panel_bytes(depth),
           op_name << ": packed is " << describe(packed) << "; a weight of " << num_rows << " x " << depth
                   << " needs [" << int8_num_panels(num_rows) << ", " << int8_panel_bytes(depth) << "]");
}

void linear_int8(const LinearInt8& op, const OpContext& context) {
  const int64_t depth = op.x.shape[1], num_columns = op.out.shape[1];
  check_group_size("linear_int8", depth, op.group_size);
  check_activation_bits("linear_int8", op.activation_bits);
  check_packed("linear_int8", op.packed, num_columns, depth);
  if (op.x.shape[0] == 0 || num_columns == 0) return;
  linear_tile::check_inputs(op);
  if (op.x.dtype == DType::f16) {
    linear_of<f16>(op, stream_of(context));
  } else {
    FS_CHECK(op.x.dtype == DType::bf16,
             "linear_int8: x is " << name_of(op.x.dtype) << "; the cuda kernel takes float16 and bfloat16");
    linear_of<bf16>(op, stream_of(context));
  }
  check_launch("linear_int8");
}

constexpr int kPackThreads = 256;

struct PackOperands {
  uint32_t* packed;
  const uint8_t* codes;
  const uint16_t* scales;
  int64_t codes_stride, num_rows, depth, group_size, num_groups;  // groups as given
  int64_t num_words;
};

// One thread for each word of the result, written in order.
__global__ void __launch_bounds__(kPackThreads) pack_int8_kernel(const PackOperands op) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kPackThreads + threadIdx.x;
  if (at >= op.num_words) return;
  const int64_t panel_bytes = int8_panel_bytes(op.depth), byte = at * 4 % panel_bytes;
  const int64_t first_row = at * 4 / panel_bytes * kInt8Rows, in_stage = byte % kInt8StageBytes;
  const int64_t first_k = byte / kInt8StageBytes * kInt8Depth;
  uint32_t word = 0;
  if (in_stage < kInt8CodeBytes) {
    for (int i = 0; i < 4; ++i) {
      const Int8Weight weight = int8_weight(in_stage + i);
      const int64_t n = first_row + weight.row, k = first_k + weight.k;
      const uint32_t code = n < op.num_rows && k < op.depth ? op.codes[n * op.codes_stride + k] : 0;
      word |= (code ^ 128u) << (8 * i);  // plus 128
    }
  } else {
    for (int i = 0; i < 2; ++i) {
      const int64_t place = (in_stage - kInt8CodeBytes) / 2 + i;
      const int64_t n = first_row + int8_scale_row(place % kInt8Rows);
      const int64_t k = first_k + place / kInt8Rows * kInt8Group;
      if (n >= op.num_rows || k >= op.depth) continue;
      const int64_t group = op.num_groups == 1 ? 0 : k / op.group_size;
      word |= static_cast<uint32_t>(op.scales[n * op.num_groups + group]) << (16 * i);
    }
  }
  op.packed[at] = word;
}

void pack_int8(const PackInt8& op, const OpContext& context) {
  const int64_t num_rows = op.codes.shape[0], depth = op.codes.shape[1], num_groups = op.scales.shape[1];
  check_groups("pack_int8", op.scales, depth, op.group_size);
  check_packed("pack_int8", op.packed, num_rows, depth);
  PackOperands operands{};
  operands.packed = op.packed.ptr<uint32_t>();
  operands.codes = op.codes.ptr<const uint8_t>();
  operands.scales = op.scales.ptr<const uint16_t>();
  operands.codes_stride = op.codes.stride[0];
  operands.num_rows = num_rows;
  operands.depth = depth;
  operands.group_size = op.group_size;
  operands.num_groups = num_groups;
  operands.num_words = op.packed.numel() / 4;
  if (operands.num_words == 0) return;
  const int64_t blocks = ceil_div(operands.num_words, kPackThreads);
  FS_CHECK(blocks <= kMaxGridX, "pack_int8: " << num_rows << " x " << depth << " is too large");
  FS_CHECK(reinterpret_cast<uintptr_t>(op.packed.data) % 16 == 0,
           "pack_int8: packed is not aligned to 16 bytes");
  pack_int8_kernel<<<static_cast<unsigned>(blocks), kPackThreads, 0, stream_of(context)>>>(operands);
  check_launch("pack_int8");
}

}  // namespace

FS_REGISTER_CUDA(LinearInt8, linear_int8, DType::u8)
FS_REGISTER_CUDA(PackInt8, pack_int8, DType::i8)

}  // namespace fs::cuda
