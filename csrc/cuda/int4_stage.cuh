// SPDX-License-Identifier: Apache-2.0
//
// One stage of `linear_int4`: how 128 inputs of the weights and activations come into shared memory, and how
// a warp multiplies them. The design is in linear_int4.cuh.
#pragma once

#include "cuda/dequantize.cuh"
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "cuda/stripe_walk.cuh"
#include "layout/int4_fragment.h"
#include "layout/swizzle.h"

namespace fs::cuda::int4 {

constexpr int kThreads = 256;
constexpr int kPanels = kStripeColumns / kInt4Rows;  // 4: warps side by side
constexpr int kHalfThreads = 32 * kPanels;
constexpr int kBlocksOf16 = 2;  // in a panel
constexpr int kSteps = kStripeDepth / 16;
constexpr int kCodeBytes = kStripeDepth * kInt4Rows / 2;  // of a panel and stage
constexpr int kRowChunks = kStripeDepth * 2 / kChunkBytes;

template <class T>
struct Operands {
  T* out;
  const T* x;
  const uint8_t* packed;
  const float* bias;
  int64_t out_stride, x_stride;  // elements
  int64_t panel_bytes;
  int num_rows, num_columns, depth;
  int num_panels, scales_at, offsets_at;
  StripeWork work;
  bool zero_points;
  bool vector_out;  // rows of out can be stored 16 bytes at a time
};

// Plain: without zero points, and K in whole units. Code that knows this has fewer cases to tell apart.
template <class T>
__device__ __forceinline__ bool is_plain(const Operands<T>& op) {
  return !op.zero_points && op.depth % kStripeDepth == 0;
}

// What lies where in one stage of the ring.
template <int kTiles, int kGroup>
struct Stage {
  static constexpr int kGroups = kGroup == 0 ? 0 : kStripeDepth / kGroup;
  static constexpr int kX = kTiles * 8 * kRowChunks * kChunkBytes;  // of one half
  static constexpr int kCodes = 2 * kX;
  static constexpr int kScales = kCodes + 2 * kPanels * kCodeBytes;
  static constexpr int kOffsets = kScales + 2 * kPanels * kGroups * 64;
  static constexpr int kBytes = kOffsets + 2 * kPanels * kGroups * 64;
};

struct Place {
  int lane, panel, half;  // of the thread in its block
  int g, t;               // lane = 4 g + t
  int in_half;            // thread among those of its half
};

__device__ __forceinline__ uint2 load_shared_8(uint32_t address) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address));
  return v;
}
__device__ __forceinline__ uint4 load_shared_16(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address));
  return v;
}
__device__ __forceinline__ uint32_t load_shared_4(uint32_t address) {
  uint32_t v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address));
  return v;
}

__device__ __forceinline__ void unpack_scales(float (&scales)[kBlocksOf16][2], uint2 pairs) {
  scales[0][0] = to_float(f16{static_cast<uint16_t>(pairs.x)});
  scales[0][1] = to_float(f16{static_cast<uint16_t>(pairs.x >> 16)});
  scales[1][0] = to_float(f16{static_cast<uint16_t>(pairs.y)});
  scales[1][1] = to_float(f16{static_cast<uint16_t>(pairs.y >> 16)});
}

// A row group's scales or minimums from global memory: the first lane of a quad reads them for all four.
__device__ __forceinline__ void load_scales(float (&scales)[kBlocksOf16][2], const uint8_t* from,
                                            const Place& place) {
  uint2 pairs{0, 0};
  if (place.t == 0) pairs = *reinterpret_cast<const uint2*>(from + place.g * 8);
  pairs.x = __shfl_sync(kAllLanes, pairs.x, place.lane - place.t);
  pairs.y = __shfl_sync(kAllLanes, pairs.y, place.lane - place.t);
  unpack_scales(scales, pairs);
}

__device__ __forceinline__ void copy_async_if(bool wanted, uint32_t to, const void* from, uint64_t policy) {
  asm volatile(
      "{.reg .pred wanted; setp.ne.s32 wanted, %3, 0; @wanted "
      "cp.async.cg.shared.global.L2::cache_hint.L2::128B "
      "[%0], [%1], 16, %2;}" ::"r"(to),
      "l"(from), "l"(policy), "r"(static_cast<int>(wanted))
      : "memory");
}

// Starts the copies of one thread, unit after unit of its half of a part. Addresses are kept as pointers that
// move on, so that a copy costs little more than itself.
template <class T, int kTiles, int kGroup, bool kMinimums, bool kHasPanel, bool kPlain>
class Copier {
  using Layout = Stage<kTiles, kGroup>;

