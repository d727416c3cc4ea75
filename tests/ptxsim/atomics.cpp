// SPDX-License-Identifier: Apache-2.0
// atom and red, lane after lane.
#include "atomics.h"

#include <cstring>
#include <map>
#include <type_traits>

#include "block.h"
#include "float16.h"
#include "global_race.h"
#include "polling.h"
#include "race_detector.h"
#include "warp_operations.h"

namespace ptxsim {
namespace {

enum Operation { kAdd, kMin, kMax, kAnd, kOr, kXor, kExch, kCas, kInc, kDec };
enum Type { kU32, kS32, kU64, kS64, kF32, kF64, kF16, kBf16, kF16x2, kBf16x2, kU16 };

template <class T>
T apply_integer(Operation op, T old, T value, T compare) {
  switch (op) {
    case kAdd:
      return static_cast<T>(static_cast<std::make_unsigned_t<T>>(old) +
                            static_cast<std::make_unsigned_t<T>>(value));
    case kMin:
      return value < old ? value : old;
    case kMax:
      return value > old ? value : old;
    case kAnd:
      return static_cast<T>(old & value);
    case kOr:
      return static_cast<T>(old | value);
    case kXor:
      return static_cast<T>(old ^ value);
    case kExch:
      return value;
    case kCas:
      return old == compare ? value : old;
    case kInc:
      return old >= value ? T(0) : static_cast<T>(old + 1);
    case kDec:
      return old == 0 || old > value ? value : static_cast<T>(old - 1);
  }
  return old;
}
template <class T>
uint64_t integer(Operation op, uint64_t old, uint64_t value, uint64_t compare) {
  const T r = apply_integer<T>(op, static_cast<T>(old), static_cast<T>(value), static_cast<T>(compare));
  return static_cast<uint64_t>(static_cast<std::make_unsigned_t<T>>(r));
}
template <class T, class U>
T as(U u) {
  T t;
  std::memcpy(&t, &u, sizeof(T));
  return t;
}
uint16_t add_f16(uint16_t a, uint16_t b) {
  return float_to_f16(f16_to_float(a) + f16_to_float(b));
}
uint16_t add_bf16(uint16_t a, uint16_t b) {
  return float_to_bf16(bf16_to_float(a) + bf16_to_float(b));
}
uint16_t extreme_half(Operation op, uint16_t a, uint16_t b, bool bf16) {
  const float x = bf16 ? bf16_to_float(a) : f16_to_float(a), y = bf16 ? bf16_to_float(b) : f16_to_float(b);
  if (x != x) return b;
  if (y != y) return a;
  return (op == kMin ? y < x : y > x) ? b : a;
}

uint64_t apply(Type type, Operation op, uint64_t old, uint64_t value, uint64_t compare) {
  switch (type) {
    case kU16:
      return integer<uint16_t>(op, old, value, compare);
    case kU32:
      return integer<uint32_t>(op, old, value, compare);
    case kS32:
      return integer<int32_t>(op, old, value, compare);
    case kU64:
      return integer<uint64_t>(op, old, value, compare);
    case kS64:
      return integer<int64_t>(op, old, value, compare);
    case kF32:
      return as<uint32_t>(as<float>(static_cast<uint32_t>(old)) + as<float>(static_cast<uint32_t>(value)));
    case kF64:
      return as<uint64_t>(as<double>(old) + as<double>(value));
    case kF16:
    case kBf16: {
      const uint16_t a = static_cast<uint16_t>(old), b = static_cast<uint16_t>(value);
      if (op != kAdd) return extreme_half(op, a, b, type == kBf16);
      return type == kF16 ? add_f16(a, b) : add_bf16(a, b);
    }
    case kF16x2:
    case kBf16x2: {
      const Type half = type == kF16x2 ? kF16 : kBf16;
      return apply(half, op, old & 0xffff, value & 0xffff, 0) |
             apply(half, op, old >> 16 & 0xffff, value >> 16 & 0xffff, 0) << 16;
    }
  }
  return old;
}

template <class T>
void atomic(Warp& w, const Inst& i) {
  const Type type = static_cast<Type>(i.target & 0xff);
  const Operation op = static_cast<Operation>(i.target >> 8);
  const uint32_t bytes = static_cast<uint32_t>(sizeof(T)) * i.n;
  uint64_t a[kLanes];
  for (int l = 0; l < kLanes; ++l) {
    if (i.aux & kNoBase)
      a[l] = static_cast<uint64_t>(i.imm);
    else if (i.aux & kAddress32)
      a[l] = reg<uint32_t>(w, i.r[kAddress])[l] + static_cast<uint32_t>(i.imm);
    else
      a[l] = reg<uint64_t>(w, i.r[kAddress])[l] + static_cast<uint64_t>(i.imm);
  }
  slow_addresses(w, i, a, bytes, Access::Atomic);
  Block& block = *w.block;
  const uint64_t shared = reinterpret_cast<uint64_t>(w.shared);
  const bool ordered = block.race != nullptr;
  const bool ignored = config().ignore_order != 0;
  const bool releases = (i.aux & kRelease) != 0 && !ignored, acquires = (i.aux & kAcquire) != 0 && !ignored;
  for (uint32_t m = w.mask; m != 0; m &= m - 1) {
    const int l = __builtin_ctz(m);
    const bool in_shared = a[l] - shared < w.shared_bytes;
    if ((w.watch & kWatchWeak) && !in_shared) {
      if (releases && (i.aux & kScopeWide)) block.weak.publish(thread_index(w, l), block.barrier_phase);
      block.weak.publish_overlapping(a[l], bytes);
    }
    if (!ordered) continue;
    GlobalRaceDetector* global = in_shared ? nullptr : w.launch->global_race.get();
    if (releases) {
      if (global) global->release(w, l, a[l]);
      block.race->release(thread_index(w, l), a[l]);
    }
    if (acquires) {
      block.race->acquire(thread_index(w, l), a[l]);
      if (global) global->acquire(w, l, a[l]);
    }
    if (global && !releases && !acquires) global->relaxed(w, l, a[l], Access::Atomic);
  }
  if (w.watch) observe(w, i, a, bytes, Access::Atomic);
  bool changed = false;
  for (uint32_t m = w.mask; m != 0; m &= m - 1) {
    const int l = __builtin_ctz(m);
    for (int k = 0; k < i.n; ++k) {
      T* at = reinterpret_cast<T*>(a[l]) + k;
      const T old = *at;
      const T now = static_cast<T>(apply(type, op, old, reg<T>(w, i.r[4 + k])[l], reg<T>(w, i.r[8])[l]));
      changed = changed || now != old;
      *at = now;
      if (i.r[9]) reg<T>(w, i.r[k])[l] = old;
    }
  }
  if (changed)
    ++w.launch->memory_changes;
  else
    poll(w);
}

const HandlerEntry kEntries[] = {
    {"atomic.16", atomic<uint16_t>}, {"atomic.32", atomic<uint32_t>}, {"atomic.64", atomic<uint64_t>}};

}  // namespace

const HandlerTable atomic_operations = {kEntries, std::size(kEntries)};

int atomic_code(const std::string& operation, const std::string& type) {
  static const std::map<std::string, Operation> operations = {
      {"add", kAdd}, {"min", kMin},   {"max", kMax}, {"and", kAnd}, {"or", kOr},
      {"xor", kXor}, {"exch", kExch}, {"cas", kCas}, {"inc", kInc}, {"dec", kDec}};
  static const std::map<std::string, Type> types = {
      {"u32", kU32},     {"b32", kU32},       {"s32", kS32}, {"u64", kU64}, {"b64", kU64},
      {"s64", kS64},     {"f32", kF32},       {"f64", kF64}, {"f16", kF16}, {"bf16", kBf16},
      {"f16x2", kF16x2}, {"bf16x2", kBf16x2}, {"b16", kU16}};
  const auto op = operations.find(operation);
  const auto t = types.find(type);
  if (op == operations.end() || t == types.end()) return -1;
  const bool floating = t->second >= kF32 && t->second <= kBf16x2;
  const bool half = t->second >= kF16 && t->second <= kBf16x2;
  if (floating && op->second != kAdd && !(half && (op->second == kMin || op->second == kMax))) return -1;
  if (t->second == kU16 && op->second != kCas && op->second != kExch) return -1;
  return static_cast<int>(op->second) << 8 | static_cast<int>(t->second);
}

}  // namespace ptxsim
