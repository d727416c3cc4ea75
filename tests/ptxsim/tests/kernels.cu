// SPDX-License-Identifier: Apache-2.0
#include "kernels.h"

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cassert>
#include <cstdio>

namespace cg = cooperative_groups;

namespace {

__device__ unsigned shared_address(const void* p) {
  return static_cast<unsigned>(__cvta_generic_to_shared(p));
}
__device__ void copy_async(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
__device__ void commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int N>
__device__ void wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

template <Pipeline kMutant>
__global__ void pipeline(const float* in, float* out, int tiles) {
  __shared__ __align__(16) float buffer[2][kTileFloats];
  const int t = threadIdx.x;
  auto load = [&](int tile) {
    if (tile < tiles) copy_async(&buffer[tile % 2][4 * t], in + tile * kTileFloats + 4 * t);
    commit();
  };
  load(0);
  for (int tile = 0; tile < tiles; ++tile) {
    load(tile + 1);
    if (kMutant == Pipeline::WeakWait)
      wait<2>();
    else if (kMutant == Pipeline::NoWaitAtEnd) {
      if (tile + 1 < tiles) wait<1>();
    } else if (kMutant != Pipeline::NoWait)
      wait<1>();
    if (kMutant != Pipeline::NoBarrierAfterWait) __syncthreads();
    for (int k = 0; k < 4; ++k) {
      const int i = 4 * t + k;
      out[tile * kTileFloats + i] = buffer[tile % 2][kTileFloats - 1 - i] + 1.0f;
    }
    if (kMutant != Pipeline::NoBarrierBeforeRefill) __syncthreads();
  }
}

template <Fault kFault>
__global__ void faulty(int* data, int n) {
  __shared__ int s[64];
  __shared__ int warp_slot[2];
  const int t = threadIdx.x, b = blockIdx.x;
  if (kFault == Fault::None) {
    s[t] = t;
    __syncthreads();
    data[b * 64 + t] = s[63 - t];
  }
  if (kFault == Fault::GlobalOverrun && t == 37) data[n] = 1;
  if (kFault == Fault::GlobalNull && t == 3) *reinterpret_cast<volatile int*>(0) = 1;
  if (kFault == Fault::SharedOverrun) {
    s[t] = t;
    __syncthreads();
    if (t == 5) data[0] = s[t + n * 4];
  }
  if (kFault == Fault::Misaligned && t == 9) *reinterpret_cast<long long*>(data + 1) = 1;
  if (kFault == Fault::UninitialisedShared) {
    if (t < 32) s[t] = t;
    __syncthreads();
    data[t] = s[t];
  }
  if (kFault == Fault::LocalOverrun) {
    int local[8];
    for (int i = 0; i < 8; ++i) local[i] = data[i];
    data[t] = local[(t * n) & 0xffff];
  }
  if (kFault == Fault::Trap && t == 11) __trap();
  if (kFault == Fault::Assert) assert(t + n < 90 && "an assertion");
  if (kFault == Fault::DivergentBarrier) {
    if (t < 32)
      asm volatile("bar.sync 1, 64;" ::: "memory");
    else
      asm volatile("bar.sync 2, 64;" ::: "memory");
  }
  if (kFault == Fault::SpinForever && t == 0)
    while (*reinterpret_cast<volatile int*>(data) != 12345) {
    }
  if (kFault == Fault::MissingSyncthreads) {
    s[t] = t;
    data[t] = s[t ^ 32];
  }
  if (kFault == Fault::MissingSyncwarp) {
    if (t % 32 == 0) warp_slot[t / 32] = n;
    data[t] = warp_slot[t / 32];
  }
  if (kFault == Fault::SharedWriteWrite) {
    s[t & 31] = t;
    __syncthreads();
    data[t] = s[t & 31];
  }
  if (kFault == Fault::BlocksWriteSame && t == 0) data[0] = b;
  if (kFault == Fault::BlocksReadWritten && t == 0) {
    if (b == 0)
      data[0] = 7;
    else
      data[64 + b] = data[0];
  }
  if (kFault == Fault::ReservedMask) __syncwarp(0x0000ffff);
}
#define PTXSIM_FAULT(name)                        \
  case Fault::name:                               \
    faulty<Fault::name><<<blocks, 64>>>(data, n); \
    break;

__global__ void message(int* data, int* flag, int* out, Fence fence) {
  if (blockIdx.x == 0) {
    *data = 42;
    if (fence == Fence::Block) __threadfence_block();
    if (fence == Fence::Device) __threadfence();
    *reinterpret_cast<volatile int*>(flag) = 1;
    // stay around: the end of a block would publish its stores
    while (*reinterpret_cast<volatile int*>(flag) != 2) {
    }
  } else {
    while (*reinterpret_cast<volatile int*>(flag) != 1) {
    }
    __threadfence();
    *out = *data;
    *reinterpret_cast<volatile int*>(flag) = 2;
  }
}

// The first thread of the first warp sends to the first one of the second.
__global__ void message_in_block(int* data, int* flag, int* out, bool with_fences) {
  if (threadIdx.x == 0) {
    *data = 42;
    if (with_fences) __threadfence();
    atomicExch(flag, 1);
  } else if (threadIdx.x == 32) {
    while (atomicAdd(flag, 0) != 1) {
    }
    if (with_fences) __threadfence();
    *out = *data;
  }
}

// Where dynamic shared memory begins, after a static variable.
__global__ void shared_alignment(int* out) {
  __shared__ int before;
  extern __shared__ __align__(256) unsigned char after[];
  before = 1;
  after[0] = static_cast<unsigned char>(before);
  *out = static_cast<int>(__cvta_generic_to_shared(after) % 256) + after[0] - 1;
}

__global__ void grid_sum(const int* in, int* partial, int* out, int n) {
  int sum = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) sum += in[i];
  sum = __reduce_add_sync(0xffffffff, sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
  cg::this_grid().sync();
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    int total = 0;
    for (int b = 0; b < static_cast<int>(gridDim.x); ++b) total += partial[b];
    *out = total;
  }
}

__global__ void last_block_sum(const int* in, int* partial, unsigned* counter, int* out, int n,
                               bool with_fence) {
  __shared__ bool last;
  int sum = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) sum += in[i];
  sum = __reduce_add_sync(0xffffffff, sum);
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = sum;
    if (with_fence) __threadfence();
    last = atomicAdd(counter, 1) == gridDim.x - 1;
    if (with_fence) __threadfence();
  }
  __syncthreads();
  if (last && threadIdx.x == 0) {
    int total = 0;
    for (int b = 0; b < static_cast<int>(gridDim.x); ++b) total += partial[b];
    *out = total;
  }
}

