// SPDX-License-Identifier: Apache-2.0
//
// What the int4 ops of all devices share: the three forms of a weight and the extent of its groups.
#pragma once

#include <cstdint>

#include "core/error.h"
#include "core/tensor.h"
#include "layout/host_device.h"

namespace fs {

// Values are those of the argument `form` of `linear_int4`.
enum class Int4Form : int64_t { symmetric = 0, zero_points = 1, minimums = 2 };

inline constexpr int64_t kGroupMultiple = 32;  // inputs that always share a scale
inline constexpr int kSymmetricZero = 8;       // the code of weight 0 in the symmetric form
inline constexpr int kMaxCode = 15;
inline constexpr int kMaxZeroPoint = 16;  // GPTQ files store zero points less one

FS_HOST_DEVICE constexpr int64_t num_groups_of(int64_t depth, int64_t group_size) {
  return (depth + group_size - 1) / group_size;
}

// Throws fs::Error unless group_size is allowed for a weight of `depth` inputs.
[[gnu::always_inline]] inline void check_group_size(const char* op, int64_t depth, int64_t group_size) {
  FS_CHECK(group_size >= 1 && (group_size % kGroupMultiple == 0 || group_size >= depth),
           op << ": group_size is " << group_size << "; multiples of 32 are allowed, and K or more (here "
              << depth << ") for one group per row");
}

// Throws fs::Error unless `scales` [rows, groups] and group_size suit a weight of `depth` inputs.
[[gnu::always_inline]] inline void check_groups(const char* op, const Tensor& scales, int64_t depth,
                                                int64_t group_size) {
  check_group_size(op, depth, group_size);
  FS_CHECK(scales.shape[1] == num_groups_of(depth, group_size),
           op << ": argument 'scales' has " << scales.shape[1] << " groups; " << depth
              << " inputs in groups of " << group_size << " are " << num_groups_of(depth, group_size));
}

[[gnu::always_inline]] inline Int4Form int4_form(const char* op, int64_t form) {
  FS_CHECK(form >= 0 && form <= 2,
           op << ": form is " << form << "; 0 is symmetric, 1 zero points, 2 minimums");
  return static_cast<Int4Form>(form);
}

// The form that the optional tensors of `pack_int4` say.
[[gnu::always_inline]] inline Int4Form int4_form(const Tensor& zero_points, const Tensor& minimums) {
  FS_CHECK(!zero_points.defined() || !minimums.defined(),
           "pack_int4: both 'zero_points' and 'minimums' are given; a weight has at most one of them");
  if (zero_points.defined()) return Int4Form::zero_points;
  return minimums.defined() ? Int4Form::minimums : Int4Form::symmetric;
}

[[gnu::always_inline]] inline void check_activation_bits(const char* op, int64_t bits) {
  FS_CHECK(bits == 8 || bits == 12 || bits == 16,
           op << ": activation_bits is " << bits << "; 8, 12 and 16 are allowed");
}

}  // namespace fs
