// SPDX-License-Identifier: Apache-2.0
// mma, ldmatrix, stmatrix and movmatrix over random bit patterns. The oracle knows where PTX puts each
// element of a fragment, and adds products in the order the simulator promises (mma.sync of a GPU adds in
// another one): results are compared bit for bit.
#include <cmath>

#include "warp_case.h"

using namespace ptxsim_test;

namespace {

enum class Kind { F16, Bf16, Tf32, S8, U8 };

struct MmaCase {
  const char* name;
  Kind a, b;
  int k;
  bool half_accumulator, saturate;
};

int width(Kind kind) {  // bits of an element
  return kind == Kind::Tf32 ? 32 : kind == Kind::S8 || kind == Kind::U8 ? 8 : 16;
}

float f16(uint32_t h) {
  const int exponent = static_cast<int>(h >> 10 & 31), mantissa = static_cast<int>(h & 1023);
  float v = exponent == 0    ? std::ldexp(static_cast<float>(mantissa), -24)
            : exponent != 31 ? std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25)
            : mantissa == 0  ? INFINITY
                             : NAN;
  return h & 0x8000 ? -v : v;
}
float of_bits(uint32_t b) {
  float f;
  std::memcpy(&f, &b, 4);
  return f;
}
double element(Kind kind, uint32_t word, int index) {  // of the elements packed in a register
  switch (kind) {
    case Kind::F16:
      return f16(word >> 16 * index & 0xffff);
    case Kind::Bf16:
      return of_bits((word >> 16 * index) << 16);
    case Kind::Tf32:
      return of_bits(word & ~0x1fffu);
    case Kind::S8:
      return static_cast<int8_t>(word >> 8 * index);
    case Kind::U8:
      return static_cast<uint8_t>(word >> 8 * index);
  }
  return 0;
}

// A in registers 0.., rows lane/4 and lane/4 + 8; a register holds 32 / width neighbours in k.
double a_element(const MmaCase& c, const Registers& in, int row, int k) {
  const int per_register = 32 / width(c.a), per_half = 4 * per_register;
  const int lane = row % 8 * 4 + k % per_half / per_register;
  return element(c.a, in[static_cast<size_t>(2 * (k / per_half) + row / 8)][static_cast<size_t>(lane)],
                 k % per_register);
}
double b_element(const MmaCase& c, const Registers& in, int first, int k, int column) {
  const int per_register = 32 / width(c.b), per_half = 4 * per_register;
  const int lane = column * 4 + k % per_half / per_register;
  return element(c.b, in[static_cast<size_t>(first + k / per_half)][static_cast<size_t>(lane)],
                 k % per_register);
}

// Half of the time any bits, else values of moderate size, so that not every sum is infinite.
void make_moderate(Kind kind, Lanes* lanes, std::mt19937& random) {
  for (uint32_t& v : *lanes) {
    if (random() % 16 == 0) continue;
    if (kind == Kind::F16) v = (v & 0x8fff8fff) | 0x30003000;
    if (kind == Kind::Bf16) v = (v & 0x80ff80ff) | 0x3f003f00;
    if (kind == Kind::Tf32) v = (v & 0x80ffffff) | 0x3f000000;
  }
}

class MmaTest : public ::testing::TestWithParam<MmaCase> {};

