// SPDX-License-Identifier: Apache-2.0
//
// What one block of a matrix product does of the column tiles that layout/stripes.h cuts into parts, and how
// the parts of a column tile are added: in float32, in the order of K, whoever computes them.
//
// Few rows: each block computes one stripe. If a column tile has several parts, each block leaves its part in
// the workspace, and the last one to arrive adds them up: nobody waits for anybody. The counters of arrivals
// are zero before and after. Many rows: there are enough tiles to give every block whole ones; it computes
// the parts one after another and adds them in the same order.
#pragma once

#include "cuda/launch.cuh"
#include "layout/stripes.h"

namespace fs::cuda {

struct StripeWork {
  Stripes stripes;
  float4* partials;
  uint32_t* counters;
  int num_row_tiles;
  bool whole_tiles;  // each block computes whole column tiles, one after another
};

inline int device_attribute(const char* op_name, cudaDeviceAttr which, int device) {
  int value = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&value, which, device);
  FS_CHECK(error == cudaSuccess, op_name << ": cannot ask the device: " << cudaGetErrorString(error));
  return value;
}

// Of op.out = op.x @ weight.T; `workspace_bytes` is what it needs on this device.
template <class Op>
StripeWork make_stripe_work(const Op& op, int num_multiprocessors, int64_t workspace_bytes) {
  const int64_t num_rows = op.x.shape[0], depth = op.x.shape[1], num_columns = op.out.shape[1];
  FS_CHECK(op.workspace.shape[0] >= workspace_bytes,
           Op::info.name << ": workspace has " << op.workspace.shape[0] << " bytes; " << num_rows
                         << " rows of " << depth << " inputs need " << workspace_bytes);
  FS_CHECK(reinterpret_cast<uintptr_t>(op.workspace.data) % 16 == 0,
           Op::info.name << ": workspace is not aligned to 16 bytes");
  FS_CHECK(op.counters.defined() && op.counters.shape[0] >= kLinearCounters,
           Op::info.name << ": the cuda kernel needs " << kLinearCounters
                         << " counters, zeros at first; given "
                         << (op.counters.defined() ? op.counters.shape[0] : 0));
  FS_CHECK(depth > 0 && depth <= 1 << 24 && num_columns <= kLinearCounters * kStripeColumns &&
               num_rows <= 64 * kMaxGridY && op.x.stride[0] < int64_t{1} << 30,
           Op::info.name << ": " << num_rows << " x " << num_columns << " x " << depth << " is too large");
  StripeWork work{};
  work.stripes = make_stripes(num_columns, depth, num_multiprocessors);
  work.partials = reinterpret_cast<float4*>(op.workspace.template ptr<uint8_t>());
  work.counters = reinterpret_cast<uint32_t*>(op.counters.template ptr<int32_t>());
  return work;
}

// Blocks side by side: one for each stripe and row tile, or some that share the whole tiles.
inline dim3 stripe_grid(StripeWork& work, int64_t num_rows, int64_t rows_of_tile, int num_multiprocessors) {
  work.num_row_tiles = divide_up(num_rows, static_cast<int>(rows_of_tile));
  const int64_t tiles = static_cast<int64_t>(work.num_row_tiles) * work.stripes.num_column_tiles;
  work.whole_tiles = work.num_row_tiles > 1 && tiles >= num_multiprocessors;
  const int64_t resident = 2 * static_cast<int64_t>(num_multiprocessors);
  if (work.whole_tiles) return dim3(static_cast<unsigned>(tiles < resident ? tiles : resident));
  return dim3(static_cast<unsigned>(work.stripes.count), static_cast<unsigned>(work.num_row_tiles));
}

class StripeWalk {
 public:
  int row_tile, column_tile, part;