 public:
  // Units [unit, end); what is copied after that are zeros.
  __device__ __forceinline__ Copier(const Operands<T>& op, const Place& place, uint32_t ring, int unit,
                                    int end, int first_row, const uint8_t* panel, uint64_t policy)
      : policy_(policy), units_left_(end - unit) {
    const int row = place.in_half / kLaneChunks, chunk = place.in_half % kLaneChunks;
    // K is padded to half a unit: the last unit may have half of its codes, and fewer inputs.
    last_is_half_ = end * kCodeBytes > op.scales_at ? 1 : 0;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      last_has_none_[i] = (end - 1) * kStripeDepth + (chunk + i * kLaneChunks) * 8 >= op.depth ? 1 : 0;
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      // Rows that do not exist are read as the last one; their sums are not stored.
      const int wanted = first_row + row + i * kRowStep;
      rows_[i] = op.x + (wanted < op.num_rows ? wanted : op.num_rows - 1) * op.x_stride +
                 unit * kStripeDepth + chunk * 8;
    }
    to_x_ = ring + static_cast<uint32_t>(place.half * Layout::kX + swizzled_offset(row, chunk, kRowChunks));
    const int warp = place.half * kPanels + place.panel;
    to_codes_ = ring + static_cast<uint32_t>(Layout::kCodes + warp * kCodeBytes + place.lane * 16);
    codes_ = panel + static_cast<int64_t>(unit) * kCodeBytes + place.lane * 16;
    if constexpr (kGroup != 0) {
      const bool is_scale = place.lane < 16;
      const int piece = place.lane % 16;
      const int pieces = Layout::kGroups * (is_scale || kMinimums ? 4 : 2);  // zero points are bytes
      has_scale_ = piece < pieces && (is_scale || kMinimums || (!kPlain && op.zero_points));
      if constexpr (!kSameSteps) scale_step_ = pieces * 16;
      scales_ = panel + (is_scale ? op.scales_at : op.offsets_at) +
                (static_cast<int64_t>(unit) * pieces + piece) * 16;
      to_scales_ = ring + static_cast<uint32_t>((is_scale ? Layout::kScales : Layout::kOffsets) +
                                                (warp * Layout::kGroups * 4 + piece) * 16);
    }
  }

  // The unit `ahead` of the next one, into the stage at `slot`, an offset in the ring.
  __device__ __forceinline__ void copy(uint32_t slot, int ahead) {
#pragma unroll
    for (int i = 0; i < kRows * kPieces; ++i) {
      // The swizzle has a period of eight rows and of eight chunks.
      const int at = i / kPieces, piece = i % kPieces;
      copy_async(slot + to_x_ +
                     static_cast<uint32_t>((at * kRowStep * kRowChunks + piece * kLaneChunks) * kChunkBytes),
                 rows_[at] + ahead * kStripeDepth + piece * kLaneChunks * 8,
                 units_left_ - ahead > (kPlain ? 0 : last_has_none_[piece]));
    }
    if constexpr (kHasPanel) {
      const bool has_codes = units_left_ - ahead > 0;
      const bool has_all_codes = units_left_ - ahead > (kPlain ? 0 : last_is_half_);
#pragma unroll
      for (int i = 0; i < kCodeBytes / 512; ++i) {
        copy_async(slot + to_codes_ + static_cast<uint32_t>(i * 512), codes_ + ahead * kCodeBytes + i * 512,
                   i * 512 < kCodeBytes / 2 ? has_codes : has_all_codes, policy_);
      }
      if constexpr (kGroup != 0) {
        copy_async_if(has_scale_ && has_codes, slot + to_scales_,
                      scales_ + (kSameSteps ? ahead * kScaleStep : 0), policy_);
        if constexpr (!kSameSteps) scales_ += scale_step_;
      }
    }
  }
  // Past so many units. Where scales and zero points take steps of their own, these have been taken.
  __device__ __forceinline__ void advance(int units) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) rows_[i] += units * kStripeDepth;
    if constexpr (kHasPanel) codes_ += units * kCodeBytes;
    if constexpr (kHasPanel && kGroup != 0 && kSameSteps) scales_ += units * kScaleStep;
    units_left_ -= units;
  }
  // Of those to be copied; negative once zeros are.
  __device__ __forceinline__ int units_left() const { return units_left_; }

 private:
  // All lanes' pieces of scales and minimums are as far from one unit to the next; zero points are bytes.
  static constexpr bool kSameSteps = kMinimums || kPlain;
  static constexpr int kScaleStep = Layout::kGroups * 64;

  // A thread copies one or two chunks, half a row apart, of every eighth or sixteenth row: with two there are
  // half as many pointers to move on.
  static constexpr int kPieces = kTiles > 1 ? 2 : 1;
  static constexpr int kLaneChunks = kRowChunks / kPieces;
  static constexpr int kRowStep = kHalfThreads / kLaneChunks;
  static constexpr int kRows = kTiles * 8 / kRowStep;

  const T* rows_[kRows];
  const uint8_t* codes_;
  const uint8_t* scales_ = nullptr;
  uint32_t to_x_, to_codes_, to_scales_ = 0;
  int last_has_none_[kPieces], last_is_half_;  // 1: in the last unit there are no such inputs, half the codes
  int scale_step_ = 0;
  bool has_scale_ = false;
  uint64_t policy_;
  int units_left_;
};

template <int kTiles>
using Sums = float[kBlocksOf16][kTiles][4];

