// SPDX-License-Identifier: Apache-2.0
// One warp as the instruction handlers see it, and the decoded instruction they get.
//
// This header is included by files compiled for different instruction sets, so it holds plain data and
// always-inlined functions only: nothing the linker could share between them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ptxsim {

constexpr int kLanes = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr uint32_t kNever = 0xffffffffu;  // a pc no group has

struct Warp;
struct Inst;
struct Block;
struct Launch;
struct Allocation;
using Handler = void (*)(Warp&, const Inst&);

enum class InstClass : uint8_t {
  Integer,
  Float,
  Half,
  Double,
  Special,
  Convert,
  Move,
  Compare,
  Control,
  Barrier,
  WarpVote,
  LoadGlobal,
  StoreGlobal,
  LoadShared,
  StoreShared,
  LoadLocal,
  StoreLocal,
  LoadParam,
  Atomic,
  AsyncCopy,
  LoadMatrix,
  Mma,
  Fence,
  Other,
  Count
};

// Operands are byte offsets in units of 64 into the warp's registers, or with the top bit set into the
// constants of the launch. A 16-bit register takes one unit (32 lanes x 2 bytes), a 32-bit one two, a 64-bit
// one four.
struct alignas(64) Inst {
  Handler fn = nullptr;
  int64_t imm = 0;      // address offset, immediate, table index
  uint32_t aux = 0;     // meaning by handler
  uint32_t target = 0;  // branch target
  uint16_t guard = 0;   // predicate index + 1, top bit: negated; 0: always
  InstClass cls = InstClass::Other;
  uint8_t n = 1;  // vector length
  uint16_t r[17] = {};
};
static_assert(sizeof(Inst) == 64);
constexpr int kAddress = 16;  // r[kAddress] is the address register of a memory instruction
constexpr uint16_t kConstantBit = 0x8000;

// aux of memory instructions
constexpr uint32_t kSpaceMask = 7;       // value of Space
constexpr uint32_t kAddress32 = 1 << 3;  // the address register has 32 bits
constexpr uint32_t kNoBase = 1 << 4;     // imm is the whole address
constexpr uint32_t kStrong = 1 << 5;     // volatile, relaxed, acquire, release: not a weak access
constexpr uint32_t kAcquire = 1 << 6;
constexpr uint32_t kRelease = 1 << 7;
constexpr uint32_t kScopeWide = 1 << 8;  // gpu or sys scope

enum class Wait : uint8_t { None, Barrier, WarpSync, Collective };

struct Group {  // lanes of a warp that share a pc
  uint32_t pc, mask;
  Wait wait;
  uint32_t argument;  // barrier number, or member mask
};

struct AllocationCache {  // the allocation an instruction used last
  uint64_t begin, end;
  Allocation* allocation;
};

// What observe() has to look at after the bounds check of an access.
constexpr uint32_t kWatchCounters = 1, kWatchUninit = 2, kWatchSharedRace = 4, kWatchGlobalRace = 8,
                   kWatchWeak = 16;

struct Warp {
  uint8_t* base[2];  // registers, constants
  uint32_t* pred;
  uint32_t mask;        // lanes that execute the current instruction
  uint32_t next;        // pc afterwards; a handler may change it
  uint32_t pc, active;  // of the running group
  uint32_t
      stop_pc;    // the running group may not go to or past this pc without a look at the others; 0 stops now
  uint32_t live;  // lanes that have not exited
  uint32_t watch;
  uint32_t index;          // within the block
  uint32_t polls;          // polling instructions in this time slice
  bool run_last;           // this slice runs the group with the highest pc
  AllocationCache* cache;  // by pc
  uint8_t* shared;
  uint64_t shared_bytes;
  const uint8_t* params;
  uint64_t params_bytes;
  uint8_t* local;  // of lane 0; lane l's frame is local + l * local_bytes
  uint64_t local_bytes;
  uint64_t* class_counts;
  Block* block;
  Launch* launch;
  uint32_t num_others;
  Group others[kLanes];  // groups that are not running
};

#define PTXSIM_INLINE static inline __attribute__((always_inline))

template <class T>
PTXSIM_INLINE T* reg(Warp& w, uint16_t r) {
  return reinterpret_cast<T*>(w.base[r >> 15] + (static_cast<size_t>(r & 0x7fff) << 6));
}

enum class Access : uint8_t { Read, Write, Atomic };

// ---- what handlers call; none of it depends on the instruction set ----

// Turns the addresses of the active lanes into host pointers, in place; a bad address is a fault.
// Inactive lanes get the pointer of an active one.
void slow_addresses(Warp& w, const Inst& i, uint64_t* addresses, uint32_t bytes, Access access);
// Counters, uninitialised reads, races; `addresses` are host pointers.
void observe(Warp& w, const Inst& i, const uint64_t* addresses, uint32_t bytes, Access access);
// Weak-memory mode: a load of `bytes` at a host pointer as this block sees it, and a buffered store.
void weak_load(Warp& w, uint64_t address, uint32_t bytes, void* out);
void weak_store(Warp& w, uint64_t address, uint32_t bytes, const void* in);
// False: not all live lanes of `members` are at this instruction yet; the handler must return at once.
bool collective(Warp& w, uint32_t members);
[[noreturn]] void fault(Warp& w, int lane, const char* what);

struct HandlerEntry {
  const char* key;
  Handler fn;
};
struct HandlerTable {
  const HandlerEntry* entries;
  size_t count;
};

}  // namespace ptxsim
