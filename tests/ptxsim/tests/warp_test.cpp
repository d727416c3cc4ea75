// SPDX-License-Identifier: Apache-2.0
// Reductions over a warp in every form and by some of its lanes, and which window an address is in.
#include <algorithm>
#include <bit>
#include <functional>

#include "warp_case.h"

using namespace ptxsim_test;

namespace {

struct Reduction {
  const char* form;
  std::function<uint32_t(uint32_t, uint32_t)> combine;
};

uint32_t smaller_signed(uint32_t a, uint32_t b) {
  return std::bit_cast<int32_t>(a) < std::bit_cast<int32_t>(b) ? a : b;
}
uint32_t larger_signed(uint32_t a, uint32_t b) {
  return smaller_signed(a, b) == a ? b : a;
}

const std::vector<Reduction> kReductions{
    {"add.u32", std::plus<>{}},
    {"add.s32", std::plus<>{}},
    {"min.u32", [](uint32_t a, uint32_t b) { return std::min(a, b); }},
    {"max.u32", [](uint32_t a, uint32_t b) { return std::max(a, b); }},
    {"min.s32", smaller_signed},
    {"max.s32", larger_signed},
    {"and.b32", std::bit_and<>{}},
    {"or.b32", std::bit_or<>{}},
    {"xor.b32", std::bit_xor<>{}},
};

// Random ones; among them the extremes; all of one sign; and what `and` and `or` do not wash out at once.
std::vector<Lanes> operands() {
  std::vector<Lanes> all = random_registers(8, 17);
  all[1][5] = 0x80000000u, all[1][9] = 0x7fffffffu, all[1][30] = 0xffffffffu, all[1][31] = 0;
  for (uint32_t& v : all[2]) v |= 0x80000000u;
  for (uint32_t& v : all[3]) v &= 0x7fffffffu;
  for (uint32_t& v : all[4]) v = ~(1u << v % 32);
  for (uint32_t& v : all[5]) v = 1u << v % 32;
  return all;
}

TEST(Warp, ReductionsByAllLanesOrSome) {
  constexpr uint32_t kUntouched = 0xabcdef01u;
  for (const Reduction& reduction : kReductions)
    for (const uint32_t members : {0xffffffffu, 0x0000ffffu, 0xaaaaaaaau, 0x80000001u, 0x00000400u})
      for (const Lanes& in : operands()) {
        const std::string mask = std::to_string(members);
        const std::string body = "mov.b32 %o0, " + std::to_string(kUntouched) + "; shr.u32 %r0, " + mask +
                                 ", %lane; and.b32 %r0, %r0, 1; "
                                 "setp.ne.u32 %p0, %r0, 0;\n@%p0 redux.sync." +
                                 reduction.form + " %o0, %i0, " + mask + ";";
        const WarpResult r = run_warp_well(body, {in}, 1);
        uint32_t want = 0;
        bool first = true;
        for (size_t lane = 0; lane < kWarp; ++lane) {
          if ((members >> lane & 1) == 0) continue;
          want = first ? in[lane] : reduction.combine(want, in[lane]);
          first = false;
        }
        for (size_t lane = 0; lane < kWarp; ++lane)
          ASSERT_EQ(r.out[0][lane], (members >> lane & 1) != 0 ? want : kUntouched)
              << reduction.form << " of lanes " << std::hex << members << ", lane " << std::dec << lane;
      }
}

TEST(Warp, ReductionByALaneOutsideItsMaskIsAFault) {
  const WarpResult r = run_warp("redux.sync.min.s32 %o0, %i0, 0xfffffffe;", random_registers(1, 3), 1);
  EXPECT_EQ(r.error, cudaErrorLaunchFailure);
  EXPECT_NE(std::string(ptxsim_last_report()).find("mask leaves it out"), std::string::npos);
}

// A kernel's parameters lie in the global window, as the PTX manual says of isspacep.
TEST(Warp, WindowOfAnAddress) {
  struct Address {
    const char* name;
    const char* into_x0;  // PTX that leaves a generic address in %x0
    std::vector<std::string> windows;
  };
  const std::vector<Address> addresses{
      {"global", "mov.b64 %x0, %m;", {"global"}},
      {"shared", "cvta.shared.u64 %x0, own;", {"shared", "shared::cta", "shared::cluster"}},
      {"local", "cvta.local.u64 %x0, mine;", {"local"}},
      {"parameter", "mov.b64 %x0, in; cvta.param.u64 %x0, %x0;", {"param", "global"}},
  };
  for (const Address& address : addresses)
    for (const std::string window :
         {"global", "shared", "shared::cta", "shared::cluster", "local", "param"}) {
      const WarpResult r =
          run_warp_well(std::string(".shared .b32 own; .local .b32 mine;\n") + address.into_x0 +
                            " isspacep." + window + " %p0, %x0; selp.u32 %o0, 1, 0, %p0;",
                        {}, 1, {1});
      const bool want = std::count(address.windows.begin(), address.windows.end(), window) != 0;
      for (size_t lane = 0; lane < kWarp; ++lane)
        ASSERT_EQ(r.out[0][lane], want ? 1u : 0u)
            << "isspacep." << window << " of a " << address.name << " address";
    }
}

TEST(Warp, WindowsOfLanesDiffer) {
  const WarpResult r = run_warp_well(
      ".shared .b32 own; cvta.shared.u64 %x1, own; and.b32 %r0, %lane, 1; setp.eq.u32 %p1, %r0, 0;\n"
      "selp.b64 %x0, %x1, %m, %p1; isspacep.shared %p0, %x0; selp.u32 %o0, 1, 0, %p0;",
      {}, 1, {1});
  for (size_t lane = 0; lane < kWarp; ++lane) ASSERT_EQ(r.out[0][lane], lane % 2 == 0 ? 1u : 0u);
}

}  // namespace
