// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>

#include "layout/philox.h"
#include "layout/sampling.h"

namespace fs {
namespace {

constexpr bool equal(const Philox4x32& a, const Philox4x32& b) {
  return a.word[0] == b.word[0] && a.word[1] == b.word[1] && a.word[2] == b.word[2] && a.word[3] == b.word[3];
}

// The known answers published with Random123 (philox 4x32, 10 rounds).
static_assert(equal(philox4x32({{0, 0, 0, 0}}, 0, 0),
                    {{0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u}}));
static_assert(equal(philox4x32({{0xffffffffu, 0xffffffffu, 0xffffffffu, 0xffffffffu}}, 0xffffffffu,
                               0xffffffffu),
                    {{0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu}}));
static_assert(equal(philox4x32({{0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u}}, 0xa4093822u,
                               0x299f31d0u),
                    {{0xd16cfe09u, 0x94fdccebu, 0x5001e420u, 0x24126ea1u}}));
static_assert(equal(sampling_noise(3, 5, 0x0000000200000001u), philox4x32({{3, 5, 0, 0}}, 1, 2)));

TEST(SamplingMath, PowerOfTwo) {
  EXPECT_EQ(power_of_two(0.0f), 1.0f);
  EXPECT_EQ(power_of_two(-126.5f), 0.0f);
  EXPECT_EQ(power_of_two(-1e30f), 0.0f);
  EXPECT_EQ(power_of_two(-INFINITY), 0.0f);
  for (float t = -126.0f; t <= 0.0f; t += 0.00137f) {
    const double exact = std::exp2(static_cast<double>(t));
    ASSERT_NEAR(power_of_two(t) / exact, 1.0, 3e-7) << t;
    ASSERT_LE(power_of_two(t), 1.0f) << t;
  }
}

TEST(SamplingMath, Log2) {
  EXPECT_EQ(log2_of(1.0f), 0.0f);
  for (float x = 1e-30f; x < 1e30f; x *= 1.0137f) {
    ASSERT_NEAR(log2_of(x), std::log2(static_cast<double>(x)), 3e-7 + 1e-7 * std::fabs(log2_of(x))) << x;
  }
}

TEST(SamplingMath, ExponentialNoise) {
  const auto check = [](uint32_t bits) {
    const double v = (bits + 0.5) / 4294967296.0;
    const double exact = -std::log1p(-v);
    // Large values, which never win a race, tell only every other number apart.
    ASSERT_NEAR(exponential(bits), exact, 4e-7 * exact + 0x1p-32 / (1 - v)) << bits;
    ASSERT_GE(exponential(bits), v * (1 - 1e-7)) << bits;
  };
  for (uint64_t bits = 0; bits < uint64_t{1} << 32; bits += 65521) check(static_cast<uint32_t>(bits));
  for (uint32_t i = 0; i < 4096; ++i) {
    check(i);
    check(0x3fffffffu - i);
    check(0x40000000u + i);
  }
  EXPECT_NEAR(exponential(0xffffffffu), 32 * std::log(2.0), 1e-5);
}

TEST(SamplingMath, OrderKey) {
  const float ascending[] = {-INFINITY, -3e38f, -1.0f, -1e-40f, 0.0f, 1e-40f, 1.0f, 3e38f, INFINITY};
  for (size_t i = 0; i + 1 < std::size(ascending); ++i) {
    EXPECT_LT(order_key(ascending[i]), order_key(ascending[i + 1]));
    EXPECT_EQ(float_from_order_key(order_key(ascending[i])), ascending[i]);
  }
  EXPECT_EQ(order_key(-0.0f), order_key(0.0f));
}

TEST(SamplingMath, Mass) {
  EXPECT_EQ(mass_of(1.0f), 1u << 30);
  EXPECT_EQ(mass_of(0.0f), 0u);
  EXPECT_EQ(mass_of(0x1p-31f), 1u);
  EXPECT_EQ(mass_of(0x1p-32f), 0u);
}

}  // namespace
}  // namespace fs
