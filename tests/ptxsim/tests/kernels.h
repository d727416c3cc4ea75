// SPDX-License-Identifier: Apache-2.0
// Launchers of the test kernels in kernels.cu.
#pragma once

#include <cuda_runtime_api.h>

// A pipeline of cp.async tiles through two buffers; each mutant lacks one thing it needs.
enum class Pipeline {
  Correct,
  NoBarrierAfterWait,
  NoBarrierBeforeRefill,
  NoWait,
  WeakWait,
  NoWaitAtEnd,
  NumMutants
};
constexpr int kTileFloats = 256;
// out[t * 256 + i] = in[t * 256 + 255 - i] + 1, 64 threads, `tiles` tiles.
void launch_pipeline(Pipeline mutant, const float* in, float* out, int tiles);

enum class Fault {
  None,
  GlobalOverrun,
  GlobalNull,
  SharedOverrun,
  Misaligned,
  UninitialisedShared,
  LocalOverrun,
  Trap,
  Assert,
  DivergentBarrier,
  SpinForever,
  MissingSyncthreads,
  MissingSyncwarp,
  SharedWriteWrite,
  BlocksWriteSame,
  BlocksReadWritten,
  ReservedMask,
};
void launch_fault(Fault fault, int* data, int n);
void launch_fault_on(Fault fault, int* data, int n, int blocks);

enum class Fence { None, Block, Device };
void launch_message(int* data, int* flag, int* out,
                    Fence fence);  // block 0 sends, block 1 spins and reads
void launch_message_in_block(int* data, int* flag, int* out, bool with_fences);  // from warp to warp
void launch_shared_alignment(int* out);  // address of dynamic shared memory modulo its alignment, 256
void launch_grid_sum(const int* in, int* partial, int* out, int n,
                     int blocks);  // cooperative: two phases with a grid barrier
void launch_last_block_sum(const int* in, int* partial, unsigned* counter, int* out, int n, int blocks,
                           bool with_fence);
void launch_lock(int* lock, int* sum, int blocks);  // a spin lock taken by every thread
void launch_named_barriers(int* out);               // producer and consumer warps
// cp.async + mbarrier, producer and consumer warps; a mutant lacks one thing.
enum class Mbarrier { Correct, NoWaitFull, NoWaitEmpty, NoBarrierAfterInit };
void launch_mbarrier(Mbarrier mutant, const int* in, int* out, int tiles);
void launch_warp_collectives(const int* in, int* out);  // 32 threads, 16 results each
void launch_atomics(int* words);                        // 256 threads into 16 counters
void launch_copy(const float* in, float* out, int n, int stride, cudaStream_t stream);
void launch_add(float* data, int n, float value, cudaStream_t stream);
void launch_transpose(const float* in, float* out, bool padded);  // 32 x 32 through shared memory
const void* transpose_kernel();                                   // its handle; 4,096 bytes of shared memory
void launch_print();
void launch_switch(const int* in, int* out, int n);  // brx.idx and function calls

// out (16 x 8) = a (16 x k) * b (8 x k, transposed) by one mma, operands through ldmatrix where they are
// 16-bit.
enum class Mma { F16, Bf16, F16Accumulate, Tf32, S8, F16K8 };
void launch_mma(Mma kind, const void* a, const void* b, void* out);
void launch_ldmatrix(const unsigned short* in, unsigned* plain, unsigned* transposed);

// data[i] = i for 1,024 elements; PTX compressed with zstd, with LZ4 and not at all (compressed.cu).
void launch_compressed_size(int* data);
void launch_compressed_speed(int* data);
void launch_compressed_none(int* data);