__global__ void lock_kernel(int* lock, int* sum) {
  bool done = false;
  while (!done) {
    if (atomicCAS(lock, 0, 1) == 0) {
      __threadfence();
      *reinterpret_cast<volatile int*>(sum) = *reinterpret_cast<volatile int*>(sum) + 1;
      __threadfence();
      atomicExch(lock, 0);
      done = true;
    }
  }
}

__global__ void named_barriers(int* out) {
  __shared__ int slot[32];
  const int lane = threadIdx.x % 32;
  if (threadIdx.x < 32) {
    for (int i = 0; i < 10; ++i) {
      if (i > 0) asm volatile("bar.sync 2, 64;" ::: "memory");  // the slot is free
      slot[lane] = i * 100 + lane;
      asm volatile("bar.arrive 1, 64;" ::: "memory");  // the slot is full
    }
  } else {
    int sum = 0;
    for (int i = 0; i < 10; ++i) {
      asm volatile("bar.sync 1, 64;" ::: "memory");
      sum += slot[31 - lane];
      if (i < 9) asm volatile("bar.arrive 2, 64;" ::: "memory");
    }
    out[lane] = sum;
  }
}

// Warp 0 fills two buffers with cp.async and signals `full`; warp 1 reads and signals `empty`.
template <Mbarrier kMutant>
__global__ void mbarrier_kernel(const int* in, int* out, int tiles) {
  __shared__ __align__(16) int buffer[2][128];
  __shared__ __align__(8) unsigned long long full[2], empty[2];
  const int lane = threadIdx.x % 32;
  if (threadIdx.x == 0)
    for (int i = 0; i < 2; ++i) {
      asm volatile("mbarrier.init.shared.b64 [%0], 32;" ::"r"(shared_address(&full[i])) : "memory");
      asm volatile("mbarrier.init.shared.b64 [%0], 32;" ::"r"(shared_address(&empty[i])) : "memory");
    }
  if (kMutant != Mbarrier::NoBarrierAfterInit) __syncthreads();
  auto wait_phase = [](unsigned long long* barrier, int parity) {
    asm volatile(
        "{\n.reg .pred done;\nAGAIN:\nmbarrier.test_wait.parity.shared.b64 done, [%0], %1;\n@!done bra "
        "AGAIN;\n}" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
  };
  if (threadIdx.x < 32) {
    for (int t = 0; t < tiles; ++t) {
      if (kMutant != Mbarrier::NoWaitEmpty && t >= 2) wait_phase(&empty[t % 2], (t / 2 - 1) & 1);
      copy_async(&buffer[t % 2][4 * lane], in + t * 128 + 4 * lane);
      asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(&full[t % 2]))
                   : "memory");
    }
  } else {
    for (int t = 0; t < tiles; ++t) {
      if (kMutant != Mbarrier::NoWaitFull) wait_phase(&full[t % 2], (t / 2) & 1);
      for (int k = 0; k < 4; ++k) out[t * 128 + 4 * lane + k] = buffer[t % 2][127 - (4 * lane + k)];
      asm volatile(
          "{.reg .b64 state; mbarrier.arrive.shared.b64 state, [%0];}" ::"r"(shared_address(&empty[t % 2]))
          : "memory");
    }
  }
}

