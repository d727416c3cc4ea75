// SPDX-License-Identifier: Apache-2.0
// mma.sync. Fragments are first spread to plain matrices: A[row][k], B[k][column], C[row][column]. Every sum
// is a chain of fused multiply-adds over k in ascending order, the same in every build (tensor cores add in
// another order and truncate).
#include <xmmintrin.h>

#include "half.h"

namespace ptxsim::PTXSIM_ISA {
namespace {

// A of 16-bit values: register pairs (0,1) hold columns 0-7 of rows 0-7 and 8-15, (2,3) columns 8-15. Four
// neighbouring lanes hold one row's 8 values in order.
template <class F, int K>
PTXSIM_INLINE void load_a(Warp& w, const uint16_t* r, float (*a)[K]) {
  for (int half = 0; half < K / 8; ++half)
    for (int upper = 0; upper < 2; ++upper) {
      const uint16_t* v = reg<uint16_t>(w, r[2 * half + upper]);
      for (int row = 0; row < 8; ++row) F::template load<8>(v + 8 * row, a[8 * upper + row] + 8 * half);
    }
}
template <class F, int K>
PTXSIM_INLINE void load_b(Warp& w, const uint16_t* r, float (*b)[8]) {
  for (int half = 0; half < K / 8; ++half) {
    alignas(64) float t[64];  // [column][k]
    F::template load<64>(reg<uint16_t>(w, r[half]), t);
#ifdef __AVX2__
    __m256 x[8], y[8];
    for (int n = 0; n < 8; ++n) x[n] = _mm256_load_ps(t + 8 * n);
    for (int n = 0; n < 4; ++n)
      y[2 * n] = _mm256_unpacklo_ps(x[2 * n], x[2 * n + 1]),
            y[2 * n + 1] = _mm256_unpackhi_ps(x[2 * n], x[2 * n + 1]);
    for (int n = 0; n < 2; ++n) {
      x[4 * n] = _mm256_shuffle_ps(y[4 * n], y[4 * n + 2], 0x44),
            x[4 * n + 1] = _mm256_shuffle_ps(y[4 * n], y[4 * n + 2], 0xee);
      x[4 * n + 2] = _mm256_shuffle_ps(y[4 * n + 1], y[4 * n + 3], 0x44),
                x[4 * n + 3] = _mm256_shuffle_ps(y[4 * n + 1], y[4 * n + 3], 0xee);
    }
    for (int k = 0; k < 4; ++k) {
      _mm256_store_ps(b[8 * half + k], _mm256_permute2f128_ps(x[k], x[k + 4], 0x20));
      _mm256_store_ps(b[8 * half + k + 4], _mm256_permute2f128_ps(x[k], x[k + 4], 0x31));
    }
#else
    for (int n = 0; n < 8; ++n)
      for (int k = 0; k < 8; ++k) b[8 * half + k][n] = t[8 * n + k];
#endif
  }
}
// C: registers 0 and 1 hold columns 2t and 2t+1 of row l/4, registers 2 and 3 the same of row l/4 + 8.
// Four neighbouring lanes hold one row, so a row is two registers' 16 bytes interleaved.
template <class T>
PTXSIM_INLINE void load_c(Warp& w, const uint16_t* r, T (*c)[8]) {
  for (int upper = 0; upper < 2; ++upper) {
    const float *even = reg<float>(w, r[2 * upper]), *odd = reg<float>(w, r[2 * upper + 1]);
    for (int row = 0; row < 8; ++row) {
      const __m128 e = _mm_load_ps(even + 4 * row), o = _mm_load_ps(odd + 4 * row);
      float* to = reinterpret_cast<float*>(c[8 * upper + row]);
      _mm_store_ps(to, _mm_unpacklo_ps(e, o));
      _mm_store_ps(to + 4, _mm_unpackhi_ps(e, o));
    }
  }
}
template <class T>
PTXSIM_INLINE void store_d(Warp& w, const uint16_t* r, const T (*c)[8]) {
  for (int upper = 0; upper < 2; ++upper) {
    float *even = reg<float>(w, r[2 * upper]), *odd = reg<float>(w, r[2 * upper + 1]);
    for (int row = 0; row < 8; ++row) {
      const float* from = reinterpret_cast<const float*>(c[8 * upper + row]);
      const __m128 low = _mm_load_ps(from), high = _mm_load_ps(from + 4);
      _mm_store_ps(even + 4 * row, _mm_shuffle_ps(low, high, 0x88));
      _mm_store_ps(odd + 4 * row, _mm_shuffle_ps(low, high, 0xdd));
    }
  }
}
// c += a * b
template <int K>
PTXSIM_INLINE void multiply(const float (*a)[K], const float (*b)[8], float (*c)[8]) {
#ifdef __AVX2__
  for (int half = 0; half < 16; half += 8) {  // eight rows at a time stay in registers
    __m256 sum[8];
    for (int m = 0; m < 8; ++m) sum[m] = _mm256_load_ps(c[half + m]);
    for (int k = 0; k < K; ++k) {
      const __m256 row = _mm256_load_ps(b[k]);
      for (int m = 0; m < 8; ++m) sum[m] = _mm256_fmadd_ps(_mm256_broadcast_ss(&a[half + m][k]), row, sum[m]);
    }
    for (int m = 0; m < 8; ++m) _mm256_store_ps(c[half + m], sum[m]);
  }
#else
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < K; ++k)
      for (int n = 0; n < 8; ++n) c[m][n] = __builtin_fmaf(a[m][k], b[k][n], c[m][n]);
#endif
}

template <class F, int K>
void mma_f32(Warp& w, const Inst& i) {
  if (!collective(w, kAllLanes)) return;
  alignas(64) float a[16][K], b[K][8], c[16][8];
  load_a<F, K>(w, i.r + 4, a);
  load_b<F, K>(w, i.r + 4 + K / 4, b);
  load_c<float>(w, i.r + 4 + K / 4 + K / 8, c);
  multiply<K>(a, b, c);
  store_d<float>(w, i.r, c);
}
// f16 accumulators: two registers of pairs, row l/4 and row l/4 + 8. Rounded to f16 once, at the end.
template <int K>
void mma_f16(Warp& w, const Inst& i) {
  if (!collective(w, kAllLanes)) return;
  alignas(64) float a[16][K], b[K][8], c[16][8];
  load_a<F16, K>(w, i.r + 2, a);
  load_b<F16, K>(w, i.r + 2 + K / 4, b);
  const uint16_t* from = i.r + 2 + K / 4 + K / 8;
  for (int upper = 0; upper < 2; ++upper) load_f16<64>(reg<uint16_t>(w, from[upper]), c[8 * upper]);
  multiply<K>(a, b, c);
  for (int upper = 0; upper < 2; ++upper) store_f16<64>(c[8 * upper], reg<uint16_t>(w, i.r[upper]));
}

// tf32: registers 0 and 1 hold column t of rows l/4 and l/4 + 8, registers 2 and 3 column t + 4. The low 13
// bits are ignored.
template <int K>
void mma_tf32(Warp& w, const Inst& i) {
  if (!collective(w, kAllLanes)) return;
  alignas(64) float a[16][K], b[K][8], c[16][8];
  const auto value = [](uint32_t bits) { return bits_as<float>(bits & ~0x1fffu); };
  for (int half = 0; half < K / 4; ++half) {
    for (int upper = 0; upper < 2; ++upper) {
      const uint32_t* v = reg<uint32_t>(w, i.r[4 + 2 * half + upper]);
      for (int l = 0; l < kLanes; ++l) a[8 * upper + l / 4][4 * half + (l & 3)] = value(v[l]);
    }
    const uint32_t* v = reg<uint32_t>(w, i.r[4 + K / 2 + half]);
    for (int l = 0; l < kLanes; ++l) b[4 * half + (l & 3)][l / 4] = value(v[l]);
  }
  load_c<float>(w, i.r + 4 + K / 2 + K / 4, c);
  multiply<K>(a, b, c);
  store_d<float>(w, i.r, c);
}

// Integers: four k per register; A registers 0 and 1 hold k = 4t.. of rows l/4 and l/4 + 8, registers 2 and 3
// k = 16 + 4t.
template <class A, class B, int K, bool kSat>
void mma_integer(Warp& w, const Inst& i) {
  if (!collective(w, kAllLanes)) return;
  alignas(64) int32_t a[16][K], b[K][8], c[16][8];
  for (int half = 0; half < K / 16; ++half) {
    for (int upper = 0; upper < 2; ++upper) {
      const A* v = reg<A>(w, i.r[4 + 2 * half + upper]);
      for (int l = 0; l < kLanes; ++l)
        for (int k = 0; k < 4; ++k) a[8 * upper + l / 4][16 * half + 4 * (l & 3) + k] = v[4 * l + k];
    }
    const B* v = reg<B>(w, i.r[4 + K / 8 + half]);
    for (int l = 0; l < kLanes; ++l)
      for (int k = 0; k < 4; ++k) b[16 * half + 4 * (l & 3) + k][l / 4] = v[4 * l + k];
  }
  load_c<int32_t>(w, i.r + 4 + K / 8 + K / 16, c);
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 8; ++n) {
      int64_t sum = c[m][n];
      for (int k = 0; k < K; ++k) sum += a[m][k] * b[k][n];
      if (kSat) sum = sum > INT32_MAX ? INT32_MAX : sum < INT32_MIN ? INT32_MIN : sum;
      c[m][n] = static_cast<int32_t>(sum);
    }
  }
  store_d<int32_t>(w, i.r, c);
}