  // The first part of this block.
  explicit __device__ __forceinline__ StripeWalk(const StripeWork& work) : work_(work) {
    const int block = static_cast<int>(blockIdx.x);
    const Stripes& stripes = work.stripes;
    tile_ = block;  // of whole tiles: column tile * num_row_tiles + row tile
    row_tile = work.whole_tiles ? tile_ % work.num_row_tiles : static_cast<int>(blockIdx.y);
    column_tile = work.whole_tiles ? tile_ / work.num_row_tiles : block * stripes.length / stripes.pitch;
    part = work.whole_tiles ? 0 : block - stripes.first_stripe(column_tile);
    first_column_tile_ = column_tile;
  }
  // To the next one; false if there is none.
  __device__ __forceinline__ bool advance() {
    const Stripes& stripes = work_.stripes;
    if (work_.whole_tiles) {
      if (++part < num_parts()) return true;
      tile_ += static_cast<int>(gridDim.x);
      if (tile_ >= work_.num_row_tiles * stripes.num_column_tiles) return false;
      row_tile = tile_ % work_.num_row_tiles;
      column_tile = tile_ / work_.num_row_tiles;
    } else {
      ++column_tile;
      const int end = (static_cast<int>(blockIdx.x) + 1) * stripes.length;
      if (column_tile == stripes.num_column_tiles || column_tile * stripes.pitch >= end) return false;
    }
    part = 0;
    return true;
  }
  // Units of K.
  __device__ __forceinline__ int begin() const { return work_.stripes.part_begin(column_tile, part); }
  __device__ __forceinline__ int end() const { return work_.stripes.part_end(column_tile, part); }

  // Called with the sums of this part by the kThreads threads that meet at barrier 1; true if they are now
  // the sums of all parts. for_each(f) calls f(float (&sum)[4], i) for the kVectors vectors of a thread.
  template <int kThreads, int kVectors, class ForEach>
  __device__ __forceinline__ bool add_parts(int thread, uint32_t& arrived, const ForEach& for_each) const {
    const Stripes& stripes = work_.stripes;
    constexpr int kSlot = kVectors * kThreads;  // float4s
    const int count = num_parts();
    if (count == 1) return true;
    if (work_.whole_tiles) {
      float4* total = work_.partials + static_cast<int64_t>(blockIdx.x) * kSlot + thread;
      const bool complete = part == count - 1;
      for_each([&](float (&sum)[4], int i) {
        if (part > 0) {
          const float4 before = total[i * kThreads];
          sum[0] = __fadd_rn(before.x, sum[0]);
          sum[1] = __fadd_rn(before.y, sum[1]);
          sum[2] = __fadd_rn(before.z, sum[2]);
          sum[3] = __fadd_rn(before.w, sum[3]);
        }
        if (!complete) total[i * kThreads] = float4{sum[0], sum[1], sum[2], sum[3]};
      });
      return complete;
    }
    // A stripe leaves at most two parts that are not whole column tiles: of its first and its last one.
    const int slots_per_stripe = stripes.pitch % stripes.length == 0 ? 1 : 2;
    const auto slot = [&](int stripe, int which) {
      const int64_t of_row_tile = static_cast<int64_t>(row_tile) * stripes.count + stripe;
      return work_.partials + (of_row_tile * slots_per_stripe + which) * kSlot + thread;
    };
    float4* mine = slot(static_cast<int>(blockIdx.x), column_tile != first_column_tile_ ? 1 : 0);
    for_each([&](float (&sum)[4], int i) { mine[i * kThreads] = float4{sum[0], sum[1], sum[2], sum[3]}; });
    named_barrier(1, kThreads);
    uint32_t* counter = work_.counters + row_tile * stripes.num_column_tiles + column_tile;
    if (thread == 0) {
      __threadfence();
      arrived = atomicAdd(counter, 1u);
      __threadfence();
    }
    named_barrier(1, kThreads);
    if (arrived != static_cast<uint32_t>(count - 1)) return false;
    if (thread == 0) *counter = 0;
    for (int p = 0; p < count; ++p) {
      const int stripe = stripes.first_stripe(column_tile) + p;
      const bool is_first = stripe * stripes.length / stripes.pitch == column_tile;
      const float4* from = slot(stripe, is_first ? 0 : 1);
      for_each([&](float (&sum)[4], int i) {
        const float4 next = __ldcg(from + i * kThreads);
        sum[0] = p == 0 ? next.x : __fadd_rn(sum[0], next.x);
        sum[1] = p == 0 ? next.y : __fadd_rn(sum[1], next.y);
        sum[2] = p == 0 ? next.z : __fadd_rn(sum[2], next.z);
        sum[3] = p == 0 ? next.w : __fadd_rn(sum[3], next.w);
      });
    }
    return true;
  }

 private:
  __device__ __forceinline__ int num_parts() const { return work_.stripes.num_parts(column_tile); }

  const StripeWork& work_;
  int tile_, first_column_tile_;
};

}  // namespace fs::cuda