__global__ void warp_collectives(const int* in, int* out) {
  const int t = threadIdx.x, v = in[t];
  int* o = out + 16 * t;
  o[0] = __shfl_xor_sync(0xffffffff, v, 5);
  o[1] = __shfl_up_sync(0xffffffff, v, 3);
  o[2] = __shfl_down_sync(0xffffffff, v, 7);
  o[3] = __shfl_sync(0xffffffff, v, t * 3, 8);
  o[4] = __ballot_sync(0xffffffff, v & 1);
  o[5] = __any_sync(0xffffffff, v == 77);
  o[6] = __all_sync(0xffffffff, v >= 0);
  o[7] = __match_any_sync(0xffffffff, v & 3);
  o[8] = __reduce_add_sync(0xffffffff, v);
  o[9] = __reduce_max_sync(0xffffffff, v);
  o[10] = 0;
  if (t & 1) o[10] = __shfl_xor_sync(0xaaaaaaaa, v, 2);  // half the warp, inside a branch
  o[11] = __shfl_down_sync(0xffffffff, v, 1, 16);
  o[12] = __activemask();
  long long wide = (static_cast<long long>(v) << 32) | t;
  o[13] = static_cast<int>(__shfl_xor_sync(0xffffffff, wide, 1) >> 32);
  int all = 0;
  o[14] = __match_all_sync(0xffffffff, 5, &all);
  o[15] = all;
}

__global__ void atomics(int* w) {
  const int t = threadIdx.x;
  atomicAdd(&w[0], t);
  atomicMax(&w[1], t);
  atomicMin(&w[2], -t);
  atomicOr(&w[3], 1 << (t & 31));
  atomicAnd(&w[4], ~(1 << (t & 31)));
  atomicXor(&w[5], t);
  atomicInc(reinterpret_cast<unsigned*>(&w[6]), 99);
  atomicDec(reinterpret_cast<unsigned*>(&w[7]), 99);
  atomicAdd(reinterpret_cast<float*>(&w[8]), 0.5f);
  atomicAdd(reinterpret_cast<__half2*>(&w[9]), __floats2half2_rn(1.0f, 0.25f));
  atomicCAS(&w[10], t, t + 1);
  atomicAdd(reinterpret_cast<unsigned long long*>(&w[12]), 1ull << 31);
  atomicAdd(reinterpret_cast<double*>(&w[14]), 0.125);
}

__global__ void copy(const float* in, float* out, int n, int stride) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) out[i] = in[i * stride];
}
__global__ void add(float* data, int n, float value) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) data[i] += value;
}
template <int kPad>
__global__ void transpose(const float* in, float* out) {
  __shared__ float s[32][32 + kPad];
  for (int y = threadIdx.y; y < 32; y += 8) s[y][threadIdx.x] = in[32 * y + threadIdx.x];
  __syncthreads();
  for (int y = threadIdx.y; y < 32; y += 8) out[32 * y + threadIdx.x] = s[threadIdx.x][y];
}

