// SPDX-License-Identifier: Apache-2.0
// Compiled once per way in which a fat binary may hold its PTX.
#include "kernels.h"

#define PTXSIM_JOIN_(a, b) a##b
#define PTXSIM_JOIN(a, b) PTXSIM_JOIN_(a, b)

namespace {
__global__ void count(int* data) {  // long enough to be worth compressing
#pragma unroll
  for (int i = 0; i < 32; ++i) data[32 * i + threadIdx.x] = 32 * i + static_cast<int>(threadIdx.x);
}
}  // namespace

void PTXSIM_JOIN(launch_compressed_, PTXSIM_MODE)(int* data) {
  count<<<1, 32>>>(data);
}
