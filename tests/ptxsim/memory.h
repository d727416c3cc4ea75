// SPDX-License-Identifier: Apache-2.0
// Device memory: which global addresses are live. A global address is a host pointer, so copies are memcpy;
// every access of a kernel is checked against this table.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <string>
#include <vector>

namespace ptxsim {

struct Allocation {
  uint64_t begin = 0, end = 0;
  std::string name;   // of a variable, or given by ptxsim_name_buffer
  bool host = false;  // pinned, managed or registered host memory
  bool managed = false;
  bool owned = true;                           // false: cudaHostRegister, module variables
  void* raw = nullptr;                         // what malloc returned
  uint64_t read_bytes = 0, written_bytes = 0;  // by the current launch
};

class Memory {
 public:
  ~Memory();
  // Fresh memory is poison: 0xff, a NaN in every float format. Returns nullptr when the host is out of
  // memory.
  void* allocate(size_t bytes, bool host, bool managed);
  // False if `pointer` does not begin a live allocation. Freed memory is kept aside for a while so that it is
  // not reused.
  bool release(void* pointer);
  Allocation* add(const void* pointer, size_t bytes, std::string name, bool host);  // memory owned by others
  bool remove(const void* pointer);

  Allocation* find(uint64_t address);
  // Says what lies at or near an address, for messages.
  std::string describe(uint64_t address);
  uint64_t used_bytes() const { return used_bytes_; }
  std::map<uint64_t, Allocation>& all() { return table_; }
  // Changes whenever an allocation goes away, so that cached pointers to Allocation know they are stale.
  uint64_t generation() const { return generation_; }

 private:
  struct Freed {
    uint64_t begin, end;
    void* raw;
  };
  std::map<uint64_t, Allocation> table_;  // by begin
  std::deque<Freed> freed_;
  size_t freed_bytes_ = 0;
  uint64_t used_bytes_ = 0, generation_ = 1;
};

Memory& memory();

// Addresses in these windows are not host pointers: the top byte says which space they belong to.
constexpr uint64_t kSharedWindow = 0x01ull << 56;
constexpr uint64_t kLocalWindow = 0x02ull << 56;
constexpr uint64_t kParamWindow = 0x03ull << 56;
constexpr uint64_t kWindowMask = 0xffull << 56;

}  // namespace ptxsim