__global__ void print() {
  printf("thread %d of block %d: %5.2f %s %lld\n", threadIdx.x, blockIdx.x, 1.5 * threadIdx.x, "text",
         1ll << 40);
}

__device__ __noinline__ int squared(int x) {
  return x * x + 1;
}
__device__ __noinline__ int nested(int x, int* scratch) {
  scratch[0] = squared(x);
  return scratch[0] + squared(x + 1);
}
__global__ void switch_kernel(const int* in, int* out, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  int scratch[2];
  const int v = in[i];
  int r;
  switch (v % 9) {
    case 0:
      r = v + 1;
      break;
    case 1:
      r = v * 2;
      break;
    case 2:
      r = nested(v, scratch);
      break;
    case 3:
      r = v ^ 0x55;
      break;
    case 4:
      r = v - 100;
      break;
    case 5:
      r = squared(v);
      break;
    case 6:
      r = ~v;
      break;
    case 7:
      r = v << 3;
      break;
    default:
      r = 0;
      break;
  }
  out[i] = r;
}

__device__ void ldmatrix4(unsigned (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row)));
}
__device__ void ldmatrix2(unsigned (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row)));
}

template <Mma kKind>
__global__ void mma16(const unsigned short* a, const unsigned short* b, void* out) {
  __shared__ __align__(16) unsigned short sa[16][16], sb[8][16];
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) sa[i / 16][i % 16] = a[i];
  for (int i = lane; i < 128; i += 32) sb[i / 16][i % 16] = b[i];
  __syncwarp();
  unsigned fa[4], fb[2];
  ldmatrix4(fa, &sa[lane % 16][8 * (lane / 16)]);
  ldmatrix2(fb, &sb[lane % 8][8 * (lane / 8 % 2)]);
  const int row = lane / 4, column = 2 * (lane % 4);
  if (kKind == Mma::F16Accumulate) {
    unsigned c[2] = {0x3c003c00, 0x3c003c00};
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%0, %1}, {%2, %3, %4, %5}, {%6, %7}, {%0, %1};"
        : "+r"(c[0]), "+r"(c[1])
        : "r"(fa[0]), "r"(fa[1]), "r"(fa[2]), "r"(fa[3]), "r"(fb[0]), "r"(fb[1]));
    unsigned* o = static_cast<unsigned*>(out);
    o[(row * 8 + column) / 2] = c[0];
    o[((row + 8) * 8 + column) / 2] = c[1];
    return;
  }
  float c[4] = {1, 1, 1, 1};
  if (kKind == Mma::F16)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(fa[0]), "r"(fa[1]), "r"(fa[2]), "r"(fa[3]), "r"(fb[0]), "r"(fb[1]));
  else if (kKind == Mma::Bf16)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(fa[0]), "r"(fa[1]), "r"(fa[2]), "r"(fa[3]), "r"(fb[0]), "r"(fb[1]));
  else  // two halves of k
    for (int h = 0; h < 2; ++h)
      asm volatile(
          "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, "
          "%3};"
          : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
          : "r"(fa[2 * h]), "r"(fa[2 * h + 1]), "r"(fb[h]));
  float* o = static_cast<float*>(out);
  o[row * 8 + column] = c[0];
  o[row * 8 + column + 1] = c[1];
  o[(row + 8) * 8 + column] = c[2];
  o[(row + 8) * 8 + column + 1] = c[3];
}
__global__ void mma_tf32(const float* a, const float* b, float* out) {  // k = 8
  const int lane = threadIdx.x, row = lane / 4, t = lane % 4;
  const unsigned *ua = reinterpret_cast<const unsigned*>(a), *ub = reinterpret_cast<const unsigned*>(b);
  float c[4] = {1, 1, 1, 1};
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, "
      "%1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(ua[row * 8 + t]), "r"(ua[(row + 8) * 8 + t]), "r"(ua[row * 8 + t + 4]),
        "r"(ua[(row + 8) * 8 + t + 4]), "r"(ub[row * 8 + t]), "r"(ub[row * 8 + t + 4]));
  out[row * 8 + 2 * t] = c[0];
  out[row * 8 + 2 * t + 1] = c[1];
  out[(row + 8) * 8 + 2 * t] = c[2];
  out[(row + 8) * 8 + 2 * t + 1] = c[3];
}
__global__ void mma_s8(const signed char* a, const signed char* b, int* out) {  // k = 32
  const int lane = threadIdx.x, row = lane / 4, t = lane % 4;
  const int *wa = reinterpret_cast<const int*>(a), *wb = reinterpret_cast<const int*>(b);  // 8 words a row
  int c[4] = {1, 1, 1, 1};
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, "
      "%1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(wa[row * 8 + t]), "r"(wa[(row + 8) * 8 + t]), "r"(wa[row * 8 + t + 4]),
        "r"(wa[(row + 8) * 8 + t + 4]), "r"(wb[row * 8 + t]), "r"(wb[row * 8 + t + 4]));
  out[row * 8 + 2 * t] = c[0];
  out[row * 8 + 2 * t + 1] = c[1];
  out[(row + 8) * 8 + 2 * t] = c[2];
  out[(row + 8) * 8 + 2 * t + 1] = c[3];
}
__global__ void ldmatrix_kernel(const unsigned short* in, unsigned* plain, unsigned* transposed) {
  __shared__ __align__(16) unsigned short s[32][8];
  for (int k = 0; k < 8; ++k) s[threadIdx.x][k] = in[8 * threadIdx.x + k];
  __syncwarp();
  unsigned r[4];
  ldmatrix4(r, s[threadIdx.x]);
  for (int k = 0; k < 4; ++k) plain[32 * k + threadIdx.x] = r[k];
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(s[threadIdx.x])));
  for (int k = 0; k < 4; ++k) transposed[32 * k + threadIdx.x] = r[k];
}

}  // namespace