#define INTEGER_ENTRIES(a, b, A, B)                                          \
  {"mma.m16n8k16.s32." a "." b ".s32", mma_integer<A, B, 16, false>},        \
      {"mma.m16n8k32.s32." a "." b ".s32", mma_integer<A, B, 32, false>},    \
      {"mma.m16n8k16.s32." a "." b ".s32.sat", mma_integer<A, B, 16, true>}, \
      {"mma.m16n8k32.s32." a "." b ".s32.sat", mma_integer<A, B, 32, true>},

const HandlerEntry kEntries[] = {
    {"mma.m16n8k16.f32.f16.f16.f32", mma_f32<F16, 16>},
    {"mma.m16n8k16.f32.bf16.bf16.f32", mma_f32<Bf16, 16>},
    {"mma.m16n8k8.f32.f16.f16.f32", mma_f32<F16, 8>},
    {"mma.m16n8k8.f32.bf16.bf16.f32", mma_f32<Bf16, 8>},
    {"mma.m16n8k16.f16.f16.f16.f16", mma_f16<16>},
    {"mma.m16n8k8.f16.f16.f16.f16", mma_f16<8>},
    {"mma.m16n8k8.f32.tf32.tf32.f32", mma_tf32<8>},
    {"mma.m16n8k4.f32.tf32.tf32.f32", mma_tf32<4>},
    INTEGER_ENTRIES("s8", "s8", int8_t, int8_t) INTEGER_ENTRIES("u8", "u8", uint8_t, uint8_t)
        INTEGER_ENTRIES("s8", "u8", int8_t, uint8_t) INTEGER_ENTRIES("u8", "s8", uint8_t, int8_t)};

}  // namespace

extern const HandlerTable matrix_handlers;
const HandlerTable matrix_handlers = {kEntries, sizeof(kEntries) / sizeof(kEntries[0])};

}  // namespace ptxsim::PTXSIM_ISA
