// SPDX-License-Identifier: Apache-2.0
// Loads and stores. The common case (all lanes inside one allocation, or inside shared memory, and aligned)
// is decided here with a few vector comparisons; everything else goes to slow_addresses.
#include <xmmintrin.h>

#include "lanes.h"
#include "polling.h"

namespace ptxsim::PTXSIM_ISA {
namespace {

PTXSIM_INLINE uint32_t space_bits(const Inst& i) {
  return i.aux & kSpaceMask;
}
constexpr uint32_t kGeneric = 0, kGlobal = 1, kShared = 2, kParam = 4;

PTXSIM_INLINE void fill_inactive(const Warp& w, uint64_t* a) {
  if (__builtin_expect(w.mask != kAllLanes, 0)) {
    const uint64_t first = a[__builtin_ctz(w.mask)];
    for (int l = 0; l < kLanes; ++l) a[l] = (w.mask >> l) & 1 ? a[l] : first;
  }
}

PTXSIM_INLINE void addresses(Warp& w, const Inst& i, uint64_t* a) {
  if (i.aux & kNoBase) {
    for (int l = 0; l < kLanes; ++l) a[l] = static_cast<uint64_t>(i.imm);
    return;
  }
  if (i.aux & kAddress32) {
    const uint32_t *base = reg<uint32_t>(w, i.r[kAddress]), offset = static_cast<uint32_t>(i.imm);
    for (int l = 0; l < kLanes; ++l) a[l] = base[l] + offset;
  } else {
    const uint64_t* base = reg<uint64_t>(w, i.r[kAddress]);
    for (int l = 0; l < kLanes; ++l) a[l] = base[l] + static_cast<uint64_t>(i.imm);
  }
  fill_inactive(w, a);
}

// Addresses to host pointers, with all checks.
PTXSIM_INLINE void to_host(Warp& w, const Inst& i, uint64_t* a, uint32_t bytes, Access access) {
  int64_t low = INT64_MAX, high = 0;
  uint64_t ones = 0;
  for (int l = 0; l < kLanes; ++l) {
    const int64_t v = static_cast<int64_t>(a[l]);
    low = v < low ? v : low;
    high = v > high ? v : high;
    ones |= a[l];
  }
  const bool aligned = (ones & (bytes - 1)) == 0;
  if (space_bits(i) == kShared) {
    if (aligned && low >= 0 && static_cast<uint64_t>(high) + bytes <= w.shared_bytes) {
      const uint64_t base = reinterpret_cast<uint64_t>(w.shared);
      for (int l = 0; l < kLanes; ++l) a[l] += base;
      return;
    }
  } else if (space_bits(i) <= kGlobal) {
    const AllocationCache& c = w.cache[w.pc];
    if (aligned && low >= static_cast<int64_t>(c.begin) && static_cast<uint64_t>(high) + bytes <= c.end)
      return;
  }
  slow_addresses(w, i, a, bytes, access);
}

PTXSIM_INLINE bool consecutive(const uint64_t* a, uint64_t bytes) {
  uint64_t different = 0;
  for (int l = 0; l < kLanes; ++l) different |= a[l] ^ (a[0] + static_cast<uint64_t>(l) * bytes);
  return different == 0;
}

template <class M, class R>
void load_lanes(Warp& w, const Inst& i, const uint64_t* a) {
  using Signed = std::conditional_t<std::is_signed_v<M>, std::make_signed_t<R>, R>;
  if (i.n == 1) {
    R* d = reg<R>(w, i.r[0]);
    if (sizeof(M) == sizeof(R) && w.mask == kAllLanes && consecutive(a, sizeof(M))) {
      __builtin_memcpy(d, reinterpret_cast<const void*>(a[0]), sizeof(M) * kLanes);
      return;
    }
    alignas(64) R t[kLanes];
    for (int l = 0; l < kLanes; ++l)
      t[l] = static_cast<R>(static_cast<Signed>(*reinterpret_cast<const M*>(a[l])));
    if (w.mask == kAllLanes)
      __builtin_memcpy(d, t, sizeof(t));
    else
      blend(d, t, w.mask);
    return;
  }
  if constexpr (sizeof(M) == 4 && sizeof(R) == 4) {
    if (i.n == 4 && w.mask == kAllLanes) {
      float *d0 = reg<float>(w, i.r[0]), *d1 = reg<float>(w, i.r[1]), *d2 = reg<float>(w, i.r[2]),
            *d3 = reg<float>(w, i.r[3]);
      for (int l = 0; l < kLanes; l += 4) {
        __m128 x0 = _mm_loadu_ps(reinterpret_cast<const float*>(a[l])),
               x1 = _mm_loadu_ps(reinterpret_cast<const float*>(a[l + 1]));
        __m128 x2 = _mm_loadu_ps(reinterpret_cast<const float*>(a[l + 2])),
               x3 = _mm_loadu_ps(reinterpret_cast<const float*>(a[l + 3]));
        _MM_TRANSPOSE4_PS(x0, x1, x2, x3);
        _mm_store_ps(d0 + l, x0), _mm_store_ps(d1 + l, x1), _mm_store_ps(d2 + l, x2),
            _mm_store_ps(d3 + l, x3);
      }
      return;
    }
  }
  alignas(64) R t[8][kLanes];
  for (int k = 0; k < i.n; ++k)
    for (int l = 0; l < kLanes; ++l)
      t[k][l] = static_cast<R>(static_cast<Signed>(reinterpret_cast<const M*>(a[l])[k]));
  for (int k = 0; k < i.n; ++k) blend(reg<R>(w, i.r[k]), t[k], w.mask);
}

template <class M, class R>
void load_weak(Warp& w, const Inst& i, const uint64_t* a) {  // as the block sees memory
  using Signed = std::conditional_t<std::is_signed_v<M>, std::make_signed_t<R>, R>;
  for (int l = 0; l < kLanes; ++l) {
    if (((w.mask >> l) & 1) == 0) continue;
    M v[8];
    weak_load(w, a[l], static_cast<uint32_t>(sizeof(M)) * i.n, v);
    for (int k = 0; k < i.n; ++k) reg<R>(w, i.r[k])[l] = static_cast<R>(static_cast<Signed>(v[k]));
  }
}

template <class M, class R>
void load(Warp& w, const Inst& i) {
  alignas(64) uint64_t a[kLanes];
  const uint32_t bytes = static_cast<uint32_t>(sizeof(M)) * i.n;
  addresses(w, i, a);
  to_host(w, i, a, bytes, Access::Read);
  if (__builtin_expect(w.watch != 0 || (i.aux & kStrong) != 0, 0)) {
    if (i.aux & kStrong) strong_access(w, i, a, bytes, Access::Read);
    if (w.watch) observe(w, i, a, bytes, Access::Read);
    if ((w.watch & kWatchWeak) && space_bits(i) <= kGlobal && !(i.aux & kStrong))
      return load_weak<M, R>(w, i, a);
  }
  load_lanes<M, R>(w, i, a);
}

template <class M, class R>
void store(Warp& w, const Inst& i) {
  alignas(64) uint64_t a[kLanes];
  const uint32_t bytes = static_cast<uint32_t>(sizeof(M)) * i.n;
  addresses(w, i, a);
  to_host(w, i, a, bytes, Access::Write);
  if (__builtin_expect(w.watch != 0 || (i.aux & kStrong) != 0, 0)) {
    if (i.aux & kStrong) strong_access(w, i, a, bytes, Access::Write);
    if (w.watch) observe(w, i, a, bytes, Access::Write);
    if ((w.watch & kWatchWeak) && space_bits(i) <= kGlobal && !(i.aux & kStrong)) {
      for (int l = 0; l < kLanes; ++l) {
        if (((w.mask >> l) & 1) == 0) continue;
        M v[8];
        for (int k = 0; k < i.n; ++k) v[k] = static_cast<M>(reg<R>(w, i.r[k])[l]);
        weak_store(w, a[l], bytes, v);
      }
      return;
    }
  }
  if (i.n == 1) {
    const R* s = reg<R>(w, i.r[0]);
    if (w.mask == kAllLanes) {
      if (sizeof(M) == sizeof(R) && consecutive(a, sizeof(M))) {
        __builtin_memcpy(reinterpret_cast<void*>(a[0]), s, sizeof(M) * kLanes);
        return;
      }
      for (int l = 0; l < kLanes; ++l) *reinterpret_cast<M*>(a[l]) = static_cast<M>(s[l]);
      return;
    }
    for (uint32_t m = w.mask; m != 0; m &= m - 1) {
      const int l = __builtin_ctz(m);
      *reinterpret_cast<M*>(a[l]) = static_cast<M>(s[l]);
    }
    return;
  }
  for (uint32_t m = w.mask; m != 0; m &= m - 1) {
    const int l = __builtin_ctz(m);
    for (int k = 0; k < i.n; ++k) reinterpret_cast<M*>(a[l])[k] = static_cast<M>(reg<R>(w, i.r[k])[l]);
  }
}

// ---- ldmatrix: lane 8i + r names row r of matrix i, 16 bytes; lanes 4r .. 4r+3 receive it.
PTXSIM_INLINE void row_addresses(Warp& w, const Inst& i, uint64_t* a, Access access) {
  addresses(w, i, a);
  for (int l = 8 * i.n; l < kLanes; ++l) a[l] = a[0];
  to_host(w, i, a, 16, access);
  if (w.watch) observe(w, i, a, 16, access);
}
// 8x8 16-bit transpose of one register across the warp: lane 4r+c holds (r, 2c), (r, 2c+1).
PTXSIM_INLINE void transpose(const uint16_t* in, uint16_t* out) {
  __m128i r[8], s[8];
  for (int k = 0; k < 8; ++k) r[k] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + 8 * k));
  for (int k = 0; k < 4; ++k)
    s[2 * k] = _mm_unpacklo_epi16(r[k], r[k + 4]), s[2 * k + 1] = _mm_unpackhi_epi16(r[k], r[k + 4]);
  for (int k = 0; k < 4; ++k)
    r[2 * k] = _mm_unpacklo_epi16(s[k], s[k + 4]), r[2 * k + 1] = _mm_unpackhi_epi16(s[k], s[k + 4]);
  for (int k = 0; k < 4; ++k)
    s[2 * k] = _mm_unpacklo_epi16(r[k], r[k + 4]), s[2 * k + 1] = _mm_unpackhi_epi16(r[k], r[k + 4]);
  for (int k = 0; k < 8; ++k) _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 8 * k), s[k]);
}
template <bool kTranspose>
void ldmatrix(Warp& w, const Inst& i) {
  if (!collective(w, kAllLanes)) return;
  alignas(64) uint64_t a[kLanes];
  row_addresses(w, i, a, Access::Read);
  for (int k = 0; k < i.n; ++k) {
    alignas(64) uint16_t rows[64], t[64];
    for (int r = 0; r < 8; ++r)
      __builtin_memcpy(rows + 8 * r, reinterpret_cast<const void*>(a[8 * k + r]), 16);
    if (kTranspose) transpose(rows, t);
    blend(reg<uint32_t>(w, i.r[k]), reinterpret_cast<const uint32_t*>(kTranspose ? t : rows), w.mask);
  }
}
template <bool kTranspose>
void stmatrix(Warp& w, const Inst& i) {
  if (!collective(w, kAllLanes)) return;
  alignas(64) uint64_t a[kLanes];
  row_addresses(w, i, a, Access::Write);
  for (int k = 0; k < i.n; ++k) {
    alignas(64) uint16_t t[64];
    const uint16_t* rows = reg<uint16_t>(w, i.r[k]);
    if (kTranspose) transpose(rows, t);
    for (int r = 0; r < 8; ++r)
      __builtin_memcpy(reinterpret_cast<void*>(a[8 * k + r]), (kTranspose ? t : rows) + 8 * r, 16);
  }
}
void movmatrix(Warp& w, const Inst& i) {
  if (!collective(w, kAllLanes)) return;
  alignas(64) uint16_t t[64];
  transpose(reg<uint16_t>(w, i.r[1]), t);
  blend(reg<uint32_t>(w, i.r[0]), reinterpret_cast<const uint32_t*>(t), w.mask);
}

