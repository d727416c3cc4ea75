// SPDX-License-Identifier: Apache-2.0
#include "layout/quantized_panel.h"

#include <gtest/gtest.h>

#include <vector>

namespace fs {
namespace {

std::vector<QuantizedPanels> panels_to_try() {
  std::vector<QuantizedPanels> all;
  for (const int bits : {4, 8}) {
    for (const bool has_offsets : {false, true}) {
      for (const auto& [rows, depth] : {std::pair{1, 1}, {31, 64}, {32, 32}, {33, 100}, {95, 300}}) {
        for (const int64_t group_size : {32, 64, 128, 1000}) {
          all.push_back({rows, depth, group_size, bits, has_offsets});
        }
      }
    }
  }
  return all;
}

// Codes of all rows and inputs, the padding included, and what rows share take every bit of the array once.
TEST(QuantizedPanels, EveryBitBelongsToOneNumber) {
  for (const QuantizedPanels& panels : panels_to_try()) {
    const int64_t size = panels.num_panels() * panels.panel_bytes() * 8;
    std::vector<int> uses(static_cast<size_t>(size));
    const auto use = [&](int64_t byte, int shift, int bits) {
      for (int64_t bit = byte * 8 + shift; bit < byte * 8 + shift + bits; ++bit) {
        ASSERT_GE(bit, 0);
        ASSERT_LT(bit, size);
        ++uses[static_cast<size_t>(bit)];
      }
    };
    for (int64_t n = 0; n < panels.num_panels() * QuantizedPanels::kRows; ++n) {
      for (int64_t k = 0; k < panels.padded_depth(); ++k) {
        const QuantizedPanels::Place place = panels.code(n, k);
        use(place.byte, place.shift, panels.bits);
      }
      for (int64_t g = 0; g < panels.num_groups(); ++g) {
        use(panels.scale_offset(n, g), 0, 16);
        if (panels.has_offsets) use(panels.zero_or_minimum_offset(n, g), 0, 16);
      }
    }
    for (const int count : uses) ASSERT_EQ(count, 1);
  }
}

// What the kernels rely on: a line is four inputs of rows r and r + 16, lines and headers begin at 64 bytes.
TEST(QuantizedPanels, ALineIsFourInputsOfSixteenRows) {
  const QuantizedPanels panels{64, 256, 128, 4, true};
  EXPECT_EQ(panels.panel_bytes(), 2 * (128 + 4 * 512));
  for (int64_t n = 0; n < 64; ++n) {
    for (int64_t k = 0; k < 256; ++k) {
      const QuantizedPanels::Place first = panels.code(n / 32 * 32, k / 4 * 4), place = panels.code(n, k);
      EXPECT_EQ(first.byte % 64, 0);
      EXPECT_EQ(place.byte, first.byte + n % 16 * 4 + k % 4);
      EXPECT_EQ(place.shift, n % 32 < 16 ? 0 : 4);
    }
  }
}

TEST(QuantizedPanels, AGroupSizeOfARowOrMoreIsOneGroup) {
  const QuantizedPanels whole{32, 100, 100, 4, false}, beyond{32, 100, 1 << 20, 4, false};
  EXPECT_EQ(whole.num_groups(), 1);
  EXPECT_EQ(beyond.num_groups(), 1);
  EXPECT_EQ(whole.panel_bytes(), 64 + 4 * 512);
  EXPECT_EQ(beyond.panel_bytes(), whole.panel_bytes());
  EXPECT_EQ((QuantizedPanels{0, 0, 32, 4, false}).num_groups(), 0);
}

TEST(QuantizedPanels, GroupSizesAreChecked) {
  for (const int64_t size : {32, 64, 96, 128, 100, 4096}) check_group_size("op", 100, size);
  for (const int64_t size : {0, -32, 16, 31, 33, 99}) {
    EXPECT_THROW(check_group_size("op", 100, size), Error) << size;
  }
}

}  // namespace
}  // namespace fs