TEST_P(MmaTest, EqualsTheChainOfProductsInOrderOfK) {
  const MmaCase c = GetParam();
  const bool integer = c.a == Kind::S8 || c.a == Kind::U8;
  const int a_registers = 16 * c.k * width(c.a) / 1024, b_registers = 8 * c.k * width(c.b) / 1024,
            c_registers = c.half_accumulator ? 2 : 4;
  const int num_in = a_registers + b_registers + c_registers;
  std::mt19937 random(5);
  int finite = 0;
  for (uint64_t seed = 0; seed < 40; ++seed) {
    Registers in = random_registers(static_cast<size_t>(num_in), seed);
    if (seed % 4 != 0 && !integer)
      for (int r = 0; r < num_in; ++r) {
        const Kind kind = r < a_registers                 ? c.a
                          : r < a_registers + b_registers ? c.b
                          : c.half_accumulator            ? Kind::F16
                                                          : Kind::Tf32;
        make_moderate(kind, &in[static_cast<size_t>(r)], random);
      }
    const std::string body =
        "mma.sync.aligned." + std::string(c.name) + " " + list("%o", 0, static_cast<size_t>(c_registers)) +
        ", " + list("%i", 0, static_cast<size_t>(a_registers)) + ", " +
        list("%i", static_cast<size_t>(a_registers), static_cast<size_t>(b_registers)) + ", " +
        list("%i", static_cast<size_t>(a_registers + b_registers), static_cast<size_t>(c_registers)) + ";";
    const WarpResult result = run_warp_well(body, in, static_cast<size_t>(c_registers));
    if (result.error != cudaSuccess) return;
    for (int row = 0; row < 16; ++row)
      for (int column = 0; column < 8; ++column) {
        const size_t lane = static_cast<size_t>(row % 8 * 4 + column / 2);
        const size_t r = static_cast<size_t>(c.half_accumulator ? row / 8 : row / 8 * 2 + column % 2);
        const uint32_t start = in[static_cast<size_t>(a_registers + b_registers) + r][lane],
                       got = result.out[r][lane];
        if (integer) {
          int64_t sum = static_cast<int32_t>(start);
          for (int k = 0; k < c.k; ++k)
            sum += static_cast<int64_t>(a_element(c, in, row, k) * b_element(c, in, a_registers, k, column));
          if (c.saturate) sum = std::min<int64_t>(std::max<int64_t>(sum, INT32_MIN), INT32_MAX);
          ASSERT_EQ(got, static_cast<uint32_t>(sum)) << row << " " << column;
          continue;
        }
        float sum = c.half_accumulator ? f16(start >> 16 * (column % 2) & 0xffff) : of_bits(start);
        for (int k = 0; k < c.k; ++k)
          sum = std::fma(static_cast<float>(a_element(c, in, row, k)),
                         static_cast<float>(b_element(c, in, a_registers, k, column)), sum);
        const float value = c.half_accumulator ? f16(got >> 16 * (column % 2) & 0xffff) : of_bits(got);
        if (std::isnan(sum)) {
          ASSERT_TRUE(std::isnan(value)) << row << " " << column;
        } else if (!c.half_accumulator) {
          ASSERT_EQ(value, sum) << row << " " << column;
          ASSERT_EQ(std::signbit(value), std::signbit(sum));
        } else if (std::fabs(sum) >= 65520.0f) {
          ASSERT_EQ(value, std::copysign(INFINITY, sum));
        } else {  // rounded once: half a unit in the last place of f16
          const float unit = std::ldexp(1.0f, std::max(std::ilogb(sum), -14) - 10);
          ASSERT_LE(std::fabs(value - sum), unit / 2) << row << " " << column;
        }
        finite += std::isfinite(sum);
      }
  }
  EXPECT_TRUE(integer || finite > 500) << finite;  // the rest are infinities and NaNs
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, MmaTest,
    ::testing::Values(MmaCase{"m16n8k16.row.col.f32.f16.f16.f32", Kind::F16, Kind::F16, 16, false, false},
                      MmaCase{"m16n8k8.row.col.f32.f16.f16.f32", Kind::F16, Kind::F16, 8, false, false},
                      MmaCase{"m16n8k16.row.col.f32.bf16.bf16.f32", Kind::Bf16, Kind::Bf16, 16, false, false},
                      MmaCase{"m16n8k8.row.col.f32.bf16.bf16.f32", Kind::Bf16, Kind::Bf16, 8, false, false},
                      MmaCase{"m16n8k16.row.col.f16.f16.f16.f16", Kind::F16, Kind::F16, 16, true, false},
                      MmaCase{"m16n8k8.row.col.f16.f16.f16.f16", Kind::F16, Kind::F16, 8, true, false},
                      MmaCase{"m16n8k8.row.col.f32.tf32.tf32.f32", Kind::Tf32, Kind::Tf32, 8, false, false},
                      MmaCase{"m16n8k4.row.col.f32.tf32.tf32.f32", Kind::Tf32, Kind::Tf32, 4, false, false},
                      MmaCase{"m16n8k32.row.col.s32.s8.s8.s32", Kind::S8, Kind::S8, 32, false, false},
                      MmaCase{"m16n8k16.row.col.s32.s8.s8.s32", Kind::S8, Kind::S8, 16, false, false},
                      MmaCase{"m16n8k32.row.col.s32.u8.s8.s32", Kind::U8, Kind::S8, 32, false, false},
                      MmaCase{"m16n8k32.row.col.s32.s8.u8.s32", Kind::S8, Kind::U8, 32, false, false},
                      MmaCase{"m16n8k16.row.col.s32.u8.u8.s32", Kind::U8, Kind::U8, 16, false, false},
                      MmaCase{"m16n8k32.row.col.satfinite.s32.s8.s8.s32", Kind::S8, Kind::S8, 32, false,
                              true}),
    [](const auto& info) {
      std::string name = info.param.name;
      for (char& ch : name)
        if (ch == '.') ch = '_';
      return name;
    });