void launch_pipeline(Pipeline mutant, const float* in, float* out, int tiles) {
  switch (mutant) {
    case Pipeline::Correct:
      pipeline<Pipeline::Correct><<<1, 64>>>(in, out, tiles);
      break;
    case Pipeline::NoBarrierAfterWait:
      pipeline<Pipeline::NoBarrierAfterWait><<<1, 64>>>(in, out, tiles);
      break;
    case Pipeline::NoBarrierBeforeRefill:
      pipeline<Pipeline::NoBarrierBeforeRefill><<<1, 64>>>(in, out, tiles);
      break;
    case Pipeline::NoWait:
      pipeline<Pipeline::NoWait><<<1, 64>>>(in, out, tiles);
      break;
    case Pipeline::WeakWait:
      pipeline<Pipeline::WeakWait><<<1, 64>>>(in, out, tiles);
      break;
    case Pipeline::NoWaitAtEnd:
      pipeline<Pipeline::NoWaitAtEnd><<<1, 64>>>(in, out, tiles);
      break;
    default:
      break;
  }
}
void launch_fault_on(Fault fault, int* data, int n, int blocks) {
  switch (fault) {
    // clang-format off
    PTXSIM_FAULT(None)
    PTXSIM_FAULT(GlobalOverrun)
    PTXSIM_FAULT(GlobalNull)
    PTXSIM_FAULT(SharedOverrun)
    PTXSIM_FAULT(Misaligned)
    PTXSIM_FAULT(UninitialisedShared)
    PTXSIM_FAULT(LocalOverrun)
    PTXSIM_FAULT(Trap)
    PTXSIM_FAULT(Assert)
    PTXSIM_FAULT(DivergentBarrier)
    PTXSIM_FAULT(SpinForever)
    PTXSIM_FAULT(MissingSyncthreads)
    PTXSIM_FAULT(MissingSyncwarp)
    PTXSIM_FAULT(SharedWriteWrite)
    PTXSIM_FAULT(BlocksWriteSame)
    PTXSIM_FAULT(BlocksReadWritten)
    PTXSIM_FAULT(ReservedMask)
    // clang-format on
  }
}
void launch_fault(Fault fault, int* data, int n) {
  launch_fault_on(fault, data, n, 1);
}
void launch_message(int* data, int* flag, int* out, Fence fence) {
  message<<<2, 1>>>(data, flag, out, fence);
}
void launch_message_in_block(int* data, int* flag, int* out, bool with_fences) {
  message_in_block<<<1, 64>>>(data, flag, out, with_fences);
}
void launch_shared_alignment(int* out) {
  shared_alignment<<<1, 1, 16>>>(out);
}
void launch_grid_sum(const int* in, int* partial, int* out, int n, int blocks) {
  void* args[] = {&in, &partial, &out, &n};
  cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(grid_sum), dim3(blocks), dim3(32), args, 0,
                              nullptr);
}
void launch_last_block_sum(const int* in, int* partial, unsigned* counter, int* out, int n, int blocks,
                           bool with_fence) {
  last_block_sum<<<blocks, 32>>>(in, partial, counter, out, n, with_fence);
}
void launch_lock(int* lock, int* sum, int blocks) {
  lock_kernel<<<blocks, 64>>>(lock, sum);
}
void launch_named_barriers(int* out) {
  named_barriers<<<1, 64>>>(out);
}
void launch_mbarrier(Mbarrier mutant, const int* in, int* out, int tiles) {
  switch (mutant) {
    case Mbarrier::Correct:
      mbarrier_kernel<Mbarrier::Correct><<<1, 64>>>(in, out, tiles);
      break;
    case Mbarrier::NoWaitFull:
      mbarrier_kernel<Mbarrier::NoWaitFull><<<1, 64>>>(in, out, tiles);
      break;
    case Mbarrier::NoWaitEmpty:
      mbarrier_kernel<Mbarrier::NoWaitEmpty><<<1, 64>>>(in, out, tiles);
      break;
    case Mbarrier::NoBarrierAfterInit:
      mbarrier_kernel<Mbarrier::NoBarrierAfterInit><<<1, 64>>>(in, out, tiles);
      break;
  }
}
void launch_warp_collectives(const int* in, int* out) {
  warp_collectives<<<1, 32>>>(in, out);
}
void launch_atomics(int* words) {
  atomics<<<1, 256>>>(words);
}
void launch_copy(const float* in, float* out, int n, int stride, cudaStream_t stream) {
  copy<<<(n + 127) / 128, 128, 0, stream>>>(in, out, n, stride);
}
void launch_add(float* data, int n, float value, cudaStream_t stream) {
  add<<<(n + 127) / 128, 128, 0, stream>>>(data, n, value);
}
void launch_transpose(const float* in, float* out, bool padded) {
  if (padded)
    transpose<1><<<1, dim3(32, 8)>>>(in, out);
  else
    transpose<0><<<1, dim3(32, 8)>>>(in, out);
}
const void* transpose_kernel() {
  return reinterpret_cast<const void*>(&transpose<0>);
}
void launch_print() {
  print<<<2, 2>>>();
}
void launch_switch(const int* in, int* out, int n) {
  switch_kernel<<<(n + 127) / 128, 128>>>(in, out, n);
}
void launch_mma(Mma kind, const void* a, const void* b, void* out) {
  const auto *ha = static_cast<const unsigned short*>(a), *hb = static_cast<const unsigned short*>(b);
  switch (kind) {
    case Mma::F16:
      mma16<Mma::F16><<<1, 32>>>(ha, hb, out);
      break;
    case Mma::Bf16:
      mma16<Mma::Bf16><<<1, 32>>>(ha, hb, out);
      break;
    case Mma::F16Accumulate:
      mma16<Mma::F16Accumulate><<<1, 32>>>(ha, hb, out);
      break;
    case Mma::F16K8:
      mma16<Mma::F16K8><<<1, 32>>>(ha, hb, out);
      break;
    case Mma::Tf32:
      mma_tf32<<<1, 32>>>(static_cast<const float*>(a), static_cast<const float*>(b),
                          static_cast<float*>(out));
      break;
    case Mma::S8:
      mma_s8<<<1, 32>>>(static_cast<const signed char*>(a), static_cast<const signed char*>(b),
                        static_cast<int*>(out));
      break;
  }
}
void launch_ldmatrix(const unsigned short* in, unsigned* plain, unsigned* transposed) {
  ldmatrix_kernel<<<1, 32>>>(in, plain, transposed);
}
