// SPDX-License-Identifier: Apache-2.0
//
// Vec<T, N>: N neighbouring elements that travel in one memory access of at most 16 bytes. It keeps the bits
// as they are in memory, half the registers of the floats they stand for, and converts on use.
#pragma once

#include <cstdint>

#include "cuda/ptx.cuh"

namespace fs::cuda {

inline constexpr int kAccessBytes = 16;

// Elements per access so that the wider of two formats moves 16 bytes: neighbouring threads then touch
// neighbouring bytes in both, and every 32-byte sector that is fetched is used in full by one request.
template <class A, class B = A>
inline constexpr int kVecOf = kAccessBytes / static_cast<int>(sizeof(A) > sizeof(B) ? sizeof(A) : sizeof(B));

template <class T, int N>
struct Vec {
  static constexpr int kBytes = N * static_cast<int>(sizeof(T));
  static constexpr int kWords = (kBytes + 3) / 4;
  static_assert(kBytes == 16 || kBytes == 8 || kBytes == 4 || kBytes == 2);

  uint32_t word[kWords];

  static __device__ __forceinline__ Vec load(const T* from) {
    Vec vec;
    if constexpr (kBytes == 16) {
      const uint4 bits = *reinterpret_cast<const uint4*>(from);
      vec.word[0] = bits.x;
      vec.word[1] = bits.y;
      vec.word[2] = bits.z;
      vec.word[3] = bits.w;
    } else if constexpr (kBytes == 8) {
      const uint2 bits = *reinterpret_cast<const uint2*>(from);
      vec.word[0] = bits.x;
      vec.word[1] = bits.y;
    } else if constexpr (kBytes == 4) {
      vec.word[0] = *reinterpret_cast<const uint32_t*>(from);
    } else {
      vec.word[0] = *reinterpret_cast<const uint16_t*>(from);
    }
    return vec;
  }

  __device__ __forceinline__ void store(T* to) const {
    if constexpr (kBytes == 16) {
      *reinterpret_cast<uint4*>(to) = make_uint4(word[0], word[1], word[2], word[3]);
    } else if constexpr (kBytes == 8) {
      *reinterpret_cast<uint2*>(to) = make_uint2(word[0], word[1]);
    } else if constexpr (kBytes == 4) {
      *reinterpret_cast<uint32_t*>(to) = word[0];
    } else {
      *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(word[0]);
    }
  }

  // A piece of a row that may be misaligned or short (`count` elements; the others read as 0 and stay
  // unwritten). kWhole promises that it is neither. Both ways the same thread holds the same elements, so
  // that sums over a row are the same bits wherever the row lies.
  template <bool kWhole>
  static __device__ __forceinline__ Vec load_piece(const T* from, int count) {
    if constexpr (kWhole) {
      return load(from);
    } else {
      Vec vec{};
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (i >= count) continue;
        if constexpr (sizeof(T) == 4) {
          vec.word[i] = reinterpret_cast<const uint32_t*>(from)[i];
        } else {
          vec.word[i / 2] |= static_cast<uint32_t>(reinterpret_cast<const uint16_t*>(from)[i])
                             << (i % 2 * 16);
        }
      }
      return vec;
    }
  }
  template <bool kWhole>
  __device__ __forceinline__ void store_piece(T* to, int count) const {
    if constexpr (kWhole) {
      store(to);
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (i >= count) continue;
        if constexpr (sizeof(T) == 4) {
          reinterpret_cast<uint32_t*>(to)[i] = word[i];
        } else {
          reinterpret_cast<uint16_t*>(to)[i] = static_cast<uint16_t>(word[i / 2] >> (i % 2 * 16));
        }
      }
    }
  }

  __device__ __forceinline__ float operator[](int i) const {
    if constexpr (sizeof(T) == 4) {
      return __uint_as_float(word[i]);
    } else {
      return to_float(T{static_cast<uint16_t>(word[i / 2] >> (i % 2 * 16))});
    }
  }

  static __device__ __forceinline__ Vec from(const float (&x)[N]) {
    Vec vec;
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int i = 0; i < N; ++i) vec.word[i] = __float_as_uint(x[i]);
    } else if constexpr (N == 1) {
      vec.word[0] = from_float<T>(x[0]).bits;
    } else {
#pragma unroll
      for (int i = 0; i < N / 2; ++i) vec.word[i] = pack_pair<T>(x[2 * i], x[2 * i + 1]);
    }
    return vec;
  }
};

}  // namespace fs::cuda