TEST(Mma, FormsWithoutASimulationAreRefusedWithTheirLine) {
  for (const char* text : {"mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%o0, %o1, %o2, %o3}, {%i0, "
                           "%i1, %i2, %i3}, {%i4, %i5}, "
                           "{%i6, %i7, %i8, %i9};",
                           "wgmma.fence.sync.aligned;"}) {
    EXPECT_EQ(run_warp(text, random_registers(10, 1), 4).error, cudaErrorInvalidPtx) << text;
    EXPECT_NE(std::string(ptxsim_last_report()).find("PTX line"), std::string::npos) << ptxsim_last_report();
  }
}

// ---- matrices of 8 x 8 16-bit values; matrix i has its rows in shared memory where lanes 8i.. say
uint32_t half_of(const Registers& rows, int row, int column) {
  return rows[static_cast<size_t>(column / 2)][static_cast<size_t>(row)] >> 16 * (column % 2) & 0xffff;
}
// Lane l owns the 16 bytes at a place that is neither in order nor near its neighbours'.
const std::string kRowAddress =
    "mul.lo.u32 %at, %lane, 7; and.b32 %at, %at, 31; mad.lo.u32 %at, %at, 48, %s;\n";

TEST(Matrix, LdmatrixAndTransposed) {
  for (bool transposed : {false, true})
    for (int n : {1, 2, 4}) {
      const Registers rows = random_registers(4, static_cast<uint64_t>(n));
      const std::string form =
          "ldmatrix.sync.aligned.m8n8.x" + std::to_string(n) + (transposed ? ".trans" : "");
      const WarpResult r =
          run_warp_well(kRowAddress + "st.shared.v4.b32 [%at], {%i0, %i1, %i2, %i3}; bar.warp.sync -1;\n" +
                            form + ".shared.b16 " + list("%o", 0, static_cast<size_t>(n)) + ", [%at];",
                        rows, static_cast<size_t>(n));
      for (int i = 0; i < n; ++i)
        for (int lane = 0; lane < kWarp; ++lane)
          for (int half = 0; half < 2; ++half) {
            const int row = lane / 4, column = lane % 4 * 2 + half;
            const uint32_t want =
                transposed ? half_of(rows, 8 * i + column, row) : half_of(rows, 8 * i + row, column);
            ASSERT_EQ(r.out[static_cast<size_t>(i)][static_cast<size_t>(lane)] >> 16 * half & 0xffff, want)
                << form << " matrix " << i << " lane " << lane;
          }
    }
}

TEST(Matrix, StmatrixAndTransposed) {
  for (bool transposed : {false, true})
    for (int n : {1, 2, 4}) {
      const Registers fragments = random_registers(4, static_cast<uint64_t>(10 + n));
      const std::string form =
          "stmatrix.sync.aligned.m8n8.x" + std::to_string(n) + (transposed ? ".trans" : "");
      const WarpResult r =
          run_warp_well(kRowAddress + "st.shared.v4.b32 [%at], {0, 0, 0, 0}; bar.warp.sync -1;\n" + form +
                            ".shared.b16 [%at], " + list("%i", 0, static_cast<size_t>(n)) +
                            "; bar.warp.sync -1; ld.shared.v4.b32 {%o0, %o1, %o2, %o3}, [%at];",
                        fragments, 4);
      for (int row = 0; row < kWarp; ++row)
        for (int column = 0; column < 8; ++column) {
          const int i = row / 8, r8 = row % 8;
          const int lane = transposed ? column * 4 + r8 / 2 : r8 * 4 + column / 2;
          const int half = transposed ? r8 % 2 : column % 2;
          const uint32_t want =
              i < n ? fragments[static_cast<size_t>(i)][static_cast<size_t>(lane)] >> 16 * half & 0xffff : 0;
          ASSERT_EQ(half_of(r.out, row, column), want) << form << " row " << row;
        }
    }
}

TEST(Matrix, MovmatrixTransposes) {
  const Registers in = random_registers(1, 3);
  const WarpResult r = run_warp_well("movmatrix.sync.aligned.m8n8.trans.b16 %o0, %i0;", in, 1);
  const auto at = [](const Lanes& lanes, int row, int column) {
    return lanes[static_cast<size_t>(row * 4 + column / 2)] >> 16 * (column % 2) & 0xffff;
  };
  for (int row = 0; row < 8; ++row)
    for (int column = 0; column < 8; ++column) ASSERT_EQ(at(r.out[0], row, column), at(in[0], column, row));
}

}  // namespace
