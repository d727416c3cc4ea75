// SPDX-License-Identifier: Apache-2.0
//
// The op `linear_int4`: checks, and the choice of the instance (linear_int4.cuh). Where the codes' columns
// are in another order than the inputs, a small kernel first copies the activations in that order.
//
// ptxas: linear_int4_kernel <= 255 registers, 256 threads
// shared: linear_int4_kernel <T, m, g, minimums, s> s * (4096 * m + 16384 + (131072 // g if g else 0))
// ptxas: reorder_kernel <= 32 registers, 256 threads
#include "cuda/linear_int4.cuh"

namespace fs::cuda {

namespace {

using int4::Operands;

// out[row, k] = x[row, order[k]]; columns [depth, stride) of out are zero.
__global__ void __launch_bounds__(256) reorder_kernel(uint16_t* out, const uint16_t* x, const int32_t* order,
                                                      int64_t x_stride, int depth, int out_stride) {
  const uint16_t* from = x + blockIdx.y * x_stride;
  uint16_t* to = out + static_cast<int64_t>(blockIdx.y) * out_stride;
  const int k = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (k >= out_stride) return;
  const int from_k = k < depth ? order[k] : -1;
  to[k] = from_k >= 0 && from_k < depth ? from[from_k] : uint16_t{0};
}

template <class T, int kGroup, bool kMinimums>
void launch_for_rows(const Operands<T>& op, int multiprocessors, int shared, cudaStream_t stream) {
  if (op.num_rows <= 8) return int4::launch<T, 1, kGroup, kMinimums>(op, multiprocessors, shared, stream);
  if (op.num_rows <= 16) return int4::launch<T, 2, kGroup, kMinimums>(op, multiprocessors, shared, stream);
  if constexpr (kMinimums) {  // the sums of activations take the registers of wider tiles
    int4::launch<T, 4, kGroup, kMinimums>(op, multiprocessors, shared, stream);
  } else {
    if (op.num_rows <= 32) return int4::launch<T, 4, kGroup, kMinimums>(op, multiprocessors, shared, stream);
    if (op.num_rows <= 48) return int4::launch<T, 6, kGroup, kMinimums>(op, multiprocessors, shared, stream);
    int4::launch<T, 8, kGroup, kMinimums>(op, multiprocessors, shared, stream);
  }
}

template <class T, bool kMinimums>
void launch_for_group(const Operands<T>& op, int64_t group, int multiprocessors, int shared,
                      cudaStream_t stream) {
  if (group == 32) return launch_for_rows<T, 32, kMinimums>(op, multiprocessors, shared, stream);
  if (group == 64) return launch_for_rows<T, 64, kMinimums>(op, multiprocessors, shared, stream);
  if (group == 128) return launch_for_rows<T, 128, kMinimums>(op, multiprocessors, shared, stream);
  launch_for_rows<T, 0, kMinimums>(op, multiprocessors, shared, stream);
}

template <class T>
void linear_of(const LinearInt4& op, const Int4Layout& layout, Int4Form form, cudaStream_t stream) {
  const int64_t num_rows = op.x.shape[0], depth = op.x.shape[1], num_columns = op.out.shape[1];
  const int device = op.x.device_index;
  const int multiprocessors = device_attribute("linear_int4", cudaDevAttrMultiProcessorCount, device);
  const int shared = device_attribute("linear_int4", cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  auto* workspace = op.workspace.ptr<uint8_t>();

  Operands<T> operands{};
  operands.out = op.out.ptr<T>();
  operands.x = op.x.ptr<const T>();
  operands.x_stride = op.x.stride[0];
  operands.packed = op.packed.ptr<const uint8_t>();
  operands.bias = op.bias.defined() ? op.bias.ptr<const float>() : nullptr;
  operands.work = make_stripe_work(
      op, multiprocessors, int4_workspace_bytes(num_rows, depth, multiprocessors, op.input_order.defined()));
  operands.out_stride = op.out.stride[0];
  operands.panel_bytes = layout.panel_bytes();
  operands.num_rows = static_cast<int>(num_rows);
  operands.num_columns = static_cast<int>(num_columns);
  operands.depth = static_cast<int>(depth);
  operands.num_panels = static_cast<int>(layout.num_panels);
  operands.scales_at = static_cast<int>(layout.code_bytes);
  operands.offsets_at = static_cast<int>(layout.code_bytes + layout.scale_bytes);
  operands.zero_points = form == Int4Form::zero_points;
  operands.vector_out = is_aligned(op.out, 8, 8);
  if (op.input_order.defined()) {
    FS_CHECK(num_rows <= kMaxGridY,
             "linear_int4: " << num_rows << " rows with an input_order; at most " << kMaxGridY);
    const int64_t stride = ceil_div(depth, 8) * 8;
    auto* ordered = reinterpret_cast<uint16_t*>(
        workspace + int4_workspace_bytes(num_rows, depth, multiprocessors, false));
    const dim3 grid(static_cast<unsigned>(ceil_div(stride, 256)), static_cast<unsigned>(num_rows));
    reorder_kernel<<<grid, 256, 0, stream>>>(ordered, op.x.ptr<const uint16_t>(),
                                             op.input_order.ptr<const int32_t>(), op.x.stride[0],
                                             static_cast<int>(depth), static_cast<int>(stride));
    operands.x = reinterpret_cast<const T*>(ordered);
    operands.x_stride = stride;
  }
  if (form == Int4Form::minimums) {
    launch_for_group<T, true>(operands, layout.group_size, multiprocessors, shared, stream);
  } else {
    launch_for_group<T, false>(operands, layout.group_size, multiprocessors, shared, stream);
  }
}

void linear_int4(const LinearInt4& op, const OpContext& context) {
  const int64_t num_rows = op.x.shape[0], depth = op.x.shape[1], num_columns = op.out.shape[1];
  check_group_size("linear_int4", depth, op.group_size);
  check_activation_bits("linear_int4", op.activation_bits);
  const Int4Form form = int4_form("linear_int4", op.form);
  const Int4Layout layout = int4_layout(num_columns, depth, op.group_size, form);
  FS_CHECK(op.packed.shape[0] == layout.num_panels && op.packed.shape[1] == layout.panel_bytes(),
           "linear_int4: packed is " << describe(op.packed) << "; a weight of " << num_columns << " x "
                                     << depth << " in groups of " << op.group_size << " and form " << op.form
                                     << " needs [" << layout.num_panels << ", " << layout.panel_bytes()
                                     << "]");
  if (num_rows == 0 || num_columns == 0) return;
  FS_CHECK(reinterpret_cast<uintptr_t>(op.packed.data) % 16 == 0,
           "linear_int4: packed is not aligned to 16 bytes");
  FS_CHECK(op.input_order.defined() || (depth % 8 == 0 && is_aligned(op.x, depth, 8)),
           "linear_int4: K is " << depth
                                << "; the cuda kernel takes multiples of 8, and rows of x that start at "
                                << "multiples of 16 bytes");
  if (op.x.dtype == DType::f16) {
    linear_of<f16>(op, layout, form, stream_of(context));
  } else {
    FS_CHECK(op.x.dtype == DType::bf16,
             "linear_int4: x is " << name_of(op.x.dtype) << "; the cuda kernel takes float16 and bfloat16");
    linear_of<bf16>(op, layout, form, stream_of(context));
  }
  check_launch("linear_int4");
}

}  // namespace

FS_REGISTER_CUDA(LinearInt4, linear_int4, DType::u8)

}  // namespace fs::cuda
