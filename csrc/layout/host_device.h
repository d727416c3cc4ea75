// SPDX-License-Identifier: Apache-2.0
//
// Marks functions that the CPU kernels and the CUDA kernels share. Always inlined: kernel files are compiled
// once per instruction set, and an out-of-line copy made for one of them could be linked into all.
#pragma once

#if defined(__CUDACC__)
#define FS_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FS_HOST_DEVICE [[gnu::always_inline]] inline
#endif
