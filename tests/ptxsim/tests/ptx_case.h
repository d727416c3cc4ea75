// SPDX-License-Identifier: Apache-2.0
// Runs one PTX instruction over arrays of operands and hands back the results as bit patterns.
#pragma once

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "ptxsim.h"

namespace ptxsim_test {

inline int bits_of(const std::string& type) {
  if (type == "f16x2" || type == "bf16x2") return 32;
  if (type == "bf16") return 16;
  return std::stoi(type.substr(1));
}
inline std::string storage(const std::string& type) {
  return "b" + std::to_string(std::max(bits_of(type), 16));
}

// Operands: random bits, with the values that break arithmetic sprinkled in.
inline std::vector<uint64_t> operands(const std::string& type, size_t n, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<uint64_t> special{0,
                                1,
                                2,
                                3,
                                31,
                                32,
                                33,
                                63,
                                64,
                                255,
                                0xffffffffffffffffull,
                                0x8000000000000000ull,
                                0x7fffffffffffffffull,
                                0x80000000,
                                0x7fffffff,
                                0xffffffff,
                                0x8000,
                                0x7fff,
                                0xffff};
  if (type == "f32")
    special = {0,          0x80000000, 1,          0x807fffff, 0x00800000, 0x3f800000,
               0xbf800000, 0x7f7fffff, 0xff7fffff, 0x7f800000, 0xff800000, 0x7fc00000,
               0x4b000001, 0x3f000000, 0x477ff000, 0x33000000};
  if (type == "f64")
    special = {0,
               1ull << 63,
               1,
               0x3ff0000000000000,
               0x7fefffffffffffff,
               0x7ff0000000000000,
               0xfff0000000000000,
               0x7ff8000000000000,
               0x41e0000000000000,
               0x36a0000000000000};
  if (type == "f16")
    special = {0, 0x8000, 1, 0x83ff, 0x400, 0x3c00, 0xbc00, 0x7bff, 0xfbff, 0x7c00, 0xfc00, 0x7e00};
  if (type == "bf16")
    special = {0, 0x8000, 1, 0x807f, 0x80, 0x3f80, 0xbf80, 0x7f7f, 0xff7f, 0x7f80, 0xff80, 0x7fc0};
  std::vector<uint64_t> out(n);
  for (auto& v : out) {
    const uint64_t r = random();
    v = r % 5 == 0 ? special[random() % special.size()] : random();
    if (r % 5 == 1 && type == "f32")
      v = (random() & 0x80ffffffu) + 0x3b000000u;  // of similar size, so that sums do not just swallow
    if (r % 5 == 1 && type == "f16") v = (random() & 0x8fffu) + 0x3000u;
    if (r % 5 == 1 && type == "bf16") v = (random() & 0x80ffu) + 0x3f00u;
    if (r % 5 == 1 && type == "f64") v = (random() & 0x800fffffffffffffull) + 0x3fe0000000000000ull;
    const int bits = bits_of(type);
    if (bits < 64) v &= (1ull << bits) - 1;
  }
  return out;
}

// `text` uses %d for the result and %a, %b, %c for the operands, e.g. "add.s32 %d, %a, %b;". Extra
// declarations go in the text.
inline std::vector<uint64_t> run(const std::string& text, const std::string& result,
                                 const std::vector<std::string>& types,
                                 const std::vector<std::vector<uint64_t>>& in) {
  const size_t n = in[0].size();
  std::string ptx =
      ".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry k(.param .u64 out, .param .u64 in0, "
      ".param .u64 in1, .param .u64 in2) {\n"
      ".reg .pred %p<4>; .reg .b32 %r<8>; .reg .b64 %x<8>; .reg ." +
      storage(result) + " %d;\n";
  const char* const names[] = {"%a", "%b", "%c"};
  for (size_t i = 0; i < types.size(); ++i)
    ptx += std::string(".reg .") + storage(types[i]) + " " + names[i] + ";\n";
  ptx += "mov.u32 %r0, %ctaid.x; mov.u32 %r1, %ntid.x; mov.u32 %r2, %tid.x; mad.lo.s32 %r3, %r0, %r1, %r2;\n";
  for (size_t i = 0; i < types.size(); ++i) {
    const std::string bytes = std::to_string(std::max(bits_of(types[i]), 16) / 8), index = std::to_string(i);
    ptx += "ld.param.u64 %x0, [in" + index + "]; mul.wide.u32 %x1, %r3, " + bytes +
           "; add.s64 %x0, %x0, %x1; ld.global." + storage(types[i]) + " " + names[i] + ", [%x0];\n";
  }
  ptx += text + "\nld.param.u64 %x0, [out]; mul.wide.u32 %x1, %r3, " +
         std::to_string(std::max(bits_of(result), 16) / 8) + "; add.s64 %x0, %x0, %x1; st.global." +
         storage(result) + " [%x0], %d;\nret;\n}\n";
  std::vector<void*> buffers;
  const auto buffer = [&](const std::string& type, const std::vector<uint64_t>* values) {
    const size_t bytes = static_cast<size_t>(std::max(bits_of(type), 16)) / 8;
    void* p = nullptr;
    EXPECT_EQ(cudaMalloc(&p, n * bytes), cudaSuccess);
    if (values != nullptr)
      for (size_t i = 0; i < n; ++i) std::memcpy(static_cast<char*>(p) + i * bytes, &(*values)[i], bytes);
    buffers.push_back(p);
    return p;
  };
  void* out = buffer(result, nullptr);
  void* ins[3] = {};
  for (size_t i = 0; i < types.size(); ++i) ins[i] = buffer(types[i], &in[i]);
  void* args[] = {&out, &ins[0], &ins[1], &ins[2]};
  const unsigned block[3] = {static_cast<unsigned>(std::min<size_t>(n, 256)), 1, 1},
                 grid[3] = {static_cast<unsigned>(n / block[0]), 1, 1};
  ptxsim_clear_report();
  EXPECT_EQ(ptxsim_run_ptx(ptx.c_str(), "k", grid, block, 0, args), cudaSuccess) << text << "\n"
                                                                                 << ptxsim_last_report();
  std::vector<uint64_t> got(n, 0);
  const size_t bytes = static_cast<size_t>(std::max(bits_of(result), 16)) / 8;
  for (size_t i = 0; i < n; ++i) std::memcpy(&got[i], static_cast<char*>(out) + i * bytes, bytes);
  for (void* p : buffers) cudaFree(p);
  return got;
}

inline bool is_nan(const std::string& type, uint64_t v) {
  if (type == "f32") return (v & 0x7fffffff) > 0x7f800000;
  if (type == "f64") return (v & 0x7fffffffffffffff) > 0x7ff0000000000000;
  if (type == "f16") return (v & 0x7fff) > 0x7c00;
  if (type == "bf16") return (v & 0x7fff) > 0x7f80;
  return false;
}

using Oracle = std::function<uint64_t(uint64_t, uint64_t, uint64_t)>;
// Compares every result with the oracle's; any NaN equals any other.
inline void expect_equal(const std::string& text, const std::string& result,
                         const std::vector<std::string>& types, const Oracle& oracle, size_t n = 8192) {
  std::vector<std::vector<uint64_t>> in;
  for (size_t i = 0; i < types.size(); ++i)
    in.push_back(operands(types[i], n, 1000 * i + std::hash<std::string>()(text)));
  const auto got = run(text, result, types, in);
  const uint64_t mask = bits_of(result) >= 64 ? ~0ull : (1ull << std::max(bits_of(result), 16)) - 1;
  int wrong = 0;
  for (size_t i = 0; i < n && wrong < 3; ++i) {
    const uint64_t a = in[0][i], b = types.size() > 1 ? in[1][i] : 0, c = types.size() > 2 ? in[2][i] : 0;
    const uint64_t want = oracle(a, b, c) & mask;
    if (got[i] == want || (is_nan(result, got[i]) && is_nan(result, want))) continue;
    ++wrong;
    ADD_FAILURE() << text << std::hex << " a=" << a << " b=" << b << " c=" << c << " got " << got[i]
                  << " want " << want;
  }
}

template <class T, class U>
T as(U u) {
  T t;
  static_assert(sizeof(T) <= sizeof(U));
  std::memcpy(&t, &u, sizeof(T));
  return t;
}
template <class T>
uint64_t bits(T t) {
  uint64_t u = 0;
  std::memcpy(&u, &t, sizeof(T));
  return u;
}

}  // namespace ptxsim_test
