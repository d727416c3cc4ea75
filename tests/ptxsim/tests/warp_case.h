// SPDX-License-Identifier: Apache-2.0
// Runs a piece of PTX on one warp: each lane has 32-bit inputs %i0, %i1, ... and leaves results in %o0, %o1,
// ...
#pragma once

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "ptxsim.h"

namespace ptxsim_test {

constexpr int kWarp = 32;
using Lanes = std::array<uint32_t, kWarp>;  // one register
using Registers = std::vector<Lanes>;

// The body also has .pred %p<4>, .b16 %h<8>, .b32 %r<8>, .b64 %x<8>, the lane in %lane, 4,096 bytes of shared
// memory `s` of which %s is the address, and the address of `memory`, if there is some, in %m.
struct WarpResult {
  cudaError_t error;
  Registers out;
  std::vector<uint32_t> memory;
};
inline WarpResult run_warp(const std::string& body, const Registers& in, size_t num_out,
                           std::vector<uint32_t> memory = {}) {
  std::string ptx =
      ".version 8.6\n.target sm_90\n.address_size 64\n"
      ".visible .entry k(.param .u64 in, .param .u64 out, .param .u64 memory) {\n"
      ".shared .align 128 .b8 s[4096]; .reg .pred %p<4>; .reg .b16 %h<8>; .reg .b32 %r<8>; .reg .b64 %x<8>;\n"
      ".reg .b32 %lane, %s, %at; .reg .b64 %m, %from, %to;\n";
  for (size_t k = 0; k < in.size(); ++k) ptx += ".reg .b32 %i" + std::to_string(k) + ";\n";
  for (size_t k = 0; k < num_out; ++k) ptx += ".reg .b32 %o" + std::to_string(k) + ";\n";
  ptx +=
      "mov.u32 %lane, %tid.x; mov.u32 %s, s; ld.param.u64 %m, [memory];\n"
      "ld.param.u64 %from, [in]; ld.param.u64 %to, [out];\nmul.wide.u32 %x0, %lane, 4;\n"
      "add.s64 %from, %from, %x0; add.s64 %to, %to, %x0;\n";
  for (size_t k = 0; k < in.size(); ++k)
    ptx += "ld.global.b32 %i" + std::to_string(k) + ", [%from+" + std::to_string(128 * k) + "];\n";
  ptx += body + "\n";
  for (size_t k = 0; k < num_out; ++k)
    ptx += "st.global.b32 [%to+" + std::to_string(128 * k) + "], %o" + std::to_string(k) + ";\n";
  ptx += "ret;\n}\n";

  ptxsim_clear_report();  // the error of a fault before this run would meet the allocations
  const auto on_device = [](const void* from, size_t bytes) {
    void* p = nullptr;
    EXPECT_EQ(cudaMalloc(&p, bytes == 0 ? 4 : bytes), cudaSuccess);
    if (from != nullptr) std::memcpy(p, from, bytes);
    return p;
  };
  void* d_in = on_device(in.data(), in.size() * sizeof(Lanes));
  void* d_out = on_device(nullptr, num_out * sizeof(Lanes));
  void* d_memory = on_device(memory.data(), memory.size() * 4);
  void* args[] = {&d_in, &d_out, &d_memory};
  const unsigned grid[3] = {1, 1, 1}, block[3] = {kWarp, 1, 1};
  WarpResult r{static_cast<cudaError_t>(ptxsim_run_ptx(ptx.c_str(), "k", grid, block, 0, args)),
               Registers(num_out), memory};
  std::memcpy(r.out.data(), d_out, num_out * sizeof(Lanes));
  std::memcpy(r.memory.data(), d_memory, memory.size() * 4);
  for (void* p : {d_in, d_out, d_memory}) cudaFree(p);
  return r;
}
inline WarpResult run_warp_well(const std::string& body, const Registers& in, size_t num_out,
                                const std::vector<uint32_t>& memory = {}) {
  WarpResult r = run_warp(body, in, num_out, memory);
  EXPECT_EQ(r.error, cudaSuccess) << body << "\n" << ptxsim_last_report();
  return r;
}

inline Registers random_registers(size_t n, uint64_t seed) {
  std::mt19937_64 random(seed);
  Registers r(n);
  for (Lanes& lanes : r)
    for (uint32_t& v : lanes) v = static_cast<uint32_t>(random());
  return r;
}

// "{%i0, %i1}"
inline std::string list(const char* prefix, size_t first, size_t n) {
  std::string s = "{";
  for (size_t k = 0; k < n; ++k) s += std::string(k ? ", " : "") + prefix + std::to_string(first + k);
  return s + "}";
}

}  // namespace ptxsim_test