// Adds one unit of K to `sums`, in steps of codes: for kGroup = 0 the bare products, else scaled. `x_sums` is
// for kGroup = 0 with minimums only.
template <class T, int kTiles, int kGroup, bool kMinimums, bool kPlain>
__device__ __forceinline__ void multiply_unit(Sums<kTiles>& sums, float (&x_sums)[kTiles][4],
                                              MinusZero<T> (&zeros)[kBlocksOf16], const Operands<T>& op,
                                              const Place& place, uint32_t ring, uint32_t slot) {
  using Layout = Stage<kTiles, kGroup>;
  constexpr int kGroups = kGroup == 0 ? 1 : Layout::kGroups;
  constexpr int kGroupSteps = kSteps / kGroups;
  const int warp = place.half * kPanels + place.panel, lane = place.lane;
  const uint32_t codes = ring + static_cast<uint32_t>(Layout::kCodes + warp * kCodeBytes + lane * 16);
  // One load of four matrices gives two row tiles their operands of one step, or one row tile those of two.
  constexpr bool kPairs = kTiles > 1;
  const int row = kPairs ? lane / 16 * 8 + lane % 8 : lane % 8;
  const int chunk = kPairs ? lane % 16 / 8 : lane / 8;
  const uint32_t x =
      ring + static_cast<uint32_t>(place.half * Layout::kX + swizzled_offset(row, chunk, kRowChunks));
  const uint32_t scales_at =
      ring + slot + static_cast<uint32_t>(Layout::kScales + warp * Layout::kGroups * 64);
  const uint32_t offsets_at =
      ring + slot + static_cast<uint32_t>(Layout::kOffsets + warp * Layout::kGroups * 64);
  uint32_t b[kTiles + kTiles % 2][4];
  uint4 words{};
  constexpr int kUnroll = kTiles <= 2 && !kMinimums ? 2 : 1;  // or registers run out
#pragma unroll kUnroll
  for (int group = 0; group < kGroups; ++group) {
    Sums<kTiles> products = {};
    float x_products[kTiles][4] = {};
    if constexpr (kGroup != 0 && !kMinimums) {
      if (!kPlain && op.zero_points) {
        const uint32_t z = load_shared_4(offsets_at + static_cast<uint32_t>(group * 32 + place.g * 4));
        zeros[0] = MinusZero<T>(twice_byte(z, 0), twice_byte(z, 1));
        zeros[1] = MinusZero<T>(twice_byte(z, 2), twice_byte(z, 3));
      }
    }
    Sums<kTiles>& target = *(kGroup == 0 ? &sums : &products);
    float (&x_target)[kTiles][4] = *(kGroup == 0 ? &x_sums : &x_products);
#pragma unroll
    for (int in_group = 0; in_group < kGroupSteps; ++in_group) {
      const int step = group * kGroupSteps + in_group;
      if (step % 2 == 0) words = load_shared_16(codes + slot + static_cast<uint32_t>(step / 2 * 512));
      // Swizzling is an exclusive or with the row, so a step along the row is one with the address.
      const uint32_t at = (x ^ static_cast<uint32_t>(step * 32)) + slot;
      if constexpr (kPairs) {
#pragma unroll
        for (int tile = 0; tile < kTiles; tile += 2) {
          uint32_t m[4];
          load_matrices(m, at + static_cast<uint32_t>(tile * 8 * kRowChunks * kChunkBytes));
          b[tile][0] = m[0];
          b[tile][1] = m[1];
          b[tile + 1][0] = m[2];
          b[tile + 1][1] = m[3];
        }
      } else if (step % 2 == 0) {
        load_matrices(b[0], at);
      } else {
        b[0][0] = b[0][2];
        b[0][1] = b[0][3];
      }
      uint32_t a[4];
      if constexpr (kMinimums) {
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = CodeFormat<T>::kStepPair;
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) multiply_add<T>(x_target[tile], a, b[tile][0], b[tile][1]);
      }
#pragma unroll
      for (int block = 0; block < kBlocksOf16; ++block) {
        const uint32_t word =
            step % 2 == 0 ? (block == 0 ? words.x : words.y) : (block == 0 ? words.z : words.w);
        dequantize<T>(a, word, zeros[block]);
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile)
          multiply_add<T>(target[block][tile], a, b[tile][0], b[tile][1]);
      }
    }
    if constexpr (kGroup != 0) {
      float scales[kBlocksOf16][2], minimums[kBlocksOf16][2];
      unpack_scales(scales, load_shared_8(scales_at + static_cast<uint32_t>(group * 64 + place.g * 8)));
      if constexpr (kMinimums) {
        unpack_scales(minimums, load_shared_8(offsets_at + static_cast<uint32_t>(group * 64 + place.g * 8)));
      }
#pragma unroll
      for (int block = 0; block < kBlocksOf16; ++block) {
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            float& sum = sums[block][tile][i];
            sum = __fmaf_rn(scales[block][i / 2], products[block][tile][i], sum);
            if constexpr (kMinimums) sum = __fmaf_rn(minimums[block][i / 2], x_products[tile][i % 2], sum);
          }
        }
      }
    }
  }
}

}  // namespace fs::cuda::int4