#define LOAD_ENTRIES(type, M)                                                   \
  {"ld." type ".16", load<M, uint16_t>}, {"ld." type ".32", load<M, uint32_t>}, \
      {"ld." type ".64", load<M, uint64_t>},
const HandlerEntry kEntries[] = {LOAD_ENTRIES("u8", uint8_t) LOAD_ENTRIES("s8", int8_t)
                                     LOAD_ENTRIES("u16", uint16_t){"ld.s16.32", load<int16_t, uint32_t>},
                                 {"ld.s16.64", load<int16_t, uint64_t>},
                                 {"ld.u32.32", load<uint32_t, uint32_t>},
                                 {"ld.u32.64", load<uint32_t, uint64_t>},
                                 {"ld.s32.64", load<int32_t, uint64_t>},
                                 {"ld.u64.64", load<uint64_t, uint64_t>},
                                 {"st.8.16", store<uint8_t, uint16_t>},
                                 {"st.8.32", store<uint8_t, uint32_t>},
                                 {"st.8.64", store<uint8_t, uint64_t>},
                                 {"st.16.16", store<uint16_t, uint16_t>},
                                 {"st.16.32", store<uint16_t, uint32_t>},
                                 {"st.16.64", store<uint16_t, uint64_t>},
                                 {"st.32.32", store<uint32_t, uint32_t>},
                                 {"st.32.64", store<uint32_t, uint64_t>},
                                 {"st.64.64", store<uint64_t, uint64_t>},
                                 {"ldmatrix", ldmatrix<false>},
                                 {"ldmatrix.trans", ldmatrix<true>},
                                 {"stmatrix", stmatrix<false>},
                                 {"stmatrix.trans", stmatrix<true>},
                                 {"movmatrix", movmatrix}};

}  // namespace

extern const HandlerTable memory_handlers;
const HandlerTable memory_handlers = {kEntries, sizeof(kEntries) / sizeof(kEntries[0])};

}  // namespace ptxsim::PTXSIM_ISA
